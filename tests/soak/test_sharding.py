"""Runs under FSDP2 on two and four CPU processes, beside the same runs on one.

python -m pytest tests/soak/test_sharding.py -n 0
"""

import random
import shutil
from pathlib import Path

from tests import forks
from tests.cases import CASES, ROOT, command, contents, launch, scalars, undo
from tests.fork_server import run_processes
from tests.made import ask
from tests.networks.test_fusing import write_lora
from tests.run.test_sharding import FSDP2

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

SCORE = {"fake_lora_rank": 4, "fake_updates": 2, "fake_warmup": 2, "fake_learning_rate": 1e-3}
SCORES = {f"{name} score": {"score_weight": 1, "adv_weight": 0.2} for name in ("direct", "direct lora")}
SCORES |= {f"{name} score": {"score_weights": "0.5,1", "boundary_prob": 1} for name in ("tscd", "tscd_lora")}
CASES = CASES | {
    name: CASES[name.removesuffix(" score")]._replace(flags=CASES[name.removesuffix(" score")].flags | own | SCORE)
    for name, own in SCORES.items()
}
KILLED = 10  # times a case
STEPS = {"max_train_steps": 20, "checkpointing_steps": 10, "train_batch_size": 2}
KEEPS = FSDP2.replace("'true'}", "'false'}")  # a block's weights from its forward to its backward pass
# Kill -9 at a call inside of the save of step 4, on the process RANK.
KILLS = """
import os, signal, sys
from common.run import checkpointing
save = checkpointing.save_checkpoint
def killed(accelerator, output_dir, step, *args):
    calls = [0]
    def event(frame, kind, argument):
        calls[0] += kind in ("call", "c_call")
        if calls[0] == {call}:
            os.kill(os.getpid(), signal.SIGKILL)
    if step == 4 and os.environ["RANK"] == "{rank}":
        sys.setprofile(event)
    try:
        return save(accelerator, output_dir, step, *args)
    finally:
        sys.setprofile(None)
        print("CALLS", step, os.environ["RANK"], calls[0], flush=True)
checkpointing.save_checkpoint = killed
"""


@pytest.fixture
def run(made):
    """run(name of a case, folder, processes, prelude, **changes): its output; equal samples per update for any
    number of processes."""

    def start(name, folder, processes, prelude="", code=0, **changes):
        lanes = {} if name.startswith("direct") else {"data_lanes": 8}
        lanes |= {"lora_dropout": 0.0} if "lora" in name else {}  # whose masks each process draws
        changes = STEPS | lanes | {"gradient_accumulation_steps": 4 // processes} | changes
        done = run_processes(command(CASES[name], made, folder, **changes), CASES[name].script, processes, prelude)
        assert done.returncode == code, done.stderr[-4000:]
        return done.stdout

    return start


def distances(a, b):
    """(relative difference of losses, of a weight or average, of one beside, of a discriminator or fake score), the
    largest ones."""
    losses, others = scalars(a, "loss"), scalars(b, "loss")
    assert losses.keys() == others.keys()
    names = {path.relative_to(a) for path in a.rglob("*.safetensors")}
    assert names == {path.relative_to(b) for path in b.rglob("*.safetensors")}
    found = {True: 0.0, False: 0.0}
    for name in names:
        x, y = load_file(a / name), load_file(b / name)
        assert x.keys() == y.keys()
        kind = name.name in ("discriminator.safetensors", "fake_score.safetensors")  # their rate is 1e-3
        found[kind] = max(found[kind], *((x[k].double() - y[k].double()).abs().max().item() for k in x))
    return max(abs(losses[k] / others[k] - 1) for k in losses), found[False], found[True]


def check(a, b):
    """Adam turns rounding into whole steps; what a network beside took of them, the losses through it show."""
    loss, weight, beside = distances(a, b)
    print(f"{a} {b}: losses {loss:.1e}, weights {weight:.1e}, beside {beside:.1e}")
    assert loss < (1e-3 if beside else 1e-4) and weight < 2e-5 and beside < 1e-3


@pytest.mark.parametrize("name", CASES)
def test_two_and_four_processes_are_one_and_each_goes_on_from_the_others(tmp_path, run, name):
    one, two = tmp_path / "one", tmp_path / "two"
    run(name, one, 1)
    run(name, two, 2, FSDP2)
    check(two, one)
    expected = contents(two / "checkpoint-20")
    run(name, two, 2, FSDP2, **undo(two / "checkpoint-20"))
    assert contents(two / "checkpoint-20") == expected  # to the bit
    run(name, two, 1, **undo(two / "checkpoint-20"))
    check(two, one)
    if name == "lcm":
        run(name, one, 4, FSDP2, **undo(one / "checkpoint-20"))
        check(one, two)
        run(name, one, 2, FSDP2, **undo(one / "checkpoint-20"))
        run(name, two, 4, KEEPS, **undo(two / "checkpoint-20"))
        check(one, two)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_weights_are_equal_where_adam_magnifies_no_rounding(tmp_path, run, name):
    """Adam divides a gradient by its size, so that one that is nothing but rounding moves a weight as far as any; with
    a large eps it does not. A loss is a difference of nearly equal outputs, so their rounding of 1e-7 weighs 10 to 50
    times as much in it: 2.8e-6 was the most, and 7.5e-6 where a fake score has learnt beside it."""
    for folder, processes, prelude in (("one", 1, ""), ("two", 2, FSDP2)):
        run(name, tmp_path / folder, processes, prelude, adam_epsilon=1e-3, checkpointing_steps=20)
    loss, weight, beside = distances(tmp_path / "two", tmp_path / "one")
    print(f"{name}: losses {loss:.1e}, weights {weight:.1e}, beside {beside:.1e}")
    assert loss < (2e-5 if beside else 5e-6) and weight < 1e-5 and beside < 1e-3


@pytest.mark.parametrize("name", ["ct", "direct"])
def test_weights_that_stay_gathered_give_the_same(tmp_path, run, name):
    """Whose samples between updates must not leave an average's or old weights behind."""
    changes = {"validation_steps": 3, "max_train_steps": 8}
    run(name, tmp_path / "whole", 2, **changes)
    run(name, tmp_path / "kept", 2, KEEPS, **changes)
    check(tmp_path / "kept", tmp_path / "whole")


@pytest.mark.parametrize(("name", "rank"), [(name, number % 2) for number, name in enumerate(CASES)])
def test_killed_inside_of_a_save_it_resumes_and_ends_equal(tmp_path, run, name, rank):
    changes, draw = {"max_train_steps": 6, "checkpointing_steps": 2}, random.Random(rank)
    said = run(name, tmp_path / "a", 2, FSDP2 + KILLS.format(call=0, rank=rank), **changes)
    calls = int(next(line for line in said.splitlines() if line.startswith(f"CALLS 4 {rank}")).split()[-1])
    expected = contents(tmp_path / "a" / "checkpoint-6")
    for _ in range(KILLED):
        out = tmp_path / "b"
        kill = KILLS.format(call=draw.randint(1, calls), rank=rank)
        run(name, out, 2, FSDP2 + kill, code=-9, **changes)
        assert "resumed" in run(name, out, 2, FSDP2, resume_from_checkpoint="latest", **changes)
        assert contents(out / "checkpoint-6") == expected
        shutil.rmtree(out)


@pytest.mark.parametrize("name", ["lcm", "ct", "direct"])
def test_bf16_computes_in_bf16_and_keeps_float32_weights(tmp_path, run, name):
    """Against one process. bf16 rounds to 2^-8, a loss is the difference of outputs that are alike, two processes sum
    gradients in another order, and norms' weights are rounded too: 0.056 was the most, after three updates."""
    bf16, changes = 'os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"\n', {"max_train_steps": 4}
    for folder, prelude in (("plain", "import os\n" + bf16), ("split", FSDP2 + bf16), ("float32", FSDP2)):
        run(name, tmp_path / folder, 1 if folder == "plain" else 2, prelude, **changes)
    losses, exact, float32 = (scalars(tmp_path / folder, "loss") for folder in ("split", "plain", "float32"))
    print(f"{name}: losses {max(abs(losses[k] / exact[k] - 1) for k in losses):.1e}")
    assert losses == pytest.approx(exact, rel=1e-1) and losses != pytest.approx(float32, rel=1e-6)
    for path in (tmp_path / "split").rglob("model.safetensors"):
        if "checkpoint" in str(path):
            assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}


@pytest.mark.parametrize("name", ["lcm", "tscd_lora", "direct lora"])
def test_a_teacher_has_its_lora_and_blocks_are_compiled(tmp_path, run, made, name):
    """By a compiler that runs what it has traced, without making kernels of it."""
    teacher, style = made["direct_teacher" if "direct" in name else "teacher"], f"{tmp_path / 'style'}:0.5"

    def make():
        write_lora(tmp_path / "style", UNet2DConditionModel.from_pretrained(teacher, subfolder="unet"))
        if "direct" in name:
            ask(tmp_path / "pairs", teacher, Path(made["pairs"]).parent / "prompts.txt", teacher_lora=style)

    assert forks.end_of(forks.fork(make)) == 0
    changes = {"teacher_lora": style, "max_train_steps": 4} | (
        {"pairs_dir": tmp_path / "pairs"} if "direct" in name else {}
    )
    eager = "from common.networks import performance\nperformance.COMPILE_OPTIONS['backend'] = 'eager'\n"
    run(name, tmp_path / "one", 1, **changes)
    run(name, tmp_path / "two", 2, FSDP2 + eager, compile=True, **changes)
    check(tmp_path / "two", tmp_path / "one")


def test_accelerate_launches_it_as_the_guide_says(tmp_path, made):
    case = CASES["lcm"]
    words = command(case, made, tmp_path / "out", train_batch_size=2, data_lanes=8)
    engine = ["--config_file", str(Path(ROOT, "docs", "fsdp2.yaml")), "--mixed_precision=no"]
    prelude = "from common.run import sharding\nreal = sharding._shard\n"
    prelude += "sharding._shard = lambda *args: print('SPLIT', flush=True) or real(*args)\n"
    done = launch(words, num_processes=2, script=case.script, prelude=prelude, engine=engine)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("SPLIT") == 6  # student, target and teacher, on both
    assert (tmp_path / "out" / "model_index.json").is_file()
