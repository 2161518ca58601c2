"""Every script under `accelerate launch`, as one process and as two, stopped by real signals, and going on from there.

What is compared with the run that was left alone is all that a checkpoint holds.
"""

import re

from tests.cases import CASES, command, contents, launch
from tests.forks import run
from tests.run.test_preemption import SENDS, saved_at_a_stop

import pytest

ENGINE = """
from accelerate import Accelerator
from accelerate.state import PartialState
prepare = Accelerator.prepare
def checked(self, *args, **kwargs):
    print("ENGINE", self.distributed_type.value, PartialState().backend, self.num_processes, flush=True)
    return prepare(self, *args, **kwargs)
Accelerator.prepare = checked
"""
# To the training process alone; as the end of a job sends it, to the launcher and all that it started, which the
# launcher dies of. With two processes to the second rank alone; SIGTERM to torchrun is in test_launchers.py.
SELF, JOB = "os.kill(os.getpid(), signal.{})", "os.killpg(0, signal.{})"
TO = {1: [("SIGUSR1", SELF), ("SIGTERM", JOB)], 2: [("SIGUSR1", SELF)]}
SIX = [name for name in CASES if name not in ("ct ect", "direct lora")]


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("name", SIX)
def test_a_run_that_a_signal_stops_is_saved_once_and_goes_on(tmp_path, made, name, num_processes):
    case, log = CASES[name], tmp_path / "log"
    options = {"max_train_steps": 6, "checkpointing_steps": 6, "train_batch_size": 2}
    options |= {"data_lanes": None if "direct" in name else 8, "stage_segments": "2,1" if "tscd" in name else None}
    options |= {"dataloader_num_workers": 1 if name == "tscd_lora" else None}
    start = {"num_processes": num_processes, "script": case.script}

    def finish(folder, **changes):
        """A run without signals to its end: what it says."""
        words = command(case, made, folder, **options, **changes)
        if num_processes == 1:
            assert run(words, case.script, log) == 0, log.read_text()[-3000:]
            return log.read_text()
        done = launch(words, prelude=ENGINE, **start)
        assert done.returncode == 0 and "ENGINE MULTI_CPU gloo 2" in done.stdout, done.stderr[-3000:]
        return done.stdout

    finish(tmp_path / "a")
    expected = contents(tmp_path / "a" / "checkpoint-6")
    for number, send in TO[num_processes]:
        out = tmp_path / number
        prelude = SENDS.format(rank=num_processes - 1, send=send.format(number), poison=False)
        stopped = launch(command(case, made, out, **options), prelude=prelude, **start)
        step, _ = saved_at_a_stop(out, stopped)
        assert step == 2 and f"stopped for {number}" in stopped.stdout
        if send is SELF:  # the launcher lives, and says how its process ended
            assert stopped.returncode == 1 and re.search(r"(exit status|exitcode *:) 75", stopped.stderr)
        assert "at step 2" in finish(out, resume_from_checkpoint="latest")
        assert contents(out / "checkpoint-6") == expected and (out / "README.md").is_file()
        assert not (out / "REQUEUE").exists() and not (out / "STOP").exists()
