"""What teacher pairs are made of where the teacher's images are there: encoded, they get the one form of `pairs.py`.

A table of images: `image,prompt,seed,rand_device,num_inference_steps,cfg_scale`. Or cached latents: images that
`encode_shards` has encoded, each with the seed of the noise that it was made from; their means, up to the float16 that
is stored. Encoding loses what the decoder lost. An image that was resized, cropped or flipped no longer belongs to its
noise: none is, and those that were are refused. Left out: remote shards, since pairs are read in any order.
"""

import hashlib
import json
import math
import os
import re
import tarfile
from pathlib import Path

from common import lock
from common.data import cached_latents, tables
from common.data.folders import NAMES, TEXT_KEYS
from common.data.images import decode_caption, image_size, read_image
from common.data.shards import SampleError, expand_shards, is_remote
from common.direct import pairs, pipelines
from common.direct.pairs import Pairs, PairShards
from common.errors import CALL_ERRORS, UserError, blame, speaking_of
from common.networks import encoders
from common.results.export import versions
from common.run import simulation

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm import tqdm
from webdataset.tariterators import base_plus_ext

COLUMNS = ("image", "prompt", "seed")
FLAT = 0.2  # variance of pixels in -1..1 of a picture with little in it; what has less counts as this
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


class TableImages(Pairs):
    """Images and prompts of a table; images are encoded when they are asked for, once `pipeline` is set.

    flag: that names the table. base_flag: that of the folder of its images, None where that is the table's own.
    """

    way_out = "use generate_pairs"
    what = "the images are encoded once, into {}: pairs, which other runs can take as they are"

    def __init__(self, flag, metadata_path, base_flag=None, base_path=None, columns=COLUMNS[:2]):
        super().__init__()
        self.flag = flag = f"`{flag}`={metadata_path}"
        self.base = Path(base_path if base_path is not None else Path(metadata_path).parent)
        self.base_flag = f"`{base_flag}`={self.base}" if base_flag else flag
        table = tables.read_table(metadata_path, flag, columns)
        self.rows = [row for _, row in table]
        for place, row in table:
            wrong = next((name for name in COLUMNS[:2] if not isinstance(row[name], str)), None)
            if wrong:
                raise UserError(f"{flag}: the {wrong} of {place} is no text but {str(row[wrong])[:40]!r}")
        self.prompts, self.files = [row["prompt"] for row in self.rows], [row["image"] for row in self.rows]
        if missing := [file for file in self.files if not os.path.isfile(self.base / file)]:
            raise UserError(
                f"{flag}: {len(missing)} of {len(self.files)} rows name no file, the first is {missing[0]!r}; "
                f"{NAMES.format(self.base_flag)}"
            )
        self.sizes = [self._size(file) for file in self.files]

    def _size(self, file):
        try:
            return image_size(self.base / file)
        except SampleError as error:
            raise UserError(f"{self.base_flag}: {file} cannot be read ({error.detail}); make it again") from None

    def latents(self, indices):
        """(B, ...) as the pipeline's own, from the images."""
        return encode_images(self.pipeline, self.pixels(indices))

    def pixels(self, indices):
        """(B, 3, H, W) in -1..1"""
        pixels = []
        for index in indices:
            path = self.base / self.files[index]
            try:
                array = np.array(read_image(path.read_bytes()))
            except (OSError, SampleError) as error:
                raise UserError(
                    f"{self.base_flag}: {path} cannot be read ({getattr(error, 'detail', error)}); make it again",
                    on_one_rank=True,
                ) from None
            pixels.append(torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1.0)
        return torch.stack(pixels)

    def identity(self):
        """What tells this table from another, for the configuration of the pairs that are made of it."""
        rows = repr([self.files, self.prompts, self.seeds, self.sizes])
        contents = repr([os.path.getsize(self.base / file) for file in self.files])
        names = {"table_sha256": rows, "image_bytes_sha256": contents}
        return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in names.items()}


class RealImages(TableImages):
    """Images that no pair needs, all of one size, for the adversary of `direct.score`."""

    way_out = "drop it: then the pairs are the real ones"
    what = "the real images are encoded once, into {}"

    def __init__(self, metadata_path):
        super().__init__("adv_images", metadata_path)
        self.seeds = [0] * len(self)  # of their form on disk, and of what `check_encoding` makes
        if len(set(self.sizes)) > 1:
            raise UserError(f"{self.flag}: its images have {len(set(self.sizes))} sizes; give them that of the pairs")


class PairImages(TableImages):
    """The pairs of a metadata table."""

    def __init__(self, metadata_path, base_path=None, height=None, width=None, max_pixels=None):
        super().__init__("dataset_metadata_path", metadata_path, "dataset_base_path", base_path, COLUMNS)
        flag, rows = self.flag, self.rows
        devices = {str(row.get("rand_device") or "cpu") for row in rows}
        if devices != {"cpu"}:
            raise UserError(
                f"{flag}: rand_device is {', '.join(sorted(devices))}; only noise of the cpu can be made again"
            )
        try:
            self.seeds = [int(str(row["seed"])) for row in rows]  # int(1.5) would be 1
            self.steps = {int(str(row["num_inference_steps"])) for row in rows if row.get("num_inference_steps")}
            scales = {float(row["cfg_scale"]) for row in rows if row.get("cfg_scale")}
            if wrong := [seed for seed in self.seeds if cached_latents.noise_seed({"seed": seed}) is None]:
                raise ValueError(f"the seed {wrong[0]} has more than 64 bits")
            if min(self.steps, default=1) < 1:
                raise ValueError(f"num_inference_steps is {min(self.steps)}")
        except ValueError as error:
            raise UserError(f"{flag}: {error}; seed, num_inference_steps and cfg_scale are numbers") from None
        if len(self.steps) > 1 or scales - {1.0}:
            raise UserError(
                f"{flag}: num_inference_steps and cfg_scale are the student's: one number of steps, and cfg_scale 1"
            )
        for file, size in zip(self.files, self.sizes, strict=True):
            self._check_size(file, size, height, width, max_pixels)
        if not max_pixels and len(set(self.sizes)) > 1:
            raise UserError(
                f"{flag}: its images have {len(set(self.sizes))} sizes; pass `max_pixels` with `train_batch_size`=1"
            )

    def _check_size(self, file, size, height, width, max_pixels):
        if height and size != (height, width):
            raise UserError(
                f"`height`={height} `width`={width}: {file} has {size[0]} x {size[1]} pixels; resizing would part it "
                "from its noise, generate it in this size"
            )
        if max_pixels and size[0] * size[1] > max_pixels:
            raise UserError(f"`max_pixels`={max_pixels}: {file} has {size[0]} x {size[1]}, and resizing is no option")


class CachedPairs(Pairs):
    """The pairs of cached shards; latents are read when they are asked for, once `pipeline` is set.

    Raises UserError for shards that are incomplete or damaged, and for samples that cannot be pairs; loads no weights.
    """

    way_out, what = TableImages.way_out, TableImages.what

    def __init__(self, spec, shards, manifest):
        super().__init__()
        self.flag, self.manifest, self.files, self._places = f"`pairs_dir`={spec}", manifest, [], []
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
        self._changed = []
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
            self.files.append(f"{key} in {shard.name}")
            if how := [f"{name} {record.get(name)}" for name in whole if record.get(name) != whole[name]]:
                self._changed.append(f"{self.files[-1]} ({', '.join(how)})")

    def _check(self):
        """UserError for samples without a seed, and for images that are not the ones which their noise became."""
        if not len(self):
            raise UserError(f"{self.flag}: its shards hold no sample; encode images")
        if seedless := [file for file, seed in zip(self.files, self.seeds, strict=True) if seed is None]:
            raise UserError(
                f"{self.flag}: {len(seedless)} of {len(self)} images have no seed, the first is {seedless[0]}; write "
                "the seed of its noise, a whole number, as 'seed' into the json beside each image, and encode them "
                "into a new folder"
            )
        if self._changed:
            raise UserError(
                f"{self.flag}: {len(self._changed)} of {len(self)} images were resized, cropped or flipped at "
                f"`resolution`={self.manifest['resolution']}, which parts them from their noise, the first is "
                f"{self._changed[0]}; encode them with their own `resolution` and no `random_flip`, or any size with "
                "encode_pairs"
            )

    def identity(self):
        """As of PairImages."""
        return {"cached_sha256": pairs.fingerprint(self)}

    def latents(self, indices):
        """(B, ...) float32 as the pipeline's own, of the posteriors' means."""
        return normalized(self.pipeline, torch.stack([self._mean(index) for index in indices]))

    def _mean(self, index):
        shard, offset, size = self._places[index]
        try:
            with open(shard, "rb") as file:
                file.seek(offset)
                mean = cached_latents.read_npy(file.read(size), tuple(self.manifest["shape"]))
            return torch.from_numpy(mean).float()
        except Exception as error:  # hostile bytes make numpy raise nearly anything
            raise UserError(
                f"`pairs_dir`: pair {index} in {shard} cannot be read ({error}); delete it and repeat encode_shards",
                on_one_rank=True,
            ) from None


def open_pairs(spec):
    """The pairs that `pairs_dir` means: a `PairShards`, or a CachedPairs where it names cached latents, by their
    folder or as `train_shards_path_or_url` does. Raises UserError."""
    folder = Path(spec)
    if (folder / pairs.CONFIG).exists() or not (folder.is_dir() or folder.suffix == ".tar"):
        return PairShards(spec)
    shards = list_shards(spec)
    with speaking_of(f"`pairs_dir`={spec}"):
        manifest = cached_latents.read_manifest([str(shard) for shard in shards if shard.exists()])
    if manifest is None and not (folder / cached_latents.MANIFEST).is_file():
        return PairShards(spec)  # neither: it says so
    return CachedPairs(spec, shards, manifest)


def check_vae(data, config, name, dtype, revision=None, cache_dir=None):
    """UserError unless the teacher `name` has a VAE that can encode the images of `data`, or is of the kind that made
    its latents, by their shape and dtype; needs no weights. Nothing for pairs in their own form.

    config: the teacher's, as from `read_pipeline_config`. dtype: what the run's VAE computes in; latents of a coarser
    one are refused.
    """
    if isinstance(data, TableImages) and not config["has_vae"]:
        raise UserError(
            f"{data.flag}: a {config['class'].__name__} has no VAE, which images are encoded with; {data.way_out}"
        )
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


@torch.no_grad()
def encode_images(pipeline, pixels):
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
    if hasattr(encoded, "latent_dist"):
        return normalized(pipeline, encoded.latent_dist.mode().float())
    return normalized(pipeline, (encoded.latents if hasattr(encoded, "latents") else encoded.latent).float())


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
    """UserError unless the pipeline decodes the latents of images `indices`, which have one size, to these images, up
    to `limit` of their variance, or of FLAT; of a CachedPairs, to images that are encoded to the same latents.
    Returns the error.
    """
    prompts, options = [data.prompts[i] for i in indices], rollout.kwargs | data.call_kwargs(indices)
    latents, error = try_to_encode(data, indices), math.inf
    made = rollout(prompts, [data.seeds[i] for i in indices], **data.call_kwargs(indices))
    if latents.shape == made.shape:
        images = pipelines.decode(rollout.pipeline, latents.to(made.dtype), prompts, **options)
        if images is not None:
            there, back = latents.float().cpu(), images.float().cpu() * 2 - 1
            if hasattr(data, "pixels"):
                there = data.pixels(indices)
            else:
                back = encode_images(rollout.pipeline, back).cpu()
            if there.shape == back.shape:
                error = ((back - there).square().mean() / there.var().clamp(min=FLAT)).item()
    if not error <= limit:
        raise UserError(
            f"{data.flag}: {type(rollout.pipeline).__name__} cannot be given images instead of latents "
            f"(encoded and decoded again they differ by {error:.2g} of their variance); {data.way_out}"
        )
    return error


@torch.no_grad()
def try_to_encode(data, indices):
    """Latents of images `indices`; UserError where the pipeline has none that are encoded as images are."""
    what = f"{data.flag}: {type(data.pipeline).__name__} cannot be given images instead of latents"
    with blame(what, *CALL_ERRORS, way_out=data.way_out):
        return data.latents(indices)


def check_like(images, others):
    """UserError unless the first image can be encoded, and its latents stand beside those of other pairs, or None."""
    found = list(try_to_encode(images, [0]).shape[1:])
    wanted = list(others.latents([0]).shape[1:]) if others else found
    if found != wanted:
        size = " x ".join(map(str, images.sizes[0]))
        raise UserError(
            f"{images.flag}: images of {size} pixels become latents of {found}, and those of the pairs are {wanted}; "
            f"give them the pairs' size, or, where that is a video's, {images.way_out}"
        )


def write_pairs(
    source, pipeline, kwargs, folder, scheduler, model, part=(0, 1), samples_per_shard=256, like=None, **shown
):
    """Encode the pairs of `source` into `folder`, those of the shards of a task that are not there yet, whose number
    of all and configuration it returns: ([shards], config).

    pipeline, kwargs: as the student samples, for `check_encoding`. scheduler: (class, configuration) of the teacher.
    model: {"model", "revision", "dtype"}, of the teacher. part: (index, count) of the task. like: as of `pairs_of`.
    shown: for `tqdm`.
    UserError for a folder with pairs of something else, and for images that cannot be encoded.
    """
    source.pipeline = pipeline
    config = model | {
        "format": pairs.FORMAT,
        "pipeline": type(pipeline).__name__,
        "weights_sample": pipelines.weights_sample(pipeline),
        "encoder_sample": pipelines.weights_sample(pipeline, encoder=True),
        "scheduler": pairs.recorded(scheduler[0].from_config(scheduler[1])),
        "kwargs": {},
        "student_steps": sorted(source.steps),
        "num_pairs": len(source),
        "samples_per_shard": samples_per_shard,
        "versions": versions(),
    }
    config |= source.identity()
    own, missing = pairs.missing_shards(folder, config, part)
    if pairs.missing_shards(folder, config)[1]:  # by every task, so that all of them end where it fails
        check_like(source, like)
        check_encoding(pipelines.Rollout(pipeline, **kwargs), source, [0])
    pairs.write_config(folder, config, free=("versions", "model", "revision"))
    with tqdm(total=len(own), initial=len(own) - len(missing), unit="shard", smoothing=0.05, **shown) as progress:
        for shard in missing:
            rows = _encoded(source, pairs.shard_range(shard, len(source), samples_per_shard), progress)
            pairs.write_shard(pairs.shard_path(folder, shard), rows)
            progress.update()
    return own, config


def _encoded(source, indices, progress):
    """What `pairs.write_shard` takes of a shard's images, each encoded by itself: its bytes depend on nothing else."""
    for index in indices:
        latents = source.latents([index])[0].cpu()
        if not torch.isfinite(latents).all():
            precision = str(source.pipeline.vae.dtype).removeprefix("torch.")
            sentence = f"{source.flag}: the VAE gives NaN for {source.files[index]} in {precision}; use another"
            raise UserError(sentence, on_one_rank=True)
        yield index, source.prompts[index], source.seeds[index], latents, None, source.sizes[index]
        progress.set_postfix(image=index, refresh=False)


def pairs_of(source, accelerator, folder, like=None, **options):
    """The PairShards of a run: `source` itself where it is some, else what `write_pairs` makes of it in `folder`, by
    all processes together; in a dry run, which writes nothing, `source` with latents that have no values.

    like: other pairs, whose latents have the form that these must have. options: of `write_pairs`.
    """
    if isinstance(source, PairShards):
        return source
    if simulation.is_on():
        source.pipeline = options["pipeline"]
        check_like(source, like)
        shapes, latents = {}, source.latents

        def of_their_shape(indices):
            size = source.sizes[indices[0]]
            shapes[size] = shapes.get(size) or latents(indices[:1]).shape[1:]
            return torch.empty(len(indices), *shapes[size])

        source.latents = of_their_shape
        return source
    accelerator.print(source.what.format(folder))
    part, is_main = (accelerator.process_index, accelerator.num_processes), accelerator.is_main_process
    shown = {"desc": "encoding", "disable": not is_main}
    _, config = write_pairs(source, folder=folder, part=part, like=like, **options, **shown)
    accelerator.wait_for_everyone()
    lock.wait_for(folder, lambda: not pairs.missing_shards(folder, config)[1])  # other nodes' shards
    return PairShards(folder)
