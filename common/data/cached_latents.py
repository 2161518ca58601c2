"""Cached latents: what the VAE's encoder makes of every image, written once and trained from as often as you like.

A cached shard is a tar. Its first member `__manifest__` says what its latents are and what made them; readers of
shards pass over such names. A sample is `KEY.mean.npy` and `KEY.std.npy`, float16 (C, h, w), of the posterior, neither
shifted nor scaled; `KEY.txt`, the caption; and `KEY.json`: `original_size` and `crop_top_left` as
`images.decode_image_text` gives them, `flip`, the digest of the manifest, and `seed` where the json of the source has
one: that of the noise which a teacher made the image from. The same manifest stands as `manifest.json` in the folder.
`NNNNN_stats.json`, written last, says that a shard is complete and what was left out.

float16 holds a std whole: the VAE's log variance is clamped to -30..20, so a std lies in 3e-7..2.2e4, and float16
goes from 6e-8 to 6.5e4. A mean that is not finite in float16 is no latent: its sample is left out and counted.
"""

import hashlib
import io
import itertools
import json
import os
import tarfile

from common.data.folders import TEXT_KEYS
from common.data.images import decode_caption
from common.data.shards import SampleError, is_remote
from common.data.transfers import read_head
from common.errors import UserError

import numpy as np
import torch

FORMAT = 1
MANIFEST, MEMBER = "manifest.json", "__manifest__"
REQUIRED = (("mean.npy",), ("std.npy",), TEXT_KEYS, ("json",))
FREE_KEYS = ("vae", "revision", "versions")  # of a manifest: the VAE is told apart by encoder_sha256
IMAGE_FLAGS = ("resolution", "interpolation_type", "center_crop", "random_flip", "min_image_size")
MAX_HEADS = 3  # remote shards that are asked what they hold


def encoder_sha256(vae):
    """A fingerprint of what makes latents: the VAE's encoder and quant_conv, float32, rounded to float16. So the
    weight files of a half precision, and a VAE with another decoder, have the same one."""
    parts = {"encoder": vae.encoder, "quant_conv": vae.quant_conv}
    digest = hashlib.sha256()
    for part, module in parts.items():
        for name, tensor in sorted(module.state_dict().items()) if module is not None else ():
            assert tensor.dtype == torch.float32, "weights that were rounded before have another fingerprint"
            digest.update(f"{part}.{name} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.to("cpu", torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()


def manifest_digest(manifest):
    """What every sample of a manifest carries: shards of other settings that got among these are found by it."""
    settings = {key: value for key, value in manifest.items() if key not in FREE_KEYS}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def read_manifest(shards):
    """The manifest of cached shards, or None for shards of images; without any weight.

    Every local shard is asked for its first member; of remote ones the first that answers. Raises UserError for lists
    that mix images and latents, or latents of several settings.
    """
    local = [shard for shard in shards if not is_remote(shard)]
    found = {shard: None if os.path.isdir(shard) else _parse_head(shard, read_head(shard)) for shard in local}
    remote = [shard for shard in shards if is_remote(shard)] if not local else []
    heads = ((shard, read_head(shard)) for shard in remote[:MAX_HEADS])
    found |= {shard: _parse_head(shard, head) for shard, head in itertools.islice((h for h in heads if h[1]), 1)}
    cached = {shard: manifest for shard, manifest in found.items() if manifest is not None}
    if not cached:
        return None
    flag = "`train_shards_path_or_url`"
    others = [shard for shard in found if shard not in cached]
    if others:
        raise UserError(
            f"{flag} mixes cached latents ({next(iter(cached))}) with images or a damaged shard ({others[0]}); name "
            "the ones or the others, or encode that shard again"
        )
    first, manifest = next(iter(cached.items()))
    digests = {shard: manifest_digest(m) for shard, m in cached.items()}
    other = next((shard for shard in digests if digests[shard] != digests[first]), None)
    if other is not None:
        raise UserError(f"{flag}: {first} and {other} hold latents of different settings; train on one of them")
    return manifest


def _parse_head(shard, head):
    """The manifest that the first bytes of a tar hold, or None."""
    try:
        member = tarfile.TarInfo.frombuf(head[:512], "utf-8", "strict")
        if member.name != MEMBER:
            return None
    except (tarfile.HeaderError, ValueError):
        return None
    try:
        manifest = dict(json.loads(head[512 : 512 + member.size]))
        known = {"format", "shape", "dtype", "seed", "encoder_sha256", *IMAGE_FLAGS} <= manifest.keys()
    except (ValueError, TypeError):
        known = False
    if not known:
        raise UserError(f"`train_shards_path_or_url`: the manifest in {shard} is damaged; encode this shard again")
    if manifest["format"] != FORMAT:
        raise UserError(
            f"`train_shards_path_or_url`: {shard} has format {manifest['format']!r}, this version reads {FORMAT}"
        )
    return manifest


def check_manifest(manifest, shape, dtype, image_flags):
    """UserError unless these are the latents that a run would make itself; needs no weights.

    shape: (C, h, w) by the VAE's configuration. dtype: the torch dtype that the run's VAE would compute in; latents of
    a finer one are taken. image_flags: {name: value} of IMAGE_FLAGS.
    """
    for name, value in image_flags.items():
        if name in IMAGE_FLAGS and manifest[name] != value:
            there = manifest[name]
            made, way_out = f"with {there}, not {value}", f"pass `{name}`={there}"
            if isinstance(there, bool):  # a switch takes no value
                made, way_out = ("with it", f"add `{name}`") if there else ("without it", f"drop `{name}`")
            raise UserError(
                f"`{name}`: the cached latents of `train_shards_path_or_url` were made {made}; {way_out}, or encode "
                "the images again"
            )
    if list(manifest["shape"]) != list(shape):
        raise UserError(
            f"`train_shards_path_or_url`: the cached latents of {manifest['vae']} have the shape {manifest['shape']}, "
            f"this teacher's have {list(shape)}; encode the images with its VAE"
        )
    if getattr(torch, manifest["dtype"]).itemsize < dtype.itemsize:
        raise UserError(
            f"`train_shards_path_or_url`: the VAE made the cached latents in {manifest['dtype']} and would compute in "
            f"{str(dtype).removeprefix('torch.')} in this run; pass the same `mixed_precision`, or encode them again"
        )


def use_cached(manifest, vae):
    """Check the VAE, as it was loaded, against the manifest, and free its encoder; nothing for images (None)."""
    if manifest is not None:
        check_encoder(manifest, vae)
        vae.encoder = vae.quant_conv = None


def check_encoder(manifest, vae):
    """UserError unless this VAE, in float32, has the encoder that made the latents."""
    if encoder_sha256(vae) != manifest["encoder_sha256"]:
        raise UserError(
            f"`train_shards_path_or_url`: the VAE of {manifest['vae']}, revision {manifest['revision']}, made the "
            "cached latents, and the encoder of this run's VAE has other weights; encode the images with it"
        )


def shard_stats(path):
    """What `NNNNN_stats.json` says of the complete shard `path`; None where it is missing, or not complete."""
    try:
        stats = json.loads(stats_path(path).read_text(encoding="utf-8"))
        return stats if path.stat().st_size == stats["bytes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def stats_path(path):
    return path.with_name(path.name.removesuffix(".tar") + "_stats.json")


def decode_cached(raw, rng, *, manifest, proportion_empty_prompts=0.0):
    """Decode one sample of a cached shard: what `images.decode_image_text` returns, without `images` and with the
    posterior's `latent_means` and `latent_stds`, float16 (C, h, w).

    Draws from `rng` as `decode_image_text` does with the manifest's flags, so that the same captions are dropped.
    Raises SampleError "decode" or "missing_caption", and UserError for a sample of another manifest.
    """
    for _ in range(2 + bool(manifest["random_flip"])):
        rng.random()
    empty_caption = rng.random() < proportion_empty_prompts
    caption = decode_caption(raw)
    try:
        record = json.loads(raw["json"])
        digest = record["manifest"]
        places = [torch.tensor(record[name]) for name in ("original_size", "crop_top_left")]
        if any(place.dtype != torch.int64 or place.shape != (2,) for place in places):
            raise ValueError("its sizes are not two whole numbers")
        mean, std = (read_npy(raw[name], tuple(manifest["shape"])) for name in ("mean.npy", "std.npy"))
        if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std >= 0).all()):
            raise ValueError("not a mean and a std")
    except Exception as error:  # hostile bytes make numpy raise nearly anything
        raise SampleError("decode", f"{type(error).__name__}: {error}") from error
    if digest != manifest_digest(manifest):
        raise UserError(
            "`train_shards_path_or_url`: a shard holds cached latents of other settings than the first one; train on "
            "shards of one manifest"
        )
    return {
        "latent_means": torch.from_numpy(mean),
        "latent_stds": torch.from_numpy(std),
        "captions": "" if empty_caption else caption,
        "original_sizes": places[0],
        "crop_top_lefts": places[1],
    }


def noise_seed(record):
    """The `seed` in the json of a sample, a whole number that a torch generator takes; None where there is none."""
    seed = record.get("seed") if isinstance(record, dict) else None
    return seed if type(seed) is int and -(2**63) <= seed < 2**64 else None


def read_npy(data, shape):
    """The float16 array of this shape that `data` holds; the header is judged before anything is allocated. What is
    wrong raises nearly anything."""
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not version 1.0 of .npy")
    header = np.lib.format.read_array_header_1_0(file)
    if header != (shape, False, np.dtype("<f2")):
        raise ValueError(f"an array {header}, not float16 {shape}")
    return np.frombuffer(file.read(), "<f2").reshape(shape).copy()
