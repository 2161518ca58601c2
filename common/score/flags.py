"""Flags of distribution matching that its scripts share, and their cross-checks."""

from common import flags

NAMES = (
    "score_levels",
    "score_min_time",
    "score_max_time",
    "fake_updates",
    "fake_warmup",
    "fake_learning_rate",
    "fake_lora_rank",
)


def add_arguments(group):
    """Those of the noise levels and of the fake score."""
    add = group.add_argument
    add("--score_levels", type=flags.positive_int, default=4, help="noise levels of a micro-batch; more: less noise")
    add("--score_min_time", type=flags.fraction, default=0.02, help="least noise level, 0: data")
    add("--score_max_time", type=flags.fraction, default=0.98, help="largest noise level, 1: noise")
    add("--fake_updates", type=flags.positive_int, default=5, help="of the fake score, for each of the student's")
    add(
        "--fake_warmup", type=flags.non_negative_int, default=50, help="updates of the fake score before the first one"
    )
    add("--fake_learning_rate", type=flags.positive_float, help="default: 1e-4, of a whole copy 1e-5")
    add("--fake_lora_rank", type=flags.non_negative_int, help="default: --lora_rank, or 64; 0: a whole copy")


def check_arguments(parser, args, lora_rank):
    """Their cross-checks; fills in defaults. lora_rank: the student's, 0 where it has none."""
    if args.score_min_time >= args.score_max_time:
        parser.error(f"--score_min_time={args.score_min_time} must be below --score_max_time={args.score_max_time}")
    if args.fake_lora_rank is None:
        args.fake_lora_rank = lora_rank or 64
    elif not args.fake_lora_rank and lora_rank:
        parser.error("--fake_lora_rank=0 copies all weights, and --lora_rank keeps one base in memory; drop one")
    if args.fake_learning_rate is None:
        args.fake_learning_rate = 1e-4 if args.fake_lora_rank else 1e-5


def options(args, lr_scheduler):
    """What `ScoreMatching` takes of them. After the warm-up the fake rate falls with the student's."""

    def share():
        warm = lr_scheduler.last_epoch < args.lr_warmup_steps
        return 1.0 if warm else lr_scheduler.get_last_lr()[0] / lr_scheduler.base_lrs[0]

    return {
        "num_levels": args.score_levels,
        "times": (args.score_min_time, args.score_max_time),
        "max_grad_norm": args.max_grad_norm,
        "share": share,
        "seed": args.seed,
    }
