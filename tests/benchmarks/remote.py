"""The training stream against webdataset on shards of a slow server: `python tests/benchmarks/data.py --remote 3`.

A server on loopback gives so many MB/s to each connection. Both read the same 16 shards of 24 MB with 4 loader
processes, into batches of 16 at 256 px, for a consumer that takes --pause seconds a batch; webdataset shuffles over
1,000 samples. The same from local files stands beside. The sides take turns. --picture draws what the consumer got;
without it, the stream also reads local files and its cache as fast as it can.
"""

import contextlib
import http.server
import json
import multiprocessing
import os
import random
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from common.data.images import decode_image_text
from common.data.stream import TrainingData
from tests.benchmarks import pictures

import torch
import webdataset as wds
from torch.utils.data import DataLoader

SHARDS, SAMPLES, BATCH, WORKERS, PAUSE = 16, 400, 16, 4, 0.1
DISTINCT = 64  # images
TURNS = 4  # a round of the cache and of local files: one turn of each says little on a busy machine


class Handler(http.server.SimpleHTTPRequestHandler):
    rate = 0.0

    def copyfile(self, source, output):
        start, sent = time.monotonic(), 0
        with contextlib.suppress(OSError):
            while chunk := source.read(1 << 16):
                output.write(chunk)
                sent += len(chunk)
                time.sleep(max(0.0, sent / self.rate - (time.monotonic() - start)))

    def log_message(self, *args):
        pass


def serve(folder, rate, port):
    os.chdir(folder)
    Handler.rate = rate
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.value = server.server_port
    server.serve_forever()


def ours(shards, **options):
    decode = partial(decode_image_text, resolution=256)
    options = {"report": lambda line: None, "batch_size": BATCH, "seed": 0, "num_workers": WORKERS} | options
    return iter(TrainingData(shards, decode, **options))


def collate(samples):
    columns = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {name: torch.stack(column) if torch.is_tensor(column[0]) else column for name, column in columns.items()}


def theirs(shards, decode):
    dataset = wds.WebDataset(shards, shardshuffle=len(shards), empty_check=False).repeat().shuffle(1000)
    decoded = dataset.map(partial(decode, rng=random.Random(0), resolution=256))
    return iter(DataLoader(decoded, batch_size=BATCH, num_workers=WORKERS, collate_fn=collate))


def measure(make, seconds, pause):
    """[seconds to the first batch, samples/s after it, share of the time spent waiting, longest wait]"""
    start = time.monotonic()
    batches = make()
    next(batches)
    first, waits, longest, count = time.monotonic() - start, 0.0, 0.0, 0
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        time.sleep(pause)
        asked = time.monotonic()
        count += len(next(batches)["captions"])
        wait = time.monotonic() - asked
        waits, longest = waits + wait, max(longest, wait)
    passed = time.monotonic() - begun
    del batches
    return [first, count / passed, waits / passed, longest]


def main(rate, seconds, rounds, write_shards, pillow_decode, picture=None, pause=PAUSE):
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        local = write_shards(Path(folder), SHARDS, SAMPLES, distinct=DISTINCT, quality=40)  # 60 kB each
        port = multiprocessing.Value("i", 0)
        server = multiprocessing.Process(target=serve, args=(folder, rate * 1e6, port), daemon=True)
        server.start()
        while not port.value:
            time.sleep(0.01)
        remote = [f"http://127.0.0.1:{port.value}/{os.path.basename(path)}" for path in local]
        cache = Path(folder, "cache")
        cached = partial(ours, remote, shard_cache_dir=cache)
        sides = {
            "stream": lambda: measure(partial(ours, remote), seconds, pause),
            "webdataset": lambda: measure(partial(theirs, remote, pillow_decode), seconds, pause),
            "stream, into a cache": lambda: measure(cached, seconds, pause),
            "stream, local files": lambda: measure(partial(ours, local), seconds, pause),
        }
        for _ in range(rounds):
            for name, side in sides.items():
                results.setdefault(name, []).append(side())
            shutil.rmtree(cache)
        if not picture:
            batches = cached()
            while next(batches) and len(list(cache.glob("*.tar"))) < SHARDS:
                pass
            del batches
            for _ in range(TURNS * rounds):
                for name, side in {"local files, no pause": partial(ours, local), "cache, no pause": cached}.items():
                    results.setdefault(name, []).append(measure(side, seconds / TURNS, 0.0))
        server.terminate()
        server.join()
    print(f"{rate:g} MB/s a connection, {rounds} round(s) of {seconds} s; medians")
    print("| | first batch | samples/s after it | time spent waiting | longest wait |\n|---|---|---|---|---|")
    medians = {name: [statistics.median(row) for row in zip(*rows, strict=True)] for name, rows in results.items()}
    for name, (first, speed, waiting, longest) in medians.items():
        print(f"| {name} | {first:.1f} s | {speed:.0f} | {waiting:.0%} | {longest:.1f} s |")
    of_others = [medians["stream"][1] / medians[name][1] for name in ("webdataset", "stream, local files")]
    print("stream / webdataset {:.2f}, / local files {:.2f}".format(*of_others))
    if picture:
        paused = {name: medians[name][1:3] for name in sides}
        pictures.draw_speeds(paused, BATCH / pause, f"{rate:g} MB/s a connection").save(picture, optimize=True)
    else:
        pairs = zip(results["cache, no pause"], results["local files, no pause"], strict=True)
        print(f"cache / local files, no pause: {statistics.median(c[1] / f[1] for c, f in pairs):.2f}")
    print(json.dumps({"benchmark": "remote data", "rate": rate, "results": results}))
