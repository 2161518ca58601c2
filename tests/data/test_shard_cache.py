"""The cache of remote shards, shared by processes, and TMPDIR without one."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.data import fetch
from common.data.shard_cache import ShardCache, temporary_room
from common.errors import UserError
from tests.data.making import make_data, make_shards, run
from tests.data.test_fetch import read

import pytest

pytestmark = pytest.mark.usefixtures("nothing_is_left")


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
    for free, block, room in ((40, 0, None), (12, 0, 0.9 * 12 * size), (40, 4 * size, 0.9 * 40 * size)):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: usage(0, 0, free * size))
        found, note = temporary_room(shard, 8, block_bytes=block)
        assert found == room and ("less is fetched ahead" in note) == (room is not None)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, 7 * size))
    with pytest.raises(UserError, match="TMPDIR=.* its 8 lanes need .* set TMPDIR to"):
        temporary_room(shard, 8)
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(UserError, match="TMPDIR cannot be written"):
        temporary_room(shard, 8)
