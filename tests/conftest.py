"""Small models and data that the tests share, built once for all test processes."""

import gc
import json
import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_MODE="offline")
for _name in ("HF_TOKEN", "ACCELERATE_MIXED_PRECISION", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
    os.environ.pop(_name, None)

from common.tools.demo import digits, dit, stable_diffusion  # noqa: E402
from tests import made as makers  # noqa: E402
from tests.cases import CASES, SD_SCRIPTS  # noqa: E402
from tests.cases import command as words_of  # noqa: E402

import datasets  # noqa: E402
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
    """teacher(kind): a folder with the teacher of `made.save_teacher`."""

    def get(kind="epsilon"):
        return str(build_once(f"teacher_{kind}", lambda folder: makers.build_teacher(folder, kind)))

    return get


@pytest.fixture(scope="session")
def shards(build_once):
    """A brace pattern over WebDataset shards of the digits."""
    return str(build_once("shards", digits.write_shards) / "train" / "{00000..00007}.tar")


@pytest.fixture(scope="session")
def direct_teacher(build_once):
    """direct_teacher("sd" or "dit"): one of direct distillation."""

    def get(kind="sd"):
        if kind == "dit":
            return str(build_once("direct_dit", lambda f: dit.build_teacher(f, vae_steps=5, steps=30, layers=2)))
        return str(build_once("direct_sd", lambda f: stable_diffusion.build_teacher(f, **makers.QUICK)))

    return get


@pytest.fixture(scope="session")
def prompts_file(build_once):
    return str(build_once("prompts.txt", makers.save_prompts))


@pytest.fixture(scope="session")
def made(build_once, direct_teacher, prompts_file):
    """made("sd" or "dit"): a folder of pairs, by the schedulers that the teachers ship with."""

    def get(kind="sd"):
        extra = {"teacher_kwargs": json.dumps(dit.CALL_KWARGS)} if kind == "dit" else {}
        build = lambda f: makers.ask(f, direct_teacher(kind), prompts_file, save_images=True, **extra)  # noqa: E731
        return str(build_once(f"pairs_{kind}", build))

    return get


@pytest.fixture(scope="session")
def pictured(build_once, direct_teacher, prompts_file):
    """Pairs with pngs, by a scheduler that this weak teacher can follow in few steps."""
    own = {"scheduler": "DDIMScheduler", "scheduler_kwargs": '{"timestep_spacing": "trailing"}', "save_images": True}
    return str(build_once("pictured", lambda folder: makers.ask(folder, direct_teacher(), prompts_file, **own)))


@pytest.fixture(scope="session")
def seeded(build_once, pictured):
    """Tars of the same images, 8 samples each, with the seeds of their noise."""
    return build_once("seeded_source", lambda folder: makers.save_seeded(pictured, folder))


@pytest.fixture
def table(tmp_path, pictured):
    """The guide's metadata.csv and images, from the pngs beside the pairs."""
    return makers.save_table(pictured, tmp_path / "images")


@pytest.fixture(scope="session")
def classifier(build_once):
    return build_once("ct_classifier", lambda folder: stable_diffusion.build_classifier(folder, steps=20))


@pytest.fixture(scope="session")
def data_set(build_once):
    return str(build_once("data_set", makers.save_data_set))


@pytest.fixture(scope="session", autouse=True)
def no_cache_at_home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture
def made_for_all(request, build_once):
    """{name: path} of what tests/cases.py names, made when it is asked for."""

    class Made(dict):
        def __missing__(self, name):
            if name == "unet":
                return str(build_once("unet.json", lambda path: path.write_text(json.dumps(makers.CONFIG))))
            found = request.getfixturevalue({"pairs": "made"}.get(name, name))
            return found() if callable(found) else found

    return Made()


@pytest.fixture
def command(made_for_all):
    """command(name of a case, output_dir, **changes): a quick run's command line."""
    return lambda name, folder, **changes: words_of(CASES[name], made_for_all, folder, **changes)


@pytest.fixture
def flags(command):
    """flags(output_dir, script, **changes): that of a script that trains from shards."""
    names = {script: name for name, script in SD_SCRIPTS.items()}
    return lambda folder, script=SD_SCRIPTS["lcm"], **changes: command(names[script], folder, **changes)


@pytest.fixture
def ct_flags(command):
    """ct_flags(output_dir, **changes): consistency training of eight updates."""
    own = {"max_train_steps": 8, "checkpointing_steps": 4}
    return lambda folder, **changes: command("ct", folder, **own | changes)


@pytest.fixture
def direct_flags(command, direct_teacher, made):
    """direct_flags(output_dir, "sd" or "dit", **changes): that of direct distillation of all weights."""

    def make(folder, kind="sd", **changes):
        own = {"pretrained_teacher_model": direct_teacher(kind), "pairs_dir": made(kind), "ema_decay": None}
        own["num_inference_steps"] = None  # 4
        return command("direct", folder, **own | changes)

    return make
