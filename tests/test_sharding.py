"""EMA, clipping, skipping and export on parameters that fully_shard has split over two processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import train_lcm_distill_sd_wds as lcm
from common.errors import UserError
from common.run import engine
from tests import sharded_worker
from tests.test_scripts import ROOT, flags

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

__all__ = ["flags"]


def test_two_shards_equal_one_process_with_the_same_global_batch(tmp_path, kind="fused"):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command += [sharded_worker.__file__, str(tmp_path), "sharded", kind]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    sharded_worker.main(tmp_path, "plain", kind)
    one, two = (torch.load(Path(tmp_path, f"{name}.pt")) for name in ("plain", "sharded"))
    assert one["skipped"] == two["skipped"] == 1
    poisoned = sharded_worker.POISONED
    for name in ("losses", "norms"):
        a, b = one[name], two[name]
        assert [i for i in range(len(a)) if a[i] != a[i]] == [i for i in range(len(b)) if b[i] != b[i]] == [poisoned]
        del a[poisoned], b[poisoned]
        assert a == pytest.approx(b, rel=1e-5)
    assert max(two["norms"]) == pytest.approx(sharded_worker.MAX_GRAD_NORM, rel=1e-4)  # it was clipped
    for a, b in zip(one["states"], two["states"], strict=True):  # the student and its average, gathered for an export
        assert a.keys() == b.keys() and not any(tensor.is_meta for tensor in b.values())
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(one["states"][0][name], one["states"][1][name]) for name in one["states"][0])


def test_an_engine_that_would_split_the_student_is_refused(tmp_path, flags, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(UserError, match="FSDP is not supported.* use DeepSpeed's ZeRO-2, or plain data parallel"):
        engine.make_accelerator(lcm.parse_args(flags(tmp_path)))
