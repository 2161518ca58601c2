"""Whether the seeds of teacher pairs are those of their results: asked of the untrained student, by a paired test.

From the right seed a few steps lead near to what the teacher made of it. How near depends on the number of steps, on
guidance, and on what the VAE lost of an image, so no error is held against a limit. Instead the student samples each
pair from its recorded seed and from others: where seeds and results do not belong together, these are alike.
"""

from common.direct.student import roll_out
from common.errors import UserError

import numpy as np
import torch

OTHER = 1_000_003  # apart: the other seeds of a pair
STEPS = 8  # at least; what a single step makes hardly depends on the noise
FIRST, MOST = 16, 64  # pairs and comparisons that are looked at, and where these leave doubt
CERTAIN, SIGNIFICANT = 0.001, 0.01  # chances of pairs that are mixed up to pass, at the first look and the second
FEW = 8  # pairs at most, which are never refused
USUAL = 0.85  # share of the comparisons that pairs in order win at least; images of the digits: 0.93


@torch.no_grad()
def likeness(rollout, data, indices, others, batch_size, **kwargs):
    """Cosines between the teacher's latents and the student's from the recorded seed and from `others` other ones:
    float64 (N, 1 + others), of those pairs `indices` whose latents are finite.

    Cosines, since few steps without guidance end at another scale. Where all pairs have one shape, their mean is taken
    off before: what all results share tells no seed from another.
    """
    targets, results = [], []
    for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size]
        targets += data.latents(batch).double().cpu().flatten(1)
        made = [roll_out(rollout, data, batch, OTHER * i, **kwargs).double().cpu() for i in range(1 + others)]
        results += torch.stack(made, dim=1).flatten(2)  # each (1 + others, D)
    finite = [pair for pair in zip(targets, results, strict=True) if all(part.isfinite().all() for part in pair)]
    if len({target.shape for target, _ in finite}) == 1 and len(finite) > 2:
        mean = torch.stack([target for target, _ in finite]).mean(0)
        middle = torch.stack([result for _, result in finite]).mean((0, 1))
        finite = [(target - mean, result - middle) for target, result in finite]
    cosines = [torch.cosine_similarity(result, target[None], dim=1) for target, result in finite]
    return torch.stack(cosines).numpy() if cosines else np.zeros((0, 1 + others))


def chance(cosines, draws=9_999):
    """The probability that seeds which do not belong to the results look as well as these, (N, 1 + others) cosines of
    `likeness`: by exchanging the recorded seed of each pair with its others at random. At least 1 / (draws + 1)."""
    if not len(cosines):
        return 1.0
    above = cosines - cosines.mean(1, keepdims=True)
    drawn = np.random.default_rng(0).integers(cosines.shape[1], size=(draws, len(cosines)))
    exchanged = above[np.arange(len(cosines)), drawn].sum(1)
    return float(1 + (exchanged >= above[:, 0].sum()).sum()) / (draws + 1)


def check_pairing(rollout, data, scheduler, batch_size):
    """What was found of seeds and results, a sentence that begins with WARNING where there is doubt.

    rollout: the untrained student; data: pairs; scheduler: the student's, not made for its number of steps. Raises
    UserError where the recorded seeds are no better than others, and there is nothing to learn but a blur.
    """
    pipeline, fitted = rollout.pipeline, rollout.pipeline.scheduler
    most = min(STEPS, scheduler.config.get("num_train_timesteps") or STEPS)
    kwargs = dict.fromkeys({"sigmas", "timesteps"} & rollout.kwargs.keys())
    kwargs["num_inference_steps"] = max(most, rollout.kwargs["num_inference_steps"])

    def look(num_pairs, others):
        indices = np.linspace(0, len(data) - 1, min(num_pairs, len(data))).round().astype(int).tolist()
        cosines = likeness(rollout, data, indices, others, batch_size, **kwargs)
        wins = cosines[:, :1] > cosines[:, 1:]
        return len(cosines), int(wins.sum()), wins.size, chance(cosines)

    pipeline.scheduler = scheduler
    try:
        pairs, wins, comparisons, probability = look(FIRST, 1)
        if probability >= CERTAIN or wins < USUAL * comparisons:
            pairs, wins, comparisons, probability = look(MOST, max(1, MOST // len(data)))
    finally:
        pipeline.scheduler = fitted
    found = (
        "from the recorded seed the untrained student comes nearer to the teacher's result than from another in "
        f"{wins} of {comparisons} comparisons ({pairs} pairs, p = {probability:.2g})"
    )
    if probability >= SIGNIFICANT and pairs > FEW:
        raise UserError(
            f"`pairs_dir`, `dataset_metadata_path`: seeds and results do not belong together: {found}; was it another "
            "teacher, size, noise, or another order of rows? Where you are sure of the pairs, pass `skip_pairs_check`"
        )
    if probability >= SIGNIFICANT:
        return f"WARNING: {found}: too few pairs to tell whether seeds and results belong together"
    if pairs > FEW and wins < USUAL * comparisons:
        return f"WARNING: {found}: a part of the pairs may have wrong seeds; see where they come from"
    return f"seeds and results belong together: {found}"
