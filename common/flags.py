"""Flags that several scripts share, their types and cross-checks.

Only this module and the scripts see the argparse Namespace; everything below them takes plain values.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import math
import os
import re
import shlex
import sys
import time

from common.data import tables
from common.data.folders import expand_home
from common.data.images import INTERPOLATION_TYPES
from common.errors import UserError, mask_credentials
from common.networks import performance, teachers
from common.networks.encoders import VAE_ENCODE_BATCH_SIZE

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from huggingface_hub import get_token

SECRET_FLAGS = ("hub_token",)
FREE, WITH_DATA = "free", "with_data"
EVALUATION_FLAGS = ("feature_network", "eval_prompts", "eval_reference", "export")  # which --eval_steps gives a use
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


class Resumable:
    """What adds flags, and notes of each whether a run that is resumed may change it."""

    def add_argument(self, *names, on_resume=None, **options):
        """on_resume: FREE, WITH_DATA, or None for a flag that stays what it was."""
        action = super().add_argument(*names, **options)
        action.on_resume = on_resume
        return action

    # a flag that may change whenever a run is resumed; where `data_seed` does, with which the data start afresh
    add_free = functools.partialmethod(add_argument, on_resume=FREE)
    add_with_data = functools.partialmethod(add_argument, on_resume=WITH_DATA)


class Group(Resumable, argparse._ArgumentGroup):
    """A group of flags."""


class ArgumentParser(Resumable, argparse.ArgumentParser):
    """argparse that answers a mistake with one sentence on stderr (on one process of each node) and exit code 2."""

    spelling = {}  # of the latest parser: the flag of each name in a Namespace
    latest = None  # the parser itself; its `typed` are the names of the flags that stood on the command line

    def __init__(self, description):
        super().__init__(
            description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
        )

    def parse_args(self, argv=None):
        argv = list(sys.argv[1:] if argv is None else argv)
        if argv and argv[-1].strip(" \r\n") == "\\":  # a command copied with its last line's backslash
            argv.pop()
        words = [word.split("=")[0] for word in argv]
        self.typed = {self._option_string_actions[word].dest for word in words if word in self._option_string_actions}
        args = super().parse_args(argv)
        sys.argv[1:] = mask_secrets(sys.argv[1:])  # trackers record the command line on their own
        ArgumentParser.spelling, ArgumentParser.latest = self._spelling(), self
        for action in self._actions:
            if getattr(args, action.dest, None) == "" and action.dest != "negative_prompt":
                name = (action.option_strings or [action.metavar])[0]
                self.error(f"{name} is empty (a variable that is not set?); give it a value, or drop it")
        return args

    def add_argument_group(self, *args, **options):
        self._action_groups.append(Group(self, *args, **options))
        return self._action_groups[-1]

    def resume_rules(self):
        """{"free", "with_data": names}: the flags that a resumed run may change, always and where `data_seed` does."""
        return {kind: {a.dest for a in self._actions if a.on_resume == kind} for kind in (FREE, WITH_DATA)}

    def groups(self):
        """[(title, actions)] of the argument groups."""
        return [(group.title, group._group_actions) for group in self._action_groups]

    def _spelling(self):
        return {action.dest: (action.option_strings or [action.metavar])[0] for action in self._actions}

    def error(self, message):
        ArgumentParser.spelling = self._spelling()
        exit_with(self.prog, message)

    def refuse_idle(self, names, reason):
        """An error where flags of `names` were typed, which do nothing beside the others; reason: why, and what to do.

        What a default would say is no error: nobody asked for it.
        """
        idle = [f"--{name}" for name in names if name in self.typed]
        if idle:
            self.error(f"{', '.join(idle)}: {reason}")


def exit_with(prog, message, on_one_rank=False):
    """Print `prog: error: message` as one line and exit with code 2.

    Only the first process of a node prints what all of them meet; what may have met one alone, that one prints.
    Parameters in backquotes are printed as flags. The launcher of several processes repeats it at the end of its own
    report, where `torch.distributed.elastic` looks for it.
    """
    message = f"{prog}: error: {mask_credentials(' '.join(spelled(str(message)).split()))}"
    if on_one_rank or os.environ.get("LOCAL_RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError), open(report, "w", encoding="utf-8") as file:
            json.dump({"message": message, "timestamp": int(time.time())}, file)
    raise SystemExit(2)


def spelled(text):
    """A text in which parameters in backquotes have become the flags of their names."""
    return re.sub(r"`(\w+)`", lambda found: ArgumentParser.spelling.get(found[1], found[0]), text)


def _number(name, read, fits, message):
    """An argparse type: what `read` makes of a text, where it `fits`; else the message, of {value} or {text}."""

    def parse(text):
        value = read(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(message.format(value=value, text=text))
        return value

    parse.__name__ = name  # which argparse says of a text that is no number
    return parse


def numbers(name, item):
    """An argparse type: `1,2,4` -> [1, 2, 4], each as from the type `item`, at least one."""

    def read(text):
        return [item(part) for part in text.split(",") if part.strip()]

    return _number(name, read, bool, "names no number; give one or more, such as 1,2,4")


positive_int = _number("positive whole number", int, lambda n: n >= 1, "must be at least 1, not {value}")
non_negative_int = _number("whole number", int, lambda n: n >= 0, "must not be negative, it is {value}")
seed = _number("whole number", int, lambda n: 0 <= n < 2**62, "must be a whole number from 0 to 2^62, not {value}")
embedding_width = _number(  # half of it are sines, half cosines, and two of each are needed
    "whole number", int, lambda n: n >= 4 and n % 2 == 0, "must be an even number of at least 4, not {value}"
)
real = _number("number", float, math.isfinite, "must be a number, not {text}")
fraction = _number("fraction", float, lambda x: 0.0 <= x <= 1.0, "must be between 0 and 1, not {value}")
beta = _number("fraction", float, lambda x: 0.0 <= x < 1.0, "must be at least 0 and less than 1, not {value}")
positive_float = _number(
    "positive number", float, lambda x: 0.0 < x < math.inf, "must be a positive number, not {text}"
)
non_negative_float = _number(
    "number", float, lambda x: 0.0 <= x < math.inf, "must be a number that is not negative, not {text}"
)
int_list = numbers("list of whole numbers", positive_int)


def add_hub_arguments(add, of):
    """Which files of the hub are loaded; of: what --revision speaks of."""
    add("--revision", help=f"hub revision of {of}")
    add("--variant", help="weight files to load, such as fp16")
    add("--cache_dir", on_resume=FREE, type=path, help="where hub downloads are kept")


def add_checkpoint_arguments(add):
    """The Stable Diffusion teacher's files, as the training scripts and encode_shards load them."""
    add("--pretrained_teacher_model", type=path, required=True, help="folder, hub name, or one .safetensors file")
    add("--pretrained_vae_model_name_or_path", type=path, help="another VAE than the teacher's: folder or hub name")
    add("--teacher_revision", help="hub revision of the teacher; without it, --revision")
    add_hub_arguments(add, "everything without a revision flag of its own")


def add_teacher_lora(add):
    """LoRAs that are a part of the teacher, for `networks.fusing`."""
    add("--teacher_lora", type=path, help="LoRA files that are part of the teacher: PATH or PATH:SCALE, with commas")


def add_teacher_arguments(parser):
    add = parser.add_argument_group("teacher").add_argument
    add_checkpoint_arguments(add)
    add("--vae_encode_batch_size", type=positive_int, help="images that the VAE encodes at once; SD: 32, SDXL: 2")
    add("--use_fix_crop_and_size", action="store_true", help="SDXL: say of every sample that it was never cropped")
    add_teacher_lora(add)
    yes_no = argparse.BooleanOptionalAction
    add("--cast_teacher_unet", action=yes_no, default=True, help="run the teacher in the dtype of --mixed_precision")


def add_image_arguments(add):
    """How images are read; cached latents were made with these and are checked against them."""
    add("--resolution", type=positive_int, help="side of the square training images, in pixels; the teacher's own")
    add("--interpolation_type", default="bilinear", choices=INTERPOLATION_TYPES, help="how images are resized")
    add("--center_crop", action="store_true", help="crop the middle instead of a random place")
    add("--random_flip", action="store_true", help="mirror half of the images")
    add("--min_image_size", type=non_negative_int, default=0, help="skip images whose shorter side is less")


def add_data_arguments(parser, text=True):
    """text: whether the data have captions, and come from shards alone."""
    group = parser.add_argument_group("data")
    add, free, with_data = group.add_argument, group.add_free, group.add_with_data
    tars = "tars (braces, globs, http://, pipe:)" + (" or an image folder" if text else "")
    with_data("--train_shards_path_or_url", type=path, required=text, help=tars)
    add_image_arguments(add)
    if text:
        add("--proportion_empty_prompts", type=fraction, default=0.0, help="share of captions that are dropped")
    with_data("--max_train_samples", type=positive_int, help="use at most so many distinct samples")
    with_data("--shuffle_block_samples", type=positive_int, default=1000, help="samples of one lane shuffled together")
    with_data(
        "--data_lanes", type=positive_int, help="parallel sample streams, a multiple of the processes; default: 8 each"
    )
    with_data("--data_seed", type=seed, help="seed of the sample order and the crops; without it, --seed")
    free("--dataloader_num_workers", type=non_negative_int, default=0, help="loader processes; 0 loads in this one")
    free("--data_timeout", type=positive_int, default=600, help="seconds without a batch after which the run stops")
    free(
        "--shard_disk_gb", type=positive_float, help="room in TMPDIR for a process's remote shards; default: 2 a lane"
    )
    free("--shard_cache_dir", type=path, help="folder that keeps remote shards, for later epochs, runs and processes")
    free(
        "--shard_cache_gb", type=positive_float, help="size at which the cache drops shards that were not read lately"
    )
    free("--max_skip_ratio", type=fraction, default=0.2, help="the run stops above this share of unreadable samples")


def add_training_arguments(parser, output_dir, tracker_project_name, samples="prompts"):
    """samples: what is sampled while it trains: "prompts" (--validation_prompts, at --validation_num_inference_steps),
    "pairs", or "images", whose script has flags of its own for it. Of "pairs", the loss is no difference of the
    network's own outputs."""
    group = parser.add_argument_group("update")
    add, free, with_data = group.add_argument, group.add_free, group.add_with_data
    with_data("--train_batch_size", type=positive_int, default=16, help="samples per process and micro-batch")
    # free, to keep the samples per update on another number of processes
    free("--gradient_accumulation_steps", type=positive_int, default=1, help="micro-batches per update")
    free("--num_train_epochs", type=positive_int, default=100, help="passes over the data, without --max_train_steps")
    free("--max_train_steps", type=positive_int, help="updates; overrides --num_train_epochs")
    add("--learning_rate", type=non_negative_float, default=1e-4)
    add("--scale_lr", action="store_true", help="multiply the learning rate by processes x batch x accumulation")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="over --max_train_steps updates")
    add("--lr_warmup_steps", type=non_negative_int, default=500, help="updates of warm-up, if the scheduler has it")
    add("--use_8bit_adam", action="store_true", help="AdamW with 8-bit states, from bitsandbytes")
    add("--adam_beta1", type=beta, default=0.9)
    add("--adam_beta2", type=beta, default=0.999)
    add("--adam_weight_decay", type=non_negative_float, default=1e-2)
    add("--adam_epsilon", type=positive_float, default=1e-8)
    add("--max_grad_norm", type=positive_float, default=1.0, help="gradients are clipped to this norm")
    free("--max_nonfinite_steps", type=positive_int, default=10, help="stop after so many skipped updates in a row")

    group = parser.add_argument_group("machine")
    add, free = group.add_argument, group.add_free
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="without it, what `accelerate config` says")
    if samples != "pairs":
        free(
            "--float32_end_layers",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="first and last layers in float32 under --mixed_precision",
        )
    add("--allow_tf32", action="store_true", help="TF32 matrix products and convolutions on NVIDIA GPUs")
    free(
        "--gradient_checkpointing",
        nargs="?",
        const="full",
        default="none",
        choices=performance.CHECKPOINTING,
        help="recompute activations in the backward pass; selective: of the largest blocks; the bare flag: full",
    )
    free("--compile", action="store_true", help="torch.compile of the denoisers' blocks; takes minutes at the start")
    free("--channels_last", action="store_true", help="convolutions' layout in memory; faster with --compile, on GPUs")
    free("--enable_xformers_memory_efficient_attention", action="store_true", help="instead of torch's, where it runs")
    free("--local_rank", type=int, default=-1, help="accepted because launchers pass it; LOCAL_RANK decides")

    group = parser.add_argument_group("run")
    add, free = group.add_argument, group.add_free
    free("--output_dir", type=path, default=output_dir, help="where checkpoints, logs and the result go")
    add("--seed", type=seed, help="makes the run repeatable; without it one is drawn and saved")
    free("--dry_run", action="store_true", help="check everything, simulate an update, write nothing")
    free("--verbose", action="store_true", help="print every flag at the start, those of the parser's defaults too")
    free("--checkpointing_steps", type=positive_int, default=500, help="updates between two checkpoints")
    free(
        "--checkpoints_total_limit", type=positive_int, help="how many checkpoints to keep, and the best; default: all"
    )
    free("--resume_from_checkpoint", type=path, help="latest, a name under --output_dir, or a path")
    free("--stop_margin", type=non_negative_int, default=300, help="seconds before a SLURM job's end to save and stop")

    group = parser.add_argument_group("logging and validation")
    free = group.add_free
    free("--report_to", default="tensorboard", help="tensorboard, wandb, comet_ml, all, none; several with commas")
    free("--logging_dir", type=path, default="logs", help="for trackers, under --output_dir")
    free("--logging_steps", type=positive_int, default=10, help="updates between two log entries")
    free("--tracker_project_name", default=tracker_project_name)
    free(
        "--validation_steps",
        type=non_negative_int,
        default=200,
        help="updates between two sample grids; 0: only at the end",
    )
    if samples == "prompts":
        free(
            "--validation_prompts",
            type=prompt,
            action="append",
            help="repeatable, or @FILE; default: 4 captions of the data",
        )
        free("--validation_num_inference_steps", type=int_list, default=[1, 2, 4], help="1,2,4; TSCD: the stage's")

    group = parser.add_argument_group("evaluation")
    free = group.add_free
    free("--eval_steps", type=non_negative_int, default=0, help="updates between two measurements; 0: none")
    free(
        "--feature_network",
        type=path,
        help="image network for the distances: folder or hub name, such as facebook/dinov2-large",
    )
    free("--export", choices=["last", "best"], default="last", help="which weights are the result; best: as measured")
    if samples != "images":
        free("--eval_num_images", type=positive_int, default=500, help="samples of a measurement")
        free(
            "--eval_reference", type=path, help="compare with held-out images (a folder, tars) instead of the teacher"
        )
    if samples == "prompts":
        free(
            "--eval_prompts",
            type=prompt,
            action="append",
            help="repeatable, or @FILE; default: the captions of the first batch",
        )

    group = parser.add_argument_group("hub")
    free = group.add_free
    free("--push_to_hub", action="store_true", help="upload the result and its card")
    free("--hub_token", help="better: log in once, the token then never stands on a command line")
    free("--hub_model_id", help="repository to upload to; default: the name of --output_dir")
    free("--hub_private_repo", action="store_true", help="create the repository as a private one")


def check_training_arguments(parser, args):
    """Cross-checks that need no file and no model; each ends in `parser.error`."""
    mixed_precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if mixed_precision == "fp16" and not torch.cuda.is_available() and not args.dry_run:
        parser.error("--mixed_precision=fp16 needs a GPU (on a CPU it would silently run in fp32); use bf16 or no")
    if args.compile and (missing := performance.missing_to_compile()):
        parser.error(f"--compile: torch.compile needs {missing}, and there is none; install one, or drop the flag")
    if args.channels_last and args.use_8bit_adam and not getattr(args, "lora_rank", 0):
        parser.error("--channels_last: --use_8bit_adam puts weights back into the other layout; drop one of them")
    if args.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        parser.error("--use_8bit_adam: bitsandbytes is not installed; pip install bitsandbytes, or drop the flag")
    if args.lr_scheduler == "constant" and args.lr_warmup_steps:
        parser.refuse_idle(["lr_warmup_steps"], "constant has no warm-up; pass --lr_scheduler=constant_with_warmup")
    if getattr(args, "loss_type", "huber") != "huber":
        parser.refuse_idle(["huber_c"], f"--loss_type={args.loss_type} has none; pass --loss_type=huber, or drop it")
    if not args.push_to_hub:
        parser.refuse_idle(["hub_token", "hub_private_repo"], "nothing is uploaded; add --push_to_hub, or drop it")
    grid = getattr(args, "num_ddim_timesteps", None)
    if grid and max(args.validation_num_inference_steps or [1]) > grid:
        parser.error(f"--validation_num_inference_steps: at most --num_ddim_timesteps={grid} steps can be sampled")
    check_evaluation_arguments(parser, args)
    args.report_to = check_trackers(parser, args.report_to)
    if args.push_to_hub and not (args.hub_token or os.environ.get("HF_TOKEN") or get_token()):
        parser.error("--push_to_hub: not logged in to the hub; run `hf auth login` first, or set HF_TOKEN")
    for name in ("validation_prompts", "eval_prompts"):
        if getattr(args, name, None):
            try:
                setattr(args, name, read_prompts(f"--{name}", getattr(args, name)))
            except UserError as error:
                parser.error(error)
            if not getattr(args, name):
                parser.error(f"--{name} names no prompt; drop it to use captions of the training data")


def check_evaluation_arguments(parser, args):
    """Cross-checks of --eval_steps and of what goes with it; each ends in `parser.error`."""
    if args.eval_steps and not args.feature_network:
        parser.error("--eval_steps needs --feature_network, such as facebook/dinov2-large or a folder")
    if not args.eval_steps:
        names = [*EVALUATION_FLAGS, *(name for name in vars(args) if name.startswith("eval_num_"))]
        parser.refuse_idle(names, "nothing is measured; add --eval_steps, or drop it")
    if getattr(args, "eval_num_images", 2) < 2:
        parser.error("--eval_num_images: a distance needs at least 2")


def teacher_options(args):
    """Which files of the teacher are loaded."""
    place = {"variant": args.variant, "cache_dir": args.cache_dir, "revision": args.teacher_revision or args.revision}
    return place | {"lora": getattr(args, "teacher_lora", None)}


def resolve_teacher_defaults(args, config, method_defaults=None):
    """Fill in the flags whose default depends on the teacher, of `config` as from `teachers.read_teacher_config`."""
    defaults = {"vae_encode_batch_size": VAE_ENCODE_BATCH_SIZE[config["is_sdxl"]]} | (method_defaults or {})
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.resolution is None:
        args.resolution = teachers.default_resolution(config)
    if args.use_fix_crop_and_size and not config["is_sdxl"]:
        raise UserError("--use_fix_crop_and_size is for SDXL teachers and this is none; drop it")


def check_trackers(parser, report_to):
    """`tensorboard,wandb` -> ["tensorboard", "wandb"]; `all` -> those installed; `none` -> []."""
    names = [name.strip() for name in report_to.split(",") if name.strip()]
    available = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    if names == ["none"] or not names:
        return []
    if names == ["all"]:
        return available
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            parser.error(f"--report_to={name}: no such tracker; use tensorboard, wandb, comet_ml, all or none")
        if name not in available:
            parser.error(f"--report_to={name}: {name} is not installed; pip install it, or use tensorboard or none")
    return names


def read_prompts(flag, values):
    """Texts and @FILEs, each read by `tables.read_prompts`, as one list."""
    prompts = []
    for value in values:
        prompts += tables.read_prompts(value[1:], f"{flag}={value}") if value.startswith("@") else [value]
    return prompts


def public_args(args):
    """The flags as JSON-able {name: value}, without secrets: for trackers, checkpoints, cards and logs."""
    flags = {key: value for key, value in sorted(vars(args).items()) if key not in SECRET_FLAGS}
    return {key: mask_credentials(value) if isinstance(value, str) else value for key, value in flags.items()}


def mask_secrets(words):
    """The words of a command line, the values of secret flags replaced by `***`."""
    masked = []
    for word in words:
        name = word.split("=")[0].lstrip("-")
        is_value = bool(masked) and masked[-1].lstrip("-") in SECRET_FLAGS
        masked.append("***" if is_value else f"--{name}=***" if name in SECRET_FLAGS and "=" in word else word)
    return [mask_credentials(word) for word in masked]


def command_line():
    """The command as it was typed, for the model card; ArgumentParser has masked the secrets in it."""
    return "accelerate launch " + shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])


def path(text):
    """argparse type of every flag that names a file, a folder, a hub name, a pattern or an address, from `~` on."""
    return expand_home(text)


def prompt(text):
    """A prompt as it is, `path` of `@FILE`."""
    if os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"{text} is a file; write @{text} for the prompts in it")
    return path(text) if text.startswith("@") else text
