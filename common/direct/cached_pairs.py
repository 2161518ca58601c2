"""Pairs for direct distillation from cached latents: images that a teacher made, encoded by `encode_shards`, each with
the seed of the noise that it was made from.

The latents of a pair are the mean of the posterior as `pipelines.encode` makes them from the image, up to the
float16 that is stored. An image which was resized, cropped or flipped before it was encoded no longer belongs to its
noise, and is refused. Left out: remote shards, since pairs are read in any order; several sizes, since a manifest has
one.
"""

import json
import re
import tarfile
from pathlib import Path

from common.data import cached_latents
from common.data.folders import TEXT_KEYS
from common.data.images import decode_caption
from common.data.shards import SampleError, expand_shards, is_remote
from common.direct import pipelines
from common.errors import UserError, blame, speaking_of
from common.networks import encoders

import torch
from diffusers import AutoencoderKL
from webdataset.tariterators import base_plus_ext

DAMAGE = (tarfile.TarError, SampleError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
# A shard, what is said of it, or what a task left that was killed at either.
OF_A_SHARD = re.compile(r"(.+?)(\.tar|_stats\.json)(\.[0-9a-f]{32}\.tmp)?")


def list_shards(spec):
    """The paths of all shards that `pairs_dir` names, or that were begun in its folder, whether they are there."""
    if Path(spec).is_dir():
        found = (OF_A_SHARD.fullmatch(path.name) for path in Path(spec).iterdir())
        return sorted({Path(spec, f"{match[1]}.tar") for match in found if match})
    with speaking_of(f"`pairs_dir`={spec}"):
        shards = expand_shards(str(spec))
    if any(map(is_remote, shards)):
        raise UserError(f"`pairs_dir`={spec}: pairs are read in any order; copy the shards to a disk, name the folder")
    return [Path(shard) for shard in shards]


class CachedPairs:
    """The pairs of cached shards, by index; latents are read when they are asked for, once `pipeline` is set.

    Raises UserError for shards that are incomplete or damaged, and for samples that cannot be pairs; loads no weights.
    """

    def __init__(self, spec, shards, manifest):
        self.flag, self.manifest, self.pipeline = f"`pairs_dir`={spec}", manifest, None
        self.prompts, self.seeds, self.hashes, self.steps, self._places = [], [], None, set(), []
        stats = [cached_latents.shard_stats(shard) for shard in shards]
        unfinished = [shard.name for shard, said in zip(shards, stats, strict=True) if said is None]
        if unfinished:
            raise UserError(
                f"{self.flag}: {len(unfinished)} of {len(shards)} shards are not complete, the first is "
                f"{unfinished[0]} (a _stats.json says each's size); repeat the encode_shards command to finish them"
            )
        if manifest is None:
            raise UserError(f"{self.flag} holds no cached latents; repeat the encode_shards command that began it")
        if len(set(shards)) < len(shards):
            raise UserError(f"{self.flag} names a shard twice; name each once")
        self._seedless, self._changed = [], []
        for shard, said in zip(shards, stats, strict=True):
            with blame(f"{self.flag}: {shard.name} is damaged", *DAMAGE, way_out="delete it and repeat encode_shards"):
                self._index(shard, said["successes"])
        self._check()
        self.sizes = [(manifest["resolution"],) * 2] * len(self)

    def _index(self, shard, count):
        """Append a shard's prompts, seeds, places of the means, and the names of the samples that cannot be pairs."""
        found = {}
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.name == cached_latents.MEMBER:
                    continue
                key, extension = base_plus_ext(member.name)
                raw = found.setdefault(key, {})
                if extension in raw:
                    raise UserError(
                        f"{self.flag}: {shard.name} has two samples called {key}; give each image of a shard a name "
                        "of its own, and encode them into a new folder"
                    )
                read = extension == "json" or extension in TEXT_KEYS
                raw[extension] = tar.extractfile(member).read() if read else (member.offset_data, member.size)
        if len(found) != count:
            raise ValueError(f"{len(found)} of {count} samples")
        digest, size = cached_latents.manifest_digest(self.manifest), self.manifest["resolution"]
        whole = {"original_size": [size, size], "crop_top_left": [0, 0], "flip": False}
        for key, raw in found.items():
            record = json.loads(raw["json"])
            if record["manifest"] != digest:
                raise ValueError(f"{key} is of other settings")
            self.prompts.append(decode_caption(raw))
            self.seeds.append(cached_latents.noise_seed(record))
            self._places.append((shard, *raw["mean.npy"]))
            if self.seeds[-1] is None:
                self._seedless.append(f"{key} in {shard.name}")
            if how := [f"{name} {record.get(name)}" for name in whole if record.get(name) != whole[name]]:
                self._changed.append(f"{key} in {shard.name} ({', '.join(how)})")

    def _check(self):
        """UserError for samples without a seed, and for images that are not the ones which their noise became."""
        if not len(self):
            raise UserError(f"{self.flag}: its shards hold no sample; encode images")
        if self._seedless:
            raise UserError(
                f"{self.flag}: {len(self._seedless)} of {len(self)} images have no seed, the first is "
                f"{self._seedless[0]}; write the seed of its noise, a whole number, as 'seed' into the json beside "
                "each image, and encode them into a new folder"
            )
        if self._changed:
            raise UserError(
                f"{self.flag}: {len(self._changed)} of {len(self)} images were resized, cropped or flipped at "
                f"`resolution`={self.manifest['resolution']}, which parts them from their noise, the first is "
                f"{self._changed[0]}; encode them with their own `resolution` and no `random_flip`, or any size with "
                "encode_pairs"
            )

    def __len__(self):
        return len(self.prompts)

    def latents(self, indices):
        """(B, ...) float32 as the pipeline's own, of the posteriors' means."""
        return pipelines.normalized(self.pipeline, torch.stack([self._mean(index) for index in indices]))

    def _mean(self, index):
        shard, offset, size = self._places[index]
        try:
            with open(shard, "rb") as file:
                file.seek(offset)
                return torch.from_numpy(
                    cached_latents.read_npy(file.read(size), tuple(self.manifest["shape"]))
                ).float()
        except Exception as error:  # hostile bytes make numpy raise nearly anything
            raise UserError(
                f"`pairs_dir`: pair {index} in {shard} cannot be read ({error}); delete it and repeat encode_shards",
                on_one_rank=True,
            ) from None

    def call_kwargs(self, indices):
        """What a call needs beside the pairs' own arguments: the size of these images, which is one."""
        height, width = self.sizes[indices[0]]
        return {"height": height, "width": width}


def check_vae(data, name, dtype, revision=None, cache_dir=None):
    """UserError unless the teacher `name` has a VAE of the kind that made the latents of `data`, by their shape and
    dtype; needs no weights. Nothing for pairs that are no CachedPairs.

    dtype: what the run's VAE computes in; latents of a coarser one are refused.
    """
    if not isinstance(data, CachedPairs):
        return
    try:
        config = AutoencoderKL.load_config(name, subfolder="vae", revision=revision, cache_dir=cache_dir)
    except (OSError, ValueError):
        config = {}  # a pipeline without a VAE
    if config.get("_class_name") != "AutoencoderKL":
        raise UserError(
            f"{data.flag}: an AutoencoderKL made these cached latents, and the VAE of "
            f"`pretrained_teacher_model`={name} is {config.get('_class_name', 'none of diffusers')}; make pairs with "
            "generate_pairs, or from images with encode_pairs"
        )
    with speaking_of(data.flag):
        cached_latents.check_manifest(
            data.manifest, encoders.latent_shape(config, data.manifest["resolution"]), dtype, {}
        )


def check_encoder(data, name, **place):
    """UserError unless the encoder of the teacher `name` has the weights that made the latents of `data`; the VAE is
    loaded for it. Nothing for pairs that are no CachedPairs. place: revision, variant, cache_dir."""
    if isinstance(data, CachedPairs):
        with speaking_of(data.flag):
            cached_latents.check_encoder(data.manifest, pipelines.load_vae(name, **place))
