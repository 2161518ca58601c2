"""The mathematics of consistency training against diffusers' scheduler, scipy and closed forms."""

import math

from common.ct import consistency
from common.ct.scheduler import PreconditionedConsistencyScheduler, make_scheduler, save_result
from common.ema import ema_update
from common.errors import UserError
from common.schedules import append_dims

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel
from diffusers.training_utils import EMAModel


def tiny_unet(**changes):
    torch.manual_seed(0)
    config = {
        "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
    }  # fmt: skip
    return UNet2DModel(**config | changes)


# --- noise levels and curriculum


@pytest.mark.parametrize("num_sigmas", [2, 11, 1281])
@pytest.mark.parametrize(("sigma_min", "sigma_max", "rho"), [(0.002, 80.0, 7.0), (0.01, 50.0, 5.0)])
def test_sigmas_ascend_and_are_the_schedulers_reversed(num_sigmas, sigma_min, sigma_max, rho):
    sigmas = consistency.karras_sigmas(num_sigmas, sigma_min, sigma_max, rho)
    scheduler = CMStochasticIterativeScheduler(num_sigmas, sigma_min, sigma_max, rho=rho)
    assert sigmas.dtype == torch.float64 and (sigmas.diff() > 0).all()
    np.testing.assert_allclose(sigmas.numpy(), scheduler.sigmas.numpy()[::-1], rtol=1e-12)


def test_curriculum_of_the_paper():
    levels = [consistency.discretization_steps(50_000 * n, 400_000) for n in range(8)]
    assert levels == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert consistency.discretization_steps(49_999, 400_000) == 11
    assert consistency.discretization_steps(10**7, 400_000) == 1281


def test_curriculum_when_s1_is_no_power_of_two_times_s0():
    """floor(100 / 10) = 10 has log2 3.32: K' = floor(1000 / 4.32) = 231 updates at 10, 20, 40, 80, then 100."""
    edges = [consistency.discretization_steps(k, 1000, 10, 100) for k in (0, 230, 231, 462, 693, 923, 924, 999)]
    assert edges == [11, 11, 21, 41, 81, 81, 101, 101]
    assert {consistency.discretization_steps(k, 50, 10, 10) for k in range(50)} == {11}


@pytest.mark.parametrize("steps", [1, 7])
def test_a_run_too_short_for_its_curriculum_is_refused(steps):
    with pytest.raises(UserError, match=f"`max_train_steps`={steps} is too short for the 8 levels"):
        consistency.discretization_steps(0, steps)
    assert consistency.discretization_steps(0, 8) == 11


@pytest.mark.parametrize("num_sigmas", [11, 1281])
@pytest.mark.parametrize("skip", [1, 3])
@pytest.mark.parametrize(("p_mean", "p_std"), [(-1.1, 2.0), (-0.4, 1.0)])
def test_shares_of_the_pairs_are_scipys_lognormal_in_bins(num_sigmas, skip, p_mean, p_std):
    sigmas = consistency.karras_sigmas(num_sigmas)
    probabilities = consistency.sigma_probabilities(sigmas, p_mean, p_std, skip)
    lognormal = scipy.stats.lognorm(s=p_std, scale=math.exp(p_mean))
    bins = lognormal.cdf(sigmas[skip:].numpy()) - lognormal.cdf(sigmas[:-skip].numpy())
    assert probabilities.shape == (num_sigmas - skip,) and probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(probabilities.numpy(), bins / bins.sum(), atol=1e-10)


def test_drawn_sigmas_are_lognormal_and_clamped():
    generator = torch.Generator().manual_seed(0)
    draw = consistency.lognormal_sigmas(100_000, -1.1, 2.0, generator)
    assert draw.min() >= 0.002 and draw.max() <= 80.0
    inside = draw[(draw > 0.002) & (draw < 80)].double().numpy()
    lognormal = scipy.stats.lognorm(s=2.0, scale=math.exp(-1.1))
    low, high = lognormal.cdf([0.002, 80.0])
    assert scipy.stats.kstest(inside, lambda x: (lognormal.cdf(x) - low) / (high - low)).pvalue > 0.01


@pytest.mark.parametrize(
    ("mid_sigma", "num_sigmas", "expected"), [(0.821, 1281, [788, 0]), (1.526, 1281, [709, 0]), (0.821, 81, [49, 0])]
)
def test_two_step_sampling_starts_its_second_step_where_the_paper_does(mid_sigma, num_sigmas, expected):
    assert consistency.sampling_timesteps(2, mid_sigma, num_sigmas) == expected
    scheduler = CMStochasticIterativeScheduler(num_sigmas)
    scheduler.set_timesteps(timesteps=expected)
    assert scheduler.sigmas[0].item() == pytest.approx(80, rel=1e-6)
    assert scheduler.sigmas[1].item() == pytest.approx(mid_sigma, rel=1e-2 if num_sigmas == 1281 else 5e-2)
    scheduler.set_timesteps(2)
    assert scheduler.sigmas[1] > 2  # what `num_inference_steps=2` alone would do
    assert consistency.sampling_timesteps(1, mid_sigma, num_sigmas) == [0]
    assert consistency.sampling_timesteps(3, 0.821, 1281) == [788, 394, 0]


# --- ECT


@pytest.mark.parametrize(("q", "stage"), [(2.0, 1), (2.0, 3), (2.0, 8), (256.0, 1), (4.0, 4)])
def test_ect_mapping(q, stage):
    t = consistency.karras_sigmas(2000)
    r = consistency.ect_target_sigma(t, stage, q)
    assert ((r >= 0) & (r < t)).all()
    ratio = 1 - consistency.ect_target_sigma(torch.tensor([1e-12, 1e6], dtype=torch.float64), stage, q) / torch.tensor(
        [1e-12, 1e6], dtype=torch.float64
    )
    assert ratio[0].item() == pytest.approx(min(1.0, 5 / q**stage), rel=1e-6)
    assert ratio[1].item() == pytest.approx(1 / q**stage, rel=1e-6)
    g = 1 + 8 * scipy.special.expit(-t.numpy())
    np.testing.assert_allclose(r.numpy(), np.maximum(0, t.numpy() * (1 - g / q**stage)), atol=1e-12)


def test_ect_stages_are_equally_long():
    stages = [consistency.ect_stage(step, 16, 8) for step in range(16)]
    assert stages == [1 + step // 2 for step in range(16)] and consistency.ect_stage(99, 16, 8) == 8


def test_the_last_stage_of_ect_is_about_the_last_grid_of_ict():
    """q^a = 256: the ratio of neighbours on a grid of N = 1281, within a factor of 2 over all noise levels."""
    sigmas = consistency.karras_sigmas(1281)[1:]
    ict = consistency.karras_sigmas(1281)[:-1]
    ect = consistency.ect_target_sigma(sigmas, 8)
    ratio = ((sigmas - ect) / (sigmas - ict))[sigmas > 0.01]
    assert 0.4 < ratio.min() and ratio.max() < 2.5


# --- parametrisation


@pytest.mark.parametrize("sigma", [80.0, 2.5, 0.821, 0.002])
@pytest.mark.parametrize("class_conditional", [False, True])
def test_f_is_what_the_stock_scheduler_computes(sigma, class_conditional):
    unet = tiny_unet(num_class_embeds=10 if class_conditional else None).eval()
    labels = torch.tensor([3, 7]) if class_conditional else None
    x = torch.randn(2, 3, 8, 8) * max(sigma, 0.5)
    scheduler = CMStochasticIterativeScheduler(1281, clip_denoised=False)
    index = int((scheduler.sigmas - sigma).abs().argmin())
    scheduler.set_timesteps(timesteps=[index])
    t = scheduler.timesteps[0]
    with torch.no_grad():
        output = unet(scheduler.scale_model_input(x, t), t, class_labels=labels).sample
        expected = scheduler.step(output, t, x).prev_sample
        ours = consistency.consistency_function(unet, x, scheduler.sigmas[[0, 0]], labels)
    assert (ours - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max().item())
    if sigma == 0.002:
        assert (ours - x).abs().max() <= 1e-6


@pytest.mark.parametrize("noise_precond_type", consistency.NOISE_PRECOND_TYPES)
@pytest.mark.parametrize("input_precond_type", consistency.INPUT_PRECOND_TYPES)
def test_our_scheduler_samples_what_the_stock_one_cannot(noise_precond_type, input_precond_type, tmp_path):
    types = {"noise_precond_type": noise_precond_type, "input_precond_type": input_precond_type}
    scheduler = make_scheduler(**types, num_train_timesteps=41, clip_denoised=False)
    stock = noise_precond_type == input_precond_type == "cm"
    assert isinstance(scheduler, PreconditionedConsistencyScheduler) is not stock
    unet = tiny_unet().eval()
    save_result(tmp_path, unet, scheduler)
    scheduler = type(scheduler).from_pretrained(tmp_path, subfolder="scheduler")
    unet = UNet2DModel.from_pretrained(tmp_path, subfolder="unet")
    assert (tmp_path / "model_index.json").exists() is stock
    pipeline = (
        ConsistencyModelPipeline.from_pretrained(tmp_path) if stock else ConsistencyModelPipeline(unet, scheduler)
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 3, 8, 8)
    image = pipeline(batch_size=2, latents=noise, num_inference_steps=1, output_type="pt").images
    with torch.no_grad():
        f = consistency.consistency_function(unet, 80 * noise, torch.tensor([80.0, 80.0]), **types)
    torch.testing.assert_close(image, (f / 2 + 0.5).clamp(0, 1), atol=2e-5, rtol=0)


def test_the_scaled_input_has_unit_variance():
    x = 0.5 * torch.randn(100_000, dtype=torch.float64)
    for sigma in (0.002, 0.5, 80.0):
        c_in = consistency.scalings(torch.tensor(sigma))[2].double()
        assert (c_in * (x + sigma * torch.randn_like(x))).std().item() == pytest.approx(1, abs=0.02)


# --- loss


def test_pseudo_huber_has_one_norm_per_sample():
    a, b, c = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), 0.03
    expected = [
        np.sqrt(np.sum((p - q) ** 2) + c**2) - c for p, q in zip(a.double().numpy(), b.double().numpy(), strict=True)
    ]
    np.testing.assert_allclose(consistency.pseudo_huber(a, b, c).numpy(), expected, rtol=1e-6)
    per_pixel = (((a - b) ** 2 + c**2).sqrt() - c).mean()
    assert not torch.isclose(consistency.pseudo_huber(a, b, c).mean(), per_pixel, rtol=0.5)


def test_pseudo_huber_keeps_its_digits_for_small_differences():
    a = torch.zeros(1, 3, 32, 32)
    b = torch.full_like(a, 1e-7)
    c = consistency.default_huber_c(3, 32)
    assert c == pytest.approx(0.00054 * math.sqrt(3 * 32 * 32))
    squared = 3072 * 1e-14
    assert consistency.pseudo_huber(a, b, c).item() == pytest.approx(squared / (2 * c), rel=1e-3)


@pytest.mark.parametrize("c", [0.0, 0.03])
def test_pseudo_huber_has_a_gradient_where_both_sides_agree(c):
    a = torch.zeros(2, 3, 4, 4, requires_grad=True)
    consistency.pseudo_huber(a, torch.zeros(2, 3, 4, 4), c).sum().backward()
    assert torch.equal(a.grad, torch.zeros_like(a))


def test_weights():
    upper, lower = torch.tensor([80.0, 0.5]), torch.tensor([79.0, 0.25])
    assert consistency.loss_weight(upper, lower).tolist() == [1, 4]
    for s, weight in zip(upper, consistency.loss_weight(upper, lower, "edm"), strict=True):
        assert weight.item() == pytest.approx((s.item() ** 2 + 0.25) / (s.item() * 0.5) ** 2)
    sigmas = consistency.karras_sigmas(1281)
    assert 2e4 < consistency.loss_weight(sigmas[1], sigmas[0]).item() < 3e4  # why nothing clips gradients by default


# --- the exact solution for Gaussian data N(0, s^2)

S = 0.5


def exact_f(x, sigma):
    """The consistency function of N(0, s^2): x sqrt((s^2 + smin^2) / (s^2 + sigma^2))."""
    return x * torch.sqrt((S**2 + 0.002**2) / (S**2 + sigma**2))


@pytest.mark.parametrize(
    ("num_sigmas", "expected"), [(11, 0.0784), (41, 0.0212), (161, 0.0053), (641, 0.0013), (1281, 0.00067)]
)
def test_gaussian_data_pairs_of_one_noise_give_the_loss_of_the_exact_solution(num_sigmas, expected):
    sigmas = consistency.karras_sigmas(num_sigmas)
    probabilities = consistency.sigma_probabilities(sigmas)
    generator = torch.Generator().manual_seed(0)
    index = torch.multinomial(probabilities, 400_000, replacement=True, generator=generator)
    low, high = sigmas[index], sigmas[index + 1]
    x = S * torch.randn(len(index), dtype=torch.float64, generator=generator)
    z = torch.randn(len(index), dtype=torch.float64, generator=generator)
    squared = (exact_f(x + high * z, high) - exact_f(x + low * z, low)) ** 2
    loss = (consistency.loss_weight(high, low) * squared).mean().item()
    assert loss == pytest.approx(expected, rel=0.05)


def test_heun_reaches_the_exact_solution():
    noise = torch.randn(500, 1, 2, 2, dtype=torch.float64)

    def denoise(x, sigma):
        return x * append_dims(S**2 / (S**2 + sigma**2), 4)

    exact = 80 * noise * math.sqrt(S**2 / (S**2 + 80**2))
    errors = [(consistency.sample_heun(denoise, noise, n) - exact).square().mean().item() ** 0.5 for n in (18, 36, 72)]
    assert errors[0] < 0.05 and errors[0] / errors[1] > 3 and errors[1] / errors[2] > 3  # second order


# --- averages


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"max_decay": 0.99993}, {"decay": 0.99993, "min_decay": 0.99993}),
        ({"max_decay": 0.9, "min_decay": 0.2}, {"decay": 0.9, "min_decay": 0.2}),
        (
            {"max_decay": 0.95, "inv_gamma": 2.0, "power": 0.7},
            {"decay": 0.95, "use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.7},
        ),
    ],
)
def test_decays_are_diffusers(ours, theirs):
    ema = EMAModel([torch.nn.Parameter(torch.ones(1))], **theirs)
    assert [consistency.ema_decay(n, **ours) for n in range(1, 200)] == pytest.approx(
        [ema.get_decay(n) for n in range(1, 200)]
    )


@pytest.mark.parametrize("gamma", [1.0, 6.94])
def test_power_function_average_has_its_closed_form(gamma):
    """Weights proportional to t^gamma (2312.02696, eq. 121), for a weight that is its step: close to the integral."""
    ema, value = [torch.zeros(())], [torch.zeros(())]
    for step in range(1, 2001):
        value[0] = torch.tensor(float(step))
        ema_update(ema, value, consistency.ema_decay(step, max_decay=0.5, gamma=gamma))
    assert ema[0].item() == pytest.approx(2000 * (gamma + 1) / (gamma + 2), rel=2e-3)


def test_how_much_of_an_average_is_its_start():
    values, ema = torch.zeros(40), torch.zeros(())
    values[0] = 1.0
    for step, value in enumerate(values, 1):
        ema_update([ema], [value], consistency.ema_decay(step, max_decay=0.9))
    assert consistency.ema_start_share(40, max_decay=0.9) == pytest.approx(ema.item(), rel=1e-5)
    assert (
        consistency.ema_start_share(30, max_decay=0.9) < math.exp(-3) < consistency.ema_start_share(27, max_decay=0.9)
    )
