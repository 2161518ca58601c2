"""Ending a run early without losing anything: a time limit, a STOP file, or a signal.

Each process notes what asks for an end; after every update all of them agree, save one checkpoint and leave with
EXIT_CODE. A REQUEUE file in the output folder says that starting the same command again goes on; the launcher's own
exit code says nothing (torchrun turns every other one into 1). See docs/slurm/.
"""

import contextlib
import json
import os
import signal
import threading
import time
from pathlib import Path

from common.errors import UserError
from common.flags import spelled

import torch

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: stopped, start again to go on
STOP, REQUEUE = "STOP", "REQUEUE"
END_TIME = "SLURM_JOB_END_TIME"  # seconds since 1970, set by SLURM
REASONS = ("", "the job's time limit", f"a {STOP} file", "SIGUSR1", "SIGTERM")
_received = []  # indices into REASONS


@contextlib.contextmanager
def noting_signals():
    """SIGTERM and SIGUSR1 are noted inside the block, for `Stopper`, and do nothing else."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python can set handlers in the main thread alone
        return
    _received.clear()
    numbers = (signal.SIGUSR1, signal.SIGTERM)
    before = {number: signal.signal(number, _note) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _note(number, frame):
    _received.append(REASONS.index(signal.Signals(number).name))


def clear_marks(output_dir):
    """Remove the STOP and REQUEUE files of an earlier run. Main process only."""
    for name in (STOP, REQUEUE):
        Path(output_dir, name).unlink(missing_ok=True)


def job_deadline(stop_margin):
    """Seconds since 1970 at which a run stops, `stop_margin` seconds before its job ends; None outside of SLURM.

    Raises UserError where the job has no more than the margin left.
    """
    text = os.environ.get(END_TIME)
    if not text:
        return None
    left = int(text) - time.time()
    if left <= stop_margin:
        raise UserError(
            f"`stop_margin`={stop_margin}: the job ends in {left:.0f} seconds by {END_TIME}; ask for more time, or "
            "lower the margin"
        )
    return int(text) - stop_margin


class Stopper:
    """Asks after every update whether the run is to stop, with the same answer on every process.

    stop_margin: seconds before the end of a SLURM job. start_step: the updates that were done before this start.
    `stops` is whether the last `check()` said so. Every process constructs one, at the same place.
    """

    def __init__(self, accelerator, output_dir, stop_margin, start_step):
        self.output_dir, self.start_step, self.stops = Path(output_dir), start_step, False
        self.is_main, self.reason = accelerator.is_main_process, 0
        self.deadline = job_deadline(stop_margin)
        # Of its own, on the host: no process waits for its GPU to ask.
        self.group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    def check(self):
        """Whether all processes stop now, because any of them was asked to; called by all, after every update."""
        late = self.deadline is not None and time.time() >= self.deadline
        file = self.is_main and (self.output_dir / STOP).exists()
        self.reason = max([1 if late else 0, 2 if file else 0, *_received])
        if self.group is not None:
            reason = torch.tensor(self.reason)
            torch.distributed.all_reduce(reason, torch.distributed.ReduceOp.MAX, group=self.group)
            self.reason = int(reason)
        self.stops = self.reason > 0
        return self.stops

    def exit_if_stopped(self, global_step):
        """Nothing for a run that was not stopped. Else leave REQUEUE, if the run got on, and exit with EXIT_CODE.

        After the checkpoint and the end of the trackers; called by all processes.
        """
        if not self.stops:
            return
        if self.is_main:
            advanced = global_step > self.start_step
            if advanced:
                mark = {"global_step": global_step, "reason": REASONS[self.reason]}
                (self.output_dir / REQUEUE).write_text(json.dumps(mark) + "\n")
            go_on = spelled("`resume_from_checkpoint`=latest goes on from there") if global_step else "start it again"
            says_so = f", {REQUEUE} says so" if advanced else ""
            print(f"stopped for {REASONS[self.reason]} after step {global_step}; {go_on}{says_so}", flush=True)
        raise SystemExit(EXIT_CODE)
