"""What direct distillation shows and measures of a student: pairs that it was not trained on, beside the teacher."""

import contextlib
import functools

from common.direct.pipelines import decode, to_pixels
from common.direct.student import measure
from common.ema import part
from common.errors import UserError
from common.results import samples
from common.run import validation

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from tqdm import tqdm

SHIFT = 2**32  # from the seeds of pairs to those of evaluations: no noise that the student was trained on


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
    share = functools.partial(samples.share, accelerator)
    with accelerator.autocast(), samples.eval_mode(student):
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
    samples.log_images(accelerator.trackers, images, step)
    values = {"held_out/relative_mse": relative_mse, "held_out/relative_mse_untrained": untrained[0]}
    accelerator.log(values, step=step)
    if accelerator.is_main_process:
        tqdm.write(f"held-out pairs: relative squared error {relative_mse:.4f}, {untrained[0]:.4f} before training")
    return images, relative_mse


class PairValidation:
    """Samples of a run of direct distillation: held-out pairs beside the teacher's, and evaluations of the student.

    After `run.register`. student: a `Rollout`. network: from `validation.load_feature_network`. measured, shown,
    untrained: of `sample_and_measure`. averaged: makes the context in which the student has the weights that are
    saved.
    """

    def __init__(self, run, student, data, *, network, measured, shown, untrained, averaged):
        self.run, self.student, self.data, self.averaged = run, student, data, averaged
        options = {"measured": measured, "shown": shown, "untrained": untrained}
        options["batch_size"] = run.args.train_batch_size
        self.grid = functools.partial(sample_and_measure, run.accelerator, student, data, **options)
        self.labels = [data.prompts[i] for i in shown]
        if run.args.eval_steps:
            self.judge = validation.Judge(run, self._open(network, measured))

    def show(self):
        """A picture of held-out pairs, and their error."""
        with samples.going_on(self.run.accelerator, self.run.global_step), self.averaged():
            images, _ = self.grid(step=self.run.global_step)
            self.run.show(images, labels=self.labels)

    def evaluate(self):
        """Measure the student."""
        with self.averaged():
            self.judge(self._sample, ["student"], [self.run.args.num_inference_steps])

    @torch.no_grad()
    def _sample(self, name, num_inference_steps, start, stop):
        """Images of the pairs' prompts from other noise than theirs: uint8 (stop - start, 3, H, W)."""
        data, indices = self.data, self.indices[start:stop]
        prompts, seeds = [data.prompts[i] for i in indices], [(data.seeds[i] + SHIFT) % 2**64 for i in indices]
        with self.run.accelerator.autocast(), samples.eval_mode(self.student):
            images = self.student(prompts, seeds, output_type="pt", **data.call_kwargs(indices))
        return torch.from_numpy(to_pixels(images)).permute(0, 3, 1, 2).contiguous()

    @torch.no_grad()
    def _recorded(self, start, stop):
        """The teacher's own images of the pairs."""
        indices = self.indices[start:stop]
        with self.run.accelerator.autocast(), samples.eval_mode(self.student):
            images = pictures(self.student, self.data, indices, self.data.latents(indices))
        if images is None:
            raise UserError(
                "`eval_steps`: this pipeline changes latents after its last step, so that the teacher's of the pairs "
                "cannot be shown as images; drop it"
            )
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def _open(self, network, measured):
        """The `evaluation.Evaluation` against held-out images, or else the teacher's of the pairs, of one size."""
        run, data, args = self.run, self.data, self.run.args
        order, size = dict.fromkeys([*measured, *range(len(data))]), data.call_kwargs(measured[:1])
        self.indices = [i for i in order if data.call_kwargs([i]) == size][: args.eval_num_images]
        if len(self.indices) < 2:
            raise UserError("`eval_steps`: a distance needs two pairs of one size at least; drop it")
        settings = {"network": args.feature_network, "prompts": [data.prompts[i] for i in self.indices]}
        settings["seeds"] = [data.seeds[i] for i in self.indices]
        number, batch_size = len(self.indices), args.train_batch_size
        features, saturations = validation.teacher_features(run, network, self._recorded, number, batch_size, settings)
        images, teacher_steps = None, data.config["kwargs"].get("num_inference_steps")
        if args.eval_reference:
            height, width = self._recorded(0, 1).shape[2:]
            images = validation.held_out_features(args, network, height, width)
        return validation.against_teacher(
            run, network, features, saturations, settings["prompts"], batch_size, settings, teacher_steps, images
        )


@contextlib.contextmanager
def exchanged(parameters, others):
    """Inside, `parameters` hold the values of `others`, equally many tensors, and the other way round. No copy, but
    of one tensor that is split over processes: what gathers it reads the memory that it had."""

    @torch.no_grad()
    def exchange():
        for a, b in pairs:
            if isinstance(a, DTensor):
                a, b = part(a), part(b)
                values = a.clone()
                a.copy_(b)
                b.copy_(values)
            else:
                a.data, b.data = b.data, a.data

    pairs = list(zip(parameters, others, strict=True))
    exchange()
    try:
        yield
    finally:
        exchange()
