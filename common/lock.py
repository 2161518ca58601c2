"""One run per folder: a file RUNNING in it says who writes there, until that process ends or dies.

On the same host a dead owner is known at once, by its process. Elsewhere it is one that has not touched its file for
SILENCE seconds, by this process's own clock. `flock` is not asked: NFS and Lustre may not carry it to other hosts. The
file is also what every process of a run looks for in `output_dir`, to see that all of them write to the same storage.
"""

import contextlib
import json
import math
import os
import re
import socket
import sys
import threading
import time
import uuid
from pathlib import Path

from common.errors import UserError

NAME = "RUNNING"  # with .I-of-N where N tasks share the folder, and each writes a part of its own
BEAT, SILENCE = 15, 75  # seconds between two touches; after which an owner counts as dead
SIGHT = 30  # seconds until a file must be seen by all processes: what caches of NFS take
_held = []


class Lock:
    """A lock that this process holds: `path`, its file; `owner`, what the file says."""

    def __init__(self, path, owner, made_folder):
        self.path, self.owner, self.made_folder, self._ended = path, owner, made_folder, threading.Event()
        threading.Thread(target=self._beat, daemon=True, name="lock").start()

    def _beat(self):
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):  # a server that is away for a moment, a file that somebody deleted
                found = _read(self.path) or {}
                if found == self.owner:
                    os.utime(self.path)
                elif "token" in found and not self._ended.is_set():  # whole, and another's
                    print(f"{self.path}: another run has taken the folder, this one ends", file=sys.stderr, flush=True)
                    os._exit(2)

    def release(self):
        """Delete the file, and the folder where it was made for it and nothing else came into it."""
        self._ended.set()
        if self.owner["pid"] != os.getpid():
            return  # a fork of the owner
        with contextlib.suppress(OSError):
            if self.path.read_text() == json.dumps(self.owner):
                self.path.unlink()
            if self.made_folder:
                self.path.parent.rmdir()


@contextlib.contextmanager
def releasing():
    """What is taken inside the block is released at its end, whatever the end."""
    before = len(_held)
    try:
        yield
    finally:
        while len(_held) > before:
            _held.pop().release()


def contents(folder):
    """The names in a folder but those of locks; an empty set where there is no folder."""
    names = {path.name for path in Path(folder).iterdir()} if Path(folder).is_dir() else set()
    return {name for name in names if _part(name.removeprefix(".").removesuffix(".taken")) is None}


def take(folder, part=(0, 1), report=print):
    """Create the folder and its lock, to be released by `releasing`. Returns the Lock.

    part: (index, count) of a task that shares the folder and writes what `range(index, n, count)` numbers. UserError
    where a living process writes the same, or the folder cannot be written to.
    """
    folder, index, count = Path(folder), *part
    path = folder / (NAME if count == 1 else f"{NAME}.{index}-of-{count}")
    owner = _me()
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while not _create(path, json.dumps(owner)):
            _clear([path], report)
        lock = Lock(path, owner, made)
        _held.append(lock)
        others = [p for p in folder.iterdir() if p != path and _overlap(_part(p.name), part)]
        _clear(others, report)
    except OSError as error:
        raise UserError(
            f"`output_dir`={folder} cannot be written to ({error.strerror}); name another folder"
        ) from None
    return lock


def is_seen(folder, owner):
    """Whether this process finds the lock of `owner` in `folder`; as `wait_for`."""
    return wait_for(folder, lambda: _read(Path(folder, NAME)) == owner)


def wait_for(folder, has_come):
    """Whether has_come() turns true within SIGHT seconds, of a file that another process wrote into `folder`."""
    end = time.monotonic() + SIGHT
    while True:
        with contextlib.suppress(OSError):  # a folder that is not there, or that this process may not read
            if has_come():
                return True
            os.listdir(folder)  # has NFS look again
        if time.monotonic() > end:
            return False
        time.sleep(0.2)


def _part(name):
    """(index, count) of a lock's name, None for other names."""
    found = re.fullmatch(rf"{NAME}(?:\.(\d+)-of-(\d+))?", name)
    return found and (int(found[1] or 0), int(found[2] or 1))


def _overlap(one, other):
    """Whether two tasks write the same: some number is index + a multiple of count for both."""
    return one is not None and (one[0] - other[0]) % math.gcd(one[1], other[1]) == 0


def _me():
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": _machine(),
        "process_start": _process_start(os.getpid()),
        "token": uuid.uuid4().hex,
    }


def _machine():
    """Where a process number means one process: this boot of this machine, and the container's numbering. None where
    the system does not say: a host's name alone may be another host's too."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _process_start(pid):
    """What tells a process from a later one of its number; None where the system does not say, "" for a dead one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "" if fields[0] in "ZX" else fields[19]


def _read(path):
    """What a lock's file says; {} for an empty one, whose maker died; None where there is none."""
    try:
        text = path.read_text()
        owner = json.loads(text) if text else {}
        return owner if not text or {"host", "pid", "token", "machine"} <= owner.keys() else {"foreign": True}
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError):
        return {"foreign": True}


def _create(path, text):
    """Whether the file was created; the first that comes creates it."""
    try:
        file = open(path, "xb", buffering=0)
    except FileExistsError:
        return False
    with file:
        try:
            file.write(text.encode())
        except OSError:
            path.unlink()  # rather than leave one without a name on a full disk
            raise
    return True


def _is_dead(owner):
    """True or False where that is known at once, else None."""
    if owner["machine"] is not None and owner["machine"] == _machine():
        try:
            os.kill(owner["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # another user's
        start = _process_start(owner["pid"])
        return start is not None and start != owner.get("process_start")
    return None


def _clear(paths, report):
    """Delete the locks of dead owners; UserError for one that lives."""
    found = {path: owner for path in paths if (owner := _read(path)) is not None}
    silent = {}
    for path, owner in found.items():
        if owner.get("foreign"):
            raise UserError(f"`output_dir`={path.parent}: the file {path.name} in it is no run's; name a new folder")
        dead = _is_dead(owner) if owner else None
        if dead is False:
            raise UserError(_in_use(path, owner))
        if dead is None:
            silent[path] = _touched(path)
    if silent:
        path = next(iter(silent))
        report(f"{path} is of {_name(found[path])}: waiting {SILENCE} seconds for a sign of life")
    end = time.monotonic() + SILENCE
    while silent and time.monotonic() < end:
        time.sleep(min(1, SILENCE / 10))
        now = {path: _touched(path) for path in silent}
        for path, touched in now.items():
            if touched is None:  # its owner has ended
                del silent[path]
            elif touched != silent[path]:
                raise UserError(_in_use(path, _read(path) or found[path]))
    for path, owner in found.items():
        _delete_dead(path, owner, report)


def _touched(path):
    """When the file was last touched, by its server's clock; None where it is gone. Opening has NFS look again."""
    try:
        with open(path) as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _delete_dead(path, owner, report):
    """Delete the file unless another start was faster, and has its own there by now."""
    guard = path.with_name(f".{path.name}.taken")
    if not _create(guard, ""):  # another start is at it
        with contextlib.suppress(FileNotFoundError):
            if abs(time.time() - guard.stat().st_mtime) > 60:  # a server's clock may be ahead
                guard.unlink()  # of a start that died in between
        time.sleep(0.1)
        return
    try:
        if _read(path) == owner:
            path.unlink()
            report(f"{path} was left by {_name(owner)}, which is dead")
    finally:
        guard.unlink()


def _name(owner):
    if not owner:
        return "a run that wrote no name"
    return f"process {owner['pid']} on {owner['host']}, started {owner.get('started')}"


def _in_use(path, owner):
    return (
        f"`output_dir`={path.parent} is in use by {_name(owner)}; wait for it, stop it, or name another folder (if it "
        f"is known to be dead, or this is a copy of its folder, delete {path})"
    )
