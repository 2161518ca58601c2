"""Runs of a script in processes of their own, forked from a server that has the libraries loaded.

For the script it is the same as `accelerate launch`, but torch and diffusers are loaded once, not once a process. The
server has trained nothing: autograd does not survive a fork.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SECONDS = 300  # after which a run that hangs is killed

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.preloaded"])


def run_processes(words, script, num_processes=1, prelude=""):
    """Run `script` with the command line `words`: a CompletedProcess with the first bad exit code, or 0.

    script: the module. prelude: Python that each process runs before it. Where a process fails, the others are ended,
    as a launcher does. A signal's exit code is negative.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = os.environ | {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}
    with tempfile.TemporaryDirectory() as logs:
        processes = []
        for rank in range(num_processes):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            own = {name: str(value) for name, value in own.items()} if num_processes > 1 else {}
            outputs = [f"{logs}/{rank}.{name}" for name in ("out", "err")]
            arguments = (words, script.__name__, prelude, environ | own, outputs)
            processes.append(_server.Process(target=_body, args=arguments))
        for process in processes:
            process.start()
        code = _wait(processes)
        out, err = ("".join(path.read_text() for path in sorted(Path(logs).glob(f"*.{x}"))) for x in ("out", "err"))
    return subprocess.CompletedProcess([script.__file__, *words], code, out, err)


def _wait(processes):
    deadline, code = time.monotonic() + SECONDS, 0
    try:
        while any(process.is_alive() for process in processes):
            failed = [process.exitcode for process in processes if process.exitcode]
            code = code or min(failed, default=0)  # a signal, before the errors of those that wait for its process
            if code and deadline > time.monotonic() + 30:
                deadline = time.monotonic() + 30  # a launcher's patience with the others, whom it asks to stop
                for process in processes:
                    process.terminate()
            assert time.monotonic() < deadline, "the processes did not end"
            time.sleep(0.02)
    finally:
        for process in processes:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.join()
    return code or next((process.exitcode for process in processes if process.exitcode), 0)


def _body(words, script, prelude, environ, outputs):
    os.setsid()
    for fd, path in enumerate(outputs, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, fd)
        os.close(file)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(fd), "w", buffering=1) for fd in (1, 2))
    os.environ.clear()
    os.environ.update(environ)
    os.chdir("/")
    module = sys.modules[script]
    sys.argv = [module.__file__, *words]
    exec(prelude, {"__name__": "prelude"})
    module.main(module.parse_args())
