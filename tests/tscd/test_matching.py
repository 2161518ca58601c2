"""Score distillation of a stage's student: x_0 is diffusers', the gradient is the formula's, a stage begins anew."""

import contextlib
import types

from common.keyed_random import keyed_seed
from common.networks import lora
from common.schedules import alpha_sigma
from common.score.process import Process
from common.tscd import matching
from common.tscd.segments import nodes, plan_stages
from common.tscd.solver import TrajectorySolver, tcd_scheduler
from tests.networks.test_lora import SD, SDXL, make_unet

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

W = 2.0
NODES = nodes(40, [2, 1])


class Engine:
    """What is asked of accelerate's."""

    device, mixed_precision, is_main_process = torch.device("cpu"), "no", True
    gradient_accumulation_steps, num_processes, process_index = 1, 1, 0
    autocast = contextlib.nullcontext


def cond_of(config, size):
    draw = torch.Generator().manual_seed(size)
    cond = {"encoder_hidden_states": torch.randn(size, 7, 32, generator=draw)}
    if config is SDXL:
        ids = torch.randint(64, (size, 6), generator=draw)
        cond["added_cond_kwargs"] = {"text_embeds": torch.randn(size, 16, generator=draw), "time_ids": ids}
    return cond


def make(config=SD, kind="lora", prediction_type="epsilon", k=2, w_dim=None, **options):
    """(StageScore of a student in k segments, student, teacher); kind: of the fake score."""
    teacher = make_unet(config)
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    solver = TrajectorySolver(*alpha_sigma(scheduler.alphas_cumprod), prediction_type)
    torch.manual_seed(1)
    if kind == "second":
        lora.add_lora(teacher, 4, 4)
        for parameter in lora.lora_parameters(teacher):
            torch.nn.init.normal_(parameter, std=0.1)
        student = teacher
    else:
        student = UNet2DConditionModel.from_config(teacher.config, time_cond_proj_dim=w_dim)
    uncond = cond_of(config, 1)
    fake_unet = make_unet(config) if kind == "copy" else None
    of_fake = {"rank": 4, "has_lora": kind == "second", "seed": 1}
    scores = matching.make_scores(teacher, uncond, W, fake_unet, **of_fake)
    score = matching.StageScore(
        matching.Jumps(student, solver, 1, W, w_dim),
        scores,
        torch.optim.AdamW(scores.trained, lr=1e-2),
        Engine,
        process=Process(scheduler),
        **{"fake_updates": 2, "fake_warmup": 1} | options,
        names=dict.fromkeys(("weight", "regression", "guidance", "latents"), "it"),
        num_levels=2,
        times=(0.02, 0.98),
        max_grad_norm=1.0,
        share=lambda: 1.0,
        seed=1,
    )
    score.jumps.take(torch.randn(3, 4, 8, 8), cond_of(config, 3), NODES[:: 40 // k].flip(0))
    return score, student, teacher


@pytest.mark.parametrize("w_dim", [None, 16])
@pytest.mark.parametrize(
    ("config", "k", "prediction_type"), [(SD, 2, "epsilon"), (SDXL, 1, "v_prediction"), (SD, 4, "sample")]
)
@torch.no_grad()
def test_the_result_is_that_of_diffusers_sampling_in_as_many_steps(config, k, prediction_type, w_dim):
    score, student, _ = make(config, prediction_type=prediction_type, k=k, w_dim=w_dim)
    x_0, places = score.jumps.result(None, "score", 5)
    scheduler = tcd_scheduler({"prediction_type": prediction_type}, 40)
    scheduler.set_timesteps(k)
    z, cond = (
        torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(keyed_seed(1, "score noise", 5))),
        cond_of(config, 3),
    )
    if w_dim:  # as a pipeline makes it of guidance_scale = W + 1
        frequencies = 10000.0 ** (-torch.arange(w_dim // 2) / (w_dim // 2 - 1))
        angles = 1000.0 * W * frequencies
        cond["timestep_cond"] = torch.cat([angles.sin(), angles.cos()])[None].expand(3, -1)
    for t in scheduler.timesteps:
        z = scheduler.step(student(z, t, **cond).sample, t, z, eta=0.0).prev_sample
    torch.testing.assert_close(x_0, z, rtol=1e-4, atol=1e-4)  # other formulas of the same numbers
    assert list(places) == [0, 1, 2]
    again, other = score.jumps.result(None, "score", 5)[0], score.jumps.result(None, "score", 6)[0]
    assert torch.equal(x_0, again) and (x_0 - other).abs().mean() > 0.1


@pytest.mark.parametrize(
    ("config", "kind", "prediction_type"),
    [
        (SD, "lora", "epsilon"),
        (SD, "copy", "v_prediction"),
        (SD, "second", "sample"),
        (SDXL, "lora", "epsilon"),
        (SDXL, "second", "epsilon"),
    ],
)
def test_the_gradient_is_the_formula(config, kind, prediction_type):
    """(x_0^fake - x_0^real) / mean |x_0 - x_0^real| of each sample, by networks that are called here."""
    score, student, teacher = make(config, kind, prediction_type)
    with torch.no_grad():
        for parameter in score.trained:
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    x_0 = score.jumps.result(None, "score", 5)[0].detach().requires_grad_()
    score.matching.score_weight = 0.5
    score.matching.loss(x_0, range(3), 5)[0].backward()
    alpha, sigma = score.jumps.solver.alpha, score.jumps.solver.sigma
    real, fake, cond, uncond = make_unet(config), make_unet(config), cond_of(config, 3), cond_of(config, 1)
    if kind == "copy":
        fake.load_state_dict(score.matching.scores.fake.unet.state_dict())
    else:  # its adapter on a network that has no other
        lora.add_lora(fake, 4, 4)
        with torch.no_grad():
            for mine, trained in zip(lora.lora_parameters(fake), score.trained, strict=True):
                mine.copy_(trained)
    number = 0
    with torch.no_grad():
        for place, _, _, level, noisy in score.matching._levels(range(3), "score", 5, x_0.detach()):
            t, a, s = level.timestep, alpha[level.timestep], sigma[level.timestep]
            for x, i in zip(noisy.split(1), range(3)[place], strict=True):
                one, none = row(cond, i), row(uncond, 0)
                if config is SDXL:  # of the same size
                    none["added_cond_kwargs"]["time_ids"] = one["added_cond_kwargs"]["time_ids"]
                without = real(x, t, **none).sample
                guided = without + (W + 1) * (real(x, t, **one).sample - without)
                of_fake, of_real = (
                    {"epsilon": (x - s * y) / a, "v_prediction": a * x - s * y, "sample": y}[prediction_type]
                    for y in (fake(x, t, **one).sample, guided)
                )
                expected = 0.5 * (of_fake - of_real) / (x_0[i] - of_real).abs().mean()
                found = x_0.grad[i : i + 1] * x_0.numel()
                assert expected.abs().mean() > 1e-3
                assert (found - expected).norm() < 1e-4 * expected.norm()  # in other batches
                number += 1
    assert number == 3


def row(cond, i):
    return {k: row(v, i) if isinstance(v, dict) else v[i : i + 1] for k, v in cond.items()}


@pytest.mark.parametrize("kind", ["lora", "copy", "second"])
def test_a_stage_moves_all_jumps_and_begins_with_the_teacher_as_its_fake_score(kind):
    """Its first update follows the warm-up and the fake score's; the teacher stays what it is."""
    score, student, teacher = make(kind=kind, fake_updates=2, fake_warmup=3)
    (*_, stage) = plan_stages([4, 2], [10], 20, [1], [0], "l2", score_weights=[0, 0.5])
    assert (stage.start, stage.score_weight) == (10, 0.5)
    x, t, cond = torch.randn(3, 4, 8, 8), torch.tensor([5, 300, 999]), cond_of(SD, 3)

    def outputs(asked):
        with torch.no_grad(), asked.networks():
            return asked.unet(x, t, **cond).sample

    real, fake = score.matching.scores.real, score.matching.scores.fake
    before = outputs(real)
    torch.testing.assert_close(outputs(fake), before)  # the same, in other memory
    weights = lora.lora_parameters(student) if kind == "second" else list(student.parameters())
    student_before = [p.detach().clone() for p in weights]
    calls, train_fake = [], score.matching.train_fake
    score.matching.train_fake = lambda *args: calls.append(args) or train_fake(*args)
    for step, begins, updates in ((10, True, 5), (10, False, 5), (11, True, 7)):
        run = types.SimpleNamespace(global_step=step, stopper=types.SimpleNamespace(check=lambda: False))
        loss, logged = score.loss(stage, run, step, begins)
        assert len(calls) == updates and ("loss_fake" in logged) == begins
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        assert any(g is not None and g.abs().sum() > 0 for g in gradients)
    assert all(torch.equal(p, q) for p, q in zip(weights, student_before, strict=True))
    assert torch.equal(outputs(real), before) and (outputs(fake) - before).abs().max() > 1e-3
    if kind == "lora":  # where nobody asks the fake score
        assert torch.equal(teacher(x, t, **cond).sample, before)
    score.begin()
    torch.testing.assert_close(outputs(fake), before)
    assert not score.optimizer.state

    seen, jump = [], score.jumps.solver.jump
    score.jumps.solver.jump = lambda output, *rest: seen.append(output) or jump(output, *rest)
    x_0 = score.jumps.result(None, "score", 0)[0]
    both = torch.autograd.grad(x_0.sum(), seen)
    assert len(both) == 2 and all(g.abs().sum() > 0 for g in both)
