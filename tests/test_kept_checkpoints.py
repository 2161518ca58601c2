"""Checkpoints that older code wrote are resumed, for each script: they lie in tests/kept, which says how it was made.

Kept is all of a checkpoint but the values of large tensors, which are drawn again. The resumed run gets
NaN for its gradients: it skips its updates, so it must save what it has loaded, and it lists the samples that it drew.
"""

import ast
import importlib
import json
import lzma
from pathlib import Path

from common.tools.demo import digits, stable_diffusion
from tests.cases import train
from tests.kept.folders import comparable, digest, filled, read, write
from tests.made import CONFIG, QUICK, ask, save_data_set

import pytest
import torch
from accelerate import Accelerator

FILE = Path(__file__).parent / "kept" / "checkpoints.json.xz"
KEPT = json.loads(lzma.decompress(FILE.read_bytes()))  # {case: the repr of what kept.make.make returns}
LOG = Path("out/nonfinite_updates.jsonl")


def build_data(folder):
    """What the kept flags name, by relative paths."""
    folder.mkdir()
    stable_diffusion.build_teacher(folder / "teacher", **QUICK | {"vae_steps": 1, "unet_steps": 1})
    digits.write_shards(folder / "shards")
    save_data_set(folder / "data_set")
    (folder / "unet.json").write_text(json.dumps(CONFIG))
    (folder / "prompts.txt").write_text("\n".join(digits.canonical_prompts(10)) + "\n")
    ask(folder / "pairs", folder / "teacher", folder / "prompts.txt")


def resume(script, words, drawn, monkeypatch):
    """Two updates that are skipped, and a checkpoint: the names of each optimizer's parameters in its order.

    drawn: the checkpoint's content, by whose values parameters have names.
    """
    of_tensor, of_accelerator = torch.Tensor.backward, Accelerator.backward
    of_optimizer, orders = torch.optim.Optimizer.state_dict, []
    weights = {file: value[0] for file, value in drawn.items() if file.endswith(".safetensors")}
    names = {digest(tensor): f"{file} {key}" for file in weights for key, tensor in weights[file].items()}

    def poisoned(loss, *args, **kwargs):
        of_tensor(loss * float("nan"), *args, **kwargs)

    def first(accelerator, loss, **options):  # of the student's update; the discriminator's comes after it
        monkeypatch.setattr(torch.Tensor, "backward", poisoned)
        monkeypatch.setattr(torch.optim.Optimizer, "state_dict", saved)
        if LOG.exists():  # the first of the two updates is done
            Path("out/STOP").touch()
        of_accelerator(accelerator, loss, **options)

    def saved(optimizer):
        orders.append([names[digest(p)] for group in optimizer.param_groups for p in group["params"]])
        return of_optimizer(optimizer)

    monkeypatch.setattr(Accelerator, "backward", first)
    with pytest.raises(SystemExit) as stopped:
        train([*words, "--resume_from_checkpoint=latest"], importlib.import_module(script))
    assert stopped.value.code != 2, "the checkpoint was refused: stderr says why"
    return orders


@pytest.mark.parametrize("name", KEPT)
def test_a_checkpoint_of_older_code_is_resumed(tmp_path, monkeypatch, build_once, name):
    kept = ast.literal_eval(KEPT[name])
    for path in build_once("kept", build_data).iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    drawn = filled(kept["before"])
    write(Path("out/checkpoint-3"), drawn)
    assert resume(kept["script"], kept["words"], drawn, monkeypatch) == kept["orders"]
    found, expected = comparable(read(Path("out/checkpoint-5"))), comparable(filled(kept["after"]))
    flags = found["training_state.json"]["args"]
    expected["training_state.json"]["args"] = flags | expected["training_state.json"]["args"]  # flags may have come
    assert found == expected and LOG.read_text() == kept["log"]
