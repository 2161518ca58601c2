"""Encode the images of a metadata table once: pairs for `train_direct_distill.py --pairs_dir`.

    python -m common.tools.encode_pairs images/metadata.csv pairs --pretrained_teacher_model=Qwen/Qwen-Image \\
        --dtype=bfloat16

The table is the one that `train_direct_distill.py --dataset_metadata_path` reads, which encodes an image whenever it
comes by. Shards are fixed ranges of rows, dealt to tasks that never wait for each other; finished ones are skipped.
"""

import hashlib
from pathlib import Path

from common import flags, lock
from common.direct import pair_shards, pairs, pipelines, probes, student
from common.errors import UserError, blame
from common.results.export import versions
from common.run import training_run
from common.tools.generate_pairs import public_config
from common.tools.work import (
    DTYPES,
    add_device_argument,
    add_work_arguments,
    find_device,
    quiet_libraries,
    resolve_work,
)

import torch
from tqdm import tqdm


def parse_args(argv=None):
    parser = flags.ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument(
        "dataset_metadata_path",
        type=flags.path,
        metavar="METADATA",
        help="csv, tsv, jsonl or json of image,prompt,seed,rand_device,...",
    )
    parser.add_argument("output_dir", type=flags.path, metavar="OUT", help="new, empty, or begun by the same command")
    add = parser.add_argument_group("teacher").add_argument
    add("--pretrained_teacher_model", type=flags.path, required=True, help="what made the images: folder or hub name")
    flags.add_hub_arguments(add, "the teacher")
    add("--dtype", choices=list(DTYPES), default="float32", help="of the whole pipeline")
    add_device_argument(add)
    add = parser.add_argument_group("images and work").add_argument
    add(
        "--dataset_base_path",
        type=flags.path,
        help="folder that the images' names start from; default: that of METADATA",
    )
    add("--samples_per_shard", type=flags.positive_int, default=256)
    add_work_arguments(add)
    args = parser.parse_args(argv)
    resolve_work(parser, args)
    return args


@training_run.tool_errors
def main(args):
    # 1. The table and the teacher's configuration, before any weight is loaded.
    device = find_device(args.device)
    quiet_libraries()
    # any size: the images are grouped by it below
    data = pairs.PairImages(args.dataset_metadata_path, args.dataset_base_path, max_pixels=2**62)
    place = {"revision": args.revision, "cache_dir": args.cache_dir}
    teacher = pipelines.read_pipeline_config(args.pretrained_teacher_model, variant=args.variant, **place)
    for note in teacher["notes"]:
        print(note, flush=True)
    pair_shards.check_folder(args.output_dir)
    lock.take(args.output_dir, (args.shard_index, args.num_shards))

    # 2. The teacher, and that its decoder gives the images back.
    options = {"variant": args.variant, **place}
    pipeline = pipelines.load_pipeline(args.pretrained_teacher_model, DTYPES[args.dtype], **options).to(device)
    data.pipeline = pipeline
    flag = "--pretrained_teacher_model"
    scheduler, _ = probes.student_scheduler(*teacher["scheduler"], None, {})
    own_scheduler, pipeline.scheduler = pipeline.scheduler, scheduler
    try:
        kwargs, _ = student.student_kwargs(pipeline, data, {}, *(data.steps or {4}), {})
        pipelines.check_encoding(pipelines.Rollout(pipeline, **kwargs), data, [0])
    except UserError as error:
        sentence = str(error).replace("`pairs_dir`, ", "")
        sentence = sentence.replace("`student_kwargs`, `student_scheduler`", "`dataset_metadata_path`")
        raise UserError(sentence.replace("`dataset_metadata_path`", f"METADATA, {flag}")) from None
    pipeline.scheduler = own_scheduler
    config = {
        "format": pair_shards.FORMAT,
        "model": args.pretrained_teacher_model,
        "revision": args.revision,
        "pipeline": type(pipeline).__name__,
        "weights_sample": pipelines.weights_sample(pipeline),
        "encoder_sample": pipelines.weights_sample(pipeline, encoder=True),
        "scheduler": {"class": type(own_scheduler).__name__, "config": public_config(own_scheduler)},
        "kwargs": {},
        "student_steps": sorted(data.steps),
        "num_pairs": len(data),
        "table_sha256": hashlib.sha256(repr([data.files, data.prompts, data.seeds, data.sizes]).encode()).hexdigest(),
        "samples_per_shard": args.samples_per_shard,
        "dtype": args.dtype,
        "versions": versions(),
    }
    pair_shards.write_config(args.output_dir, config)

    # 3. The shards of this task that are not there yet, image by image: their bytes depend on nothing else.
    own = list(range(pair_shards.num_shards(config)))[args.shard_index :: args.num_shards]
    missing = [shard for shard in own if not Path(args.output_dir, pair_shards.shard_name(shard)).exists()]
    label = f"task {args.shard_index} of {args.num_shards}"
    with tqdm(total=len(own), initial=len(own) - len(missing), desc=label, unit="shard", smoothing=0.05) as progress:
        for shard in missing:
            indices = pair_shards.shard_range(shard, len(data), args.samples_per_shard)
            pair_shards.write_shard(
                Path(args.output_dir, pair_shards.shard_name(shard)), encoded(data, indices, args, progress)
            )
            progress.update()
    pair_shards.report(label, own, config, args.output_dir)


def encoded(data, indices, args, progress):
    """(index, prompt, seed, latents, None, (height, width)) of a shard's images."""
    for index in indices:
        with blame(f"METADATA: {data.files[index]} cannot be read", OSError, ValueError, way_out="repair or drop it"):
            latents = data.latents([index])[0].cpu()
        if not torch.isfinite(latents).all():
            raise UserError(f"--dtype={args.dtype}: the VAE gave NaN for {data.files[index]}; use another")
        yield index, data.prompts[index], data.seeds[index], latents, None, data.sizes[index]
        progress.set_postfix(image=index)


if __name__ == "__main__":
    main(parse_args())
