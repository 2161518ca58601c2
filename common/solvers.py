"""The ODE solvers that a network's prediction is stepped with."""

from common.schedules import append_dims, to_eps, to_x_0

import torch


class DDIMSolver:
    """Deterministic DDIM (2010.02502, eq. 12 with eta = 0) between arbitrary timesteps, in float32.

    alpha, sigma: (T,) float32, as from `schedules.alpha_sigma`, on the device of the samples.
    """

    def __init__(self, alpha, sigma):
        self.alpha, self.sigma = alpha, sigma

    def step(self, pred_x_0, pred_eps, end_timesteps):
        """z_s = alpha_s x_0 + sigma_s eps at s = end_timesteps (B,) int64; x_0, eps and the result (B, ...) float32.

        The start enters through x_0 and eps, which may be of any number of evaluations of the teacher.
        """
        alpha_s = append_dims(self.alpha[end_timesteps], pred_x_0.ndim)
        sigma_s = append_dims(self.sigma[end_timesteps], pred_x_0.ndim)
        return alpha_s * pred_x_0 + sigma_s * pred_eps


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
