"""Small models and data that the tests share, built once for all test processes."""

import gc
import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_MODE="offline")
for _name in ("HF_TOKEN", "ACCELERATE_MIXED_PRECISION", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
    os.environ.pop(_name, None)

from common.tools.demo import digits, stable_diffusion  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from filelock import FileLock  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_finish():
    """The libraries' objects, a million, are left out of the collections that end each run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """Each run of a script in this process starts like a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def build_once(tmp_path_factory):
    """build_once(name, build): the folder `name`, shared by all test processes, made by build(folder) by the first."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def get(name, build):
        folder, done = root / "shared" / name, root / "shared" / f"{name}.done"
        folder.parent.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not done.exists():
                build(folder)
                done.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def teacher(build_once):
    """teacher(kind): a folder with a teacher of 16 pixels that has been trained for a moment.

    kind: what its U-Net predicts, or "sdxl" for one in SDXL's layout, which predicts the noise.
    """

    def get(kind="epsilon"):
        def build(folder):
            prediction_type = "epsilon" if kind == "sdxl" else kind
            stable_diffusion.build_teacher(folder, prediction_type, vae_steps=5, unet_steps=20, sdxl=kind == "sdxl")

        return str(build_once(f"teacher_{kind}", build))

    return get


@pytest.fixture(scope="session")
def shards(build_once):
    """A brace pattern over WebDataset shards of the digits."""
    return str(build_once("shards", digits.write_shards) / "train" / "{00000..00007}.tar")
