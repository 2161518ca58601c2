"""What the scripts train on, made in processes of their own: see tests/forks.py."""

import json

from common.tools.demo import digits, stable_diffusion
from tests import forks
from tests.made import CONFIG, QUICK, ask, save_data_set

import pytest


@pytest.fixture(scope="session", autouse=True)
def made_before_anything_trains(build_once):
    """{name: path} of what tests/cases.py names; at once, as a worker that has trained itself can fork no more."""

    def build(folder):
        def body():
            stable_diffusion.build_teacher(folder / "teacher", "epsilon", vae_steps=5, unet_steps=20)
            digits.write_shards(folder / "shards")
            save_data_set(folder / "data_set")
            (folder / "unet.json").write_text(json.dumps(CONFIG))
            stable_diffusion.build_teacher(folder / "direct_teacher", **QUICK)
            (folder / "prompts.txt").write_text("\n".join(digits.canonical_prompts(10)) + "\n")
            ask(folder / "pairs", folder / "direct_teacher", folder / "prompts.txt")

        assert forks.end_of(forks.fork(body)) == 0

    folder = build_once("soak", build)
    names = {"shards": "shards/train/{00000..00007}.tar", "unet": "unet.json"}
    return {
        n: str(folder / names.get(n, n)) for n in ("teacher", "shards", "data_set", "unet", "direct_teacher", "pairs")
    }


@pytest.fixture(scope="session")
def made(made_before_anything_trains):
    return made_before_anything_trains


@pytest.fixture
def made_for_all(made):
    return made


@pytest.fixture(scope="session")
def teacher(made_before_anything_trains):
    return lambda kind="epsilon": made_before_anything_trains["teacher"]


@pytest.fixture(scope="session")
def shards(made_before_anything_trains):
    return made_before_anything_trains["shards"]
