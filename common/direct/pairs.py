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
import json
import os
import tarfile
from pathlib import Path

from common.data import cached_latents, tables
from common.data.cached_latents import manifest_digest, noise_seed
from common.data.folders import list_images, name_hint
from common.data.images import image_size, read_image
from common.data.shards import SampleError
from common.direct import pair_shards
from common.direct.cached_pairs import CachedPairs, list_shards
from common.direct.pair_shards import CONFIG, num_shards, read_config, shard_name
from common.direct.pipelines import encode
from common.errors import UserError, blame, speaking_of
from common.keyed_random import keyed_seed

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load

COLUMNS = ("image", "prompt", "seed")


class PairShards:
    """The pairs of a folder, by index: prompts and seeds in memory, latents read when they are asked for."""

    def __init__(self, folder):
        self.folder, self.config = Path(folder), read_config(folder)
        self.steps = set(self.config.get("student_steps", []))
        self.prompts, self.seeds, self.hashes, self.sizes, self._places = [], [], [], [], []
        for shard in range(num_shards(self.config)):
            path = self.folder / shard_name(shard)
            with blame(
                f"`pairs_dir`={folder}: {path.name} is damaged",
                tarfile.TarError,
                ValueError,
                KeyError,
                TypeError,
                OSError,
                way_out="delete it and repeat generate_pairs",
            ):
                self._index(path)
        if len(self._places) != self.config["num_pairs"]:
            raise UserError(
                f"`pairs_dir`={folder}: {len(self._places)} pairs where {CONFIG} says {self.config['num_pairs']}"
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
                raise UserError(
                    f"`pairs_dir`: pair {index} in {path} cannot be read ({error}); make it again",
                    on_one_rank=True,
                ) from None
        return torch.stack(found)

    def call_kwargs(self, indices):
        """What a call needs beside the pairs' own arguments: the size, of pairs that were made of images."""
        size = self.sizes[indices[0]]
        return {"height": size[0], "width": size[1]} if size else {}


class PairImages:
    """The pairs of a metadata table, by index; images are encoded when they are asked for, once `pipeline` is set."""

    def __init__(self, metadata_path, base_path=None, height=None, width=None, max_pixels=None):
        flag, self.pipeline = f"`dataset_metadata_path`={metadata_path}", None
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
                f"{name_hint(files, missing[0], f'`dataset_base_path`={self.base}')}"
            )
        self.sizes = [self._size(file, height, width, max_pixels) for file in self.files]
        if not max_pixels and len(set(self.sizes)) > 1:
            raise UserError(
                f"{flag}: its images have {len(set(self.sizes))} sizes; pass `max_pixels` with `train_batch_size`=1"
            )
        self.hashes = None

    def _size(self, file, height, width, max_pixels):
        try:
            size = image_size(self.base / file)
        except SampleError as error:
            raise UserError(f"`dataset_base_path`={self.base}: {file} cannot be read ({error.detail})") from None
        if height and size != (height, width):
            raise UserError(
                f"`height`={height} `width`={width}: {file} has {size[0]} x {size[1]} pixels; resizing would part it "
                "from its noise, generate it in this size"
            )
        if max_pixels and size[0] * size[1] > max_pixels:
            raise UserError(f"`max_pixels`={max_pixels}: {file} has {size[0]} x {size[1]}, and resizing is no option")
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
                raise UserError(
                    f"`dataset_base_path`: {path} cannot be read ({getattr(error, 'detail', error)}); make it again",
                    on_one_rank=True,
                ) from None
            pixels.append(torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1.0)
        return torch.stack(pixels)

    def call_kwargs(self, indices):
        """What a call needs beside the pairs' own arguments: the size of these images, which is one."""
        height, width = self.sizes[indices[0]]
        return {"height": height, "width": width}


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
            f"`resume_from_checkpoint`={checkpoint} was trained on other pairs than `pairs_dir` or "
            "`dataset_metadata_path` holds now; put them back, or name a new `output_dir`"
        )


def open_pairs(spec):
    """The pairs that `pairs_dir` means: a `PairShards`, or a CachedPairs where it names cached latents, by their
    folder or as `train_shards_path_or_url` does. Raises UserError."""
    folder = Path(spec)
    if (folder / pair_shards.CONFIG).exists() or not (folder.is_dir() or folder.suffix == ".tar"):
        return PairShards(spec)
    shards = list_shards(spec)
    with speaking_of(f"`pairs_dir`={spec}"):
        manifest = cached_latents.read_manifest([str(shard) for shard in shards if shard.exists()])
    if manifest is None and not (folder / cached_latents.MANIFEST).is_file():
        return PairShards(spec)  # neither: it says so
    return CachedPairs(spec, shards, manifest)
