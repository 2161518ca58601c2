"""Runs under DeepSpeed's ZeRO-2, started as the guide says, beside the same runs without it.

pip install deepspeed && python -m pytest tests/soak/test_deepspeed.py    (skipped where deepspeed is not installed)
"""

import shutil
from pathlib import Path

from common.run import checkpointing
from tests.cases import CASES, ROOT, command, contents, launch, scalars, train

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("deepspeed")
FULL = [name for name in CASES if "lora" not in name]
TWO = {"train_batch_size": 2, "max_train_steps": 6, "checkpointing_steps": 3, "gradient_accumulation_steps": 2}
# At a save each process says what it holds of the optimizer's states, held before of the gradients, and in what its
# weights are.
HOLDS = """
from common.run.zero import ZeroAccelerator, ZeroOptimizer
save, step, gradients = ZeroAccelerator.save_state, ZeroOptimizer.clip_and_step, [0]
def stepped(self):
    gradients[0] = sum(tensor.numel() for tensor in self.zero.averaged_gradients[0])
    return step(self)
def told(self, folder):
    inner, flat = self._flat()
    whole = sum(p.numel() for p in self.parameters)
    states = sum(value.numel() for value in inner.state[flat].values() if value.ndim)
    dtypes = {p.dtype for p in self.engine.module.parameters()} | {flat.dtype}
    print(f"\\nHOLDS {states / whole:.3f} {gradients[0] / whole:.3f} {dtypes}", flush=True)
    save(self, folder)
ZeroAccelerator.save_state, ZeroOptimizer.clip_and_step = told, stepped
"""
# The second process's first micro-batch is not a number.
POISONED = """
import os
from common.run.zero import ZeroAccelerator
backward, calls = ZeroAccelerator.backward, []
def poisoned(self, loss):
    calls.append(loss)
    backward(self, loss * (float("nan") if len(calls) == 1 and os.environ["RANK"] == "1" else 1.0))
ZeroAccelerator.backward = poisoned
"""


def zero(words, script, prelude=HOLDS, precision="no"):
    engine = ["--config_file", str(Path(ROOT, "docs", "zero2.yaml")), f"--mixed_precision={precision}"]
    done = launch(words, num_processes=2, script=script, prelude=prelude, engine=engine)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def again(folder, step=6):
    (folder / f"checkpoint-{step}" / checkpointing.COMPLETE).unlink()
    return {"resume_from_checkpoint": "latest"}


@pytest.mark.parametrize("name", FULL)
def test_it_is_the_run_without_it_and_each_goes_on_from_the_other(tmp_path, made, name):
    case = CASES[name]

    def words(folder, **changes):
        return command(case, made, tmp_path / folder, **TWO | changes)

    said = zero(words("zero"), case.script)
    lines = [line.split(maxsplit=3)[1:] for line in said.splitlines() if line.startswith("HOLDS")]
    assert len(lines) == 4 and {kind for *_, kind in lines} == {"{torch.float32}"}
    for states, gradients, _ in lines:  # half of two states, and of the gradients, up to padding
        assert 1.0 <= float(states) < 1.02 and 0.48 < float(gradients) < 0.52
    done = launch(words("plain"), num_processes=2, script=case.script)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = scalars(tmp_path / "plain", "loss")
    assert len(losses) == 6 and scalars(tmp_path / "zero", "loss") == pytest.approx(losses, rel=1e-4)
    expected = contents(tmp_path / "zero" / "checkpoint-6")
    assert expected.keys() == contents(tmp_path / "plain" / "checkpoint-6").keys()  # the same files, not a pickle more
    assert distance(tmp_path / "zero", tmp_path / "plain") < 1e-5

    # Resumed from the checkpoint at half: equal to the bit.
    zero(words("zero", **again(tmp_path / "zero")), case.script)
    assert contents(tmp_path / "zero" / "checkpoint-6") == expected
    # Begun with ZeRO-2 and ended without it on one process; and begun without it.
    shutil.copytree(tmp_path / "zero", tmp_path / "left")
    train(words("left", **again(tmp_path / "left") | {"gradient_accumulation_steps": 4}), case.script)
    assert distance(tmp_path / "left", tmp_path / "zero") < 1e-5
    zero(words("plain", **again(tmp_path / "plain")), case.script)
    assert distance(tmp_path / "plain", tmp_path / "zero") < 1e-5
    for folder in ("left", "plain"):
        assert scalars(tmp_path / folder, "loss") == pytest.approx(losses, rel=1e-4)


def distance(a, b):
    """The largest difference of a weight of the student, its average, a state of the optimizer, in the last checkpoint
    or in what was exported. A discriminator's counts a hundredth: Adam's first steps at its rate of 1e-3 turn rounding
    of gradients near 0 into 2e-4, between one process and two as well."""
    names = {path.relative_to(a) for path in a.rglob("*.safetensors") if "checkpoint-3" not in path.parts}
    assert names == {path.relative_to(b) for path in b.rglob("*.safetensors") if "checkpoint-3" not in path.parts}
    pairs = [(load_file(a / name), load_file(b / name)) for name in sorted(names)]
    states = [torch.load(x / "checkpoint-6" / "optimizer.bin", weights_only=True)["state"] for x in (a, b)]
    pairs += [(states[0][index], states[1][index]) for index in states[0]]
    assert all(one.keys() == other.keys() for one, other in pairs)
    scales = [0.01 if name.name == "discriminator.safetensors" else 1.0 for name in sorted(names)]
    scales += [1.0] * len(states[0])
    found = zip(scales, pairs, strict=True)
    return max(s * (a[key].double() - b[key].double()).abs().max().item() for s, (a, b) in found for key in a)


def test_bf16_computes_in_bf16_and_keeps_float32_weights(tmp_path, made):
    case = CASES["lcm"]
    said = zero(command(case, made, tmp_path / "zero", **TWO), case.script, precision="bf16")
    assert said.count("{torch.float32}") == 4
    plain = [*command(case, made, tmp_path / "plain", **TWO), "--mixed_precision=bf16"]
    done = launch(plain, num_processes=2, script=case.script)
    assert done.returncode == 0, done.stderr[-3000:]
    losses, exact = (scalars(tmp_path / name, "loss") for name in ("zero", "plain"))
    assert losses == pytest.approx(exact, rel=2e-2)
    train(command(case, made, tmp_path / "fp32", **TWO | {"train_batch_size": 4}), case.script)
    assert scalars(tmp_path / "fp32", "loss") != pytest.approx(losses, rel=1e-6)  # it did compute in bf16


def test_an_update_that_is_not_finite_is_skipped_by_all(tmp_path, made):
    case = CASES["lcm"]
    zero(command(case, made, tmp_path / "out", **TWO), case.script, prelude=POISONED)
    assert scalars(tmp_path / "out", "updates_skipped")[6] == 1
    assert (tmp_path / "out" / "nonfinite_updates.jsonl").read_text().count("\n") == 1
    state = torch.load(tmp_path / "out" / "checkpoint-6" / "optimizer.bin", weights_only=True)["state"]
    assert state[0]["step"] == 5 and all(tensor.isfinite().all() for tensor in state[0].values())
    student = load_file(tmp_path / "out" / "checkpoint-6" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in student.values())
