"""Pairs on disk: tar shards with a configuration beside them, as `generate_pairs` writes them."""

import io
import json
import math
import os
import tarfile
from pathlib import Path

from common import lock
from common.direct.probes import noise_sha256
from common.errors import UserError

from PIL import Image
from safetensors.torch import save

CONFIG = "dataset_config.json"
FORMAT = 1


def shard_name(shard):
    return f"{shard:05d}.tar"


def shard_range(shard, num_pairs, samples_per_shard):
    return range(shard * samples_per_shard, min((shard + 1) * samples_per_shard, num_pairs))


def num_shards(config):
    return math.ceil(config["num_pairs"] / config["samples_per_shard"])


def check_folder(folder):
    """UserError for a folder that no pairs can be written to, since it is a file or holds others; needs no teacher."""
    folder, flag = Path(folder), f"`output_dir`={folder}"
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
    folder, flag = Path(folder), f"`output_dir`={folder}"
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


def read_config(folder):
    """CONFIG of a folder of pairs; UserError unless it is there and every shard is complete."""
    flag, path = f"`pairs_dir`={folder}", Path(folder, CONFIG)
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
