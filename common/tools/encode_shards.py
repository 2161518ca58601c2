"""Encode the images of shards once: cached latents, from which the Stable Diffusion scripts train without the VAE.

    python -m common.tools.encode_shards "shards/{00000..00099}.tar" latents \\
        --pretrained_teacher_model=runwayml/stable-diffusion-v1-5 --resolution=512 --center_crop

and then --train_shards_path_or_url="latents/{00000..00099}.tar" with the same image flags. A shard becomes one of the
same name; `common/data/cached_latents.py` says what is in it. Images of a teacher, with the `seed` of their noise in
their json, are pairs for `train_direct_distill.py --pairs_dir=latents`.

Shards are dealt to tasks that never wait for each other, and finished ones are skipped, so the same command goes on
after an interruption. The bytes are the same for any number of tasks. Left out: text embeddings, which cost 0.2 % of a
training step and change with every dropped caption.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import urllib.parse
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from common import flags, lock
from common.data import cached_latents
from common.data.fetch import open_shard
from common.data.folders import IMAGE_KEYS, TEXT_KEYS, read_sample, read_samples
from common.data.images import decode_image_text
from common.data.shards import SampleError, check_members, expand_shards, is_remote, tar_samples, tar_suffix
from common.errors import UserError, blame, mask_credentials
from common.keyed_random import keyed_seed
from common.networks import encoders, teachers
from common.results.export import versions
from common.run import training_run
from common.tools import latent_shards
from common.tools.work import add_device_argument, add_work_arguments, find_device, resolve_work, task_of

import torch
from tqdm import tqdm

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
REQUIRED = (IMAGE_KEYS, TEXT_KEYS)
MAX_LISTED = 100  # skipped samples that a shard's json names


class Unit(NamedTuple):
    """What becomes one shard."""

    name: str  # of the output, without .tar
    shard: str  # a tar, or a folder of images
    items: list | None  # of the folder, as from `folders.read_samples`


def parse_args(argv=None):
    parser = flags.ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument(
        "train_shards_path_or_url",
        type=flags.path,
        metavar="IN",
        help="as --train_shards_path_or_url of training: tars, or image folder",
    )
    parser.add_argument("output_dir", type=flags.path, metavar="OUT", help="new, empty, or begun by the same command")
    add = parser.add_argument_group("VAE").add_argument
    flags.add_checkpoint_arguments(add)
    add("--vae_encode_batch_size", type=flags.positive_int, help="images that are encoded at once; SD: 32, SDXL: 2")
    add("--mixed_precision", choices=list(DTYPES), default="no", help="what the VAE computes in; no: float32")
    add_device_argument(add)
    add = parser.add_argument_group("images, as the training script will have it").add_argument
    flags.add_image_arguments(add)
    add("--seed", type=flags.seed, default=0, help="of crops and flips")
    add = parser.add_argument_group("work").add_argument
    add("--samples_per_shard", type=flags.positive_int, help="where IN is a folder of images; default: 1000")
    add("--dataloader_num_workers", type=flags.positive_int, default=2, help="threads that decode images")
    add("--data_timeout", type=flags.positive_int, default=600, help="seconds until a pipe: is given up")
    add_work_arguments(add)
    parser.set_defaults(use_fix_crop_and_size=False)
    args = parser.parse_args(argv)
    resolve_work(parser, args)
    if args.mixed_precision == "fp16" and not torch.cuda.is_available():
        parser.error("--mixed_precision=fp16 needs a GPU; use bf16 or no")
    return args


@training_run.tool_errors
def main(args):
    # 1. What there is to do: all of it, whoever does it.
    device = find_device(args.device)
    units = list_units(args)

    # 2. Every check that needs no weights.
    dtype = DTYPES[args.mixed_precision]
    teacher_options = flags.teacher_options(args)
    config = teachers.read_teacher_config(args.pretrained_teacher_model, **teacher_options)
    other_vae = args.pretrained_vae_model_name_or_path
    if other_vae:
        config = teachers.read_vae_config(other_vae, config, revision=args.revision, cache_dir=args.cache_dir)
    flags.resolve_teacher_defaults(args, config)
    encoders.check_resolution(config, args.resolution)
    dtype = encoders.vae_dtype(config, dtype)
    manifest = {name: getattr(args, name) for name in cached_latents.IMAGE_FLAGS}
    manifest |= {
        "format": cached_latents.FORMAT,
        "vae": other_vae or args.pretrained_teacher_model,
        "revision": args.revision if other_vae else teacher_options["revision"],
        "dtype": str(dtype).removeprefix("torch."),
        "shape": encoders.latent_shape(config["vae"], args.resolution),
        "seed": args.seed,
        "samples_per_shard": args.samples_per_shard,
        "versions": versions(),
    }
    latent_shards.check_folder(args.output_dir, manifest)
    own = units[args.shard_index :: args.num_shards]
    paths = {unit.name: Path(args.output_dir, f"{unit.name}.tar") for unit in units}
    check_sources(own, paths)
    lock.take(args.output_dir, (args.shard_index, args.num_shards))

    # 3. The VAE: nothing else of the teacher is loaded.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # as in training
    torch.backends.cudnn.deterministic = True
    unused = ("unet", "text_encoder", "tokenizer", *(("text_encoder_2", "tokenizer_2") if config["is_sdxl"] else ()))
    teacher_options |= {"vae": other_vae, "vae_revision": args.revision} | dict.fromkeys(unused)
    print(f"loading the VAE of {other_vae or args.pretrained_teacher_model}", flush=True)
    vae = teachers.load_teacher(args.pretrained_teacher_model, **teacher_options).vae
    manifest["encoder_sha256"] = cached_latents.encoder_sha256(vae)
    vae.decoder = vae.post_quant_conv = None
    vae.to(device, dtype)
    manifest_bytes = latent_shards.write_manifest(args.output_dir, manifest)

    # 4. The shards of this task that are not there yet.
    missing = [unit for unit in own if cached_latents.shard_stats(paths[unit.name]) is None]
    failed = []
    total = {"total": len(own), "initial": len(own) - len(missing), "smoothing": 0.05}
    with tqdm(desc=task_of(args), unit="shard", **total) as progress:
        for unit in missing:
            try:
                encode_shard(vae, unit, args, paths[unit.name], manifest_bytes, progress)
            except SampleError as error:
                failed.append(f"{mask_credentials(unit.shard)} ({error.detail})")
                progress.write(f"left out: {failed[-1]}")
            progress.update()
    report(args, own, paths)
    if failed:
        raise UserError(
            f"IN: {len(failed)} of {len(own)} shards could not be encoded, the first is {failed[0]}; repair them, and "
            "repeat the command for these",
            on_one_rank=True,
        )


def list_units(args):
    """The list of Unit; fills in --samples_per_shard of a folder. UserError where names are not clear."""
    shards = expand_shards(args.train_shards_path_or_url)
    if cached_latents.read_manifest(shards) is not None:
        raise UserError("IN holds cached latents already; name the shards of the images")
    folders = [shard for shard in shards if os.path.isdir(shard)]
    if folders and len(shards) > 1:
        raise UserError(f"IN: {folders[0]} is a folder of images and goes with no shards")
    items, unusable, notes = read_samples(folders[0]) if folders else ([], 0, [])
    for note in notes:
        print(f"note: {note}.", flush=True)
    if folders and unusable == len(items):
        raise UserError(f"IN: none of its {unusable} samples can be used: {'; '.join(notes)}")
    if args.samples_per_shard and not folders:
        raise UserError("--samples_per_shard: IN are shards, which stay what they are; drop it")
    if folders:
        args.samples_per_shard = args.samples_per_shard or 1000
        starts = range(0, len(items), args.samples_per_shard)
        parts = [items[start : start + args.samples_per_shard] for start in starts]
        return [Unit(f"{number:05d}", folders[0], part) for number, part in enumerate(parts)]
    units = [Unit(output_name(shard), shard, None) for shard in shards]
    twice = next((name for name, count in Counter(unit.name for unit in units).items() if count > 1), None)
    if twice is not None:
        both = [mask_credentials(unit.shard) for unit in units if unit.name == twice][:2]
        raise UserError(f"IN: {' and '.join(both)} would both become {twice}.tar; encode them into two folders")
    return units


def output_name(shard):
    """The name of a path's, an address's or a command's tar, without its extension."""
    text = shard if shard.startswith("pipe:") or "://" not in shard else urllib.parse.urlsplit(shard).path
    suffix = tar_suffix(text)
    if suffix and not shard.startswith("pipe:"):
        return text.rpartition("/")[2][: -len(suffix)]
    found = re.findall(r"([^/\s\"'=]+)\.(?:tar|tgz|tbz2|txz)\b", text, re.IGNORECASE)
    if not found:
        raise UserError(f"IN={mask_credentials(shard)} has no name that ends in .tar; rename it, or put it behind one")
    return found[-1]


def source(unit):
    """What tells a unit's source from another of the same name, wherever a copy of it lies: the size of a local tar,
    the address of a remote one without its query, the names of a folder's images."""
    if unit.items is not None:
        return "images " + hashlib.sha256(json.dumps([name for name, _ in unit.items]).encode()).hexdigest()[:16]
    if is_remote(unit.shard):
        return re.sub(r"\?[^\s\"']*", "", mask_credentials(unit.shard))
    return f"{os.path.getsize(unit.shard)} bytes"


def check_sources(units, paths):
    """UserError where a shard that is there already was made of another source of the same name."""
    for unit in units:
        stats = cached_latents.shard_stats(paths[unit.name])
        if stats is not None and mask_credentials(str(stats.get("source"))) != source(unit):
            raise UserError(
                f"OUT: {paths[unit.name]} was made of a source of {stats.get('source')}, "
                f"{mask_credentials(unit.shard)} is {source(unit)}; name a new folder, or delete what is old"
            )


def encode_shard(vae, unit, args, path, manifest_bytes, progress):
    """Make one shard. SampleError: nothing of it can be used; UserError: it cannot be written."""
    account = {"read": 0, "seeds": 0, "skipped": Counter(), "first_skipped": [], "damage": None}
    samples = encoded(vae, unit, args, account, progress)

    def stats(count, size):
        read, skipped = account["read"], dict(sorted(account["skipped"].items()))
        if read and not count or account["damage"] and not read:
            first = (account["first_skipped"] or [{"detail": ""}])[0]["detail"]
            reason = (
                f"none of its {read} samples can be used: {listed(skipped)}, the first for {first or 'no caption'}"
            )
            raise SampleError("shard_read", account["damage"] or reason)
        if skipped:
            why = f"skipped: {listed(skipped)}; see {path.stem}_stats.json"
            progress.write(f"{path.name}: {count} of {read} samples, {why}")
        said = {"count": read, "successes": count, "skipped": skipped, "first_skipped": account["first_skipped"]}
        said |= {"seeds": account["seeds"]} if account["seeds"] else {}  # of sources without any, nothing new is said
        return said | {"source": source(unit), "vae_encode_batch_size": args.vae_encode_batch_size, "bytes": size}

    with blame(f"OUT: {path} cannot be written", OSError, way_out="make room and repeat the command"):
        latent_shards.write_shard(path, manifest_bytes, samples, stats)


def raw_samples(unit, args, account):
    """(key, raw) of a shard's or a folder's samples, in order; of a damaged tar those before the damage."""
    if unit.items is not None:
        rows = Counter()  # of an image that has several
        for file, caption in unit.items:
            stem, raw = os.path.splitext(file)[0], read_sample(unit.shard, file, caption)
            with contextlib.suppress(OSError):
                raw["json"] = Path(unit.shard, f"{stem}.json").read_bytes()
            row = f"_row{rows[file]}" if rows[file] else ""
            rows[file] += 1
            yield stem.lstrip("/").replace(".", "_") + row, raw  # a key ends at its first dot
        return
    with open_shard(unit.shard, args.data_timeout) as file:
        try:
            for _, key, raw in tar_samples(file, REQUIRED):
                yield key, raw
        except SampleError as error:
            account["damage"] = error.detail
            skip(account, error, "")


def skip(account, error, key):
    account["skipped"][error.reason] += 1
    if len(account["first_skipped"]) < MAX_LISTED:
        account["first_skipped"].append({"reason": error.reason, "key": key, "detail": error.detail})


def decoded(unit, args, account):
    """(key, what decode_image_text returns, what else the json says), in order; threads decode ahead while the VAE
    encodes."""
    image_flags = {name: getattr(args, name) for name in cached_latents.IMAGE_FLAGS}

    def decode(key, raw):
        seed = keyed_seed(args.seed, "encode", unit.name, key)
        check_members(raw, REQUIRED)
        sample = decode_image_text(raw, random.Random(seed), **image_flags)
        noise = source_seed(raw)
        flip = args.random_flip and random.Random(seed).random() < 0.5  # its first draw
        return sample, {"flip": flip} | ({} if noise is None else {"seed": noise})

    with ThreadPoolExecutor(args.dataloader_num_workers) as pool:
        pending, raws = deque(), raw_samples(unit, args, account)
        while True:
            while len(pending) < 2 * args.vae_encode_batch_size and (item := next(raws, None)) is not None:
                account["read"] += 1
                pending.append((item[0], pool.submit(decode, *item)))
            if not pending:
                return
            key, future = pending.popleft()
            try:
                yield key, *future.result()
            except SampleError as error:
                skip(account, error, key)


def source_seed(raw):
    """The seed of the noise that an image was made from, by the json beside it; None where it says none."""
    try:
        return cached_latents.noise_seed(json.loads(raw["json"]))
    except (KeyError, ValueError, RecursionError):  # no json, or not the json of an image with a seed
        return None


def encoded(vae, unit, args, account, progress):
    """The samples of `latent_shards.write_shard`. Batches are counted from the shard's start, whoever encodes it."""
    samples, count = decoded(unit, args, account), 0
    while batch := [sample for _, sample in zip(range(args.vae_encode_batch_size), samples, strict=False)]:
        images = torch.stack([sample["images"] for _, sample, _ in batch]).to(vae.device)
        moments = encoders.posterior(vae, images, args.vae_encode_batch_size)
        mean, std = (x.to("cpu", torch.float16) for x in moments)
        for (key, sample, said), m, s in zip(batch, mean, std, strict=True):
            if not (m.isfinite().all() and s.isfinite().all()):
                detail = f"the VAE's latents are not finite in {args.mixed_precision}; see --mixed_precision"
                skip(account, SampleError("decode", detail), key)
                continue
            record = {"original_size": sample["original_sizes"].tolist()} | said
            record |= {"crop_top_left": sample["crop_top_lefts"].tolist()}
            account["seeds"] += "seed" in record
            yield key, sample["captions"], record, m.numpy(), s.numpy()
            count += 1
        progress.set_postfix({"shard": unit.name, "images": count}, refresh=False)


def report(args, own, paths):
    """One line on what this task has made, now or before, and how much of the whole is there."""
    there = [stats for unit in own if (stats := cached_latents.shard_stats(paths[unit.name]))]
    skipped = sum((Counter(stats["skipped"]) for stats in there), Counter())
    seeds = sum(stats.get("seeds", 0) for stats in there)
    complete = sum(cached_latents.shard_stats(path) is not None for path in paths.values())
    samples = f"{sum(stats['successes'] for stats in there)} samples{f', {seeds} with a seed' if seeds else ''}"
    samples += f", skipped: {listed(skipped)}"
    if args.num_shards == 1:
        print(f"done: {complete} of {len(paths)} shards are in {args.output_dir}, {samples}", flush=True)
        return
    own_part = f"{len(there)} of its {len(own)} shards are done, {samples}"
    whole = f"{complete} of {len(paths)} shards are in {args.output_dir}"
    print(f"{task_of(args)}: {own_part}; {whole}", flush=True)


def listed(skipped):
    """{class: count} in words."""
    return ", ".join(f"{name} {count}" for name, count in sorted(skipped.items())) or "none"


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(parse_args())
