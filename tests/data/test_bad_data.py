"""What is wrong with tars, samples and loader processes is counted, named and does no harm."""

import gzip
import json
import os
import pickle
import signal
import tarfile
import time
from itertools import islice
from pathlib import Path

from common.data import shards as shards_module
from common.data import stream as stream_module
from common.data.shards import SKIP_CLASSES, SampleError, count_samples
from common.errors import UserError
from tests.data.making import (
    BAD,
    BAD_DECODE,
    DECODE,
    SAMPLE_SKIPS,
    bad_members,
    count_after,
    encode,
    epoch_of,
    make_data,
    make_shards,
    member_offsets,
    members,
    pickle_members,
    random_image,
    write_tar,
)

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def test_every_bad_sample_is_counted_and_logged(tmp_path):
    # The bad ones come last in the tar and blocks of one sample keep its order, so a good one ends the epoch.
    contents = bad_members(0)
    good = [member for member in contents if member[0][5:6].isdigit()]
    shard = write_tar(tmp_path / "a.tar", [member for member in contents if member not in good] + good)
    log = tmp_path / "skipped_samples.jsonl"
    options = {"decode": BAD_DECODE, "shuffle_block_samples": 1, "skipped_log": log}
    keys, skipped = epoch_of([shard], **options)
    assert keys == [f"a.tar/{n:06d}" for n in range(4)]
    assert skipped == {"decode": 2, "missing_caption": 2, "too_small": 1, "too_big": 1}
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert {(e["key"], e["reason"]) for e in entries[:6]} == {(f"a.tar/0{k}", reason) for k, reason in BAD.items()}
    assert all(entry["shard"] == shard and set(entry) == {"reason", "key", "shard", "detail"} for entry in entries)
    rank_1 = make_data([shard], rank=1, world_size=2, num_lanes=2, max_skip_ratio=1.0, **options)
    list(islice(rank_1, 4))
    assert (tmp_path / "skipped_samples.rank1.jsonl").exists()


def test_the_log_of_skipped_samples_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_module, "MAX_LOGGED_SKIPS", 5)
    log = tmp_path / "skipped.jsonl"
    shard = write_tar(tmp_path / "a.tar", bad_members(0))
    data = make_data([shard], num_lanes=1, max_skip_ratio=1.0, skipped_log=log)
    list(islice(data, 20))
    assert sum(data.counters[name] for name in SKIP_CLASSES) > 20
    assert len(log.read_text().splitlines()) == 5


def test_filtered_samples_of_a_users_decoder_are_not_errors(tmp_path):
    def decode(raw, rng):
        if rng.random() < 0.9:
            raise SampleError("filtered", "not wanted")
        return DECODE(raw, rng)

    data = make_data(make_shards(tmp_path, [40]), decode=decode, num_lanes=1, max_skip_ratio=0.0)
    list(islice(data, 10))
    assert data.counters["filtered"] == data.counters["read"] - 30 > 100


def test_pickles_in_a_shard_are_never_run(tmp_path):
    trap = tmp_path / "trap"
    pickle.loads(pickle_members(trap)[0][1])
    assert trap.exists()  # the trap works
    trap.rmdir()
    good = members(0, 4)
    shard = write_tar(tmp_path / "a.tar", pickle_members(trap) + good)
    seen = []

    def decode(raw, rng):
        seen.append(set(raw))
        return DECODE(raw, rng)

    keys, skipped = epoch_of([shard], decode=decode)
    assert len(keys) == 4 and not skipped and not trap.exists()
    assert set().union(*seen) == {"json", "png", "jpg", "txt"}


def test_grouping_follows_the_names_of_webdataset(tmp_path):
    png = encode(random_image(0))
    contents = [
        ("__meta__", b"x"), ("d.v1/a.PNG", png), ("d.v1/a.TXT", b"upper case"), ("e/a.png", png),
        ("e/a.txt", b"the same name in another folder"), ("e/._a.png", b"hidden"), ("noextension", b"x"),
        ("b.seg.png", png), ("b.png", png), ("b.text", b"one dot after the key"), ("b.png", png),
        ("b.caption", b"a second sample of one name"),
    ]  # fmt: skip
    keys, skipped = epoch_of([write_tar(tmp_path / "a.tar", contents)])
    assert keys == ["a.tar/b", "a.tar/b", "a.tar/d.v1/a", "a.tar/e/a"] and not skipped
    assert count_samples([str(tmp_path / "a.tar")]) == 4


def test_a_damaged_tar_gives_the_whole_samples_before_the_damage_and_an_error(tmp_path):
    shard = make_shards(tmp_path, [6])[0]
    content, offsets = Path(shard).read_bytes(), member_offsets(shard)
    damaged = [
        (content[: offsets["000004.png"][1] + 100], 4),  # cut in the pixels
        (content[: offsets["000004.txt"][0] + 10], 4),  # in the header of the caption
        (content[: offsets["000004.txt"][1] + 3], 4),  # in the caption
        (content[: offsets["000005.jpg"][0] + 511], 5),  # in the next header
        (content * 2, 6),  # data behind the end mark
    ]
    for name in ("000003.jpg", "000003.txt"):
        damaged.append((bytearray(content), 3))
        damaged[-1][0][offsets[name][0] + 150] ^= 0x55  # in the checksum of a header
    for data, whole in damaged:
        Path(shard).write_bytes(data)
        keys, skipped = epoch_of([shard])
        assert (len(keys), skipped) == (whole, {"shard_read": 1})
        assert len(data) > len(content) or count_samples([shard]) in (whole, whole + 1)


def test_a_header_with_a_negative_size_does_not_loop(tmp_path):
    info, good = tarfile.TarInfo("000009.bin"), members(0, 2)
    shard = write_tar(tmp_path / "a.tar", good)
    content, end = Path(shard).read_bytes(), member_offsets(shard)["000001.txt"][1] + 512
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    size = member_offsets(shard)["000001.txt"][0] - (end + 512)  # the next header would be an earlier one
    header[124:136] = b"\xff" + (size % 256**11).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    Path(shard).write_bytes(content[:end] + header + content[end:])
    keys, skipped = epoch_of([shard])
    assert (len(keys), skipped) == (2, {"shard_read": 1})


def test_a_compressed_tar_reads_and_its_damage_is_counted(tmp_path):
    tar, shard = write_tar(tmp_path / "a.tar", [("x", b"no sample"), *members(0, 200)]), tmp_path / "a.tar.gz"
    shard.write_bytes(gzip.compress(Path(tar).read_bytes()))
    assert len(epoch_of([str(shard)])[0]) == 200
    shard.write_bytes(shard.read_bytes()[:-10000])
    keys, skipped = epoch_of([str(shard)])
    assert 1 <= len(keys) < 200 and skipped == {"shard_read": 1}


def test_a_member_beyond_the_limit_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_MEMBER_BYTES", 4000)
    big = [("big.png", encode(random_image(0, 50, 50))), ("big.txt", b"big")]
    keys, skipped = epoch_of([write_tar(tmp_path / "a.tar", big + members(0, 2))], shuffle_block_samples=1)
    assert len(keys) == 2 and skipped == {"too_big": 1}


def test_a_shard_that_vanishes_or_is_no_tar_is_counted(tmp_path):
    good, gone = make_shards(tmp_path, [5, 5])
    (tmp_path / "x.tar").write_bytes(b"nothing like a tar" * 100)
    Path(gone).unlink()
    counters = count_after([good, gone, str(tmp_path / "x.tar")], 60)
    assert counters["shard_open"] > 5 and counters["shard_read"] > 5


@pytest.mark.parametrize("names", [["a.v{n}.png", "a.v{n}.txt"], ["png/{n}.png", "txt/{n}.txt"], ["{n}.png"]])
def test_what_a_sample_lacks_is_said(tmp_path, names):
    tar = write_tar(tmp_path / "0.tar", [(name.format(n=n), b"no image") for n in range(4) for name in names])
    with pytest.raises(UserError, match="the last was: 0.tar/.*: no member .*; the members of a sample lie side by"):
        count_after([tar], 9, max_skip_ratio=0.01)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "a git-lfs pointer"),
        (b"\n <!DOCTYPE html><html><body>Please log in", "an HTML page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied", "XML"),
        (b"PK\x03\x04" + bytes(600), "a zip archive"),
        (b'{"error": "expired"}', "JSON text"),
        (gzip.compress(b"text" * 999, mtime=0), r"a file that begins with b'.x1f.x8b"),
        (b"text" * 999, "a file that begins with b'texttext"),
    ],
)
def test_what_is_no_tar_is_named(tmp_path, server, content, words):
    (tmp_path / "0.tar").write_bytes(content)
    for shard in (str(tmp_path / "0.tar"), f"{server.address}/good/0.tar?sig=S3CRET", f"pipe:cat {tmp_path}/0.tar"):
        with pytest.raises(UserError, match=f"shard_read 3.*the last was: 0.tar: .*no tar .* but {words}") as caught:
            count_after([shard], 1)
        assert "S3CRET" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_set_without_a_good_sample_stops_in_one_sentence(tmp_path, num_workers):
    contents = [(f"{n}.{extension}", b"x") for n in range(300) for extension in ("jpg", "txt")]
    shards = [write_tar(tmp_path / f"{n}.tar", contents) for n in range(2)]
    data = make_data(shards, num_workers=num_workers, max_skip_ratio=1.0)
    with pytest.raises(UserError, match=r"no usable sample in 3 whole epochs.*decode") as caught:
        next(iter(data))
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)


def test_too_many_unreadable_samples_stop_the_run(tmp_path):
    contents = members(0, 6) + [(f"{n}.{extension}", b"x") for n in range(10, 12) for extension in ("jpg", "txt")]
    shards = [write_tar(tmp_path / f"{n}.tar", contents) for n in range(4)]
    list(islice(make_data(shards, max_skip_ratio=0.3, num_lanes=4), 100))
    data, batches = make_data(shards, max_skip_ratio=0.2, num_lanes=4), []
    with pytest.raises(UserError, match=r"of the last \d+ samples could not be read.*`max_skip_ratio`"):
        for batch in islice(data, 100):
            batches.append(batch)
    assert 8 <= len(batches) <= 16  # judged after one epoch of 4 x 6 good samples in each lane


def test_the_skip_ratio_is_that_of_the_last_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_module, "SKIP_WINDOW", 40)
    monkeypatch.setattr(stream_module, "SKIP_WINDOW_MIN", 10)
    bad = [(f"{n}.{extension}", b"x") for n in range(1000, 1030) for extension in ("jpg", "txt")]
    shard = write_tar(tmp_path / "a.tar", members(0, 150) + bad)
    data = make_data([shard], num_lanes=1, batch_size=1, shuffle_block_samples=1, max_skip_ratio=0.3)
    with pytest.raises(UserError, match="of the last"):  # 30 of 180 overall, 30 of 40 in the window
        list(islice(data, 200))
    assert data.counters["read"] > 150
    data = make_data([shard], num_lanes=1, batch_size=1, shuffle_block_samples=1, max_skip_ratio=0.8)
    list(islice(data, 200))


def test_one_endless_batch_of_bad_samples_is_stopped_in_the_middle(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_module, "SKIP_WINDOW", 50)
    bad = [(f"{n}.{extension}", b"x") for n in range(1000, 1200) for extension in ("jpg", "txt")]
    shard = write_tar(tmp_path / "a.tar", bad + members(0, 100))
    with pytest.raises(UserError, match="50 of the last 50 samples"):
        next(iter(make_data([shard], num_lanes=1, shuffle_block_samples=1)))


def test_a_mistake_in_the_decoder_is_not_hidden(tmp_path):
    def decode(raw, rng):
        return raw["nothing"]

    with pytest.raises(KeyError, match="nothing"):
        next(iter(make_data(make_shards(tmp_path, [20]), decode=decode)))


def _die(raw, rng):
    os.kill(os.getpid(), signal.SIGKILL)


def _hang(raw, rng):
    time.sleep(1.5)
    return DECODE(raw, rng)


def test_a_killed_worker_and_a_silent_worker_end_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_module, "POLL_SECONDS", 0.3)
    shards = make_shards(tmp_path, [40])
    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(UserError, match="data loading process died.*`dataloader_num_workers`"):
        next(iter(make_data(shards, decode=_die, num_workers=2)))
    with pytest.raises(UserError, match="No batch came for 0.8 seconds.*`data_timeout`"):
        next(iter(make_data(shards, decode=_hang, num_workers=2, batch_size=1, data_timeout=0.8)))
    patient = make_data(shards, decode=_hang, num_workers=1, batch_size=1, data_timeout=60)
    assert next(iter(patient))["micro_batch"] == 0  # several polls passed
    assert signal.getsignal(signal.SIGCHLD) == handler


# ----- hostile bytes


@pytest.fixture(scope="module")
def fuzz_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    contents = members(0, 3) + pickle_members(folder / "trap") + members(3, 3)
    shard = write_tar(folder / "good.tar", contents)
    return folder, Path(shard).read_bytes(), [offset for offset, _, _ in member_offsets(shard).values()]


edits = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=12)), max_size=8)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(edits=edits, cut=st.floats(0.3, 1.3), in_headers=st.booleans())
def test_no_tar_can_do_harm(fuzz_folder, edits, cut, in_headers):
    folder, good, headers = fuzz_folder
    content = bytearray(good)
    for place, new in edits:
        start = int(place * (len(content) - len(new)))
        if in_headers:
            start = headers[int(place * (len(headers) - 1))] + int(place * 7919) % 260
        content[start : start + len(new)] = new
        if in_headers:  # with a checksum that fits, so that the parser goes on
            header = start - min(start - offset for offset in headers if offset <= start)
            content[header + 148 : header + 156] = b" " * 8
            content[header + 148 : header + 156] = f"{sum(content[header : header + 512]):06o}\0 ".encode()
    shard = folder / "mutated.tar"
    shard.write_bytes(content[: int(len(content) * cut)])
    data, used = make_data([str(shard)], num_lanes=1, batch_size=1, max_skip_ratio=1.0), 0
    try:
        for _ in islice(data, 14):
            used += 1
    except UserError:
        pass
    skipped = sum(data.counters[name] for name in SAMPLE_SKIPS)
    assert data.counters["read"] == used + skipped
    assert not (folder / "trap").exists()
