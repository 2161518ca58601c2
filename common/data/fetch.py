"""Remote shards: files that grow. A thread fetches a shard while it is read, and each lane's next ones ahead of it.

http(s) and fsspec go on where a transfer broke. A command runs again, and so does a server that knows no ranges; what
they send must begin with what is there. A shard is whole when its length and the command's exit code are right.
Threads start where a process first reads, so none crosses a fork.
"""

import contextlib
import errno
import functools
import io
import os
import tempfile
import threading
from collections.abc import Callable, Sequence

from common.data.shard_cache import ShardCache, lock, shards_ahead
from common.data.shards import SampleError, is_remote
from common.data.transfers import retry_after, transfer

TRIES, BACKOFF = 3, 1.0  # seconds before the second try, doubled for each further one
MAX_RETRY_AFTER = 60  # seconds that a server's Retry-After may ask for
NEW_BYTES = 1 << 20  # a transfer that brought so many is no failed try, where the next one goes on behind it


def open_shard(shard: str, timeout: float):
    """A seekable binary file of a whole shard; SampleError where it does not come. timeout: of a command, in seconds
    without a byte."""
    file = Shelf(timeout).open(0, shard)
    try:
        if is_remote(shard):
            file.raw.fetch.wait_whole()
    except BaseException:
        file.close()
        raise
    return file


class Shelf:
    """The remote shards that a process reads, one a lane, and those that it fetches ahead for each lane.

    disk_bytes: what they may take together; fetching ahead waits for room, reading does not. cache: a `ShardCache`, in
    which they stay, whatever they take. block_bytes: what a lane reads at once, from several shards where they are
    small.
    """

    def __init__(
        self, timeout: float, disk_bytes: float | None = None, cache: ShardCache | None = None, block_bytes: int = 0
    ):
        self.timeout, self.disk_bytes, self.cache, self.block_bytes = timeout, disk_bytes, cache, block_bytes
        self._ahead, self._there, self._largest = {}, [], 0
        self._lock = threading.Lock()

    def begin(self, lane: int, shards: Sequence[str], after: "Fetch | None" = None):
        """Fetch shards that the lane will open next, one after the other, the first when `after` has come."""
        before, ahead = self._ahead.get(lane, {}), {}
        for shard in shards[: shards_ahead(self._largest_known(), self.block_bytes)]:
            if is_remote(shard) and shard not in ahead and not (self.cache and self.cache.path(shard).exists()):
                after = ahead[shard] = before.pop(shard, None) or self._start(shard, after)
        self._ahead[lane] = ahead
        for fetch in before.values():
            self._release(fetch)

    def open(self, lane: int, shard: str, following: Sequence[str] = ()):
        """A seekable binary file, in which a read waits for its bytes; of `following` some are fetched after it."""
        if not is_remote(shard):
            try:
                return open(shard, "rb")
            except OSError as error:
                raise SampleError("shard_open", str(error)) from error
        cached = self.cache and self.cache.open(shard)
        fetch = None if cached else self._ahead.get(lane, {}).pop(shard, None) or self._start(shard)
        self.begin(lane, following, fetch)
        return cached or io.BufferedReader(_Growing(fetch, self._release), 1 << 16)

    def forget(self, shard: str):
        """The cache does not keep a shard that was no whole tar."""
        if self.cache and is_remote(shard):
            self.cache.forget(shard)

    def close(self):
        """End all transfers; nothing is left of them."""
        self._ahead.clear()
        while self._there:
            self._there.pop().stop()

    def _start(self, shard, after=None):
        """The fetch of a shard, which lanes share that read parts of it at the same time."""
        for one in [one for one in self._there if one.ended and not one.users]:
            self._remove(one)
        fetch = next((one for one in self._there if one.shard == shard and not one.error), None)
        if fetch is None:
            fetch = Fetch(shard, self.timeout, self.cache)
            self._there.append(fetch)
            fetch.start(functools.partial(self._has_turn, fetch, after))
        fetch.users += 1
        return fetch

    def _release(self, fetch):
        fetch.users -= 1
        if not fetch.users and fetch in self._there and (fetch.ended or not self.cache):
            self._remove(fetch)

    def _remove(self, fetch):
        self._there.remove(fetch)
        fetch.stop()

    def _has_turn(self, fetch, after):
        """Whether a fetch ahead may begin; asked by its thread."""
        if after is not None and not after.ended:
            return False
        with self._lock:
            begun, largest = [one for one in list(self._there) if one.begun], self._largest_known()
            taken = sum(one.length or max(one.size, largest) for one in begun) + largest
            fetch.begun = after is None or self.disk_bytes is None or taken <= self.disk_bytes or bool(self.cache)
        return fetch.begun

    def _largest_known(self):
        sizes = [one.length or one.ended and one.size for one in list(self._there)]
        self._largest = max([self._largest, *sizes])
        return self._largest


class _Growing(io.RawIOBase):
    """A reader of a `Fetch`."""

    def __init__(self, fetch: "Fetch", release: Callable):
        self.fetch, self._release, self._position = fetch, release, 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=os.SEEK_SET):
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position}[whence]
        return self._position

    def readinto(self, buffer):
        count = self.fetch.read_at(self._position, buffer)
        self._position += count
        return count

    def close(self):
        if not self.closed:
            super().close()
            self._release(self.fetch)


class Fetch:
    """One remote shard on its way into a file, by a thread of its own."""

    def __init__(self, shard: str, timeout: float, cache: ShardCache | None = None):
        self.shard, self.timeout, self.cache = shard, timeout, cache
        self.file, self.size, self.length = None, 0, None  # the length of the whole is None while it is not known
        self.begun = self.needed = self.ended = False
        self.error, self.users = None, 0  # error: why the rest will not come
        self._stopped, self._abort, self._goes_on = False, lambda: None, True
        self._changed = threading.Condition()

    def start(self, has_turn: Callable[[], bool]):
        """The transfer begins when it has its turn, or is needed."""
        self._thread = threading.Thread(target=self._run, args=[has_turn], name="fetch a shard", daemon=True)
        self._thread.start()

    def read_at(self, position: int, buffer) -> int:
        """Fill in bytes from there on, at least one, and wait for it; 0 at the end. SampleError: it will not come."""
        with self._changed:
            self._wait_for(lambda: self.size > position or self.ended)
            count = min(len(buffer), self.size - position)
        if count > 0:
            return os.preadv(self.file.fileno(), [memoryview(buffer)[:count]], position)
        if self.error:
            raise SampleError("shard_read" if self.size else "shard_open", self.error)
        return 0

    def wait_whole(self):
        with self._changed:
            self._wait_for(lambda: self.ended)
        if self.error:
            raise SampleError("shard_open", self.error)

    def stop(self):
        """End the transfer and delete the file."""
        with self._changed:
            self._stopped = True
            self._abort()
            self._changed.notify_all()
        self._thread.join(5)  # fsspec cannot be interrupted: its thread ends with its next bytes
        if not self._thread.is_alive() and self.file is not None:
            self.file.close()

    def _wait_for(self, is_so):
        self.needed = True
        self._changed.notify_all()
        self._changed.wait_for(is_so)

    # ----- in the thread

    def _run(self, has_turn):
        error = None
        try:
            with self._changed:
                while not (self.needed or self._stopped or has_turn()):
                    self._changed.wait(0.1)
            self.begun = True
            if not self._stopped and self.cache is None:
                self.file = tempfile.TemporaryFile(buffering=0)
                self._fetch()
            elif not self._stopped:
                self._fetch_into_cache()
        except Exception as failure:  # each protocol has its own; all of them mean that it does not come
            error = f"{type(failure).__name__}: {failure}"
        with self._changed:
            self.error, self.ended = "it was stopped" if self._stopped else error, True
            self._changed.notify_all()
        if self._stopped and self.file is not None:
            self.file.close()

    def _fetch(self):
        failures = 0
        while not self._stopped:
            before = self.size
            try:
                with contextlib.closing(transfer(self.shard, self.size, self.timeout, self._hold)) as chunks:
                    self._receive(chunks)
                return
            except Exception as error:
                failures = 1 if self._goes_on and self.size - before >= NEW_BYTES else failures + 1
                if failures >= TRIES or self._stopped:
                    raise
                delay = max(BACKOFF * 2 ** (failures - 1), min(retry_after(error), MAX_RETRY_AFTER))
            self._sleep(delay)

    def _fetch_into_cache(self):
        self.file, ours = self.cache.begin(self.shard)
        whole = False
        while not (ours or whole or self._stopped):  # another process writes it, or has written it
            whole = self.cache.has(self.shard, self.file)
            self._grow_to(os.fstat(self.file.fileno()).st_size)
            if not whole and lock(self.file):  # it has ended
                ours = not (whole := self.cache.has(self.shard, self.file))
                self._grow_to(os.fstat(self.file.fileno()).st_size)
            elif not whole:
                self._sleep(0.02)
        if not ours:
            return
        try:
            self.file.seek(self.size)
            self._fetch()
            if not self._stopped:
                self.cache.keep(self.shard, self.file)
        finally:
            self.cache.give_up(self.shard, self.file)

    def _sleep(self, seconds):
        with self._changed:
            self._changed.wait_for(lambda: self._stopped, seconds)

    def _grow_to(self, size):
        with self._changed:
            self.size = size
            self._changed.notify_all()

    def _hold(self, abort):
        """abort: how another thread ends the transfer."""
        with self._changed:
            self._abort = abort
            if self._stopped:
                abort()

    def _receive(self, chunks):
        position, length = next(chunks)
        self._goes_on = position == self.size
        if position > self.size or length is not None and self.length not in (None, length):
            raise OSError("it is another file than at the first try")
        self.length = self.length if length is None else length
        for chunk in chunks:
            there = min(len(chunk), self.size - position)
            if there > 0 and os.pread(self.file.fileno(), there, position) != chunk[:there]:
                raise OSError("it sends other bytes than at the first try")
            position += len(chunk)
            left = memoryview(chunk)[max(0, there) :]
            while left and not self._stopped:
                left = left[self._write(left) :]
            if self._stopped:
                return
        if position < self.size or self.length not in (None, position):
            raise OSError(f"{position} of {self.length or self.size} bytes received")

    def _write(self, data):
        try:
            count = self.file.write(data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            where = f"`shard_cache_dir`={self.cache.folder}" if self.cache else f"TMPDIR={tempfile.gettempdir()}"
            raise OSError(f"{where} has no room ({error.strerror})") from None
        self._grow_to(self.size + count)
        return count
