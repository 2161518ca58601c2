"""What learning rate, length, grid, target and loss do to LCM on the demo: `python tests/benchmarks/lcm_study.py`.

Needs the demo's folder (`python -m common.tools.demo --teacher_only`). Every variant is one run of
train_lcm_distill_sd_wds.py with the demo's flags but for what its name says, one seed, measured as the demo measures:
the spread is over three sets of samples, not over seeds. Finished variants are kept and not run again.
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

from common.tools import sampling  # noqa: E402
from common.tools.demo import __main__ as demo  # noqa: E402
from common.tools.demo import measuring  # noqa: E402

VARIANTS = {
    "demo (800 steps, lr 1e-4)": {},
    "400 steps": {"max_train_steps": 400},
    "1,600 steps": {"max_train_steps": 1600},
    "lr 5e-4, 400 steps": {"learning_rate": 5e-4, "max_train_steps": 400},
    "lr 5e-4, 1,600 steps": {"learning_rate": 5e-4, "max_train_steps": 1600},
    "lr 5e-4, 1,600 steps, cosine": {"learning_rate": 5e-4, "max_train_steps": 1600, "lr_scheduler": "cosine"},
    "lr 5e-4, 1,600 steps, N = 20": {"learning_rate": 5e-4, "max_train_steps": 1600, "num_ddim_timesteps": 20},
    "N = 20": {"num_ddim_timesteps": 20},
    "EMA 0.99": {"ema_decay": 0.99},
    "l2": {"loss_type": "l2"},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / "demo", help="the demo's folder")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "lcm_study")
    parser.add_argument("--only", nargs="*", type=int, help="numbers of the variants to run, from 0")
    args = parser.parse_args()
    judge = measuring.Judge(args.demo / "classifier")
    guidance_scale = demo.METHODS["lcm"]["guidance_scale"]
    for number, (name, changes) in enumerate(VARIANTS.items()):
        if args.only is not None and number not in args.only:
            continue
        folder = args.output_dir / str(number)
        if not (folder / "metrics.json").exists():
            flags = demo.METHODS["lcm"]["flags"] | changes | {"validation_steps": 0, "report_to": "none", "seed": 0}
            flags |= {"pretrained_teacher_model": args.demo / "teacher", "output_dir": folder}
            flags |= {"train_shards_path_or_url": args.demo / "shards" / "train", "checkpointing_steps": 10**6}
            command = [sys.executable, str(ROOT / "train_lcm_distill_sd_wds.py")]
            subprocess.run(command + [f"--{k}={v}" for k, v in flags.items()], check=True, stdout=subprocess.DEVNULL)
            results, _ = measuring.measure(
                judge, sampling.load_pipeline(folder), measuring.STUDENT_STEPS, guidance_scale, 0
            )
            (folder / "metrics.json").write_text(json.dumps(results, indent=1))
        rows = json.loads((folder / "metrics.json").read_text())["rows"]
        cells = [f"{row['frechet_distance']:.2f} ± {row['frechet_distance_std']:.2f}" for row in rows]
        print(f"| {name} | " + " | ".join(cells) + f" | {rows[-1]['prompt_accuracy']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
