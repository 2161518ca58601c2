"""How the student is stepped: in training, and by diffusers, which a card's code loads a stage into."""

import itertools

from common.networks.teachers import scheduler_like
from common.results.export import teacher_code
from common.schedules import append_dims, to_eps, to_x_0
from common.solvers import DDIMSolver

import torch
from diffusers import TCDScheduler


class TrajectorySolver(DDIMSolver):
    """Exact jumps along the straight line that a network's output stands for, from time t to any time s <= t.

    alpha, sigma: as for `DDIMSolver`. prediction_type: what the network puts out, see `schedules.to_eps`.
    """

    def __init__(self, alpha, sigma, prediction_type):
        super().__init__(alpha, sigma)
        self.prediction_type = prediction_type
        self.alpha_vanishes = bool((alpha == 0).any())  # zero terminal SNR

    def jump(self, model_output, z_t, timesteps, end_timesteps):
        """J(z_t; t -> s) = r z_t + (sigma_s - r sigma_t) eps with r = alpha_s / alpha_t; float32.

        model_output, z_t and the result (B, ...); timesteps t and end_timesteps s int64 (B,). The same point as DDIM's
        alpha_s x_0 + sigma_s eps, in the form that is the identity to the bit at s = t: a consistency function needs
        no other boundary condition. Where alpha_t = 0, r does not exist and the x_0 form is used.
        """
        alpha_t, sigma_t = (append_dims(x[timesteps], z_t.ndim) for x in (self.alpha, self.sigma))
        alpha_s, sigma_s = (append_dims(x[end_timesteps], z_t.ndim) for x in (self.alpha, self.sigma))
        model_output = model_output.float()
        eps = to_eps(model_output, z_t, alpha_t, sigma_t, self.prediction_type)
        if not self.alpha_vanishes:
            r = alpha_s / alpha_t
            return r * z_t + (sigma_s - r * sigma_t) * eps
        vanishes = alpha_t == 0
        r = alpha_s / torch.where(vanishes, 1.0, alpha_t)
        x_0 = to_x_0(model_output, z_t, alpha_t, sigma_t, self.prediction_type)
        return torch.where(vanishes, alpha_s * x_0 + sigma_s * eps, r * z_t + (sigma_s - r * sigma_t) * eps)

    def roll_out(self, network, noise, timesteps, **cond):
        """What the jumps of a network make of noise (B, ...), from the first to the last of `timesteps` (k + 1,): what
        TCDScheduler makes in k steps with eta = 0. cond: keyword arguments of the network; float32, with gradients."""
        z = noise
        for start, end in itertools.pairwise(timesteps):
            start, end = start.expand(len(z)), end.expand(len(z))
            z = self.jump(network(z, start, **cond).sample, z, start, end)
        return z


def tcd_scheduler(scheduler_config, num_ddim_timesteps):
    """TCDScheduler with a teacher's betas and prediction type on the trained grid: N = num_ddim_timesteps. Its own
    default of 50 misses the nodes of N = 40. With eta = 0 its k steps are the exact jumps over k segments."""
    return scheduler_like(TCDScheduler, scheduler_config, original_inference_steps=num_ddim_timesteps)


def stage_code(name, is_sdxl, *, model, stage, **teacher_options):
    """Python that loads the teacher with the U-Net and the scheduler of one stage of the run `model` as `pipe`."""
    return f"""
{teacher_code(name, is_sdxl, ["TCDScheduler", "UNet2DConditionModel"], **teacher_options)}
unet, scheduler = "{stage}/unet", "{stage}/scheduler"
pipe.unet = UNet2DConditionModel.from_pretrained({model}, subfolder=unet, dtype=torch.float16).to("cuda")
pipe.scheduler = TCDScheduler.from_pretrained({model}, subfolder=scheduler)"""
