"""Lanes: the parts of the training data that are read side by side, each in an order of its own."""

import functools
import math
import random
from collections.abc import Iterator

from common.data.shards import SKIP_CLASSES, SampleError, tar_samples
from common.errors import UserError, mask_credentials
from common.keyed_random import keyed_seed

UNREADABLE = ("shard_open", "shard_read", "decode", "missing_caption", "too_big")  # what max_skip_ratio counts
MAX_LOGGED_SKIPS = 1_000
FIRST_BLOCK = 64  # samples of a run's first block; each further one is twice as large, up to the full size
MAX_EMPTY_EPOCHS = 3  # of a lane, in a row; each deals it other shards


@functools.lru_cache(maxsize=4)
def permutation(seed: int, name: str, epoch: int, length: int) -> list[int]:
    order = list(range(length))
    random.Random(keyed_seed(seed, name, epoch)).shuffle(order)
    return order


class Tally:
    """What one micro-batch cost: raw samples read, skips by class, and the first skipped keys."""

    def __init__(self):
        self.counts = dict.fromkeys(("read", *SKIP_CLASSES), 0)
        self.skipped = []

    def skip(self, error: SampleError, key: str, shard: str):
        self.counts[error.reason] += 1
        if len(self.skipped) < MAX_LOGGED_SKIPS:
            self.skipped.append({"reason": error.reason, "key": key, "shard": shard, "detail": error.detail})


def seen_and_unreadable(counts: dict[str, int]) -> tuple[int, int]:
    """A shard that failed counts as one sample: how many it held is not known."""
    seen = counts["read"] + counts["shard_open"] + counts["shard_read"]
    return seen, sum(counts[reason] for reason in UNREADABLE)


def listing(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count or name == "read")


def new_cursor() -> dict[str, int]:
    """Where a lane stands. Start of the block: epoch, unit in the lane's epoch, position = index of the raw sample in
    the shard, taken = raw samples of the epoch before it, block = its number in the epoch. Then the offset in the
    permuted block, how many samples of the epoch were used so far, and how many epochs before it had none."""
    return {"epoch": 0, "unit": 0, "position": 0, "taken": 0, "block": 0, "offset": 0, "used": 0, "empty": 0}


def last_detail(skipped: list[dict]) -> str:
    if not skipped:
        return ""
    key, shard, detail = (mask_credentials(skipped[-1][name]) for name in ("key", "shard", "detail"))
    return f"; the last was: {key or shard.partition('?')[0].rpartition('/')[2]}: {detail}"


class Lane:
    """One lane's raw samples, endlessly, from a cursor on. shelf: a `fetch.Shelf`, where its first shard begins."""

    def __init__(self, data, index: int, cursor: dict[str, int], shelf):
        self.data, self.index, self.cursor, self.shelf = data, index, dict(cursor), shelf
        if data._folder is None:
            shelf.begin(index, self._shards_from(cursor["epoch"], cursor["unit"])[:1])
        self.reader = None  # of the epoch; opened at the cursor
        self.tally = Tally()  # of the micro-batch that is being made
        self.block, self.after = [], None  # the permuted block, and (unit, position) where the next one starts

    def next_sample(self, tally: Tally) -> tuple[int, str, str, dict]:
        """(epoch, shard, key, raw); `self.cursor` then stands behind it."""
        while self.cursor["offset"] >= len(self.block):
            self._read_block(tally)
        epoch, offset = self.cursor["epoch"], self.cursor["offset"]
        sample, self.block[offset] = self.block[offset], None
        self.cursor["offset"] += 1
        if self.cursor["offset"] == len(self.block):
            self._next_block()
        return epoch, *sample

    def _next_block(self):
        cursor, (unit, position) = self.cursor, self.after
        taken, block = cursor["taken"] + len(self.block), cursor["block"] + 1
        cursor.update(unit=unit, position=position, taken=taken, block=block, offset=0)
        self.block = []

    def _read_block(self, tally: Tally):
        data, cursor = self.data, self.cursor
        if self.reader is None:
            self.reader = self._raw_samples(cursor["epoch"], cursor["unit"], cursor["position"])
        self.after = cursor["unit"], cursor["position"]
        most, size = min(self._block_samples(), self._quota() - cursor["taken"]), 0
        while len(self.block) < most and size < data.shuffle_block_bytes:
            record = next(self.reader, None)
            if record is None:
                break
            unit, position, shard, key, raw = record
            self.after = unit, position
            if not isinstance(raw, SampleError):
                self.block.append((shard, key, raw))
                size += sum(len(value) for value in raw.values() if value is not None)
            elif cursor["offset"] == 0:  # otherwise a batch before the resume has counted it
                tally.skip(raw, "", shard)
        if self.block:
            name = (data.seed, "block", self.index, cursor["epoch"], cursor["block"])
            random.Random(keyed_seed(*name)).shuffle(self.block)
            if cursor["offset"] >= len(self.block):  # resumed, and the shards hold less than they did
                self._next_block()
            return
        empty = 0 if cursor["used"] else cursor["empty"] + 1
        if empty == MAX_EMPTY_EPOCHS:
            flag = getattr(data._source, "flag", "`train_shards_path_or_url`")
            raise UserError(
                f"Lane {self.index} of {data.num_lanes} found no usable sample in {empty} whole epochs "
                f"({listing(tally.counts)}): check {flag}, or pass fewer `data_lanes`"
                f"{'; skipped_samples.jsonl has the first' if data.skipped_log else ''}{last_detail(tally.skipped)}."
            )
        self.cursor = new_cursor() | {"epoch": cursor["epoch"] + 1, "empty": empty}
        self.reader = None

    def _block_samples(self) -> int:
        """How many samples are shuffled together; few at a run's start, for a block is given when it is whole."""
        growing = self.data.growing and self.cursor["epoch"] == 0
        most = FIRST_BLOCK << min(self.cursor["block"], 30) if growing else math.inf
        return min(self.data.shuffle_block_samples, most)

    def _quota(self) -> float:
        """Raw samples of an epoch that the lane may take."""
        most, lanes = self.data.max_train_samples, self.data.num_lanes
        return math.inf if most is None else most // lanes + (self.index < most % lanes)

    def _order(self, name: str, epoch: int, length: int) -> list[int]:
        """The lane's share of an epoch; of a part of the data it is the same part in each epoch."""
        epoch = 0 if self.data.max_train_samples is not None else epoch
        return permutation(self.data.seed, name, epoch, length)[self.index :: self.data.num_lanes]

    def _units(self, epoch: int) -> list[tuple[str, int, int]]:
        """(shard, part of it, number of parts) of an epoch, in the order in which they are read."""
        shards = self.data.shards
        parts = math.ceil(self.data.num_lanes / len(shards))
        units = self._order("units", epoch, len(shards) * parts)
        return [(shards[unit // parts], unit % parts, parts) for unit in units]

    def _shards_from(self, epoch: int, unit: int) -> list[str]:
        """The shards that are read from a place on, until the end of the next epoch."""
        return [shard for shard, _, _ in self._units(epoch)[unit:] + self._units(epoch + 1)]

    def _raw_samples(self, epoch: int, unit: int, position: int) -> Iterator[tuple]:
        """(unit, position, shard, key, raw) of an epoch in plan order, from a position on.

        unit and position stand behind the sample; raw is a SampleError where the rest of a shard is lost.
        """
        data = self.data
        if data._folder is not None:
            order = self._order("items", epoch, len(data._items))
            for index in range(position, len(order)):
                yield 0, index + 1, data._folder, *data._folder_sample(order[index])
            return
        for unit_index, (shard, part, parts) in list(enumerate(self._units(epoch)))[unit:]:
            try:
                with self.shelf.open(self.index, shard, self._shards_from(epoch, unit_index + 1)) as file:
                    for index, key, raw in tar_samples(file, data.required, part, parts, position):
                        yield unit_index, index + 1, shard, f"{shard.rsplit('/', 1)[-1]}/{key}", raw
            except SampleError as error:
                self.shelf.forget(shard)
                yield unit_index + 1, 0, shard, "", error
            position = 0
