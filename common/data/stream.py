"""The training data: text-image pairs from tar shards or a folder, in an order that a resumed run repeats exactly.

The stream is cut into L lanes. Micro-batch j of the whole run comes from lane j mod L, and rank r's n-th micro-batch
is j = j0 + n * world_size + r, so the sequence does not depend on how many ranks and workers share the lanes. The
units of an epoch (shards, or parts of shards where there are fewer shards than lanes) are permuted and dealt to the
lanes. A lane reads its units in blocks of undecoded samples, permutes each block, and decodes after that; the first
epoch's blocks grow, so that the first one is soon whole. Everything random is keyed by numbers that a checkpoint
holds: (seed, epoch), (seed, lane, epoch, block) or (seed, j). A lane's cursor is the start of its block, in raw
samples, and the offset in the permuted block.

Limits. Resuming reads each lane's block again, after a scan of at most one shard. Lanes drift apart: one may be in its
second epoch while another is in its first. A remote shard that breaks off is counted and the rest left out, so such a
run repeats exactly only if the error does. The window of `max_skip_ratio` starts anew on resume.
Memory of a worker: its lanes x (`shuffle_block_bytes` + one sample) undecoded, and two finished micro-batches.
Temporary disk space (TMPDIR), for remote shards without a cache: two per lane, of small ones up to nine.

Left out: video and audio, ICC profiles, writing shards, and any decoding of members that `required` does not name.
"""

import contextlib
import hashlib
import itertools
import json
import os
import random
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from common.data.fetch import Shelf
from common.data.folders import IMAGE_KEYS, TEXT_KEYS, read_sample, read_samples
from common.data.lanes import MAX_LOGGED_SKIPS, Lane, Tally, last_detail, listing, new_cursor, seen_and_unreadable
from common.data.shard_cache import ShardCache, temporary_room
from common.data.shards import SKIP_CLASSES, SampleError, check_members, is_remote
from common.errors import UserError, mask_credentials, without_credentials
from common.keyed_random import keyed_seed

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

SKIP_WINDOW, SKIP_WINDOW_MIN = 10_000, 1_000  # samples over which max_skip_ratio is judged
POLL_SECONDS = 5  # how often a wait for the workers checks that they live
END_SECONDS = 3  # for the workers to end by themselves
MAX_TMPDIR = 75  # characters; a Unix socket in it, of at most 107, is /pymp-????????/listener-????????


class TrainingData:
    """The training stream of one rank: iterate to get micro-batches for ever, from the current position on.

    A micro-batch is a dict: what `decode` returns, collated (tensors stacked, all else in lists of length batch_size),
    and `keys` (list of "shard.tar/key"), `micro_batch` (int, j of the whole run), `epoch` (int, its lowest).

    shards: from `expand_shards`; decode(raw, rng): a sample's dict from {extension: bytes}, or SampleError.
    required: groups of member extensions, of which a sample needs one each. num_lanes: default 8 * world_size, or
    those of the loaded state. max_train_samples: at most that many distinct samples, the same in each epoch.
    max_skip_ratio: share of unreadable samples among the last 10,000 above which the run stops. data_timeout: seconds
    without a batch from the workers, or without a byte from a pipe's command, after which it is given up.
    shard_disk_gb: what remote shards may take in TMPDIR, a process; default: two shards a lane. shard_cache_dir: keeps
    them whole, at most shard_cache_gb of them; shared by processes.
    source: samples that are neither shards nor a folder with captions: `name`, `keys` (list of str, in a fixed order)
    and read(index) -> {extension: bytes}, perhaps `flag`, the user's, for errors, and `unusable` and `notes` as of
    `folders.Samples`; `shards` then only says which data they are.
    skipped_log: JSON lines of the first 1,000 skipped samples; ranks above 0 write beside it, `NAME.rank1.jsonl`.
    Raises UserError here, in `load_state_dict`, and while iterating.
    """

    def __init__(
        self,
        shards: list[str],
        decode: Callable[[dict[str, bytes], random.Random], dict],
        *,
        batch_size: int,
        seed: int,
        required: tuple[tuple[str, ...], ...] = (IMAGE_KEYS, TEXT_KEYS),
        rank: int = 0,
        world_size: int = 1,
        num_lanes: int | None = None,
        num_workers: int = 0,
        max_train_samples: int | None = None,
        shuffle_block_samples: int = 1000,
        shuffle_block_bytes: int = 64 << 20,
        max_skip_ratio: float = 0.2,
        data_timeout: float = 600,
        shard_disk_gb: float | None = None,
        shard_cache_dir: Path | None = None,
        shard_cache_gb: float | None = None,
        pin_memory: bool = False,
        skipped_log: Path | None = None,
        report: Callable[[str], None] = print,
        source=None,
    ):
        assert batch_size > 0 and shuffle_block_samples > 0 and shuffle_block_bytes > 0 and 0 <= rank < world_size
        self.shards, self.decode, self.required = list(shards), decode, required
        self.batch_size, self.seed, self.max_train_samples = batch_size, seed, max_train_samples
        self.rank, self.world_size = rank, world_size
        self.shuffle_block_samples, self.shuffle_block_bytes = shuffle_block_samples, shuffle_block_bytes
        self.max_skip_ratio, self.data_timeout, self.pin_memory = max_skip_ratio, data_timeout, pin_memory
        self.skipped_log, self.report = skipped_log and Path(skipped_log), report
        self.counters = dict.fromkeys(("read", *SKIP_CLASSES), 0)
        self._given_lanes, self._given_workers = num_lanes, num_workers
        self.num_workers = num_workers  # or fewer, so that it divides the lanes
        self.growing = True  # whether the first epoch's blocks grow; those of runs begun before did not
        self._is_remote = any(map(is_remote, self.shards)) and source is None
        self._cache = ShardCache(shard_cache_dir, shard_cache_gb and 1e9 * shard_cache_gb) if shard_cache_dir else None
        self._disk_bytes = shard_disk_gb and 1e9 * shard_disk_gb
        for name, value in (("shard_cache_dir", shard_cache_dir), ("shard_disk_gb", shard_disk_gb)):
            if value is not None and not self._is_remote:
                raise UserError(f"`{name}` is for shards that are fetched, and all data are local: drop it")
        if shard_cache_gb is not None and shard_cache_dir is None:
            raise UserError("`shard_cache_gb` is the size of a cache: name its folder in `shard_cache_dir`")
        folders = [shard for shard in self.shards if not is_remote(shard) and os.path.isdir(shard) and source is None]
        if folders and len(self.shards) > 1:
            raise UserError(
                f"`train_shards_path_or_url`: {folders[0]!r} is a folder of images, which goes with no shards and "
                "no other folder: put all images into one folder."
            )
        self._folder = folders[0] if folders else None
        self._items, unusable, notes = read_samples(self._folder) if folders else (None, 0, [])
        self._source = source
        if source is not None:
            self._folder, self._items = source.name, [(key, None) for key in source.keys]
            unusable, notes = getattr(source, "unusable", 0), getattr(source, "notes", [])
        for note in notes if rank == 0 else ():
            report(f"note: {note}.")
        if unusable > max_skip_ratio * len(self._items or ()):
            flag = getattr(source, "flag", "`train_shards_path_or_url`")
            raise UserError(
                f"{flag}: {unusable} of {len(self._items)} samples cannot be used ({'; '.join(notes)}): correct that, "
                "or raise `max_skip_ratio`."
            )
        names = [name for name, _ in self._items or ()]
        unsigned = [without_credentials(shard) if is_remote(shard) else shard for shard in self.shards]
        self._shards_hash = hashlib.sha256(json.dumps([unsigned, names]).encode()).hexdigest()
        self._start(num_lanes or 8 * world_size, 0, None)

    def _start(self, num_lanes: int, micro_batch: int, cursors: dict[int, dict] | None):
        """Set the position: the next global micro-batch, and all lanes' cursors (None = the start of the data)."""
        if num_lanes % self.world_size:
            raise UserError(
                f"The data's {num_lanes} lanes cannot be shared evenly by {self.world_size} processes: use a "
                "number of processes that divides the lanes, or change `data_seed` to start the data afresh."
            )
        if self.max_train_samples is not None and self.max_train_samples < num_lanes:
            raise UserError(f"`max_train_samples` must be at least {num_lanes}, the number of lanes.")
        if self._items is not None and len(self._items) < num_lanes:
            raise UserError(
                f"{self._folder} holds {len(self._items)} images and the data have {num_lanes} lanes: "
                f"pass `data_lanes`={self.world_size} or any multiple of it up to the number of images."
            )
        self.num_lanes, self._first = num_lanes, micro_batch
        self._consumed = 0  # by this rank, since the start or the resume
        self._cursors = cursors or {lane: new_cursor() for lane in range(num_lanes)}
        lanes = num_lanes // self.world_size
        num_workers = max((k for k in range(1, self._given_workers + 1) if lanes % k == 0), default=0)
        if num_workers != self.num_workers and self.rank == 0:
            self.report(
                f"`dataloader_num_workers` {self._given_workers} is reduced to {num_workers}, "
                f"which divides the {lanes} lanes of a process."
            )
        self.num_workers = num_workers
        self._first_epoch = max(self._cursors[lane]["epoch"] for lane in self._own_lanes())
        self._skipped = []  # the last one
        self._window, self._window_seen, self._window_unreadable = deque(), 0, 0

    def _own_lanes(self) -> list[int]:
        return [lane for lane in range(self.num_lanes) if (lane - self._first - self.rank) % self.world_size == 0]

    # ----- reading: in the workers; `lanes.Lane` gives raw samples

    def _folder_sample(self, index: int) -> tuple[str, dict]:
        """(key, raw)"""
        name, caption = self._items[index]
        return name, self._source.read(index) if self._source is not None else read_sample(self._folder, name, caption)

    def _make_item(self, j: int, lane: Lane) -> dict:
        """Micro-batch j, with what the consumer needs to account for it."""
        rng = random.Random(keyed_seed(self.seed, "augment", j))
        samples, keys, epochs = [], [], []
        tally = lane.tally = Tally()
        while len(samples) < self.batch_size:
            epoch, shard, key, raw = lane.next_sample(tally)
            tally.counts["read"] += 1
            try:
                check_members(raw, self.required)
                samples.append(self.decode(raw, rng))
            except SampleError as error:
                tally.skip(error, key, shard)
                seen, unreadable = seen_and_unreadable(tally.counts)
                if seen >= SKIP_WINDOW:
                    self._check_skip_ratio(seen, unreadable, tally.counts, tally.skipped)
                continue
            keys.append(key)
            epochs.append(epoch)
            lane.cursor["used"] += 1
        columns = {name: [sample[name] for sample in samples] for name in samples[0]}
        batch = {name: torch.stack(c) if torch.is_tensor(c[0]) else c for name, c in columns.items()}
        batch |= {"keys": keys, "micro_batch": j, "epoch": min(epochs)}
        account = {"lane": lane.index, "cursor": dict(lane.cursor), "counts": tally.counts, "skipped": tally.skipped}
        return {"batch": batch, **account}

    def _make_items(self, worker: int, num_workers: int) -> Iterator[dict]:
        """Every num_workers-th micro-batch of the rank from the position on; its lanes are no other worker's."""
        count = self.num_lanes // self.world_size // num_workers
        disk_bytes = self._disk_bytes and self._disk_bytes / num_workers
        steps = itertools.count(self._consumed + worker, num_workers)
        numbers = (self._first + n * self.world_size + self.rank for n in steps)
        with contextlib.closing(Shelf(self.data_timeout, disk_bytes, self._cache, self.shuffle_block_bytes)) as shelf:
            first = list(itertools.islice(numbers, count))  # one of each lane
            lanes = {i: Lane(self, i, self._cursors[i], shelf) for i in (j % self.num_lanes for j in first)}
            for j in itertools.chain(first, numbers):
                lane = lanes[j % self.num_lanes]
                try:
                    item = self._make_item(j, lane)
                except UserError as error:
                    yield {"error": str(error), "skipped": lane.tally.skipped, "counts": lane.tally.counts}
                    return
                yield item

    # ----- consuming: in the training process

    def __iter__(self) -> Iterator[dict]:
        if self._is_remote:
            self._make_room()
        if self.num_workers and len(tempfile.gettempdir()) > MAX_TMPDIR:
            raise UserError(
                f"TMPDIR={tempfile.gettempdir()} is too long for the sockets of loader processes: set it to a path "
                f"of at most {MAX_TMPDIR} characters, or pass `dataloader_num_workers`=0"
            )
        items = _Items(self)
        loader = DataLoader(
            items,
            batch_size=None,
            num_workers=self.num_workers,
            timeout=min(POLL_SECONDS, self.data_timeout) if self.num_workers else 0,
            pin_memory=self.pin_memory,
            worker_init_fn=outlive_sigterm if self.num_workers else None,
            generator=torch.Generator(),  # so that the loader does not draw from the training's random state
        )
        with _no_signal_on_worker_death():
            iterator = iter(loader)
        try:
            while True:
                item = self._next_item(iterator)
                if "error" in item:
                    self._count(item)
                    raise UserError(item["error"])
                self._consume(item)
                yield item["batch"]
        except UserError as error:
            error.on_one_rank = True
            raise
        finally:
            if self.num_workers:  # not left to the collector: in the traceback of an error it can wait for 10 s
                _end_workers(iterator)
            elif items.made is not None:
                items.made.close()

    def _make_room(self):
        if self._cache is not None:
            self._cache.prepare()
            return
        remote = next(filter(is_remote, self.shards))
        lanes = self.num_lanes // self.world_size
        self._disk_bytes, note = temporary_room(remote, lanes, self._disk_bytes, self.shuffle_block_bytes)
        if note and self.rank == 0:
            self.report(f"note: {note}.")

    def _next_item(self, iterator) -> dict:
        deadline = time.monotonic() + self.data_timeout
        while True:
            try:
                return next(iterator)
            except RuntimeError as error:
                if "exited unexpectedly" in str(error) or "killed by signal" in str(error):
                    raise UserError(
                        "A data loading process died, often for lack of memory: lower `dataloader_num_workers`, or "
                        f"look for a crash in the system's log ({str(error).splitlines()[0]})."
                    ) from None
                if "timed out" not in str(error):
                    raise
            if time.monotonic() > deadline:
                raise UserError(
                    f"No batch came for {self.data_timeout:g} seconds: check that the storage of "
                    "`train_shards_path_or_url` answers, or raise `data_timeout`."
                )

    def _consume(self, item: dict):
        self._cursors[item["lane"]] = item["cursor"]
        self._consumed += 1
        self._count(item)
        self._skipped = item["skipped"][-1:] or self._skipped
        seen, unreadable = seen_and_unreadable(item["counts"])
        self._window.append((seen, unreadable))
        self._window_seen += seen
        self._window_unreadable += unreadable
        while self._window_seen - self._window[0][0] >= SKIP_WINDOW:
            seen, unreadable = self._window.popleft()
            self._window_seen -= seen
            self._window_unreadable -= unreadable
        whole_epoch = min(self._cursors[lane]["epoch"] for lane in self._own_lanes()) > self._first_epoch
        if self._window_seen >= SKIP_WINDOW_MIN or whole_epoch:
            self._check_skip_ratio(self._window_seen, self._window_unreadable, self.counters, self._skipped)

    def _count(self, item: dict):
        self._log_skipped(item["skipped"])
        for name, count in item["counts"].items():
            self.counters[name] += count

    def _check_skip_ratio(self, seen: int, unreadable: int, counts: dict[str, int], skipped: list[dict]):
        if unreadable > self.max_skip_ratio * seen:
            raise UserError(
                f"{unreadable} of the last {seen} samples could not be read ({listing(counts)}): repair the data"
                f"{' (skipped_samples.jsonl has the first)' if self.skipped_log else ''}, or raise "
                f"`max_skip_ratio`{last_detail(skipped)}."
            )

    def _log_skipped(self, skipped: list[dict]):
        if not skipped or self.skipped_log is None:
            return
        path = self.skipped_log
        if self.rank:
            path = path.with_name(f"{path.stem}.rank{self.rank}{path.suffix}")
        logged = sum(count for name, count in self.counters.items() if name != "read")
        with open(path, "a", encoding="utf-8") as file:
            for entry in skipped[: max(0, MAX_LOGGED_SKIPS - logged)]:
                file.write(json.dumps({name: mask_credentials(value) for name, value in entry.items()}) + "\n")

    # ----- the position

    def _identity(self) -> dict:
        """What the order of the samples follows from; a position is good for the same values only."""
        return {
            "train_shards_path_or_url": self._shards_hash,
            "num_lanes": self.num_lanes,
            "train_batch_size": self.batch_size,
            "data_seed": self.seed,
            "max_train_samples": self.max_train_samples,
            "shuffle_block_samples": self.shuffle_block_samples,
            "shuffle_block_bytes": self.shuffle_block_bytes,
        }

    def state_dict(self) -> dict:
        """This rank's position behind the last micro-batch that the caller got; plain values for JSON."""
        return {
            "identity": self._identity(),
            "next_micro_batch": self._first + self._consumed * self.world_size,
            "cursors": {str(lane): dict(self._cursors[lane]) for lane in self._own_lanes()},
            "counters": dict(self.counters),
        } | ({"growing_blocks": True} if self.growing else {})

    @staticmethod
    def merge_state_dicts(states: list[dict]) -> dict:
        """One state from those of all ranks, for any world size that divides the lanes.

        Raises UserError when the ranks have not consumed the same number of micro-batches.
        """
        if any(state[key] != states[0][key] for state in states for key in ("identity", "next_micro_batch")):
            raise UserError("The ranks stand at different places of the data: save when all have done the same steps.")
        cursors = {lane: cursor for state in states for lane, cursor in state["cursors"].items()}
        counters = {name: sum(state["counters"][name] for state in states) for name in states[0]["counters"]}
        assert len(cursors) == states[0]["identity"]["num_lanes"], "the states of some ranks are missing"
        return states[0] | {"cursors": cursors, "counters": counters}

    def load_state_dict(self, merged: dict):
        """Continue at a merged state; before iterating. Rank 0 takes over the counters of all ranks.

        With another `seed` than the state's, the data start afresh (micro-batch numbers go on, counters start at 0).
        Raises UserError when anything else of the identity differs, or the lanes cannot be shared by the ranks.
        """
        saved = merged["identity"]
        if saved["data_seed"] != self.seed:
            if self.rank == 0:
                self.report(f"`data_seed` is {self.seed}, not {saved['data_seed']}: the data start afresh.")
            self._start(self.num_lanes, merged["next_micro_batch"], None)
            return
        num_lanes = self._given_lanes or saved["num_lanes"]
        identity = self._identity() | {"num_lanes": num_lanes}
        changed = [f"`{name}`" for name in identity if identity[name] != saved[name]]
        if changed:
            raise UserError(
                f"The checkpoint's place in the data does not fit, for another {', '.join(changed)} "
                "was given: restore it, or change `data_seed` to start the data afresh."
            )
        self.growing = merged.get("growing_blocks", False)
        cursors = {int(lane): dict(cursor) for lane, cursor in merged["cursors"].items()}
        self._start(num_lanes, merged["next_micro_batch"], cursors)
        if self.rank == 0:
            self.counters = dict(merged["counters"])


class _Items(IterableDataset):
    def __init__(self, data: TrainingData):
        self.data, self.made = data, None

    def __iter__(self):
        worker = get_worker_info()
        self.made = self.data._make_items(worker.id, worker.num_workers) if worker else self.data._make_items(0, 1)
        return self.made


@contextlib.contextmanager
def _no_signal_on_worker_death():
    """Keep torch from raising wherever the main thread is when a worker dies: `_next_item` looks after that."""
    handler = signal.getsignal(signal.SIGCHLD)
    yield
    if threading.current_thread() is threading.main_thread() and handler is not None:
        signal.signal(signal.SIGCHLD, handler)


def _end_workers(iterator):
    """End a loader's processes; one that still waits for its storage is killed: it would outlive the run's SIGTERM."""
    kill = threading.Timer(END_SECONDS, lambda: [worker.kill() for worker in iterator._workers])
    kill.start()
    iterator._shutdown_workers()
    kill.cancel()


SKIPPED = "skipped_samples.jsonl"  # what its data stream writes
WORKER_SECONDS = 60  # how long a loader process outlives a SIGTERM, for the run to stop cleanly before


def outlive_sigterm(worker=None):
    """`worker_init_fn` of a loader: a job's signal reaches it too, and the run needs it until the next step's end."""
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_SECONDS))
