"""Checkpoints that are complete or do not exist, and resuming from them.

`checkpoint-N/` is written as `checkpoint-N.tmp/` by all ranks, synchronised to disk, given a COMPLETE file with the
size of every file, and only then renamed; older ones are pruned after that. A run that dies at any point leaves the
last complete checkpoint intact. Nothing is unpickled but tensors and plain containers (`weights_only`).
"""

import itertools
import json
import os
import pickle
import re
import shutil
from pathlib import Path

from common import lock
from common.data.folders import expand_home
from common.data.stream import SKIPPED
from common.errors import UserError, line_of, without_credentials
from common.files import sync
from common.networks import sharded
from common.results.evaluation import BEST, FOLDER
from common.results.export import versions
from common.run import preemption

import torch
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.constants import RNG_STATE_NAME
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch.optim import Optimizer

CONFIG = "training_config.json"  # what a run writes first
COMPLETE = "COMPLETE"
STATE = "training_state.json"


def write_config(output_dir, flags, derived):
    """Write training_config.json: the run's flags, what follows from them, the versions of what it runs on."""
    config = {"flags": flags, "derived": derived, "versions": versions()}
    Path(output_dir, CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")


def prepare_output_dir(output_dir, resume_from_checkpoint, dry_run=False):
    """Check, before anything is loaded, that a run may write to `output_dir`; create it. Main process only.

    What an interrupted save left is cleared up, see `remove_leftovers`, and a STOP or REQUEUE file removed. With
    `dry_run` nothing is written; the nearest existing parent is asked instead. Raises UserError when the folder holds
    anything and the run does not resume, or when it cannot be written to. What a start that failed has left there, its
    flags and a list of skipped samples, does not count.
    """
    output_dir = Path(output_dir)
    flag = f"`output_dir`={output_dir}"
    names = lock.contents(output_dir)
    skipped = [name for name in names if name.startswith(Path(SKIPPED).stem + ".")]  # of every rank
    encoded = {"pairs", "real", "embeddings", FOLDER}  # what is made before the first update
    failed_start = CONFIG in names and names - encoded == {CONFIG, *skipped}
    if names and not failed_start and not resume_from_checkpoint:
        raise UserError(f"{flag} is not empty; name a new folder, or pass `resume_from_checkpoint`=latest to continue")
    if dry_run:
        parent = next(path for path in (output_dir.absolute(), *output_dir.absolute().parents) if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise UserError(f"{flag} cannot be written to; name another folder")
        return
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / ".write_test"
        try:
            probe.write_bytes(bytes(1 << 20))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{flag} cannot be written to ({error.strerror}); name another folder") from None
    if failed_start and not resume_from_checkpoint:
        for name in skipped:
            (output_dir / name).unlink()  # the run would add to it
    remove_leftovers(output_dir)
    preemption.clear_marks(output_dir)


def open_output_dir(accelerator, output_dir, resume_from_checkpoint, dry_run=False, overwrite=False):
    """`prepare_output_dir` for this run alone; called by every process, and a UserError is raised by all of them.

    The folder is this run's until `lock.releasing` ends. overwrite: an earlier run there is moved aside before.
    Returns what `find_checkpoint` finds on the main process: another node may not list the newest one yet. UserError
    too where another run is in the folder, and where a process does not see what the main one wrote there: the nodes
    have a folder each. With `dry_run` nothing is written, and neither can be told.
    """
    error = owner = checkpoint = None
    if accelerator.is_main_process:
        try:
            if dry_run:
                prepare_output_dir(output_dir, resume_from_checkpoint or overwrite, dry_run)
            else:
                owner = _take_output_dir(output_dir, resume_from_checkpoint, overwrite)
            checkpoint = find_checkpoint(output_dir, resume_from_checkpoint, accelerator.print)
        except UserError as caught:
            error = str(caught)
    error, owner, checkpoint = broadcast_object_list([error, owner, checkpoint])
    if error is not None:
        raise UserError(error)
    seen = gather_object([dry_run or lock.is_seen(output_dir, owner)])
    if not all(seen):
        blind = ", ".join(str(rank) for rank, sees in enumerate(seen) if not sees)
        raise UserError(
            f"`output_dir`={output_dir} is not one folder for all processes: what process 0 on {owner['host']} wrote "
            f"there is not seen by process {blind}; name a folder, by its absolute path, that all nodes share"
        )
    return checkpoint


def _take_output_dir(output_dir, resume_from_checkpoint, overwrite):
    held = lock.take(output_dir)
    if overwrite and (moved := move_aside(output_dir)):
        held.path = moved / held.path.name
        held.release()
        held = lock.take(output_dir)
    prepare_output_dir(output_dir, resume_from_checkpoint)
    return held.owner


def move_aside(output_dir):
    """Rename an earlier run's folder to NAME.1, NAME.2, ...: nothing of it is lost. Main process only.

    Returns its new path, None where there was nothing. UserError where the folder holds anything but is no run's.
    """
    output_dir = Path(output_dir)
    if not lock.contents(output_dir):
        return None
    if not (output_dir / CONFIG).is_file():
        raise UserError(f"`overwrite_output_dir`: `output_dir`={output_dir} holds files but no run; name a new folder")
    number = next(n for n in itertools.count(1) if not output_dir.with_name(f"{output_dir.name}.{n}").exists())
    moved = output_dir.rename(output_dir.with_name(f"{output_dir.name}.{number}"))
    print(f"{output_dir} was moved to {output_dir}.{number}")
    return moved


def completeness(checkpoint):
    """None for a complete checkpoint folder, else what is wrong with it, in words."""
    checkpoint = Path(checkpoint)
    if not (checkpoint / COMPLETE).is_file():
        return f"it has no {COMPLETE} file: the save did not finish"
    try:
        manifest = json.loads((checkpoint / COMPLETE).read_text())
        sizes = dict(manifest["files"])
        absent = [name for name in _of_every_process(manifest["world_size"]) if name not in sizes]
    except (ValueError, KeyError, TypeError):
        return f"its {COMPLETE} file cannot be read"
    if absent:
        return f"it lacks {absent[0]}, the state of a process: the nodes that wrote it shared no storage"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"its file {name} is missing"
        if file.stat().st_size != size:
            return f"its file {name} has {file.stat().st_size} bytes instead of {size}"
    return None


def _step(checkpoint):
    suffix = checkpoint.name.removeprefix("checkpoint-")
    return int(suffix) if suffix.isdigit() else -1


def list_checkpoints(output_dir):
    """The folders `checkpoint-N` under output_dir, oldest first, complete or not."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir() and _step(path) >= 0]
    return sorted(found, key=_step)


def find_checkpoint(output_dir, resume_from_checkpoint, report=print):
    """The checkpoint folder that `resume_from_checkpoint` means, or None when there is nothing to resume.

    `latest` is the newest complete one under output_dir (an incomplete one is reported and passed over; with none the
    run starts anew); anything else is a name under output_dir or a path. Raises UserError for a named checkpoint that
    is missing or incomplete, for `latest` in a folder that holds other files than a run's that died before its first
    checkpoint, and for a checkpoint elsewhere when output_dir already holds anything.
    """
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint == "latest":
        for checkpoint in reversed(list_checkpoints(output_dir)):
            problem = completeness(checkpoint)
            if problem is None:
                return checkpoint
            report(f"{checkpoint} is passed over: {problem}")
        _check_no_result(output_dir)
        if lock.contents(output_dir):
            report(f"no complete checkpoint under {output_dir}: the run starts anew")
        return None
    flag = f"`resume_from_checkpoint`={resume_from_checkpoint}"
    for candidate in (Path(output_dir, resume_from_checkpoint), Path(resume_from_checkpoint)):
        if candidate.is_dir():
            problem = completeness(candidate)
            if problem:
                raise UserError(f"{flag}: the checkpoint cannot be used, {problem}; pass `latest` or an earlier one")
            elsewhere = candidate.resolve().parent != Path(output_dir).resolve()
            if elsewhere and lock.contents(output_dir):
                raise UserError(
                    f"{flag} is of another folder and `output_dir`={output_dir} is not empty; name a new one"
                )
            return candidate
    raise UserError(f"{flag}: there is no such checkpoint, neither under {output_dir} nor as a path; pass `latest`")


def _check_no_result(output_dir):
    """UserError when a run that starts anew would write over files: only an unfinished run's own may be there."""
    names = lock.contents(output_dir)
    result = names & {"README.md", "model_index.json"} or any(name.endswith(".safetensors") for name in names)
    if names and (result or CONFIG not in names):
        raise UserError(
            f"`resume_from_checkpoint`=latest: `output_dir`={output_dir} holds files but no complete checkpoint to "
            "resume from; name a new folder"
        )


def read_state(checkpoint):
    """The JSON part of a checkpoint: global_step, args, versions, data, counters."""
    return json.loads(Path(checkpoint, STATE).read_text())


def check_same_run(checkpoint, saved_args, args, free=frozenset(), with_data=frozenset()):
    """UserError that lists every argument which differs from the checkpoint's and may not change on resume.

    Arguments that one side does not have (another version's flags) are compared as None. free, with_data: the names
    of those that may change, always and where `data_seed` does.
    """
    may_change = free | (with_data if saved_args.get("data_seed") != args.get("data_seed") else set())
    names = sorted((saved_args.keys() | args.keys()) - may_change)
    changed = [n for n in names if _same_path(saved_args.get(n)) != _same_path(args.get(n))]
    if changed:
        listed = ", ".join(f"`{n}` was {saved_args.get(n)!r} and is {args.get(n)!r}" for n in changed)
        way_out = "pass what it was, or start anew in another `output_dir`"
        if saved_args.get("data_seed") is not None and with_data.issuperset(changed):
            way_out = "pass what it was, or another `data_seed` too, with which the data begins anew"
        raise UserError(f"`resume_from_checkpoint`={checkpoint} is of another configuration: {listed}; {way_out}")


def check_same_start(output_dir, args, **rules):
    """UserError where a run that starts anew would write over the finished stages of a run with other flags.

    rules: `free` and `with_data` of `check_same_run`.
    """
    config = Path(output_dir, CONFIG)
    if config.is_file() and any(Path(output_dir).glob("stage-*")):
        check_same_run(config, json.loads(config.read_text())["flags"], args, **rules)


def _same_path(value):
    """What exists as a file or folder, as one spelling; an address without its credentials; else `~` is expanded."""
    if isinstance(value, str) and ("://" in value or value.startswith("pipe:")):
        return without_credentials(value)
    value = expand_home(value) if isinstance(value, str) else value
    return os.path.realpath(value) if isinstance(value, str) and value and os.path.exists(value) else value


def remove_leftovers(output_dir):
    """Finish saves that lack nothing but their rename, delete the others' `.tmp` folders. Main process only."""
    for leftover in sorted(Path(output_dir).glob("checkpoint-*.tmp")):
        if not re.fullmatch(r"checkpoint-\d+(\.replaced)?\.tmp", leftover.name) or not leftover.is_dir():
            continue  # not ours
        final = leftover.with_name(leftover.name.split(".")[0])
        if completeness(leftover) is None and not final.exists():
            leftover.rename(final)
        else:
            shutil.rmtree(leftover)


def save_checkpoint(accelerator, output_dir, global_step, state, modules, objects, total_limit=None):
    """Write `checkpoint-{global_step}`; called by every rank. Returns its path.

    What accelerate prepared (model, optimizer, GradScaler) and every rank's RNG are saved by `save_state`. On top:
    state: JSON-able dict. modules: {name: nn.Module} not prepared, as safetensors (EMA copies). objects: {name: object
    with state_dict} of plain containers and tensors (the LR scheduler). total_limit: how many checkpoints to keep, the
    newest ones; the one that BEST names is kept besides.
    """
    tmp = Path(output_dir, f"checkpoint-{global_step}.tmp")
    try:
        return _save(accelerator, Path(output_dir), tmp, global_step, state, modules, objects, total_limit)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = line_of(error)[:200]
        if isinstance(error, RuntimeError):
            if not re.search("PytorchStreamWriter|inline_container|iostream error", reason):  # of torch.save
                raise
            reason = f"most likely the disk is full: {reason}"
        shutil.rmtree(tmp, ignore_errors=True)
        raise UserError(
            f"`output_dir`={output_dir}: the checkpoint of step {global_step} could not be written ({reason}); make "
            "room and resume, the checkpoints before it are whole",
            on_one_rank=True,
        ) from error


def _save(accelerator, output_dir, tmp, global_step, state, modules, objects, total_limit):
    final = output_dir / f"checkpoint-{global_step}"
    if accelerator.is_main_process:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(tmp))
    rng_sums = gather_object([_rng_digest()])
    for name, module in modules.items():
        if sharded.is_sharded(module):
            sharded.write_tensors(tmp / f"{name}.safetensors", module.state_dict())
        elif accelerator.is_main_process:
            save_model(module, str(tmp / f"{name}.safetensors"))
    if accelerator.is_main_process:
        torch.save({name: obj.state_dict() for name, obj in objects.items()}, tmp / "objects.pt")
        payload = state | {"global_step": global_step, "rng_digests": rng_sums}
        (tmp / STATE).write_text(json.dumps(payload, indent=1))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        names = _of_every_process(accelerator.num_processes)
        absent = [name for name in names if not lock.wait_for(tmp, (tmp / name).is_file)]
        if absent:
            shutil.rmtree(tmp, ignore_errors=True)
            raise UserError(
                f"`output_dir`={output_dir}: the checkpoint of step {global_step} lacks {absent[0]}, which another "
                "node wrote; name a folder that all nodes share",
                on_one_rank=True,
            )
        files = sorted(path for path in tmp.rglob("*") if path.is_file())
        for path in files:
            sync(path)
        manifest = {"world_size": accelerator.num_processes, "global_step": global_step}
        manifest["files"] = {str(path.relative_to(tmp)): path.stat().st_size for path in files}
        (tmp / COMPLETE).write_text(json.dumps(manifest, indent=1))
        sync(tmp / COMPLETE)
        sync(tmp)
        replaced = tmp.with_name(f"checkpoint-{global_step}.replaced.tmp")
        if final.exists():  # the run went back to an earlier checkpoint and comes by again
            final.rename(replaced)
        tmp.rename(final)
        sync(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        if total_limit:
            best = Path(output_dir, BEST)
            kept = {final.name, json.loads(best.read_text())["checkpoint"] if best.is_file() else None}
            others = [c for c in list_checkpoints(output_dir) if c.name not in kept]
            for old in others[: -(total_limit - 1) or None]:
                doomed = old.rename(old.with_name(f"{old.name}.replaced.tmp"))  # whole under its name, or not at all
                shutil.rmtree(doomed)
    accelerator.wait_for_everyone()
    return final


def _of_every_process(world_size):
    """The files of a checkpoint that each process wrote one of, by accelerate's names."""
    return [f"{RNG_STATE_NAME}_{rank}.pkl" for rank in range(world_size)]


def load_checkpoint(accelerator, checkpoint, modules, objects):
    """Restore what `save_checkpoint` wrote into the prepared objects, `modules` and `objects`; called by every rank.

    Every rank's RNG is restored exactly when the number of processes is the checkpoint's.
    """
    state = read_state(checkpoint)
    try:
        accelerator.load_state(str(checkpoint))
        for name, module in modules.items():
            path = Path(checkpoint, f"{name}.safetensors")
            if sharded.is_sharded(module):
                sharded.read_tensors(path, module.state_dict())
            else:
                load_model(module, str(path), strict=True)
        saved = torch.load(Path(checkpoint, "objects.pt"), map_location="cpu", weights_only=True)
        for name, obj in objects.items():
            obj.load_state_dict(saved[name])
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(
            f"`resume_from_checkpoint`: {checkpoint} is damaged or of another model ({line_of(error)[:200]}); pass an "
            "earlier one"
        ) from error
    # accelerate restored the count of micro-batches of a run that may have had another number of them in an update
    accelerator.step = state["global_step"] * accelerator.gradient_accumulation_steps
    for optimizer in (*accelerator._optimizers, *objects.values()):
        _match_layout(getattr(optimizer, "optimizer", optimizer))
    same_world = len(state["rng_digests"]) == accelerator.num_processes
    # accelerate only logs when it could not restore the generators: make sure that it did.
    if same_world and _rng_digest() != state["rng_digests"][accelerator.process_index]:
        raise UserError(f"`resume_from_checkpoint`: {checkpoint} has damaged random states; pass an earlier one")


def _match_layout(optimizer):
    """Give the states of torch's own optimizers their parameters' layout in memory, which fused kernels ask for: the
    run that saved them may have had another `channels_last`. bitsandbytes works on memory as it lies."""
    if not (isinstance(optimizer, Optimizer) and type(optimizer).__module__.startswith("torch.optim")):
        return
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _rng_digest():
    return int(torch.get_rng_state().long().mul(torch.arange(1, torch.get_rng_state().numel() + 1)).sum())
