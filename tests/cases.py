"""A quick run of each script: its command line, how it is run, and what it leaves."""

import contextlib
import functools
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import train_cm_ct_unconditional as ct
import train_direct_distill as direct
import train_lcm_distill_lora_sd_wds as lcm_lora
import train_lcm_distill_sd_wds as lcm
import train_tscd_distill_lora_sd_wds as tscd_lora
import train_tscd_distill_sd_wds as tscd
from common.data.images import decode_image_text
from common.data.shards import expand_shards
from common.data.stream import TrainingData
from common.run import checkpointing, simulation
from common.run.preemption import Stopper
from common.score.matching import ScoreMatching

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(lcm.__file__).parent
SD_SCRIPTS = {"lcm": lcm, "lcm_lora": lcm_lora, "tscd": tscd, "tscd_lora": tscd_lora}
SCRIPTS = SD_SCRIPTS | {"ct": ct, "direct": direct}
LORA_SCRIPTS = (lcm_lora, tscd_lora)


def soak_but(*quick, names=SCRIPTS):
    """The scripts' names; all but these are run with -m soak."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.soak) for name in names]


class Case(NamedTuple):
    """A script with the flags of a run of four updates; "{name}" in a flag is a path that the test has made."""

    script: ModuleType
    flags: dict


SHARED = {
    "resolution": 16, "train_batch_size": 4, "max_train_steps": 4, "seed": 1, "validation_steps": 0,
    "logging_steps": 1, "checkpointing_steps": 2,
}  # fmt: skip
SD = SHARED | {
    "pretrained_teacher_model": "{teacher}", "train_shards_path_or_url": "{shards}", "shuffle_block_samples": 16,
    "validation_num_inference_steps": "1", "validation_prompts": "a seven", "w_min": 0, "w_max": 2,
}  # fmt: skip
# two stages of two updates, adversarial from the first on
TSCD = SD | {"stage_segments": "2,1", "adv_weights": 0.1, "adv_head_learning_rate": 1e-3}
CT = SHARED | {
    "dataset_name": "{data_set}", "dataset_image_column_name": "img", "class_conditional": True, "resolution": 8,
    "model_config_name_or_path": "{unet}", "discretization_s_1": 40, "use_ema": True, "ema_max_decay": 0.5,
    "shuffle_block_samples": 16, "learning_rate": 1e-3, "eval_batch_size": 5,
}  # fmt: skip
DIRECT = SHARED | {
    "pretrained_teacher_model": "{direct_teacher}", "pairs_dir": "{pairs}", "num_held_out": 4, "lora_rank": 0,
    "gradient_accumulation_steps": 1, "learning_rate": 1e-3, "resolution": None, "num_inference_steps": 2,
}  # fmt: skip
LORA = {"lora_rank": 4, "lora_alpha": 6}
CASES = {
    "lcm": Case(lcm, SD | {"unet_time_cond_proj_dim": 32}),
    "lcm_lora": Case(lcm_lora, SD | LORA),
    "tscd": Case(tscd, TSCD),
    "tscd_lora": Case(tscd_lora, TSCD | LORA),
    "ct": Case(ct, CT),
    "ct ect": Case(ct, CT | {"objective": "ect", "ect_stages": 3, "pretrain_steps": 1}),
    "direct": Case(direct, DIRECT | {"ema_decay": 0.5}),
    "direct lora": Case(direct, DIRECT | {"ema_decay": 0.5, "lora_rank": 4, "lora_dropout": 0.3}),
}


def as_words(values):
    """The words of a command line; None drops a flag, True is a bare one."""
    return [f"--{k}" if v is True else f"--{k}={v}" for k, v in values.items() if v is not None]


def command(case, made, folder, **changes):
    """The words of a run into `folder`. made: {name: path}."""
    flags = {k: v.format_map(made) if isinstance(v, str) else v for k, v in case.flags.items() if k not in changes}
    return as_words(flags | {"output_dir": folder} | changes)


def train(words, script=lcm):
    """A run in this process; accelerate's state is a process's, so it starts afresh."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return script.main(script.parse_args(words))


def launch(flags, num_processes=1, prelude=None, use_cpu=True, script=lcm, engine=None):
    """`accelerate launch` of the script, as a user types it; prelude: Python that each process runs before it; engine:
    what the launcher is told instead of plain data parallel training in float32."""
    command = [script.__file__]
    if prelude:
        wrapper = Path(next(f for f in flags if f.startswith("--output_dir=")).split("=")[1] + "_wrapper.py")
        wrapper.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{prelude}\n"
                           f"import {script.__name__} as s\ns.main(s.parse_args())\n")  # fmt: skip
        command = [str(wrapper)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    engine = engine or ["--multi_gpu" if num_processes > 1 else "--cpu", "--mixed_precision=no"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *engine, f"--num_processes={num_processes}"]
    launcher += ["--num_machines=1", "--dynamo_backend=no", f"--main_process_port={port}"]
    env = os.environ | ({"ACCELERATE_USE_CPU": "true"} if num_processes > 1 and use_cpu else {})
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": "/", "env": env}
    process = subprocess.Popen([*launcher, *command, *flags], start_new_session=True, **options)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # no process of a run that hangs outlives its test
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


# The destructor of DDP's reducer holds the GIL: if it is the process group's last owner, it waits for a thread of the
# group, which may wait for the GIL. That hung one run in some dozens.
NO_DDP_LEFT = """
import gc, torch
destroy = torch.distributed.destroy_process_group
def checked(group=None):
    left = [o for o in gc.get_objects() if isinstance(o, torch.nn.parallel.DistributedDataParallel)]
    assert not left, "DDP outlives its process group"
    destroy(group)
torch.distributed.destroy_process_group = checked

from accelerate import Accelerator
prepare = Accelerator.prepare
def prepared(self, *args, **kwargs):
    engine = self.distributed_type.value, torch.distributed.get_backend(), self.num_processes
    assert engine == ("MULTI_CPU", "gloo", 2), engine
    return prepare(self, *args, **kwargs)
Accelerator.prepare = prepared

import common.run.updates as d
step = d.step_beside
def step_and_compare(optimizer, scaler, world_size, *more):
    finite = step(optimizer, scaler, world_size, *more)
    mine = torch.stack([p.double().sum() for group in optimizer.param_groups for p in group["params"]])
    first = mine.clone()
    torch.distributed.broadcast(first, 0)
    assert world_size == 2 and torch.equal(mine, first), "the other networks differ"
    return finite
d.step_beside = step_and_compare
"""


def micro_batches(shards):
    """Those of a quick run that trains from shards, in their order."""
    decode = functools.partial(decode_image_text, resolution=16)
    return iter(TrainingData(expand_shards(shards), decode, batch_size=4, seed=1, shuffle_block_samples=16))


def stop_after(monkeypatch, folder, step):
    """Have a STOP file touched between updates step - 1 and step."""
    check, calls = Stopper.check, []

    def checked(self):
        calls.append(1)
        if len(calls) == step:
            Path(folder, "STOP").touch()
        return check(self)

    monkeypatch.setattr(Stopper, "check", checked)


def stop_in_warm_up(monkeypatch, folder):
    """The next update of the fake score leaves a STOP file; returns the list of the numbers of those that are done."""
    done, train_fake = [], ScoreMatching.train_fake

    def stopped(self, micro_batch, number, count):
        done.append(number)
        Path(folder, "STOP").touch()
        return train_fake(self, micro_batch, number, count)

    monkeypatch.setattr(ScoreMatching, "train_fake", stopped)
    return done


def finished(args, accelerator, batch=None):
    """In place of `simulation.begin`: a dry run that ends with its checks."""
    raise simulation.Finished(None)


def undo(checkpoint):
    """The flag that goes on from the checkpoint before, as if the run had died while it saved this one."""
    (checkpoint / checkpointing.COMPLETE).unlink()
    return {"resume_from_checkpoint": "latest"}


def one_sentence(capsys, call, *args, alone=False, **options):
    """That of a call that ends with exit code 2. alone: it is all that stderr holds."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call(*args, **options)
    err = capsys.readouterr().err
    said = [line for line in err.splitlines() if "error: " in line]
    assert stopped.value.code == 2 and len(said) == 1 and "Traceback" not in err, err
    assert not alone or err.count("\n") == 1, err
    return said[0]


def scalars(output_dir, tag):
    events = {}
    for file in sorted(Path(output_dir).rglob("events.out.tfevents.*"), key=lambda f: f.stat().st_mtime):
        accumulator = EventAccumulator(str(file)).Reload()
        if tag in accumulator.Tags()["scalars"]:
            events |= {e.step: e.value for e in accumulator.Scalars(tag)}
    return events


def image_tags(output_dir):
    tags = set()
    for file in Path(output_dir).rglob("events.out.tfevents.*"):
        tags |= {tag.rsplit("/image", 1)[0] for tag in EventAccumulator(str(file)).Reload().Tags()["images"]}
    return tags


def fingerprint(value):
    """Nested containers of tensors and numbers -> the same with the bytes of every tensor."""
    if isinstance(value, dict):
        return {key: fingerprint(v) for key, v in value.items()}
    return value.contiguous().view(torch.uint8).numpy().tobytes() if torch.is_tensor(value) and value.ndim else value


def digests(checkpoint):
    """What training depends on: {file: hash} of weights, averages and LR schedule; optimizer; RNG and data."""
    state = checkpointing.read_state(checkpoint)
    names = sorted(path.name for path in Path(checkpoint).glob("*.safetensors"))
    assert {"model.safetensors", "adapters.safetensors"} & set(names)
    sums = {name: hashlib.sha256(Path(checkpoint, name).read_bytes()).hexdigest() for name in [*names, "objects.pt"]}
    optimizer = torch.load(Path(checkpoint, "optimizer.bin"), weights_only=True)["state"]
    return sums | {"optimizer": fingerprint(optimizer), "data": state["data"], "rng": state["rng_digests"]}


def contents(checkpoint):
    """{name: value} of everything in a checkpoint but what names the run: equal for runs that are equal.

    Left out: the states of Python's and numpy's generators, which each process seeds anew and no run draws from.
    """
    state = checkpointing.read_state(checkpoint)
    found = {name: value for name, value in state.items() if name not in ("args", "run_id")}
    optimizer = torch.load(Path(checkpoint, "optimizer.bin"), weights_only=True)
    found |= {"optimizer": fingerprint(optimizer["state"]), "groups": str(optimizer["param_groups"])}
    others = {checkpointing.STATE, checkpointing.COMPLETE, "optimizer.bin"}
    for path in sorted(Path(checkpoint).iterdir()):
        if path.name.startswith("random_states"):
            states = accelerate.utils.load(path)
            found[path.name] = fingerprint({"torch": states["torch_manual_seed"], "step": states["step"]})
        elif path.name not in others:
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = json.loads(Path(checkpoint, checkpointing.COMPLETE).read_text())
    assert set(manifest["files"]) == {path.name for path in Path(checkpoint).iterdir()} - {checkpointing.COMPLETE}
    return found
