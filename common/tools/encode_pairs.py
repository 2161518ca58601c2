"""Encode a teacher's images: pairs for `train_direct_distill.py --pairs_dir`, as `generate_pairs` writes them.

    python -m common.tools.encode_pairs images/metadata.csv pairs --pretrained_teacher_model=Qwen/Qwen-Image \\
        --dtype=bfloat16

IN is the table of `train_direct_distill.py --dataset_metadata_path`, or cached latents of `encode_shards`, of images
with seeds. Training does the same with them by itself, before its first step; here it is done once, for many runs.
Shards are fixed ranges of rows, dealt to tasks that never wait for each other; finished ones are skipped.
"""

from pathlib import Path

from common import flags, lock
from common.data import cached_latents, tables
from common.direct import embeddings, pairs, pipelines, probes, sources, student
from common.errors import UserError, speaking_of
from common.networks import fusing
from common.run import training_run
from common.tools.work import DTYPES, add_device_argument, add_work_arguments, find_device, resolve_work, task_of


def parse_args(argv=None):
    parser = flags.ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument(
        "dataset_metadata_path",
        type=flags.path,
        metavar="IN",
        help="csv, tsv, jsonl or json of image,prompt,seed,rand_device,..., or cached latents",
    )
    parser.add_argument("output_dir", type=flags.path, metavar="OUT", help="new, empty, or begun by the same command")
    add = parser.add_argument_group("teacher").add_argument
    add("--pretrained_teacher_model", type=flags.path, required=True, help="what made the images: folder or hub name")
    flags.add_hub_arguments(add, "the teacher")
    flags.add_teacher_lora(add)
    add("--dtype", choices=list(DTYPES), default="float32", help="of the whole pipeline")
    add_device_argument(add)
    add = parser.add_argument_group("images and work").add_argument
    add("--dataset_base_path", type=flags.path, help="folder that the images' names start from; default: that of IN")
    add("--save_embeddings", action="store_true", help="what the text encoders make of the prompts, for training")
    add("--samples_per_shard", type=flags.positive_int, default=256)
    add_work_arguments(add)
    args = parser.parse_args(argv)
    resolve_work(parser, args)
    return args


@training_run.tool_errors
def main(args):
    # 1. What is encoded and the teacher's configuration, before any weight is loaded.
    device = find_device(args.device)
    dtype, place = DTYPES[args.dtype], {"revision": args.revision, "cache_dir": args.cache_dir}
    own = {"variant": args.variant, "teacher_lora": args.teacher_lora}
    teacher = pipelines.read_pipeline_config(args.pretrained_teacher_model, **own, **place)
    with speaking_of("IN", "pairs_dir"):
        source = read_source(args.dataset_metadata_path, args.dataset_base_path)
        sources.check_vae(source, teacher, args.pretrained_teacher_model, dtype, **place)
    for note in teacher["notes"]:
        print(note, flush=True)
    pairs.check_folder(args.output_dir)
    lock.take(args.output_dir, (args.shard_index, args.num_shards))

    # 2. The teacher, what its call does, and the shards of this task that are not there yet.
    label, part = task_of(args), (args.shard_index, args.num_shards)
    with speaking_of("IN, --pretrained_teacher_model", "pairs_dir"):
        sources.check_encoder(source, args.pretrained_teacher_model, variant=args.variant, **place)
        print(f"loading {args.pretrained_teacher_model}", flush=True)
        pipeline = pipelines.load_pipeline(args.pretrained_teacher_model, dtype, **own, **place).to(device)
        pipeline.scheduler, _ = probes.student_scheduler(*teacher["scheduler"])
        try:
            kwargs, _ = student.student_kwargs(pipeline, source, {}, *(source.steps or {4}), {})
        except UserError as error:
            sentence = str(error).replace("`pairs_dir`, `dataset_metadata_path`", "`pairs_dir`")
            raise UserError(sentence.replace("`student_kwargs`, `student_scheduler`", "`pairs_dir`")) from None
        own, config = sources.write_pairs(
            source,
            pipeline=pipeline,
            kwargs=kwargs,
            folder=args.output_dir,
            scheduler=teacher["scheduler"],
            model={
                "model": args.pretrained_teacher_model,
                "revision": args.revision,
                "dtype": args.dtype,
                "teacher_lora": fusing.identity(args.teacher_lora),
            },
            part=part,
            samples_per_shard=args.samples_per_shard,
            desc=label,
        )
    if args.save_embeddings:
        folder, options = Path(args.output_dir, "embeddings"), kwargs | source.call_kwargs([0])
        print(embeddings.make(pipeline, source.prompts, options, folder, device, part), flush=True)
    pairs.report(label, own, config, args.output_dir)


def read_source(spec, base_path):
    """The table or the cached latents that IN names."""
    if Path(spec).suffix.lower() in tables.TABLES or not (Path(spec).is_dir() or ".tar" in spec):
        return sources.PairImages(spec, base_path, max_pixels=2**62)  # of any size, for which each pair says its own
    if Path(spec).is_dir() and not any(Path(spec, name).is_file() for name in (cached_latents.MANIFEST, pairs.CONFIG)):
        raise UserError(
            f"`pairs_dir`={spec} is a folder without cached latents; name the table of its images, prompts and seeds, "
            f"such as {Path(spec, 'metadata.csv')}"
        )
    source = sources.open_pairs(spec)
    if isinstance(source, pairs.PairShards):
        raise UserError(f"`pairs_dir`={spec} holds pairs already; train from them with --pairs_dir")
    if base_path:
        raise UserError("--dataset_base_path is for a table, and IN holds cached latents; drop it")
    return source


if __name__ == "__main__":
    main(parse_args())
