"""Runs that die, are stopped, or have several processes: each equals the run that was left alone."""

import json
import re

from common.run import checkpointing
from tests.cases import NO_DDP_LEFT, SCRIPTS, digests, one_sentence, scalars, soak_but, stop_after, train, undo
from tests.fork_server import run_processes

import pytest
from safetensors.torch import load_file

SCORE = {"score_weight": 0.3, "fake_updates": 2, "fake_warmup": 1, "fake_learning_rate": 1e-3}
STAGE_SCORE = {
    "fake_lora_rank": 4,
    "score_weights": "0,0.3",
    "fake_updates": 2,
    "fake_warmup": 1,
    "fake_learning_rate": 1e-3,
}
VARIANTS = {
    "mid epoch, accumulation, workers, 8-bit Adam and cosine": (
        "lcm",
        {
            "gradient_accumulation_steps": 3, "dataloader_num_workers": 2, "use_8bit_adam": True,
            "lr_scheduler": "cosine", "lr_warmup_steps": 1,
        },
    ),
    "LoRA, bf16, dropout and workers": (
        "lcm_lora",
        {"mixed_precision": "bf16", "lora_dropout": 0.3, "dataloader_num_workers": 2, "train_batch_size": 5},
    ),
    "TSCD, from inside a stage, accumulation": ("tscd", {"stage_steps": "3,1", "gradient_accumulation_steps": 2}),
    "TSCD, real is data, from inside a stage": ("tscd", {"stage_steps": "3,1", "adv_real": "data"}),
    "TSCD, a score, from inside a stage, accumulation": (
        "tscd",
        STAGE_SCORE | {"stage_steps": "1,3", "gradient_accumulation_steps": 2, "unet_time_cond_proj_dim": 32},
    ),
    "TSCD LoRA, a score on the same base": ("tscd_lora", STAGE_SCORE | {"adv_weights": 0, "lora_dropout": 0.3}),
    "TSCD LoRA, bf16, frozen discriminator": (
        "tscd_lora",
        {"mixed_precision": "bf16", "freeze_discriminator_backbone": True, "lora_dropout": 0.3},
    ),
    "classes, flips, accumulation, workers, across epochs and curriculum": (
        "ct",
        {
            "random_flip": True, "dataloader_num_workers": 2, "gradient_accumulation_steps": 2, "train_batch_size": 5,
            "checkpointing_steps": 10, "max_train_steps": 16, "validation_steps": 8,
        },
    ),
    "pairs, EMA, accumulation": ("direct", {"gradient_accumulation_steps": 3}),
    "pairs, LoRA, a score on the same base": (
        "direct lora",
        SCORE | {"gradient_accumulation_steps": 2, "adv_weight": 0.1},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "changes"), VARIANTS.values(), ids=VARIANTS)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, command, name, changes):
    """That two whole runs are equal, too, is seen where one of them is killed, stopped or extended."""
    script = SCRIPTS[name.split()[0]]
    train(command(name, tmp_path, **changes), script)
    last = checkpointing.list_checkpoints(tmp_path)[-1]
    expected, losses = digests(last), scalars(tmp_path, "loss")
    held_out = tmp_path / "held_out.json"
    measured = held_out.read_text() if script is SCRIPTS["direct"] else None
    train(command(name, tmp_path, **changes, **undo(last)), script)
    assert digests(last) == expected and scalars(tmp_path, "loss") == losses
    assert measured is None or held_out.read_text() == measured


STOPPED = {  # beside the first, with -m soak
    "classes": ("ct", 3, {}),
    "LoRA, dropout, 8-bit Adam, cosine": (
        "direct lora",
        3,
        {"use_8bit_adam": True, "lr_scheduler": "cosine", "lr_warmup_steps": 1, "train_batch_size": 3},
    ),
}


@pytest.mark.parametrize(
    ("name", "step", "changes"),
    [("tscd", 2, {}), *(pytest.param(*row, marks=pytest.mark.soak) for row in STOPPED.values())],
    ids=["at a stage's end", *STOPPED],
)
def test_a_run_that_a_stop_file_ends_is_saved_once_and_goes_on_bit_for_bit(
    tmp_path, command, monkeypatch, name, step, changes
):
    script, out = SCRIPTS[name.split()[0]], tmp_path / "b"
    changes = changes | {"checkpointing_steps": 4, "logging_steps": 4}
    train(command(name, tmp_path / "a", **changes), script)
    with monkeypatch.context() as patch:
        stop_after(patch, out, step)
        with pytest.raises(SystemExit) as left:
            train(command(name, out, **changes), script)
    assert left.value.code == 75 and json.loads((out / "REQUEUE").read_text())["global_step"] == step
    assert [c.name for c in checkpointing.list_checkpoints(out)] == [f"checkpoint-{step}"]
    assert not (out / "README.md").exists() and not (out / "unet").exists() and not list(out.glob("*.safetensors"))
    assert (out / "stage-0-k2").exists() == (name == "tscd")
    train(command(name, out, **changes, resume_from_checkpoint="latest"), script)
    assert digests(out / "checkpoint-4") == digests(tmp_path / "a" / "checkpoint-4")
    assert (out / "README.md").is_file() and not (out / "REQUEUE").exists() and not (out / "STOP").exists()


# --- several processes

WATCHED = """
import os
from common.ct import consistency
draw = consistency.consistency_function
def watched(network, x, sigma, *args, **kwargs):
    os.write(1, f"DRAWN {os.environ['RANK']} {x.double().sum().item():.6f}\\n".encode())
    return draw(network, x, sigma, *args, **kwargs)
consistency.consistency_function = watched
levels = consistency.discretization_steps
def told(*args, **kwargs):
    os.write(1, f"LEVELS {os.environ['RANK']} {args[0]} {levels(*args, **kwargs)}\\n".encode())
    return levels(*args, **kwargs)
consistency.discretization_steps = told
"""
OWN = {"ct": {"lr_scheduler": "cosine", "lr_warmup_steps": 0, "eval_steps": 4, "eval_num_samples": 22}}
OWN["ct"] |= {"eval_class_accuracy": True}
OWN["tscd_lora"] = STAGE_SCORE | {"proportion_empty_prompts": 1}  # the fake score takes the captions at hand
OWN["direct"] = SCORE | {"fake_lora_rank": 4, "adv_weight": 0.1}


@pytest.mark.parametrize("name", soak_but("lcm", "tscd_lora", "ct", "direct"))
def test_two_processes_draw_different_noise_agree_resume_and_equal_one_process(
    tmp_path, command, request, name, capsys
):
    changes = {"train_batch_size": 2, "data_lanes": 8, "checkpointing_steps": 3}  # 3 micro-batches: half of an update
    changes |= OWN.get(name, {})
    if name == "ct":
        changes["feature_network"] = request.getfixturevalue("classifier")
    if name == "direct":
        del changes["data_lanes"]
        changes["adv_images"] = request.getfixturevalue("table") / "metadata.csv"
    script, last = SCRIPTS[name], tmp_path / "two" / "checkpoint-4"
    prelude = NO_DDP_LEFT + WATCHED * (name == "ct")
    done = run_processes(command(name, tmp_path / "two", **changes), script, 2, prelude)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = digests(last)
    assert len(set(expected["rng"])) == (1 if name == "ct" else 2)  # whose draws are keyed
    assert len(list(last.glob("random_states_*.pkl"))) == 2
    if name == "ct":
        levels, drawn = ([re.findall(f"{x} {rank} (.*)", done.stdout) for rank in "01"] for x in ("LEVELS", "DRAWN"))
        assert levels[0] == levels[1] and levels[0]
        assert len(drawn[0]) == len(drawn[1]) == 8 and not set(drawn[0]) & set(drawn[1])

    # The same micro-batches on one process, accumulated, activations recomputed: the same losses and weights, up to
    # the order of sums.
    own = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    train(command(name, tmp_path / "one", **own, **changes), script)
    losses = scalars(tmp_path / "two", "loss")
    assert len(losses) == 4 and scalars(tmp_path / "one", "loss") == pytest.approx(losses, rel=1e-4)
    assert scalars(tmp_path / "one", "lr") == scalars(tmp_path / "two", "lr")
    weights = {path.name: load_file(path) for path in last.glob("*.safetensors")}
    close = 2e-4 if name == "direct" else 2e-5

    def check(folder):
        assert digests(folder / "checkpoint-4")["data"] == expected["data"]
        for file, tensors in weights.items():
            other = load_file(folder / "checkpoint-4" / file)
            limit = close * (50 if file.startswith("discriminator") else 1)  # its rate is 1e-3
            assert max((tensors[k] - other[k]).abs().max().item() for k in tensors) < limit

    check(tmp_path / "one")
    if name == "ct":
        one, two = ((tmp_path / x / "metrics.jsonl").read_text().splitlines() for x in ("one", "two"))
        for a, b in zip(map(json.loads, one), map(json.loads, two), strict=True):
            assert a["frechet_distance"] == pytest.approx(b["frechet_distance"], rel=1e-3)

    if name in ("ct", "direct"):  # which keep nothing by a way of their own; by one process: above
        return
    done = run_processes(command(name, tmp_path / "two", **changes, **undo(last)), script, 2, NO_DDP_LEFT)
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stderr[-2000:]
    assert digests(last) == expected
    if name != "lcm":
        return

    # On one process instead of two, and on two instead of one.
    again = undo(last)
    said = one_sentence(capsys, train, command(name, tmp_path / "two", **changes, **again))
    assert "an update had 4 samples and has 2" in said
    train(command(name, tmp_path / "two", **changes, **again, gradient_accumulation_steps=2))
    check(tmp_path / "two")
    again = undo(tmp_path / "one" / "checkpoint-4")
    done = run_processes(command(name, tmp_path / "one", **changes, **again), script, 2)
    assert done.returncode == 0 and "at step 3" in done.stdout, done.stderr[-2000:]
    check(tmp_path / "one")
    for folder in ("one", "two"):
        assert scalars(tmp_path / folder, "loss") == pytest.approx(losses, rel=1e-4)
