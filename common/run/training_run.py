"""A run: its folder, seeds and trackers, what is saved, logged and uploaded, and how it ends."""

import contextlib
import functools
import math
import os
import re
import secrets
import sys
import time
import traceback
import uuid
from pathlib import Path

from common import lock
from common.errors import UserError, line_of
from common.flags import ArgumentParser, exit_with, public_args, spelled
from common.results import evaluation, export
from common.run import checkpointing, preemption, screen, simulation, training_data, validation
from common.run.updates import UpdateGuard

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError

DISK_ERRORS = "No space left on device|Disk quota exceeded|File too large|Read-only file system"


def user_errors(main, is_tool=False):
    """Decorator of a script's main(args): UserErrors and full disks end the run as `parser.error` would.

    A script notes the signals that a `Stopper` looks for; a tool has none, and ends of them like any program: what it
    held is then a dead process's. At every other end locks of folders are released.
    """

    signals = contextlib.nullcontext if is_tool else preemption.noting_signals

    @functools.wraps(main)
    def wrapped(args):
        screen.quiet_libraries()
        try:
            with lock.releasing(), signals(), simulation.ending(args):
                return main(args)
        except simulation.Finished as finished:
            if finished.result and finished.is_reported:
                screen.show_simulated("An update on each process, simulated without memory", finished.result)
            return finished.result
        except UserError as error:
            exit_with(os.path.basename(sys.argv[0]), error, error.on_one_rank)
        except torch.OutOfMemoryError as error:
            exit_with(os.path.basename(sys.argv[0]), _out_of_memory(error, is_tool), on_one_rank=True)
        except (OSError, SafetensorError) as error:
            if not re.search(DISK_ERRORS, str(error)):
                raise
            resumes = hasattr(args, "resume_from_checkpoint")
            again = "resume with `resume_from_checkpoint`=latest" if resumes else "start the same command again"
            exit_with(os.path.basename(sys.argv[0]), f"{error}; make room and {again}", on_one_rank=True)
        except KeyboardInterrupt:
            saves = not is_tool and not getattr(args, "dry_run", False)
            go_on = "; `resume_from_checkpoint`=latest goes on from the last checkpoint" if saves else ""
            print(f"\ninterrupted{spelled(go_on)}", file=sys.stderr)
            raise SystemExit(130) from None

    return wrapped


def _out_of_memory(error, is_tool):
    """Where a GPU's memory ended, in the innermost line of this project, and the ways out."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    where = f"{os.path.basename(frames[-1].filename)}, line {frames[-1].lineno}"
    ways = "a smaller batch"
    if not is_tool:
        ways = (
            "`gradient_checkpointing`, a smaller `train_batch_size` with more `gradient_accumulation_steps`, or what "
            '"python -m common.tools.plan" finds'
        )
    return f"{line_of(error).split('. GPU')[0]} ({where}); take {ways}"


tool_errors = functools.partial(user_errors, is_tool=True)


class TrainingRun:
    """A run of a script: its folder, seeds, checkpoints, trackers and counts.

    A script opens it, registers with it once what it trains, and asks it in its own loop what is due. It has no loop,
    calls nothing back, and has no subclass. Every method is called by every process, at the same place.

    checkpoint: the folder that the run goes on from, or None. resumed: the state in it; of a new run global_step 0 and
    no flags. global_step: updates that are done. total_batch_size: samples per update.
    """

    def __init__(self, args, accelerator):
        """Check and create `output_dir`, find what `resume_from_checkpoint` means, fill in `seed`.

        UserError where the folder or the checkpoint cannot be used.
        """
        preemption.job_deadline(args.stop_margin)  # known now, rather than after the weights are loaded
        self.args, self.accelerator = args, accelerator
        self.checkpoint = checkpointing.open_output_dir(
            accelerator,
            args.output_dir,
            args.resume_from_checkpoint,
            args.dry_run,
            overwrite=getattr(args, "overwrite_output_dir", False),
        )
        self.resumed = {"args": {}, "data": {}, "global_step": 0}
        if self.checkpoint:
            self.resumed = checkpointing.read_state(self.checkpoint)
        self.global_step, self.is_last, self.data = self.resumed["global_step"], False, None
        self.is_best, self.best_step = False, None  # whether the latest evaluation is; the step of what is exported
        self.eval_prompts = None
        self.draws_seed = args.seed is None and self.resumed["args"].get("seed") is None
        seeds = (args.seed, self.resumed["args"].get("seed"), secrets.randbelow(2**32))
        args.seed = broadcast_object_list([next(seed for seed in seeds if seed is not None)])[0]

    def resolve_data(self, num_images):
        """Fill in `data_seed` and `data_lanes`, then `check_flags`. num_images: as of `training_data.resolve_data`."""
        self.num_images = num_images
        training_data.resolve_data(self.args, self.resumed["args"], self.accelerator.num_processes, num_images)
        self.check_flags()

    def check_flags(self):
        """UserError for a flag that differs from the resumed run's and may not, or from that of finished stages."""
        args, rules = public_args(self.args), ArgumentParser.latest.resume_rules()
        if self.checkpoint:
            checkpointing.check_same_run(self.checkpoint, self.resumed["args"], args, **rules)
        else:
            checkpointing.check_same_start(self.args.output_dir, args, **rules)

    def follow(self, data):
        """Set a `TrainingData` to where the resumed run was; its position is saved and its counts are logged."""
        self.data = data
        if self.checkpoint:
            data.load_state_dict(self.resumed["data"])

    def resolve_steps(self, num_samples):
        """Fill in `max_train_steps`; num_samples: of an epoch, or None. See `training_data.resolve_steps`."""
        self.num_samples, world_size = num_samples, self.accelerator.num_processes
        self.total_batch_size = training_data.resolve_steps(self.args, num_samples, world_size, self.resumed)

    def derived_configuration(self):
        """What follows from the flags, for people to check before a long run: {name: text}."""
        updates, num_samples = self.args.max_train_steps, self.num_samples
        derived = {
            "processes": str(self.accelerator.num_processes),
            "samples per update": str(self.total_batch_size),
            "updates": str(updates),
        }
        if self.args.eval_steps:
            derived["evaluation"] = validation.describe(self.args)
        if num_samples is not None:
            derived["samples per epoch"] = str(num_samples)
            derived["updates per epoch"] = f"{num_samples / self.total_batch_size:.1f}"
            derived["epochs"] = f"{updates * self.total_batch_size / num_samples:.2f}" if num_samples else "none"
        elif self.args.dry_run:
            derived["samples per epoch"] = "not counted: the shards are not local"
        return derived

    def resolve_prompts(self, captions):
        """What is sampled: `validation_prompts`, the resumed run's prompts, or up to 4 captions of the first batch.

        Likewise what evaluations sample, `eval_prompts`, but all captions of that batch. The same on every process.
        """
        captions = broadcast_object_list([[caption for caption in captions if caption] or [""]])[0]
        known = self.args.eval_prompts or self.resumed.get("eval_prompts")
        self.eval_prompts = known or list(dict.fromkeys(captions))
        self.prompts = self.args.validation_prompts or self.resumed.get("validation_prompts") or captions[:4]
        return self.prompts

    def announce(self, derived):
        """Print the flags and what follows from them, {name: text}, and keep both as training_config.json."""
        self.flags, self.derived = public_args(self.args), derived
        if not self.accelerator.is_main_process:
            return
        drawn = [n for n in ("seed", "data_seed") if self.draws_seed and self.flags[n] == self.args.seed]
        unknown = drawn if self.args.dry_run else []  # the run will draw another
        screen.show_flags(self.flags | dict.fromkeys(unknown), self.args.verbose)
        screen.show_changes(self.flags, self.resumed["args"])
        screen.echo("What follows", derived)
        for warning in filter(None, (screen.warmup_warning(self.args), screen.resolution_warning(self.args))):
            print(warning, flush=True)
        if not self.args.dry_run:
            checkpointing.write_config(self.args.output_dir, self.flags, derived)

    def register(self, networks, modules, objects, **state):
        """After `accelerator.prepare`: load the checkpoint, start the trackers, and watch updates and stops.

        networks: {name: module} of all that the loss depends on. modules and objects: as of
        `checkpointing.save_checkpoint`. state: what a checkpoint says besides, JSON-able.
        """
        args, accelerator = self.args, self.accelerator
        self.modules, self.objects, self.state = modules, objects, state
        if self.checkpoint:
            checkpointing.load_checkpoint(accelerator, self.checkpoint, modules, objects)
            accelerator.print(f"resumed from {self.checkpoint} at step {self.global_step}")
        self.run_id = broadcast_object_list([self.resumed.get("run_id") or uuid.uuid4().hex])[0]
        is_shown = accelerator.is_main_process and not args.dry_run
        if is_shown:
            start_trackers(accelerator, args.tracker_project_name, self.flags | self.derived, self.run_id)
        self.stopper = preemption.Stopper(accelerator, args.output_dir, args.stop_margin, self.global_step)
        self.guard = UpdateGuard(
            accelerator,
            args.output_dir,
            limit=args.max_nonfinite_steps,
            global_step=self.global_step,
            num_skipped=self.resumed.get("updates_skipped", 0),
            networks=networks,
        )
        if is_shown:
            others = [value for value in objects.values() if isinstance(value, torch.optim.Optimizer)]
            screen.show_plan(
                args, accelerator, networks, modules, [*accelerator._optimizers, *others], self.global_step
            )
        self.progress = screen.Progress(self.global_step, args.max_train_steps, is_shown)
        self.means = RunningMeans()

    @property
    def goes_on(self):
        """Whether there is another update to do."""
        return self.global_step < self.args.max_train_steps and not self.stopped

    @property
    def stopped(self):
        """Whether the run ends early: see `preemption.Stopper`."""
        return self.stopper.stops

    def update(self, optimizer, parameters, loss, keys):
        """After each backward: clip and update, once the gradients are complete; see `updates.UpdateGuard.step`."""
        return self.guard.step(optimizer, parameters, self.args.max_grad_norm, loss, keys)

    def after_update(self):
        """Count an update, and agree with the other processes on whether it is the last."""
        self.global_step += 1
        self.is_best = False
        self.progress.update()
        if self.progress.is_shown and self.global_step == self.progress.start + 1:
            screen.say_memory(self.accelerator.device)
        self.is_last = self.stopper.check() or self.global_step == self.args.max_train_steps

    @property
    def logs(self):
        """Whether a log entry is due."""
        return self._is_due(self.args.logging_steps) or self.is_last

    @property
    def saves(self):
        """Whether a checkpoint is due, or to be kept as the best so far."""
        return self._is_due(self.args.checkpointing_steps) or self.is_last or self.is_best

    @property
    def samples(self):
        """Whether samples are due, besides those of the end."""
        return self._is_due(self.args.validation_steps) and not self.is_last

    @property
    def evaluates(self):
        """Whether an evaluation is due, before the checkpoint: at the end too, but not where the run is to stop."""
        return bool(self.args.eval_steps) and not self.stopped and (self._is_due(self.args.eval_steps) or self.is_last)

    @property
    def exported_step(self):
        """Updates after which the weights are what they are, those of the best evaluation once it is loaded."""
        return self.global_step if self.best_step is None else self.best_step

    def _is_due(self, interval):
        return interval > 0 and self.global_step % interval == 0

    def log(self, values):
        """Send the means since the last entry, {name: number} `values` and the counts to trackers and progress bar."""
        samples_per_batch = self.args.train_batch_size * self.accelerator.num_processes
        logs = self.means.take(self.accelerator, samples_per_batch) | values
        logs["updates_skipped"] = self.guard.count()
        if self.accelerator.scaler is not None:  # fp16: what it skips while its scale falls is in no count
            logs["loss_scale"] = self.accelerator.scaler.get_scale()
        if self.data:
            logs |= sum_counters(gather_object([self.data.counters]))
        self.accelerator.log(logs, step=self.global_step)
        self.progress.show(logs)

    def show(self, images, labels, name=None):
        """Write samples of a validation, as of `export.save_grid`, and say where. name: default: by the step."""
        if self.accelerator.is_main_process and images:
            name = name or f"samples/step-{self.global_step:06}.png"
            screen.say(f"samples: {export.save_grid(self.args.output_dir, images, labels, name)}")

    def save(self, **state):
        """Write a checkpoint; state: what it says besides what was registered, JSON-able."""
        state = self.state | state
        state |= {"args": self.flags, "run_id": self.run_id, "total_batch_size": self.total_batch_size}
        state["updates_skipped"] = self.guard.count()
        if self.args.eval_steps and self.eval_prompts:
            state["eval_prompts"] = self.eval_prompts
        if self.data:
            state["data"] = self.data.merge_state_dicts(gather_object([self.data.state_dict()]))
        checkpointing.save_checkpoint(
            self.accelerator,
            self.args.output_dir,
            self.global_step,
            state,
            self.modules,
            self.objects,
            self.args.checkpoints_total_limit,
        )

    def load_best(self, stage=None):
        """Before the export: load the checkpoint of the best evaluation, where `export` asks for it; of this stage.

        Returns what best_checkpoint.json says of it, None where the last weights stay: they are the best, or the
        best's checkpoint is not there, which is said.
        """
        if self.args.export != "best" or self.stopped:
            return None
        best = problem = None
        if self.accelerator.is_main_process:
            best = evaluation.read_best(self.args.output_dir)
            if best is None or best.get("stage") != stage:
                problem = "nothing was measured"
            elif best["step"] != self.global_step:
                folder = Path(self.args.output_dir, best["checkpoint"] or "none")
                problem = checkpointing.completeness(folder)
        best, problem = broadcast_object_list([best, problem])
        if problem:
            self.accelerator.print(f"WARNING: the best weights cannot be exported ({problem}), but the last ones are")
        if problem or best["step"] == self.global_step:
            return None
        checkpoint = Path(self.args.output_dir, best["checkpoint"])
        checkpointing.load_checkpoint(self.accelerator, checkpoint, self.modules, self.objects)
        self.best_step = best["step"]
        self.accelerator.print(f"the result has the best weights, those of step {self.best_step}")
        return best

    def finish(self, quality=None):
        """Upload what is asked for, end the trackers, and leave: with another exit code where the run was stopped.

        After `accelerator.free_memory`: DDP that outlives its process group can deadlock. quality: how good the result
        is, in words, where the script knows it.
        """
        args, accelerator = self.args, self.accelerator
        if accelerator.is_main_process and args.push_to_hub and not self.stopped:
            address = export.push_to_hub(args.output_dir, args.hub_model_id, args.hub_token, args.hub_private_repo)
            accelerator.print(f"uploaded to {address}")
        accelerator.wait_for_everyone()
        accelerator.end_training()
        self.stopper.exit_if_stopped(self.global_step)
        if accelerator.is_main_process:
            self.progress.finish(args, self._quality(quality))

    def _quality(self, known):
        """How good the result is, in words: what the script knows, and what was measured."""
        measured, best = evaluation.describe_best(self.args.output_dir), evaluation.read_best(self.args.output_dir)
        if best and best["checkpoint"] and best["step"] != self.exported_step:
            measured += "; to export it, run the command again with `resume_from_checkpoint`=latest, `export`=best"
        return " ".join([known, *([measured] if best else [])]) if known else measured


def start_trackers(accelerator, project_name, config, run_id):
    """Start every tracker with the run's flags; a resumed run continues under its old id."""
    options = {
        "wandb": {"id": run_id, "resume": "allow", "dir": accelerator.logging_dir},
        "comet_ml": {"experiment_key": run_id},
    }
    config = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in config.items()}  # as all take it
    Path(accelerator.logging_dir).mkdir(parents=True, exist_ok=True)
    accelerator.init_trackers(project_name, config, options)


def sum_counters(counters):
    """Every rank's {"read": n, class: n, ...} -> {"samples_read", "samples_skipped", "skipped/CLASS" if any}."""
    total = {name: sum(rank[name] for rank in counters) for name in counters[0]}
    read = total.pop("read")
    classes = {f"skipped/{name}": n for name, n in total.items() if n}
    return {"samples_read": read, "samples_skipped": sum(total.values())} | classes


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
