"""What DeepSpeed's ZeRO-2 does, which is why the scripts refuse it. Skipped where deepspeed is not installed.

pip install deepspeed && python -m pytest tests/soak/test_deepspeed.py
"""

import os
import socket
import subprocess
import sys

import train_lcm_distill_sd_wds as lcm
from tests.cases import CASES, command
from tests.test_scripts import ROOT

import pytest

pytest.importorskip("deepspeed")

WORKER = """
import os, sys
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin
rank, out, precision, resume = int(os.environ["RANK"]), *sys.argv[1:]
state = PartialState()  # on a CPU accelerate gives its DeepSpeed one process: tell it that there are two
state.num_processes, state.process_index, state.local_process_index = 2, rank, rank
config = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1}
config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
accelerator = Accelerator(mixed_precision=precision, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.SiLU(), torch.nn.Linear(7, 3))
optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
net, optimizer = accelerator.prepare(net, optimizer)
dtype = next(net.parameters()).dtype
if resume:
    accelerator.load_state(out)
data = torch.Generator().manual_seed(1)
for step in range(6):
    x, y = torch.randn(4, 5, generator=data)[rank::2], torch.randn(4, 3, generator=data)[rank::2]
    if resume and step < 3:
        continue
    before = next(net.parameters()).detach().clone()
    accelerator.backward((net(x.to(dtype)) - y.to(dtype)).square().mean())
    moved, gone = not torch.equal(before, next(net.parameters())), next(net.parameters()).grad is None
    optimizer.step()
    if step == 2 and not resume and precision == "no":
        accelerator.save_state(out)
if rank == 0:
    total = sum(p.double().sum().item() for p in net.parameters())
    print("FOUND", accelerator.distributed_type.value, torch.distributed.get_world_size(), dtype, moved, gone, total)
"""


def torchrun(*words, **env):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    env = os.environ | {"ACCELERATE_USE_DEEPSPEED": "true", "PYTHONPATH": str(ROOT)} | env
    return subprocess.run([*launcher, *map(str, words)], env=env, capture_output=True, text=True, timeout=300)


def found(done):
    assert done.returncode == 0, done.stderr[-3000:]
    return next(line for line in done.stdout.splitlines() if line.startswith("FOUND")).split()[1:]


def test_why_zero_2_is_refused(tmp_path):
    worker, saved = tmp_path / "worker.py", tmp_path / "saved"
    worker.write_text(WORKER)
    engine, size, dtype, moved, gone, total = found(torchrun(worker, saved, "no", ""))
    assert (engine, size, dtype) == ("DEEPSPEED", "2", "torch.float32")
    assert moved == gone == "True"  # the update happens inside of backward, the gradients are gone after it
    assert found(torchrun(worker, saved, "no", "resume"))[-1] == total  # its checkpoints are exact,
    refused = torchrun(worker, saved, "no", "resume", TORCH_FORCE_WEIGHTS_ONLY_LOAD="1")
    assert refused.returncode != 0 and "weights_only" in refused.stderr  # but pickles
    assert found(torchrun(worker, saved, "bf16", ""))[2] == "torch.bfloat16"  # the weights that an EMA would see


def test_the_scripts_say_so(tmp_path, made):
    words = command(CASES["lcm"], made, tmp_path / "out")
    done = torchrun(lcm.__file__, *words)
    lines = [line for line in done.stderr.splitlines() if "error: " in line and "DEEPSPEED is not supported" in line]
    assert done.returncode != 0 and len(lines) == 1, done.stderr[-3000:]
    assert not (tmp_path / "out").exists()
