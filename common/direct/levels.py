"""Asking a score: what a pipeline predicts at one noise level, by the pipeline's own call.

A stand-in for its scheduler offers one noise level, x_tau = alpha_tau x_0 + sigma_tau eps, and keeps what it is
handed. Text, packing, guidance, signs are the pipeline's. Another one ends a student's call at a step, and keeps its
x_0.
"""

import contextlib
from typing import NamedTuple

from common.direct import pipelines
from common.direct.pipelines import denoisers
from common.networks import lora

import torch

OFF = "off"  # in place of an adapter's name: the base alone


class _Reached(BaseException):
    """Ends a pipeline's call."""


class _Standing:
    """A stand-in for a scheduler, which answers what the scheduler would but for what subclasses say."""

    def __init__(self, scheduler):
        self.scheduler, self.caught = scheduler, None

    def __getattr__(self, name):
        return getattr(self.scheduler, name)

    def keep(self, prediction, sample):
        self.caught = prediction.float(), sample.float()


class _OneLevel(_Standing):
    """Offers one noise level, as the network is given it, and keeps the prediction."""

    init_noise_sigma, order = 1.0, 1

    def __init__(self, scheduler, level, device):
        super().__init__(scheduler)
        whole = isinstance(level.timestep, int)
        self.timesteps = torch.tensor([level.timestep], dtype=torch.long if whole else torch.float32, device=device)
        self.sigmas = torch.tensor([level.sigma, 0.0], device=device)

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None, mu=None):
        self.timesteps = self.timesteps.to(device)

    def set_begin_index(self, begin_index=0):
        pass

    def scale_model_input(self, sample, *_):
        return sample

    def step(self, model_output, timestep, sample, **_):
        self.keep(model_output, sample)
        raise _Reached


class _UpTo(_Standing):
    """The scheduler itself up to a step, of which it keeps the prediction; before it there are no gradients, nor after
    it, where the call goes on."""

    def __init__(self, scheduler, step, grad_mode, goes_on):
        super().__init__(scheduler)
        self.last, self.number, self.grad_mode, self.goes_on = step, 0, grad_mode, goes_on

    def step(self, model_output, timestep, sample, **options):
        if self.number == self.last:
            scale = getattr(self.scheduler, "scale_model_input", None)
            self.keep(model_output, scale(sample, timestep) if scale else sample)
            if not self.goes_on:
                raise _Reached
            torch.set_grad_enabled(False)
        answer = self.scheduler.step(model_output, timestep, sample, **options)
        self.number += 1
        if self.number == self.last:
            torch.clear_autocast_cache()  # its copies of weights were made without gradients
            torch.set_grad_enabled(self.grad_mode)
        return answer


def _caught(pipeline, stand_in, prompts, seeds, **kwargs):
    """(prediction, sample) that a call hands to a step of the stand-in, float32 (B, ...)."""
    pipeline.scheduler = stand_in
    try:
        pipelines.call(pipeline, prompts, seeds, **kwargs)
    except _Reached:
        pass
    finally:
        pipeline.scheduler = stand_in.scheduler
    return stand_in.caught


def ask(pipeline, prompts, noisy, level, **kwargs):
    """(what a pipeline predicts for x_tau (B, ...) at one `Level`, with the guidance of `kwargs`; x_tau as it was when
    the pipeline had it): float32, (B, ...)."""
    network = next(iter(denoisers(pipeline).values()))
    stand_in = _OneLevel(pipeline.scheduler, level, noisy.device)
    options = kwargs | {"latents": noisy.to(network.dtype), "num_inference_steps": 1}
    return _caught(pipeline, stand_in, prompts, [0] * len(prompts), **options)


def result_of_step(pipeline, process, prompts, seeds, step, goes_on=False, **kwargs):
    """The x_0 that a step of a call, counted from 0, predicts: float32 (B, ...), with gradients through it alone.

    goes_on: the call does all of its steps, so that its denoiser is asked as often whatever the step is.
    """
    grad_mode = torch.is_grad_enabled()
    stand_in = _UpTo(pipeline.scheduler, step, grad_mode, goes_on)
    try:
        torch.set_grad_enabled(grad_mode and step == 0)
        prediction, noisy = _caught(pipeline, stand_in, prompts, seeds, **kwargs)
    finally:
        torch.set_grad_enabled(grad_mode)
    return process.x_0(prediction, noisy, process.of_step(pipeline.scheduler, step))


class Asked(NamedTuple):
    """A score: a pipeline's call, and which adapter of its denoisers is on (OFF: none; None: they have none)."""

    pipeline: object
    adapter: str | None
    kwargs: dict  # of the call

    @contextlib.contextmanager
    def networks(self):
        """Inside, the denoisers are this score's; a backward pass of what they compute belongs inside too."""
        with contextlib.ExitStack() as stack:
            for network in denoisers(self.pipeline).values() if self.adapter else ():
                off = self.adapter == OFF
                stack.enter_context(lora.adapters_off(network) if off else lora.adapter_on(network, self.adapter))
            yield

    def denoisers(self):
        """The modules that denoise, in their order."""
        return list(denoisers(self.pipeline).values())

    def ask(self, prompts, noisy, level, **kwargs):
        """`ask` of this score."""
        return ask(self.pipeline, prompts, noisy, level, **self.kwargs | kwargs)
