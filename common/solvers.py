"""The ODE solver that a network's prediction is stepped with."""

from common.schedules import append_dims


class DDIMSolver:
    """Deterministic DDIM (2010.02502, eq. 12 with eta = 0) between arbitrary timesteps, in float32.

    alpha, sigma: (T,) float32, as from `schedules.alpha_sigma`, on the device of the samples.
    """

    def __init__(self, alpha, sigma):
        self.alpha, self.sigma = alpha, sigma

    def step(self, pred_x_0, pred_eps, end_timesteps):
        """z_s = alpha_s x_0 + sigma_s eps at s = end_timesteps (B,) int64; x_0, eps and the result (B, ...) float32.

        The start enters through x_0 and eps alone: alpha x_0 + sigma eps is the start, also where x_0 is a mean over
        several evaluations of the teacher.
        """
        alpha_s = append_dims(self.alpha[end_timesteps], pred_x_0.ndim)
        sigma_s = append_dims(self.sigma[end_timesteps], pred_x_0.ndim)
        return alpha_s * pred_x_0 + sigma_s * pred_eps
