"""The schedulers of consistency models, and how the result is saved with them."""

from common.ct.consistency import noise_condition
from common.results.export import save_parts

import torch
from accelerate import PartialState
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline
from diffusers.configuration_utils import register_to_config


class PreconditionedConsistencyScheduler(CMStochasticIterativeScheduler):
    """CMStochasticIterativeScheduler with `noise_precond_type` and `input_precond_type` of the training.

    noise_precond_type: what the network is told, see `consistency.noise_condition`. input_precond_type: "cm" scales
    the input by c_in, "none" does not. Everything else is the stock scheduler's.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 40,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        s_noise: float = 1.0,
        rho: float = 7.0,
        clip_denoised: bool = True,
        noise_precond_type: str = "cm",
        input_precond_type: str = "cm",
    ):
        self._noise_precond_type = noise_precond_type  # the parent's constructor asks sigma_to_t for it
        super().__init__(num_train_timesteps, sigma_min, sigma_max, sigma_data, s_noise, rho, clip_denoised)
        # the parent has registered its own arguments only
        self.register_to_config(noise_precond_type=noise_precond_type, input_precond_type=input_precond_type)

    def sigma_to_t(self, sigmas):
        """float64 array of noise levels -> what the network is told."""
        return noise_condition(torch.as_tensor(sigmas, dtype=torch.float64), self._noise_precond_type).numpy()

    def scale_model_input(self, sample, timestep):
        scaled = super().scale_model_input(sample, timestep)
        return sample if self.config.input_precond_type == "none" else scaled


def make_scheduler(noise_precond_type="cm", input_precond_type="cm", **options):
    """The scheduler that samples what was trained: the stock one where it can. options: of both constructors."""
    if noise_precond_type == input_precond_type == "cm":
        return CMStochasticIterativeScheduler(**options)
    types = {"noise_precond_type": noise_precond_type, "input_precond_type": input_precond_type}
    return PreconditionedConsistencyScheduler(**options, **types)


def save_result(output_dir, unet, scheduler):
    """Save a ConsistencyModelPipeline; without model_index.json where stock diffusers cannot sample it.

    Called by every process, the main one writes.
    """
    save_parts(output_dir, unet=unet, scheduler=scheduler)
    if type(scheduler) is CMStochasticIterativeScheduler and PartialState().is_main_process:
        ConsistencyModelPipeline(unet, scheduler).save_config(output_dir)
