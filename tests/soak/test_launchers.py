"""Two processes under torchrun, and two "nodes", stopped by the signals that a cluster sends."""

import json
import os
import signal
import time

import train_lcm_distill_sd_wds as lcm
from common.run import checkpointing
from tests.cases import launch
from tests.run.test_preemption import SENDS, saved_at_a_stop
from tests.run.test_slurm import job, wait_for  # noqa: F401


def test_sigterm_to_the_launcher_of_two_processes(tmp_path, flags):
    """torchrun hands it on and waits; its own exit code is 1, and REQUEUE says what happened."""
    options = {"max_train_steps": 100, "checkpointing_steps": 100, "train_batch_size": 2, "data_lanes": 8}
    prelude = SENDS.format(rank=0, send="os.kill(os.getppid(), signal.SIGTERM)", poison=False)
    done = launch(flags(tmp_path / "out", **options), num_processes=2, prelude=prelude)
    step, _ = saved_at_a_stop(tmp_path / "out", done)
    assert 2 <= step < 100 and done.returncode != 0


def test_two_nodes_train_stop_at_the_jobs_signal_and_are_requeued(tmp_path, job, flags):  # noqa: F811
    """Two launchers on this machine, each for a node of one process; everything but SLURM's commands is real."""
    command = flags(tmp_path / "out", max_train_steps=500, checkpointing_steps=500, train_batch_size=2, data_lanes=8)
    command = [word for word in command if not word.startswith("--output_dir")]
    process = job("multi_node.sbatch", arguments=(lcm.__file__, *command), real_accelerate=True, SLURM_NODEID="",
                  ACCELERATE_USE_CPU="true", SLURM_JOB_ID=str(os.getpid()))  # fmt: skip
    wait_for(tmp_path / "out" / "training_config.json", process)
    while not list((tmp_path / "out" / "logs").rglob("events.*")):  # the loop begins
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=300)
    (checkpoint,) = checkpointing.list_checkpoints(tmp_path / "out")
    assert json.loads((checkpoint / "COMPLETE").read_text())["world_size"] == 2
    assert process.returncode == 0 and "stopped for a STOP file after step" in out
    assert (tmp_path / "scontrol").read_text() == f"requeue {os.getpid()}\n"
