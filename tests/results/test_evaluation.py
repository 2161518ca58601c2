"""Scores of samples, the record of them, what is said of it, and its picture; no network is trained or loaded."""

import json

from common.results import evaluation, metrics

import numpy as np
import pytest
import torch
from PIL import Image

JUDGE = {"judge": "a"}
MARK = {"name": "the teacher", "diversity": 2.0, "saturation": 0.4}


def row(distance=1.0, steps=4, network="student", diversity=2.0, saturation=0.4, **more):
    values = {"frechet_distance": distance, "diversity": diversity, "saturation": saturation}
    return {"network": network, "num_inference_steps": steps} | values | JUDGE | more


def test_diversity_is_the_spread_within_prompts_where_they_repeat():
    features = torch.tensor([[0.0, 0.0], [2.0, 0.0], [10.0, 1.0], [10.0, 5.0]])
    assert metrics.diversity(features, ["a", "a", "b", "b"]) == pytest.approx(((1 + 1 + 4 + 4) / 2) ** 0.5)
    whole = (features - features.mean(0)).square().sum().div(3).sqrt().item()
    assert metrics.diversity(features) == metrics.diversity(features, "abcd") == pytest.approx(whole)
    same = features[[0, 0, 2, 2]]  # one image for each prompt: all modes but one are lost
    assert metrics.diversity(same, ["a", "a", "b", "b"]) == 0 and metrics.diversity(same) > 1


def test_saturation_rises_with_contrast_and_colour():
    grey = torch.randint(64, 192, (2, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = grey.expand(-1, 3, -1, -1).clone()
    expected = torch.tensor(np.std(image.numpy().reshape(2, -1) / 255, axis=1), dtype=torch.float32)
    torch.testing.assert_close(metrics.saturation(image), expected)
    contrast = ((image.float() - 128) * 1.5 + 128).to(torch.uint8)
    colour = image.clone()
    colour[:, 0] = (colour[:, 0].float() + 60).to(torch.uint8)
    assert (metrics.saturation(contrast) > 1.3 * expected).all() and (metrics.saturation(colour) > expected).all()
    assert (metrics.saturation((image // 32) + 128) < 0.2 * expected).all()


def test_scores_are_those_of_the_measures_and_none_of_weights_that_have_diverged():
    draw = torch.Generator().manual_seed(1)
    features, other = torch.randn(20, 3, generator=draw), torch.randn(30, 3, generator=draw) + 1
    values = evaluation.score(features, torch.full((20,), 0.25), other, [i % 4 for i in range(20)])
    assert values["frechet_distance"] == metrics.frechet_distance(features, other) > 0.5
    assert values["kernel_distance"] == metrics.kernel_distance(features, other)
    assert values["diversity"] == metrics.diversity(features, [i % 4 for i in range(20)])
    assert values["saturation"] == 0.25 and "frechet_distance" not in evaluation.score(features, torch.ones(20))
    features[3, 1] = torch.nan
    assert set(evaluation.score(features, torch.ones(20), other).values()) == {None}


def kept(folder, rows_of_steps, **options):
    """The best, and the checkpoint of each row, after evaluations at the steps 1, 2, ..."""
    for step, rows in enumerate(rows_of_steps, 1):
        best = evaluation.record(folder, step, rows, f"checkpoint-{step}", **options)
    return best, [row["checkpoint"] for row in evaluation.read_rows(folder)]


def test_a_checkpoint_that_is_not_due_is_named_where_it_is_the_best(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    best, names = kept(tmp_path, [[row(2.0)], [row(1.0)], [row(3.0)]], is_saved=False)
    assert best["checkpoint"] == "checkpoint-2" and names == ["checkpoint-1", "checkpoint-2", None]


@pytest.mark.parametrize("more", [{"stage": "stage-1-k1"}, {"judge": "b"}])
def test_what_does_not_compare_is_no_rival(tmp_path, more):
    best, _ = kept(tmp_path, [[row(1.0)], [row(2.0, **more)]])
    assert (best["step"], best["frechet_distance"]) == (2, 2.0)
    evaluation.record_teacher(tmp_path, {"frechet_distance": 0.1}, 25, "b")
    assert evaluation.record(tmp_path, 3, [row(3.0, **more)])["frechet_distance"] == 2.0


def test_the_best_is_chosen_at_the_steps_that_are_asked_for(tmp_path):
    rows = [[row(5.0, 1), row(1.0, 4)], [row(4.0, 1), row(2.0, 4)]]
    assert kept(tmp_path, rows)[0]["step"] == 1 and kept(tmp_path, rows, at=1)[0]["step"] == 2


def test_the_teachers_row_is_one(tmp_path):
    kept(tmp_path, [[row()]])
    for value in (0.5, 0.25):
        evaluation.record_teacher(tmp_path, {"diversity": value}, 25, "a")
    rows = evaluation.read_rows(tmp_path)
    assert [(r["network"], r["step"]) for r in rows] == [("teacher", 0), ("student", 1)]
    assert rows[0]["diversity"] == 0.25 and rows[0]["judge"] == "a"


def said(tmp_path, rows_of_steps):
    best, _ = kept(tmp_path, rows_of_steps)
    return evaluation.report(evaluation.read_rows(tmp_path), best, MARK)


def test_an_old_best_is_a_warning(tmp_path):
    lines = said(tmp_path, [[row(d)] for d in (2.0, 1.0, 1.1, 1.2)])
    assert lines[0] == (
        "evaluation at step 4: student, 4 steps: distance 1.2, diversity 100% and saturation 100% of the teacher's"
    )
    assert lines[1:] == ["the best is that of step 2: distance 1"]
    lines = said(tmp_path, [[row(d)] for d in (2.0, 1.0, 1.1, 1.2, 1.3)])
    assert "WARNING: 3 evaluations without a better one than step 2's: stop" in lines[2]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"diversity": 1.5}, "diversity is 75% of the teacher's; it loses variety"),
        ({"diversity": 2.5}, "diversity is 125% of the teacher's; its images vary more"),
        ({"saturation": 0.5}, "saturation is 125% of the teacher's; contrast or colour is too strong"),
        ({"saturation": 0.3}, "saturation is 75% of the teacher's; its images are washed out"),
    ],
)
def test_what_leaves_the_teachers_by_a_fifth_is_a_warning_once(tmp_path, change, text):
    within = {"diversity": 1.7, "saturation": 0.45}
    assert not any("WARNING" in line for line in said(tmp_path, [[row(**within)]]))
    (line,) = [line for line in said(tmp_path, [[row(**within)], [row(0.9, **change)]]) if "WARNING" in line]
    assert line.startswith(f"WARNING: student, 4 steps: {text}")
    again = said(tmp_path, [[row(**within)], [row(0.9, **change)], [row(0.8, **change)]])
    assert not any("WARNING" in line for line in again)


def test_weights_that_have_diverged_are_said_and_never_the_best(tmp_path):
    nothing = row(None, diversity=None, saturation=None)
    assert said(tmp_path, [[row(9.0)], [nothing]])[0] == "evaluation at step 2: student, 4 steps: not finite"
    assert evaluation.read_best(tmp_path)["step"] == 1


def test_the_picture_shows_each_line_and_the_teachers(tmp_path):
    rows = [{"step": s} | row(3.0 / s, steps, diversity=2 - 1 / s) for s in (100, 200, 300) for steps in (1, 4)]
    evaluation.draw(tmp_path, [{"step": 0} | row(network="teacher"), *rows], MARK)
    picture = np.array(Image.open(tmp_path / evaluation.PICTURE).convert("RGB"))
    colours = {tuple(pixel) for pixel in picture.reshape(-1, 3)}
    assert picture.shape == (690, 900, 3) and {(209, 73, 91), (0, 121, 140), (68, 68, 68)} <= colours
    evaluation.draw(tmp_path, [{"step": 1} | row(None, diversity=None, saturation=None)], MARK)  # draws nothing
    assert np.array_equal(picture, np.array(Image.open(tmp_path / evaluation.PICTURE).convert("RGB")))


def test_metrics_and_best_are_files_that_others_read(tmp_path):
    kept(tmp_path, [[row(2.0)]])
    assert json.loads((tmp_path / "best_checkpoint.json").read_text())["metric"] == "frechet_distance"
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["checkpoint"] == "checkpoint-1"
    flat = evaluation.flatten([row(2.0, stage="s")])
    assert flat == {
        "eval/student_4_steps/frechet_distance": 2.0, "eval/student_4_steps/diversity": 2.0,
        "eval/student_4_steps/saturation": 0.4,
    }  # fmt: skip
