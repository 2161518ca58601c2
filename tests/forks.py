"""Lives of a run as forks of the test's process, which has the libraries loaded, so that each costs seconds.

Autograd does not survive a fork: a process that forks must not have trained anything itself.
"""

import contextlib
import os
import signal
import sys

from tests.cases import train


def life(words, script, log, hook=lambda: None):
    """Fork a process that runs the script: its id. hook: called in it before the run; its output goes to `log`."""

    def body():
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1), os.dup2(out, 2)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(out), "w", buffering=1) for _ in range(2))
        signal.alarm(600)
        hook()
        train(words, script)

    return fork(body)


def fork(body):
    """Fork a process that calls `body` and leaves, with the code of a SystemExit, or 1 after any other error."""
    sys.stdout.flush(), sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        body()
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def end_of(process):
    """The exit code of a fork, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def is_running(process):
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def run(words, script, log, hook=lambda: None):
    return end_of(life(words, script, log, hook))
