"""Ask a teacher for many samples and keep what it was asked and gave: the data of `train_direct_distill.py`.

    python -m common.tools.generate_pairs --pretrained_teacher_model=Qwen/Qwen-Image --prompts=prompts.txt \\
        --output_dir=pairs --num_inference_steps=40 --guidance_scale=4 --negative_prompt=" " --dtype=bfloat16

or, on several GPUs, `accelerate launch --multi_gpu -m common.tools.generate_pairs ...`, or in a SLURM array. Pair i
has prompt i, seed --seed + i, and a CPU generator of its own. Shards are fixed ranges of pairs, dealt to the
processes, which never wait for each other; finished ones are skipped, so the same command goes on after an
interruption, and the bytes are the same for any number of processes. Left out: pipelines that start from images.
"""

import hashlib
import os
from pathlib import Path

from common import errors, flags, lock
from common.data import tables
from common.data.fetch import open_shard
from common.data.folders import TEXT_KEYS
from common.data.shards import SampleError, expand_shards, tar_samples
from common.direct import embeddings, pairs, pipelines, pixels, probes, student, tasks
from common.errors import UserError, speaking_of
from common.networks import fusing
from common.results.export import versions
from common.run import screen, training_run
from common.tools.work import DTYPES, add_device_argument, add_work_arguments, find_device, resolve_work

import torch
from tqdm import tqdm


def parse_args(argv=None):
    parser = flags.ArgumentParser(__doc__.split("\n")[0])
    add = parser.add_argument_group("teacher").add_argument
    add("--pretrained_teacher_model", type=flags.path, required=True, help="folder or hub name, in diffusers layout")
    flags.add_hub_arguments(add, "the teacher")
    flags.add_teacher_lora(add)
    add("--dtype", choices=list(DTYPES), default="float32", help="of the whole pipeline")
    add_device_argument(add)
    add = parser.add_argument_group("what it is asked").add_argument
    add(
        "--prompts",
        type=flags.path,
        required=True,
        help="txt (one a line), csv, tsv, json(l), parquet, or shards with captions",
    )
    add("--prompt_column", help="of a table; default: prompt, text or caption")
    add("--num_pairs", type=flags.positive_int, help="default: one for each prompt; more go through them again")
    add("--num_inference_steps", type=flags.positive_int, default=50, help="of the teacher")
    add("--guidance_scale", type=flags.non_negative_float, help="of the teacher; default: the pipeline's")
    add("--negative_prompt", help="some pipelines do not guide without one")
    add("--height", type=flags.positive_int, help="in pixels; default: the pipeline's")
    add("--width", type=flags.positive_int, help="in pixels; default: the pipeline's")
    add("--teacher_kwargs", help="JSON object of other arguments of the pipeline's call")
    add("--scheduler", help="class of diffusers to sample with; default: the teacher's own")
    add("--scheduler_kwargs", help="JSON object of changes to the scheduler's configuration")
    add("--seed", type=flags.seed, default=0, help="of pair 0; pair i has seed + i")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=flags.path, required=True, help="new, empty, or begun by the same command")
    add("--samples_per_shard", type=flags.positive_int, default=256)
    add("--batch_size", type=flags.positive_int, default=8, help="samples at once; part of what the bytes follow from")
    add("--save_embeddings", action="store_true", help="what the text encoders make of the prompts, for training")
    add("--save_images", action="store_true", help="a png beside the latents, to look at")
    add_work_arguments(add)
    args = parser.parse_args(argv)
    resolve_work(parser, args)
    for name in ("teacher_kwargs", "scheduler_kwargs"):
        try:
            setattr(args, name, pipelines.parse_kwargs(f"--{name}", getattr(args, name)))
        except UserError as error:
            parser.error(error)
    if clash := {"num_inference_steps", "guidance_scale", "height", "width", "negative_prompt"} & set(
        args.teacher_kwargs
    ):
        parser.error(f"--teacher_kwargs: {min(clash)} has a flag of its own, --{min(clash)}")
    if bool(args.height) != bool(args.width):
        parser.error("--height and --width go together: some pipelines ignore one alone")
    return args


@training_run.tool_errors
def main(args):
    # 1. This process's place; nothing is agreed with the others, so one that fails costs its shards alone.
    rank, world_size = args.shard_index, args.num_shards
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = find_device(args.device)

    # 2. What is asked, checked before any weight is loaded.
    prompts = read_prompts(args.prompts, args.prompt_column)
    num_pairs = args.num_pairs or len(prompts)
    place = {"revision": args.revision, "cache_dir": args.cache_dir}
    own = {"variant": args.variant, "teacher_lora": args.teacher_lora}
    teacher = pipelines.read_pipeline_config(args.pretrained_teacher_model, **own, **place)
    for note in teacher["notes"]:
        print(note, flush=True)
    scheduler_class, scheduler_config = teacher["scheduler"]
    flag = "--scheduler" if args.scheduler else "--pretrained_teacher_model"
    if args.scheduler:
        scheduler_class = probes.scheduler_class("--scheduler", args.scheduler)
    changes_flag = "--scheduler_kwargs" if args.scheduler_kwargs else flag
    scheduler = probes.make_scheduler(changes_flag, scheduler_class, scheduler_config, args.scheduler_kwargs)
    probes.check_steps(scheduler, args.num_inference_steps)
    pairs.check_folder(args.output_dir)
    lock.take(args.output_dir, (rank, world_size))

    # 3. The teacher, and what it does with these arguments.
    if rank == 0:
        print(f"loading {args.pretrained_teacher_model}", flush=True)
    pipeline = pipelines.load_pipeline(
        args.pretrained_teacher_model, DTYPES[args.dtype], scheduler=scheduler, **own, **place
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    kwargs = call_kwargs(args, pipeline)
    guided = check_teacher(pipeline, (prompts * 2)[:2], kwargs, flag)
    notes = []
    kwargs |= pixels.rounded(pipeline, prompts[0], kwargs, notes)
    for note in notes:
        print(note, flush=True)
    config = {
        "format": pairs.FORMAT,
        "model": args.pretrained_teacher_model,
        "revision": args.revision,
        "teacher_lora": fusing.identity(args.teacher_lora),
        "pipeline": type(pipeline).__name__,
        "weights_sample": pipelines.weights_sample(pipeline),
        "scheduler": pairs.recorded(scheduler),
        "kwargs": kwargs,
        "guided": guided,
        "seed": args.seed,
        "num_pairs": num_pairs,
        "num_prompts": len(prompts),
        "prompts_sha256": prompts_sha256(prompts),
        "samples_per_shard": args.samples_per_shard,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "images": args.save_images,
        "versions": versions(),
    }
    pairs.write_config(args.output_dir, config)
    if rank == 0:
        screen.echo("What is asked", asked(config))

    # 4. What this process has to make of the embeddings, then of the shards.
    if args.save_embeddings:
        texts = [prompts[i % len(prompts)] for i in range(num_pairs)]
        options = student.call_of(pipeline, texts, kwargs)
        folder = Path(args.output_dir, "embeddings")
        print(embeddings.make(pipeline, texts, options, folder, device, (rank, world_size)), flush=True)
    shards, missing = pairs.missing_shards(args.output_dir, config, (rank, world_size))
    ranges = {shard: pairs.shard_range(shard, num_pairs, args.samples_per_shard) for shard in shards}
    done = sum(len(ranges[shard]) for shard in shards if shard not in missing)
    total = sum(map(len, ranges.values()))
    label = f"pairs of process {rank}" if world_size > 1 else "pairs"
    with tqdm(total=total, initial=done, desc=label, unit="pair", position=local_rank, smoothing=0.05) as progress:
        for shard in missing:
            made = make_pairs(pipeline, ranges[shard], prompts, args, kwargs, progress)
            pairs.write_shard(pairs.shard_path(args.output_dir, shard), made)
    pairs.report(f"process {rank} of {world_size}", shards, config, args.output_dir)


def asked(config):
    """{name: text} of what all processes together do, for people."""
    call = ", ".join(f"{name}={value!r}" for name, value in config["kwargs"].items())
    guided = "guided" if config["guided"] else "without guidance"
    first, last = config["seed"], config["seed"] + config["num_pairs"] - 1
    return {
        "pairs": f"{config['num_pairs']} of {config['num_prompts']} prompts, seeds {first} to {last}",
        "teacher": f"{config['pipeline']}, {config['scheduler']['class']}, {guided}, {config['dtype']}",
        "call": call,
    }


def call_kwargs(args, pipeline):
    """Everything that the teacher's call gets beside prompts and seeds; UserError for what it does not take."""
    arguments = tasks.arguments(type(pipeline))
    kwargs = {"num_inference_steps": args.num_inference_steps} | args.teacher_kwargs
    for name in ("height", "width", "negative_prompt"):
        if getattr(args, name) is not None:
            kwargs[name] = getattr(args, name)
    scale = probes.guidance_argument(pipeline)
    if args.guidance_scale is not None and scale is None:
        raise UserError(f"--guidance_scale: {type(pipeline).__name__} takes none; drop the flag")
    if scale is not None and scale not in kwargs:
        value = arguments[scale].default if args.guidance_scale is None else args.guidance_scale
        if value is not None:
            kwargs[scale] = float(value)
    for name in kwargs:
        if name not in arguments:
            raise UserError(f"--teacher_kwargs, --{name}: the call of {type(pipeline).__name__} has no {name}")
    return kwargs


def check_teacher(pipeline, prompts, kwargs, flag):
    """Whether the teacher guides; UserError when it is asked to and does not, or when its steps draw noise."""
    try:
        probes.check_draws(flag, pipeline, prompts, **kwargs)
        seen = probes.observe(pipeline, prompts, **kwargs | {"num_inference_steps": 2})
    except errors.CALL_ERRORS as error:
        raise UserError(f"the teacher's call refuses these arguments ({kwargs}): {error}") from error
    guided = probes.guides(seen, len(prompts))
    embedded = probes.embeds_guidance(pipeline)
    scale = probes.guidance_argument(pipeline)
    if scale and kwargs.get(scale, 0) > 1 and not guided and not embedded:
        raise UserError(
            f"--guidance_scale={kwargs[scale]:g}: {type(pipeline).__name__} does not guide with these arguments, most "
            "likely for lack of a --negative_prompt (one blank will do); or pass --guidance_scale=1"
        )
    return guided or embedded


@torch.no_grad()
def make_pairs(pipeline, indices, prompts, args, kwargs, progress):
    """(index, prompt, seed, latents, image or None) of a shard, in batches counted from its start."""
    for start in range(0, len(indices), args.batch_size):
        batch = indices[start : start + args.batch_size]
        texts, seeds = [prompts[i % len(prompts)] for i in batch], [args.seed + i for i in batch]
        latents = pipelines.call(pipeline, texts, seeds, **kwargs)
        if not torch.isfinite(latents).all():
            raise UserError(
                f"--dtype={args.dtype}: the teacher gave NaN for pair {batch[0]} or one after it; use another"
            )
        images = [None] * len(batch)
        if args.save_images:
            decoded = pipelines.decode(pipeline, latents, texts, **kwargs | {"num_inference_steps": 2})
            if decoded is None:
                raise UserError(
                    f"--save_images: latents of {type(pipeline).__name__} cannot be decoded alone; drop it"
                )
            images = pipelines.to_pixels(decoded)
        yield from zip(batch, texts, seeds, latents.cpu(), images, [None] * len(batch), strict=True)
        progress.update(len(batch))


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
        with speaking_of("--prompts"):
            shards = expand_shards(spec)
    except UserError as error:
        raise UserError(f"{error}; prompts are in {tables.FORMATS}, or captions of shards") from None
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


def prompts_sha256(prompts):
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


if __name__ == "__main__":
    main(parse_args())
