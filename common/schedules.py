"""Noise schedules, conversions between what networks predict, and the boundary scalings of consistency models.

Everything here is float32 on purpose: alphas and sigmas rounded to bfloat16 are wrong by several per cent at small t.
"""

import math

from common.errors import UserError

import torch

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def append_dims(x, ndim):
    """Right-pad the shape of `x` (B,) with ones: (B, 1, ..., 1) with `ndim` dimensions, to scale a batch."""
    return x.reshape(x.shape + (1,) * (ndim - x.ndim))


def alpha_sigma(alphas_cumprod):
    """alpha_t = sqrt(alphas_cumprod_t), sigma_t = sqrt(1 - alphas_cumprod_t); both (T,) float32.

    z_t = alpha_t x_0 + sigma_t eps  (Kingma et al. 2107.00630, eq. 1, with alpha^2 + sigma^2 = 1).
    """
    alphas_cumprod = alphas_cumprod.float()
    return alphas_cumprod.sqrt(), (1.0 - alphas_cumprod).sqrt()


def ddim_timesteps(num_ddim_timesteps, num_train_timesteps=1000):
    """The DDIM grid k-1, 2k-1, ..., T-1 with k = T // N, as an int64 tensor (N,): the grid of LCMScheduler.

    Raises UserError unless N divides T; otherwise the grid would miss T-1 and disagree with the scheduler.
    """
    if num_train_timesteps % num_ddim_timesteps:
        valid = ", ".join(str(n) for n in range(1, num_train_timesteps + 1) if num_train_timesteps % n == 0)
        raise UserError(f"`num_ddim_timesteps`={num_ddim_timesteps} must divide {num_train_timesteps}: one of {valid}")
    k = num_train_timesteps // num_ddim_timesteps
    return torch.arange(1, num_ddim_timesteps + 1) * k - 1


def boundary_scalings(timesteps, timestep_scaling=10.0, sigma_data=0.5):
    """c_skip and c_out of latent consistency models (2310.04378, Appendix B), float32, shaped like `timesteps`.

    With s = timestep_scaling * t:  c_skip = sd^2 / (s^2 + sd^2),  c_out = s / sqrt(s^2 + sd^2).
    c_skip(0) = 1 and c_out(0) = 0: the consistency function is the identity at t = 0.
    """
    s = timesteps.float() * timestep_scaling
    return sigma_data**2 / (s**2 + sigma_data**2), s / (s**2 + sigma_data**2).sqrt()


def to_x_0(model_output, z_t, alpha_t, sigma_t, prediction_type):
    """The x_0 that a network's output stands for. Shapes (B, ...), alpha_t and sigma_t broadcast; float32.

    epsilon: (z_t - sigma_t eps) / alpha_t;  v (2202.00512, v = alpha eps - sigma x_0): alpha_t z_t - sigma_t v.
    """
    if prediction_type == "epsilon":
        return (z_t - sigma_t * model_output) / alpha_t
    if prediction_type == "v_prediction":
        return alpha_t * z_t - sigma_t * model_output
    if prediction_type == "sample":
        return model_output
    raise ValueError(f"prediction_type {prediction_type!r} is none of {PREDICTION_TYPES}")


def to_eps(model_output, z_t, alpha_t, sigma_t, prediction_type):
    """The noise that a network's output stands for. Shapes and dtypes as in `to_x_0`.

    epsilon: eps;  v: alpha_t v + sigma_t z_t;  sample: (z_t - alpha_t x_0) / sigma_t.
    """
    if prediction_type == "epsilon":
        return model_output
    if prediction_type == "v_prediction":
        return alpha_t * model_output + sigma_t * z_t
    if prediction_type == "sample":
        return (z_t - alpha_t * model_output) / sigma_t
    raise ValueError(f"prediction_type {prediction_type!r} is none of {PREDICTION_TYPES}")


def guidance_scale_embedding(w, embedding_dim):
    """Sine and cosine features of 1000 w: (B,) -> (B, embedding_dim), float32.

    Frequencies fall geometrically from 1 to 1/10000 (as for timesteps); diffusers pipelines feed the same features
    of `guidance_scale - 1` to `timestep_cond`.
    """
    half = embedding_dim // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=w.device) * (-math.log(10000.0) / (half - 1))
    )
    angles = 1000.0 * w.float()[:, None] * frequencies[None, :]
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, embedding_dim % 2))
