"""The data stream: its order and its resume. Everything runs on tiny tars made here."""

import base64
import random
import socket
import time
from itertools import islice
from pathlib import Path

from common.data.stream import TrainingData
from common.data.transfers import _request
from common.errors import UserError
from common.keyed_random import keyed_generator, keyed_seed
from tests.data.making import (
    BAD_DECODE,
    SAMPLE_SKIPS,
    R,
    bad_members,
    describe,
    image_folder,
    make_data,
    make_shards,
    run,
    write_tar,
)

import numpy as np
import pytest
import torch

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


def test_credentials_in_addresses_are_sent_as_a_header_and_never_written(tmp_path):
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
    address = "https://h/{}.tar?X-Amz-Date={}&X-Amz-Signature=1"
    signed, renewed, other = (address.format(*numbers) for numbers in ((0, 1), (0, 2), (1, 1)))
    addressed = make_data([signed]).state_dict()
    addressed["cursors"] = state["cursors"]
    make_data([renewed]).load_state_dict(addressed)
    with pytest.raises(UserError, match="train_shards_path_or_url.*`data_seed`"):
        make_data([other]).load_state_dict(addressed)
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
