"""The demo's data and models: 1,797 handwritten digits, WebDataset shards, a small Stable Diffusion, a classifier.

The images are UCI's "Optical Recognition of Handwritten Digits" (CC BY 4.0), as scikit-learn ships them: 8x8 pixels,
here enlarged to 16x16 RGB, white on black. The teacher is a Stable Diffusion checkpoint in everything but its size:
AutoencoderKL, CLIPTextModel with its CLIPTokenizer, UNet2DConditionModel, scheduler and model_index.json; with
`sdxl=True` an SDXL checkpoint: two text encoders and tokenizers, a U-Net that is told sizes and crops.
Left out: no image encoder, no safety checker, and the text encoder, which real checkpoints take ready-made,
is trained together with the U-Net. Everything is fixed by its seed.
"""

import csv
import hashlib
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import CLIPTokenizer

RESOLUTION = 16
NUM_HELD_OUT = 360
NUM_TRAIN_SHARDS, NUM_HELD_OUT_SHARDS = 8, 2
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a photo of the digit {}",
    "a handwritten {}",
    "the number {}",
    "a picture of the number {}",
    "the digit {} written by hand",
    "{}, white on black",
    "a small image of a {}",
    "a scan of a handwritten {}",
)


class Captions(NamedTuple):
    """What captions say: one of `words`, in one of `templates`, the first of which makes the prompts."""

    words: tuple
    templates: tuple
    digits: tuple  # digits[i]: those of which words[i] is true

    def word_of(self, digit):
        """The index of the word for a digit; digit: an integer, or an array of them."""
        table = np.empty(len(WORDS), dtype=np.int64)
        for index, members in enumerate(self.digits):
            table[list(members)] = index
        return table[digit]


NAMED = Captions(WORDS, TEMPLATES, tuple((digit,) for digit in range(10)))
# The hard judge's: five digits fit each caption, so that an average of them is seen to be none.
PARITY = Captions(
    ("even", "odd"),
    (
        "a photo of an {} digit",
        "an {} handwritten digit",
        "an {} number",
        "a picture of an {} number",
        "an {} digit written by hand",
        "an {} digit, white on black",
        "a small image of an {} digit",
        "a scan of an {} number",
    ),
    ((0, 2, 4, 6, 8), (1, 3, 5, 7, 9)),
)
DATA_NOTE = (
    "Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (E. Alpaydin, C. Kaynak), CC BY 4.0"
)


def load_split():
    """Return ((images, labels), (images, labels)) for training and held out: uint8 (N, 16, 16, 3) and int (N,)."""
    digits = load_digits()
    images = np.stack([_enlarge(image) for image in digits.images])
    train, held_out = _split(digits.target)
    return (images[train], digits.target[train]), (images[held_out], digits.target[held_out])


def load_small():
    """Return the training part as it is before `load_split` enlarges it: uint8 (N, 8, 8) and int (N,)."""
    digits = load_digits()
    train, _ = _split(digits.target)
    return (digits.images[train] * (255 / 16)).round().astype(np.uint8), digits.target[train]


def _split(labels):
    return train_test_split(np.arange(len(labels)), test_size=NUM_HELD_OUT, stratify=labels, random_state=0)


def _enlarge(image):
    grey = Image.fromarray((image * (255 / 16)).round().astype(np.uint8))
    return np.asarray(grey.resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC).convert("RGB"))


def canonical_prompts(num_samples, captions=NAMED):
    """`num_samples` prompts that go through the words of the captions in turn."""
    return [captions.templates[0].format(captions.words[i % len(captions.words)]) for i in range(num_samples)]


def to_tensor(images):
    """uint8 (N, H, W, 3) to float (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def write_card(folder, title, text):
    """README.md in the hub's form, with the origin and the licence of the data."""
    card = ["---", "license: cc-by-4.0", "---", "", f"# {title}", "", text, "", f"Data: {DATA_NOTE}."]
    (Path(folder) / "README.md").write_text("\n".join(card) + "\n", encoding="utf-8")


def write_shards(output_dir, seed=0, captions=NAMED):
    """Write `train/` and `heldout/`: NNNNN.tar and NNNNN_stats.json, the same bytes every time."""
    train, held_out = load_split()
    rng = np.random.default_rng(seed)
    for name, (images, labels), num_shards in (
        ("train", train, NUM_TRAIN_SHARDS),
        ("heldout", held_out, NUM_HELD_OUT_SHARDS),
    ):
        texts = _captions_of(labels, captions, rng)
        folder = Path(output_dir) / name
        folder.mkdir(parents=True, exist_ok=True)
        for shard, members in enumerate(np.array_split(np.arange(len(images)), num_shards)):
            _write_shard(folder, shard, [(images[i], texts[i]) for i in members])
    write_card(
        output_dir,
        "Handwritten digits in WebDataset shards",
        f"{len(train[0])} captioned images in `train/`, {len(held_out[0])} in `heldout/`, {RESOLUTION} pixels, "
        "enlarged from 8; the captions were added.",
    )


def write_table(output_dir, seed=0, captions=NAMED):
    """The images and captions of `write_shards`' `train/` as PNG files and metadata.csv, with image and prompt."""
    images, labels = load_split()[0]
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with open(output_dir / "metadata.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("image", "prompt"))
        for index, text in enumerate(_captions_of(labels, captions, np.random.default_rng(seed))):
            Image.fromarray(images[index]).save(output_dir / f"{index:04d}.png")
            rows.writerow((f"{index:04d}.png", text))
    write_card(output_dir, "Handwritten digits, a table of images", f"{len(images)} images, {RESOLUTION} pixels.")


def _captions_of(labels, captions, rng):
    words = [captions.words[index] for index in captions.word_of(labels)]
    return [captions.templates[rng.integers(len(captions.templates))].format(word) for word in words]


def _write_shard(folder, shard, samples):
    with open(folder / f"{shard:05d}.tar", "wb") as file, wds.TarWriter(file, encoder=False, mtime=0) as tar:
        for index, (image, caption) in enumerate(samples):
            key = f"{shard:05d}{index:04d}"
            png = io.BytesIO()
            Image.fromarray(image).save(png, format="png")
            record = {
                "key": key,
                "caption": caption,
                "status": "success",
                "error_message": None,
                "width": RESOLUTION,
                "height": RESOLUTION,
                "original_width": RESOLUTION,
                "original_height": RESOLUTION,
                "sha256": hashlib.sha256(png.getvalue()).hexdigest(),
            }
            members = {"png": png.getvalue(), "txt": caption.encode(), "json": json.dumps(record, indent=4).encode()}
            tar.write({"__key__": key} | members)
    stats = {"count": len(samples), "successes": len(samples), "failed_to_download": 0, "failed_to_resize": 0}
    (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats, indent=4) + "\n")


def build_tokenizer(pad_token="<|endoftext|>", captions=NAMED):
    """A CLIPTokenizer with one token for each word of the captions; any other text falls back to its bytes."""
    words = sorted({word for template in captions.templates for word in template.replace(",", "").split()} - {"{}"})
    letters = list(_byte_letters())
    tokens = letters + [letter + "</w>" for letter in letters]
    merges = []
    for word in (*captions.words, *words):
        symbols = [*word[:-1], word[-1] + "</w>"]
        merged = symbols[0]
        for symbol in symbols[1:]:
            if (merged, symbol) not in merges:
                merges.append((merged, symbol))
                tokens.append(merged + symbol)
            merged += symbol
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77, pad_token=pad_token)


def _byte_letters():
    """The 256 printable characters that stand for bytes in byte-level BPE, in the order of CLIP's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def save_tokenizer_files(tokenizer, folder):
    """vocab.json and merges.txt, which Stable Diffusion checkpoints hold and transformers 5 no longer writes."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (Path(folder) / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]
    (Path(folder) / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
