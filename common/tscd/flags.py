"""The cross-checks of the two TSCD scripts' flags."""

from common import flags
from common.tscd import segments

weights = flags.numbers("list of numbers", flags.non_negative_float)


def check_stage_arguments(parser, args):
    """The cross-checks of TSCD's flags; fills in --max_train_steps where --stage_steps stand alone."""
    count = len(args.stage_segments)
    for name in ("stage_steps", "mse_weights", "adv_weights"):
        values = getattr(args, name)
        if values is not None and len(values) not in (1, count):
            listed = ",".join(f"{value:g}" for value in values)
            parser.error(f"--{name}={listed} has {len(values)} numbers for {count} stages; give one, or {count}")
    if args.freeze_discriminator_backbone:
        parser.refuse_idle(["adv_learning_rate"], "--freeze_discriminator_backbone trains the head alone; drop one")
    if args.w_min > args.w_max:
        parser.error(f"--w_min={args.w_min} is larger than --w_max={args.w_max}; swap them")
    if args.stage_steps and args.max_train_steps is None:
        args.max_train_steps = sum(segments.for_each(args.stage_steps, count))


def resolve_stages(args, resumed):
    """The list of `segments.Stage` that the flags ask for, with the edges of the resumed run."""
    lists = args.stage_steps, args.max_train_steps, args.mse_weights, args.adv_weights
    return segments.plan_stages(args.stage_segments, *lists, args.loss_type, resumed.get("stage_edges"))
