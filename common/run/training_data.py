"""The training data that the flags name, and how many updates they make."""

import functools
import math
from pathlib import Path

from common.data import cached_latents, stream
from common.data.folders import IMAGE_KEYS, TEXT_KEYS
from common.data.images import decode_image_text
from common.data.shards import count_samples
from common.data.stream import TrainingData
from common.errors import UserError
from common.networks import encoders
from common.networks.encoders import VAE_ENCODE_BATCH_SIZE


def image_options(args):
    """The flags of `images.decode_image_text`, or, without captions, of `ct.data.decode_image_label`."""
    names = ("resolution", "interpolation_type", "center_crop", "random_flip", "proportion_empty_prompts")
    return {name: getattr(args, name) for name in (*names, "min_image_size") if hasattr(args, name)}


def data_options(args, accelerator):
    """The flags of `data.TrainingData`, with this process's place among the others."""
    names = ("max_train_samples", "shuffle_block_samples", "max_skip_ratio", "data_timeout")
    names += ("shard_disk_gb", "shard_cache_dir", "shard_cache_gb")
    return {name: getattr(args, name) for name in names} | {
        "batch_size": args.train_batch_size,
        "seed": args.data_seed,
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        "num_lanes": args.data_lanes,
        "num_workers": args.dataloader_num_workers,
        "pin_memory": accelerator.device.type == "cuda",
        "skipped_log": None if args.dry_run else Path(args.output_dir, stream.SKIPPED),
        "report": accelerator.print,
    }


def text_image_data(args, accelerator, shards, config, weight_dtype):
    """The stream of images and captions, or of latents and captions where the shards are cached ones.

    config: as from `teachers.read_teacher_config`. `cached` of the stream: the manifest of cached shards, or None.
    Raises UserError where the latents are not those that the run would make itself.
    """
    manifest, decode, required = cached_latents.read_manifest(shards), decode_image_text, (IMAGE_KEYS, TEXT_KEYS)
    options = image_options(args)
    if manifest is not None:
        dtype = encoders.vae_dtype(config, weight_dtype)
        cached_latents.check_manifest(manifest, encoders.latent_shape(config["vae"], args.resolution), dtype, options)
        if args.vae_encode_batch_size != VAE_ENCODE_BATCH_SIZE[config["is_sdxl"]]:
            raise UserError("`vae_encode_batch_size`: nothing is encoded where latents are cached; drop the flag")
        decode, required = cached_latents.decode_cached, cached_latents.REQUIRED
        options = {"manifest": manifest, "proportion_empty_prompts": args.proportion_empty_prompts}
    decode = functools.partial(decode, **options)
    data = TrainingData(shards, decode, required=required, **data_options(args, accelerator))
    data.cached = manifest
    return data


def describe(cached):
    """What is trained on, in words. cached: the manifest of cached latents, or None."""
    if cached is None:
        return "encoded in each step"
    return f"cached, made by the VAE of {cached['vae']} in {cached['dtype']}"


def images_in_folder(shards):
    """How many images `shards`, as from `expand_shards`, hold where they are a folder; None where they are tars."""
    return count_samples(shards) if Path(shards[0]).is_dir() else None


def resolve_data(args, saved_args, world_size, num_images=None):
    """Fill in `data_seed` and `data_lanes`, from the resumed run's flags where there is one.

    num_images: of an image folder, else None. There are 8 lanes per process, fewer where a lane would not hold the
    samples of a batch: a batch comes from one lane, and would hold its samples twice.
    """
    candidates = (args.data_seed, saved_args.get("data_seed"), args.seed)
    args.data_seed = next(value for value in candidates if value is not None)
    if args.data_lanes is None and args.data_seed == saved_args.get("data_seed"):
        args.data_lanes = saved_args["data_lanes"]
    if args.data_lanes is None:
        known = [number for number in (num_images, args.max_train_samples) if number is not None]
        batches = min(known) // (args.train_batch_size * world_size) if known else 8
        args.data_lanes = world_size * max(1, min(8, batches))


def epoch_size(args, shards, num_counted):
    """How many distinct samples an epoch has, or None where that is not known. num_counted: of an image folder or the
    like; None for tars, which are counted, by reading all local ones, only where that is needed."""
    is_needed = args.max_train_steps is None
    if num_counted is None and (is_needed or args.dry_run):
        num_counted = count_samples(shards)
    known = [number for number in (num_counted, args.max_train_samples) if number is not None]
    return min(known) if known and (is_needed or num_counted is not None) else None


def resolve_steps(args, num_samples, world_size, resumed=None):
    """Fill in `max_train_steps` from `num_train_epochs`. Returns the total batch size, samples per update.

    num_samples: how many distinct samples an epoch has, or None where the shards do not tell. resumed: the state of a
    checkpoint. A resumed run keeps its total batch size, unless `data_seed` changes: UserError when the number of
    processes changed and the flags do not make up for it, or when the checkpoint lies behind the last update.
    """
    total_batch_size = args.train_batch_size * world_size * args.gradient_accumulation_steps
    if args.max_train_steps is None:
        if num_samples is None:
            raise UserError("`max_train_steps` is needed: how many samples remote shards hold is not known")
        args.max_train_steps = math.ceil(num_samples / total_batch_size) * args.num_train_epochs
    saved = resumed or {"args": {}}
    if saved.get("global_step", 0) > args.max_train_steps:
        raise UserError(
            f"`max_train_steps`={args.max_train_steps} is less than the {saved['global_step']} updates of the "
            "checkpoint; raise it, or name an earlier checkpoint in `resume_from_checkpoint`"
        )
    same_data = args.data_seed == saved["args"].get("data_seed")
    if same_data and saved["total_batch_size"] != total_batch_size:
        raise UserError(
            f"`resume_from_checkpoint`: an update had {saved['total_batch_size']} samples and has {total_batch_size} "
            f"with {world_size} process(es); change `gradient_accumulation_steps` to keep their number"
        )
    return total_batch_size
