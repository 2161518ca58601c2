"""What the flags of LCM and TSCD do on the demo's teachers, and the methods side by side, over training seeds.

    python tests/benchmarks/study.py methods                     # every method with the demo's recipe, hard judge
    python tests/benchmarks/study.py lcm --teacher sd --seeds 0

Builds the teacher in the demo's folder where it is not there. Every variant is a run of its script for each seed,
with the demo's flags but for what its name says, and is measured as the demo measures: TSCD's model of each stage at
its own number of steps. With one seed the spread is over the sets of samples, else it is the standard deviation over
the seeds. Finished runs are kept and not run again.
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
import torch  # noqa: E402

COSINE = {"lr_scheduler": "cosine"}
TSCD = demo.METHODS["tscd"]["flags"]
TOTAL_STEPS = 4 * TSCD["stage_steps"]
SAME = {name: TSCD[name] for name in ("learning_rate", "lr_scheduler", "lr_warmup_steps", "ema_decay")}
MSE = {"adv_weights": 0}
# {study: {name: (method, or None for the teacher; changes of its flags, or the teacher's numbers of steps)}}
STUDIES = {
    "methods": {
        "teacher": (None, measuring.TEACHER_STEPS),
        "LCM": ("lcm", {}),
        "LCM, 2,400 updates, 3e-4 cosine": ("lcm", COSINE | {"max_train_steps": 2400, "learning_rate": 3e-4}),
        "LCM LoRA": ("lcm_lora", {}),
        "TSCD": ("tscd", {}),
        "TSCD LoRA": ("tscd_lora", {}),
        "direct, 4 steps": ("direct", {}),
        "direct LoRA, 4 steps": ("direct_lora", {}),
    },
    "lcm": {
        "demo (800 steps, lr 1e-4)": ("lcm", {}),
        "400 steps": ("lcm", {"max_train_steps": 400}),
        "1,600 steps": ("lcm", {"max_train_steps": 1600}),
        "lr 5e-4, 400 steps": ("lcm", {"learning_rate": 5e-4, "max_train_steps": 400}),
        "lr 5e-4, 1,600 steps": ("lcm", {"learning_rate": 5e-4, "max_train_steps": 1600}),
        "lr 5e-4, 1,600 steps, cosine": ("lcm", COSINE | {"learning_rate": 5e-4, "max_train_steps": 1600}),
        "lr 5e-4, 1,600 steps, N = 20": (
            "lcm", {"learning_rate": 5e-4, "max_train_steps": 1600, "num_ddim_timesteps": 20}
        ),
        "N = 20": ("lcm", {"num_ddim_timesteps": 20}),
        "EMA 0.99": ("lcm", {"ema_decay": 0.99}),
        "l2": ("lcm", {"loss_type": "l2"}),
    },
    "tscd": {
        "teacher, 4 k steps": (None, (32, 16, 8, 4)),
        "LCM": ("lcm", {"max_train_steps": TOTAL_STEPS}),
        "LCM with TSCD's learning rate and EMA": ("lcm", SAME | {"max_train_steps": TOTAL_STEPS}),
        "Huber only, boundary_prob 1": ("tscd", MSE),
        "Huber only, boundary_prob 0.5": ("tscd", MSE | {"boundary_prob": 0.5}),
        "Huber only, boundary_prob 0": ("tscd", MSE | {"boundary_prob": 0.0}),
        "adversarial, boundary_prob 1": ("tscd", {}),
        "adversarial, boundary_prob 0.5": ("tscd", {"boundary_prob": 0.5}),
        "adversarial, boundary_prob 0": ("tscd", {"boundary_prob": 0.0}),
    },
}  # fmt: skip


def train(method, changes, seed, folder, output_dir, teacher):
    """One run of a method's script, into `folder`; output_dir: the demo's."""
    recipe, teacher_dir, data_dir = demo.METHODS[method], output_dir / teacher.folder, output_dir / teacher.shards
    flags = demo.flags_of(recipe, teacher) | {"validation_steps": 0, "report_to": "none", "checkpointing_steps": 10**6}
    flags |= changes | {"pretrained_teacher_model": teacher_dir, "output_dir": folder, "seed": seed}
    flags |= {"resume_from_checkpoint": "latest"}
    if recipe["script"] == demo.DIRECT["script"]:
        pairs_dir = output_dir / teacher.folder.replace("teacher", "pairs")
        flags["pairs_dir"] = demo.generate_pairs(teacher, teacher_dir, data_dir / "train", pairs_dir, 0)
    else:
        flags["train_shards_path_or_url"] = data_dir / "train"
    command = [sys.executable, str(ROOT / recipe["script"]), *(f"--{name}={value}" for name, value in flags.items())]
    with open(folder.with_suffix(".log"), "w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)


def measured(method, changes, seed, folder, output_dir, teacher, judge):
    """The rows of a variant with one seed, trained and measured where that is not done."""
    path, teacher_dir = folder.with_suffix(".json"), output_dir / teacher.folder
    if not path.exists():
        if method is None:
            results, _ = measuring.measure_teacher(judge, teacher_dir, changes, seed, teacher)
        else:
            train(method, changes, seed, folder, output_dir, teacher)
            results, _ = measuring.measure_student(judge, folder, teacher_dir, demo.METHODS[method], seed, teacher)
        path.write_text(json.dumps(results, indent=1))
    return json.loads(path.read_text())["rows"]


def line(name, runs):
    """A row of the table: the distances at all numbers of steps, and the rest at the fewest."""
    cells = []
    for rows in zip(*runs, strict=True):
        distances = [row["frechet_distance"] for row in rows]
        spread = np.std(distances) if len(runs) > 1 else rows[0]["frechet_distance_std"]
        cells.append(f"{rows[0]['steps']}: {np.mean(distances):.2f}" + ("" if spread is None else f" ± {spread:.2f}"))
    last = [np.mean([rows[-1][key] for rows in runs]) for key in ("prompt_accuracy", "classes", "confidence")]
    return f"| {name} | {'; '.join(cells)} | " + " | ".join(f"{value:.3f}" for value in last) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--demo", type=Path, default=ROOT / "demo", help="the demo's folder")
    parser.add_argument("--teacher", choices=list(measuring.TEACHERS), default="parity")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "study")
    parser.add_argument("--only", nargs="*", type=int, help="numbers of the variants to run, from 0")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    teacher = measuring.TEACHERS[args.teacher]
    if not (args.demo / f"{teacher.folder}_metrics.json").exists():
        demo.main(demo.parse_args([f"--output_dir={args.demo}", f"--teacher={args.teacher}", "--teacher_only"]))
    judge, folder = measuring.Judge(args.demo / "classifier"), args.output_dir / args.teacher / args.study
    folder.mkdir(parents=True, exist_ok=True)
    print("| | Fréchet distance at steps | prompt accuracy | digits | confidence |\n|---|---|---|---|---|")
    for number, (name, (method, changes)) in enumerate(STUDIES[args.study].items()):
        if args.only is None or number in args.only:
            place = args.demo, teacher, judge
            runs = [measured(method, changes, s, folder / f"{number}-seed{s}", *place) for s in args.seeds]
            print(line(name, runs), flush=True)


if __name__ == "__main__":
    main()
