"""What the training scripts share. Each room imports those above it alone; `tests/test_architecture.py` holds that.

    schedules solvers losses ema keyed_random    the maths: torch alone; errors, files, lock: what every room may use
    networks/    teachers, encoders, LoRA, memory and speed, what a folder of weights holds
    data/        where samples come from: folders, tar shards, tables, decoding, the stream, cached latents. What is
                 skipped is found in `stream._make_item`, counted in `stream._count`, listed in skipped_samples.jsonl
    results/     samples, metrics, what is exported
    flags        the parser and the flags that scripts share
    run/         the run object, checkpoints, updates, stopping, simulation. A skipped update: `updates.UpdateGuard`,
                 which lists it in nonfinite_updates.jsonl
    ct/ direct/ tscd/    for one method's scripts each
    tools/       programs: `python -m common.tools.NAME`

Nothing here imports a script.
"""

import logging
import os
import sys
import warnings

# Libraries announce at import what a CPU or a missing torchvision costs them, a screen full before the first own line.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
for _name in ("xformers", "bitsandbytes"):
    logging.getLogger(_name).setLevel(logging.ERROR)
# Where stderr is a file, as of a job, progress bars of tools and libraries add to it once a minute at most.
if not sys.stderr.isatty():
    for _name in ("TQDM_MININTERVAL", "TQDM_MAXINTERVAL"):
        os.environ.setdefault(_name, "60")
warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks.*")  # diffusers passes it, huggingface_hub warns
