"""Made checkpoints.json.xz with the code of commit 5961ba9, by `python -m tests.kept.make`. Do not make it anew with
later code: it is there to be older. A change that it does not survive breaks the runs of users."""

import json
import lzma
import os
import random
import tempfile
from pathlib import Path

from tests import test_kept_checkpoints as kept
from tests.cases import CASES, command, train
from tests.kept.folders import comparable, filled, read, skeleton, write

import numpy as np
import pytest
import torch
from accelerate import Accelerator

PATHS = {"shards": "shards/train/{00000..00007}.tar", "unet": "unet.json", "direct_teacher": "teacher"}
PATHS |= {name: name for name in ("teacher", "data_set", "pairs")}
CHANGES = {"max_train_steps": 12, "checkpointing_steps": 3}
# one lane: the next update ends a shuffled block that the run has begun, and the one after it reads another
LANES, SHORT = {"data_lanes": 1}, {"num_inference_steps": 2, "skip_pairs_check": True}
save_state = Accelerator.save_state


def saved(*args, **kwargs):
    """As ever, with random states that take little space: Python's and numpy's are not drawn from."""
    random.setstate((3, (*[1] * 624, 624), None)), np.random.set_state(("MT19937", [1] * 624, 624))
    torch.manual_seed(1)
    save_state(*args, **kwargs)


def make(name):
    case, out = CASES[name], Path("out")
    words = command(case, PATHS, out, **CHANGES, **SHORT if name.startswith("direct") else LANES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Accelerator, "save_state", saved)
        train(words, case.script)
    before = skeleton(read(out / "checkpoint-3"))
    out.rename(name)
    drawn = filled(before)
    write(out / "checkpoint-3", drawn)
    with pytest.MonkeyPatch.context() as patch:
        orders = kept.resume(case.script.__name__, words, drawn, patch)
    found = read(out / "checkpoint-5")
    after = {file: content for file, content in skeleton(found).items() if not file.endswith(".pkl")}
    assert comparable(found) == comparable(filled(after)), "it saved other values than it had loaded"
    content = {"before": before, "after": after, "orders": orders, "log": kept.LOG.read_text()}
    out.rename(f"{name} resumed")
    return {"script": case.script.__name__, "words": words, **content}


def main():
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    folder = Path(tempfile.mkdtemp(), "data")
    kept.build_data(folder)
    os.chdir(folder)
    made = {name: repr(make(name)) for name in CASES}
    kept.FILE.write_bytes(lzma.compress(json.dumps(made).encode(), preset=9))


if __name__ == "__main__":
    main()
