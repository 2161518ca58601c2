"""Evaluations in the loop of every script: what is kept, the best checkpoint, its export, and a resume."""

import itertools

from common.networks import teachers
from common.results import evaluation
from common.run import checkpointing
from tests.cases import CASES, contents, digests, one_sentence, scalars, soak_but, train, undo
from tests.fork_server import run_processes

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

BOTH = ("raw", "ema")  # what consistency training measures
NAMES = ("lcm", "lcm_lora", "tscd", "tscd_lora", "ct", "direct lora")


@pytest.fixture
def evaluated(command, classifier):
    """evaluated(name, folder, **changes): the command line of a run that is measured in every update."""

    def make(name, folder, **changes):
        own = {"eval_steps": 1, "feature_network": classifier}
        of_ct = {"eval_num_samples": 12, "eval_num_reference": 20, "eval_class_accuracy": True}
        own |= of_ct if name == "ct" else {"eval_num_images": 12}
        return command(name, folder, **own | changes)

    return make


def rows_of(folder):
    return evaluation.read_rows(folder)


@pytest.mark.parametrize("name", soak_but("lcm", "ct", "direct lora", names=NAMES))
def test_a_killed_run_ends_as_one_that_was_not(tmp_path, evaluated, command, name, capsys):
    script, out = CASES[name].script, tmp_path / "out"
    words = evaluated(name, out)
    train(words, script)
    printed = capsys.readouterr().out
    whole, rows = contents(out / "checkpoint-4"), rows_of(out)
    best, picture = evaluation.read_best(out), (out / evaluation.PICTURE).read_bytes()
    assert Image.open(out / evaluation.PICTURE).size[1] > 400
    assert sorted({row["step"] for row in rows}) == [*range(name == "ct", 5)]  # the teacher's is of step 0
    for row in rows:
        if row["network"] != "teacher":
            assert all(np.isfinite(row[key]) for key in ("frechet_distance", "kernel_distance", *evaluation.BOUNDED))
    if name == "ct":
        assert [(row["network"], row["num_inference_steps"]) for row in rows[:4]] == [*itertools.product(BOTH, (1, 2))]
        assert all(0 <= row["class_accuracy"] <= 1 for row in rows)
        assert best["frechet_distance"] == min(r["frechet_distance"] for r in rows if r["num_inference_steps"] == 2)
    network = "ema" if name == "ct" else "student"
    last = next(row for row in rows[::-1] if row["network"] == network)
    tag = f"eval/{network}_{last['num_inference_steps']}_steps/diversity"
    assert scalars(out, tag)[4] == pytest.approx(last["diversity"], rel=1e-5)
    assert (out / best["checkpoint"]).is_dir() and "evaluation at step 4" in printed
    if name != "ct":
        assert "  evaluation " in printed and rows[0]["network"] == "teacher"

    undo(out / "checkpoint-4")
    train([*words, "--resume_from_checkpoint=latest"], script)
    resumed = capsys.readouterr().out
    assert "sampling the teacher" not in resumed  # its features are kept
    assert contents(out / "checkpoint-4") == whole and rows_of(out) == rows
    assert evaluation.read_best(out) == best and (out / evaluation.PICTURE).read_bytes() == picture

    if name == "direct lora":  # it would take as long again
        return
    train(command(name, tmp_path / "without"), script)  # and it changes nothing of the training
    assert digests(tmp_path / "without" / "checkpoint-4") == digests(out / "checkpoint-4")


def test_the_best_is_exported_and_an_evaluation_that_fails_is_a_warning(tmp_path, evaluated, monkeypatch, capsys):
    """The distances are made up: the best is that of update 3, where no checkpoint is due, and update 1 fails."""
    distances, out = iter([3.0, 1.0, 2.0]), tmp_path / "out"
    score, calls = evaluation.score, []

    def made_up(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:  # after the teacher's
            raise OSError(28, "No space left on device")
        return score(*args, **kwargs) | ({"frechet_distance": next(distances)} if len(calls) > 2 else {})

    monkeypatch.setattr(evaluation, "score", made_up)
    words = evaluated("lcm_lora", out, export="best", checkpointing_steps=4, checkpoints_total_limit=1)
    train(words, CASES["lcm_lora"].script)
    printed = capsys.readouterr().out
    assert "WARNING: sampling or measuring failed at step 1 (OSError: [Errno 28] No space left on device)" in printed
    assert [row["step"] for row in evaluation.read_rows(out)] == [0, 2, 3, 4]
    assert evaluation.read_best(out)["checkpoint"] == "checkpoint-3"
    assert sorted(c.name for c in checkpointing.list_checkpoints(out)) == ["checkpoint-3", "checkpoint-4"]
    best, last = (load_file(out / f"checkpoint-{step}" / "adapters.safetensors") for step in (3, 4))
    saved = load_file(out / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(saved[f"unet.{name}"], best[name]) for name in best)
    assert not all(torch.equal(last[name], best[name]) for name in best)
    assert "the result has the best weights, those of step 3" in printed
    assert "Trained for 3 updates" in (out / "README.md").read_text()
    assert "quality  frechet distance 1 with 1 steps, the best, at update 3" in printed

    monkeypatch.setattr(evaluation, "score", score)
    train([*words, "--export=last", "--resume_from_checkpoint=latest"], CASES["lcm_lora"].script)
    saved = load_file(out / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(saved[f"unet.{name}"], last[name]) for name in last)
    assert "run the command again with --resume_from_checkpoint=latest, --export=best" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"feature_network": None}, "--eval_steps needs --feature_network, such as facebook/dinov2-large"),
        ({"feature_network": "org/none"}, "--feature_network=org/none cannot be used ("),
        ({"eval_steps": 0}, "--feature_network, --eval_num_images: nothing is measured; add --eval_steps"),
        ({"eval_num_images": 1}, "--eval_num_images: a distance needs at least 2"),
        ({"eval_reference": "/nowhere"}, "--eval_reference: "),
        ({"eval_prompts": "@/nowhere"}, "--eval_prompts=@/nowhere cannot be read"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_loaded(
    tmp_path, evaluated, capsys, monkeypatch, changes, sentence
):
    monkeypatch.setattr(teachers, "load_teacher", None)
    assert sentence in one_sentence(capsys, train, evaluated("lcm", tmp_path / "out", **changes))
    assert not (tmp_path / "out" / "unet").exists()


def test_held_out_images_are_the_reference_and_the_teacher_is_measured_against_them(tmp_path, evaluated, shards):
    out, reference = tmp_path / "out", shards.replace("train/{00000..00007}", "heldout/*")
    train(evaluated("lcm", out, eval_reference=reference, eval_prompts="a three", max_train_steps=1, eval_steps=1))
    teacher, student = evaluation.read_rows(out)
    assert teacher["frechet_distance"] > 0 and student["frechet_distance"] > 0
    assert teacher["judge"] == student["judge"]


@pytest.mark.soak
def test_two_processes_share_an_evaluation(tmp_path, evaluated):
    """The teacher's row is that of one process, and both agree on what is saved as the best."""
    rows = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        words = evaluated("lcm", out, max_train_steps=2, checkpointing_steps=2, export="best", eval_prompts="a three")
        done = run_processes(words, CASES["lcm"].script, processes)
        assert done.returncode == 0, done.stderr
        rows[processes] = evaluation.read_rows(out)
        assert evaluation.read_best(out)["checkpoint"] and (out / "model_index.json").is_file()
    one, two = (rows[processes][0] for processes in (1, 2))
    assert [row["step"] for row in rows[2]] == [0, 1, 2] and one["network"] == two["network"] == "teacher"
    assert one["diversity"] == pytest.approx(two["diversity"], rel=1e-4)  # the same samples, on other cores
