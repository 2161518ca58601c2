"""The cross-checks of the two TSCD scripts' flags."""

from common import flags
from common.networks import lora
from common.score import flags as score_flags
from common.score.matching import check_engine
from common.score.process import Process
from common.tscd import segments

weights = flags.numbers("list of numbers", flags.non_negative_float)


def add_adversarial_arguments(parser):
    """The group of the adversarial distance."""
    add = parser.add_argument_group("adversarial distance").add_argument
    add("--mse_weights", type=weights, help="of --loss_type, one or one per stage; 1, of k = 2: .5, 1: .25")
    add("--adv_weights", type=weights, help="likewise; all 0: no discriminator")
    add(
        "--adv_real",
        choices=segments.ADV_REAL,
        help="what the student's jump is told from: noised data, or the target's jump (default of a LoRA)",
    )
    add("--adv_learning_rate", type=flags.non_negative_float, default=1e-6, help="of the discriminator's encoder")
    add("--adv_head_learning_rate", type=flags.non_negative_float, default=1e-5, help="of the discriminator's head")
    add("--adv_unconditional_start", type=flags.fraction, default=0.5, help="share of a stage with x_t as a condition")
    add("--freeze_discriminator_backbone", action="store_true", help="train the discriminator's head alone")


def add_score_arguments(parser):
    """The group of distribution matching; see `tscd.matching`."""
    group = parser.add_argument_group("score distillation")
    group.add_argument("--score_weights", type=weights, help="of distribution matching, likewise; default: none")
    score_flags.add_arguments(group)


def check_stage_arguments(parser, args):
    """The cross-checks of TSCD's flags; fills in --max_train_steps where --stage_steps stand alone."""
    count = len(args.stage_segments)
    for name in ("stage_steps", "mse_weights", "adv_weights", "score_weights"):
        values = getattr(args, name)
        if values is not None and len(values) not in (1, count):
            listed = ",".join(f"{value:g}" for value in values)
            parser.error(f"--{name}={listed} has {len(values)} numbers for {count} stages; give one, or {count}")
    if args.freeze_discriminator_backbone:
        parser.refuse_idle(["adv_learning_rate"], "--freeze_discriminator_backbone trains the head alone; drop one")
    if (args.adv_real or default_real(args)) == "data":
        reason = "only with --adv_real=target does the discriminator see x_t, of which data is no jump; add it"
        parser.refuse_idle(["adv_unconditional_start"], reason)
    if args.score_weights and any(args.score_weights):
        score_flags.check_arguments(parser, args, getattr(args, "lora_rank", 0))
    else:
        reason = "without --score_weights there is no score; add them, or drop this"
        parser.refuse_idle(score_flags.NAMES, reason)
        vars(args).update(dict.fromkeys(("score_weights", *score_flags.NAMES)))  # as those of a run that knew none
    if args.w_min > args.w_max:
        parser.error(f"--w_min={args.w_min} is larger than --w_max={args.w_max}; swap them")
    if args.stage_steps and args.max_train_steps is None:
        args.max_train_steps = sum(segments.for_each(args.stage_steps, count))


def check_score(args, unet_config, noise_scheduler, accelerator):
    """The `Process` of scores, or UserError where distribution matching cannot be had; None without it. Needs no
    weights."""
    if not args.score_weights:
        return None
    check_engine(accelerator, args.fake_lora_rank)
    if args.fake_lora_rank:
        modules = lora.parse_target_modules(getattr(args, "lora_target_modules", None))
        lora.check_rank(unet_config, args.fake_lora_rank, modules, of="fake_lora_rank")
    return Process(noise_scheduler)


def fake_options(args):
    """What `matching.make_scores` takes of the flags."""
    has_lora = bool(getattr(args, "lora_rank", 0))
    options = {"rank": args.fake_lora_rank, "has_lora": has_lora, "seed": args.seed}
    return options | {"recomputed": args.gradient_checkpointing}


def default_real(args):
    """What was nearer to the data over three seeds: docs/measured.md."""
    return "target" if getattr(args, "lora_rank", 0) else "data"


def resolve_real(args, resumed):
    """Fill in `adv_real`. It stays None, and means the target, in a run of before this flag."""
    saved = resumed["args"].get("adv_real")
    if resumed["args"] and saved is None:
        args.adv_real = None if args.adv_real == "target" else args.adv_real
    elif args.adv_real is None:
        args.adv_real = saved or default_real(args)


def resolve_stages(args, resumed):
    """The list of `segments.Stage` that the flags ask for, with the edges of the resumed run."""
    return segments.plan_stages(
        args.stage_segments,
        stage_steps=args.stage_steps,
        max_train_steps=args.max_train_steps,
        mse_weights=args.mse_weights,
        adv_weights=args.adv_weights,
        loss_type=args.loss_type,
        edges=resumed.get("stage_edges"),
        adv_real=args.adv_real or "target",
        score_weights=args.score_weights,
    )


def score_options(args, lr_scheduler):
    """What `matching.StageScore` takes of the flags."""
    names = {"weight": "`score_weights`", "regression": "`mse_weights`", "guidance": "`w_max`"}
    options = score_flags.options(args, lr_scheduler) | {"names": names | {"latents": "the batches' latents"}}
    return options | {"fake_updates": args.fake_updates, "fake_warmup": args.fake_warmup}
