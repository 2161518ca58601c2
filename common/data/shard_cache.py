"""Where remote shards are kept: in TMPDIR while they are read, or in a cache.

The cache is a folder of whole shards that the processes of a node share: what one has fetched, none fetches again. A
shard is written as NAME.part, under a lock that goes with its process, and renamed when it is whole. Others follow
the growing file; where its writer is killed, the first of them goes on. Left out: network file systems without locks.
"""

import fcntl
import hashlib
import math
import os
import re
import shutil
import tempfile
from pathlib import Path

from common.data.shards import tar_suffix
from common.data.transfers import length_of
from common.errors import UserError, without_credentials

MOST_AHEAD = 8  # shards; each is an open file


class ShardCache:
    """folder: of the cache. max_bytes: of its whole shards, of which those that were read longest ago go."""

    def __init__(self, folder, max_bytes: float | None = None):
        self.folder, self.max_bytes = Path(folder), max_bytes

    def prepare(self):
        """Make the folder and clear what killed processes left. UserError where it cannot be written or locked."""
        test = self.folder / f"{os.getpid()}.{'0' * 16}.tar.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(test, "xb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            test.unlink()
            for path in self.folder.glob("*.part"):
                with open(path, "r+b") as file:
                    if lock(file) and _is(path, file):
                        path.unlink(missing_ok=True)
        except FileNotFoundError:
            pass  # another process was as quick
        except OSError as error:
            raise UserError(
                f"`shard_cache_dir`={self.folder} cannot be written or locked ({error.strerror}): name a folder on a "
                "local disk"
            ) from None

    def path(self, shard: str) -> Path:
        """The name of a shard and a digest of its address or command, without what a renewed signature changes."""
        words = re.findall(r"[\w.-]+", shard.partition("?")[0]) or ["shard"]
        name = next((word for word in reversed(words) if tar_suffix(word)), words[-1])
        stem = name.removesuffix(tar_suffix(name))[-80:]
        digest = hashlib.sha256(without_credentials(shard).encode()).hexdigest()[:16]
        return self.folder / f"{stem}.{digest}.tar"

    def open(self, shard: str):
        """The whole shard, or None."""
        path = self.path(shard)
        try:
            file = open(path, "rb")
        except FileNotFoundError:
            return None
        os.utime(path)  # read last of all
        return file

    def begin(self, shard: str):
        """(file, whether it is ours to write): a new empty .part, that which another process writes, or the shard."""
        part = self._part(shard)
        while True:
            if (whole := self.open(shard)) is not None:
                return whole, False
            file = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
            if not lock(file):
                return file, False
            if _is(part, file) and os.path.getsize(part) == 0:
                return file, True
            if _is(part, file):  # left by a killed process
                part.unlink(missing_ok=True)
            file.close()

    def has(self, shard: str, file) -> bool:
        """Whether an open file is the whole shard by now."""
        return _is(self.path(shard), file)

    def keep(self, shard: str, file):
        """Our whole .part becomes the shard; the oldest go where that is too much."""
        path = self.path(shard)
        if not _is(self._part(shard), file):
            return  # its first writer failed and gave it up: of use to this process alone
        os.fsync(file.fileno())
        os.replace(self._part(shard), path)
        fcntl.flock(file, fcntl.LOCK_UN)
        if self.max_bytes is None:
            return
        found = []
        for other in self.folder.glob(f"*.{'[0-9a-f]' * 16}.tar"):
            try:
                stat = other.stat()
            except FileNotFoundError:
                continue
            found.append((stat.st_mtime_ns, stat.st_size, other))
        total = sum(size for _, size, _ in found)
        for _, size, other in sorted(found):
            if total > self.max_bytes and other != path:
                other.unlink(missing_ok=True)
                total -= size

    def give_up(self, shard: str, file):
        """Remove our .part."""
        if _is(self._part(shard), file):
            self._part(shard).unlink(missing_ok=True)

    def forget(self, shard: str):
        """Remove a shard that turned out to be damaged, or none."""
        self.path(shard).unlink(missing_ok=True)

    def _part(self, shard):
        path = self.path(shard)
        return path.with_name(path.name + ".part")


def lock(file) -> bool:
    """Lock an open file, until it is closed or its process dies; whether nobody else had."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is(path, file) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def shards_ahead(size: int | None, block_bytes: int) -> int:
    """How many shards of a size a lane fetches ahead: as many as a block may need; one where it is not known."""
    return min(MOST_AHEAD, 1 + block_bytes // size) if size else 1


def temporary_room(
    shard: str, lanes: int, disk_bytes: float | None = None, block_bytes: int = 0
) -> tuple[float | None, str]:
    """(what the shards of a process may take in TMPDIR, a note on that or ""); shard: one of them.

    Raises UserError where TMPDIR cannot be written, or holds no shard for each lane.
    """
    flag, processes = "`train_shards_path_or_url`", int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    way_out = "set TMPDIR to a folder on a disk with room, or pass `shard_cache_dir`"
    try:
        folder = tempfile.gettempdir()
        tempfile.TemporaryFile().close()
        free = shutil.disk_usage(folder).free / processes
    except OSError as error:
        raise UserError(f"{flag}: TMPDIR cannot be written ({error.strerror}): {way_out}") from None
    size = length_of(shard)
    least = lanes * (size or 0)
    if least > free:
        raise UserError(
            f"{flag}: TMPDIR={folder} has {free / 1e9:.1f} GB for a process, and its {lanes} lanes need "
            f"{least / 1e9:.1f} for a shard each: {way_out}"
        )
    most = least * (1 + shards_ahead(size, block_bytes))
    if most > min(free, disk_bytes or math.inf):
        disk_bytes = min(0.9 * free, disk_bytes or math.inf)
    need = f"{most / 1e9:.1f} GB" if size else "two shards a lane"
    if free < most:
        return disk_bytes, f"TMPDIR={folder} has no room for {need} a process, so less is fetched ahead: {way_out}"
    return disk_bytes, ""
