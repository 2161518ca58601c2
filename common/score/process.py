"""The forward process x_tau = alpha_tau x_0 + sigma_tau eps that scores are asked about, and what networks predict."""

from typing import NamedTuple

from common.errors import UserError
from common.schedules import PREDICTION_TYPES, to_x_0

import torch


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
