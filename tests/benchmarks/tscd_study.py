"""What the adversarial part and --boundary_prob do to TSCD on the demo: `python tests/benchmarks/tscd_study.py`.

Needs the demo's folder (`python -m common.tools.demo --teacher_only`). Every variant is three runs of
train_tscd_distill_sd_wds.py, one per seed, with the demo's flags but for what its name says, and is measured as the
demo measures: the model of each stage at its own number of steps. LCM runs for as many updates in all, the teacher is
sampled at four times the steps. The spread is the standard deviation over the seeds. Finished runs are kept.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common.tools.demo import __main__ as demo  # noqa: E402
from common.tools.demo import measuring  # noqa: E402

import numpy as np  # noqa: E402

TOTAL_STEPS = 4 * demo.METHODS["tscd"]["flags"]["stage_steps"]
SAME = {
    name: demo.METHODS["tscd"]["flags"][name]
    for name in ("learning_rate", "lr_scheduler", "lr_warmup_steps", "ema_decay")
}
MSE = {"adv_weights": 0}
VARIANTS = {
    "teacher, 4 k steps": (None, {}),
    "LCM": ("lcm", {"max_train_steps": TOTAL_STEPS}),
    "LCM with TSCD's learning rate and EMA": ("lcm", SAME | {"max_train_steps": TOTAL_STEPS}),
    "Huber only, boundary_prob 1": ("tscd", MSE),
    "Huber only, boundary_prob 0.5": ("tscd", MSE | {"boundary_prob": 0.5}),
    "Huber only, boundary_prob 0": ("tscd", MSE | {"boundary_prob": 0.0}),
    "adversarial, boundary_prob 1": ("tscd", {}),
    "adversarial, boundary_prob 0.5": ("tscd", {"boundary_prob": 0.5}),
    "adversarial, boundary_prob 0": ("tscd", {"boundary_prob": 0.0}),
}


def run(method, changes, seed, folder, args, judge):
    """Train (unless it is done) and measure one variant with one seed."""
    recipe = demo.METHODS[method]
    flags = recipe["flags"] | {"validation_steps": 0, "report_to": "none", "checkpointing_steps": 10**6} | changes
    flags |= {"pretrained_teacher_model": args.demo / "teacher", "output_dir": folder, "seed": seed}
    flags |= {"train_shards_path_or_url": args.demo / "shards" / "train", "resume_from_checkpoint": "latest"}
    command = [sys.executable, str(ROOT / recipe["script"])] + [f"--{k}={v}" for k, v in flags.items()]
    with open(folder.with_suffix(".log"), "w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)
    return measuring.measure_student(judge, folder, args.demo / "teacher", recipe, seed)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / "demo", help="the demo's folder")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "tscd_study")
    parser.add_argument("--only", nargs="*", type=int, help="numbers of the variants to run, from 0")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    judge = measuring.Judge(args.demo / "classifier")
    for number, (name, (method, changes)) in enumerate(VARIANTS.items()):
        if args.only is not None and number not in args.only:
            continue
        measured = []
        for seed in args.seeds:
            folder = args.output_dir / f"{number}-seed{seed}"
            path = folder.with_suffix(".json")
            if not path.exists():
                if method is None:
                    results = measuring.measure_teacher(judge, args.demo / "teacher", (32, 16, 8, 4), seed)[0]
                else:
                    results = run(method, changes, seed, folder, args, judge)
                path.write_text(json.dumps(results, indent=1))
            measured.append(json.loads(path.read_text())["rows"])
        cells = []
        for rows in zip(*measured, strict=True):
            distances = [row["frechet_distance"] for row in rows]
            cells.append(f"{np.mean(distances):.2f} ± {np.std(distances):.2f}")
        accuracy = np.mean([rows[-1]["prompt_accuracy"] for rows in measured])
        print(f"| {name} | " + " | ".join(cells) + f" | {accuracy:.3f} |", flush=True)


if __name__ == "__main__":
    main()
