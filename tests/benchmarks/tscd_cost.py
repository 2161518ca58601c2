"""What a step of each TSCD stage costs, against LCM: `python tests/benchmarks/tscd_cost.py`.

Needs the demo's folder (`python -m common.tools.demo --teacher_only`). The variants run in turn, `--rounds` times,
each a process of its own, with the demo's teacher, data and batch. Time: the median over the rounds of the last log
entry's samples per second, as a ratio to LCM's of the same round. Memory: the largest resident set of the process,
less LCM's.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common.tools.demo import __main__ as demo  # noqa: E402

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

TSCD = {"stage_segments": 1, "stage_steps": None}
ALWAYS = {"adv_weights": 0.1, "adv_unconditional_start": 1.0}
HEAD = {"freeze_discriminator_backbone": True, "adv_learning_rate": None}
VARIANTS = {
    "LCM": ("lcm", {}),
    "TSCD without a discriminator (k = 8)": ("tscd", TSCD | {"adv_weights": 0}),
    "TSCD, conditional discriminator (k = 4, 2, 1, first half)": ("tscd", TSCD | ALWAYS),
    "TSCD, unconditional discriminator (second half)": ("tscd", TSCD | ALWAYS | {"adv_unconditional_start": 0.0}),
    "TSCD, conditional, frozen backbone": ("tscd", TSCD | ALWAYS | HEAD),
    "LCM LoRA": ("lcm_lora", {}),
    "TSCD LoRA without a discriminator": ("tscd_lora", TSCD | {"adv_weights": 0}),
    "TSCD LoRA, conditional discriminator": ("tscd_lora", TSCD | ALWAYS),
}


def run(method, changes, folder, args):
    """One short run: (samples per second of its last log entry, largest resident set in MiB)."""
    recipe = demo.METHODS[method]
    flags = demo.flags_of(recipe, demo.TEACHERS["sd"]) | {
        "validation_steps": 0,
        "max_train_steps": args.steps,
        "logging_steps": args.steps // 2,
    }
    flags |= {"checkpointing_steps": 10**6, "seed": 0, "output_dir": folder, "lr_warmup_steps": 0} | changes
    flags |= {"pretrained_teacher_model": args.demo / "teacher"}
    flags |= {"train_shards_path_or_url": args.demo / "shards" / "train"}
    words = [f"--{k}" if v is True else f"--{k}={v}" for k, v in flags.items() if v is not None]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / recipe["script"]), *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"{recipe['script']} failed"
    events = EventAccumulator(str(next(folder.rglob("events.out.tfevents.*")))).Reload()
    return events.Scalars("samples_per_second")[-1].value, usage.ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / "demo", help="the demo's folder")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    measured = {name: [] for name in VARIANTS}
    with TemporaryDirectory() as scratch:
        for index in range(args.rounds):
            for number, (name, (method, changes)) in enumerate(VARIANTS.items()):
                measured[name].append(run(method, changes, Path(scratch, f"{index}-{number}"), args))
    print("| | time of a step, LCM = 1 | memory, MiB more than LCM |\n|---|---|---|")
    for name, runs in measured.items():
        ratio = median(lcm[0] / own[0] for own, lcm in zip(runs, measured["LCM"], strict=True))
        more = median(own[1] - lcm[1] for own, lcm in zip(runs, measured["LCM"], strict=True))
        print(f"| {name} | {ratio:.2f} | {more:+.0f} |", flush=True)


if __name__ == "__main__":
    main()
