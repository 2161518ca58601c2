"""A server of shards that misbehaves, and a look at what a test of remote shards has left."""

import contextlib
import http.server
import os
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path

from common.data import fetch

import pytest

HTML = b"<!DOCTYPE html><html><body>Please log in</body></html>"


class Server(http.server.ThreadingHTTPServer):
    """Serves the files of a folder below /BEHAVIOUR/; `asked` lists (behaviour, file, first byte)."""

    daemon_threads = True

    def __init__(self, folder):
        self.folder, self.asked, self.open = folder, [], threading.Event()
        self.open.set()
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path = urllib.parse.unquote(self.path.partition("?")[0])
        behaviour, _, name = path.strip("/").partition("/")
        body, asked = Path(self.server.folder, name).read_bytes(), self.headers["Range"]
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and "ignored" not in behaviour else 0
        self.server.asked.append((behaviour, name, start))
        odd, length, end = len(self.server.asked) % 2, len(body), len(body)
        if behaviour in ("429", "503") and odd or behaviour == "always503":
            self.send_response(503 if "503" in behaviour else 429)
            self.send_header("Retry-After", "1" if behaviour == "429" else "Thu, 01 Jan 2026 00:00:00 GMT")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if behaviour == "html":
            body, length, end = HTML, len(HTML), len(HTML)
        if behaviour == "slow":
            time.sleep(0.5)
        if behaviour == "silent":
            time.sleep(3)
        if behaviour == "drops" and not start or behaviour == "drops_ignored" and odd or behaviour == "breaks_ignored":
            end = len(body) // 2
        if behaviour == "changed" and len(self.server.asked) > 1:
            body = bytes(len(body))
        if behaviour == "changed":
            start, end = 0, len(body) // 2
        length += {"long": 5000, "short": -15000}.get(behaviour, 0)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(length - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{length - 1}/{length}")
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body[start : min(start + 12000, end)])
            self.server.open.wait(20)
            self.wfile.write(body[start + 12000 : end])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    httpd = Server(tmp_path)
    thread = threading.Thread(target=httpd.serve_forever, args=[0.05], daemon=True)
    thread.start()
    httpd.address = f"http://127.0.0.1:{httpd.server_port}"
    yield httpd
    httpd.open.set()
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(fetch, "BACKOFF", 0.01)


@pytest.fixture
def nothing_is_left(tmp_path, monkeypatch):
    """No thread of a transfer, child or temporary file is there when a test has ended."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = children.read_text().split()
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # tmp_path can be too long for a Unix socket
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield
        assert not [thread for thread in threading.enumerate() if thread.name == "fetch a shard"]
        assert not [child for child in children.read_text().split() if child not in before]
        files = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if os.path.islink(link)]
        assert not [file for file in files if file.startswith(folder)]
