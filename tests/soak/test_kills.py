"""Kill -9 again and again, resume, and compare with the run that was left alone; and disks that fail during a save.

    python -m pytest tests/soak                                      # 20 kills a script
    SOAK_KILLS=5 SOAK_SEED=1 SOAK_SUMMARY=soak.md python -m pytest tests/soak -n 0

Each life of a run is a fork of this process, which has the libraries loaded, so that a kill costs seconds. Half of the
kills come at a random call inside a save, half at a random moment. What is compared is all that a checkpoint holds:
weights, optimizer, EMA, learning-rate schedule, discriminator, the random states of the process, counters, and the
place in the data.
"""

import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

from common.run import checkpointing
from common.run.preemption import Stopper
from tests.cases import CASES, command, contents
from tests.forks import end_of, is_running, life, run

import pytest

KILLS = int(os.environ.get("SOAK_KILLS", "20"))
SEED = int(os.environ.get("SOAK_SEED", "0"))
SUMMARY = os.environ.get("SOAK_SUMMARY")
STEPS, EVERY = 24, 2
every_case = pytest.mark.parametrize("name", CASES)


def marking(marker):
    """A hook: the moment of every update, and that of the loop's beginning, as lines of the file `marker`."""

    def hook():
        construct, check = Stopper.__init__, Stopper.check

        def note():
            with open(marker, "a") as file:
                file.write(f"{time.monotonic()}\n")

        def constructed(self, *args):
            construct(self, *args)
            note()

        def checked(self):
            note()
            return check(self)

        Stopper.__init__, Stopper.check = constructed, checked

    return hook


def counting(save_number, kill_at, counts):
    """A hook: count the calls, Python's and C's, inside each save; kill -9 at call `kill_at` of save `save_number`."""

    def hook():
        save, saves = checkpointing.save_checkpoint, []

        def watched(*args):
            saves.append(0)

            def event(frame, kind, argument):
                if kind in ("call", "c_call"):
                    saves[-1] += 1
                    if len(saves) == save_number and saves[-1] == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.setprofile(event)
            try:
                return save(*args)
            finally:
                sys.setprofile(None)
                if counts is not None:
                    counts.write_text(str(saves[-1]))

        checkpointing.save_checkpoint = watched

    return hook


@pytest.fixture
def start(made):
    """start(name of a case, folder, **changes): (the script, its command line)."""
    return lambda name, folder, **changes: (command(CASES[name], made, folder, **changes), CASES[name].script)


@every_case
def test_killed_again_and_again_a_run_ends_where_the_uninterrupted_one_does(tmp_path, start, name):
    draw, log = random.Random(f"{SEED} {name}"), tmp_path / "log"
    options = {"max_train_steps": STEPS, "checkpointing_steps": EVERY, "checkpoints_total_limit": 3}
    options |= {"report_to": "none", "gradient_accumulation_steps": 2, "logging_steps": 3, "train_batch_size": 2}
    options |= {"stage_segments": "4,2,1"} if "tscd" in name else {"pretrain_steps": 6} if name == "ct ect" else {}
    count, mark = counting(0, 0, tmp_path / "calls"), marking(tmp_path / "moments")
    code = run(*start(name, tmp_path / "a", **options), log, lambda: (count(), mark()))
    assert code == 0, log.read_text()[-3000:]
    moments = [float(line) for line in (tmp_path / "moments").read_text().splitlines()]
    seconds, calls = (moments[-1] - moments[0]) / STEPS, int((tmp_path / "calls").read_text())
    expected = contents(tmp_path / "a" / f"checkpoint-{STEPS}")
    kills, rounds, equal = {"save": 0, "anywhere": 0}, 0, 0
    while sum(kills.values()) < KILLS:
        out = tmp_path / f"b{rounds}"
        rounds += 1
        while True:
            resume = {"resume_from_checkpoint": "latest"} if out.exists() else {}
            enough = sum(kills.values()) >= KILLS
            inside = not enough and kills["save"] <= kills["anywhere"]
            looping = tmp_path / "looping"
            looping.unlink(missing_ok=True)
            hook = counting(draw.choice((1, 1, 2)), draw.randint(1, calls), None) if inside else marking(looping)
            process = life(*start(name, out, **options, **resume), log, hook)
            if not inside and not enough:
                if draw.random() < 0.8:  # in the loop; else from the start on, while it loads
                    while not looping.exists() and is_running(process):
                        time.sleep(0.01)
                time.sleep(draw.uniform(0, 6 * seconds))
                os.kill(process, signal.SIGKILL)
            code = end_of(process)
            assert code in (0, -signal.SIGKILL), log.read_text()[-3000:]
            if code == 0:
                break
            kills["save" if inside else "anywhere"] += 1
            checkpoints = [c for c in checkpointing.list_checkpoints(out) if not checkpointing.completeness(c)]
            assert checkpoints == checkpointing.list_checkpoints(out)  # what has its name is whole
        equal += contents(out / f"checkpoint-{STEPS}") == expected
        assert not list(out.glob("*.tmp"))
        shutil.rmtree(out)
    row = f"| {name} | {sum(kills.values())} | {kills['save']} | {kills['anywhere']} | {rounds} | {equal} |"
    print(row)
    if SUMMARY:
        with open(SUMMARY, "a") as file:
            file.write(row + "\n")
    assert equal == rounds, row


@every_case
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95, "read-only"])
def test_a_folder_that_cannot_be_written_to_during_a_save_costs_that_checkpoint_alone(tmp_path, start, name, share):
    """A file cannot grow beyond a share of the largest one's size, as on a disk that fills up early or late."""
    if share == "read-only" and os.geteuid() != 0:
        pytest.skip("gives up root's rights in the middle of a run")
    log, out = tmp_path / "log", tmp_path / "out"
    assert run(*start(name, tmp_path / "a"), log) == 0, log.read_text()[-3000:]

    def fails():
        save, saves = checkpointing.save_checkpoint, []

        def limited(*args):
            saves.append(1)
            if len(saves) == 2 and share == "read-only":
                os.chmod(out, 0o555)
                os.seteuid(65534)
            elif len(saves) == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * largest), resource.RLIM_INFINITY))
            return save(*args)

        checkpointing.save_checkpoint = limited

    largest = max(path.stat().st_size for path in (tmp_path / "a" / "checkpoint-4").iterdir())
    assert run(*start(name, out), log, fails) == 2, log.read_text()[-3000:]
    lines = [line for line in log.read_text().splitlines() if "error: " in line]
    assert len(lines) == 1 and "the checkpoint of step 4 could not be written (" in lines[0], lines
    assert ("ermission" in lines[0]) == (share == "read-only")
    os.chmod(out, 0o755)
    assert [c.name for c in checkpointing.list_checkpoints(out)] == ["checkpoint-2"] and not list(out.glob("*.tmp"))
    assert run(*start(name, out, resume_from_checkpoint="latest"), log) == 0
    assert contents(out / "checkpoint-4") == contents(tmp_path / "a" / "checkpoint-4")


@every_case
def test_a_disk_that_is_full_during_the_export_costs_the_export_alone(tmp_path, start, name):
    log, out = tmp_path / "log", tmp_path / "out"

    def fills_up():
        save = checkpointing.save_checkpoint

        def limited(accelerator, output_dir, global_step, *args):
            path = save(accelerator, output_dir, global_step, *args)
            if global_step == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
            return path

        checkpointing.save_checkpoint = limited

    assert run(*start(name, out, report_to="none"), log, fills_up) == 2, log.read_text()[-3000:]
    lines = [line for line in log.read_text().splitlines() if "error: " in line]
    assert len(lines) == 1 and "File too large" in lines[0] and "make room and resume" in lines[0], lines
    expected = contents(out / "checkpoint-4")
    assert run(*start(name, out, report_to="none", resume_from_checkpoint="latest"), log) == 0, log.read_text()[-3000:]
    assert contents(out / "checkpoint-4") == expected and (out / "README.md").is_file()


@every_case
def test_every_file_of_a_checkpoint_is_missed_by_name_and_latest_falls_back(tmp_path, start, name):
    log, out = tmp_path / "log", tmp_path / "out"
    assert run(*start(name, out), log) == 0, log.read_text()[-3000:]
    expected = contents(out / "checkpoint-4")
    for file in sorted(path.name for path in (out / "checkpoint-4").iterdir()):
        for damage in ("truncated", "missing"):
            broken = tmp_path / f"{file}-{damage}"
            shutil.copytree(out, broken)
            victim = broken / "checkpoint-4" / file
            if damage == "missing":
                victim.unlink()
            else:
                victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
            words = tmp_path / f"{broken.name}.log"
            named = start(name, broken, resume_from_checkpoint="checkpoint-4")
            assert run(*named, words) == 2 and file in words.read_text(), words.read_text()[-3000:]
            words.unlink()
            latest = start(name, broken, resume_from_checkpoint="latest")
            if (file, damage) in (("model.safetensors", "truncated"), ("optimizer.bin", "missing")):
                assert run(*latest, words) == 0
                assert "checkpoint-4 is passed over: " in words.read_text()
                assert f"resumed from {broken / 'checkpoint-2'} at step 2" in words.read_text()
                assert contents(broken / "checkpoint-4") == expected
            else:  # the choice alone
                found = checkpointing.find_checkpoint(broken, "latest", lambda line: None)
                assert found == Path(broken, "checkpoint-2")
            shutil.rmtree(broken)
