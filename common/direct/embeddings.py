"""Prompts are encoded once, before training, and the text encoders let go: they can be as large as the denoiser.

What a pipeline's `encode_prompt` returns for one prompt is kept in files, whatever it is, and a batch is put together
of its prompts'. Whether that is what the pipeline returns for a batch is tried on the shortest and the longest prompt.
Where it is not, and where a call needs its encoders, they stay, and a sentence says so.
"""

import gc
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common.direct.probes import Each, before_denoiser, taken
from common.errors import CALL_ERRORS, UserError, blame, line_of
from common.files import whole

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils._pytree import tree_flatten, tree_unflatten
from tqdm import tqdm

PROMPTS_A_FILE = 256
DAMAGE = (OSError, SafetensorError)
PLAIN = (type(None), bool, int, float, str, torch.device, torch.dtype)


class _Way(NamedTuple):
    """How a call encodes its prompts."""

    encode: Callable  # prompts -> what each `encode_prompt` of the call returns
    asked: list  # the other arguments of each
    ones: list  # the answers for the shortest and for the longest prompt
    both: tuple  # that for the two


def let_go(pipeline, prompts, calls, folder, accelerator, dry_run=False, ready=None):
    """Encode all prompts, each process a part; from then on `encode_prompt` looks them up. Drop the text encoders.

    Denoisers do not run and may be on another device. prompts: list of str. calls: [arguments] of a student's call
    with the size of an image, and of what it may turn out to be. folder: where the embeddings are
    kept, for a resumed run too. dry_run: nothing is written, and every prompt is the longest. ready: a folder in which
    `make` may have put them. Returns a sentence on what was done, "" where there is no text encoder. Computes in the
    encoders' own dtypes, without autocast.
    """
    encoders, kind = _encoders(pipeline), type(pipeline).__name__
    names, place = ", ".join(encoders), accelerator.device
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    held, freed = _gib(modules), _gib(encoders.values())
    del modules
    stay = f"note: {names} encode each batch and stay in memory, "
    if not encoders:
        return ""
    way = _way(pipeline, prompts, calls, place, checks=not dry_run)
    if isinstance(way, str):
        return stay + way
    encode, asked, ones, both = way
    identity = None if dry_run else _identity(way, encoders, kind, place)
    made, why = _Table(folder, prompts, way, identity), None
    if ready and not dry_run and Path(ready).is_dir():
        advance = _Table(ready, prompts, way, identity)
        why = advance.objection()
        made = made if why else advance
    if made.folder == Path(folder) and made.size() > (free := _free(folder)):
        return f"{stay}for all embeddings take {made.size():.1f} GiB in `output_dir`, which has {free:.1f}"
    table = dict.fromkeys(prompts, ones[1])
    if not dry_run:
        made.fill(encode, (accelerator.process_index, accelerator.num_processes))
        accelerator.wait_for_everyone()
        table = made

    def remembered(*args, **more):
        texts, others = taken(args, more)
        if others not in asked or any(text not in table for text in texts):
            raise UserError(f"`pretrained_teacher_model`: its call asks for embeddings that were not made: {texts}")
        i = asked.index(others)
        return _merged(both[i], ones[0][i], [table[text][i] for text in texts])

    pipeline.encode_prompt = remembered
    for name in encoders:
        setattr(pipeline, name, None)
    try:
        before_denoiser(pipeline, prompts[:1], **calls[0])
    except CALL_ERRORS as error:
        for name, part in encoders.items():
            setattr(pipeline, name, part)
        return f"note: prompts are encoded once, and {names} stay in memory, the call needs them: {line_of(error)}"
    del encode, way
    encoders.clear()
    gc.collect()
    once = f"{len(set(prompts))} prompts are encoded once, which takes {made.size():.2f} GiB in {made.folder}"
    again = f"; those in {ready} are not used, {why}" if why else ""
    return f"{once}{again}; let go: {names}, {freed:.2f} of {held:.2f} GiB of weights"


def make(pipeline, prompts, kwargs, folder, device, part=(0, 1)):
    """Encode in advance what `let_go` would, the files of a task, (index, count) `part`, that are not there yet.

    kwargs: of the student's call. The others as there. Returns a sentence on what was done. UserError where `let_go`
    would keep the encoders.
    """
    encoders, kind = _encoders(pipeline), type(pipeline).__name__
    way = _way(pipeline, prompts, [kwargs], device) if encoders else f"for a {kind} has no text encoder"
    if isinstance(way, str):
        raise UserError(f"`save_embeddings`: training has no use for them, {way}; drop it")
    table = _Table(folder, prompts, way, _identity(way, encoders, kind, device))
    if table.size() > (free := _free(folder)):
        raise UserError(
            f"`save_embeddings`: they take {table.size():.1f} GiB in {folder}, which has {free:.1f}; drop it"
        )
    made = table.fill(way.encode, part)
    return f"embeddings: {made} of {len(table.places)} prompts are encoded now, into {folder}"


def _encoders(pipeline):
    parts = {name: part for name, part in pipeline.components.items() if name.startswith("text_encoder")}
    return {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}


def _way(pipeline, prompts, calls, device, checks=True):
    """A `_Way`, or why answers cannot be kept, in words. checks: whether there are values to compare."""
    kind = type(pipeline).__name__
    if not hasattr(pipeline, "encode_prompt"):
        return f"for a {kind} has no encode_prompt"
    asked, encode_prompt = [], pipeline.encode_prompt
    for kwargs in calls:
        once, two = (before_denoiser(pipeline, few, **kwargs)[0] for few in (prompts[:1], (prompts * 2)[:2]))
        if not _is_plain(once) or once != two:
            return f"for the call of a {kind} encodes more than its prompt"
        asked += [others for others in once if others not in asked]  # twice of HunyuanDiT

    @torch.no_grad()
    def encode(texts):
        with torch.autocast(torch.device(device).type, enabled=False):
            return tuple(encode_prompt(*args, **more) for args, more in (_put(others, texts) for others in asked))

    short, long = min(prompts, key=len), max(prompts, key=len)
    ones, both = [encode([prompt]) for prompt in (short, long)], encode([short, long])
    if checks and not _same(both, _merged(both, ones[0], ones)):
        return f"for what a {kind} makes of a prompt depends on the others of its batch"
    return _Way(encode, asked, ones, both)


def _free(folder):
    """GiB of disk that are free where a folder is or will be."""
    return shutil.disk_usage(next(path for path in Path(folder).absolute().parents if path.exists())).free / 2**30


def _gib(modules):
    return sum(parameter.nbytes for module in modules for parameter in module.parameters()) / 2**30


def _is_plain(value):
    """Whether it holds no tensor, nor any other object."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return all(map(_is_plain, value)) if isinstance(value, (list, tuple)) else isinstance(value, PLAIN)


def _put(others, texts):
    """(args, kwargs) again, with these prompts."""
    others = {key: [str(value)] * len(texts) if isinstance(value, Each) else value for key, value in others.items()}
    places = [key for key in others if isinstance(key, int)]
    more = {key: value for key, value in others.items() if isinstance(key, str)}
    if 0 in others or not places:
        return [others[key] for key in places], more | {"prompt": texts}
    return [texts, *(others[key] for key in places)], more


def _merged(pattern, one, rows):
    """The answer for a batch of those for its prompts. pattern, one: the answers for two prompts and for one, which
    tell what is a batch's and what the call's. Shorter rows are filled with zeros, as masked ones are."""
    if isinstance(pattern, (tuple, list)):
        if len(pattern) != len(one):
            return [each for row in rows for each in row]
        parts = list(zip(pattern, one, *rows, strict=True))
        return type(pattern)(
            _mask(p, parts) if o is None and each[0] is None else _merged(p, o, each) for p, o, *each in parts
        )
    if not isinstance(pattern, torch.Tensor) or one is None or pattern.shape[:1] == one.shape[:1]:
        return rows[0]
    most = [max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True)]
    pads = [
        [n for size, top in zip(row.shape[:0:-1], most[:0:-1], strict=True) for n in (0, top - size)] for row in rows
    ]
    return torch.cat([torch.nn.functional.pad(row, pad) for row, pad in zip(rows, pads, strict=True)])


def _mask(pattern, parts):
    """What a pipeline leaves out where it hides nothing, as Qwen-Image's of one prompt: 1 where a row of a batch has
    its own values, (B, L) as the embeddings beside it in `parts`; None where all rows are equally long."""
    padded, is_padded = {}, False  # {length of the pattern: those of the rows}; whether the pattern is
    for p, o, *rows in parts:
        if isinstance(p, torch.Tensor) and isinstance(o, torch.Tensor) and p.ndim > 1 and p.shape[:1] != o.shape[:1]:
            padded[p.shape[1]] = [row.shape[1] for row in rows]
            is_padded |= p.shape[1] != o.shape[1]
    if all(len(set(lengths)) == 1 for lengths in padded.values()) or pattern is None and is_padded:
        return None
    lengths = padded.get(pattern.shape[1]) if isinstance(pattern, torch.Tensor) and pattern.ndim == 2 else None
    if lengths is None:
        raise UserError(
            "`train_batch_size`: how this pipeline masks shorter prompts in a batch of longer ones is not known, its "
            "shortest and longest prompt are equally long; pass 1"
        )
    hides = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return hides.to(pattern.device, pattern.dtype)


def _same(a, b):
    """Whether two answers are equal but for rounding."""
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if not isinstance(a, torch.Tensor):
        return a == b
    if a.shape != b.shape or a.dtype != b.dtype or not a.is_floating_point():
        return a.shape == b.shape and torch.equal(a, b)
    tolerance = 0.05 if a.dtype in (torch.float16, torch.bfloat16) else 1e-4
    return bool((a - b).abs().max() <= tolerance * a.abs().max())


def _sample(network):
    """Some values of a network, which tell it from others."""
    parameters = list(network.parameters())
    return [p.detach().flatten()[:4].float().tolist() for p in parameters[:: max(1, len(parameters) // 16)]]


def _digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _identity(way, encoders, kind, device):
    dtypes = [str(getattr(leaf, "dtype", leaf)) for leaf in tree_flatten(way.ones[0])[0]]
    given = repr(way.asked).replace(repr(torch.device(device)), "")  # a process's own
    encoder = _digest([kind, *map(_sample, encoders.values())])
    return {"precision or student's call": _digest([dtypes, given]), "text encoder": encoder}


class _Table:
    """{prompt: its answer} in safetensors files of PROMPTS_A_FILE each, which are mapped, not read.

    identity: of what makes them, which is written into each file; a file of something else is made again.
    """

    def __init__(self, folder, prompts, way, identity):
        self.folder, self.prompts = Path(folder), sorted(set(prompts))
        self.leaves, self.form = tree_flatten(way.ones[0])
        self.longest = sum(x.nbytes for x in tree_flatten(way.ones[1])[0] if isinstance(x, torch.Tensor))
        self.metadata = {"prompts": _digest(self.prompts)} | (identity or {})
        self.places = {prompt: divmod(i, PROMPTS_A_FILE) for i, prompt in enumerate(self.prompts)}
        self.opened = {}

    def size(self):
        """GiB that all take, at most."""
        return len(self.prompts) * self.longest / 2**30

    def objection(self):
        """What is wrong with the files, in words; None where all are there."""
        return next(filter(None, map(self._objection, range(self._count()))), None)

    def fill(self, encode, part):
        """Make what is not there of a task's files, (index, count) `part`. Returns the number of prompts encoded."""
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [number for number in range(self._count())[part[0] :: part[1]] if self._objection(number)]
        total = sum(map(len, map(self._own, missing)))
        with tqdm(total=total, desc="prompts", unit="prompt", disable=None if total else True) as progress:
            for number in missing:
                tensors = {}
                for i, prompt in enumerate(self._own(number)):
                    for leaf, value in enumerate(tree_flatten(encode([prompt]))[0]):
                        if isinstance(value, torch.Tensor):
                            tensors[f"{i}.{leaf}"] = value.cpu().contiguous().clone()
                    progress.update()
                with whole(self._path(number)) as path:
                    save_file(tensors, path, self.metadata)
        return total

    def __contains__(self, prompt):
        return prompt in self.places

    def __getitem__(self, prompt):
        number, i = self.places[prompt]
        with blame(f"the embeddings in {self._path(number)} cannot be read", *DAMAGE, way_out="delete this file"):
            if number not in self.opened:
                self.opened[number] = safe_open(self._path(number), framework="pt")
            leaves = [
                self.opened[number].get_tensor(f"{i}.{k}").to(leaf.device) if isinstance(leaf, torch.Tensor) else leaf
                for k, leaf in enumerate(self.leaves)
            ]
        return tree_unflatten(leaves, self.form)

    def _count(self):
        return -(-len(self.prompts) // PROMPTS_A_FILE)

    def _own(self, number):
        """The prompts of a file."""
        return self.prompts[number * PROMPTS_A_FILE :][:PROMPTS_A_FILE]

    def _path(self, number):
        return self.folder / f"{number:05d}.safetensors"

    def _objection(self, number):
        kept = [k for k, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor)]
        needed = {f"{i}.{k}" for i in range(len(self._own(number))) for k in kept}
        try:
            with safe_open(self._path(number), framework="pt") as file:
                made_by, names = file.metadata() or {}, set(file.keys())
        except DAMAGE:
            return f"{self._path(number).name} is missing or damaged"
        other = [what for what, digest in self.metadata.items() if made_by.get(what) != digest]
        if other:
            return f"they are of other {other[0]}" if other[0] == "prompts" else f"they are of another {other[0]}"
        return None if names == needed else f"{self._path(number).name} lacks prompts"
