"""A run: its folder, seeds and trackers, what is saved, logged and uploaded, and how it ends."""

import contextlib
import functools
import math
import os
import re
import secrets
import sys
import time
import uuid
from pathlib import Path

from common import lock
from common.data.shards import count_samples
from common.data.stream import TrainingData
from common.errors import UserError
from common.flags import exit_with, public_args
from common.results import export
from common.run import checkpointing, preemption, simulation
from common.run.training_data import resolve_data

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError

DISK_ERRORS = "No space left on device|Disk quota exceeded|File too large|Read-only file system"


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


def resolve_seed(seed, saved_seed=None):
    """The seed of the run, equal on all ranks: --seed, else the resumed run's, else a drawn one."""
    if seed is None:
        seed = saved_seed if saved_seed is not None else secrets.randbelow(2**32)
    return broadcast_object_list([seed])[0]


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


def tracker_config(values):
    """{name: value} as every tracker takes it: numbers, strings and booleans; the rest as text."""
    return {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in values.items()}


def echo(title, values):
    """Print a block of `name: value` lines, aligned."""
    width = max(len(name) for name in values)
    print(f"{title}\n" + "\n".join(f"  {name:<{width}}  {value}" for name, value in values.items()), flush=True)


class RunningMeans:
    """Weighted means of named scalars between two log entries, on their device: no step waits for the host."""

    def __init__(self):
        self.sums, self.weights, self.weighted = {}, {}, set()
        self.num_batches, self.started = 0, time.perf_counter()

    def add(self, values, weight=None):
        """Add {name: scalar tensor} of a micro-batch, detached; those that are not finite are left out.

        weight: a scalar tensor, the number of samples that the values are means of; 0: they mean nothing. Without it,
        the call counts as a micro-batch.
        """
        self.num_batches += weight is None
        for name, value in values.items():
            value = value.detach()
            self.weighted |= set() if weight is None else {name}
            counts = value.isfinite().float() if weight is None else value.isfinite() * weight.float()
            self.sums[name] = self.sums.get(name, 0.0) + torch.where(counts > 0, value * counts, 0.0)
            self.weights[name] = self.weights.get(name, 0.0) + counts

    def take(self, accelerator, samples_per_batch):
        """{name: mean} as floats over all ranks, with `samples_per_second`; and start anew.

        A mean of nothing finite is NaN; without names whose weights add up to 0. samples_per_batch: of all ranks'
        micro-batches together.
        """
        means = {}
        for name in self.sums:
            total, weight = accelerator.reduce(torch.stack([self.sums[name], self.weights[name]]), "sum").tolist()
            if weight or name not in self.weighted:
                means[name] = total / weight if weight else math.nan
        means["samples_per_second"] = self.num_batches * samples_per_batch / (time.perf_counter() - self.started)
        self.__init__()
        return means
