"""The data stream: its order, its resume, bad data, decoding. Everything runs on tiny tars made here."""

import base64
import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import struct
import tarfile
import threading
import time
import urllib.parse
import zlib
from functools import partial
from itertools import islice
from pathlib import Path

from common.data import fetch as fetch_module
from common.data import shards as shards_module
from common.data import stream as stream_module
from common.data.folders import IMAGE_KEYS, TEXT_KEYS
from common.data.images import INTERPOLATION_TYPES, decode_image_text
from common.data.shards import SKIP_CLASSES, SampleError, count_samples, expand_shards, tar_samples
from common.data.stream import TrainingData
from common.data.transfers import _request, read_head
from common.errors import UserError
from common.keyed_random import keyed_generator, keyed_seed

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores, on purpose
R = 8
DECODE = partial(decode_image_text, resolution=R, random_flip=True, proportion_empty_prompts=0.3)
SAMPLE_SKIPS = [name for name in SKIP_CLASSES if not name.startswith("shard")]


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def random_image(seed, height=10, width=13):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def members(first, count):
    """Good samples: names are their numbers, PNG and JPEG in turn."""
    result = []
    for number in range(first, first + count):
        extension, format = (("png", "PNG"), ("jpg", "JPEG"))[number % 2]
        result += [
            (f"{number:06d}.{extension}", encode(random_image(number), format)),
            (f"{number:06d}.txt", f"caption {number}".encode()),
        ]
    return result


def write_tar(path, contents):
    with tarfile.open(path, "w") as tar:
        for name, content in contents:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def make_shards(folder, sizes):
    return [write_tar(folder / f"{n:05d}.tar", members(1000 * n, size)) for n, size in enumerate(sizes)]


def make_data(shards, **options):
    defaults = {"batch_size": 3, "seed": 7, "num_lanes": 8, "shuffle_block_samples": 4, "report": lambda line: None}
    return TrainingData(shards, options.pop("decode", DECODE), **defaults | options)


def describe(batch):
    """All of a micro-batch, in comparable form."""
    images = zlib.crc32(batch["images"].numpy().tobytes())
    crops = batch["crop_top_lefts"].tolist()
    return batch["micro_batch"], batch["epoch"], batch["keys"], batch["captions"], crops, images


def run(shards, world_size, num_workers, count, state=None, **options):
    """(the global sequence of `count` micro-batches, the merged state after it) of simulated ranks."""
    ranks = [
        make_data(shards, rank=rank, world_size=world_size, num_workers=num_workers, **options)
        for rank in range(world_size)
    ]
    for rank in ranks:
        if state is not None:
            rank.load_state_dict(json.loads(json.dumps(state)))
    streams = [iter(rank) for rank in ranks]
    sequence = [describe(next(stream)) for _ in range(count // world_size) for stream in streams]
    return sequence, TrainingData.merge_state_dicts([rank.state_dict() for rank in ranks])


def bad_members(first):
    """One sample of every class that can go bad, among good ones: 4 good, 6 bad."""
    good = members(first, 4)
    return [
        *good[:2],
        (f"{first}a.jpg", b"\xff\xd8\xff\xe0 not an image"),
        (f"{first}a.txt", b"corrupt"),
        (f"{first}b.png", encode(random_image(1))),
        *good[2:4],
        (f"{first}c.png", encode(random_image(1))),
        (f"{first}c.txt", b"  \n"),
        (f"{first}d.png", encode(random_image(1, 5, 40))),
        (f"{first}d.txt", b"small"),
        *good[4:6],
        (f"{first}e.png", png_header(20000, 10050)),
        (f"{first}e.txt", b"200 megapixels"),
        (f"{first}f.txt", b"no image"),
        *good[6:],
    ]


BAD_DECODE = partial(DECODE, min_image_size=6)


def png_header(width, height):
    """A PNG that claims its size and has no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    idat = b"IDAT" + zlib.compress(b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (chunk, idat, b"IEND")
    )


# ----- keys


def test_keyed_seeds_are_fixed_distinct_and_unambiguous():
    assert keyed_seed(1, "a", 2) == 7076912043262894214  # every machine and version must agree
    seeds = [keyed_seed(1, "a", 23), keyed_seed(12, "a", 3), keyed_seed(1, "a2", 3), keyed_seed(1, "a", 2, 3)]
    assert len(set(seeds)) == 4 and all(0 <= seed < 2**63 for seed in seeds)


def test_keyed_generator_differs_by_micro_batch_and_name_and_repeats():
    def draw(*key):
        return torch.randn(4, generator=keyed_generator(*key, "cpu")).tolist()

    assert draw(1, "noise", 5) == draw(1, "noise", 5)
    assert len({str(draw(*key)) for key in [(1, "noise", 5), (1, "noise", 6), (2, "noise", 5), (1, "w", 5)]}) == 4


# ----- the order


@pytest.mark.parametrize("sizes", [[30], [11, 9, 12], [5] * 19], ids=["one shard", "3 shards", "19 shards"])
def test_the_sequence_does_not_depend_on_ranks_and_workers(tmp_path, sizes):
    shards = make_shards(tmp_path, sizes)
    expected, state = run(shards, 1, 0, 64)
    assert [batch[0] for batch in expected] == list(range(64))
    assert {batch[1] for batch in expected} >= {0, 1}
    for world_size, num_workers in [(1, 2), (2, 2), (8, 0)]:
        assert run(shards, world_size, num_workers, 64) == (expected, state), (world_size, num_workers)


def test_crops_and_flips_differ_between_micro_batches_and_seeds(tmp_path):
    shards = make_shards(tmp_path, [8] * 8)
    sequence, _ = run(shards, 1, 0, 64)
    other, _ = run(shards, 1, 0, 64, seed=8)
    assert len({str(batch[4]) for batch in sequence}) > 16
    assert {caption == "" for batch in sequence for caption in batch[3]} == {True, False}
    assert [batch[2] for batch in sequence] != [batch[2] for batch in other]


@pytest.mark.parametrize("sizes", [[40], [11, 19, 12], [5] * 19], ids=["one shard", "3 shards", "19 shards"])
def test_every_sample_comes_exactly_once_in_an_epoch(tmp_path, sizes):
    shards = make_shards(tmp_path, sizes)
    every = sorted(f"{n:05d}.tar/{1000 * n + i:06d}" for n, size in enumerate(sizes) for i in range(size))
    data, epochs = make_data(shards, batch_size=1), {0: [], 1: []}
    for batch in data:
        if batch["epoch"] < 2:
            epochs[batch["epoch"]] += batch["keys"]
        if all(cursor["epoch"] >= 2 for cursor in data.state_dict()["cursors"].values()):
            break
    assert sorted(epochs[0]) == every and sorted(epochs[1]) == every
    assert epochs[0] != epochs[1] and epochs[0] != every


@pytest.mark.parametrize("sizes", [[40], [3, 11, 12], [5] * 19], ids=["one shard", "3 shards", "19 shards"])
def test_resume_anywhere_equals_the_uninterrupted_run(tmp_path, sizes):
    shards = make_shards(tmp_path, sizes)
    data, expected, states = make_data(shards), [], []
    states.append(data.state_dict())
    for batch in islice(data, 56):
        expected.append(describe(batch))
        states.append(data.state_dict())
    assert any(cursor["offset"] for cursor in states[20]["cursors"].values())  # in the middle of a block
    for start in range(0, 56, 5):
        sequence, state = run(shards, 1, 0, 56 - start, TrainingData.merge_state_dicts([states[start]]))
        assert sequence == expected[start:] and state == states[-1], start


@pytest.mark.parametrize("shape", [((4, 0), (2, 1)), ((2, 2), (1, 4)), ((1, 3), (8, 0))])
def test_resume_on_another_number_of_ranks_and_workers(tmp_path, shape):
    (world_1, workers_1), (world_2, workers_2) = shape
    shards = make_shards(tmp_path, [7, 15, 9])
    expected, end = run(shards, 1, 0, 96)
    for first in (8, 24 + world_1):
        start, state = run(shards, world_1, workers_1, first)
        rest, last = run(shards, world_2, workers_2, (96 - first) // world_2 * world_2, state)
        assert start + rest == expected[: first + len(rest)]
        assert len(rest) < 96 - first or last == end


def test_resume_keeps_what_was_yielded_and_not_what_was_prefetched(tmp_path):
    shards = make_shards(tmp_path, [20, 20])
    data = make_data(shards, num_workers=4)
    stream = iter(data)
    first = [describe(next(stream)) for _ in range(5)]
    time.sleep(0.3)  # the workers run ahead
    again = [describe(batch) for batch in islice(data, 5)]  # a new iterator goes on at the position
    assert first + again == run(shards, 1, 0, 10)[0]


def test_bad_samples_do_not_disturb_order_counters_or_resume(tmp_path):
    shards = [write_tar(tmp_path / f"{n}.tar", bad_members(1000 * n)) for n in range(3)] + make_shards(tmp_path, [9])
    shards.append(str(tmp_path / "cut.tar"))
    Path(shards[-1]).write_bytes(Path(shards[-2]).read_bytes()[:-11000])
    options = {"decode": BAD_DECODE, "max_skip_ratio": 0.9, "num_lanes": 4}
    expected, end = run(shards, 1, 0, 60, **options)
    assert run(shards, 2, 2, 60, **options) == (expected, end)
    assert all(end["counters"][name] > 0 for name in end["counters"] if name not in ("shard_open", "filtered"))
    assert end["counters"]["read"] == 180 + sum(end["counters"][name] for name in SAMPLE_SKIPS)
    for first in range(2, 60, 14):
        start, state = run(shards, 2, 0, first, **options)
        rest, last = run(shards, 1, 0, 60 - first, state, **options)
        assert start + rest == expected and last == end, first


def test_credentials_in_addresses_are_sent_as_a_header_and_never_written(tmp_path, quick_retries):
    request = _request("http://me%40x:p%3Aw@host:80/a.tar?b=c")
    assert request.full_url == "http://host:80/a.tar?b=c"
    assert request.get_header("Authorization") == "Basic " + base64.b64encode(b"me@x:p:w").decode()
    assert _request("http://host/a.tar").get_header("Authorization") is None
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://me:S3CRET@127.0.0.1:{closed.getsockname()[1]}/a.tar?X-Amz-Signature=S3CRET"
        data = make_data([address], num_lanes=1, skipped_log=tmp_path / "skipped.jsonl")
        with pytest.raises(UserError, match="the last was: .*refused") as caught:
            next(iter(data))
    log = (tmp_path / "skipped.jsonl").read_text()
    assert "shard_open" in log and "S3CRET" not in log + str(caught.value)


def test_a_lane_whose_only_shard_of_an_epoch_is_broken_goes_on(tmp_path):
    shards = make_shards(tmp_path, [3] * 4)
    Path(shards[0]).write_bytes(b"no tar")
    data = make_data(shards, num_lanes=4, batch_size=2)
    batches = iter(data)
    seen = set()
    for _ in range(60):
        seen |= set(next(batches)["keys"])
    assert len(seen) == 9 and data.counters["shard_open"] + data.counters["shard_read"] > 1


def test_a_damaged_shard_is_counted_once_wherever_the_run_resumes(tmp_path):
    shards = make_shards(tmp_path, [6, 6])
    Path(shards[0]).write_bytes(Path(shards[0]).read_bytes()[:7000])
    options = {"num_lanes": 1, "batch_size": 1, "shuffle_block_samples": 100, "max_skip_ratio": 1.0}
    expected, end = run(shards, 1, 0, 24, **options)
    assert end["counters"]["shard_read"] == 3
    for first in range(1, 24, 3):
        _, state = run(shards, 1, 0, first, **options)
        rest, last = run(shards, 1, 0, 24 - first, state, **options)
        assert rest == expected[first:] and last == end, first


def test_every_block_of_every_lane_and_epoch_is_permuted_in_its_own_way(tmp_path):
    shards = make_shards(tmp_path, [24])
    data, orders = make_data(shards, batch_size=12, num_lanes=1, shuffle_block_samples=12), set()
    for batch in islice(data, 6):  # two blocks in each of three epochs
        orders.add(tuple(int(key[-6:]) % 12 for key in batch["keys"]))
    assert len(orders) == 6


def test_no_block_is_larger_than_its_bounds(tmp_path, monkeypatch):
    shards = make_shards(tmp_path, [40, 40])
    sizes = []
    original = random.Random.shuffle
    monkeypatch.setattr(random.Random, "shuffle", lambda self, x: (sizes.append(x[:]), original(self, x))[1])
    list(islice(make_data(shards, num_lanes=2, shuffle_block_samples=100, shuffle_block_bytes=3000), 20))
    blocks = [[sum(map(len, raw.values())) for _, _, raw in block] for block in sizes if isinstance(block[0], tuple)]
    assert len(blocks) > 4
    assert all(sum(block[:-1]) < 3000 for block in blocks) and any(sum(block) >= 3000 for block in blocks)


def test_max_train_samples_takes_the_same_samples_in_every_epoch(tmp_path):
    for name, shards in [
        ("tars", make_shards(tmp_path, [9, 14, 8, 20])),
        ("folder", [image_folder(tmp_path / "f", 40)]),
    ]:
        data, epochs = make_data(shards, batch_size=1, max_train_samples=19, num_lanes=4), {}
        for batch in islice(data, 120):
            epochs.setdefault(batch["epoch"], []).extend(batch["keys"])
        assert len(set(epochs[0])) == len(epochs[0]) == 19, name
        assert set(epochs[1]) == set(epochs[2]) == set(epochs[0]) and epochs[1] != epochs[0], name
    with pytest.raises(UserError, match="`max_train_samples` must be at least 8"):
        make_data(shards, max_train_samples=7)


def test_identity_lanes_and_world_size_are_checked_on_resume(tmp_path):
    shards = make_shards(tmp_path, [20, 20, 8])
    sequence, state = run(shards, 1, 0, 10)
    for changed in [{"batch_size": 4}, {"num_lanes": 16}, {"shuffle_block_samples": 5}, {"max_train_samples": 30}]:
        with pytest.raises(UserError, match="`data_seed`"):
            make_data(shards, **changed).load_state_dict(state)
    with pytest.raises(UserError, match="train_shards_path_or_url.*`data_seed`"):
        make_data(shards[:2]).load_state_dict(state)
    signed, renewed, other = (
        f"https://h/{n}.tar?X-Amz-Date={d}&X-Amz-Signature={d}" for n, d in ((0, 1), (0, 2), (1, 1))
    )
    addressed = make_data([signed]).state_dict()
    addressed["cursors"] = state["cursors"]
    make_data([renewed]).load_state_dict(addressed)
    with pytest.raises(UserError, match="train_shards_path_or_url.*`data_seed`"):
        make_data([other]).load_state_dict(addressed)
    addressed["identity"]["train_shards_path_or_url"] = hashlib.sha256(json.dumps([[signed], []]).encode()).hexdigest()
    make_data([signed]).load_state_dict(addressed)  # as it was written when the hash held signatures
    with pytest.raises(UserError, match="8 lanes.*3 processes.*`data_seed`"):
        make_data(shards, num_lanes=None, world_size=3).load_state_dict(state)
    with pytest.raises(UserError, match="3 processes"):
        make_data(shards, world_size=3)

    grown = make_data(shards, num_lanes=None, world_size=2)  # 16 lanes by itself, 8 as saved
    grown.load_state_dict(state)
    assert grown.num_lanes == 8 and describe(next(iter(grown))) == run(shards, 1, 0, 11)[0][10]

    lines = []
    afresh = make_data(shards[:2], seed=8, batch_size=2, report=lines.append)
    afresh.load_state_dict(state)
    assert lines == ["`data_seed` is 8, not 7: the data start afresh."]
    batch = next(iter(afresh))
    assert batch["micro_batch"] == 10 and batch["epoch"] == 0
    assert set(afresh.state_dict()["cursors"]["3"].values()) == {0}

    states = [make_data(shards, rank=rank, world_size=2) for rank in range(2)]
    next(iter(states[0]))
    with pytest.raises(UserError, match="different places"):
        TrainingData.merge_state_dicts([rank.state_dict() for rank in states])


def test_workers_that_do_not_divide_the_lanes_are_reduced_with_a_line(tmp_path):
    lines = []
    data = make_data(make_shards(tmp_path, [20]), num_workers=3, report=lines.append)
    assert data.num_workers == 2 and len(lines) == 1 and "`dataloader_num_workers` 3 is reduced to 2" in lines[0]


def test_batches_are_collated(tmp_path):
    batch = next(iter(make_data(make_shards(tmp_path, [20]))))
    assert batch["images"].shape == (3, 3, R, R) and batch["images"].dtype == torch.uint8
    assert batch["original_sizes"].tolist() == [[10, 13]] * 3 and batch["original_sizes"].dtype == torch.int64
    assert batch["crop_top_lefts"].shape == (3, 2) and batch["crop_top_lefts"].dtype == torch.int64
    assert [type(batch[name]) for name in ("captions", "keys", "micro_batch", "epoch")] == [list, list, int, int]
    assert all(key.startswith("00000.tar/0000") for key in batch["keys"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_stream_leaves_the_global_random_states_alone(tmp_path, num_workers):
    shards = make_shards(tmp_path, [20])
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    list(islice(make_data(shards, num_workers=num_workers), 4))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


# ----- bad data


def epoch_of(shards, **options):
    """(sorted keys, counters) of the first epoch in one lane."""
    options = {"batch_size": 1, "num_lanes": 1, "max_skip_ratio": 1.0, "shuffle_block_samples": 1000} | options
    data, keys = make_data(shards, **options), []
    for batch in data:
        if batch["epoch"] > 0:
            break
        keys += batch["keys"]
        counters = dict(data.counters)
    skipped = {name: count for name, count in counters.items() if count and name != "read"}
    assert counters["read"] == len(keys) + sum(counters[name] for name in SAMPLE_SKIPS)
    return sorted(keys), skipped


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
    assert {(entry["key"], entry["reason"]) for entry in entries[:6]} == {
        ("a.tar/0a", "decode"),
        ("a.tar/0b", "missing_caption"),
        ("a.tar/0c", "missing_caption"),
        ("a.tar/0d", "too_small"),
        ("a.tar/0e", "too_big"),
        ("a.tar/0f", "decode"),
    }
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


class _WritesAFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def pickle_members(path):
    return [
        (f"000000.{extension}", pickle.dumps(_WritesAFile(path))) for extension in ("pkl", "pyd", "pth", "npy", "json")
    ]


def test_pickles_in_a_shard_are_never_run(tmp_path):
    trap = tmp_path / "trap"
    pickle.loads(pickle_members(trap)[0][1])
    assert trap.exists()  # the trap works
    trap.unlink()
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
        ("__meta__", b"x"),
        ("d.v1/a.PNG", png),
        ("d.v1/a.TXT", b"upper case"),
        ("e/a.png", png),
        ("e/a.txt", b"the same name in another folder"),
        ("e/._a.png", b"hidden"),
        ("noextension", b"x"),
        ("b.seg.png", png),
        ("b.png", png),
        ("b.text", b"one dot after the key"),
        ("b.png", png),
        ("b.caption", b"a second sample of one name"),
    ]
    keys, skipped = epoch_of([write_tar(tmp_path / "a.tar", contents)])
    assert keys == ["a.tar/b", "a.tar/b", "a.tar/d.v1/a", "a.tar/e/a"] and not skipped
    assert count_samples([str(tmp_path / "a.tar")]) == 4


def member_offsets(path):
    with tarfile.open(path) as tar:
        return {member.name: (member.offset, member.offset_data, member.size) for member in tar}


def test_a_truncated_tar_gives_its_whole_samples_and_an_error(tmp_path):
    shard = make_shards(tmp_path, [6])[0]
    content, offsets = Path(shard).read_bytes(), member_offsets(shard)
    for cut, whole in [
        (offsets["000004.png"][1] + 100, 4),  # in the pixels
        (offsets["000004.txt"][0] + 10, 4),  # in the header of the caption
        (offsets["000004.txt"][1] + 3, 4),  # in the caption
        (offsets["000005.jpg"][0] + 511, 5),  # in the next header
    ]:
        Path(shard).write_bytes(content[:cut])
        keys, skipped = epoch_of([shard])
        assert (len(keys), skipped) == (whole, {"shard_read": 1}), cut
        assert count_samples([shard]) in (whole, whole + 1)


@pytest.mark.parametrize("name, whole", [("000003.jpg", 3), ("000003.txt", 3)])
def test_a_corrupt_header_in_the_middle_is_an_error_of_the_shard(tmp_path, name, whole):
    shard = make_shards(tmp_path, [6])[0]
    content = bytearray(Path(shard).read_bytes())
    content[member_offsets(shard)[name][0] + 150] ^= 0x55  # in the checksum
    Path(shard).write_bytes(content)
    keys, skipped = epoch_of([shard])
    assert (len(keys), skipped) == (whole, {"shard_read": 1})


def test_data_behind_the_end_mark_is_an_error_of_the_shard(tmp_path):
    shard = make_shards(tmp_path, [6])[0]
    Path(shard).write_bytes(Path(shard).read_bytes() * 2)
    assert epoch_of([shard])[1] == {"shard_read": 1}


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
    shard = str(tmp_path / "a.tar.gz")
    with tarfile.open(shard, "w:gz") as tar:
        tar.add(make_shards(tmp_path, [1])[0], "x")  # an odd member that is no sample
        for name, content in members(0, 200):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert len(epoch_of([shard])[0]) == 200
    Path(shard).write_bytes(Path(shard).read_bytes()[:-10000])
    keys, skipped = epoch_of([shard])
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


def count_after(shards, batches, **options):
    data = make_data(shards, **{"batch_size": 1, "num_lanes": 1, "max_skip_ratio": 1.0} | options)
    keys = [key for batch in islice(data, batches) for key in batch["keys"]]
    return data.counters | {"keys": set(keys)}


PNG, CAPTION = b"no image", b"caption"
LAYOUTS = {
    "images, then captions": (
        [(f"{n}.png", PNG) for n in range(4)] + [(f"{n}.txt", CAPTION) for n in range(4)],
        "0.txt is not next to 0.png in the tar; pack it sorted by name: tar --sort=name",
    ),
    "dots": (
        [(f"a.v{n}.{e}", PNG) for n in range(4) for e in ("png", "txt")],
        "a.v0.png counts as member 'v0.png' of 'a': a key ends at the first dot",
    ),
    "two folders": (
        [(f"{e}/{n}.{e}", PNG) for n in range(4) for e in ("png", "txt")],
        "txt/0.txt lies in another folder of the tar than png/0.png: put both into one",
    ),
    "no captions": ([(f"{n}.{e}", PNG) for n in range(4) for e in ("png", "xmp")], "the tar's members are png, xmp"),
    "an image format": (
        [(f"{n}.{e}", PNG) for n in range(4) for e in ("heic", "txt")],
        "the tar's members are heic, txt",
    ),
    "a later one": (members(0, 3) + [("x.txt", CAPTION)], f"no member {', '.join(IMAGE_KEYS)} (only x.txt)"),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_wrong_with_the_layout_of_a_tar_is_said(tmp_path, layout, zipped):
    contents, sentence = LAYOUTS[layout]
    tar = Path(write_tar(tmp_path / "0.tar", contents))
    if zipped:
        tar.write_bytes(gzip.compress(tar.read_bytes()))
    with pytest.raises(UserError, match=re.escape(sentence)) as caught:
        count_after([str(tar)], 9, max_skip_ratio=0.01, required=(IMAGE_KEYS, TEXT_KEYS))
    assert "the last was: 0.tar/" in str(caught.value)
    if layout != "a later one":
        with pytest.raises(UserError, match=r"the last was: 0.tar/.*: no member .* \("):  # where a lane has no sample
            count_after([str(tar)], 9, num_lanes=16)
    with open(tar, "rb") as file, tarfile.open(tar) as there:  # looking at the tar loses no sample and no byte
        found = [
            (f"{key}.{e}", data)
            for _, key, raw in tar_samples(file, [("png", "jpg", "txt")])
            for e, data in raw.items()
        ]
        wanted = [m for m in there if m.name.split(".", 1)[1] in ("png", "jpg", "txt")]
        assert found == [(m.name, there.extractfile(m).read()) for m in wanted]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "a git-lfs pointer"),
        (b"\n <!DOCTYPE html><html><body>Please log in", "an HTML page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied", "XML"),
        (b"PK\x03\x04" + bytes(600), "a zip archive"),
        (b'{"error": "expired"}', "JSON text"),
        (gzip.compress(b"text" * 999, mtime=0), "gzip data"),
        (b"text" * 999, "a file that begins with b'texttext"),
    ],
)
def test_what_is_no_tar_is_named(tmp_path, server, content, words):
    (tmp_path / "0.tar").write_bytes(content)
    for shard in (str(tmp_path / "0.tar"), f"{server}/0.tar?sig=S3CRET", f"pipe:cat {tmp_path}/0.tar"):
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


# ----- remote shards


@pytest.fixture
def quick_retries(monkeypatch):
    monkeypatch.setattr(fetch_module, "BACKOFF", 0.01)


def test_a_pipe_is_tried_again(tmp_path, quick_retries):
    good = make_shards(tmp_path, [5])[0]
    tries = tmp_path / "tries"
    command = f"pipe:echo x >> {tries}; cat {good}; test $(wc -l < {tries}) -ge 3"
    assert len(count_after([command], 5)["keys"]) == 5
    assert len(tries.read_text().split()) == 3


@pytest.fixture
def server(tmp_path):
    """The address of tmp_path."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = (tmp_path / urllib.parse.unquote(self.path.partition("?")[0]).lstrip("/")).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def test_http_addresses_with_blanks_and_umlauts(tmp_path, server):
    (tmp_path / "my shards").mkdir()
    shard = Path(make_shards(tmp_path, [5])[0]).rename(tmp_path / "my shards/ü 0.tar")
    for name in ("my shards/ü 0.tar", "my%20shards/%C3%BC 0.tar"):
        assert len(count_after([f"{server}/{name}"], 5)["keys"]) == 5
    assert read_head(f"{server}/my shards/ü 0.tar") == shard.read_bytes()[: 1 << 16]


def test_fsspec_addresses(tmp_path, quick_retries):
    shard = make_shards(tmp_path, [5])[0]
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe({f"/test_data/{n:05d}.tar": Path(shard).read_bytes() for n in range(3)})
    shards = expand_shards("memory://test_data/*.tar")
    assert shards == expand_shards("memory:///test_data/{00000..00002}.tar") and len(shards) == 3
    assert len(count_after(shards, 15)["keys"]) == 15
    filesystem.rm(f"/test_data/{1:05d}.tar")
    assert count_after(shards, 20)["shard_open"] >= 1
    with pytest.raises(UserError, match="nothing matches"):
        expand_shards("memory://test_data/*.zip")
    with pytest.raises(UserError, match="`train_shards_path_or_url`.*nosuchprotocol"):
        expand_shards("nosuchprotocol://bucket/*.tar")


# ----- which shards


def test_expand_shards(tmp_path):
    shards = make_shards(tmp_path, [1, 1, 1])
    assert expand_shards(str(tmp_path / "{00000..00002}.tar")) == shards
    assert expand_shards(str(tmp_path / "0000?.tar")) == shards
    assert expand_shards(str(tmp_path)) == expand_shards([str(tmp_path)]) == shards
    assert expand_shards([shards[2], str(tmp_path / "{00000..00001}.tar")]) == [shards[2], *shards[:2]]
    assert expand_shards("https://host/{0..1}.tar?a=b") == ["https://host/0.tar?a=b", "https://host/1.tar?a=b"]
    assert expand_shards(r"pipe:f() { cat $1; }; f /x/{3..4}\ y") == [
        r"pipe:f() { cat $1; }; f /x/3\ y",
        r"pipe:f() { cat $1; }; f /x/4\ y",
    ]
    braces = write_tar(tmp_path / "{a,b}.tar", members(0, 1))
    assert expand_shards(braces) == [braces]


def test_the_tars_of_a_folder(tmp_path, capsys):
    shards = make_shards(tmp_path, [1, 1])
    for name in ("more/1/a.TAR", "more/b.tgz", "c.Tar.GZ", ".cache/d.tar", "more/.e.tar", "more/f.txt", "g/0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(shards[0], tmp_path / name)
    (tmp_path / "more/round").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "more/1")
    expected = [*shards, *(str(tmp_path / name) for name in ("c.Tar.GZ", "linked/a.TAR", "more/b.tgz"))]
    assert expand_shards(str(tmp_path)) == expand_shards(f"{tmp_path}/") == expected
    (tmp_path / "c_stats.json").write_text('{"successes": 70}')
    assert count_samples(expected) == 74

    for word in ("train", "Val"):
        (tmp_path / "split" / word).mkdir(parents=True)
        shutil.copy(shards[0], tmp_path / "split" / word / "0.tar")
    with pytest.raises(UserError, match="lie in Val, train, and Val is not for training by its name"):
        expand_shards(str(tmp_path / "split"))
    shutil.move(tmp_path / "split/train/0.tar", tmp_path / "split/1.tar")
    assert expand_shards(f"{tmp_path}/split/") == [f"{tmp_path}/split/1.tar"]
    assert "split/, 1 tars in Val are left out" in capsys.readouterr().out
    assert len(expand_shards(str(tmp_path / "split/Val"))) == len(expand_shards(f"{tmp_path}/split/*.tar")) == 1

    (tmp_path / "images/original").mkdir(parents=True)  # images, and what they were unpacked from
    shutil.copy(shards[0], tmp_path / "images/original/0.tar")
    (tmp_path / "images/0.png").write_bytes(b"")
    (tmp_path / "images/0.txt").write_text("caption")
    assert expand_shards(str(tmp_path / "images")) == [str(tmp_path / "images")]


@pytest.mark.parametrize(
    "spec, message",
    [
        ("{00000..00004}.tar", "2 of 5 paths match no file.*00003.tar"),
        ("{00000..00004.tar", "braces"),
        ("*.zip", "match no file"),
        ("missing.tar", "match no file"),
        ("empty", "neither .*tar.* nor images"),
    ],
)
def test_expand_shards_refuses_what_is_not_there(tmp_path, spec, message):
    make_shards(tmp_path, [1, 1, 1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"`train_shards_path_or_url`.*{message}"):
        expand_shards(str(tmp_path / spec))
    with pytest.raises(UserError, match="names no shard"):
        expand_shards([])


def test_count_samples(tmp_path):
    shards = make_shards(tmp_path, [5, 7])
    assert count_samples(shards) == 12
    (tmp_path / "00001_stats.json").write_text('{"successes": 70}')
    assert count_samples(shards) == 75
    (tmp_path / "00001_stats.json").write_text("{")
    assert count_samples(shards) == 12
    assert count_samples([*shards, "pipe:cat x"]) is count_samples(["s3://a/b.tar"]) is None
    assert count_samples([image_folder(tmp_path / "images", 9)]) == 9


# ----- folders of images


def image_folder(folder, count, captions="txt"):
    folder.mkdir()
    (folder / "sub").mkdir()
    names = [f"sub/{n:03d}.png" if n % 3 == 0 else f"{n:03d}.png" for n in range(count)]
    for n, name in enumerate(names):
        (folder / name).write_bytes(encode(random_image(n)))
        if captions == "txt":
            (folder / name).with_suffix(".txt").write_text(f"caption {n}")
    rows = [(name, f"caption, {n}") for n, name in enumerate(names)]
    if captions == "csv":
        text = "".join(f'{name},"{caption}"\n' for name, caption in rows)
        (folder / "metadata.csv").write_text("file_name,text\n" + text)
    if captions == "jsonl":
        lines = [json.dumps({"file_name": name, "text": caption}) for name, caption in rows]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    return str(folder)


@pytest.mark.parametrize("captions", ["txt", "csv", "jsonl"])
def test_folders_of_images(tmp_path, captions):
    folder = image_folder(tmp_path / "images", 30, captions)
    assert expand_shards(folder) == [folder]
    decode = partial(decode_image_text, resolution=R)
    expected, end = run([folder], 1, 0, 48, num_lanes=4, decode=decode)
    assert run([folder], 2, 2, 48, num_lanes=4, decode=decode) == (expected, end)
    _, state = run([folder], 2, 0, 14, num_lanes=4, decode=decode)
    assert run([folder], 4, 0, 32, state, num_lanes=4, decode=decode)[0] == expected[14:46]
    separator = " " if captions == "txt" else ", "
    for _, _, keys, texts, _, _ in expected:
        assert texts == [f"caption{separator}{int(key[-7:-4])}" for key in keys]
    keys, skipped = epoch_of([folder])
    assert len(set(keys)) == len(keys) == 30 and not skipped


def test_images_without_captions_and_captions_without_images_are_counted(tmp_path):
    folder = Path(image_folder(tmp_path / "images", 30, "csv"))
    (folder / "extra.png").write_bytes(encode(random_image(0)))
    with open(folder / "metadata.csv", "a") as file:
        file.write("gone.png,gone\n")
    counters = count_after([str(folder)], 100)
    assert counters["missing_caption"] >= 2 and counters["decode"] >= 2
    assert counters["read"] == 100 + sum(counters[name] for name in SAMPLE_SKIPS)


def test_folders_that_cannot_be_used(tmp_path):
    images = tmp_path / "images"
    image_folder(images, 3, captions=None)
    with pytest.raises(UserError, match="have no captions: add metadata.csv or metadata.jsonl.*.txt"):
        expand_shards(str(images))
    (images / "metadata.csv").write_text("name,text\n000.png,x\n")
    with pytest.raises(UserError, match="metadata.csv has no column file_name"):
        expand_shards(str(images))
    (images / "metadata.csv").unlink()
    (images / "metadata.jsonl").write_text("{\n")
    with pytest.raises(UserError, match="metadata.jsonl: line 1 is no JSON"):
        expand_shards(str(images))
    folder = image_folder(tmp_path / "good", 3)
    with pytest.raises(UserError, match="folder of images"):
        make_data([folder, *make_shards(tmp_path, [5])])
    with pytest.raises(UserError, match="holds 3 images and the data have 8 lanes"):
        list(islice(make_data([folder]), 8))


# ----- decoding


def decode_image(image_bytes, resolution=None, extension="png", **options):
    options = {"resolution": resolution, "center_crop": True} | options
    return decode_image_text({extension: image_bytes, "txt": b" a caption\n"}, random.Random(0), **options)


def pixels(sample):
    return sample["images"].permute(1, 2, 0).numpy().astype(int)  # (R, R, 3)


def smooth_image(height, width):
    """Sinusoids of several scales and some noise, like a photograph."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:height, :width]
    image = rng.normal(0, 6, (height, width, 3)) + 128
    for scale in (7, 31, 83):
        a, b, phase = rng.normal(0, 1 / scale, 3), rng.normal(0, 1 / scale, 3), rng.uniform(0, 6, 3)
        image += 30 * np.sin(x[..., None] * a + y[..., None] * b + phase)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [(480, 640), (333, 250), (64, 64), (97, 31), (1000, 1400)])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "lanczos"])
def test_the_resize_is_within_one_grey_level_of_pillow(size, mode):
    image, short = smooth_image(*size), min(size)
    height, width = size[0] * 64 // short, size[1] * 64 // short
    expected = image.resize((width, height), Image.Resampling[mode.upper()])
    top, left = (height - 64) // 2, (width - 64) // 2
    expected = np.asarray(expected).astype(int)[top : top + 64, left : left + 64]
    sample = decode_image(encode(image), 64, interpolation_type=mode)
    assert np.abs(pixels(sample) - expected).max() <= 1
    assert sample["crop_top_lefts"].tolist() == [top, left] and sample["original_sizes"].tolist() == list(size)


@pytest.mark.parametrize("mode", INTERPOLATION_TYPES)
def test_every_interpolation_type_works(mode):
    sample = decode_image(encode(smooth_image(90, 120)), 32, interpolation_type=mode)
    assert sample["images"].shape == (3, 32, 32) and sample["images"].dtype == torch.uint8
    with pytest.raises(UserError, match="`interpolation_type` 'box' is not one of bilinear, bicubic"):
        decode_image(encode(smooth_image(9, 12)), 8, interpolation_type="box")


def test_a_large_jpeg_is_decoded_at_a_fraction(monkeypatch):
    image = smooth_image(103, 130).resize((1300, 1030), Image.Resampling.BICUBIC)
    loaded = []
    original = Image.Image.getexif
    monkeypatch.setattr(Image.Image, "getexif", lambda self: (loaded.append(self.size), original(self))[1])
    sample = decode_image(encode(image, "JPEG", quality=95), 128, "jpg")
    assert loaded[-1] == (163, 129) and sample["original_sizes"].tolist() == [1030, 1300]
    reference = image.resize((1300 * 128 // 1030, 128), Image.Resampling.BILINEAR)
    left = (reference.width - 128) // 2
    difference = np.abs(pixels(sample) - np.asarray(reference).astype(int)[:, left : left + 128])
    assert difference.mean() < 4
    decode_image(encode(image, "JPEG"), 600, "jpg")
    assert loaded[-1] == (1300, 1030)


def test_crops_and_flips_say_where_they_are():
    rows, columns = np.mgrid[:20, :50]
    source = np.stack([rows, columns, 0 * rows], -1).astype(np.uint8)
    raw = {"png": encode(Image.fromarray(source)), "caption": b"x"}
    flips, tops, lefts = set(), set(), set()
    for resolution, array in ((20, source), (20, source.transpose(1, 0, 2))):
        raw["png"] = encode(Image.fromarray(array))
        for seed in range(200):
            sample = decode_image_text(raw, random.Random(seed), resolution=resolution, random_flip=True)
            top, left = sample["crop_top_lefts"].tolist()
            flip = int(np.any(pixels(sample)[0, 0] > pixels(sample)[0, -1]))
            image = array[:, ::-1] if flip else array
            assert (pixels(sample) == image[top : top + 20, left : left + 20]).all()
            flips.add(flip), tops.add(top), lefts.add(left)
    assert flips == {0, 1} and {0, 30} <= tops and {0, 30} <= lefts


def test_captions():
    def caption(raw, **options):
        image = {"png": encode(random_image(0))}
        return decode_image_text(image | raw, random.Random(0), resolution=R, **options)["captions"]

    assert caption({"txt": "Grüße\n".encode()}) == "Grüße"
    assert caption({"caption": b"\xef\xbb\xbfx"}) == "x" and caption({"text": b"a", "txt": b"b"}) == "a"
    assert caption({"txt": b"x"}, proportion_empty_prompts=1.0) == ""
    for raw, reason in [({}, "missing_caption"), ({"txt": b" "}, "missing_caption"), ({"txt": b"\xff\xfe"}, "decode")]:
        with pytest.raises(SampleError) as caught:
            caption(raw)
        assert caught.value.reason == reason
    rng = random.Random(1)
    raw = {"png": encode(random_image(0)), "txt": b"x"}
    shares = [decode_image_text(raw, rng, resolution=R, proportion_empty_prompts=0.25)["captions"] for _ in range(400)]
    assert 60 < shares.count("") < 140


def test_16_bit_grey_is_scaled():
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    expected = np.round(values / 257).astype(int)[..., None]
    assert (pixels(decode_image(encode(image), 8)) == expected).all()


def test_transparency_is_laid_on_white():
    rgba = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    rgba[:4, :, 3] = 0
    alpha = rgba[..., 3:] / 255.0
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(pixels(decode_image(encode(Image.fromarray(rgba)), 8)) - expected).max() <= 1
    webp = encode(Image.fromarray(rgba), "WEBP", lossless=True, exact=True)
    assert np.abs(pixels(decode_image(webp, 8, "webp")) - expected).max() <= 1

    la = Image.fromarray(rgba[..., 2:])
    assert la.mode == "LA"
    expected = rgba[..., 2:3] * alpha + 255 * (1 - alpha)
    assert np.abs(pixels(decode_image(encode(la), 8)) - expected).max() <= 1


def test_palettes():
    indices = np.random.default_rng(0).integers(0, 4, (8, 8), dtype=np.uint8)
    palette = np.array([[255, 0, 0], [0, 255, 0], [10, 20, 30], [0, 0, 0]], dtype=np.uint8)
    image = Image.frombytes("P", (8, 8), indices.tobytes())
    image.putpalette(palette.tobytes())
    assert (pixels(decode_image(encode(image), 8)) == palette[indices]).all()
    transparent = encode(image, transparency=2)
    palette[2] = 255
    assert (pixels(decode_image(transparent, 8)) == palette[indices]).all()


def test_grey_bilevel_cmyk_and_transparent_colours():
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    assert (pixels(decode_image(encode(Image.fromarray(grey)), 8)) == grey[..., None]).all()
    assert (pixels(decode_image(encode(Image.fromarray(grey > 99)), 8)) == 255 * (grey > 99)[..., None]).all()
    colour = pixels(decode_image(encode(Image.fromarray(grey), transparency=8), 8))
    assert (colour[grey == 8] == 255).all() and (colour[grey == 12] == 12).all()
    cmyk = Image.new("RGB", (64, 64), (200, 60, 20)).convert("CMYK")
    assert np.abs(pixels(decode_image(encode(cmyk, "JPEG", quality=98), 32, "jpg")) - [200, 60, 20]).max() <= 6


@pytest.mark.parametrize(
    "image_bytes, reason",
    [
        (png_header(20000, 10050), "too_big"),
        (png_header(9000, 10050), "too_big"),  # where Pillow alone would only warn
        (png_header(100, 100), "decode"),  # no pixels
        (encode(Image.new("L", (2, 4000))), "too_big"),  # 512 x 1,024,000 after the resize
        (encode(Image.new("L", (5, 40))), "too_small"),
        (encode(random_image(0), "JPEG")[:-300], "decode"),
        (encode(random_image(0))[:-200], "decode"),
        (encode(random_image(0), "PPM"), "decode"),
        (b"", "decode"),
    ],
    ids=["200 Mpx", "90 Mpx", "no pixels", "long", "small", "cut jpeg", "cut png", "ppm", "empty"],
)
def test_images_that_are_refused(image_bytes, reason, recwarn):
    with pytest.raises(SampleError) as caught:
        decode_image(image_bytes, 512, min_image_size=6 if reason == "too_small" else 0)
    assert caught.value.reason == reason and not recwarn.list


def test_a_raised_pixel_limit_holds():
    image = encode(Image.new("1", (400, 300)))
    assert decode_image(image, 32, max_image_pixels=120_000)["images"].shape == (3, 32, 32)
    with pytest.raises(SampleError, match="too_big"):
        decode_image(image, 32, max_image_pixels=119_999)


# ----- hostile bytes


@pytest.fixture(scope="module")
def fuzz_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    contents = members(0, 3) + pickle_members(folder / "trap") + members(3, 3)
    write_tar(folder / "good.tar", contents)
    return folder


edits = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=12)), max_size=8)


@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(edits=edits, cut=st.floats(0.3, 1.3), in_headers=st.booleans())
def test_no_tar_can_do_harm(fuzz_folder, edits, cut, in_headers):
    content = bytearray((fuzz_folder / "good.tar").read_bytes())
    headers = [offset for offset, _, _ in member_offsets(fuzz_folder / "good.tar").values()]
    for place, new in edits:
        start = int(place * (len(content) - len(new)))
        if in_headers:
            start = headers[int(place * (len(headers) - 1))] + int(place * 7919) % 260
        content[start : start + len(new)] = new
        if in_headers:  # with a checksum that fits, so that the parser goes on
            header = start - min(start - offset for offset in headers if offset <= start)
            content[header + 148 : header + 156] = b" " * 8
            content[header + 148 : header + 156] = f"{sum(content[header : header + 512]):06o}\0 ".encode()
    shard = fuzz_folder / "mutated.tar"
    shard.write_bytes(content[: int(len(content) * cut)])
    data, used = make_data([str(shard)], num_lanes=1, batch_size=1, max_skip_ratio=1.0), 0
    try:
        for _ in islice(data, 14):
            used += 1
    except UserError:
        pass
    skipped = sum(data.counters[name] for name in SAMPLE_SKIPS)
    assert data.counters["read"] == used + skipped
    assert not (fuzz_folder / "trap").exists()
