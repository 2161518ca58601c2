from common import schedules
from common.errors import UserError
from common.tscd.segments import draw_segment, nodes, plan_stages, stage_at, steps_note

import pytest
import torch

FOUR = [8, 4, 2, 1]


def plan(
    stage_steps=None, max_train_steps=100, mse=None, adv=None, loss_type="l2", edges=None, segments=FOUR, real="target"
):
    return plan_stages(segments, stage_steps, max_train_steps, mse, adv, loss_type, edges, real)


def edges(stages):
    return [0, *(stage.end for stage in stages)]


def test_default_edges_are_equal_parts_and_the_last_takes_the_rest():
    assert edges(plan()) == [0, 25, 50, 75, 100]
    assert edges(plan(max_train_steps=103)) == [0, 25, 50, 75, 103]
    assert [stage.name for stage in plan()] == ["stage-0-k8", "stage-1-k4", "stage-2-k2", "stage-3-k1"]


def test_steps_of_each_stage():
    assert edges(plan([5], 20)) == [0, 5, 10, 15, 20]
    assert edges(plan([1, 2, 3, 4], 10)) == [0, 1, 3, 6, 10]
    with pytest.raises(UserError, match="`stage_steps` add up to 10 updates and `max_train_steps` is 11"):
        plan([1, 2, 3, 4], 11)
    with pytest.raises(UserError, match="`max_train_steps`=3 is too few for 4 stages"):
        plan(max_train_steps=3)


def test_every_update_belongs_to_the_stage_whose_edges_hold_it():
    stages = plan([1, 2, 3, 4], 10)
    assert [stage_at(stages, step).num_segments for step in range(12)] == [8, 4, 4, 2, 2, 2, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("max_train_steps", [60, 400])
def test_a_resumed_run_keeps_its_edges(max_train_steps):
    kept = plan(max_train_steps=max_train_steps, edges=[0, 25, 50, 75, 100])
    assert kept == plan()
    assert stage_at(kept, 399) == kept[-1]


def test_weights_by_stage_and_their_defaults():
    assert [stage.mse_weight for stage in plan()] == [1, 1, 0.5, 0.25]
    assert [stage.mse_weight for stage in plan(mse=[2.0])] == [2] * 4
    assert [stage.adv_weight for stage in plan(adv=[0, 1, 2, 3])] == [0, 1, 2, 3]
    l2, huber = ([stage.adv_weight for stage in plan(loss_type=t)] for t in ("l2", "huber"))
    assert len(l2) == len(huber) == 4
    assert plan(segments=[16, 5, 3], max_train_steps=9)[0].mse_weight == 1
    assert [s.mse_weight for s in plan(segments=[5, 3], max_train_steps=9)] == [1, 0.5]


@pytest.mark.parametrize(("length", "warmup"), [(100, 10), (4000, 200), (9, 0)])
def test_the_discriminator_trains_alone_for_a_tenth_of_a_stage(length, warmup):
    stage = plan([length], 4 * length)[2]
    steps = [step - stage.start for step in range(stage.start, stage.end) if stage.is_warmup(step)]
    assert steps == list(range(warmup))


@pytest.mark.parametrize(("start", "number"), [(0.5, 50), (0.0, 0), (1.0, 100)])
def test_it_sees_the_start_in_the_first_part_of_a_stage(start, number):
    stage = plan([100], 400)[1]
    assert sum(stage.is_conditional(step, start) for step in range(stage.start, stage.end)) == number


def test_where_real_is_data_it_never_sees_the_start():
    stage = plan([100], 400, adv=[0.01], real="data")[1]
    assert not any(stage.is_conditional(step, start) for step in range(100, 200) for start in (0.5, 1.0))
    assert "0.01 (adversarial, real is the data)" in stage.summary


@pytest.mark.parametrize("loss_type", ["l2", "huber"])
def test_data_is_compared_in_stages_of_one_segment_and_with_jumps_from_the_top(loss_type):
    weights = [stage.adv_weight for stage in plan(loss_type=loss_type, real="data")]
    assert weights[:3] == [0, 0, 0] and 0 < weights[3] < plan(loss_type=loss_type)[3].adv_weight
    assert [stage.top_prob for stage in plan(real="data")] == [0, 0, 0, 0.5]
    assert [stage.top_prob for stage in plan(adv=[1], real="target")] == [0] * 4


def test_a_stage_without_any_weight_is_refused():
    with pytest.raises(UserError, match="`mse_weights` and `adv_weights` are 0 in stage-2-k2"):
        plan(mse=[1, 1, 0, 1], adv=[0.1, 0.1, 0, 0.1])


def test_always_conditional_is_always_conditional():
    assert plan([100], 400)[3].is_conditional(10_000, 1.0) and not plan([100], 400)[3].is_conditional(10_000, 0.99)


@pytest.mark.parametrize(
    ("k", "boundary_prob", "says", "not_a_word_of"),
    [
        (8, 1.0, ["exactly `num_inference_steps=8`", "`eta=0`", "never fewer"], ["0.2", "eta=1"]),
        (2, 0.0, ["exactly `num_inference_steps=2`", "`eta=0`", "never fewer"], ["0.2", "eta=1"]),
        (1, 1.0, ["`num_inference_steps=1`", "with more steps pass `eta=1`"], ["0.2"]),
        (1, 0.0, ["`num_inference_steps=1`", "with more steps pass `eta=0.2` to `0.5`"], ["eta=1"]),
    ],
)
def test_what_a_card_says_of_other_numbers_of_steps(k, boundary_prob, says, not_a_word_of):
    note = steps_note(k, boundary_prob)
    assert all(words in note for words in says) and not any(words in note for words in not_a_word_of)


# --- the grid


def test_nodes_are_the_grid_and_its_lower_end():
    grid = nodes(40, [8, 4, 2, 1])
    assert grid.tolist() == [0, *range(24, 1000, 25)] and grid[1:].equal(schedules.ddim_timesteps(40))


@pytest.mark.parametrize(
    ("num_ddim_timesteps", "segments", "valid"),
    [
        (50, [8, 4, 2, 1], "40, 200"), (30, [4, 2, 1], "20, 40, 100, 200, 500"), (1000, [1], "1, 2, 4"),
        (4, [8], "8, 40"),
    ],
)  # fmt: skip
def test_grids_that_segments_do_not_fit_are_refused_with_those_that_do(num_ddim_timesteps, segments, valid):
    said = f"`num_ddim_timesteps`={num_ddim_timesteps} must divide 1000.*: one of.*{valid}"
    with pytest.raises(UserError, match=said):
        nodes(num_ddim_timesteps, segments)
    with pytest.raises(UserError, match="`stage_segments`=3,1: no grid of 1000 timesteps"):
        nodes(40, [3, 1])


@pytest.mark.parametrize("k", [1, 2, 4, 8, 40])
@pytest.mark.parametrize("top_prob", [0.0, 0.5])
def test_a_share_of_the_jumps_starts_at_a_segments_top(k, top_prob):
    n, i, m, top = draw_segment(k, 40, 0.5, 20_000, torch.Generator().manual_seed(k), top_prob)
    share = top_prob + (1 - top_prob) * k / 40
    assert (n == top).float().mean().item() == pytest.approx(share, abs=4 * (share * (1 - share) / 20_000) ** 0.5)
    assert ((top - 40 // k <= m) & (m <= i) & (i < n) & (n <= top)).all() and torch.equal(n, i + 1)
    assert n.unique().tolist() == list(range(1, 41)) and top.unique().numel() == k


@pytest.mark.parametrize("k", [1, 2, 4, 8, 40])
@pytest.mark.parametrize("boundary_prob", [0.0, 0.5, 1.0])
def test_nodes_of_segments(k, boundary_prob):
    """The defect: the paper's floor on timesteps leaves no end for k of the N starts."""
    n, i, m, top = draw_segment(k, 40, boundary_prob, 20_000, torch.Generator().manual_seed(k))
    length = 40 // k
    b = i // length * length
    assert ((b <= m) & (m <= i) & (i < n) & (n <= b + length)).all() and torch.equal(n, i + 1)
    assert torch.equal(top, b + length)
    assert n.unique().tolist() == list(range(1, 41))  # every node is a start
    at_bottom = (m == b).float().mean().item()
    if boundary_prob == 1:
        assert at_bottom == 1
    else:  # uniform over b..i: 1 / (i - b + 1) of the draws, for each i
        uniform = sum(1 / j for j in range(1, length + 1)) / length
        assert at_bottom == pytest.approx(boundary_prob + (1 - boundary_prob) * uniform, abs=0.02)
        assert len({(int(a), int(c)) for a, c in zip(i, m, strict=True)}) == k * length * (length + 1) // 2
