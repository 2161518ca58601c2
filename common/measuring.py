"""What direct distillation measures and shows of a student: pairs that it was not trained on, beside the teacher."""

import functools

from common import validation
from common.pipelines import decode, to_pixels
from common.probes import roll_out

import numpy as np
import torch


@torch.no_grad()
def measure(rollout, data, indices, batch_size, kept=(), share=None):
    """(mean squared error over the variance of the teacher's latents, {index: student's latents} of pairs `kept`).

    share: `validation.share` with its accelerator, where every process calls this and does a part of it.
    """

    def of_batch(batch):
        target, student = data.latents(batch).float().cpu(), roll_out(rollout, data, batch).cpu()
        error = (student - target).double().square().sum().item()
        sums = error, target.double().sum().item(), target.double().square().sum().item(), target.numel()
        return sums, {i: latents.clone() for i, latents in zip(batch, student, strict=True) if i in kept}

    batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    results = share(batches, of_batch) if share else list(map(of_batch, batches))
    error, total, squares, count = (sum(values) for values in zip(*(sums for sums, _ in results), strict=True))
    made = {i: latents for _, part in results for i, latents in part.items()}
    return error / (squares - total**2 / count), made


def pictures(rollout, data, indices, latents):
    """uint8 (N, H, W, 3) of latents, one (...) for each of these pairs, which have one size; None where latents cannot
    be decoded apart from their call (see `pipelines.decode`)."""
    images = []
    for index, one in zip(indices, latents, strict=True):
        options = rollout.kwargs | data.call_kwargs([index])
        images.append(decode(rollout.pipeline, one.unsqueeze(0), [data.prompts[index]], **options))
    return None if None in images else to_pixels(torch.cat(images))


def sample_and_measure(accelerator, student, data, measured, shown, untrained, batch_size, step):
    """Measure and show pairs `measured` and log both: ({tag: uint8 (N, H, W, 3)}, relative MSE).

    Called by every process, which share the work. shown: the pairs of the pictures. untrained: (relative MSE, {pair:
    latents}) of the student before training. Rows: teacher, student, untrained.
    """
    share = functools.partial(validation.share, accelerator)
    with accelerator.autocast(), validation.eval_mode(student):
        relative_mse, latents = measure(student, data, measured, batch_size, kept=shown, share=share)
        rows = {"teacher": None, "student": latents, "untrained": untrained[1]}

        def picture(job):
            row, i = job
            return pictures(student, data, [i], [row[i] if row else data.latents([i])[0]])

        shared = share([(row, i) for row in rows.values() for i in shown], picture)
    images = {}
    for i, name in enumerate(rows):
        batch = shared[i * len(shown) : (i + 1) * len(shown)]
        if not any(picture is None for picture in batch):
            images[f"validation/{name}"] = np.concatenate(batch)
    validation.log_images(accelerator.trackers, images, step)
    values = {"held_out/relative_mse": relative_mse, "held_out/relative_mse_untrained": untrained[0]}
    accelerator.log(values, step=step)
    accelerator.print("\n" + ", ".join(f"{name} {value:.4f}" for name, value in values.items()), flush=True)
    return images, relative_mse
