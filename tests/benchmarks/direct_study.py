"""Direct distillation over three seeds, and what loss and data do to it: `python tests/benchmarks/direct_study.py`.

Needs the demo's folder with both teachers (`python -m common.tools.demo --teacher_only`, once more with
`--teacher dit`); the pairs are made there as the demo makes them. Every row is the demo's recipe but for what its name
says; the seed decides the order of the pairs and, of a LoRA, its first weights. Prints, as mean and standard deviation
over the seeds, the Fréchet distance and prompt accuracy of three sets of samples, and the relative squared error on 64
held-out pairs beside the untrained student's. Finished runs are kept and not run again.
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

# (teacher, method, name): changes of the demo's flags
ROWS = {(teacher, method, ""): {} for teacher in ("sd", "dit") for method in ("direct", "direct_lora", "direct_8")}
ROWS |= {
    ("sd", "direct", "l2"): {"loss_type": "l2"},
    ("sd", "direct", "huber_c 0.01"): {"huber_c": 0.01},
    ("sd", "direct", "100 steps"): {"max_train_steps": 100},
    ("sd", "direct", "1,600 steps"): {"max_train_steps": 1600},
    ("sd", "direct", "448 pairs"): {"num_pairs": 256},
    ("sd", "direct", "EMA 0.98"): {"ema_decay": 0.98},
}


def few_pairs(pairs_dir, folder, num_pairs):
    """A folder with the first `num_pairs` pairs and the last 64, which stay the held-out ones, by links to shards."""
    config = json.loads((pairs_dir / "dataset_config.json").read_text())
    size = config["samples_per_shard"]
    assert num_pairs % size == 0 and config["num_pairs"] % size == 0
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [*range(num_pairs // size), config["num_pairs"] // size - 1]
    for new, old in enumerate(chosen):
        link = folder / f"{new:05d}.tar"
        link.unlink(missing_ok=True)
        link.symlink_to((pairs_dir / f"{old:05d}.tar").resolve())
    config["num_pairs"] = size * len(chosen)
    (folder / "dataset_config.json").write_text(json.dumps(config))
    return folder


def run(args, judge, teacher, method, changes, seed, folder):
    recipe, teacher = demo.METHODS[method], demo.TEACHERS[teacher]
    teacher_dir, pairs_dir = args.demo / teacher.folder, args.demo / teacher.folder.replace("teacher", "pairs")
    if not (folder / "metrics.json").exists():
        flags = recipe["flags"] | changes | {"report_to": "none", "validation_steps": 0, "seed": seed}
        if num_pairs := flags.pop("num_pairs", None):
            pairs_dir = few_pairs(pairs_dir, args.output_dir / f"pairs_{num_pairs}", num_pairs)
            flags["num_held_out"] = 64
        flags |= {"pretrained_teacher_model": teacher_dir, "pairs_dir": pairs_dir, "output_dir": folder}
        flags |= {"checkpointing_steps": 10**6}
        command = [sys.executable, str(ROOT / recipe["script"]), *(f"--{k}={v}" for k, v in flags.items())]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        pipeline = measuring.load_student(folder, teacher_dir)
        results, _ = measuring.measure(judge, pipeline, recipe["steps"], recipe["guidance_scale"], 0, teacher.captions)
        (folder / "metrics.json").write_text(json.dumps(results, indent=1))
    measured = json.loads((folder / "metrics.json").read_text())["rows"][0]
    held_out = json.loads((folder / "held_out.json").read_text())
    return [measured["frechet_distance"], measured["prompt_accuracy"], held_out["relative_mse"], held_out["untrained"]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / "demo", help="the demo's folder")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "direct_study")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", type=int, help="numbers of the rows to run, from 0")
    args = parser.parse_args()
    judge = measuring.Judge(args.demo / "classifier")
    for number, ((teacher, method, name), changes) in enumerate(ROWS.items()):
        if args.only is not None and number not in args.only:
            continue
        folders = [args.output_dir / f"{number}_{seed}" for seed in args.seeds]
        runs = [run(args, judge, teacher, method, changes, s, f) for s, f in zip(args.seeds, folders, strict=True)]
        mean, std = np.mean(runs, axis=0), np.std(runs, axis=0)
        print(
            f"| {teacher}, {method}{', ' * bool(name)}{name} | {mean[0]:.2f} ± {std[0]:.2f} | {mean[1]:.3f} "
            f"| {mean[2]:.4f} ± {std[2]:.4f} | {mean[3]:.3f} | {mean[2] / mean[3]:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
