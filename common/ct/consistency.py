"""The mathematics of consistency training: noise levels, curriculum, parametrisation, loss, ECT's mapping.

Papers: Consistency Models (2303.01469), Improved Techniques (iCT, 2310.14189), Easy Consistency Tuning (ECT,
2406.14548), EDM (2206.00364). Data x in [-1, 1], noised x + sigma z. Everything is float32 or float64 on purpose: in
half precision the two noisy images of a pair cannot be told apart.
"""

import math

from common.errors import UserError
from common.schedules import append_dims

import torch

NOISE_PRECOND_TYPES = ("cm", "edm", "none")
INPUT_PRECOND_TYPES = ("cm", "none")
LOSS_WEIGHTINGS = ("inverse_step", "edm")
MOST_OF_START = math.exp(-3)  # of an average that is used; a constant decay reaches it after 3 / (1 - decay) updates


def karras_sigmas(num_sigmas, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """sigma_1 < ... < sigma_N, float64 (N,), from sigma_min to sigma_max (EDM, eq. 5, in ascending order).

    sigma_i = (smin^(1/rho) + (i - 1) / (N - 1) (smax^(1/rho) - smin^(1/rho)))^rho
    """
    low, high = _ends(sigma_min, sigma_max, rho)
    return (low + torch.linspace(0, 1, num_sigmas, dtype=torch.float64) * (high - low)) ** rho


def _ends(sigma_min, sigma_max, rho):
    try:
        return sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    except OverflowError:
        raise UserError(
            f"`rho`={rho}: `sigma_max`={sigma_max} to the power of 1 / rho is no number; raise rho"
        ) from None


def discretization_steps(step, max_train_steps, s_0=10, s_1=1280):
    """N(k), how many noise levels there are at update k = `step` of K = `max_train_steps` (iCT, section 3.4).

    N(k) = min(s_0 2^floor(k / K'), s_1) + 1,  K' = floor(K / (log2 floor(s_1 / s_0) + 1))
    UserError where K is too small for a single update per level, or s_1 < s_0.
    """
    if s_1 < s_0:
        raise UserError(f"`discretization_s_1`={s_1} is less than `discretization_s_0`={s_0}; swap them")
    doublings = math.log2(s_1 // s_0)
    length = math.floor(max_train_steps / (doublings + 1))
    if length == 0:
        raise UserError(
            f"`max_train_steps`={max_train_steps} is too short for the {math.ceil(doublings + 1)} levels from "
            f"`discretization_s_0`={s_0} to `discretization_s_1`={s_1}; train longer, or lower s_1"
        )
    return min(s_0 * 2 ** (step // length), s_1) + 1


def sigma_probabilities(sigmas, p_mean=-1.1, p_std=2.0, skip_steps=1):
    """p(i), the share of pairs (sigma_i, sigma_{i + skip_steps}): a lognormal in bins (iCT, section 3.5).

    p(i) ∝ erf((ln sigma_{i+n} - P_mean) / (sqrt(2) P_std)) - erf((ln sigma_i - P_mean) / (sqrt(2) P_std))
    sigmas: float64 (N,), ascending. Returns float64 (N - skip_steps,) with sum 1. UserError where all are 0.
    """
    cdf = torch.erf((sigmas.log() - p_mean) / (math.sqrt(2) * p_std))
    weights = cdf[skip_steps:] - cdf[: len(sigmas) - skip_steps]
    if not weights.sum() > 0:
        raise UserError(
            f"`p_mean`={p_mean}, `p_std`={p_std}: no pair of noise levels between `sigma_min` and `sigma_max` is drawn"
        )
    return (weights / weights.sum()).clamp(min=0)


def lognormal_sigmas(batch_size, p_mean, p_std, generator, sigma_min=0.002, sigma_max=80.0):
    """exp(P_mean + P_std n), clamped to [sigma_min, sigma_max]: float32 (B,) (EDM, table 1; ECT, section 3)."""
    n = torch.randn(batch_size, generator=generator, device=generator.device)
    return (p_mean + p_std * n).exp().clamp(sigma_min, sigma_max)


def ect_stage(step, num_steps, num_stages=8):
    """a = 1 + floor(step / d), the stage of ECT at update `step` of `num_steps`, from 1 to num_stages."""
    return min(1 + step * num_stages // max(num_steps, 1), num_stages)


def ect_target_sigma(t, stage, q=2.0, k=8.0, b=1.0):
    """r(t) = max(0, t (1 - g(t) / q^stage)),  g(t) = 1 + k sigmoid(-b t)  (ECT, section 3.2).

    t: noise levels (B,) > 0. Returns r, 0 <= r < t, of the same shape and dtype. r = 0 stands for the data.
    """
    return (t * (1 - (1 + k * torch.sigmoid(-b * t)) / q**stage)).clamp(min=0)


def sampling_timesteps(num_inference_steps, mid_sigma, num_sigmas, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """The `timesteps` to pass to ConsistencyModelPipeline, so that the last step starts near `mid_sigma`.

    Descending indices of CMStochasticIterativeScheduler with num_train_timesteps = N = num_sigmas, where index j is
    the noise level (smax^(1/rho) + j / (N - 1) (smin^(1/rho) - smax^(1/rho)))^rho. [0] for one step. With
    num_inference_steps alone the scheduler's second level would be 2.5 instead of iCT's 0.821. UserError where the
    grid has too few levels.
    """
    low, high = _ends(sigma_min, sigma_max, rho)
    last = round((high - mid_sigma ** (1 / rho)) / (high - low) * (num_sigmas - 1))
    indices = {round(last * i / max(num_inference_steps - 1, 1)) for i in range(num_inference_steps)}
    if len(indices) < num_inference_steps:
        raise UserError(
            f"`eval_nfe`={num_inference_steps} is more steps than there are noise levels above `mid_sigma`={mid_sigma}"
            "; take fewer, or a larger `discretization_s_1`"
        )
    return sorted(indices, reverse=True)


def scalings(sigma, sigma_min=0.002, sigma_data=0.5):
    """c_skip, c_out, c_in, shaped like `sigma`, float32 (Consistency Models, appendix C; EDM, table 1).

    c_skip = sd^2 / ((s - smin)^2 + sd^2),  c_out = (s - smin) sd / sqrt(s^2 + sd^2),  c_in = 1 / sqrt(s^2 + sd^2)
    c_skip(smin) = 1 and c_out(smin) = 0: f is the identity at sigma_min.
    """
    s = sigma.float()
    c_in = (s**2 + sigma_data**2).rsqrt()
    return sigma_data**2 / ((s - sigma_min) ** 2 + sigma_data**2), (s - sigma_min) * sigma_data * c_in, c_in


def noise_condition(sigma, noise_precond_type="cm"):
    """c_noise, what the network is told instead of sigma: cm 250 ln sigma, edm 0.25 ln sigma, none sigma.

    Rounded once, to the dtype of `sigma`: the stock scheduler computes it in float64.
    """
    if noise_precond_type == "none":
        return sigma
    return ((250.0 if noise_precond_type == "cm" else 0.25) * sigma.double().log()).to(sigma.dtype)


def consistency_function(
    network,
    x,
    sigma,
    class_labels=None,
    *,
    sigma_min=0.002,
    sigma_data=0.5,
    noise_precond_type="cm",
    input_precond_type="cm",
):
    """f(x, s) = c_skip x + c_out F(c_in x, c_noise): float32, shaped like x.

    network: a UNet2DModel or its forward, F; it may compute under autocast, nothing else here does. x: (B, C, H, W)
    float32; sigma: (B,) float32; class_labels: (B,) int64 or None.
    """
    c_skip, c_out, c_in = (append_dims(c, x.ndim) for c in scalings(sigma, sigma_min, sigma_data))
    scaled = x if input_precond_type == "none" else c_in * x
    output = network(scaled, noise_condition(sigma, noise_precond_type), class_labels=class_labels).sample
    return c_skip * x + c_out * output.float()


def pseudo_huber(a, b, c):
    """d(a, b) = sqrt(||a - b||_2^2 + c^2) - c with one norm per sample: (B, ...) -> (B,), float32 (iCT, eq. 8).

    Written as ||.||^2 / (sqrt(||.||^2 + c^2) + c), which loses no digits where the difference is small against c;
    c = 0 is the plain norm, with gradient 0 where a = b.
    """
    squared = (a.float() - b.float()).square().flatten(1).sum(1)
    return squared / ((squared + c**2).clamp(min=1e-24).sqrt() + c)


def default_huber_c(channels, resolution):
    """c = 0.00054 sqrt(d), d the number of values of an image (iCT, section 3.3)."""
    return 0.00054 * math.sqrt(channels) * resolution


def loss_weight(upper, lower, loss_weighting="inverse_step", sigma_data=0.5):
    """lambda, (B,): inverse_step 1 / (upper - lower) (iCT); edm 1 / upper^2 + 1 / sd^2 (ECT for ImageNet-64)."""
    if loss_weighting == "edm":
        return edm_weight(upper, sigma_data)
    return 1 / (upper - lower)


def edm_weight(sigma, sigma_data=0.5):
    """lambda(s) = (s^2 + sd^2) / (s sd)^2 = 1 / s^2 + 1 / sd^2 of diffusion training (EDM, table 1): (B,)."""
    return sigma**-2 + sigma_data**-2


@torch.no_grad()
def sample_heun(denoise, noise, num_steps=18, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """EDM's deterministic sampler (2206.00364, algorithm 1): 2 num_steps - 1 evaluations of denoise(x, sigma) -> x_0.

    noise: (B, C, H, W) of variance 1. denoise takes sigma as (B,). Returns the image, float32 or as `noise`.
    """
    sigmas = [*karras_sigmas(num_steps, sigma_min, sigma_max, rho).flip(0).tolist(), 0.0]
    x = noise * sigmas[0]
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        slope = (x - denoise(x, x.new_full((len(x),), sigma))) / sigma
        x_next = x + (sigma_next - sigma) * slope
        if sigma_next > 0:
            slope_next = (x_next - denoise(x_next, x.new_full((len(x),), sigma_next))) / sigma_next
            x_next = x + (sigma_next - sigma) * (slope + slope_next) / 2
        x = x_next
    return x


def ema_decay(step, max_decay, min_decay=None, inv_gamma=None, power=0.75, gamma=None):
    """The decay of the update that ends step `step` (1, 2, ...); the first one copies the weights.

    Constant: max_decay, or with `min_decay` n / (9 + n) between the two, for n = step. With `inv_gamma`, warm-up:
    1 - (1 + (n - 1) / inv_gamma)^-power between min_decay (0 unless given) and max_decay: both as diffusers' EMAModel.
    With `gamma`, the power function (1 - 1 / n)^(gamma + 1), whose memory grows with the run (2312.02696, eq. 127).
    """
    if step <= 1:
        return 0.0
    if gamma is not None:
        return (1 - 1 / step) ** (gamma + 1)
    if inv_gamma is not None:
        decay = 1 - (1 + (step - 1) / inv_gamma) ** -power
    elif min_decay is None:
        return max_decay
    else:
        decay = step / (9 + step)
    return min(max_decay, max(min_decay or 0.0, decay))


def ema_start_share(num_steps, **options):
    """How much of an EMA over `num_steps` updates is still the weights after the first one; options of `ema_decay`."""
    share = 1.0
    for step in range(2, num_steps + 1):
        share *= ema_decay(step, **options)
    return share
