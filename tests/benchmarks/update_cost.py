"""What an update of TSCD's stages costs against LCM's, and one of score distillation against the regression's.

    python tests/benchmarks/update_cost.py tscd
    python tests/benchmarks/update_cost.py score

Builds the demo's teacher where it is not there. The variants run in turn, `--rounds` times, each a process of its own,
with the demo's flags, data and batch. FLOPs: what `--dry_run` counts of a sample. Time: the median over the rounds of
the last log entry's samples per second, by the process's CPU time, which other work disturbs less, as a ratio to the
first variant's of the same round. Memory: the largest resident set of the process, less the first variant's.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common.tools.demo import __main__ as demo  # noqa: E402
from tests.benchmarks import study  # noqa: E402

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

# Runs the script that follows with a clock of CPU time in its log.
CPU_CLOCK = """
import runpy, sys, time
time.perf_counter = time.process_time
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
STAGE = {"stage_segments": 1, "stage_steps": None}
ALWAYS = STAGE | {"adv_weights": 0.1, "adv_real": "target", "adv_unconditional_start": 1.0}
HEAD = {"freeze_discriminator_backbone": True, "adv_learning_rate": None}
NO_START = {"fake_warmup": 0}  # which is no update's cost
FAKE_LORA = {"fake_lora_rank": 32, "fake_learning_rate": 2e-3}
VARIANTS = {
    "tscd": {
        "LCM": ("lcm", {}),
        "TSCD without a discriminator (k = 8)": ("tscd", STAGE | study.MSE),
        "TSCD, conditional discriminator (k = 4, 2, 1, first half)": ("tscd", ALWAYS),
        "TSCD, unconditional discriminator (second half)": ("tscd", ALWAYS | {"adv_unconditional_start": 0.0}),
        "TSCD, conditional, frozen backbone": ("tscd", ALWAYS | HEAD),
        "TSCD, `--score_weights`, 3 fake updates": ("tscd", study.STAGE_SCORE | study.MSE | STAGE | NO_START),
        "LCM LoRA": ("lcm_lora", {}),
        "TSCD LoRA without a discriminator": ("tscd_lora", STAGE | study.MSE),
        "TSCD LoRA, conditional discriminator": ("tscd_lora", ALWAYS),
    },
    "score": {
        "regression, one step": ("score_start", {}),
        "score, a whole fake score, 3 updates of it": ("score", study.NO_ADVERSARY | NO_START),
        "the same, 5 updates of it": ("score", study.NO_ADVERSARY | NO_START | {"fake_updates": 5}),
        "the same, 3 updates of a fake LoRA": ("score", study.NO_ADVERSARY | NO_START | FAKE_LORA),
        "score and adversary, 3 updates": ("score", NO_START),
        "regression, four steps": ("score_4_start", {}),
        "four steps, score and adversary, 3 updates": ("score_4", NO_START),
    },
}


def command_of(method, changes, folder, args):
    """The words of one short run; the student begins as the teacher, which costs the same."""
    recipe, teacher = demo.METHODS[method], demo.TEACHERS["parity"]
    teacher_dir, shards = args.demo / teacher.folder, args.demo / teacher.shards / "train"
    flags = demo.flags_of(recipe, teacher) | {"validation_steps": 0, "max_train_steps": args.steps}
    if "adv_weight" in flags:
        flags["adv_images"] = demo.real_images(teacher, args.demo, 0)
    flags |= {"logging_steps": args.steps // 2, "checkpointing_steps": 10**6, "seed": 0, "lr_warmup_steps": 0}
    flags |= changes | {"pretrained_teacher_model": teacher_dir, "output_dir": folder}
    if recipe["script"] == demo.DIRECT["script"]:
        flags["pairs_dir"] = demo.generate_pairs(recipe, teacher, teacher_dir, shards, args.demo, 0)
    else:
        flags["train_shards_path_or_url"] = shards
    words = [f"--{k}" if v is True else f"--{k}={v}" for k, v in flags.items() if v is not None]
    return [sys.executable, "-c", CPU_CLOCK, str(ROOT / recipe["script"]), *words]


def count(command):
    """GFLOPs of a sample, by the dry run."""
    said = subprocess.run([*command, "--dry_run"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    number, unit = re.search(r"an update, ([\d.]+) ([GT]) a sample", said).groups()
    return float(number) * {"G": 1, "T": 1000}[unit]


def run(command, folder):
    """(samples per second of the run's last log entry, largest resident set in MiB)."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"{command[3]} failed"
    events = EventAccumulator(str(next(folder.rglob("events.out.tfevents.*")))).Reload()
    return events.Scalars("samples_per_second")[-1].value, usage.ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=list(VARIANTS))
    parser.add_argument("--demo", type=Path, default=ROOT / "demo", help="the demo's folder")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    args.demo = args.demo.resolve()
    study.build_teacher(args.demo, "parity")
    variants = VARIANTS[args.method]
    measured, counted = {name: [] for name in variants}, {}
    with TemporaryDirectory() as scratch:
        for index in range(args.rounds):
            for number, (name, (method, changes)) in enumerate(variants.items()):
                folder = Path(scratch, f"{index}-{number}")
                command = command_of(method, changes, folder, args)
                counted[name] = counted.get(name) or count(command)
                measured[name].append(run(command, folder))
                print(f"round {index + 1}: {name}, {measured[name][-1][0]:.3g} samples/s", file=sys.stderr, flush=True)
    first = next(iter(variants))
    print(f"| | GFLOPs of a sample | time of an update, {first} = 1 | memory, MiB more |\n|---|---|---|---|")
    for name, runs in measured.items():
        ratio = median(base[0] / own[0] for own, base in zip(runs, measured[first], strict=True))
        more = median(own[1] - base[1] for own, base in zip(runs, measured[first], strict=True))
        print(f"| {name} | {counted[name]:.3g} | {ratio:.2f} | {more:+.0f} |", flush=True)


if __name__ == "__main__":
    main()
