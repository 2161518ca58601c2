"""What a run prints: the start, the lines of a log file, and the end, whose commands are run as they stand."""

import datetime
import fcntl
import itertools
import os
import pty
import re
import select
import shlex
import struct
import sys
import termios
import types

from common.run import screen, simulation, training_run
from common.tools import evaluate
from tests.cases import SCRIPTS, soak_but, train

import pytest
import torch


@pytest.mark.parametrize("name", soak_but("lcm", "tscd_lora", "ct", "direct"))
def test_start_and_end_of_each_script(tmp_path, monkeypatch, capsys, command, name):
    folder = tmp_path / "out"
    words = command(name, folder, max_train_steps=4, validation_steps=2)
    train(words, SCRIPTS[name])
    out, err = capsys.readouterr()
    assert re.search(r"^update .*--max_train_steps=4", out, re.M) and re.search(r"^not given, so .*--\w+=", out, re.M)
    assert "--adam_epsilon" not in out and "=None " not in out  # what nobody gave
    plan = dict(re.findall(r"^  (trained|memory|disk|time) +(.*)", out, re.M))
    assert plan["time"] == "measured until update 2"
    assert re.match(r"[\d.e-]+ M of [\d.]+ M weights$", plan["trained"]) and "before activations" in plan["memory"]
    said, unit = re.match(r"([\d.]+) (\wiB) a checkpoint, 2 kept", plan["disk"]).groups()
    saved = sum(path.stat().st_size for path in (folder / "checkpoint-4").rglob("*"))
    assert unit == "MiB" and float(said) == pytest.approx(saved / 2**20, rel=0.25, abs=0.3)
    grid = folder / ("stage-0-k2/sample_grid.png" if "tscd" in name else "samples/step-000002.png")
    assert f"samples: {grid}\n" in out and grid.is_file()
    assert re.findall("^step (\\d) of 4", err, re.M) == list("1234")
    end = dict(line.split(maxsplit=1) for line in out[out.index("\ndone ") :].splitlines() if line)
    assert re.match(r"4 updates in 0:0\d:\d\d, loss \d", end["done"]) and str(folder) in end["result"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["evaluate"])
    code = shlex.split(end["sample"])[2]
    exec(compile(code, "card", "exec"), {})
    assert (tmp_path / "sample.png").is_file() and '"a prompt"' not in code
    assert "--eval_steps" in end["quality"] or name == "direct"  # which has measured held-out pairs
    if name == "ct":  # whose classes `evaluate` cannot ask for
        assert "measure" not in end
    else:
        (tmp_path / "prompts.txt").write_text("a three\na four\n")
        with pytest.raises(SystemExit):  # all that is wrong with it is that no hub can be reached from here
            evaluate.parse_args(shlex.split(end["measure"], comments=True)[3:])
        network = "--clip_model openai/clip-vit" if name == "direct" else "--feature_network facebook/dinov2-large"
        assert f"error: {network}" in capsys.readouterr().err
    train([*words, "--max_train_steps=5", "--resume_from_checkpoint=latest", "--verbose"], SCRIPTS[name])
    out = capsys.readouterr().out
    assert "before activations" in out and "measured until" not in out
    assert re.search(r"^done +1 updates \(5 in all\) in 0:0", out, re.M)
    assert re.search(r"^changed .*--max_train_steps: 4 -> 5", out, re.M) and re.search(
        r"^  adam_epsilon +1e-08$", out, re.M
    )


def test_a_first_start_without_a_seed_or_a_gpu(tmp_path, capsys, command):  # noqa: F811
    changes = {"seed": None, "mixed_precision": "bf16", "use_8bit_adam": True, "resume_from_checkpoint": "latest"}
    words = command("lcm", tmp_path / "out", max_train_steps=1, **changes)
    train([*words, "--dry_run"])
    out = capsys.readouterr().out
    assert "not given, so" in out and "seed=" not in out and "Note" not in out  # the run draws another
    train(words)
    out = capsys.readouterr().out
    assert re.search(r"--data_seed=(\d+)\s.*--seed=\1\b", out, re.S) and "starts anew" not in out
    assert "Note: this runs on the CPU, with bf16 and 8-bit Adam, made for GPUs" in out


@pytest.mark.parametrize(("total", "every", "lines"), [(6, 1, 6), (1000, 10, 100), (100_000, 10, 100), (250, 100, 3)])
def test_a_log_file_gets_a_hundred_lines(capsys, total, every, lines):
    progress = screen.Progress(0, total, is_shown=True)
    for step in range(1, total + 1):
        progress.update()
        if step % every == 0 or step == total:
            progress.show({"loss": 0.5, "samples_per_second": 4.0, "samples_skipped": 0, "updates_skipped": 3})
    err = capsys.readouterr().err.splitlines()
    assert len(err) == lines and err[-1] == f"step {total} of {total}, loss 0.5, 4 samples/s, 3 updates skipped"


@pytest.mark.parametrize(("rows", "is_bar"), [(40, True), (0, False)])
def test_a_terminal_gets_a_bar_but_for_one_without_a_size(monkeypatch, rows, is_bar):
    """tqdm would show nothing on the second."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, 119, 0, 0))
    with open(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        progress = screen.Progress(0, 2, is_shown=True)
        progress.update()
        progress.show({"loss": 0.5, "samples_per_second": 4.0})
        said = b""
        while b"samples/s" not in said and select.select([main], [], [], 10)[0]:  # what is written comes in parts
            said += os.read(main, 10_000)
        monkeypatch.undo()
        progress.bar.close()
    os.close(main)
    said = said.decode()
    assert ("1/2" in said) == is_bar and ("step 1 of 2" in said) != is_bar and "loss 0.5, 4 samples/s" in said


def test_a_silent_log_gets_a_line_after_ten_minutes_and_other_processes_print_nothing(capsys, monkeypatch):
    times = iter(range(0, 100_000, 700))
    monkeypatch.setattr(screen.time, "monotonic", lambda: next(times))
    for is_shown in (True, False):
        progress = screen.Progress(0, 100_000, is_shown)
        progress.update(), progress.show({"loss": 0.5, "samples_per_second": 4.0})
    assert capsys.readouterr().err.count("\n") == 1


def test_a_gpus_memory_is_said_after_the_first_update(monkeypatch, capsys):
    there = types.SimpleNamespace(total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 19.125 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: there)
    screen.say_memory(torch.device("cpu"))
    screen.say_memory(torch.device("cuda", 0))
    assert capsys.readouterr().out == "memory of the first update: 19.12 GiB of 24.00 GiB\n"


def test_the_plan_holds_what_a_simulation_counts(tmp_path, capsys, command):
    """Weights, gradients and states, of a script with two optimizers."""
    words = command("tscd", tmp_path / "out", max_train_steps=2, stage_steps=1)
    with simulation.wishing(like_gpu=False):
        simulated = train([*words, "--dry_run"], SCRIPTS["tscd"])
    capsys.readouterr()
    train(words, SCRIPTS["tscd"])
    line = r"^  memory .*: weights (.*) MiB, gradients (.*) MiB, optimizer (.*) MiB$"
    said = re.search(line, capsys.readouterr().out, re.M)
    weights, states = (
        sum(size for what, size in simulated.parts.items() if what.startswith(name))
        for name in ("weights of", "optimizer states")
    )
    counted = [size / 2**20 for size in (weights, 4 * simulated.trained, states)]
    assert [float(number) for number in said.groups()] == pytest.approx(counted, rel=0.02)  # blocks of 512 bytes


def test_checkpoints_that_do_not_fit_are_told_at_the_start(tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr(screen.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2**20))
    train(command("lcm", tmp_path / "out", max_train_steps=1))
    assert "WARNING: the checkpoints do not fit; pass --checkpoints_total_limit\n" in capsys.readouterr().out


def test_the_time_is_said_once_from_the_second_log_entry(monkeypatch, capsys):
    seconds = itertools.count(0, 30)
    monkeypatch.setattr(screen.time, "monotonic", lambda: next(seconds))
    progress = screen.Progress(0, 1000, is_shown=True)
    for _ in range(3):
        for _ in range(10):
            progress.update()
        progress.show({"samples_per_second": 4.0})
    [said] = re.findall("^time: .*", capsys.readouterr().out, re.M)
    each, left = re.match(r"time: (\S+) s an update, (\S+) for those to come, until \w+ \d\d:\d\d; ", said).groups()
    assert float(each) >= 3 and left == str(datetime.timedelta(seconds=round(980 * float(each))))


def test_a_gpu_without_memory_ends_a_run_in_one_sentence(monkeypatch, capsys):
    @training_run.user_errors
    def main(args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity ...")

    with pytest.raises(SystemExit) as ended:
        main(types.SimpleNamespace())
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Tried to allocate 2.00 GiB (test_screen.py, line " in said and "plan" in said
