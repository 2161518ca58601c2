"""Tars, folders and streams that tests make, and a server of them."""

import io
import json
import os
import pickle
import struct
import tarfile
import zlib
from functools import partial
from itertools import islice

from common.data.images import decode_image_text
from common.data.shards import SKIP_CLASSES
from common.data.stream import TrainingData

import numpy as np
from PIL import Image

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


# Of the bad samples that `bad_members` makes: {letter in the key: reason}
BAD = {"a": "decode", "b": "missing_caption", "c": "missing_caption", "d": "too_small", "e": "too_big", "f": "decode"}


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


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def pickle_members(path):
    return [(f"000000.{extension}", pickle.dumps(Trap(path))) for extension in ("pkl", "pyd", "pth", "npy", "json")]


def member_offsets(path):
    with tarfile.open(path) as tar:
        return {member.name: (member.offset, member.offset_data, member.size) for member in tar}


def count_after(shards, batches, **options):
    data = make_data(shards, **{"batch_size": 1, "num_lanes": 1, "max_skip_ratio": 1.0} | options)
    keys = [key for batch in islice(data, batches) for key in batch["keys"]]
    return data.counters | {"keys": set(keys)}


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
