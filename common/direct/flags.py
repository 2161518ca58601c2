"""Flags of direct distillation besides the regression's own, and their cross-checks."""

from common import flags
from common.direct import sources
from common.errors import UserError
from common.score import flags as score_flags

SCORE_FLAGS = (
    "score_kwargs",
    "score_prompts",
    "adv_weight",
    "adv_images",
    "score_through",
    *score_flags.NAMES,
)


def add_data_arguments(parser):
    """The group of the pairs, or of the images that they are to be made of."""
    group = parser.add_argument_group("data")
    add, free, with_data = group.add_argument, group.add_free, group.add_with_data
    add(
        "--pairs_dir",
        type=flags.path,
        help="what generate_pairs or encode_pairs wrote; or cached latents of images with seeds, which become that",
    )
    add(
        "--dataset_metadata_path",
        type=flags.path,
        help="or a csv, tsv, jsonl, json: image,prompt,seed,rand_device,num_inference_steps,cfg_scale; encoded once",
    )
    add("--dataset_base_path", type=flags.path, help="folder of the table's images; default: the table's own")
    add("--height", type=flags.positive_int, help="all images of the table must have it, nothing is resized")
    add("--width", type=flags.positive_int, help="all images of the table must have it, nothing is resized")
    add("--max_pixels", type=flags.positive_int, help="images of several sizes, none larger; --train_batch_size=1")
    free("--skip_pairs_check", action="store_true", help="train even if the seeds do not seem to give the results")
    add("--num_held_out", type=flags.non_negative_int, help="last pairs kept for measuring; default: 64 or a tenth")
    with_data("--data_seed", type=flags.seed, help="seed of the order of the pairs; without it, --seed")


def add_score_arguments(parser):
    """The group of distribution matching; see `direct.score`."""
    group = parser.add_argument_group("score distillation")
    add, free = group.add_argument, group.add_free
    add("--score_weight", type=flags.non_negative_float, default=0.0, help="of distribution matching; 0: none")
    free("--regression_weight", type=flags.non_negative_float, default=1.0, help="of the pairs; 0: prompts alone")
    add("--score_kwargs", help="JSON object of arguments of the teacher's call, over those that made the pairs")
    add("--score_prompts", type=flags.path, help="file of prompts for the scores, one a line; default: the pairs'")
    add("--adv_weight", type=flags.positive_float, help="of an adversary that tells results from pairs; default: none")
    add("--adv_images", type=flags.path, help="table of real images for it in place of the pairs: image,prompt")
    add("--score_through", choices=("step", "call"), default="step", help="gradients through a drawn step, or all")
    score_flags.add_arguments(group)


def check_arguments(parser, args):
    """The cross-checks of the script's own flags; fills in defaults."""
    if args.learning_rate is None:
        args.learning_rate = 1e-4 if args.lora_rank else 1e-5
    if not args.lora_rank:
        names = ("lora_alpha", "lora_dropout", "lora_target_modules", "init_lora", "quantize_base")
        parser.refuse_idle(names, "--lora_rank=0 trains all weights; drop it")
    elif args.init_student:
        parser.error(
            "--init_student holds all weights, and --lora_rank trains a LoRA; pass --init_lora, or --lora_rank=0"
        )
    if args.lora_alpha is None:
        args.lora_alpha = float(args.lora_rank or 1)
    check_data_arguments(parser, args)
    check_score_arguments(parser, args)


def check_score_arguments(parser, args):
    """The cross-checks of that group; fills in its defaults."""
    if not args.score_weight:
        if not args.regression_weight:
            parser.error(
                "--regression_weight=0 and --score_weight=0 leave nothing to train; give one of them a weight"
            )
        idle = [*SCORE_FLAGS, "regression_weight"]
        parser.refuse_idle(idle, "without --score_weight there is no score; add it, or drop this")
        vars(args).update(dict.fromkeys(("score_weight", *SCORE_FLAGS)))  # as those of a run that knew none of them
        return
    if args.score_through == "call" and args.backward == "stepwise":
        parser.error(
            "--score_through=call keeps the activations of all steps, --backward=stepwise those of one; drop one"
        )
    if not args.adv_weight:
        parser.refuse_idle(["adv_images"], "without --adv_weight there is no adversary; add it, or drop this")
    if not args.regression_weight:
        parser.refuse_idle(["loss_type", "huber_c", "backward"], "--regression_weight=0 has no regression; drop it")
    score_flags.check_arguments(parser, args, args.lora_rank)


def check_data_arguments(parser, args):
    """The cross-checks of pairs and tables of images."""
    if bool(args.pairs_dir) == bool(args.dataset_metadata_path):
        parser.error("pass either --pairs_dir or --dataset_metadata_path")
    if args.pairs_dir and (args.height or args.width or args.max_pixels or args.dataset_base_path):
        parser.error("--height, --width, --max_pixels, --dataset_base_path are for --dataset_metadata_path")
    if bool(args.height) != bool(args.width) or args.height and args.max_pixels:
        parser.error("--height and --width go together, and without --max_pixels")
    if args.max_pixels and args.train_batch_size > 1:
        parser.error("--max_pixels: images of several sizes need --train_batch_size=1")


def read_data(args):
    """The pairs, or what they are to be made of; fills in --num_inference_steps and --num_held_out."""
    size = {"height": args.height, "width": args.width, "max_pixels": args.max_pixels}
    table = args.dataset_metadata_path, args.dataset_base_path
    data = sources.open_pairs(args.pairs_dir) if args.pairs_dir else sources.PairImages(table[0], table[1], **size)
    if args.pairs_dir and len(set(data.sizes)) > 1 and args.train_batch_size > 1:
        raise UserError("--pairs_dir: its images have several sizes; pass --train_batch_size=1")
    steps = set(data.steps)
    if args.num_inference_steps and steps - {args.num_inference_steps}:
        raise UserError(f"--num_inference_steps={args.num_inference_steps}: the table says {steps.pop()}; drop it")
    args.num_inference_steps = args.num_inference_steps or (steps.pop() if steps else 4)
    if args.num_held_out is None:
        args.num_held_out = min(64, len(data) // 10)
    if args.num_held_out >= len(data):
        raise UserError(f"--num_held_out={args.num_held_out} leaves none of the {len(data)} pairs to train on")
    return data


def score_options(args, lr_scheduler):
    """(what `score.Results`, what `ScoreMatching` takes of the flags)."""
    results = {
        "batch_size": args.train_batch_size,
        "num_steps": args.num_inference_steps,
        "through": args.score_through,
        "seed": args.seed,
    }
    names = {"weight": "`score_weight`", "regression": "`regression_weight`", "guidance": "`score_kwargs`"}
    return results, score_flags.options(args, lr_scheduler) | {
        "names": names | {"latents": "the pairs' latents"},
        "score_weight": args.score_weight,
        "adv_weight": args.adv_weight or 0.0,
    }
