"""Samples per second of the training stream against plain webdataset, on one core: `python tests/benchmarks/data.py`.

Both read the same generated 640 x 480 JPEG shards, decode, bring the shorter side to the resolution, crop, and collate
to uint8 batches. webdataset resizes with Pillow's bilinear filter and shuffles over the same number of samples. Where
the source is at least twice the resolution, the stream decodes it at half its size, webdataset in full. The two take
turns, so that what else the machine does hits both. Prints the medians and the ratio, then one line of JSON.
With --remote MB/s the shards come from a throttled server: see `remote.py` beside this file.
"""

import argparse
import io
import json
import os
import random
import statistics
import sys
import tempfile
import time
from functools import partial
from itertools import islice
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import flags  # noqa: E402
from common.data.images import decode_image_text  # noqa: E402
from common.data.stream import TrainingData  # noqa: E402
from tests.benchmarks import remote  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import webdataset as wds  # noqa: E402
from PIL import Image  # noqa: E402

SHUFFLE = 256  # samples shuffled together, on both sides


def natural_image(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Noise whose amplitude falls with the frequency as that of photographs does, correlated between colours."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0
    planes = [np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) / frequency) for _ in range(4)]
    image = np.stack([planes[3] + 0.4 * plane for plane in planes[:3]], -1)  # (h, w, 3)
    image = 128 + 50 * (image - image.mean()) / image.std()
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def write_shards(folder: Path, count: int, samples: int, distinct: int | None = None, quality: int = 90) -> list[str]:
    """distinct: how many images there are, which repeat; default: all."""
    rng, images, paths = np.random.default_rng(0), [], []
    for _ in range(distinct or count * samples):
        buffer = io.BytesIO()
        natural_image(rng, 480, 640).save(buffer, "JPEG", quality=quality)
        images.append(buffer.getvalue())
    for shard in range(count):
        paths.append(str(folder / f"{shard:05d}.tar"))
        with wds.TarWriter(paths[-1], encoder=False) as tar:
            for number in range(samples):
                image = images[(shard * samples + number) % len(images)]
                tar.write({"__key__": f"{shard:05d}{number:04d}", "jpg": image, "txt": b"a photograph of something"})
    return paths


def pillow_decode(sample: dict, rng: random.Random, resolution: int) -> dict:
    image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
    width, height = image.size
    scale = resolution / min(width, height)
    image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
    top, left = rng.randint(0, image.height - resolution), rng.randint(0, image.width - resolution)
    image = image.crop((left, top, left + resolution, top + resolution))
    return {
        "images": torch.from_numpy(np.array(image)).permute(2, 0, 1),
        "captions": sample["txt"].decode(),
        "original_sizes": torch.tensor((height, width)),
        "crop_top_lefts": torch.tensor((top, left)),
    }


def webdataset_stream(shards: list[str], resolution: int, batch_size: int):
    rng = random.Random(0)
    dataset = wds.WebDataset(shards, shardshuffle=len(shards), empty_check=False).repeat().shuffle(SHUFFLE)
    samples = iter(dataset.map(lambda sample: pillow_decode(sample, rng, resolution)))
    while batch := list(islice(samples, batch_size)):
        columns = {name: [sample[name] for sample in batch] for name in batch[0]}
        yield {name: torch.stack(c) if torch.is_tensor(c[0]) else c for name, c in columns.items()}


def our_stream(shards: list[str], resolution: int, batch_size: int):
    decode = partial(decode_image_text, resolution=resolution)
    return iter(
        TrainingData(shards, decode, batch_size=batch_size, seed=0, num_lanes=1, shuffle_block_samples=SHUFFLE)
    )


def measure(stream, batches: int) -> float:
    """Samples per second over the next batches."""
    start = time.perf_counter()
    samples = sum(len(batch["captions"]) for batch in islice(stream, batches))
    return samples / (time.perf_counter() - start)


def main():
    parser = flags.ArgumentParser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--resolutions", type=flags.positive_int, nargs="+", default=[512, 256, 192])
    add("--batch_size", type=flags.positive_int, default=16)
    add("--rounds", type=flags.positive_int, default=9)
    add("--batches", type=flags.positive_int, default=32, help="per round and stream; 32 x 16 are two shuffle blocks")
    add("--remote", type=flags.positive_float, help="MB/s of each connection to a server of shards, with 4 processes")
    add("--picture", type=flags.path, help="with --remote: a .png of what each side gives")
    add("--pause", type=flags.positive_float, default=remote.PAUSE, help="with --remote: seconds that a batch is used")
    add("--seconds", type=flags.positive_int, default=60, help="of each side and round, with --remote")
    args = parser.parse_args()
    if args.picture and not args.remote:
        parser.error("--picture is of --remote; give that too")
    if args.remote:
        remote.main(args.remote, args.seconds, args.rounds, write_shards, pillow_decode, args.picture, args.pause)
        return
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

    results = []
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder), 4, 128)
        size = sum(os.path.getsize(shard) for shard in shards) / 512 / 1000
        print(f"512 JPEG images of 640 x 480, {size:.0f} kB each; batches of {args.batch_size}, one core")
        for resolution in args.resolutions:
            ours = our_stream(shards, resolution, args.batch_size)
            theirs = webdataset_stream(shards, resolution, args.batch_size)
            measure(ours, 2), measure(theirs, 2)
            rounds = [(measure(ours, args.batches), measure(theirs, args.batches)) for _ in range(args.rounds)]
            our_median, their_median = (statistics.median(column) for column in zip(*rounds, strict=True))
            ratio = statistics.median(our / their for our, their in rounds)
            print(f"{resolution} px: {our_median:.1f} samples/s, webdataset {their_median:.1f}, ratio {ratio:.3f}")
            result = {"resolution": resolution, "ours": our_median, "webdataset": their_median, "ratio": ratio}
            results.append({name: round(value, 3) for name, value in result.items()})
    print(json.dumps({"benchmark": "data", "unit": "samples/s", "results": results}))


if __name__ == "__main__":
    main()
