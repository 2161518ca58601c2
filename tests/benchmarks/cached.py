"""An update of the LCM script from images against one from cached latents: `python tests/benchmarks/cached.py`.

In one process, on the tiny teacher of `throughput.py` (the proportions of Stable Diffusion 1.5, random weights) and
generated 640 x 480 JPEGs, on one thread. The two take turns, and what is compared is the processor's time, so that a
busy machine disturbs little; the first update of each run is not counted. Prints medians, the ratio, what the FLOPs
say, and a line of JSON.
"""

import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_lcm_distill_sd_wds as lcm  # noqa: E402
from common.flags import (
    ArgumentParser,  # noqa: E402
    positive_int,  # noqa: E402
)
from common.results.export import versions  # noqa: E402
from common.run.preemption import Stopper  # noqa: E402
from common.tools import encode_shards  # noqa: E402
from tests.benchmarks.data import write_shards  # noqa: E402
from tests.benchmarks.synthetic import SHAPES, step_flops, write_teacher  # noqa: E402

import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402


def seconds_per_update(flags):
    """The times of a run's updates but for the first."""
    times, check = [], Stopper.check

    def timed(self):
        times.append(time.process_time())
        return check(self)

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    Stopper.check = timed
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            lcm.main(lcm.parse_args([f"--{name}={value}" if value != "" else f"--{name}" for name, value in flags]))
    finally:
        Stopper.check = check
    return [after - before for before, after in zip(times, times[1:], strict=False)]


def main():
    parser = ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("--batch_size", type=positive_int, default=4, help="at most 32, as many as there are images")
    parser.add_argument("--updates", type=positive_int, default=4)
    parser.add_argument("--rounds", type=positive_int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    shape = SHAPES["tiny"]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_teacher(folder / "teacher", shape)
        (folder / "images").mkdir()
        write_shards(folder / "images", 2, 16)
        command = [str(folder / "images"), str(folder / "latents"), f"--pretrained_teacher_model={folder / 'teacher'}"]
        encode_shards.main(encode_shards.parse_args([*command, f"--resolution={shape.resolution}", "--center_crop"]))
        seconds = {"images": [], "latents": []}
        for number in range(args.rounds):
            for kind, measured in seconds.items():
                flags = {
                    "pretrained_teacher_model": folder / "teacher", "train_shards_path_or_url": folder / kind,
                    "output_dir": folder / f"{kind}{number}", "resolution": shape.resolution, "center_crop": "",
                    "train_batch_size": args.batch_size, "max_train_steps": args.updates + 1, "report_to": "none",
                    "validation_steps": 0, "validation_num_inference_steps": 1, "seed": 0, "logging_steps": 1000,
                    "validation_prompts": "a", "data_lanes": 2, "checkpointing_steps": 1000,
                }  # fmt: skip
                measured.append(statistics.median(seconds_per_update(flags.items())))
        flops = [step_flops(folder / "teacher", "lcm", shape.resolution, cached=cached) for cached in (False, True)]
    rounds = [images / latents for images, latents in zip(*seconds.values(), strict=True)]
    median = {kind: round(statistics.median(times), 3) for kind, times in seconds.items()}
    print(f"processor seconds per update of {args.batch_size} samples, medians of {args.rounds} rounds: {median}")
    print(f"ratio {statistics.median(rounds):.3f}, rounds {min(rounds):.2f} to {max(rounds):.2f}; ", end="")
    print(f"by FLOPs {flops[0] / flops[1]:.3f}")
    print(json.dumps({"args": vars(args), "seconds": seconds, "rounds": rounds, "versions": versions()}))


if __name__ == "__main__":
    main()
