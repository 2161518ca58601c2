"""Flags that several scripts share, their cross-checks, and the echo of the configuration that follows from them.

Only this module and the scripts see the argparse Namespace; everything below them takes plain values.
"""

import argparse
import contextlib
import datetime
import functools
import importlib.util
import math
import os
import re
import secrets
import shlex
import sys
import uuid
from pathlib import Path

from common import UserError, checkpointing, export, latents, levers, lock, models, preemption, stages, tables
from common.data import TrainingData
from common.images import INTERPOLATION_TYPES, decode_image_text
from common.paths import path, prompt
from common.run import simulation
from common.shards import IMAGE_KEYS, TEXT_KEYS, count_samples, mask_credentials
from common.zero import ZeroAccelerator, take_settings

import diffusers
import torch
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedType, ProjectConfiguration, broadcast_object_list, gather_object
from diffusers.optimization import get_scheduler
from huggingface_hub import get_token
from safetensors import SafetensorError

SECRET_FLAGS = ("hub_token",)
DISK_ERRORS = "No space left on device|Disk quota exceeded|File too large|Read-only file system"
VAE_ENCODE_BATCH_SIZE = {False: 32, True: 2}  # by whether it is an SDXL, whose VAE takes 2.5 GiB an image in float32
# Processes wait so long for each other, while the first one writes tens of GB or uploads them; torch: 10 minutes.
PROCESS_TIMEOUT = datetime.timedelta(hours=3)
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


class ArgumentParser(argparse.ArgumentParser):
    """argparse that answers a mistake with one sentence on stderr (on one process of each node) and exit code 2."""

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
        for action in self._actions:
            if getattr(args, action.dest, None) == "" and action.dest != "negative_prompt":
                name = (action.option_strings or [action.metavar])[0]
                self.error(f"{name} is empty (a variable that is not set?); give it a value, or drop it")
        return args

    def error(self, message):
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
    """
    if on_one_rank or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{prog}: error: {mask_credentials(' '.join(str(message).split()))}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def user_errors(main, is_tool=False):
    """Decorator of a script's main(args): UserErrors and full disks end the run as `parser.error` would.

    A script notes the signals that a `Stopper` looks for; a tool has none, and ends of them like any program. Locks of
    folders are released whatever the end.
    """

    signals = contextlib.nullcontext if is_tool else preemption.noting_signals

    @functools.wraps(main)
    def wrapped(args):
        try:
            with lock.releasing_at_sigterm() if is_tool else lock.releasing(), signals(), simulation.ending(args):
                return main(args)
        except simulation.Finished as finished:
            if finished.result and finished.is_reported:
                echo("One update, simulated on tensors without memory", finished.result.lines())
            return finished.result
        except UserError as error:
            exit_with(os.path.basename(sys.argv[0]), error, error.on_one_rank)
        except (OSError, SafetensorError) as error:
            if not re.search(DISK_ERRORS, str(error)):
                raise
            resumes = hasattr(args, "resume_from_checkpoint")
            again = "resume with --resume_from_checkpoint=latest" if resumes else "start the same command again"
            exit_with(os.path.basename(sys.argv[0]), f"{error}; make room and {again}", on_one_rank=True)
        except KeyboardInterrupt:
            saves = not is_tool and not getattr(args, "dry_run", False)
            go_on = "; --resume_from_checkpoint=latest goes on from the last checkpoint" if saves else ""
            print(f"\ninterrupted{go_on}", file=sys.stderr)
            raise SystemExit(130) from None

    return wrapped


tool_errors = functools.partial(user_errors, is_tool=True)


def positive_int(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def non_negative_int(text):
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, it is {value}")
    return value


def fraction(text):
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, not {value}")
    return value


def positive_float(text):
    value = float(text)
    if not (0.0 < value < float("inf")):
        raise argparse.ArgumentTypeError(f"must be a positive number, not {text}")
    return value


def real(text):
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a number, not {text}")
    return value


def non_negative_float(text):
    value = float(text)
    if not (0.0 <= value < float("inf")):
        raise argparse.ArgumentTypeError(f"must be a number that is not negative, not {text}")
    return value


def seed(text):
    value = int(text)
    if not 0 <= value < 2**62:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2^62, not {value}")
    return value


def beta(text):
    value = float(text)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"must be at least 0 and less than 1, not {value}")
    return value


def embedding_width(text):
    """Half of it are sines, half cosines, and two of each are needed."""
    value = int(text)
    if value < 4 or value % 2:
        raise argparse.ArgumentTypeError(f"must be an even number of at least 4, not {value}")
    return value


def int_list(text):
    """`1,2,4` -> [1, 2, 4], at least one, all at least 1."""
    return _list(text, positive_int)


def weight_list(text):
    """`1,0.5` -> [1.0, 0.5], at least one, none negative."""
    return _list(text, non_negative_float)


def _list(text, item):
    values = [item(part) for part in text.split(",") if part.strip()]
    if not values:
        raise argparse.ArgumentTypeError("names no number; give one or more, such as 1,2,4")
    return values


for _type, _name in [(positive_int, "positive whole number"), (non_negative_int, "whole number")]:
    _type.__name__ = _name  # argparse names the type in its message for text that is no number
for _type, _name in [(fraction, "fraction"), (positive_float, "positive number"), (non_negative_float, "number")]:
    _type.__name__ = _name
seed.__name__, beta.__name__, real.__name__ = "whole number", "fraction", "number"
embedding_width.__name__ = "whole number"
int_list.__name__, weight_list.__name__ = "list of whole numbers", "list of numbers"


def add_hub_arguments(add, of):
    """Which files of the hub are loaded; of: what --revision speaks of."""
    add("--revision", help=f"hub revision of {of}")
    add("--variant", help="weight files to load, such as fp16")
    add("--cache_dir", type=path, help="where hub downloads are kept")


def add_checkpoint_arguments(add):
    """The Stable Diffusion teacher's files, as the training scripts and encode_shards load them."""
    add("--pretrained_teacher_model", type=path, required=True, help="folder, hub name, or one .safetensors file")
    add("--pretrained_vae_model_name_or_path", type=path, help="another VAE than the teacher's: folder or hub name")
    add("--teacher_revision", help="hub revision of the teacher; without it, --revision")
    add_hub_arguments(add, "everything without a revision flag of its own")


def add_teacher_arguments(parser):
    add = parser.add_argument_group("teacher").add_argument
    add_checkpoint_arguments(add)
    add("--vae_encode_batch_size", type=positive_int, help="images that the VAE encodes at once; SD: 32, SDXL: 2")
    add("--use_fix_crop_and_size", action="store_true", help="SDXL: say of every sample that it was never cropped")
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
    add = parser.add_argument_group("data").add_argument
    tars = "tars (braces, globs, http://, pipe:)" + (" or an image folder" if text else "")
    add("--train_shards_path_or_url", type=path, required=text, help=tars)
    add_image_arguments(add)
    if text:
        add(
            "--proportion_empty_prompts",
            type=fraction,
            default=0.0,
            help="share of captions that are dropped",
        )
    add("--max_train_samples", type=positive_int, help="use at most so many distinct samples")
    add("--shuffle_block_samples", type=positive_int, default=1000, help="samples of one lane shuffled together")
    add(
        "--data_lanes", type=positive_int, help="parallel sample streams, a multiple of the processes; default: 8 each"
    )
    add("--data_seed", type=seed, help="seed of the sample order and the crops; without it, --seed")
    add("--dataloader_num_workers", type=non_negative_int, default=0, help="loader processes; 0 loads in this one")
    add("--data_timeout", type=positive_int, default=600, help="seconds without a batch after which the run stops")
    add("--max_skip_ratio", type=fraction, default=0.2, help="share of unreadable samples at which the run stops")


def add_training_arguments(parser, output_dir, tracker_project_name, samples_prompts=True):
    """samples_prompts: whether --validation_prompts are sampled, at --validation_num_inference_steps."""
    add = parser.add_argument_group("training").add_argument
    add("--output_dir", type=path, default=output_dir, help="where checkpoints, logs and the result go")
    add("--seed", type=seed, help="makes the run repeatable; without it one is drawn and saved")
    add("--train_batch_size", type=positive_int, default=16, help="samples per process and micro-batch")
    add("--gradient_accumulation_steps", type=positive_int, default=1, help="micro-batches per update")
    add("--num_train_epochs", type=positive_int, default=100, help="passes over the data, without --max_train_steps")
    add("--max_train_steps", type=positive_int, help="updates; overrides --num_train_epochs")
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
    add("--max_nonfinite_steps", type=positive_int, default=10, help="stop after so many updates of NaN in a row")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="without it, what `accelerate config` says")
    add("--allow_tf32", action="store_true", help="TF32 matrix products and convolutions on NVIDIA GPUs")
    add(
        "--gradient_checkpointing",
        nargs="?",
        const="full",
        default="none",
        choices=levers.CHECKPOINTING,
        help="recompute activations in the backward pass; selective: of the largest blocks; the bare flag: full",
    )
    add("--compile", action="store_true", help="torch.compile of the denoisers' blocks; takes minutes at the start")
    add("--channels_last", action="store_true", help="convolutions' layout in memory; faster with --compile, on GPUs")
    add("--enable_xformers_memory_efficient_attention", action="store_true", help="instead of torch's, where it runs")
    add("--local_rank", type=int, default=-1, help="accepted because launchers pass it; LOCAL_RANK decides")
    add("--dry_run", action="store_true", help="check everything, print the derived configuration, write nothing")

    add = parser.add_argument_group("checkpoints").add_argument
    add("--checkpointing_steps", type=positive_int, default=500, help="updates between two checkpoints")
    add(
        "--checkpoints_total_limit", type=positive_int, help="how many checkpoints to keep, and the best; default: all"
    )
    add("--resume_from_checkpoint", type=path, help="latest, a name under --output_dir, or a path")
    add("--stop_margin", type=non_negative_int, default=300, help="seconds before a SLURM job's end to save and stop")

    add = parser.add_argument_group("logging and validation").add_argument
    add("--report_to", default="tensorboard", help="tensorboard, wandb, comet_ml, all, none; several with commas")
    add("--logging_dir", type=path, default="logs", help="for trackers, under --output_dir")
    add("--logging_steps", type=positive_int, default=10, help="updates between two log entries")
    add("--tracker_project_name", default=tracker_project_name)
    add(
        "--validation_steps",
        type=non_negative_int,
        default=200,
        help="updates between two sample grids; 0: only at the end",
    )
    if samples_prompts:
        add(
            "--validation_prompts",
            type=prompt,
            action="append",
            help="repeatable, or @FILE; default: 4 captions of the data",
        )
        add("--validation_num_inference_steps", type=int_list, default=[1, 2, 4], help="1,2,4; TSCD: the stage's")

    add = parser.add_argument_group("hub").add_argument
    add("--push_to_hub", action="store_true", help="upload the result and its card")
    add("--hub_token", help="better: log in once, the token then never stands on a command line")
    add("--hub_model_id", help="repository to upload to; default: the name of --output_dir")
    add("--hub_private_repo", action="store_true", help="create the repository as a private one")


def check_training_arguments(parser, args):
    """Cross-checks that need no file and no model; each ends in `parser.error`."""
    mixed_precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if mixed_precision not in ("no", "fp16", "bf16"):
        parser.error(
            f"the environment variable ACCELERATE_MIXED_PRECISION={mixed_precision} is none of no, fp16, bf16"
        )
    if mixed_precision == "fp16" and not torch.cuda.is_available() and not args.dry_run:
        parser.error("--mixed_precision=fp16 needs a GPU (on a CPU it would silently run in fp32); use bf16 or no")
    if args.compile and (missing := levers.missing_to_compile()):
        parser.error(f"--compile: torch.compile needs {missing}, and there is none; install one, or drop the flag")
    if args.channels_last and args.use_8bit_adam and not getattr(args, "lora_rank", 0):
        parser.error("--channels_last: --use_8bit_adam puts weights back into the other layout; drop one of them")
    if args.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        parser.error("--use_8bit_adam: bitsandbytes is not installed; pip install bitsandbytes, or drop the flag")
    if args.lr_scheduler == "polynomial" and args.learning_rate <= 1e-7:
        parser.error("--lr_scheduler=polynomial falls to 1e-7: give a --learning_rate above that")
    if args.lr_scheduler == "constant" and args.lr_warmup_steps:
        parser.refuse_idle(["lr_warmup_steps"], "constant has no warm-up; pass --lr_scheduler=constant_with_warmup")
    if getattr(args, "loss_type", "huber") != "huber":
        parser.refuse_idle(["huber_c"], f"--loss_type={args.loss_type} has none; pass --loss_type=huber, or drop it")
    if not args.push_to_hub:
        parser.refuse_idle(["hub_token", "hub_private_repo"], "nothing is uploaded; add --push_to_hub, or drop it")
    grid = getattr(args, "num_ddim_timesteps", None)
    if grid and max(args.validation_num_inference_steps or [1]) > grid:
        parser.error(f"--validation_num_inference_steps: at most --num_ddim_timesteps={grid} steps can be sampled")
    args.report_to = check_trackers(parser, args.report_to)
    if args.push_to_hub and not (args.hub_token or os.environ.get("HF_TOKEN") or get_token()):
        parser.error("--push_to_hub: not logged in to the hub; run `hf auth login` first, or set HF_TOKEN")
    if hasattr(args, "validation_prompts"):
        args.validation_prompts = read_prompts(parser, args.validation_prompts)


def run_state(args, run_id, prompts, total_batch_size, train_data, num_skipped):
    """What a checkpoint says of the run beside its weights; called by every rank."""
    return {
        "updates_skipped": num_skipped,
        "args": public_args(args),
        "run_id": run_id,
        "validation_prompts": prompts,
        "total_batch_size": total_batch_size,
        "data": TrainingData.merge_state_dicts(gather_object([train_data.state_dict()])),
    }


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
        args.max_train_steps = sum(stages.for_each(args.stage_steps, count))


def resolve_stages(args, resumed):
    """The list of `stages.Stage` that the flags ask for, with the edges of the resumed run."""
    lists = args.stage_steps, args.max_train_steps, args.mse_weights, args.adv_weights
    return stages.plan_stages(args.stage_segments, *lists, args.loss_type, resumed.get("stage_edges"))


def teacher_options(args):
    """Which files of the teacher are loaded."""
    return {"variant": args.variant, "cache_dir": args.cache_dir, "revision": args.teacher_revision or args.revision}


def resolve_teacher_defaults(args, config, method_defaults=None):
    """Fill in the flags whose default depends on the teacher, of `config` as from `models.read_teacher_config`."""
    defaults = {"vae_encode_batch_size": VAE_ENCODE_BATCH_SIZE[config["is_sdxl"]]} | (method_defaults or {})
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.resolution is None:
        args.resolution = models.default_resolution(config)
    if args.use_fix_crop_and_size and not config["is_sdxl"]:
        raise UserError("--use_fix_crop_and_size is for SDXL teachers and this is none; drop it")


def check_trackers(parser, report_to):
    """`tensorboard,wandb` -> ["tensorboard", "wandb"]; `all` -> those installed; `none` -> []."""
    names = [name.strip() for name in report_to.split(",") if name.strip()]
    available = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    if names == ["none"] or not names:
        return []
    if "none" in names or ("all" in names and len(names) > 1):
        parser.error(f"--report_to={report_to}: none and all stand alone, or name trackers")
    if names == ["all"]:
        return available
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            parser.error(f"--report_to={name}: no such tracker; use tensorboard, wandb, comet_ml, all or none")
        if name not in available:
            parser.error(f"--report_to={name}: {name} is not installed; pip install it, or use tensorboard or none")
    return names


def read_prompts(parser, values):
    """Repeated strings and @FILE (see `tables.read_prompts`) -> one list, or None when nothing was given."""
    prompts = []
    for value in values or []:
        if not value.startswith("@"):
            prompts.append(value)
            continue
        try:
            prompts += tables.read_prompts(value[1:], f"--validation_prompts={value}")
        except UserError as error:
            parser.error(str(error))
    if values and not prompts:
        parser.error("--validation_prompts names no prompt; drop it to use captions of the training data")
    return prompts or None


def resolve_seed(seed, saved_seed=None):
    """The seed of the run, equal on all ranks: --seed, else the resumed run's, else a drawn one."""
    if seed is None:
        seed = saved_seed if saved_seed is not None else secrets.randbelow(2**32)
    return broadcast_object_list([seed])[0]


def image_options(args):
    """The flags of `images.decode_image_text`, or, without captions, of `images.decode_image_label`."""
    names = ("resolution", "interpolation_type", "center_crop", "random_flip", "proportion_empty_prompts")
    return {name: getattr(args, name) for name in (*names, "min_image_size") if hasattr(args, name)}


def data_options(args, accelerator):
    """The flags of `data.TrainingData`, with this process's place among the others."""
    return {
        "batch_size": args.train_batch_size,
        "seed": args.data_seed,
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        "num_lanes": args.data_lanes,
        "num_workers": args.dataloader_num_workers,
        "max_train_samples": args.max_train_samples,
        "shuffle_block_samples": args.shuffle_block_samples,
        "max_skip_ratio": args.max_skip_ratio,
        "data_timeout": args.data_timeout,
        "pin_memory": accelerator.device.type == "cuda",
        "skipped_log": None if args.dry_run else Path(args.output_dir, checkpointing.SKIPPED),
        "report": accelerator.print,
    }


def text_image_data(args, accelerator, shards, config, weight_dtype):
    """The stream of images and captions, or of latents and captions where the shards are cached ones.

    config: as from `models.read_teacher_config`. `cached` of the stream is then the manifest of the shards, else None.
    Raises UserError where the latents are not those that the run would make itself.
    """
    manifest, decode, required = latents.read_manifest(shards), decode_image_text, (IMAGE_KEYS, TEXT_KEYS)
    options = image_options(args)
    if manifest is not None:
        dtype = models.vae_dtype(config, weight_dtype)
        latents.check_manifest(manifest, models.latent_shape(config["vae"], args.resolution), dtype, options)
        if args.vae_encode_batch_size != VAE_ENCODE_BATCH_SIZE[config["is_sdxl"]]:
            raise UserError("--vae_encode_batch_size: nothing is encoded where latents are cached; drop the flag")
        decode, required = latents.decode_cached, latents.REQUIRED
        options = {"manifest": manifest, "proportion_empty_prompts": args.proportion_empty_prompts}
    decode = functools.partial(decode, **options)
    data = TrainingData(shards, decode, required=required, **data_options(args, accelerator))
    data.cached = manifest
    return data


def make_accelerator(args):
    """accelerate's engine as the flags ask for it; trackers write under output_dir.

    Raises UserError where the launcher's processes do not see each other (each would be a run of its own) and for an
    engine that shards.
    """
    diffusers.utils.logging.set_verbosity_error()  # a training run's own lines should be found among the libraries'
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    zero = take_settings(args)
    if zero is None:
        make = Accelerator
    else:
        make = functools.partial(ZeroAccelerator, zero, args.max_grad_norm, args.train_batch_size)
    given = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    stands_in = given == "fp16" and not torch.cuda.is_available()  # in a dry run
    accelerator = make(
        mixed_precision="bf16" if stands_in else args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.dry_run else args.report_to or None,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))),
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT),
        ],
    )
    if accelerator.distributed_type == DistributedType.FSDP:
        raise UserError(
            "`accelerate config`: FSDP is not supported: targets, samples and checkpoints need the whole student on "
            "each GPU; use DeepSpeed's ZeRO-2, or plain data parallel training with --gradient_checkpointing and "
            "--use_8bit_adam or a LoRA script where memory is short"
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise UserError(
            f"{started} processes were started but did not join (no GPU?); "
            "set ACCELERATE_USE_CPU=true, or launch with --num_processes=1"
        )
    args.mixed_precision = accelerator.mixed_precision  # accelerate's configuration decides where no flag does
    if stands_in:
        args.mixed_precision = given
        accelerator.print("Note: fp16 needs a GPU, so what is simulated is bf16, which takes the same memory")
    if args.enable_xformers_memory_efficient_attention:
        fails = levers.xformers_failure(accelerator.device, args.mixed_precision)
        fails = next(filter(None, gather_object([fails])), None)  # one process decides for all
        if fails:
            args.enable_xformers_memory_efficient_attention = False
            accelerator.print(
                f"--enable_xformers_memory_efficient_attention: xformers' kernels do not run here ({fails}); torch's "
                "attention is taken instead, which does not need more memory"
            )
    return accelerator


def open_run(args, accelerator, shards):
    """Check and create --output_dir, find what --resume_from_checkpoint means, fill in seeds and lanes.

    Returns (the checkpoint's folder or None, its state; that of a new run has global_step 0 and no flags). Raises
    UserError where the folder, the checkpoint or a flag that differs from its run's cannot be used.
    """
    preemption.job_deadline(args.stop_margin)  # known now, rather than after the weights are loaded
    folder = args.output_dir, args.resume_from_checkpoint, args.dry_run
    checkpoint = checkpointing.open_output_dir(accelerator, *folder)
    resumed = checkpointing.read_state(checkpoint) if checkpoint else {"args": {}, "data": {}, "global_step": 0}
    args.seed = resolve_seed(args.seed, resumed["args"].get("seed"))
    num_images = count_samples(shards) if Path(shards[0]).is_dir() else None
    resolve_data(args, resumed["args"], accelerator.num_processes, num_images)
    if checkpoint:
        checkpointing.check_same_run(checkpoint, resumed["args"], public_args(args))
    else:
        checkpointing.check_same_start(args.output_dir, public_args(args))
    return checkpoint, resumed


def resolve_data(args, saved_args, world_size, num_images=None):
    """Fill in --data_seed and --data_lanes, from the resumed run's flags where there is one.

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


def resolve_epochs(args, shards, world_size, resumed):
    """`resolve_steps` for shards, counting them only where that is needed (it reads every local tar).

    Returns the total batch size, and how many distinct samples an epoch has, or None where that is not known.
    """
    is_needed = args.max_train_steps is None
    num_counted = count_samples(shards) if is_needed or args.dry_run or Path(shards[0]).is_dir() else None
    known = [number for number in (num_counted, args.max_train_samples) if number is not None]
    num_samples = min(known) if known and (is_needed or num_counted is not None) else None
    return resolve_steps(args, num_samples, world_size, resumed), num_samples


def resolve_steps(args, num_samples, world_size, resumed=None):
    """Fill in --max_train_steps from --num_train_epochs. Returns the total batch size, samples per update.

    num_samples: how many distinct samples an epoch has, or None where the shards do not tell. resumed: the state of a
    checkpoint. A resumed run keeps its total batch size, unless --data_seed changes: UserError when the number of
    processes changed and the flags do not make up for it, or when the checkpoint lies behind the last update.
    """
    total_batch_size = args.train_batch_size * world_size * args.gradient_accumulation_steps
    if args.max_train_steps is None:
        if num_samples is None:
            raise UserError("--max_train_steps is needed: how many samples remote shards hold is not known")
        args.max_train_steps = math.ceil(num_samples / total_batch_size) * args.num_train_epochs
    saved = resumed or {"args": {}}
    if saved.get("global_step", 0) > args.max_train_steps:
        raise UserError(
            f"--max_train_steps={args.max_train_steps} is less than the {saved['global_step']} updates of the "
            "checkpoint; raise it, or name an earlier checkpoint in --resume_from_checkpoint"
        )
    same_data = args.data_seed == saved["args"].get("data_seed")
    if same_data and saved["total_batch_size"] != total_batch_size:
        raise UserError(
            f"--resume_from_checkpoint: an update had {saved['total_batch_size']} samples and has {total_batch_size} "
            f"with {world_size} process(es); change --gradient_accumulation_steps to keep their number"
        )
    return total_batch_size


def make_optimizer(args, parameters, total_batch_size):
    """AdamW (fused on CUDA), bitsandbytes' 8-bit AdamW, or RAdam over the list of trainable `parameters`.

    RAdam is for scripts that have --optimizer_type; its weight decay is decoupled, as AdamW's.
    """
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        optimizer_class, options = AdamW8bit, {}
    elif getattr(args, "optimizer_type", "adamw") == "radam":
        optimizer_class, options = torch.optim.RAdam, {"decoupled_weight_decay": True}
    else:
        optimizer_class, options = torch.optim.AdamW, {"fused": torch.cuda.is_available() or simulation.is_on()}
    return optimizer_class(
        parameters,
        lr=args.learning_rate * (total_batch_size if args.scale_lr else 1),
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        **options,
    )


def apply_levers(args, trained, frozen, vae=None):
    """--gradient_checkpointing, --channels_last, --compile and xformers' kernels, on denoisers, in place.

    trained: those with a backward pass; frozen: the others. After copies and adapters were made, before `prepare`.
    """
    for network in trained:
        levers.recompute(network, args.gradient_checkpointing)
    for network in (*trained, *frozen):
        if args.enable_xformers_memory_efficient_attention:
            network.enable_xformers_memory_efficient_attention()
        if args.compile:
            levers.compile_blocks(network)
    for network in (*trained, *frozen, *([vae] if vae else [])):
        if args.channels_last:
            levers.channels_last(network)


def make_lr_scheduler(args, optimizer):
    """The --lr_scheduler over --max_train_steps; not prepared by accelerate, which would step it once per process."""
    steps = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
    return get_scheduler(args.lr_scheduler, optimizer, **steps)


def resolve_prompts(args, resumed, captions):
    """What is sampled: --validation_prompts, the resumed run's prompts, or up to 4 captions of the first batch."""
    captions = [caption for caption in captions if caption] or [""]
    return args.validation_prompts or resumed.get("validation_prompts") or captions[:4]


def start_run(args, accelerator, resumed, derived):
    """Start the trackers; called by every rank. Returns the run's id, that of the resumed run where there is one."""
    run_id = broadcast_object_list([resumed.get("run_id") or uuid.uuid4().hex])[0]
    if accelerator.is_main_process and not args.dry_run:
        start_trackers(accelerator, args.tracker_project_name, public_args(args) | derived, run_id)
    return run_id


def upload(args, accelerator):
    """What --push_to_hub asks for. Main process only."""
    if args.push_to_hub:
        address = export.push_to_hub(args.output_dir, args.hub_model_id, args.hub_token, args.hub_private_repo)
        accelerator.print(f"uploaded to {address}")


def start_trackers(accelerator, project_name, config, run_id):
    """Start every tracker with the run's flags; a resumed run continues under its old id."""
    options = {
        "wandb": {"id": run_id, "resume": "allow", "dir": accelerator.logging_dir},
        "comet_ml": {"experiment_key": run_id},
    }
    try:
        Path(accelerator.logging_dir).mkdir(parents=True, exist_ok=True)
        accelerator.init_trackers(project_name, tracker_config(config), options)
    except OSError as error:
        raise UserError(
            f"--logging_dir, --tracker_project_name: {accelerator.logging_dir}: {error}; change them"
        ) from None


def sum_counters(counters):
    """Every rank's {"read": n, class: n, ...} -> {"samples_read", "samples_skipped", "skipped/CLASS" if any}."""
    total = {name: sum(rank[name] for rank in counters) for name in counters[0]}
    read = total.pop("read")
    classes = {f"skipped/{name}": n for name, n in total.items() if n}
    return {"samples_read": read, "samples_skipped": sum(total.values())} | classes


def log_progress(accelerator, progress, values, step):
    """Send {name: number} to the trackers and show it on the progress bar."""
    accelerator.log(values, step=step)
    progress.set_postfix({name: f"{value:.4g}" for name, value in values.items()})


def announce(args, derived, is_main):
    """On the main process, print the flags and what follows from them, and keep both as training_config.json."""
    if not is_main:
        return
    echo("Flags", public_args(args))
    echo("What follows from them", derived)
    if warning := warmup_warning(args):
        print(warning, flush=True)
    if not args.dry_run:
        export.write_config(args.output_dir, public_args(args), derived)


def warmup_warning(args):
    """A sentence where the learning rate warms up for half of the run or more, as by the default in a short one."""
    steps, updates = args.lr_warmup_steps, args.max_train_steps
    if args.lr_scheduler == "constant" or 2 * steps < updates or not steps:
        return None
    reached = f"it never reaches --learning_rate, but {updates / steps:.0%} of it" if steps >= updates else ""
    return (
        f"Warning: --lr_warmup_steps={steps} is {steps / updates:.0%} of the run's {updates} updates, in which the "
        f"learning rate rises{reached and ': '}{reached}; pass less, such as --lr_warmup_steps={updates // 10}"
    )


def derived_configuration(args, world_size, total_batch_size, num_samples, cached=None):
    """What follows from the flags, for people to check before a long run: {name: text}.

    num_samples: of an epoch, or None. cached: the manifest of cached latents, for which the VAE encodes nothing, or
    None.
    """
    made = cached and f"cached, made by the VAE of {cached['vae']} in {cached['dtype']}"
    return shared_configuration(args, world_size, total_batch_size, num_samples) | {
        "latents": made or "encoded in each step",
    }


def shared_configuration(args, world_size, total_batch_size, num_samples):
    """`derived_configuration` of every script that trains on samples."""
    known = num_samples is not None
    return {
        "processes": str(world_size),
        "samples per update": str(total_batch_size),
        "updates": str(args.max_train_steps),
        "samples per epoch": str(num_samples) if known else "not counted (--dry_run counts local shards)",
        "updates per epoch": f"{num_samples / total_batch_size:.1f}" if known else "not known",
        "epochs": f"{args.max_train_steps * total_batch_size / num_samples:.2f}" if num_samples else "not known",
    }


def public_args(args):
    """The flags as JSON-able {name: value}, without secrets: for trackers, checkpoints, cards and logs."""
    flags = {key: value for key, value in sorted(vars(args).items()) if key not in SECRET_FLAGS}
    return {key: mask_credentials(value) if isinstance(value, str) else value for key, value in flags.items()}


def tracker_config(values):
    """{name: value} as every tracker takes it: numbers, strings and booleans; the rest as text."""
    return {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in values.items()}


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


def echo(title, values):
    """Print a block of `name: value` lines, aligned."""
    width = max(len(name) for name in values)
    print(f"{title}\n" + "\n".join(f"  {name:<{width}}  {value}" for name, value in values.items()), flush=True)
