"""Flags of direct distillation besides the regression's own, and their cross-checks."""

from common import flags
from common.direct import sources
from common.errors import UserError

SCORE_FLAGS = (
    "score_kwargs",
    "score_prompts",
    "adv_weight",
    "score_through",
    "score_levels",
    "score_min_time",
    "score_max_time",
    "fake_updates",
    "fake_warmup",
    "fake_learning_rate",
    "fake_lora_rank",
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
    add("--score_through", choices=("step", "call"), default="step", help="gradients through a drawn step, or all")
    add("--score_levels", type=flags.positive_int, default=4, help="noise levels of a micro-batch; more: less noise")
    add("--score_min_time", type=flags.fraction, default=0.02, help="least noise level, 0: data")
    add("--score_max_time", type=flags.fraction, default=0.98, help="largest noise level, 1: noise")
    add("--fake_updates", type=flags.positive_int, default=5, help="of the fake score, for each of the student's")
    add(
        "--fake_warmup", type=flags.non_negative_int, default=50, help="updates of the fake score before the first one"
    )
    add("--fake_learning_rate", type=flags.positive_float, help="default: 1e-4, of a whole copy 1e-5")
    add("--fake_lora_rank", type=flags.non_negative_int, help="default: --lora_rank, or 64; 0: a whole copy")


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
    if args.score_min_time >= args.score_max_time:
        parser.error(f"--score_min_time={args.score_min_time} must be below --score_max_time={args.score_max_time}")
    if not args.regression_weight:
        parser.refuse_idle(["loss_type", "huber_c", "backward"], "--regression_weight=0 has no regression; drop it")
    if args.fake_lora_rank is None:
        args.fake_lora_rank = args.lora_rank or 64
    elif not args.fake_lora_rank and args.lora_rank:
        parser.error("--fake_lora_rank=0 copies all weights, and --lora_rank keeps one base in memory; drop one")
    if args.fake_learning_rate is None:
        args.fake_learning_rate = 1e-4 if args.fake_lora_rank else 1e-5


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
    """What `score.ScoreMatching` takes of the flags. After the warm-up the fake rate falls with the student's."""

    def share():
        warm = lr_scheduler.last_epoch < args.lr_warmup_steps
        return 1.0 if warm else lr_scheduler.get_last_lr()[0] / lr_scheduler.base_lrs[0]

    return {
        "batch_size": args.train_batch_size,
        "num_steps": args.num_inference_steps,
        "through": args.score_through,
        "num_levels": args.score_levels,
        "times": (args.score_min_time, args.score_max_time),
        "max_grad_norm": args.max_grad_norm,
        "share": share,
        "seed": args.seed,
        "score_weight": args.score_weight,
        "adv_weight": args.adv_weight or 0.0,
    }
