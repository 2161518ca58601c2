"""What the flags of the methods do on the demo's teachers, and the methods side by side, over training seeds.

    python tests/benchmarks/study.py methods                     # every method with the demo's recipe, hard judge
    python tests/benchmarks/study.py lcm --teacher sd --seeds 0
    python tests/benchmarks/study.py direct --teacher sd --only "all weights" LoRA

Builds the teacher in the demo's folder where it is not there. Every variant is a run of its script for each seed,
with the demo's flags but for what its name says, and is measured as the demo measures: TSCD's model of each stage at
its own number of steps. With one seed the spread is over the sets of samples, else it is the standard deviation over
the seeds. Finished runs are kept and not run again, also where another study has them.
"""

import argparse
import hashlib
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
LONG = COSINE | {"max_train_steps": 2400, "learning_rate": 3e-4, "lr_warmup_steps": 50}
TSCD = demo.METHODS["tscd"]["flags"]
TOTAL_STEPS = 4 * TSCD["stage_steps"]
SAME = {name: TSCD[name] for name in ("learning_rate", "lr_scheduler", "lr_warmup_steps", "ema_decay")}
MSE = {"adv_weights": 0}
BF16, SHORT = {"mixed_precision": "bf16"}, {"stage_steps": 100}
HALF = {"max_train_steps": 400}  # of LCM's updates
# TSCD's last stage alone, and the one before it, from the stages before them of a run with that seed
LAST = {"stage_segments": 1, "stage_steps": 400, "learning_rate": 2e-4, "init_unet": "stage-2-k2"}
TWO_STEPS = LAST | {"stage_segments": 2, "init_unet": "stage-1-k4"}
TARGET, DATA = {"adv_real": "target"}, {"adv_real": "data"}
FAKE = ("score_levels", "fake_updates", "fake_warmup", "fake_lora_rank", "fake_learning_rate")
SLOW = {name: demo.SCORE[name] for name in ("learning_rate", "adam_beta1", "adam_beta2")}
STAGE_SCORE = SLOW | {"stage_steps": 250, "score_weights": 1} | {name: demo.SCORE[name] for name in FAKE}
NO_ADVERSARY = {"adv_weight": None, "adv_images": None}
# {study: {name: (method, or None for the teacher; changes of its flags, or the teacher's numbers of steps)}}
STUDIES = {
    "methods": {
        "teacher": (None, measuring.TEACHER_STEPS),
        "LCM": ("lcm", {}),
        "LCM LoRA": ("lcm_lora", {}),
        "TSCD": ("tscd", {}),
        "TSCD LoRA": ("tscd_lora", {}),
        "direct for 4 steps": ("direct", {}),
        "direct for 1 step": ("direct_1", {}),
    },
    "score": {
        "its start, direct for 1 step": ("score_start", {}),
        "score from it": ("score", {}),
        "the same, prompts alone": ("score", NO_ADVERSARY | {"regression_weight": 0.0}),
        "the same, no fake update before": ("score", {"fake_warmup": 0}),
        "the same, no adversary": ("score", NO_ADVERSARY | {"max_train_steps": 350}),
        "the same, its weight 0.5": ("score", {"adv_weight": 0.5}),
        "the same, the pairs for real": ("score", {"adv_images": None}),
        "the same, a fake LoRA": ("score", {"fake_lora_rank": 32, "fake_learning_rate": 2e-3}),
        "direct for 4 steps": ("direct", {}),
        "start of the next": ("score_4_start", {}),
        "score from it, 4 steps": ("score_4", {}),
        "4 steps, no adversary": ("score_4", NO_ADVERSARY),
        "4 steps, prompts alone": ("score_4", {"regression_weight": 0.0}),
    },
    "one_step": {
        "LCM, 800 updates": ("lcm", {}),
        "LCM, 800 updates, 3e-4 cosine, N = 10": ("lcm", LONG | {"num_ddim_timesteps": 10, "max_train_steps": 800}),
        "LCM, 2,400 updates, 3e-4 cosine": ("lcm", LONG),
        "the same, N = 10": ("lcm", LONG | {"num_ddim_timesteps": 10}),
        "direct, 2,048 pairs, 400 updates": ("direct", {"num_inference_steps": 1}),
        "direct, 8,192 pairs, 3,000 updates, lr 5e-4": ("direct_1", {"learning_rate": 5e-4}),
        "the same, lr 1e-3": ("direct_1", {}),
        "the same, lr 2e-3": ("direct_1", {"learning_rate": 2e-3}),
        "the same, lr 1e-3, l2": ("direct_1", {"loss_type": "l2"}),
        "6,000 updates of 16, lr 2e-3": (
            "direct_1", {"learning_rate": 2e-3, "max_train_steps": 6000, "train_batch_size": 16}
        ),
    },
    "direct": {
        "all weights": ("direct", {}),
        "LoRA": ("direct_lora", {}),
        "8 steps": ("direct_8", {}),
        "l2": ("direct", {"loss_type": "l2"}),
        "100 updates": ("direct", {"max_train_steps": 100}),
        "1,600 updates": ("direct", {"max_train_steps": 1600}),
        "EMA 0.98": ("direct", {"ema_decay": 0.98}),
    },
    "precision": {
        "LCM, float32": ("lcm", HALF),
        "LCM, bf16": ("lcm", HALF | BF16 | {"float32_end_layers": False}),
        "LCM, bf16, end layers float32": ("lcm", HALF | BF16),
        "TSCD, float32": ("tscd", SHORT | TARGET),
        "TSCD, bf16": ("tscd", SHORT | TARGET | BF16 | {"float32_end_layers": False}),
        "TSCD, bf16, end layers float32": ("tscd", SHORT | TARGET | BF16),
    },
    "adversary": {
        "all stages, target": ("tscd", TARGET),
        "all stages, data": ("tscd", {}),
        "LoRA, target": ("tscd_lora", {}),
        "LoRA, data": ("tscd_lora", DATA),
        "LoRA, data, weight 0.03": ("tscd_lora", DATA | {"adv_weights": "0,0,0,0.03"}),
        "off": ("tscd", LAST | MSE),
        "target": ("tscd", LAST | TARGET),
        "data, no weight": ("tscd", LAST | {"adv_weights": 1e-9}),
        "data, weight 0.03": ("tscd", LAST | {"adv_weights": 0.03}),
        "data, weight 0.1": ("tscd", LAST),
        "data, weight 0.3": ("tscd", LAST | {"adv_weights": 0.3}),
        "data, weight 1": ("tscd", LAST | {"adv_weights": 1.0}),
        "2 steps, target": ("tscd", TWO_STEPS | TARGET),
        "2 steps, data, weight 0.015": ("tscd", TWO_STEPS | {"adv_weights": 0.015}),
        "2 steps, data, weight 0.1": ("tscd", TWO_STEPS | {"adv_weights": 0.1}),
    },
    "stage_score": {
        "off": ("tscd", LAST | MSE),
        "data": ("tscd", LAST),
        "score": ("tscd", LAST | STAGE_SCORE | MSE),
        "score and data": ("tscd", LAST | STAGE_SCORE),
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
        "adversarial, boundary_prob 1": ("tscd", TARGET),
        "adversarial, boundary_prob 0.5": ("tscd", TARGET | {"boundary_prob": 0.5}),
        "adversarial, boundary_prob 0": ("tscd", TARGET | {"boundary_prob": 0.0}),
    },
}  # fmt: skip


def train(method, changes, seed, folder, output_dir, teacher):
    """One run of a method's script, into `folder`; output_dir: the demo's."""
    recipe, teacher_dir, data_dir = demo.METHODS[method], output_dir / teacher.folder, output_dir / teacher.shards
    flags = demo.flags_of(recipe, teacher) | {"validation_steps": 0, "report_to": "none", "checkpointing_steps": 10**6}
    if "adv_weight" in flags:
        flags["adv_images"] = demo.real_images(teacher, output_dir, 0)
    flags |= changes | {"pretrained_teacher_model": teacher_dir, "output_dir": folder, "seed": seed}
    flags |= {"resume_from_checkpoint": "latest"}
    if start := recipe.get("start"):
        flags["init_student"] = folder.with_name(folder_name(start, {}, seed))
        if not (flags["init_student"] / "README.md").exists():
            train(start, {}, seed, flags["init_student"], output_dir, teacher)
    if "init_unet" in changes:
        start = folder.with_name(folder_name("tscd", TARGET, seed))
        if not (start / "README.md").exists():
            train("tscd", TARGET, seed, start, output_dir, teacher)
        flags["init_unet"] = start / changes["init_unet"]
    if recipe["script"] == demo.DIRECT["script"]:
        flags["pairs_dir"] = demo.generate_pairs(recipe, teacher, teacher_dir, data_dir / "train", output_dir, 0)
    else:
        flags["train_shards_path_or_url"] = data_dir / "train"
    words = (
        f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"
        for name, value in flags.items()
        if value is not None
    )
    command = [sys.executable, str(ROOT / recipe["script"]), *words]
    with open(folder.with_name(f"{folder.name}.log"), "w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)


def folder_name(method, changes, seed):
    said = changes.items() if method else [("steps", steps) for steps in changes]
    name = "-".join([method or "teacher", *(f"{name}={value}" for name, value in said), f"seed={seed}"])
    return name if len(name) < 200 else f"{method}-{hashlib.sha256(name.encode()).hexdigest()[:16]}-seed={seed}"


def measured(method, changes, seed, folder, output_dir, teacher, judge):
    """The rows of a variant with one seed, trained and measured where that is not done."""
    path, teacher_dir = folder.with_name(f"{folder.name}.json"), output_dir / teacher.folder
    if not path.exists():
        if method is None:
            results, _ = measuring.measure_teacher(judge, teacher_dir, changes, seed, teacher)
        else:
            train(method, changes, seed, folder, output_dir, teacher)
            one = {"steps": (changes["num_inference_steps"],)} if "num_inference_steps" in changes else {}
            recipe = demo.METHODS[method] | one
            results, _ = measuring.measure_student(judge, folder, teacher_dir, recipe, seed, teacher)
            if (folder / "held_out.json").exists():
                results["rows"][0] |= json.loads((folder / "held_out.json").read_text())
        path.write_text(json.dumps(results, indent=1))
    return json.loads(path.read_text())["rows"]


def build_teacher(output_dir, name):
    """The demo's teacher of that name, built and measured where it is not there."""
    teacher = measuring.TEACHERS[name]
    if not (output_dir / f"{teacher.folder}_metrics.json").exists():
        demo.main(demo.parse_args([f"--output_dir={output_dir}", f"--teacher={name}", "--teacher_only"]))
    return teacher


def line(name, runs):
    """A row of the table: the distances at all numbers of steps, and the rest at the fewest."""
    cells = []
    for rows in zip(*runs, strict=True):
        distances = [row["frechet_distance"] for row in rows]
        spread = np.std(distances) if len(runs) > 1 else rows[0]["frechet_distance_std"]
        cells.append(f"{rows[0]['steps']}: {np.mean(distances):.2f}" + ("" if spread is None else f" ± {spread:.2f}"))
    last = [np.mean([rows[-1][key] for rows in runs]) for key in ("prompt_accuracy", "classes", "confidence")]
    return f"| {name} | {'; '.join(cells)} | " + " | ".join(f"{value:.3f}" for value in last) + " |"


def details(name, runs):
    """Rows of the second table: all that was measured, a row for each number of steps.

    Of direct distillation also the relative squared error on held-out pairs, and that of the untrained student.
    """
    digits = {"frechet_distance": 2, "prompt_accuracy": 3, "classes": 2, "confidence": 3}
    for rows in zip(*runs, strict=True):
        shown = digits | ({"relative_mse": 4, "untrained": 4} if "untrained" in rows[0] else {})
        values = [[row[key] for row in rows] for key in shown]
        cells = (
            f"{np.mean(value):.{count}f}" + (f" ± {np.std(value):.{count}f}" if len(runs) > 1 else "")
            for value, count in zip(values, shown.values(), strict=True)
        )
        yield f"| {name} | {rows[0]['steps']} | {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--demo", type=Path, default=ROOT / "demo", help="the demo's folder")
    parser.add_argument("--teacher", choices=list(measuring.TEACHERS), default="parity")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "study")
    parser.add_argument("--only", nargs="*", help="names of the variants to run")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    teacher = build_teacher(args.demo, args.teacher)
    judge, folder = measuring.Judge(args.demo / "classifier"), args.output_dir / args.teacher
    folder.mkdir(parents=True, exist_ok=True)
    table = []
    print("| | Fréchet distance at steps | prompt accuracy | digits | confidence |\n|---|---|---|---|---|")
    for name, (method, changes) in STUDIES[args.study].items():
        if args.only is None or name in args.only:
            place = args.demo, teacher, judge
            runs = [measured(method, changes, s, folder / folder_name(method, changes, s), *place) for s in args.seeds]
            print(line(name, runs), flush=True)
            table += details(name, runs)
    print(
        "\n| | steps | distance | prompt accuracy | digits | confidence |",
        "|---|---|---|---|---|---|",
        *table,
        sep="\n",
    )


if __name__ == "__main__":
    main()
