"""Remote shards while they arrive: what servers and commands do wrong, what is fetched ahead, and what is left."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from common.data import fetch, lanes
from common.data.folders import IMAGE_KEYS, TEXT_KEYS
from common.data.shard_cache import ShardCache
from common.data.shards import SampleError, expand_shards, tar_samples
from common.data.stream import TrainingData
from common.errors import UserError
from tests.data.making import count_after, describe, make_data, make_shards, run

import fsspec
import pytest
from fsspec.registry import _registry as fsspec_schemes

pytestmark = pytest.mark.usefixtures("nothing_is_left")


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


class Breaking(io.FileIO):
    """A transfer that breaks after 12,000 bytes if it began with the first."""

    def seek(self, start):
        self.start = super().seek(start)
        return start

    def read(self, size):
        if self.start == 0 and self.tell():
            raise OSError("broken")
        return super().read(12000)


class Bucket(fsspec.AbstractFileSystem):
    """The tars of a folder as s3://bucket/."""

    protocol, cachable = "s3", False

    def ls(self, path, detail=True, **options):
        return [{"name": f"bucket/{file.name}", "size": file.stat().st_size, "type": "file"} for file in self.tars]

    def _open(self, path, mode, **options):
        return Breaking(next(file for file in self.tars if path == f"bucket/{file.name}"))


def test_a_buckets_shards_give_the_order_of_local_ones_also_resumed(tmp_path, monkeypatch):
    """Of a web server's: test_shard_cache.py."""
    local = make_shards(tmp_path, [12, 7, 9])
    monkeypatch.setitem(fsspec_schemes, "s3", Bucket)
    monkeypatch.setattr(Bucket, "tars", [Path(shard) for shard in local], raising=False)
    remote = expand_shards("s3://bucket/*.tar")
    expected, _ = run(local, 1, 0, 48, num_lanes=4)
    first, state = run(remote, 2, 0, 14, num_lanes=4)
    rest, _ = run(remote, 1, 2, 34, state, num_lanes=4)
    assert len(remote) == 3 and first + rest == expected


def test_a_package_that_a_scheme_needs_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match="'s3://bucket/0.tar' cannot be listed .Install s3fs to access S3"):
        expand_shards("s3://bucket/{0..1}.tar")


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
