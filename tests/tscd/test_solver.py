"""Jumps over segments, against diffusers' schedulers and exact solutions."""

from common.schedules import alpha_sigma, append_dims
from common.tscd.segments import draw_segment, nodes
from common.tscd.solver import TrajectorySolver

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, TCDScheduler

SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NODES = nodes(40, [8, 4, 2, 1])


def schedule(**options):
    scheduler = DDPMScheduler(**SCALED | options)
    return alpha_sigma(scheduler.alphas_cumprod)


def batch(size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 4, 2, 2, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_jump_to_the_same_time_is_the_identity_bit_for_bit(prediction_type, rescale):
    if prediction_type == "epsilon" and rescale:
        return  # such a teacher is refused
    alpha, sigma = schedule(rescale_betas_zero_snr=rescale)
    solver = TrajectorySolver(alpha, sigma, prediction_type)
    t = NODES[1:]
    x, output = batch(len(t))
    # sample prediction has no eps at sigma = 0, which no node has
    assert torch.equal(solver.jump(1000 * output, x, t, t), x)


@pytest.mark.parametrize("k", [8, 4, 2, 1])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("rescale", [False, True])
def test_a_jump_over_a_segment_is_a_step_of_ddim_and_of_tcd(k, prediction_type, rescale):
    if prediction_type == "epsilon" and rescale:
        return
    options = SCALED | {"prediction_type": prediction_type, "clip_sample": False, "rescale_betas_zero_snr": rescale}
    ddim = DDIMScheduler(**options, timestep_spacing="trailing", set_alpha_to_one=False)
    tcd = TCDScheduler(**options, original_inference_steps=40)
    solver = TrajectorySolver(*alpha_sigma(ddim.alphas_cumprod), prediction_type)
    ddim.set_timesteps(k)
    tcd.set_timesteps(k)
    edges = NODES[:: 40 // k]
    assert tcd.timesteps.tolist() == ddim.timesteps.tolist() == edges[1:].flip(0).tolist()
    for t, s in zip(edges[1:].flip(0), edges[:-1].flip(0), strict=True):
        x, output = batch(1, seed=int(t))
        jumped = solver.jump(output, x, t[None], s[None])
        torch.testing.assert_close(jumped, ddim.step(output, t, x).prev_sample, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(jumped, tcd.step(output, t, x, eta=0.0).prev_sample, rtol=2e-5, atol=2e-5)


def test_tcds_default_grid_misses_the_nodes():
    """The defect: TCDScheduler's own original_inference_steps=50 visits times that no network was trained on."""
    tcd = TCDScheduler(**SCALED)
    tcd.set_timesteps(8)
    assert not set(tcd.timesteps.tolist()) <= set(NODES.tolist())


def test_gradients_are_finite_at_zero_terminal_snr():
    alpha, sigma = schedule(rescale_betas_zero_snr=True)
    assert alpha[999] == 0
    solver = TrajectorySolver(alpha, sigma, "v_prediction")
    x, output = batch()
    output.requires_grad_()
    t, s = NODES[torch.tensor([40, 40, 35, 8, 3, 1])], NODES[torch.tensor([20, 0, 30, 5, 1, 0])]
    solver.jump(output, x, t, s).square().sum().backward()
    assert output.grad.isfinite().all() and (output.grad.flatten(1).norm(dim=1) > 0).all()


def test_gaussian_data_have_an_exact_solution_for_ends_of_segments():
    """N(0, d^2) data: the ODE takes x_t to x_t sqrt(V_s / V_t), V = alpha^2 d^2 + sigma^2.

    The consistency function of jumps to b exists (its eps is a function of x and t alone) and has no loss with the
    exact solver; with DDIM's step and the exact score, the loss that is left shrinks as the grid gets finer.
    """
    alpha, sigma = (x.double() for x in schedule())
    d = 0.5
    v = alpha**2 * d**2 + sigma**2
    solver = TrajectorySolver(alpha, sigma, "epsilon")

    def exact_jump_output(x, t, s):  # the eps with which J(x; t -> s) is the exact flow
        r = alpha[s] / alpha[t]
        return append_dims(((v[s] / v[t]).sqrt() - r) / (sigma[s] - r * sigma[t]), 2) * x

    errors = []
    for num_nodes in (40, 200):
        grid = nodes(num_nodes, [1])
        generator = torch.Generator().manual_seed(0)
        n, i, m, _ = (grid[index] for index in draw_segment(1, num_nodes, 1.0, 512, generator))
        x_t = append_dims(v[n].sqrt(), 2) * torch.randn(512, 3, generator=generator).double()
        score_eps = append_dims(sigma[n] / v[n], 2) * x_t
        x_prev = solver.jump(score_eps.float().double(), x_t, n, i)
        inner = i > m  # at i = m the target is the identity
        target = torch.where(
            append_dims(inner, 2), solver.jump(exact_jump_output(x_prev, i, m.clamp(max=998)), x_prev, i, m), x_prev
        )
        errors.append((solver.jump(exact_jump_output(x_t, n, m), x_t, n, m) - target).square().mean().item())
    assert errors[1] < errors[0] / 5 and errors[0] < 1e-3
