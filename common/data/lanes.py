"""Lanes: the parts of the training data that are read side by side, each in an order of its own."""

import functools
import random

from common.data.shards import SKIP_CLASSES, SampleError
from common.errors import UserError, mask_credentials
from common.keyed_random import keyed_seed

UNREADABLE = ("shard_open", "shard_read", "decode", "missing_caption", "too_big")  # what max_skip_ratio counts
MAX_LOGGED_SKIPS = 1_000
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
            shelf.begin(index, data.next_shard(index, cursor["epoch"], cursor["unit"]))
        self.reader = None  # of the epoch; opened at the cursor
        self.block, self.after = [], None  # the permuted block, and (unit, position) where the next one starts

    def new_tally(self) -> Tally:
        """The account of the next micro-batch, kept for the report of one that cannot be finished."""
        self.tally = Tally()
        return self.tally

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
            place = cursor["epoch"], cursor["unit"], cursor["position"]
            self.reader = data._raw_samples(self.index, *place, self.shelf)
        self.after = cursor["unit"], cursor["position"]
        left = data._quota(self.index) - cursor["taken"]
        most, size = min(data.shuffle_block_samples, left), 0
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
            last = last_detail(tally.skipped or data._first_skip())
            raise UserError(
                f"Lane {self.index} of {data.num_lanes} found no usable sample in {empty} whole epochs "
                f"({listing(tally.counts)}): check {flag}, or pass fewer `data_lanes`"
                f"{'; skipped_samples.jsonl has the first' if data.skipped_log else ''}{last}."
            )
        self.cursor = new_cursor() | {"epoch": cursor["epoch"] + 1, "empty": empty}
        self.reader = None
