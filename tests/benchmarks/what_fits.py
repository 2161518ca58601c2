"""The table "What fits where" of docs/performance.md: the largest batch on cards of 24, 48 and 80 GB.

    python -m tests.benchmarks.what_fits [sd15] [sdxl]

Teachers are the public configurations of Stable Diffusion 1.5 and SDXL, without weights (`synthetic.SHAPES`). Each
method is simulated at two batch sizes with --gradient_checkpointing=full and bf16, images are encoded one by one, and
memory is a straight line in the batch size.
"""

import contextlib
import importlib
import io
import sys
import tempfile
import warnings
from pathlib import Path

from common.tools import digits
from common.tools.plan import TRIED, needed_at, simulate
from tests.benchmarks import synthetic

METHODS = {
    "LCM": ("train_lcm_distill_sd_wds", []),
    "LCM LoRA": ("train_lcm_distill_lora_sd_wds", []),
    "TSCD": ("train_tscd_distill_sd_wds", []),
    "TSCD LoRA": ("train_tscd_distill_lora_sd_wds", []),
}
CARDS = 24, 48, 80
NAMES = {"sd15": "SD 1.5, 512 px", "sdxl": "SDXL, 1024 px"}


def largest(needed, card, most=1024):
    return max((n for n in range(1, most) if needed(n) <= card), default=0)


def rows(folder, shape):
    """A line of the table for each method, without and with 8-bit Adam."""
    shared = [
        f"--pretrained_teacher_model={folder / shape}", f"--train_shards_path_or_url={folder}/shards/train/*.tar",
        f"--output_dir={folder / 'out'}", f"--resolution={synthetic.SHAPES[shape].resolution}",
        "--mixed_precision=bf16", "--max_train_steps=1000", "--gradient_checkpointing=full",
        "--vae_encode_batch_size=1",
    ]  # fmt: skip
    for method, (name, own) in METHODS.items():
        script = importlib.import_module(name)
        sizes = [simulate(script, [*shared, *own, f"--train_batch_size={size}"], 1) for size in TRIED]
        eight = simulate(script, [*shared, *own, f"--train_batch_size={TRIED[0]}", "--use_8bit_adam"], 1)
        for adam, less in (("", 0), (", 8-bit Adam", sizes[0].between - eight.between)):
            needed = needed_at(sizes, less)
            fits = " | ".join(str(largest(needed, card) or "none") for card in CARDS)
            gflops = sizes[1].flops / sizes[1].samples / 1e9
            print(f"| {NAMES[shape]} | {method}{adam} | {needed(1):.1f} | {fits} | {gflops:,.0f} |", flush=True)


def main():
    warnings.filterwarnings("ignore")
    heads = " | ".join(f"{card} GB" for card in CARDS)
    print(f"| teacher | method | GiB for one sample | {heads} | GFLOPs a sample |\n|---|---|---|{'---|' * 4}")
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            digits.write_shards(Path(folder, "shards"))
        for shape in sys.argv[1:] or NAMES:
            synthetic.write_configurations(Path(folder, shape), synthetic.SHAPES[shape])
            rows(Path(folder), shape)


if __name__ == "__main__":
    main()
