"""Levers where it takes longer: kernels of the real compiler, two processes."""

from tests.cases import NO_DDP_LEFT, SCRIPTS, launch, scalars, train

import pytest


@pytest.mark.parametrize("name", ["lcm_lora", "direct"])
def test_kernels_of_the_compiler_give_the_same_losses(tmp_path, command, name):
    for folder, extra in (("a", {}), ("b", {"compile": True, "channels_last": True})):
        train(command(name, tmp_path / folder, max_train_steps=4, **extra), SCRIPTS[name])
    a, b = (list(scalars(tmp_path / folder, "loss").values()) for folder in "ab")
    assert len(a) == 4 and a == pytest.approx(b, rel=1e-3)


WATCHED = """
import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from common.networks import performance
performance.COMPILE_OPTIONS = performance.COMPILE_OPTIONS | {"backend": "eager"}
made, no_sync = DDP.__init__, DDP.no_sync
def watched(self, *args, **options):
    assert options["gradient_as_bucket_view"], options
    made(self, *args, **options)
def counted(self):
    print("NO_SYNC", flush=True)
    return no_sync(self)
DDP.__init__, DDP.no_sync = watched, counted
"""


@pytest.mark.parametrize("name", ["lcm_lora", "lcm"])
def test_two_processes_compile_and_wait_for_each_other_once_an_update(tmp_path, command, name):
    """Two processes of one micro-batch of 2 samples, twice an update; losses as without compilation."""
    changes = {"max_train_steps": 3, "gradient_accumulation_steps": 2, "train_batch_size": 2, "checkpointing_steps": 3}
    for folder, extra in (("a", {}), ("b", {"compile": True})):
        words = command(name, tmp_path / folder, **changes, **extra)
        done = launch(words, num_processes=2, prelude=NO_DDP_LEFT + WATCHED, script=SCRIPTS[name])
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("NO_SYNC") == 2 * 3  # processes times updates: the first of two micro-batches
    a, b = (list(scalars(tmp_path / folder, "loss").values()) for folder in "ab")
    assert len(a) == 3 and a == pytest.approx(b, rel=1e-5)
