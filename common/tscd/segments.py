"""The progressive stages of trajectory segmented consistency distillation: a pure function of the global step."""

import sys
from typing import NamedTuple

from common.errors import UserError

import torch

# Weights of the two parts of the distance by the number of segments; a number between two keys takes the lower one's.
MSE_WEIGHTS = {1: 0.25, 2: 0.5, 4: 1.0}
ADV_WEIGHTS = {
    "target": {"l2": {1: 0.1, 2: 0.05, 4: 0.01, 8: 0.0}, "huber": {1: 0.2, 2: 0.1, 4: 0.05, 8: 0.0}},
    "data": {"l2": {1: 0.05, 2: 0.0}, "huber": {1: 0.1, 2: 0.0}},  # three times as much is worse
}
MAX_WARMUP_STEPS, WARMUP_FRACTION = 200, 0.1
ADV_REAL = tuple(ADV_WEIGHTS)  # what the discriminator calls real
TOP_PROB = 0.5  # share of the jumps from a segment's upper end, where sampling starts, if they are compared with data


class Stage(NamedTuple):
    """One stage: updates start <= global_step < end, counted from 0, with the trajectory in `num_segments`."""

    index: int
    num_segments: int
    start: int
    end: int
    mse_weight: float
    adv_weight: float
    adv_real: str
    score_weight: float = 0.0

    @property
    def name(self):
        return f"stage-{self.index}-k{self.num_segments}"

    @property
    def summary(self):
        """What the stage does, for the derived configuration."""
        return f"updates {self.start} to {self.end}, sampling in {self.num_segments}; {self.weights}"

    @property
    def weights(self):
        """Those of the distance, in words."""
        real = f", real is the {self.adv_real}" if self.adv_weight else ""
        score = f", {self.score_weight:g} (score)" if self.score_weight else ""
        return f"weights {self.mse_weight:g} (MSE), {self.adv_weight:g} (adversarial{real}){score}"

    @property
    def top_prob(self):
        """How many jumps start at their segment's upper end, of those that need not: see `draw_segment`."""
        return TOP_PROB if self.adv_weight and self.adv_real == "data" else 0.0

    @property
    def warmup_steps(self):
        """The updates in which the discriminator trains alone: the first 10 % of the stage's, at most 200."""
        return min(MAX_WARMUP_STEPS, int(WARMUP_FRACTION * (self.end - self.start)))

    def is_warmup(self, global_step):
        """Whether the discriminator trains alone yet."""
        return global_step < self.start + self.warmup_steps

    def is_conditional(self, global_step, unconditional_start):
        """Whether the discriminator sees x_t too: before the fraction `unconditional_start` of the stage is over, and
        never where real is data, which is not on the trajectory of x_t."""
        if self.adv_real == "data":
            return False
        return unconditional_start == 1 or global_step < self.start + unconditional_start * (self.end - self.start)


def for_each(values, count):
    """[x] or [x, y, ...] -> a list of `count`."""
    return values * count if len(values) == 1 else values


def plan_stages(
    stage_segments,
    stage_steps,
    max_train_steps,
    mse_weights,
    adv_weights,
    loss_type,
    edges=None,
    adv_real="target",
    score_weights=None,
):
    """The list of `Stage`s.

    stage_steps: [n] or one number for each stage; None: max_train_steps // stages for each, the rest to the last.
    mse_weights, adv_weights: likewise; None: the defaults by number of segments, loss type and adv_real.
    score_weights: likewise; None: 0.
    edges: [start of stage 0, ..., end of the last], those of the run that is resumed: another max_train_steps must not
    move them. Raises UserError when stage_steps and max_train_steps disagree, or a stage has no weight.
    """
    count = len(stage_segments)
    if edges is None:
        if max_train_steps < count:
            raise UserError(f"`max_train_steps`={max_train_steps} is too few for {count} stages of an update or more")
        steps = for_each(stage_steps or [max_train_steps // count], count)
        edges = [sum(steps[:i]) for i in range(count + 1)]
        if stage_steps is None:
            edges[-1] = max_train_steps
        if edges[-1] != max_train_steps:
            raise UserError(
                f"`stage_steps` add up to {edges[-1]} updates and `max_train_steps` is {max_train_steps}; drop one"
            )
    tables = MSE_WEIGHTS, ADV_WEIGHTS[adv_real][loss_type]
    defaults = [[table[max(key for key in table if key <= k)] for k in stage_segments] for table in tables]
    mse = for_each(mse_weights or defaults[0], count)
    adv = for_each(adv_weights or defaults[1], count)
    score = for_each(score_weights or [0.0], count)
    stages = [
        Stage(i, k, edges[i], edges[i + 1], mse[i], adv[i], adv_real, score[i]) for i, k in enumerate(stage_segments)
    ]
    for stage in stages:
        if stage.mse_weight == stage.adv_weight == stage.score_weight == 0:
            raise UserError(
                f"`mse_weights` and `adv_weights` are 0 in {stage.name}: it would train nothing; change one"
            )
    return stages


def heaviest_update(stages):
    """([a stage that does not end], an update in it) that takes as much as any of `stages`: past the warm-up, with a
    discriminator that sees x_t too where one has a discriminator, and with as many jumps as a stage with a score."""
    heaviest = max(stages, key=lambda stage: stage.adv_weight)
    if scored := [stage for stage in stages if stage.score_weight]:
        most = max(scored, key=lambda stage: stage.num_segments)
        heaviest = heaviest._replace(score_weight=most.score_weight, num_segments=most.num_segments)
    return [heaviest._replace(start=0, end=sys.maxsize)], MAX_WARMUP_STEPS


def stage_at(stages, global_step):
    """The stage of the update that follows `global_step` ones; past the last edge, the last stage goes on."""
    return next((stage for stage in stages if global_step < stage.end), stages[-1])


def steps_note(num_segments, boundary_prob):
    """What a card says of numbers of steps and of eta: a student of one segment alone can take more steps."""
    if num_segments > 1:
        k = num_segments
        return f"For exactly `num_inference_steps={k}` and `eta=0`, one step per segment; never fewer, nor more."
    eta = "`eta=1`" if boundary_prob == 1 else "`eta=0.2` to `0.5`"  # with random ends it has learnt shorter jumps too
    return f"For `num_inference_steps=1`; with more steps pass {eta}, with `eta=0` they do harm."


def nodes(num_ddim_timesteps, stage_segments, num_train_timesteps=1000):
    """The N + 1 nodes of segmented trajectories: tau_0 = 0, tau_j = j T / N - 1, an int64 tensor; tau_N = T - 1.

    A trajectory in k segments has the inner edges tau_{N/k}, tau_{2N/k}, ...: the timesteps that DDIM (trailing) and
    TCDScheduler(original_inference_steps=N) visit in k steps. Raises UserError, which lists the valid N, unless N
    divides T and is a multiple of every k of `stage_segments`.
    """
    valid = [
        n
        for n in range(1, num_train_timesteps // 2 + 1)
        if num_train_timesteps % n == 0 and not any(n % k for k in stage_segments)
    ]
    listed = ",".join(str(k) for k in stage_segments)
    if not valid:
        raise UserError(
            f"`stage_segments`={listed}: no grid of {num_train_timesteps} timesteps has so many equal segments; "
            "use divisors such as 8,4,2,1"
        )
    if num_ddim_timesteps not in valid:
        raise UserError(
            f"`num_ddim_timesteps`={num_ddim_timesteps} must divide {num_train_timesteps} and be a multiple of every "
            f"number of `stage_segments`={listed}: one of {', '.join(str(n) for n in valid)}"
        )
    step = num_train_timesteps // num_ddim_timesteps
    return torch.tensor([0] + [j * step - 1 for j in range(1, num_ddim_timesteps + 1)])


def draw_segment(num_segments, num_ddim_timesteps, boundary_prob, batch_size, generator, top_prob=0.0):
    """Indices of nodes for a batch, int64 (B,) each: start n, previous i = n - 1, end m, and top of the segment.

    Hyper-SD (2404.13686), Algorithm 1, on node indices instead of timesteps: i ~ U{0..N-1}, n = i + 1, the segment of
    L = N / k nodes from b = floor(i / L) L to b + L (the top), m = b with probability `boundary_prob`, else
    m ~ U{b..i}. Always b <= m <= i < n <= b + L. (The paper's formula, on timesteps, finds no m for the k lowest
    starts of the segments.) With probability `top_prob` n = b + L, where sampling starts.
    """
    options = {"generator": generator, "device": generator.device}
    length = num_ddim_timesteps // num_segments
    previous = torch.randint(num_ddim_timesteps, (batch_size,), **options)
    bottom = previous // length * length
    if top_prob:
        previous = torch.where(torch.rand(batch_size, **options) < top_prob, bottom + length - 1, previous)
    anywhere = bottom + (torch.rand(batch_size, **options) * (previous - bottom + 1)).long()
    at_bottom = torch.rand(batch_size, **options) < boundary_prob
    return previous + 1, previous, torch.where(at_bottom, bottom, anywhere), bottom + length


def share_whole(num_segments, num_ddim_timesteps, boundary_prob, top_prob=0.0, from_top=False):
    """P(m = b) of a jump of `draw_segment`, or P(m = b and n = b + L) where `from_top`.

    p = boundary_prob, q = top_prob. From anywhere m = b has the probability p + (1 - p) (1 + 1/2 + ... + 1/L) / L,
    from the top p + (1 - p) / L.
    """
    length = num_ddim_timesteps // num_segments
    anywhere = boundary_prob + (1 - boundary_prob) * sum(1 / i for i in range(1, length + 1)) / length
    top = boundary_prob + (1 - boundary_prob) / length
    if from_top:
        return (top_prob + (1 - top_prob) / length) * top
    return top_prob * top + (1 - top_prob) * anywhere
