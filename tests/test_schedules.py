import math

from common import schedules
from common.errors import UserError
from common.losses import distance
from common.solvers import DDIMSolver

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def schedule():
    return schedules.alpha_sigma(DDIMScheduler(**BETAS).alphas_cumprod)


def network_output(x_0, eps, alpha_t, sigma_t, prediction_type):
    """What a perfect network of each type would return: the definitions themselves."""
    return {"epsilon": eps, "sample": x_0, "v_prediction": alpha_t * eps - sigma_t * x_0}[prediction_type]


@pytest.mark.parametrize("prediction_type", schedules.PREDICTION_TYPES)
def test_conversions_recover_what_the_network_stands_for(prediction_type):
    generator = torch.Generator().manual_seed(0)
    alpha, sigma = (schedules.append_dims(x, 4) for x in schedule())
    x_0, eps = torch.randn(2, 1000, 2, 3, 3, generator=generator)
    z_t = alpha * x_0 + sigma * eps
    output = network_output(x_0, eps, alpha, sigma, prediction_type)
    torch.testing.assert_close(schedules.to_x_0(output, z_t, alpha, sigma, prediction_type), x_0, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(schedules.to_eps(output, z_t, alpha, sigma, prediction_type), eps, atol=2e-4, rtol=1e-4)


def test_unknown_prediction_type_is_refused():
    one = torch.ones(1)
    for convert in (schedules.to_x_0, schedules.to_eps):
        with pytest.raises(ValueError, match="prediction_type 'flow'"):
            convert(one, one, one, one, "flow")


def test_alpha_and_sigma_are_float32_whatever_comes_in():
    alphas_cumprod = DDIMScheduler(**BETAS).alphas_cumprod
    alpha, sigma = schedules.alpha_sigma(alphas_cumprod.double())
    assert alpha.dtype == sigma.dtype == torch.float32
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000))
    # The reason: bfloat16 betas of a small timestep are off by several per cent.
    half = (1 - alphas_cumprod.bfloat16()).sqrt()[19].float()
    assert abs(half / sigma[19] - 1) > 0.02


@pytest.mark.parametrize("n", [1, 2, 20, 40, 50, 100, 250, 1000])
def test_grid_is_that_of_the_lcm_scheduler(n):
    scheduler = LCMScheduler(original_inference_steps=n)
    scheduler.set_timesteps(n)
    assert schedules.ddim_timesteps(n).tolist() == scheduler.timesteps.tolist()[::-1]
    assert schedules.ddim_timesteps(n)[-1] == 999


def test_grid_that_misses_the_last_timestep_is_refused():
    with pytest.raises(UserError, match=r"`num_ddim_timesteps`=30 must divide 1000: one of 1, 2, 4, 5, .* 1000"):
        schedules.ddim_timesteps(30)


@pytest.mark.parametrize("timestep_scaling", [10.0, 3.0])
def test_boundary_scalings_are_those_of_the_lcm_scheduler(timestep_scaling):
    scheduler = LCMScheduler(timestep_scaling=timestep_scaling)
    timesteps = torch.arange(1000)
    c_skip, c_out = schedules.boundary_scalings(timesteps, timestep_scaling)
    expected = [scheduler.get_scalings_for_boundary_condition_discrete(int(t)) for t in timesteps]
    torch.testing.assert_close(c_skip, torch.tensor([e[0] for e in expected]), rtol=1e-5, atol=0)
    torch.testing.assert_close(c_out, torch.tensor([e[1] for e in expected]), rtol=1e-5, atol=0)
    assert c_skip[0] == 1 and c_out[0] == 0


@pytest.mark.parametrize("width", [4, 32, 256])
def test_guidance_embedding_is_that_of_the_pipeline(width):
    w = torch.tensor([0.0, 0.5, 6.5, 14.0])
    expected = StableDiffusionPipeline.get_guidance_scale_embedding(None, w, embedding_dim=width)
    torch.testing.assert_close(schedules.guidance_scale_embedding(w, width), expected, atol=2e-3, rtol=0)
    exact = (1000 * w.double())[:, None] * 10000.0 ** (-torch.arange(width // 2).double() / (width // 2 - 1))
    exact = torch.cat([exact.sin(), exact.cos()], dim=1)
    torch.testing.assert_close(schedules.guidance_scale_embedding(w, width).double(), exact, atol=2e-3, rtol=0)


@pytest.mark.parametrize("prediction_type", schedules.PREDICTION_TYPES)
@pytest.mark.parametrize("steps", [50, 10])
def test_ddim_step_is_that_of_the_ddim_scheduler(prediction_type, steps):
    options = BETAS | {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": False}
    scheduler = DDIMScheduler(**options, prediction_type=prediction_type)
    scheduler.set_timesteps(steps)
    alpha, sigma = schedule()
    solver = DDIMSolver(alpha, sigma)
    generator = torch.Generator().manual_seed(steps)
    for t in scheduler.timesteps.tolist():
        z_t, output = torch.randn(2, 3, 4, 5, 5, generator=generator)
        expected = scheduler.step(output, t, z_t, eta=0.0).prev_sample
        x_0 = schedules.to_x_0(output, z_t, alpha[t], sigma[t], prediction_type)
        eps = schedules.to_eps(output, z_t, alpha[t], sigma[t], prediction_type)
        previous = torch.full((3,), max(t - 1000 // steps, 0))
        z_prev = solver.step(x_0, eps, previous)
        assert z_prev.dtype == torch.float32
        torch.testing.assert_close(z_prev, expected, atol=2e-5, rtol=1e-5)


def gaussian_consistency_loss(num_ddim_timesteps, ode_step):
    """The consistency loss of the exact consistency function on Gaussian data of variance v, in closed form.

    The marginal at t is N(0, s_t^2), s_t^2 = alpha_t^2 v + sigma_t^2; E[eps | z] = sigma_t z / s_t^2; the probability
    flow maps z_t to z_t s_u / s_t at time u, so the function with f(z, 0) = z is f(z, t) = z s_0 / s_t.
    """
    v = 0.3
    alpha, sigma = (x.double() for x in schedule())
    s = (alpha**2 * v + sigma**2).sqrt()
    start = schedules.ddim_timesteps(num_ddim_timesteps)
    end = (start - 1000 // num_ddim_timesteps).clamp(min=0)
    z = torch.randn(64, len(start), generator=torch.Generator().manual_seed(0)).double() * s[start]

    def f(z, t):
        """f through the parametrisation: a network's eps whose x_0 is what c_skip and c_out ask for."""
        c_skip, c_out = (c.double() for c in schedules.boundary_scalings(t))
        x_0 = torch.where(c_out > 0, (z * s[0] / s[t] - c_skip * z) / c_out.clamp(min=1e-30), z)
        return c_skip * z + c_out * x_0

    eps = sigma[start] * z / s[start] ** 2
    if ode_step == "exact":
        z_prev = z * s[end] / s[start]
    else:
        x_0 = schedules.to_x_0(eps, z, alpha[start], sigma[start], "epsilon")
        z_prev = alpha[end] * x_0 + sigma[end] * eps
    return distance(f(z, start), f(z_prev, end), "l2", None).item()


def test_the_exact_consistency_function_of_gaussian_data_has_no_loss():
    assert gaussian_consistency_loss(50, "exact") < 1e-6
    coarse, fine = gaussian_consistency_loss(20, "ddim"), gaussian_consistency_loss(100, "ddim")
    assert 0 < fine < coarse / 5 and math.isfinite(coarse)  # only the solver's error is left, and it shrinks
