"""Files that are whole or not there, whoever dies while they are written."""

import contextlib
import glob
import os
import uuid
from pathlib import Path

from common import lock
from common.errors import UserError


@contextlib.contextmanager
def whole(path, replace=True):
    """A path to write to, whose file is on disk and becomes `path` at the end of the block; none where that fails.

    replace: whether a file that is there already makes way; else it stays. Where two write the same, either's is kept.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield unfinished
        try:
            sync(unfinished)
            if replace:
                unfinished.rename(path)
            else:
                os.link(unfinished, path)
        except FileExistsError:
            pass
        except FileNotFoundError:
            if not path.exists():  # else another was faster, and took this one's for a leftover
                raise
        sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):  # of a process that was killed at this file
        leftover.unlink(missing_ok=True)


def sync(path):
    """Have a file, or the names in a folder, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_place(path):
    """UserError unless the folder of `path` is new or empty, or holds `path`."""
    flag = f"`output_dir`={path.parent}"
    if path.parent.exists() and not path.parent.is_dir():
        raise UserError(f"{flag} is a file; name a folder")
    there = path.is_file() or all(name.endswith(".tmp") for name in lock.contents(path.parent))
    if not there and not path.is_file():  # nor has another task written it in between
        raise UserError(f"{flag} holds other files and no {path.name}; name an empty or new folder")
