"""Prompts are encoded once, before training, and the text encoders let go: they can be as large as the denoiser.

What a pipeline's `encode_prompt` returns for one prompt is kept in files, whatever it is, and a batch is put together
of its prompts'. Whether that is what the pipeline returns for a batch is tried on the shortest and the longest prompt.
Where it is not, and where a call needs its encoders, they stay, and a sentence says so.
"""

import gc
import hashlib
import json
import shutil
from pathlib import Path

from common.direct.pipelines import call, denoisers
from common.errors import CALL_ERRORS, UserError, line_of
from common.files import whole

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils._pytree import tree_flatten, tree_unflatten
from tqdm import tqdm

PROMPTS_A_FILE = 256
PLAIN = (type(None), bool, int, float, str, torch.device, torch.dtype)


def let_go(pipeline, prompts, kwargs, folder, accelerator, dry_run=False):
    """Encode all prompts, each process a part; from then on `encode_prompt` looks them up. Drop the text encoders.

    prompts: list of str. kwargs: of the student's call, with the size of an image. folder: where the embeddings are
    kept, for a resumed run too. dry_run: nothing is written, and every prompt is the longest. Returns a sentence on
    what was done, "" where there is no text encoder. Computes in the encoders' own dtypes, without autocast.
    """
    parts = {name: part for name, part in pipeline.components.items() if name.startswith("text_encoder")}
    encoders = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    names, kind = ", ".join(encoders), type(pipeline).__name__
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    held, freed = _gib(modules), _gib(encoders.values())
    del modules
    stay = f"note: {names} encode each batch and stay in memory, "
    if not encoders:
        return ""
    if not hasattr(pipeline, "encode_prompt"):
        return f"{stay}for a {kind} has no encode_prompt"
    asked, encode_prompt = _asked(pipeline, prompts[:1], kwargs), pipeline.encode_prompt  # twice of HunyuanDiT
    if not _is_plain(asked) or asked != _asked(pipeline, (prompts * 2)[:2], kwargs):
        return f"{stay}for the call of a {kind} encodes more than its prompt"

    @torch.no_grad()
    def encode(texts):
        with torch.autocast(accelerator.device.type, enabled=False):
            return tuple(encode_prompt(*args, **more) for args, more in (_put(others, texts) for others in asked))

    short, long = min(prompts, key=len), max(prompts, key=len)
    ones, both = [encode([prompt]) for prompt in (short, long)], encode([short, long])
    if not dry_run and not _same(both, _merged(both, ones[0], ones)):
        return f"{stay}for what a {kind} makes of a prompt depends on the others of its batch"
    size = len(set(prompts)) * sum(x.nbytes for x in tree_flatten(ones[1])[0] if isinstance(x, torch.Tensor)) / 2**30
    free = shutil.disk_usage(next(path for path in Path(folder).absolute().parents if path.exists())).free / 2**30
    if size > free:
        return f"{stay}for all embeddings take {size:.1f} GiB in `output_dir`, which has {free:.1f}"
    table = dict.fromkeys(prompts, ones[1])
    if not dry_run:
        given = repr(asked).replace(repr(accelerator.device), "")  # a process's own
        identity = [kind, given, *map(_sample, encoders.values())]
        table = _Table(folder, sorted(set(prompts)), ones[0], identity)
        table.fill(encode, accelerator)

    def remembered(*args, **more):
        texts, others = _take(args, more)
        if others not in asked or any(text not in table for text in texts):
            raise UserError(f"`pretrained_teacher_model`: its call asks for embeddings that were not made: {texts}")
        i = asked.index(others)
        return _merged(both[i], ones[0][i], [table[text][i] for text in texts])

    pipeline.encode_prompt = remembered
    for name in encoders:
        setattr(pipeline, name, None)
    try:
        _asked(pipeline, prompts[:1], kwargs)
    except CALL_ERRORS as error:
        for name, part in encoders.items():
            setattr(pipeline, name, part)
        return f"note: prompts are encoded once, and {names} stay in memory, the call needs them: {line_of(error)}"
    parts.clear(), encoders.clear()
    gc.collect()
    return (
        f"{len(set(prompts))} prompts are encoded once, which takes {size:.2f} GiB in {folder}; let go: {names}, "
        f"{freed:.2f} of {held:.2f} GiB of weights"
    )


def _gib(modules):
    return sum(parameter.nbytes for module in modules for parameter in module.parameters()) / 2**30


def _is_plain(value):
    """Whether it holds no tensor, nor any other object."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return all(map(_is_plain, value)) if isinstance(value, (list, tuple)) else isinstance(value, PLAIN)


def _take(args, more):
    """(the prompts, {place or name: value} of the other arguments) of an `encode_prompt`."""
    given = {**dict(enumerate(args)), **more}
    prompt = given.pop("prompt" if "prompt" in given else 0)
    return [prompt] if isinstance(prompt, str) else list(prompt), given


def _put(others, texts):
    """(args, kwargs) again, with these prompts."""
    places = [key for key in others if isinstance(key, int)]
    more = {key: value for key, value in others.items() if isinstance(key, str)}
    if 0 in others or not places:
        return [others[key] for key in places], more | {"prompt": texts}
    return [texts, *(others[key] for key in places)], more


def _asked(pipeline, prompts, kwargs):
    """The arguments, but for the prompts, of each `encode_prompt` of a call, up to its denoiser."""
    encode_prompt, asked = pipeline.encode_prompt, []

    class Reached(BaseException):
        pass

    def noted(*args, **more):
        asked.append(_take(args, more)[1])
        return encode_prompt(*args, **more)

    def stop(*_):
        raise Reached

    hooks = [module.register_forward_pre_hook(stop, prepend=True) for module in denoisers(pipeline).values()]
    pipeline.encode_prompt = noted
    try:
        call(pipeline, prompts, range(len(prompts)), **kwargs)
    except Reached:
        pass
    finally:
        pipeline.encode_prompt = encode_prompt
        for hook in hooks:
            hook.remove()
    return asked


def _merged(pattern, one, rows):
    """The answer for a batch of those for its prompts. pattern, one: the answers for two prompts and for one, which
    tell what is a batch's and what the call's. Shorter rows are filled with zeros, as masked ones are."""
    if isinstance(pattern, (tuple, list)):
        if len(pattern) != len(one):
            return [each for row in rows for each in row]
        parts = zip(pattern, one, *rows, strict=True)
        return type(pattern)(_merged(p, o, list(each)) for p, o, *each in parts)
    if not isinstance(pattern, torch.Tensor) or pattern.shape[:1] == one.shape[:1]:
        return rows[0]
    most = [max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True)]
    pads = [
        [n for size, top in zip(row.shape[:0:-1], most[:0:-1], strict=True) for n in (0, top - size)] for row in rows
    ]
    return torch.cat([torch.nn.functional.pad(row, pad) for row, pad in zip(rows, pads, strict=True)])


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


class _Table:
    """{prompt: its answer} in safetensors files of PROMPTS_A_FILE each, which are mapped, not read.

    one: the answer for a prompt, whose form all have. identity: of what makes them; files of another are made again.
    """

    def __init__(self, folder, prompts, one, identity):
        self.folder, self.prompts = Path(folder), prompts
        self.leaves, self.form = tree_flatten(one)
        dtypes = [str(getattr(leaf, "dtype", leaf)) for leaf in self.leaves]
        self.sha256 = hashlib.sha256(json.dumps([prompts, dtypes, identity]).encode()).hexdigest()
        self.places = {prompt: divmod(i, PROMPTS_A_FILE) for i, prompt in enumerate(prompts)}
        self.opened = {}

    def fill(self, encode, accelerator):
        """Make what is not there: each process its files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        starts = range(0, len(self.prompts), PROMPTS_A_FILE)
        own = [i for i in range(len(starts)) if i % accelerator.num_processes == accelerator.process_index]
        missing = [number for number in own if not self._is_there(number)]
        total = sum(len(self.prompts[starts[number] :][:PROMPTS_A_FILE]) for number in missing)
        with tqdm(total=total, desc="prompts", unit="prompt", disable=None if total else True) as progress:
            for number in missing:
                tensors = {}
                for i, prompt in enumerate(self.prompts[starts[number] :][:PROMPTS_A_FILE]):
                    for leaf, value in enumerate(tree_flatten(encode([prompt]))[0]):
                        if isinstance(value, torch.Tensor):
                            tensors[f"{i}.{leaf}"] = value.cpu().contiguous().clone()
                    progress.update()
                with whole(self._path(number)) as path:
                    save_file(tensors, path, {"sha256": self.sha256})
        accelerator.wait_for_everyone()

    def __contains__(self, prompt):
        return prompt in self.places

    def __getitem__(self, prompt):
        number, i = self.places[prompt]
        if number not in self.opened:
            self.opened[number] = safe_open(self._path(number), framework="pt")
        leaves = [
            self.opened[number].get_tensor(f"{i}.{k}").to(leaf.device) if isinstance(leaf, torch.Tensor) else leaf
            for k, leaf in enumerate(self.leaves)
        ]
        return tree_unflatten(leaves, self.form)

    def _path(self, number):
        return self.folder / f"{number:05d}.safetensors"

    def _is_there(self, number):
        try:
            with safe_open(self._path(number), framework="pt") as file:
                return file.metadata()["sha256"] == self.sha256
        except (OSError, SafetensorError, TypeError, LookupError):
            return False
