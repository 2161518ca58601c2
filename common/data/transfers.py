"""How the bytes of a remote shard come: by http(s), by fsspec, or from a command; each from a place on if it can."""

import base64
import contextlib
import functools
import http.client
import os
import re
import select
import signal
import socket
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator

from common.data.shards import is_remote, quote_address, uses_fsspec

import fsspec

CHUNK = 1 << 18
SOCKET_TIMEOUT = 60  # seconds without a byte from an http server
# Ends the command and all that it started when our end of its standard input closes, however this process ends.
GUARD = """exec 3<&0 0</dev/null
(read -r _ <&3; kill -KILL -- -$$) >/dev/null 2>&1 &
exec 3<&- bash -o pipefail -c "$1"
"""


def read_head(shard: str, size: int = 1 << 16, timeout: float = 60) -> bytes:
    """The first bytes of a shard, without the rest; b"" for one that does not answer: the stream will say why."""
    head = bytearray()
    with contextlib.suppress(Exception):
        if not is_remote(shard):
            with open(shard, "rb") as file:
                return file.read(size)
        with contextlib.closing(transfer(shard, 0, timeout, lambda end: None)) as chunks:
            next(chunks)
            while len(head) < size and (chunk := next(chunks, b"")):
                head += chunk
    return bytes(head[:size])


def length_of(shard: str) -> int | None:
    """Bytes of a remote shard; None where nobody says."""
    with contextlib.suppress(Exception), contextlib.closing(transfer(shard, 0, 60, lambda end: None)) as chunks:
        return next(chunks)[1]
    return None


def retry_after(error) -> float:
    """The seconds that a server asks to wait; 0 where it does not, or gives a date."""
    said = error.headers.get("Retry-After", "") if isinstance(error, urllib.error.HTTPError) else ""
    return float(said) if said.strip().isdigit() else 0


def transfer(shard: str, start: int, timeout: float, hold: Callable) -> Iterator:
    """First (where it begins, at most `start`, and the length of the whole or None), then the bytes from there.

    timeout: of a command, in seconds without a byte. hold(end): gets a way for another thread to end the transfer.
    """
    if shard.startswith("pipe:"):
        return _run_pipe(shard.removeprefix("pipe:"), timeout, hold)
    return (_read_fsspec if uses_fsspec(shard) else _read_http)(shard, start, hold)


def _read_fsspec(address, start, hold):
    filesystem, path = fsspec.core.url_to_fs(address)
    with filesystem.open(path, "rb") as source:
        yield source.seek(start), filesystem.size(path)
        while chunk := source.read(CHUNK):
            yield chunk


def _read_http(address, start, hold):
    request = _request(address)
    if start:
        request.add_header("Range", f"bytes={start}-")
    with _opener(hold).open(request, timeout=SOCKET_TIMEOUT) as source:
        begin, length = 0, source.headers["Content-Length"]
        if source.status == 206:
            begin, length = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", source.headers["Content-Range"] or "").groups()
        yield int(begin), int(length) if length and length.isdigit() else None
        while chunk := source.read1(CHUNK):
            yield chunk
    hold(lambda: None)


def _request(url: str) -> urllib.request.Request:
    """user:password@ of an address becomes the header that it stands for."""
    parts = urllib.parse.urlsplit(quote_address(url))
    request = urllib.request.Request(parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl())
    if parts.username is not None:
        login = ":".join(urllib.parse.unquote(part or "") for part in (parts.username, parts.password))
        request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
    return request


def _opener(hold):
    """urllib's, which hands `hold` the way to end each connection that it opens."""

    def connecting(kind):
        class Connection(kind):
            def connect(self):
                super().connect()
                hold(functools.partial(_shut, self.sock))

        return Connection

    class Http(urllib.request.HTTPHandler):
        def http_open(self, request):
            return self.do_open(connecting(http.client.HTTPConnection), request)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, request):
            return self.do_open(connecting(http.client.HTTPSConnection), request)

    return urllib.request.build_opener(Http, Https)


def _shut(connection):
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _kill(group):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _run_pipe(command, timeout, hold):
    yield 0, None
    with tempfile.TemporaryFile() as errors:
        arguments, pipe = ["bash", "-c", GUARD, "bash", command], subprocess.PIPE
        process = subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=errors, start_new_session=True)
        hold(functools.partial(_kill, process.pid))
        try:
            poll = select.poll()
            poll.register(process.stdout, select.POLLIN)
            while True:
                if not poll.poll(timeout * 1000):
                    raise TimeoutError(f"no byte came for {timeout:g} seconds")
                chunk = os.read(process.stdout.fileno(), CHUNK)
                if not chunk:
                    break
                yield chunk
            code = process.wait(timeout)
        finally:
            hold(lambda: None)
            _kill(process.pid)
            process.wait()
            process.stdin.close()
            process.stdout.close()
        if code:
            errors.seek(max(0, errors.seek(0, os.SEEK_END) - 150))
            raise OSError(f"exit code {code}: {errors.read().decode(errors='replace').strip()}")
