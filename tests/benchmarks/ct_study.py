"""iCT and ECT on the digits over several seeds: `python tests/benchmarks/ct_study.py`.

Needs the demo's folder, for its classifier (`python -m common.tools.demo --method ct` builds it). Every seed is one
run of the three trainings of `common/tools/demo/consistency.py`, with another seed of weights, data order and noise;
all are measured on one classifier. The spread is over seeds. `--change NAME=VALUE` replaces flags of all runs.
Finished runs are kept and not run again.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common.tools.demo import consistency  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / "demo", help="the demo's folder")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "ct_study")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", nargs="*", choices=list(consistency.RUNS), default=list(consistency.RUNS))
    parser.add_argument("--change", nargs="*", default=[], metavar="NAME[=VALUE]", help="flags of the training script")
    parser.add_argument("--report_only", action="store_true", help="print what has been measured")
    args = parser.parse_args()
    torch.set_num_threads(1)
    changes = {name: value if equals else None for name, equals, value in (c.partition("=") for c in args.change)}
    kept = {name: consistency.RUNS[name] | changes for name in args.runs}
    consistency.RUNS.clear()
    consistency.RUNS.update(kept)
    for seed in [] if args.report_only else args.seeds:
        folder = args.output_dir / f"seed_{seed}"
        if not (folder / "classifier").exists():
            shutil.copytree(args.demo / "classifier", folder / "classifier")
        consistency.run(folder, seed)
    report(args.output_dir, args.seeds)


def report(output_dir, seeds):
    """A row for each run and number of steps: mean and spread over the seeds."""
    for name in consistency.RUNS:
        paths = [output_dir / f"seed_{seed}" / f"ct_{name}" / "metrics.json" for seed in seeds]
        results = [json.loads(path.read_text()) for path in paths if path.exists()]
        for rows in zip(*(result["rows"] for result in results), strict=True):
            distances = [row["frechet_distance"] for row in rows]
            accuracies = [row["class_accuracy"] for row in rows]
            minutes = [result["training_seconds"]["cpu"] / 60 for result in results if result["training_seconds"]]
            print(
                f"| {name}, {rows[0]['steps']} steps | {np.mean(distances):.2f} ± {np.std(distances):.2f} | "
                f"{np.mean(accuracies):.3f} ± {np.std(accuracies):.3f} | "
                f"{', '.join(f'{d:.2f}' for d in distances)} | {', '.join(f'{m:.1f}' for m in minutes)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
