"""Files that are whole or not there, whoever dies while they are written, and settings that all writers agree on."""

import contextlib
import glob
import json
import os
import uuid
from pathlib import Path

from common import lock
from common.errors import UserError, blame


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


def check_settings(path, settings, what, free=()):
    """`check_place`, and UserError unless `path` there holds these settings, or more.

    what: of the folder, in words. free: names that may differ. Returns the file's bytes, or None where there is none.
    """
    check_place(path)
    if not path.is_file():
        return None
    flag = f"`output_dir`={path.parent}"
    with blame(f"{flag}: its {path.name} cannot be read", OSError, ValueError, TypeError, way_out="name a new folder"):
        text = path.read_bytes()
        there = dict(json.loads(text))
    here = json.loads(json.dumps(settings))
    changed = [key for key in sorted(here) if key not in free and there.get(key) != here[key]]
    if changed:
        listed = ", ".join(f"{key} was {there.get(key)!r} and is {here[key]!r}" for key in changed)
        raise UserError(
            f"{flag} holds {what} of other settings: {listed}; repeat the command that began it, or name a new folder"
        )
    return text


def write_settings(path, settings, what, free=()):
    """Write the settings, or take those which are there, if they are the same; called by every task.

    Returns the file's bytes, equal for all tasks. The first that comes writes it. UserError as of `check_settings`.
    """
    if check_settings(path, settings, what, free) is None:
        text = json.dumps(settings, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole(path, replace=False) as unfinished:
                unfinished.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"`output_dir`={path.parent} cannot be written ({error.strerror}); name another folder"
            ) from None
    return check_settings(path, settings, what, free)
