"""Asking a score: what a pipeline predicts at one noise level, by the pipeline's own call.

A stand-in for its scheduler offers one noise level, x_tau = alpha_tau x_0 + sigma_tau eps, and keeps what it is
handed. Text, packing, guidance, signs are the pipeline's. Another one ends a student's call at a step, and keeps its
x_0.
"""

import contextlib
from typing import NamedTuple

from common.direct import pipelines
from common.direct.pipelines import denoisers
from common.errors import UserError
from common.networks import lora
from common.schedules import PREDICTION_TYPES, to_x_0

import torch

OFF = "off"  # in place of an adapter's name: the base alone


class Level(NamedTuple):
    """A noise level: x = alpha x_0 + sigma eps, and the timestep that tells a pipeline so, None of a level that the
    pipeline chose. Numbers, or tensors that are broadcast."""

    timestep: float | None
    alpha: float | torch.Tensor
    sigma: float | torch.Tensor


class Process:
    """The forward process of a scheduler, and what its network predicts: epsilon, v, x_0, or a flow eps - x_0.

    UserError for a scheduler that does not say its alpha and sigma.
    """

    def __init__(self, scheduler):
        config, name = scheduler.config, type(scheduler).__name__
        self.num_timesteps = config.get("num_train_timesteps")
        is_flow = name.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction"
        self.kind = "flow" if is_flow else config.get("prediction_type", "epsilon")
        self.alphas_cumprod = None if is_flow else getattr(scheduler, "alphas_cumprod", None)  # (T,)
        known = is_flow or self.alphas_cumprod is not None and self.kind in PREDICTION_TYPES
        if not known or not self.num_timesteps or config.get("timestep_type", "discrete") != "discrete":
            raise UserError(
                f"`score_weight`: {name} does not say the alpha and sigma of its noise levels; drop the flag, or take "
                "pairs and a student of another scheduler, such as DDIMScheduler"
            )
        if self.alphas_cumprod is not None:  # numbers from before a simulation, whose tensors have no values
            self.alphas = self.alphas_cumprod.double().sqrt().tolist()

    def at(self, time):
        """The `Level` at a time, 0 (data) to 1 (noise)."""
        if self.kind == "flow":
            return Level(time * self.num_timesteps, 1.0 - time, time)
        timestep = min(round(time * self.num_timesteps), self.num_timesteps - 1)
        return Level(timestep, self.alphas[timestep], (1.0 - self.alphas[timestep] ** 2) ** 0.5)

    def of_step(self, scheduler, index):
        """The `Level` of step `index` of the schedule that is set, in tensors: nothing waits for the device."""
        if not hasattr(scheduler, "sigmas"):
            alphas_cumprod = self.alphas_cumprod.to(scheduler.timesteps.device, torch.float32)
            alpha_2 = alphas_cumprod.index_select(0, scheduler.timesteps[index : index + 1].long())
            return Level(None, alpha_2.sqrt(), (1.0 - alpha_2).sqrt())
        sigma = scheduler.sigmas[index].float()  # of Euler's and the like: that of x_0 + sigma eps
        if self.kind == "flow":
            return Level(None, 1.0 - sigma, sigma)
        alpha = (1.0 + sigma**2).rsqrt()
        return Level(None, alpha, alpha * sigma)

    def x_0(self, prediction, noisy, level):
        """The x_0 that a prediction for x_tau (B, ...) stands for; a flow's is x_tau - sigma v."""
        if self.kind == "flow":
            return noisy - level.sigma * prediction
        return to_x_0(prediction, noisy, level.alpha, level.sigma, self.kind)

    def target(self, x_0, noise, level):
        """What a network should predict for x_tau = alpha x_0 + sigma noise; (B, ...)."""
        if self.kind == "flow":
            return noise - x_0
        return {"epsilon": noise, "v_prediction": level.alpha * noise - level.sigma * x_0, "sample": x_0}[self.kind]


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
        raise _Reached


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


class _UpTo(_Standing):
    """The scheduler itself up to a step, of which it keeps the prediction; before it there are no gradients."""

    def __init__(self, scheduler, step, grad_mode):
        super().__init__(scheduler)
        self.last, self.number, self.grad_mode = step, 0, grad_mode

    def step(self, model_output, timestep, sample, **options):
        if self.number == self.last:
            scale = getattr(self.scheduler, "scale_model_input", None)
            self.keep(model_output, scale(sample, timestep) if scale else sample)
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


def result_of_step(pipeline, process, prompts, seeds, step, **kwargs):
    """The x_0 that a step of a call, counted from 0, predicts: float32 (B, ...), with gradients through it alone."""
    grad_mode = torch.is_grad_enabled()
    stand_in = _UpTo(pipeline.scheduler, step, grad_mode)
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

    def ask(self, prompts, noisy, level, **kwargs):
        """`ask` of this score."""
        return ask(self.pipeline, prompts, noisy, level, **self.kwargs | kwargs)
