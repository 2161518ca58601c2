"""Teacher pairs for direct distillation: what (prompt, seed) the teacher was asked, and the latents that it gave.

A folder of pairs holds `dataset_config.json` and tar shards of fixed ranges of indices. Pair i is `NNNNNNNNN.json`
(index, prompt, seed = base seed + i, sha256 of the float32 unit noise) and `.safetensors` (`latents`, as the pipeline
calls them, in its dtype), optionally `.png`. The bytes depend on the flags alone, not on the number of processes.
The other form is a table of images: `image,prompt,seed,rand_device,num_inference_steps,cfg_scale`; they are encoded
again, which loses what the decoder lost, and are never resized: that would part them from their noise. A third form,
images that were encoded before, is in `cached_pairs.py`.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import tarfile
from pathlib import Path

from common import UserError, lock, tables
from common.data import keyed_seed
from common.folders import list_images, name_hint
from common.images import image_size, read_image
from common.latents import manifest_digest, noise_seed
from common.pipelines import decode
from common.probes import noise_sha256
from common.shards import TEXT_KEYS, SampleError, expand_shards, open_shard, tar_samples

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save

CONFIG = "dataset_config.json"
FORMAT = 1
COLUMNS = ("image", "prompt", "seed")


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def read_prompts(spec, column=None):
    """Prompts of --prompts: a text file (one a line), a column of a table, or captions of shards.

    column: of a table; default: `prompt`, `text` or `caption`. Raises UserError that names the flag.
    """
    flag, path = f"--prompts={spec}", Path(spec.removeprefix("@")).expanduser()
    is_text = path.is_file() and (path.suffix.lower() in (".txt", ".parquet", *tables.TABLES) or spec.startswith("@"))
    if is_text:
        prompts = tables.read_prompts(path, flag, column)
    elif column is not None:
        raise UserError(f"--prompt_column={column} is for a table, and {flag} is none; drop it")
    else:
        prompts = [prompt.strip() for prompt in _captions(spec) if prompt.strip()]
    if not prompts:
        raise UserError(f"{flag} holds no prompt")
    return prompts


def _captions(spec):
    try:
        shards = expand_shards(spec)
    except UserError as error:
        raise UserError(str(error).replace("--train_shards_path_or_url", "--prompts")) from None
    prompts = []
    for shard in shards:
        if os.path.isdir(shard):
            raise UserError(f"--prompts={spec}: a folder of images; give shards or {tables.FORMATS}")
        try:
            with open_shard(shard, 600) as file:
                for _, key, raw in tar_samples(file, [TEXT_KEYS]):
                    text = next((raw[name] for name in TEXT_KEYS if raw.get(name)), b"")
                    try:
                        prompts.append(text.decode("utf-8-sig"))
                    except UnicodeDecodeError:
                        sentence = f"--prompts={spec}: the caption of {key} in {shard} is not UTF-8 text"
                        raise UserError(sentence) from None
        except SampleError as error:
            raise UserError(
                f"--prompts={spec}: {shard} cannot be read ({error.detail}); give shards or {tables.FORMATS}"
            ) from None
    return prompts


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def shard_name(shard):
    return f"{shard:05d}.tar"


def shard_range(shard, num_pairs, samples_per_shard):
    return range(shard * samples_per_shard, min((shard + 1) * samples_per_shard, num_pairs))


def num_shards(config):
    return math.ceil(config["num_pairs"] / config["samples_per_shard"])


def check_folder(folder):
    """UserError for a folder that no pairs can be written to, since it is a file or holds others; needs no teacher."""
    folder, flag = Path(folder), f"--output_dir={folder}"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{flag} is a file; name a folder")
    is_new = folder.is_dir() and not (folder / CONFIG).exists()
    if is_new and any(not name.endswith(".tmp") for name in lock.contents(folder)):
        raise UserError(f"{flag} holds other files and no {CONFIG}; name an empty or new folder")


def write_config(folder, config):
    """Write CONFIG, or check that the one which is there says the same; called by every process.

    Raises UserError as `check_folder` does, and for a folder with pairs that other flags made.
    """
    check_folder(folder)
    folder, flag = Path(folder), f"--output_dir={folder}"
    text = json.dumps(config, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    if (folder / CONFIG).exists():
        there, here = json.loads((folder / CONFIG).read_text(encoding="utf-8")), json.loads(text)
        changed = [k for k in sorted(there.keys() | here.keys()) if there.get(k) != here.get(k) and k != "versions"]
        if changed:
            raise UserError(
                f"{flag} holds pairs of other flags (they differ in {', '.join(changed)}); repeat the command that "
                "began it, or name a new folder"
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{CONFIG}.{os.getpid()}.tmp"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.rename(folder / CONFIG)
    except OSError as error:
        raise UserError(f"{flag} cannot be written to ({error.strerror}); name another folder") from None


def write_shard(path, pairs):
    """Write the members of `pairs` to a tar that is complete or does not exist.

    pairs: (index, prompt, seed, latents of one sample, uint8 image (H, W, 3) or None, (height, width) in pixels where
    the sample's call is to say it, else None).
    """
    unfinished = path.with_name(path.name + ".tmp")
    try:
        _write_tar(unfinished, pairs)
        unfinished.rename(path)
    except BaseException:  # an interrupt too
        unfinished.unlink(missing_ok=True)
        raise


def _write_tar(path, pairs):
    with open(path, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for index, prompt, seed, latents, image, size in pairs:
                record = {"index": index, "prompt": prompt, "seed": seed} | ({"size": size} if size else {})
                record["noise_sha256"] = noise_sha256(seed, latents.numel())
                members = {"json": json.dumps(record, ensure_ascii=False).encode()}
                members["safetensors"] = save({"latents": latents.contiguous()})
                if image is not None:
                    png = io.BytesIO()
                    Image.fromarray(image).save(png, format="png")
                    members["png"] = png.getvalue()
                for extension, payload in members.items():
                    member = tarfile.TarInfo(f"{index:09d}.{extension}")  # owner 0, time 0
                    member.size = len(payload)
                    tar.addfile(member, io.BytesIO(payload))
        file.flush()
        os.fsync(file.fileno())


def report(who, own, config, folder):
    """The last line of a tool: what its process has done, `own` shards, and how much of the whole is there by now."""
    there = sum(Path(folder, shard_name(shard)).is_file() for shard in range(num_shards(config)))
    done = f"{len(own)} of its {len(own)} shards are done; {there} of {num_shards(config)} shards are in {folder}"
    print(f"{who}: {done}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_config(folder):
    """CONFIG of a folder of pairs; UserError unless it is there and every shard is complete."""
    flag, path = f"--pairs_dir={folder}", Path(folder, CONFIG)
    if not path.is_file():
        raise UserError(
            f"{flag}: no {CONFIG} in it, nor cached latents; make pairs with `python -m common.tools.generate_pairs`, "
            "or of a teacher's images with encode_pairs or encode_shards"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        there = [shard for shard in range(num_shards(config)) if Path(folder, shard_name(shard)).is_file()]
        scheduler = config["scheduler"]
        if not isinstance(config["kwargs"], dict) or not isinstance(scheduler["config"], dict):
            raise ValueError("kwargs and the scheduler's config must be objects")
        _ = scheduler["class"], config["pipeline"], config["weights_sample"].items(), config["model"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{flag}: its {CONFIG} cannot be read ({error!r}); make the pairs again") from None
    if config.get("format") != FORMAT:
        raise UserError(f"{flag}: its format is {config.get('format')!r}, this version reads {FORMAT}")
    if len(there) < num_shards(config):
        raise UserError(
            f"{flag} holds {len(there)} of {num_shards(config)} shards; repeat the generate_pairs command to finish it"
        )
    return config


def unreadable(sentence):
    """A UserError that one process may meet alone."""
    error = UserError(sentence)
    error.on_one_rank = True
    return error


class PairShards:
    """The pairs of a folder, by index: prompts and seeds in memory, latents read when they are asked for."""

    def __init__(self, folder):
        self.folder, self.config = Path(folder), read_config(folder)
        self.steps = set(self.config.get("student_steps", []))
        self.prompts, self.seeds, self.hashes, self.sizes, self._places = [], [], [], [], []
        for shard in range(num_shards(self.config)):
            path = self.folder / shard_name(shard)
            try:
                self._index(path)
            except (tarfile.TarError, ValueError, KeyError, TypeError, OSError) as error:
                raise UserError(
                    f"--pairs_dir={folder}: {path.name} is damaged ({error}); delete it and repeat generate_pairs"
                ) from None
        if len(self._places) != self.config["num_pairs"]:
            raise UserError(
                f"--pairs_dir={folder}: {len(self._places)} pairs where {CONFIG} says {self.config['num_pairs']}"
            )

    def _index(self, path):
        records, places = {}, {}
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                stem, _, extension = member.name.partition(".")
                if extension == "json":
                    records[stem] = json.loads(tar.extractfile(member).read())
                elif extension == "safetensors":
                    places[stem] = path, member.offset_data, member.size
        for stem, record in records.items():
            if record["index"] != len(self.prompts) or stem not in places:
                raise ValueError(f"pair {len(self.prompts)} is not in its place or has no latents")
            self.prompts.append(str(record["prompt"]))
            self.seeds.append(int(record["seed"]))
            self.hashes.append(record["noise_sha256"])
            self.sizes.append(tuple(map(int, record["size"])) if "size" in record else None)
            self._places.append(places[stem])

    def __len__(self):
        return len(self.prompts)

    def latents(self, indices):
        """(B, ...) in the dtype that they were stored in."""
        found = []
        for index in indices:
            path, offset, size = self._places[index]
            try:
                with open(path, "rb") as file:
                    file.seek(offset)
                    found.append(load(file.read(size))["latents"])
            except (OSError, SafetensorError, KeyError) as error:
                raise unreadable(
                    f"--pairs_dir: pair {index} in {path} cannot be read ({error}); make it again"
                ) from None
        return torch.stack(found)

    def call_kwargs(self, indices):
        """What a call needs beside the pairs' own arguments: the size, of pairs that were made of images."""
        size = self.sizes[indices[0]]
        return {"height": size[0], "width": size[1]} if size else {}


class PairImages:
    """The pairs of a metadata table, by index; images are encoded when they are asked for, once `pipeline` is set."""

    def __init__(self, metadata_path, base_path=None, height=None, width=None, max_pixels=None):
        flag, self.pipeline = f"--dataset_metadata_path={metadata_path}", None
        self.base = Path(base_path if base_path is not None else Path(metadata_path).parent)
        table = tables.read_table(metadata_path, flag, COLUMNS)
        rows = [row for _, row in table]
        for place, row in table:
            wrong = next((name for name in ("image", "prompt") if not isinstance(row[name], str)), None)
            if wrong:
                raise UserError(f"{flag}: the {wrong} of {place} is no text but {str(row[wrong])[:40]!r}")
        devices = {str(row.get("rand_device") or "cpu") for row in rows}
        if devices != {"cpu"}:
            raise UserError(
                f"{flag}: rand_device is {', '.join(sorted(devices))}; only noise of the cpu can be made again"
            )
        try:
            self.seeds = [int(str(row["seed"])) for row in rows]  # int(1.5) would be 1
            self.steps = {int(str(row["num_inference_steps"])) for row in rows if row.get("num_inference_steps")}
            scales = {float(row["cfg_scale"]) for row in rows if row.get("cfg_scale")}
            if wrong := [seed for seed in self.seeds if noise_seed({"seed": seed}) is None]:
                raise ValueError(f"the seed {wrong[0]} has more than 64 bits")
            if min(self.steps, default=1) < 1:
                raise ValueError(f"num_inference_steps is {min(self.steps)}")
        except ValueError as error:
            raise UserError(f"{flag}: {error}; seed, num_inference_steps and cfg_scale are numbers") from None
        if len(self.steps) > 1 or scales - {1.0}:
            raise UserError(
                f"{flag}: num_inference_steps and cfg_scale are the student's: one number of steps, and cfg_scale 1"
            )
        self.prompts, self.files = [row["prompt"] for row in rows], [row["image"] for row in rows]
        if missing := [file for file in self.files if not os.path.isfile(self.base / file)]:
            files = []
            with contextlib.suppress(UserError):
                files = list_images(self.base).files
            raise UserError(
                f"{flag}: {len(missing)} of {len(self.files)} rows name no file, the first is {missing[0]!r}; "
                f"{name_hint(files, missing[0], f'--dataset_base_path={self.base}')}"
            )
        self.sizes = [self._size(file, height, width, max_pixels) for file in self.files]
        if not max_pixels and len(set(self.sizes)) > 1:
            raise UserError(
                f"{flag}: its images have {len(set(self.sizes))} sizes; pass --max_pixels with --train_batch_size=1"
            )
        self.hashes = None

    def _size(self, file, height, width, max_pixels):
        try:
            size = image_size(self.base / file)
        except SampleError as error:
            raise UserError(f"--dataset_base_path={self.base}: {file} cannot be read ({error.detail})") from None
        if height and size != (height, width):
            raise UserError(
                f"--height={height} --width={width}: {file} has {size[0]} x {size[1]} pixels; resizing would part it "
                "from its noise, generate it in this size"
            )
        if max_pixels and size[0] * size[1] > max_pixels:
            raise UserError(f"--max_pixels={max_pixels}: {file} has {size[0]} x {size[1]}, and resizing is no option")
        return size

    def __len__(self):
        return len(self.prompts)

    def latents(self, indices):
        """(B, ...) as the pipeline's own, from the images."""
        return encode(self.pipeline, self.pixels(indices))

    def pixels(self, indices):
        """(B, 3, H, W) in -1..1"""
        pixels = []
        for index in indices:
            path = self.base / self.files[index]
            try:
                array = np.array(read_image(path.read_bytes()))
            except (OSError, SampleError) as error:
                raise unreadable(
                    f"--dataset_base_path: {path} cannot be read ({getattr(error, 'detail', error)}); make it again"
                ) from None
            pixels.append(torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1.0)
        return torch.stack(pixels)

    def call_kwargs(self, indices):
        """What a call needs beside the pairs' own arguments: the size of these images, which is one."""
        height, width = self.sizes[indices[0]]
        return {"height": height, "width": width}


@torch.no_grad()
def encode(pipeline, pixels):
    """Latents of images (B, 3, H, W) in -1..1, as the pipeline's call returns them; `check_encoding` confirms it.

    A VAE in float16 whose configuration says `force_upcast`, as SDXL's, encodes in float32.
    """
    vae = pipeline.vae
    of_video = any(isinstance(module, torch.nn.Conv3d) for module in vae.modules())
    upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    with torch.autocast(vae.device.type, enabled=False):  # as where the loop encodes
        pixels = pixels.to(vae.device, torch.float32 if upcast else vae.dtype)
        encoded = (vae.float() if upcast else vae).encode(pixels.unsqueeze(2) if of_video else pixels)
    if upcast:
        vae.half()
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    return normalized(pipeline, latents.float())


def normalized(pipeline, latents):
    """What the VAE's encoder gives, (B, ...) float32, as the pipeline's call returns latents.

    (latents - shift) / std * scale by the VAE's configuration, packed by the pipeline where its latents are packed.
    """
    config = pipeline.vae.config
    shift, scale = config.get("shift_factor") or 0.0, config.get("scaling_factor") or 1.0
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        shape = [1, -1] + [1] * (latents.ndim - 2)
        shift = torch.tensor(config["latents_mean"], device=latents.device).view(shape)
        scale = scale / torch.tensor(config["latents_std"], device=latents.device).view(shape)
    latents = (latents - shift) * scale
    if hasattr(pipeline, "_pack_latents"):
        batch, channels, height, width = *latents.shape[:2], *latents.shape[-2:]
        latents = pipeline._pack_latents(latents, batch, channels, height, width)
    return latents


@torch.no_grad()
def check_encoding(rollout, data, indices, limit=0.5):
    """UserError unless the pipeline decodes what `encode` made of images `indices` of `data` to these images, up to
    `limit` of their variance; where `data` has no images any more, to images of which `encode` makes the same latents.

    data: a PairImages or CachedPairs. Returns the relative squared error. The images have one size.
    """
    flag = "--dataset_metadata_path" if hasattr(data, "pixels") else "--pairs_dir"
    prompts, options = [data.prompts[i] for i in indices], rollout.kwargs | data.call_kwargs(indices)
    latents, error = data.latents(indices), math.inf
    made = rollout(prompts, [data.seeds[i] for i in indices], **data.call_kwargs(indices))
    if latents.shape == made.shape:
        images = decode(rollout.pipeline, latents.to(made.dtype), prompts, **options)
        if images is not None:
            there, back = latents.float().cpu(), images.float().cpu() * 2 - 1
            if hasattr(data, "pixels"):
                there = data.pixels(indices)
            else:
                back = encode(rollout.pipeline, back).cpu()
            if there.shape == back.shape:
                error = ((back - there).square().mean() / there.var()).item()
    if not error <= limit:
        raise UserError(
            f"{flag}: {type(rollout.pipeline).__name__} cannot be given images instead of latents "
            f"(encoded and decoded again they differ by {error:.2g} of their variance); use generate_pairs"
        )
    return error


# ---------------------------------------------------------------------------------------------------------------------
# Order


def split(num_pairs, num_held_out):
    """(training, held-out) indices: the last ones are held out."""
    return range(num_pairs - num_held_out), range(num_pairs - num_held_out, num_pairs)


class PairOrder:
    """Which training pairs a micro-batch holds: an endless sequence of keyed permutations, cut into batches.

    Global micro-batch j has samples jB to (j + 1)B of that sequence, so the order does not depend on the number of
    processes and a resumed run needs to know nothing but j.
    """

    def __init__(self, num_train, batch_size, seed):
        self.num_train, self.batch_size, self.seed = num_train, batch_size, seed
        self._epochs = {}

    def _permutation(self, epoch):
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(keyed_seed(self.seed, "pairs", epoch))
            self._epochs = dict(list(self._epochs.items())[-1:])
            self._epochs[epoch] = torch.randperm(self.num_train, generator=generator).tolist()
        return self._epochs[epoch]

    def __getitem__(self, micro_batch):
        places = range(micro_batch * self.batch_size, (micro_batch + 1) * self.batch_size)
        return [self._permutation(place // self.num_train)[place % self.num_train] for place in places]


def fingerprint(data):
    """What tells these pairs from others in their place: prompts, seeds and the arguments of the teacher's call."""
    what = [data.prompts, data.seeds, getattr(data, "config", {}).get("kwargs")]
    what += [manifest_digest(data.manifest)] if hasattr(data, "manifest") else []  # of cached latents
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def check_same_pairs(checkpoint, resumed, data):
    """UserError when `checkpoint`, of state `resumed`, was trained on other pairs, whatever their folder is called."""
    if resumed.get("pairs_sha256", fingerprint(data)) != fingerprint(data):
        raise UserError(
            f"--resume_from_checkpoint={checkpoint} was trained on other pairs than --pairs_dir or "
            "--dataset_metadata_path holds now; put them back, or name a new --output_dir"
        )


def prompts_sha256(prompts):
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()
