"""Score distillation: the gradient is the formula's on every pipeline, and what follows from the formula."""

import contextlib
import types

from common.direct import levels, pipelines, score, sources
from common.direct.student import teachers_calls
from common.errors import UserError
from common.keyed_random import keyed_seed
from common.networks import lora, performance
from common.score import adversary
from common.score.matching import ScoreMatching
from common.score.process import Level, Process
from tests import tiny_pipelines as tiny
from tests.direct.test_pipelines import PROMPTS, Pairs, every_pipeline, student

import diffusers
import pytest
import torch
from PIL import Image


class Engine:
    """What `ScoreMatching` asks of accelerate's."""

    device, mixed_precision = torch.device("cpu"), "no"
    gradient_accumulation_steps, num_processes, process_index = 1, 1, 0
    autocast = contextlib.nullcontext


OPTIONS = {
    "names": dict.fromkeys(("weight", "regression", "guidance", "latents"), ""),
    "times": (0.02, 0.98),
    "num_levels": 4,
    "max_grad_norm": 1.0,
    "share": lambda: 1.0,
    "seed": 1,
}


def make(name, steps=2, rank=2, is_lora=False, guided=True, adv_weight=0.0):
    """(ScoreMatching, rollout) of a tiny pipeline; guided: whether the teacher is asked as the pairs' was."""
    pipeline, kwargs, _ = student(name, steps)
    if is_lora:
        pipelines.add_lora(pipeline, 2, 2)
    scores = score.make_scores(
        pipeline,
        rank,
        is_lora=is_lora,
        load_denoisers=lambda dtype: pipelines.denoisers(tiny.make(name)),
        student_kwargs=kwargs,
        teacher_kwargs=score.teacher_kwargs(tiny.KWARGS[name] if guided else kwargs, {}),
    )
    rollout = pipelines.Rollout(pipeline, **kwargs)
    if not is_lora:
        rollout.requires_grad_(True)
    prompts = score.Prompts(Pairs(), 2)
    if adv_weight:
        latents = pipelines.call(pipeline, PROMPTS[:1], [3], **kwargs)
        scores = scores.with_adversary(prompts, Process(pipeline.scheduler), latents.shape)
    process = Process(pipeline.scheduler)
    results = score.Results(rollout, process, prompts, batch_size=2, num_steps=steps, through="step", seed=1)
    return rollout, matching(results, process, scores, adv_weight=adv_weight)


def matching(results, process, scores, **options):
    optimizer = torch.optim.AdamW(scores.trained, lr=1e-2) if scores.trained else None
    return ScoreMatching(results, process, scores, optimizer, Engine, **OPTIONS | options)


@pytest.fixture
def seen(monkeypatch):
    """[(prediction, timestep, sample)] of the steps of every scheduler, as pipelines hand them over."""
    steps = []
    for kind in {type(tiny.make(name).scheduler) for name in ("SDXL", "SD3", "PixArt", "Wan")} | {
        diffusers.DDIMScheduler
    }:

        def noted(self, out, t, sample, *args, step=kind.step, **kwargs):
            scale = getattr(self, "scale_model_input", lambda sample, t: sample)
            steps.append((out.detach(), t, scale(sample, t).detach()))
            return step(self, out, t, sample, *args, **kwargs)

        monkeypatch.setattr(kind, "step", noted)
    return steps


@every_pipeline
@torch.no_grad()
def test_a_network_is_asked_as_its_own_sampling_asks_it(name, seen):
    """At the states, times and guidance of a call with the pipeline's own scheduler: the same predictions."""
    rollout, made = make(name)
    pipeline, kwargs = rollout.pipeline, made.scores.real.kwargs
    seen.clear()
    pipelines.call(pipeline, PROMPTS, [3, 4], **kwargs, num_inference_steps=2)
    assert len(seen) == 2
    for prediction, timestep, noisy in list(seen):
        level = Level(float(timestep) if made.process.kind == "flow" else int(timestep), 0.0, 0.0)
        asked, given = levels.ask(pipeline, PROMPTS, noisy.float(), level, **kwargs)
        torch.testing.assert_close(asked, prediction.float(), rtol=1e-5, atol=1e-5)


def spread(score_of):
    """Make adapters that are zero, as they begin, something."""
    torch.manual_seed(2)
    for parameter in score_of.scores.trained:
        torch.nn.init.normal_(parameter, std=0.2)


ON_ONE_BASE = ("SD1.5", "Flux", "Wan2.2")


@pytest.mark.parametrize(("name", "is_lora"), [(n, False) for n in tiny.PIPELINES] + [(n, True) for n in ON_ONE_BASE])
def test_the_gradient_is_the_formula(name, is_lora):
    """(x_0^fake - x_0^real) / mean |x_0 - x_0^real| of each sample, from predictions that are asked for here."""
    rollout, made = make(name, is_lora=is_lora)
    spread(made)
    x_0, indices = made.results.result(rollout, "score", 5)
    assert x_0.requires_grad
    x_0 = x_0.detach().requires_grad_()
    made.loss(x_0, indices, 5)[0].backward()

    def x_0_of(network_kwargs, noisy, level):
        v = levels.ask(pipeline, [PROMPTS[indices[i]]], noisy, level, **network_kwargs)[0]
        if made.process.kind == "flow":
            return noisy - level.sigma * v
        if made.process.kind == "epsilon":
            return (noisy - level.sigma * v) / level.alpha
        return level.alpha * noisy - level.sigma * v

    with torch.no_grad():
        for i, (_, _, _, level, noisy) in enumerate(made._levels(indices, "score", 5, x_0.detach())):
            answers = []
            for asked in (made.scores.real, made.scores.fake):
                pipeline = asked.pipeline
                with asked.networks():
                    answers.append(x_0_of(asked.kwargs, noisy, level))
            real, fake = answers
            expected = (fake - real) / (x_0[i : i + 1] - real).abs().mean()
            found = x_0.grad[i : i + 1] * x_0.numel()
            assert expected.abs().mean() > 1e-3
            assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("name", ["SD1.5", "Qwen-Image", "Z-Image"])
def test_a_perfect_fake_score_of_a_student_that_is_the_teacher_asks_for_nothing(name):
    rollout, made = make(name, guided=False)
    x_0, indices = made.results.result(rollout, "score", 0)
    made.loss(x_0, indices, 0)[0].backward()
    assert all((p.grad == 0).all() for p in rollout.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["SDXL", "SD3", "PixArt", "Wan", "HunyuanDiT"])
@torch.no_grad()
def test_the_last_step_predicts_the_result(name):
    """Where the schedule ends at the data, which DDIM's of these tiny ones does not."""
    rollout, made = make(name)
    seeds = [3, 4]
    last = levels.result_of_step(rollout.pipeline, made.process, PROMPTS, seeds, 1, **rollout.kwargs)
    whole = rollout(PROMPTS, seeds)
    assert (last - whole).norm() < 0.02 * whole.norm()


@pytest.mark.parametrize("rank", [0, 2])
def test_only_one_step_has_gradients_and_only_the_fake_score_is_trained_by_its_loss(rank):
    rollout, made = make("SD3", rank=rank)
    before = [p.detach().clone() for p in rollout.parameters()]
    first = levels.result_of_step(rollout.pipeline, made.process, PROMPTS, [3, 4], 0, **rollout.kwargs)
    weights = [p for p in rollout.parameters()]
    alone = torch.autograd.grad(first.square().sum(), weights, allow_unused=True)
    assert any(g is not None and g.abs().sum() > 0 for g in alone)
    trained = [p.detach().clone() for p in made.scores.trained]
    losses = [made.train_fake(0, 0, 1).item() for _ in range(6)]
    assert losses == sorted(losses, reverse=True)
    assert any((p != q).any() for p, q in zip(made.scores.trained, trained, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(rollout.parameters(), before, strict=True))
    assert all(p.grad is None and not p.requires_grad for p in made.scores.trained)
    assert all(p.grad is None for p in rollout.parameters())


@pytest.mark.parametrize("step", [0, 1])
def test_a_call_that_goes_on_asks_as_often_whatever_the_step_and_gives_the_same(step):
    """As processes that split weights need it, each of which may draw another step."""
    rollout, made = make("SD3")
    count, given = [], (rollout.pipeline, made.process, PROMPTS, [3, 4], step)
    rollout.pipeline.transformer.register_forward_pre_hook(lambda *_: count.append(torch.is_grad_enabled()))
    weights, found = list(rollout.parameters()), []
    for goes_on in (False, True):
        count.clear()
        x_0 = levels.result_of_step(*given, goes_on=goes_on, **rollout.kwargs)
        assert count == [number == step for number in range(2 if goes_on else step + 1)]
        assert torch.is_grad_enabled()
        found.append([x_0, *torch.autograd.grad(x_0.square().sum(), weights, allow_unused=True)])
    assert all(a is None and b is None or torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("name", "is_lora"), [(n, False) for n in tiny.PIPELINES] + [(n, True) for n in ON_ONE_BASE])
def test_the_adversarys_gradient_is_that_of_the_formula(name, is_lora):
    """Of softplus(-D(alpha x_0 + sigma eps)), by differences of a loss that is asked for here, along its gradient."""
    rollout, made = make(name, is_lora=is_lora, adv_weight=0.5)
    spread(made)
    x_0, indices = made.results.result(rollout, "score", 5)
    x_0 = x_0.detach().requires_grad_()
    made.score_weight = 0.0
    loss, logged = made.loss(x_0, indices, 5)
    loss.backward()

    @torch.no_grad()
    def loss_at(x_0):
        total = 0.0
        for _, about, _, level, noisy in made._levels(indices, "score", 5, x_0):
            with made.scores.fake.networks(), adversary.noting(made.scores.fake) as found:
                made.scores.fake.ask(noisy=noisy, level=level, **about)
            features = adversary.features(found[-1], len(noisy))
            total += torch.log1p(torch.exp(-made.scores.head(features).double())).sum().item()
        return total / len(x_0)

    assert logged["loss_adv"].item() == pytest.approx(loss_at(x_0), rel=1e-5)
    assert loss.item() == pytest.approx(0.5 * loss_at(x_0), rel=1e-5)
    size = x_0.grad.norm()
    assert size > 1e-6
    step = (1e-2 / size) * x_0.grad
    difference = 0.5 * (loss_at(x_0 + step) - loss_at(x_0 - step)) / 2e-2
    assert difference == pytest.approx(size.item(), rel=2e-2)  # float32, and a curve


@pytest.mark.parametrize(("name", "rank"), [("SD1.5", 0), ("Flux", 2)])
def test_the_adversary_learns_to_tell_results_from_pairs(name, rank):
    """Of two samples each; a head that sees nothing stays at 2 ln 2 = 1.386."""
    _, made = make(name, rank=rank, adv_weight=0.5)
    latents = torch.randn(made.results.result(None, "fake", 0)[0].shape, generator=torch.Generator().manual_seed(5))
    made.results.data.data.latents = lambda indices: latents[indices]
    losses = []
    for update in range(40):
        made.train_fake(update, 0, 1)
        made.noted += [torch.tensor([1.0, 0.5, 0.6])]
        losses.append(made.watch(1.0)[0]["loss_discriminator"])
    assert losses[0] > 1.2 and sum(losses[-10:]) / 10 < 1.0


def test_a_denoiser_without_a_middle_is_refused(monkeypatch):
    assert adversary.middle(torch.nn.Sequential(torch.nn.Linear(2, 2))) is None
    monkeypatch.setattr(adversary, "middle", lambda network: None)
    with pytest.raises(UserError, match="`adv_weight`: the denoiser of a StableDiffusionPipeline has no middle"):
        make("SD1.5", adv_weight=0.5)


KL = {"block_out_channels": (4,) * 4, "norm_num_groups": 2, "latent_channels": 4}
KL |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
VIDEO = {"base_dim": 4, "z_dim": 4, "num_res_blocks": 1, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
TINY = {f"{x}_block_out_channels": (4,) * 4 for x in ("encoder", "decoder")}
TINY |= {f"num_{x}_blocks": (1,) * 4 for x in ("encoder", "decoder")}


@pytest.mark.parametrize(
    ("name", "vae", "config", "sentence"),
    [
        ("Flux", diffusers.AutoencoderKL, KL, None),
        ("SD1.5", diffusers.AutoencoderTiny, TINY, None),
        ("Qwen-Image", diffusers.AutoencoderKLQwenImage, VIDEO, None),
        (
            "Wan",
            diffusers.AutoencoderKLWan,
            VIDEO,
            r"become latents of \[4, 1, 8, 8\], and .* \[4, 2, 8, 8",
        ),
        ("LTX", diffusers.AutoencoderKLWan, VIDEO, "LTXPipeline cannot be given images instead of latents"),
    ],
)
def test_images_stand_beside_results_or_are_refused(tmp_path, name, vae, config, sentence):
    """Packed latents and frames: one sentence, which names the way out."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "table.jsonl").write_text('{"image": "a.png", "prompt": "a"}')
    pipeline, kwargs, _ = student(name, 2)
    pipeline.register_modules(vae=vae(**config))
    images = sources.RealImages(tmp_path / "table.jsonl")
    images.pipeline = pipeline
    latents = pipelines.call(pipeline, PROMPTS[:1], [3], **kwargs)
    results = types.SimpleNamespace(latents=lambda indices: latents)
    if sentence is None:
        return sources.check_like(images, results)
    with pytest.raises(UserError, match=f"`adv_images`=.*{sentence}.*drop it: then the pairs are the real ones"):
        sources.check_like(images, results)


def test_half_precisions_scale_leaves_the_adversarys_gradient_what_it_is():
    found = []
    for enabled in (False, True):
        rollout, made = make("SD3", adv_weight=0.5)
        spread(made)
        made.scaler = torch.amp.GradScaler("cpu", enabled=enabled)
        x_0, indices = made.results.result(rollout, "score", 5)
        x_0 = x_0.detach().requires_grad_()
        made.loss(x_0, indices, 5)[0].backward()
        found.append(x_0.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)  # a scale is a power of two


@pytest.mark.parametrize(("recomputed", "compiled"), [("full", False), ("none", True)])
def test_the_adversary_sees_the_same_of_blocks_that_are_recomputed_or_compiled(recomputed, compiled, monkeypatch):
    """By a compiler that runs what it has traced, without making kernels of it."""
    monkeypatch.setitem(performance.COMPILE_OPTIONS, "backend", "eager")
    found = []
    for changed in (False, True):
        _, made = make("Flux", adv_weight=0.5)
        spread(made)
        made.results.data.data.latents = lambda indices: 0.5 * torch.ones(len(indices), 16, 16)
        for network in pipelines.denoisers(made.scores.fake.pipeline).values() if changed else ():
            performance.recompute(network, recomputed)
            if compiled:
                performance.compile_blocks(network)
        made.scores.trained.requires_grad_(True)
        with torch.no_grad():
            x_0, indices = made.results.result(None, "fake", 0)
        made.fake_loss(x_0, indices, 0)
        found.append(torch.cat([p.grad.flatten() for p in made.scores.trained if p.grad is not None]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)  # the same sums
    assert len(found[0]) == sum(p.numel() for p in made.scores.trained)


def test_what_is_recomputed_is_computed_with_the_same_adapter():
    found = []
    for recomputed in ("none", "full"):
        rollout, made = make("SD3", is_lora=True)
        spread(made)
        for network in rollout.denoisers.values():
            performance.recompute(network, recomputed)
            for parameter in lora.lora_parameters(network):
                torch.nn.init.normal_(parameter, std=0.2)
        made.scores.trained.requires_grad_(True)
        with torch.no_grad():
            x_0, indices = made.results.result(rollout, "fake", 0)
        made.fake_loss(x_0, indices, 0)
        assert all(p.grad is None for network in rollout.denoisers.values() for p in lora.lora_parameters(network))
        found.append(torch.cat([p.grad.flatten() for p in made.scores.trained if p.grad is not None]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)  # the same sums
    assert found[0].norm() > 1e-3


# --- what it does: two modes, from a student that knows one


class Mixture:
    """The perfect score of normal distributions of deviation 0.1 around -1 and 1."""

    networks = contextlib.nullcontext

    def ask(self, noisy, level):
        modes, variance = torch.tensor([-1.0, 1.0]), (0.1 * level.alpha) ** 2 + level.sigma**2
        shares = torch.softmax(-((noisy - level.alpha * modes) ** 2) / (2 * variance), dim=1)
        x_0 = modes + 0.1**2 * level.alpha / variance * (noisy - level.alpha * modes)  # (B, 2), of each mode
        return (noisy - level.alpha * (shares * x_0).sum(1, keepdim=True)) / level.sigma, noisy


class Itself:
    """The perfect score of a student's results, of a thousand of them."""

    networks = contextlib.nullcontext

    def __init__(self, draw):
        self.draw = draw

    def ask(self, noisy, level):
        with torch.no_grad():
            results = self.draw(1000).T
        shares = torch.softmax(-((noisy - level.alpha * results) ** 2) / (2 * level.sigma**2), dim=1)
        return (noisy - level.alpha * (shares * results).sum(1, keepdim=True)) / level.sigma, noisy


def test_a_student_of_one_mode_learns_both():
    torch.manual_seed(0)
    layers = torch.nn.Linear(2, 32), torch.nn.SiLU(), torch.nn.Linear(32, 32), torch.nn.SiLU(), torch.nn.Linear(32, 1)
    network = torch.nn.Sequential(*layers)

    def draw(number):
        noise = torch.randn(number, 1)
        return 0.8 + 0.5 * network(torch.cat([noise, torch.tanh(8 * noise)], dim=1))

    made = matching(
        types.SimpleNamespace(about=lambda indices: {}),
        Process(diffusers.DDIMScheduler()),
        score.Scores(Mixture(), Itself(draw), None),
        num_levels=8,
        times=(0.02, 0.4),
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)
    with torch.no_grad():
        assert (draw(1000) > 0.6).all()  # all of one mode
    for update in range(150):
        made.loss(draw(256), range(256), update)[0].backward()
        optimizer.step(), optimizer.zero_grad(), lr_scheduler.step()
    with torch.no_grad():
        results = draw(2000)
    assert 0.35 < (results > 0).float().mean() < 0.65
    assert ((results.abs() - 1).abs() < 0.3).float().mean() > 0.5  # 0.29 of a normal distribution
    assert results.abs().mean() == pytest.approx(1.0, abs=0.2)


def test_gradients_through_the_whole_call_are_those_of_its_result():
    rollout, made = make("SD3")
    made.results.through = "call"
    x_0, indices = made.results.result(rollout, "score", 3)
    seeds = [keyed_seed(1, "score noise", 3, i) for i in range(2)]
    assert torch.equal(x_0, rollout([PROMPTS[i] for i in indices], seeds))
    made.results.through = "step"
    weights = list(rollout.parameters())
    some, whole = (
        torch.autograd.grad(x.sum(), weights, allow_unused=True)
        for x in (made.results.result(rollout, "score", 3)[0], x_0)
    )
    assert any(a is not None and not torch.equal(a, b) for a, b in zip(some, whole, strict=True))


# --- what cannot be had, and what goes wrong


def check(name, processes=1, has_regression=True, sharding=None, guidance_scale=2.0, rank=4):
    pipeline = tiny.make(name)
    config = {"class": type(pipeline), "denoisers": {}}
    for part, network in pipelines.denoisers(pipeline).items():
        config["denoisers"][part] = type(network), dict(network.config)
    engine = types.SimpleNamespace(num_processes=processes)
    if sharding is not None:
        engine.sharding = sharding
    options = {"rank": rank, "has_regression": has_regression}
    made_by = {"kwargs": {"guidance_scale": guidance_scale} if guidance_scale else {}}
    return score.check(config, made_by, pipeline.scheduler, {}, engine, **options)


def test_what_cannot_be_had_is_refused_in_a_sentence(monkeypatch):
    assert check("Wan2.2", processes=2).kind == "flow" and check("Wan2.2", has_regression=False).kind == "flow"
    with pytest.raises(
        UserError, match="`regression_weight`=0: a step of a WanPipeline trains one of its 2 denoisers"
    ):
        check("Wan2.2", processes=2, has_regression=False)
    assert check("SD3", sharding={}).kind == "flow"
    with pytest.raises(UserError, match="`fake_lora_rank`=0: FSDP2 splits the student and the teacher, and no second"):
        check("SD3", sharding={}, rank=0)
    with pytest.raises(UserError, match="one of its 2 denoisers, and processes of FSDP2 have to train the same one"):
        check("Wan2.2", sharding={})
    with pytest.raises(UserError, match="`score_kwargs`: pairs of images do not say how the teacher was guided"):
        check("SD3", guidance_scale=None)
    monkeypatch.setattr(score, "call_arguments", lambda pipeline_class: {"prompt", "generator"})
    with pytest.raises(UserError, match="`score_weight`: the call of a FluxPipeline takes no latents"):
        check("Flux")


@pytest.mark.parametrize("scheduler", [diffusers.EDMEulerScheduler(), diffusers.IPNDMScheduler()])
def test_a_scheduler_without_alpha_and_sigma_is_refused(scheduler):
    with pytest.raises(
        UserError, match=f"`score_weight`: {type(scheduler).__name__} does not say the alpha and sigma"
    ):
        Process(scheduler)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kwargs": {"guidance_scale": 1.0, "height": 64, "width": 64}}, "`score_kwargs`: .* with .* it does not"),
        ({"kwargs": {"guidance_scale": 3.0, "magic": 1}}, "the call of a StableDiffusion3Pipeline refuses .*magic"),
        ({"ask": lambda self, prompts, noisy, level, **_: (noisy, noisy + 1.0)}, "changes the latents"),
        ({"ask": lambda self, prompts, noisy, level, **_: (noisy, noisy[:, :1])}, "changes the latents"),
    ],
)  # fmt: skip
def test_a_teacher_that_does_not_answer_is_found_before_training(change, sentence, monkeypatch):
    rollout, made = make("SD3")
    options = {"shape": (1, 4, 8, 8), "was_guided": True, "changes": {}}
    score.try_out(made.scores, Pairs(), made.process, **options)
    scores = made.scores
    if "ask" in change:
        monkeypatch.setattr(levels.Asked, "ask", change["ask"])
    else:
        scores = scores._replace(real=scores.real._replace(**change))
    with pytest.raises(UserError, match=sentence):
        score.try_out(scores, Pairs(), made.process, **options)


def try_out(name, changes, was_guided=True):
    """Of a teacher that is asked with `score_kwargs` over what made the pairs."""
    rollout, made = make(name)
    shape = rollout(PROMPTS[:1], [3]).shape
    kwargs = score.teacher_kwargs(tiny.KWARGS[name], changes)
    scores = made.scores._replace(real=made.scores.real._replace(kwargs=kwargs))
    options = {"shape": shape, "was_guided": was_guided, "changes": changes}
    score.try_out(scores, Pairs(), made.process, **options)


def test_a_teacher_that_is_told_its_guidance_needs_no_second_evaluation():
    try_out("Flux", {})
    try_out("Flux", {"guidance_scale": 2.5})


def test_arguments_that_the_teachers_call_refuses_are_told_before_prompts_are_encoded():
    pipeline, kwargs = tiny.make("SD3"), tiny.KWARGS["SD3"]
    assert teachers_calls(pipeline, PROMPTS, kwargs) == [kwargs | {"num_inference_steps": 2}]
    with pytest.raises(UserError, match="`score_kwargs`: the teacher's call refuses .*guidance_scale"):
        teachers_calls(pipeline, PROMPTS, kwargs | {"guidance_scale": "much"})


def test_guidance_that_does_nothing_is_refused():
    try_out("Qwen-Image", {"true_cfg_scale": 3.0})
    try_out("SD3", {"guidance_scale": 1.0})  # off, as asked
    with pytest.raises(UserError, match="guidance_scale does nothing in a QwenImagePipeline; name true_cfg_scale"):
        try_out("Qwen-Image", {"guidance_scale": 3.0})
    with pytest.raises(UserError, match="`score_kwargs`: .* it does not; .* a negative_prompt"):
        try_out("Qwen-Image", {"true_cfg_scale": 3.0, "negative_prompt": None}, was_guided=False)


@pytest.mark.parametrize(
    ("noted", "sentence"),
    [
        ((1.0, 0.5, 0.6), None),
        ((0.7, 0.5, 0.6), "collapse"),
        ((1.3, 0.5, 0.6), "saturate"),
        ((1.0, 0.7, 0.6), "lags"),
    ],
)
def test_what_goes_wrong_is_told_once(noted, sentence):
    _, made = make("SD3")
    assert made.watch(2.0) == ({}, [])
    for time in range(3):
        made.noted += [torch.tensor(noted) * 2, torch.tensor(noted) * 2]
        made.noted += [torch.full((3,), torch.nan)]  # of an update that was skipped
        values, warnings = made.watch(2.0)
        expected = {"results_std": noted[0], "fake_error": noted[1] / noted[2], "fake_skipped": 0}
        assert values == pytest.approx(expected)
        assert len(warnings) == (sentence is not None and time == 1)
        assert not warnings or sentence in warnings[0]


def test_an_adversary_that_sees_no_difference_is_told():
    _, made = make("SD3")
    said = []
    for _ in range(3):
        made.noted += [torch.tensor([1.0, 0.5, 0.6])]
        made.told += [torch.tensor([1.385, 0.1, 0.1]), torch.full((3,), torch.nan)]
        values, warnings = made.watch(1.0)
        assert values["loss_discriminator"] == pytest.approx(1.385)
        said += warnings
    assert len(said) == 1 and "the adversary does not tell" in said[0]


def test_updates_of_the_fake_score_that_are_skipped_are_told():
    _, made = make("SD3", rank=2)
    with torch.no_grad():
        for parameter in made.scores.trained:
            parameter.fill_(torch.nan)
    said = []
    for _ in range(3):
        made.train_fake(0, 0, 1), made.train_fake(1, 0, 1)
        made.noted += [torch.tensor([1.0, 0.5, 0.6])]
        values, warnings = made.watch(1.0)
        assert values["fake_skipped"] == 2
        said += warnings
    assert len(said) == 1 and "updates of the fake score are skipped" in said[0]


def test_prompts_of_their_own_have_the_size_of_the_first_pair():
    data = types.SimpleNamespace(prompts=["a", "b", "c"], call_kwargs=lambda indices: {"height": 8 * (1 + indices[0])})
    assert score.Prompts(data, 2).prompts == ["a", "b"] and score.Prompts(data, 2).call_kwargs([1]) == {"height": 16}
    own = score.Prompts(data, 2, ["d"] * 9)
    assert len(own.prompts) == 9 and own.call_kwargs([7]) == {"height": 8}
