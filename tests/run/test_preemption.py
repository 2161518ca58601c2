"""Stopping early: by signal, time limit and STOP file, as one process and as two, and going on from there."""

import json
import os
import signal
import time
from types import SimpleNamespace

import train_lcm_distill_sd_wds as lcm
from common.errors import UserError
from common.run import checkpointing, preemption
from common.run.preemption import Stopper
from tests.cases import stop_after, train
from tests.fork_server import run_processes

import pytest
import torch

ALONE = SimpleNamespace(is_main_process=True, num_processes=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_and_asks_for_a_stop(tmp_path, number, capsys):
    before = signal.getsignal(number)
    with preemption.noting_signals():
        stopper = Stopper(ALONE, tmp_path, 300, 4)
        assert not stopper.check() and not stopper.stops
        stopper.exit_if_stopped(5)  # of a run that was not stopped: nothing
        os.kill(os.getpid(), number)
        assert stopper.check() and stopper.stops
        with pytest.raises(SystemExit) as left:
            stopper.exit_if_stopped(5)
    assert left.value.code == 75 and signal.getsignal(number) == before
    assert json.loads((tmp_path / "REQUEUE").read_text()) == {"global_step": 5, "reason": number.name}
    assert f"stopped for {number.name} after step 5" in capsys.readouterr().out
    with preemption.noting_signals():  # the next run in this process knows nothing of it
        assert not Stopper(ALONE, tmp_path, 300, 4).check()


def test_a_run_that_did_not_get_on_asks_for_no_requeue(tmp_path):
    stopper = Stopper(ALONE, tmp_path, 300, 4)
    (tmp_path / "STOP").touch()
    assert stopper.check()
    with pytest.raises(SystemExit):
        stopper.exit_if_stopped(4)
    assert not (tmp_path / "REQUEUE").exists()


def test_the_stop_file_is_the_main_processs_business(tmp_path):
    (tmp_path / "STOP").touch()
    assert not Stopper(SimpleNamespace(is_main_process=False, num_processes=1), tmp_path, 300, 0).check()


def test_a_slurm_job_stops_before_its_time_is_over(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 1000))
    stopper = Stopper(ALONE, tmp_path, 300, 0)
    assert not stopper.check()
    later = time.time() + 701
    monkeypatch.setattr(time, "time", lambda: later)
    assert stopper.check() and preemption.REASONS[stopper.reason] == "the job's time limit"


@pytest.mark.parametrize(
    ("text", "margin", "words"),
    [
        ("1000", 300, "`stop_margin`=300: the job ends in -"),
        ("in 250 seconds", 300, "by SLURM_JOB_END_TIME; ask for more time, or lower the margin"),
    ],
)
def test_a_time_limit_that_cannot_be_kept_is_refused(monkeypatch, text, margin, words):
    text = str(int(time.time()) + 250) if text == "in 250 seconds" else text  # not a time in the test's name
    monkeypatch.setenv("SLURM_JOB_END_TIME", text)
    with pytest.raises(UserError, match=words.replace("(", ".")):
        preemption.job_deadline(margin)


def test_marks_of_an_earlier_run_are_removed_at_the_start_but_not_by_a_dry_run(tmp_path):
    for name in ("STOP", "REQUEUE", "mine"):
        (tmp_path / name).touch()
    checkpointing.prepare_output_dir(tmp_path, "latest", dry_run=True)
    assert len(list(tmp_path.iterdir())) == 3
    checkpointing.prepare_output_dir(tmp_path, "latest")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_stop_at_the_last_step_saves_and_the_next_start_exports(tmp_path, flags, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, tmp_path, 2)
        with pytest.raises(SystemExit):
            train(flags(tmp_path, lcm, max_train_steps=2))
    assert not (tmp_path / "README.md").exists()
    train(flags(tmp_path, lcm, max_train_steps=2, resume_from_checkpoint="latest"))
    assert (tmp_path / "model_index.json").is_file() and not (tmp_path / "REQUEUE").exists()


# Signals of real processes; with the launcher, of all scripts: tests/soak/test_signals.py. After the given update, one
# rank sends it: to itself, to the launcher, or to all.
SENDS = """
import os, signal
from common.networks import encoders
from common.run.preemption import Stopper
check, encode, calls = Stopper.check, encoders.encode_images, []
rank = int(os.environ.get("RANK", "0"))
def checked(self):
    calls.append(1)
    if len(calls) == 2 and rank == {rank}:
        {send}
    return check(self)
Stopper.check = checked
def poisoned(*args):
    latents = encode(*args)
    return latents * float("nan") if {poison} and not calls and rank == 1 else latents
encoders.encode_images = poisoned
"""


def saved_at_a_stop(out, done):
    """The only checkpoint of a run that was stopped: (its step, its state)."""
    (checkpoint,) = checkpointing.list_checkpoints(out)
    assert checkpointing.completeness(checkpoint) is None, done.stderr[-2000:]
    state = checkpointing.read_state(checkpoint)
    assert json.loads((out / "REQUEUE").read_text())["global_step"] == state["global_step"]
    assert "goes on from there, REQUEUE says so" in done.stdout and not (out / "README.md").exists()
    return state["global_step"], state


def test_sigusr1_to_one_of_two_processes_stops_both_at_one_step_and_a_poisoned_one_skips_for_both(tmp_path, flags):
    options = {"max_train_steps": 100, "checkpointing_steps": 100, "train_batch_size": 2, "data_lanes": 8}
    prelude = SENDS.format(rank=1, send="os.kill(os.getpid(), signal.SIGUSR1)", poison=True)
    done = run_processes(flags(tmp_path / "out", **options), lcm, 2, prelude)
    step, state = saved_at_a_stop(tmp_path / "out", done)
    assert step == 2 and len(state["rng_digests"]) == 2 and state["updates_skipped"] == 1
    (skipped,) = map(json.loads, (tmp_path / "out" / "nonfinite_updates.jsonl").read_text().splitlines())
    assert skipped["step"] == 1 and len(skipped["keys"]) == 4
    optimizer = torch.load(tmp_path / "out" / "checkpoint-2" / "optimizer.bin", weights_only=True)["state"]
    assert {float(entry["step"]) for entry in optimizer.values()} == {1.0}
