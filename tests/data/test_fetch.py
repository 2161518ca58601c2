"""Remote shards while they arrive: what servers and commands do wrong, what is fetched ahead, and what is left."""

import contextlib
import http.server
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from itertools import islice
from pathlib import Path

from common.data import fetch, lanes, shard_cache
from common.data.folders import IMAGE_KEYS, TEXT_KEYS
from common.data.shard_cache import ShardCache, temporary_room
from common.data.shards import SampleError, tar_samples
from common.data.stream import TrainingData
from common.errors import UserError
from tests.data.test_stream import count_after, describe, make_data, make_shards, run

import pytest

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
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
        behaviour, name = self.path.strip("/").split("/")
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
def nothing_is_left(tmp_path, monkeypatch):
    """No thread of a transfer, child or temporary file is there when a test has ended."""
    monkeypatch.setattr(fetch, "BACKOFF", 0.01)
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = children.read_text().split()
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # tmp_path can be too long for a Unix socket
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield
        assert not [thread for thread in threading.enumerate() if thread.name == "fetch a shard"]
        assert not [child for child in children.read_text().split() if child not in before]
        files = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if os.path.islink(link)]
        assert not [file for file in files if file.startswith(folder)]


def read(shard, timeout=5, cache=None):
    """(number of samples, reason and detail of the error) of a shard that is read while it arrives."""
    shelf, count = fetch.Shelf(timeout, cache=cache), 0
    try:
        with shelf.open(0, shard) as file:
            for _, _, raw in tar_samples(file, (IMAGE_KEYS, TEXT_KEYS)):
                assert len(raw) == 2 and None not in raw.values()
                count += 1
    except SampleError as error:
        shelf.forget(shard)
        return count, f"{error.reason}: {error.detail}"
    finally:
        shelf.close()
    return count, ""


SERVERS = {  # behaviour: samples of 9, error
    "good": (9, ""),
    "drops": (9, ""),
    "drops_ignored": (9, ""),  # every second connection, and ranges are ignored
    "429": (9, ""),
    "503": (9, ""),
    "slow": (9, ""),
    "breaks_ignored": (6, "shard_read: .* of 30720 bytes received"),
    "changed": (6, "shard_read: OSError: it sends other bytes than at the first try"),
    "long": (9, "shard_read: OSError: 30720 of 35720 bytes"),
    "short": (7, "shard_read: "),
    "html": (0, "shard_read: no tar that can be opened but an HTML page"),
    "always503": (0, "shard_open: HTTPError: HTTP Error 503"),
}


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("behaviour", SERVERS)
def test_servers(tmp_path, server, behaviour, cached):
    whole = Path(make_shards(tmp_path, [9])[0]).read_bytes()
    count, sentence = SERVERS[behaviour]
    cache = ShardCache(tmp_path / "cache") if cached else None
    if cached:
        cache.prepare()
    found, error = read(f"{server.address}/{behaviour}/00000.tar", cache=cache)
    assert found == count
    assert re.match(sentence or "$", error), error
    if cached:
        assert [path.read_bytes() for path in cache.folder.iterdir()] == ([] if sentence else [whole])
    if behaviour == "drops":
        assert [start > 0 for _, _, start in server.asked] == [False, True]  # it went on


PIPES = {  # command: samples of 9, error
    "cat {}": (9, ""),
    "cat {}; exit 1": (9, "shard_read: OSError: exit code 1"),
    "(cat {}; exit 1) | cat": (9, "shard_read: OSError: exit code 1"),
    "head -c 15000 {}; echo no such bucket >&2; exit 5": (6, "shard_read: OSError: exit code 5: no such bucket"),
    "head -c 15000 {}": (6, "shard_read: "),
    "exit 3": (0, "shard_open: OSError: exit code 3"),
    "head -c 15000 {}; sleep 60": (6, "shard_read: TimeoutError: no byte came for 0.5 seconds"),
    "sleep 60 & cat {}; wait": (9, "shard_read: TimeoutError"),
}


@pytest.mark.parametrize("command", PIPES)
def test_commands(tmp_path, command):
    shard = make_shards(tmp_path, [9])[0]
    count, sentence = PIPES[command]
    start = time.monotonic()
    found, error = read(f"pipe:{command.format(shard)}", timeout=0.5 if "sleep" in command else 5)
    assert found == count and re.match(sentence or "$", error), error
    assert time.monotonic() - start < 20


def test_a_full_or_read_only_tmpdir_is_counted_and_named(tmp_path, server, monkeypatch):
    make_shards(tmp_path, [9])
    full = open("/dev/full", "r+b", buffering=0)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **options: full)
    found, error = read(f"{server.address}/good/00000.tar")
    assert found == 0 and re.match("shard_open: OSError: TMPDIR=.* has no room", error)
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    found, error = read(f"{server.address}/good/00000.tar")
    assert found == 0 and error.startswith("shard_open: FileNotFoundError")


def test_a_command_ends_with_a_process_that_is_killed(tmp_path):
    pid = tmp_path / "pid"
    code = f"""from common.data.fetch import Shelf
Shelf(600).open(0, "pipe:sleep 300 & echo $! > {pid}; wait").read(1)"""
    process = subprocess.Popen([sys.executable, "-c", code])
    until(lambda: pid.exists() and pid.read_text().strip())
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: is_dead(pid.read_text().strip()))


def until(is_so, seconds=30):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_dead(pid):
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z"
    return True


def test_the_first_samples_come_before_the_shard_is_there(tmp_path, server):
    make_shards(tmp_path, [9])
    server.open.clear()
    start, shelf = time.monotonic(), fetch.Shelf(5)
    with contextlib.closing(shelf), shelf.open(0, f"{server.address}/good/00000.tar") as file:
        samples = tar_samples(file, (IMAGE_KEYS, TEXT_KEYS))
        assert next(samples)[1] == "000000"
    assert server.asked and not server.open.is_set() and time.monotonic() - start < 10


def test_a_transfer_is_ended_while_the_server_is_silent(tmp_path, server):
    make_shards(tmp_path, [9])
    shelf = fetch.Shelf(60)
    shelf.begin(0, [f"{server.address}/silent/00000.tar"])
    until(lambda: server.asked)
    start = time.monotonic()
    shelf.close()
    assert time.monotonic() - start < 2


def test_all_lanes_begin_at_once_and_fetch_ahead_what_a_block_needs_where_there_is_room(tmp_path, server):
    shards = make_shards(tmp_path, [9] * 20)
    remote, size = [f"{server.address}/good/{Path(shard).name}" for shard in shards], os.path.getsize(shards[0])
    for disk_bytes, block_bytes, asked in ((None, size - 1, 8), (None, 2 * size, 16), (1, 2 * size, 4)):
        server.asked.clear()
        server.open.clear()
        shelf = fetch.Shelf(5, disk_bytes, block_bytes=block_bytes)
        for lane in range(4):
            shelf.begin(lane, remote[lane : lane + 1])
        until(lambda: len(server.asked) == 4)
        until(lambda shelf=shelf: shelf._largest_known() == size)
        server.open.set()
        files = [shelf.open(lane, remote[lane], remote[lane + 4 :: 4]) for lane in range(4)]
        [file.read() for file in files]
        until(lambda asked=asked: len(server.asked) == asked)
        time.sleep(0.3)
        assert sorted(name for _, name, _ in server.asked) == [Path(shard).name for shard in shards[:asked]]
        with shelf.open(0, remote[4]) as file:  # what is needed waits for no room
            assert len(file.read()) == size
        [file.close() for file in files]
        shelf.close()


def test_an_end_in_the_middle_leaves_nothing(tmp_path, server):
    remote = [f"{server.address}/good/{Path(shard).name}" for shard in make_shards(tmp_path, [9] * 16)]
    for shards in (remote, [f"pipe:cat {tmp_path}/0000{i}.tar; sleep 60" for i in range(4)]):
        for num_workers in (0, 2):
            batches = iter(make_data(shards, num_workers=num_workers, num_lanes=4))
            assert len(list(islice(batches, 6))) == 6  # the loader processes wait for the commands' ends by now
            started = time.monotonic()
            batches.close()
            assert time.monotonic() - started < 8


def test_a_tmpdir_that_is_too_long_for_sockets_is_named(tmp_path, monkeypatch):
    for characters in (75, 76):
        folder = f"/tmp/{tmp_path.parent.name}".ljust(characters, "x")
        os.mkdir(folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        batches = iter(make_data(make_shards(tmp_path, [9] * 8), num_workers=1))
        with pytest.raises(UserError, match="TMPDIR=.*too long") if characters == 76 else contextlib.nullcontext():
            next(batches)
        batches.close()
        os.rmdir(folder)


def test_remote_shards_give_the_order_of_local_ones_also_resumed(tmp_path, server):
    local = make_shards(tmp_path, [12, 7, 9])
    remote = [f"{server.address}/drops/{Path(shard).name}" for shard in local]
    expected, _ = run(local, 1, 0, 48, num_lanes=4)
    first, state = run(remote, 2, 0, 14, num_lanes=4)
    rest, _ = run(remote, 1, 2, 34, state, num_lanes=4)
    assert first + rest == expected


def test_a_broken_shard_costs_what_did_not_come(tmp_path, server):
    good, other = make_shards(tmp_path, [9, 9])
    counters = count_after([good, f"{server.address}/breaks_ignored/00001.tar"], 40)
    assert {name[:9] for name in counters["keys"]} == {"00000.tar", "00001.tar"} and len(counters["keys"]) == 15
    assert counters["shard_read"] >= 2 and counters["shard_open"] == 0


def test_blocks_of_the_first_epoch_grow_and_resuming_follows_the_plan_of_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(lanes, "FIRST_BLOCK", 2)
    shards, options = make_shards(tmp_path, [29, 29]), {"num_lanes": 2, "shuffle_block_samples": 16, "batch_size": 1}
    expected, end = run(shards, 1, 0, 80, **options)
    keys = [batch[2][0] for batch in expected[::2]]
    blocks = [sorted(keys[a:b]) for a, b in ((0, 2), (2, 6), (6, 14), (14, 29))]
    assert sum(blocks, []) == sorted(keys[:29]) and blocks[3] != keys[14:29]
    assert sorted(keys[29:31]) != sorted(keys[29:40])[:2]  # the second epoch's first block is a whole one
    older = [make_data(shards, **options)]
    older[0].growing = False
    before = [describe(batch) for batch in islice(older[0], 10)]
    state = TrainingData.merge_state_dicts([older[0].state_dict()])
    assert before != expected[:10] and "growing_blocks" not in state and end["growing_blocks"]
    after = [describe(batch) for batch in islice(older[0], 20)]
    assert run(shards, 2, 0, 20, state, **options)[0] == after
    for first in (5, 11, 40):
        _, state = run(shards, 1, 0, first, **options)
        assert run(shards, 1, 0, 80 - first, state, **options)[0] == expected[first:]
    afresh = make_data(shards, **options | {"seed": 8})
    afresh.load_state_dict(TrainingData.merge_state_dicts([older[0].state_dict()]))
    assert afresh.growing


# ----- the cache


@pytest.fixture
def cache(tmp_path):
    cache = ShardCache(tmp_path / "cache")
    cache.prepare()
    return cache


def test_epochs_runs_and_processes_fetch_a_shard_once_and_in_the_order_of_local_ones(tmp_path, server):
    local = make_shards(tmp_path, [12, 7, 9, 5])
    remote = [f"{server.address}/good/{Path(shard).name}" for shard in local]
    expected, _ = run(local, 1, 0, 48, num_lanes=4)
    options = {"num_lanes": 4, "shard_cache_dir": tmp_path / "cache"}
    first, state = run(remote, 2, 2, 20, **options)
    assert first + run(remote, 1, 0, 28, state, **options)[0] == expected
    signed, _ = run([f"{shard}?X-Amz-Signature=new" for shard in remote], 1, 2, 48, **options)
    assert str(signed).replace("?X-Amz-Signature=new", "") == str(expected)
    assert sorted({name for _, name, _ in server.asked}) == [Path(shard).name for shard in local]
    assert len(server.asked) == 4
    names = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert [re.sub(r"[0-9a-f]{16}", "*", name) for name in names] == [f"{n:05d}.*.tar" for n in range(4)]


def test_two_fetch_the_same_shard_at_once_and_one_asks_for_it(tmp_path, server, cache):
    whole = Path(make_shards(tmp_path, [9])[0]).read_bytes()
    address = f"{server.address}/good/00000.tar"
    server.open.clear()
    shelves = [fetch.Shelf(5, cache=ShardCache(cache.folder)) for _ in range(3)]
    files = [shelf.open(0, address) for shelf in shelves]
    assert [file.read(9000) for file in files] == [whole[:9000]] * 3  # the others follow
    server.open.set()
    assert [file.read() for file in files] == [whole[9000:]] * 3 and len(server.asked) == 1
    for file, shelf in zip(files, shelves, strict=True):
        file.close()
        shelf.close()
    assert [path.read_bytes() for path in cache.folder.iterdir()] == [whole]


@pytest.mark.parametrize("followed", [True, False])
def test_a_process_that_is_killed_while_it_writes_leaves_nothing_half(tmp_path, server, cache, followed):
    whole = Path(make_shards(tmp_path, [9])[0]).read_bytes()
    address = f"{server.address}/good/00000.tar"
    server.open.clear()
    code = f"""import time
from common.data.fetch import Shelf
from common.data.shard_cache import ShardCache
Shelf(60, cache=ShardCache({str(cache.folder)!r})).open(0, {address!r}).read(10000)
print("there", flush=True)
time.sleep(60)"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.read(5) == b"there"
    shelf = fetch.Shelf(5, cache=cache)
    file = shelf.open(0, address) if followed else None
    assert not followed or file.read(9000) == whole[:9000]
    process.kill()
    process.wait()
    process.stdout.close()
    server.open.set()
    if followed:
        assert file.read() == whole[9000:] and server.asked[1][2] >= 9000  # it went on
        file.close()
    else:
        assert [path.suffix for path in cache.folder.iterdir()] == [".part"]
        ShardCache(cache.folder).prepare()
    shelf.close()
    assert [path.read_bytes() for path in cache.folder.iterdir()] == ([whole] if followed else [])


def test_a_writer_that_gives_up_leaves_its_followers_to_themselves(tmp_path, server, cache):
    whole = Path(make_shards(tmp_path, [9])[0]).read_bytes()
    server.open.clear()
    shelves, files = [fetch.Shelf(5, cache=cache) for _ in range(2)], []
    for shelf in shelves:
        files.append(shelf.open(0, f"{server.address}/good/00000.tar"))
        assert files[-1].read(9000) == whole[:9000]  # so that the first one writes
    shelves[0].close()
    server.open.set()
    assert files[1].read() == whole[9000:]
    files[1].close()
    shelves[1].close()
    assert not list(cache.folder.iterdir())


def test_the_oldest_of_a_full_cache_go(tmp_path, server):
    shards = make_shards(tmp_path, [9] * 4)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/mine.tar").write_bytes(bytes(10**6))  # no file of the cache
    cache = ShardCache(tmp_path / "cache", 2.5 * os.path.getsize(shards[0]))
    for number in (0, 1, 0, 2, 3):
        assert read(f"{server.address}/good/{number:05d}.tar", cache=cache) == (9, "")
        time.sleep(0.02)
    names = sorted(path.name[:5] for path in cache.folder.iterdir())
    assert names == ["00002", "00003", "mine."] and len(server.asked) == 4


def test_a_full_or_read_only_cache_is_named(tmp_path, server, cache, monkeypatch):
    make_shards(tmp_path, [9])
    monkeypatch.setattr(ShardCache, "begin", lambda *args: (open("/dev/full", "r+b", buffering=0), True))
    found, error = read(f"{server.address}/good/00000.tar", cache=cache)
    assert found == 0 and re.match("shard_open: OSError: `shard_cache_dir`=.* has no room", error)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="`shard_cache_dir`=.* cannot be written"):
        next(iter(make_data([f"{server.address}/good/00000.tar"], shard_cache_dir=tmp_path / "file/x")))


def test_flags_of_remote_shards_are_refused_where_they_do_nothing(tmp_path):
    shards = make_shards(tmp_path, [9])
    for options in ({"shard_cache_dir": tmp_path}, {"shard_disk_gb": 3}):
        with pytest.raises(UserError, match=f"`{next(iter(options))}`.*all data are local"):
            make_data(shards, **options)
    with pytest.raises(UserError, match="`shard_cache_gb`"):
        make_data(["http://host/0.tar"], shard_cache_gb=1)


def test_tmpdir_is_looked_at_before_the_start(tmp_path, server, monkeypatch):
    size = os.path.getsize(make_shards(tmp_path, [9])[0])
    shard, usage = f"{server.address}/good/00000.tar", shutil._ntuple_diskusage
    monkeypatch.setattr(shard_cache, "_is_memory", lambda folder: False)
    for free, room in ((40, None), (12, 0.9 * 12 * size)):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: usage(0, 0, free * size))
        found, note = temporary_room(shard, 8)
        assert found == room and ("less is fetched ahead" in note) == (room is not None)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, 7 * size))
    with pytest.raises(UserError, match="TMPDIR=.* its 8 lanes need .* set TMPDIR to"):
        temporary_room(shard, 8)
    monkeypatch.undo()
    assert shard_cache._is_memory("/dev/shm") and not shard_cache._is_memory("/proc")
    monkeypatch.setattr(shard_cache, "_is_memory", lambda folder: True)
    assert "is memory, and takes up to two shards a lane" in temporary_room("pipe:cat x", 8)[1]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(UserError, match="TMPDIR cannot be written"):
        temporary_room(shard, 8)
