"""Any pipeline as a differentiable function: gradients, probes, adapters, one training step; on tiny networks."""

import types

from common.direct import pipelines, probes
from common.direct import pixels as pixels_module
from common.direct import student as student_module
from common.direct.pixels import fit, rounded
from common.direct.student import freeze_unused, roll_out
from common.errors import UserError
from common.losses import distance
from common.networks import lora, performance
from tests import tiny_pipelines as tiny

import diffusers
import pytest
import torch

every_pipeline = pytest.mark.parametrize("name", list(tiny.PIPELINES))
PROMPTS = ["a three", "a four"]
# Their pipelines take no LoRA in diffusers.
WITHOUT_LORA = ("PixArt", "HunyuanDiT")
QUICK = (("SD1.5", 2), ("SD1.5", 0), ("SD3", 2), ("Qwen-Image", 2), ("PixArt", 2), ("Wan2.2", 2))  # not soak


class Pairs:
    """Two prompts and seeds, as `pairs.PairShards` has them."""

    prompts, seeds, hashes = PROMPTS, [3, 4], None

    def call_kwargs(self, indices):
        return {}


def student(name, steps=4):
    """(pipeline with the student's scheduler, the arguments of its call)"""
    pipeline = tiny.make(name)
    scheduler = pipeline.scheduler
    pipeline.scheduler, _ = probes.student_scheduler(type(scheduler), dict(scheduler.config))
    kwargs, notes = student_module.student_kwargs(pipeline, Pairs(), tiny.KWARGS[name], steps, {})
    return pipeline, kwargs, notes


@every_pipeline
def test_gradients_through_all_steps_are_exact(name):
    """The derivative along the gradient, by central differences, is the gradient's norm: nothing is detached."""
    pipeline, kwargs, _ = student(name)
    difference, norm = directional_derivative(pipeline, kwargs)
    assert norm > 1e-3 and difference == pytest.approx(norm, rel=0.02)


def test_a_step_that_detaches_would_be_noticed(monkeypatch):
    pipeline, kwargs, _ = student("SD3")
    step = pipeline.scheduler.step
    monkeypatch.setattr(pipeline.scheduler, "step", lambda out, t, z, **kw: step(out, t, z.detach(), **kw))
    difference, norm = directional_derivative(pipeline, kwargs)
    assert difference != pytest.approx(norm, rel=0.05)


def directional_derivative(pipeline, kwargs):
    """(by central differences along the gradient, the gradient's norm) of a linear function of the latents."""
    rollout = pipelines.Rollout(pipeline, **kwargs).requires_grad_(True)
    weights = list(rollout.parameters())
    direction = torch.randn(rollout(PROMPTS, [3, 4]).shape, generator=torch.Generator().manual_seed(1))

    def value():
        return (rollout(PROMPTS, [3, 4]).double() * direction).sum()

    gradients = torch.autograd.grad(value(), weights, allow_unused=True)
    gradients = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
    norm = torch.stack([g.double().norm() for g in gradients]).norm()
    epsilon, values = 2e-3, []
    with torch.no_grad():
        for sign in (1, -2):
            torch._foreach_add_(weights, gradients, alpha=sign * epsilon / norm.item())
            values.append(value())
    return ((values[0] - values[1]) / (2 * epsilon)).item(), norm.item()


@every_pipeline
def test_what_the_probes_find(name):
    teacher = tiny.make(name)
    kwargs = tiny.KWARGS[name]
    seen = probes.observe(teacher, PROMPTS, **kwargs, num_inference_steps=3)
    assert probes.guides(seen, 2) != probes.embeds_guidance(teacher) and seen.draws_once
    assert probes.guidance_off(teacher, PROMPTS, kwargs) == tiny.OFF[name]

    pipeline, student_kwargs, notes = student(name)
    assert tiny.OFF[name].items() <= student_kwargs.items() and "negative_prompt" not in student_kwargs
    assert any("wasted" in note for note in notes) == (name in tiny.WASTES)
    seen = probes.observe(pipeline, PROMPTS, **student_kwargs)
    assert seen.calls == 4 and seen.rows == [2] * 4 and not probes.is_wasted(seen.last_time, 4)


@every_pipeline
def test_noise_is_a_samples_own(name):
    """The same sample alone and in a batch; another seed gives another result."""
    pipeline, kwargs, _ = student(name)
    both = probes.observe(pipeline, PROMPTS, **kwargs).latents
    with torch.no_grad():
        second = pipelines.call(pipeline, PROMPTS[1:], [1], **kwargs)
        other = pipelines.call(pipeline, PROMPTS[1:], [2], **kwargs)
    torch.testing.assert_close(second[0], both[1], atol=2e-4, rtol=1e-3)
    assert (other[0] - both[1]).abs().max() > 0.1


@every_pipeline
def test_lora_round_trip_through_stock_diffusers(name, tmp_path):
    """The trained student and a stock pipeline that loads its files, with the saved scheduler: the same latents."""
    pipeline, kwargs, _ = student(name)
    with torch.no_grad():
        untrained = pipelines.call(pipeline, PROMPTS, [3, 4], **kwargs)
    pipelines.add_lora(pipeline, rank=2, alpha=3.0)
    for module in pipelines.denoisers(pipeline).values():
        assert lora.lora_layers(module)
        for layer in lora.lora_layers(module).values():
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.2)
    with torch.no_grad():
        trained = pipelines.call(pipeline, PROMPTS, [3, 4], **kwargs)
    written = pipelines.save_lora(tmp_path, pipeline)
    pipeline.scheduler.save_pretrained(tmp_path / "scheduler")

    stock = tiny.make(name)
    stock.scheduler = type(pipeline.scheduler).from_pretrained(tmp_path, subfolder="scheduler")
    if name in WITHOUT_LORA:
        assert written == ["transformer_adapter", "transformer"]
        stock.transformer = type(stock.transformer).from_pretrained(tmp_path, subfolder="transformer")
    else:
        files = pipelines.lora_files(type(stock), pipelines.denoisers(stock))
        for file, _, extra in files.values():
            stock.load_lora_weights(tmp_path, weight_name=file, **extra)
        assert written == [file for file, _, _ in files.values()]
    result = stock(PROMPTS, generator=pipelines.generators([3, 4]), output_type="latent", **kwargs)[0]
    tolerance = 1e-4 if name in WITHOUT_LORA else 0.0  # merged weights round differently
    torch.testing.assert_close(result, trained, atol=tolerance, rtol=tolerance)
    assert (trained - untrained).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["SD3", "Wan2.2", "PixArt"])
def test_adapters_start_from_what_was_saved(name, tmp_path):
    """Of two denoisers each from its own file; of a pipeline that takes no LoRA, from the PEFT adapter."""
    saved, again = student(name)[0], student(name)[0]
    pipelines.add_lora(saved, rank=2, alpha=3.0)
    torch.manual_seed(1)
    for module in pipelines.denoisers(saved).values():
        for parameter in lora.lora_parameters(module):
            torch.nn.init.normal_(parameter)
    pipelines.save_lora(tmp_path, saved)
    with pytest.raises(UserError, match="its alpha is 3.0, not 2.0"):
        pipelines.add_lora(student(name)[0], rank=2, alpha=2.0, init_lora=tmp_path)
    pipelines.add_lora(again, rank=2, alpha=3.0, init_lora=tmp_path)
    for part, module in pipelines.denoisers(again).items():
        expected = lora.adapter_tensors(pipelines.denoisers(saved)[part])
        assert all(torch.equal(value, expected[path]) for path, value in lora.adapter_tensors(module).items())


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        pytest.param(name, rank, marks=() if (name, rank) in QUICK else pytest.mark.soak)
        for name in tiny.PIPELINES
        for rank in (2, 0)
        if rank or name in ("SD1.5", "Flux", "Qwen-Image")
    ],
)
def test_one_training_step_lowers_the_loss(name, rank):
    """All weights of the others: their gradients are exact, see above."""
    pipeline, kwargs, _ = student(name)
    with torch.no_grad():
        target = pipelines.call(tiny.make(name), PROMPTS, [3, 4], **tiny.KWARGS[name], num_inference_steps=8).float()
    rollout = pipelines.Rollout(pipeline, **kwargs)
    if rank:
        pipelines.add_lora(pipeline, rank, float(rank))
    else:
        rollout.requires_grad_(True)
    rollout.train()
    unused = freeze_unused(rollout, Pairs(), [0, 1])
    assert bool(unused) == (name == "Qwen-Image"), unused  # its last text branch
    weights = [p for p in rollout.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and p.grad is None for p in weights)
    optimizer = torch.optim.Adam(weights, lr=1e-4 if not rank else 1e-3)
    losses = []
    for _ in range(2 + bool(rank)):  # adapters begin at B = 0, and the first step changes B alone
        loss = distance(roll_out(rollout, Pairs(), [0, 1]), target, "l2", 0.1)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["SD1.5", "SD3", "HunyuanDiT"])
def test_gradient_checkpointing_changes_no_gradient(name):
    """HunyuanDiT cannot recompute its blocks and is recomputed as a whole."""
    results = []
    for checkpointing in (False, True):
        pipeline, kwargs, _ = student(name)
        rollout = pipelines.Rollout(pipeline, **kwargs).requires_grad_(True)
        if checkpointing:
            for module in pipelines.denoisers(pipeline).values():
                performance.recompute(module, "full")
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.numel()) or t, lambda t: t):
            loss = roll_out(rollout, Pairs(), [0, 1]).square().mean()
        loss.backward()
        results.append(([p.grad for p in rollout.parameters() if p.grad is not None], sum(saved)))
    (plain, much), (recomputed, little) = results
    assert len(plain) == len(recomputed) and little < 0.7 * much
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_half_precision_base_and_float32_adapters():
    pipeline, kwargs, _ = student("SD3")
    pipeline.transformer.to(torch.bfloat16)
    pipelines.add_lora(pipeline, 2, 2.0)
    rollout = pipelines.Rollout(pipeline, **kwargs)
    with torch.autocast("cpu", torch.bfloat16):
        roll_out(rollout, Pairs(), [0, 1]).square().mean().backward()
    dtypes = {p.dtype: p.grad is not None for p in rollout.parameters()}
    assert dtypes == {torch.bfloat16: False, torch.float32: True}


# --- schedulers


@pytest.mark.parametrize(
    ("scheduler", "config", "instead"),
    [
        ("DDPMScheduler", {}, "DDIMScheduler"),
        ("EulerAncestralDiscreteScheduler", {}, "DDIMScheduler"),
        ("LCMScheduler", {}, "DDIMScheduler"),
        ("TCDScheduler", {}, "DDIMScheduler"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "DDIMScheduler"),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_stochastic_schedulers_are_refused_by_name_and_found_by_their_draws(scheduler, config, instead):
    scheduler_class = getattr(diffusers, scheduler)
    with pytest.raises(UserError, match=f"{scheduler}.* draws noise at its steps.*: {instead}$"):
        probes.check_deterministic("--student_scheduler", scheduler_class, config)
    if scheduler == "TCDScheduler":
        return  # only with eta > 0, which this pipeline passes as 0
    name = "SD3" if scheduler.startswith("Flow") else "SD1.5"
    pipeline = tiny.make(name)
    pipeline.scheduler = scheduler_class(**config)
    with pytest.raises(UserError, match="draws more random numbers than the initial noise"):
        probes.check_draws("--student_scheduler", pipeline, PROMPTS, **tiny.SIZE)


def test_eta_is_found_by_its_draws():
    pipeline = tiny.make("SD1.5")
    pipeline.scheduler = diffusers.DDIMScheduler()
    probes.check_draws("--student_kwargs", pipeline, PROMPTS, **tiny.SIZE, eta=0.0)
    with pytest.raises(UserError, match="eta 0"):
        probes.check_draws("--student_kwargs", pipeline, PROMPTS, **tiny.SIZE, eta=1.0)


def test_nothing_is_clipped():
    made = probes.make_scheduler("--scheduler", diffusers.DDIMScheduler, {"clip_sample": True, "thresholding": True})
    assert made.config.clip_sample is False and made.config.thresholding is False


@pytest.mark.parametrize("shipped", ["PNDMScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_schedulers_with_more_evaluations_than_steps(shipped):
    pipeline, one_phase = tiny.make("SD1.5"), {"skip_prk_steps": True} if shipped == "PNDMScheduler" else {}
    made, notes = probes.student_scheduler(getattr(diffusers, shipped), dict(pipeline.scheduler.config))
    assert type(made).__name__ in ("DDIMScheduler", "EulerDiscreteScheduler") and shipped in notes[0]
    pipeline.scheduler, _ = probes.student_scheduler(diffusers.DDIMScheduler, {}, shipped, one_phase)
    with pytest.raises(UserError, match=f"{shipped} asks the denoiser [57] times in 4 steps"):
        student_module.student_kwargs(pipeline, Pairs(), tiny.SIZE, 4, {})


@pytest.mark.parametrize(
    ("last", "steps", "wasted"),
    [(0.009, 4, True), (0.1, 4, True), (0.25, 4, False), (0.125, 8, False), (0.02, 8, True), (1.0, 1, False),
     (0.05, 20, False)],
)  # fmt: skip
def test_wasted_is_relative_to_an_even_schedule(last, steps, wasted):
    assert probes.is_wasted(last, steps) == wasted


@pytest.mark.parametrize("name", tiny.WASTES)
@pytest.mark.parametrize("steps", [2, 8])
def test_the_saved_schedulers_times_are_the_trained_ones(name, steps, tmp_path):
    pipeline, kwargs, _ = student(name, steps)
    seen = probes.observe(pipeline, PROMPTS, **kwargs)
    trained = pipeline.scheduler.timesteps.clone()
    assert len(trained) == steps == seen.calls
    pipeline.scheduler.save_pretrained(tmp_path)
    stock = tiny.make(name)
    stock.scheduler = type(pipeline.scheduler).from_pretrained(tmp_path)
    stock(PROMPTS, generator=pipelines.generators([0, 1]), output_type="latent", **kwargs)
    assert torch.equal(stock.scheduler.timesteps, trained) and not probes.is_wasted(
        probes.last_time(stock.scheduler), steps
    )


def test_the_teachers_steps_and_arguments_give_the_teachers_result():
    pipeline = tiny.make("SD3")
    with torch.no_grad():
        again = pipelines.call(pipeline, PROMPTS, [3, 4], **tiny.KWARGS["SD3"], num_inference_steps=5)
    stock = tiny.make("SD3")(
        PROMPTS,
        generator=pipelines.generators([3, 4]),
        output_type="latent",
        num_inference_steps=5,
        **tiny.KWARGS["SD3"],
    )[0]
    torch.testing.assert_close(again, stock)  # of two pipelines, in different memory: equal up to rounding


# --- guidance


def test_a_teacher_whose_guidance_is_silently_off_is_noticed():
    """Qwen-Image guides only with a negative prompt."""
    pipeline = tiny.make("Qwen-Image")
    silent = {name: value for name, value in tiny.KWARGS["Qwen-Image"].items() if name != "negative_prompt"}
    assert not probes.guides(probes.observe(pipeline, PROMPTS, **silent, num_inference_steps=2), 2)
    assert probes.guidance_argument(pipeline) == "true_cfg_scale"
    assert probes.guidance_argument(tiny.make("Flux")) == "guidance_scale"


def test_z_image_guides_at_a_scale_of_one():
    pipeline = tiny.make("Z-Image")
    seen = probes.observe(pipeline, PROMPTS, **tiny.SIZE, guidance_scale=1.0, num_inference_steps=2)
    assert probes.guides(seen, 2) and seen.rows == [4, 4]


def test_perturbed_attention_is_switched_off_for_the_student():
    plain = tiny.make("SD1.5")
    pipeline = diffusers.StableDiffusionPAGPipeline(**plain.components, requires_safety_checker=False)
    pipeline.encode_prompt = plain.encode_prompt
    pipeline.set_progress_bar_config(disable=True)
    assert probes.guides(probes.observe(pipeline, PROMPTS, **tiny.SIZE, guidance_scale=1.0, num_inference_steps=2), 2)
    off = {"guidance_scale": 1.0, "pag_scale": 0.0}
    assert probes.guidance_off(pipeline, PROMPTS, tiny.SIZE | {"pag_scale": 3.0}) == off
    options = tiny.SIZE | {"guidance_scale": 1.0, "num_inference_steps": 2}
    expected = probes.observe(plain, PROMPTS, **options).latents
    assert torch.equal(probes.observe(pipeline, PROMPTS, **options, pag_scale=0.0).latents, expected)


@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_that_gives_no_latents_is_refused():
    """LDM3D makes depth beside images, and raises a bare Exception where it is asked for latents."""
    plain = tiny.make("SD1.5")
    pipeline = diffusers.StableDiffusionLDM3DPipeline(**plain.components, requires_safety_checker=False)
    pipeline.encode_prompt = plain.encode_prompt
    pipeline.set_progress_bar_config(disable=True)
    with pytest.raises(UserError, match="a StableDiffusionLDM3DPipeline cannot be distilled, its call gives no laten"):
        student_module.student_kwargs(pipeline, Pairs(), tiny.SIZE, 4, {})


# --- sizes


class Decoder(torch.nn.Module):
    """A VAE of which the size of its images is all that is real."""

    def __init__(self, factor, **config):
        super().__init__()
        self.factor, self.weight = factor, torch.nn.Parameter(torch.zeros(1))
        self.config = types.SimpleNamespace(scaling_factor=1.0, shift_factor=0.0, **config)
        self.config.get = vars(self.config).get
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def decode(self, latents, return_dict=True, **kwargs):
        scale = self.factor if latents.ndim == 4 else (1, self.factor, self.factor)
        pixels = torch.nn.functional.interpolate(latents[:, :1], scale_factor=scale).repeat_interleave(3, dim=1)
        if latents.ndim == 5:
            pixels = pixels.repeat_interleave(4, dim=2)[:, :, : 4 * latents.shape[2] - 3]
        return (pixels,) if not return_dict else types.SimpleNamespace(sample=pixels)


def sized(name, factor, **config):
    pipeline = tiny.make(name)
    pipeline.vae = Decoder(factor, **config)
    return pipeline


def test_sizes_that_a_pipeline_rounds_are_recorded_as_it_makes_them():
    flux = sized("Flux", 8)
    asked = tiny.KWARGS["Flux"] | {"height": 60, "width": 98}
    notes = []
    assert rounded(flux, "a", asked, notes) == {"height": 48, "width": 96}
    assert notes == [
        "WARNING: a FluxPipeline makes height=48, width=96 where it is asked for height=60, width=98; so are the pairs"
    ]
    assert rounded(flux, "a", asked | {"height": 48, "width": 96}, notes) == {} and len(notes) == 1
    wan = sized("Wan", 8, latents_mean=[0.0] * 4, latents_std=[1.0] * 4, z_dim=4)
    assert rounded(wan, "a", tiny.KWARGS["Wan"] | {"num_frames": 7}, notes) == {"num_frames": 5}
    assert rounded(tiny.make("SD3"), "a", tiny.KWARGS["SD3"], notes) == {}  # no VAE to ask
    assert "decode" not in vars(flux.vae)


def test_images_that_the_pipeline_would_resize_are_made_without_or_refused():
    sana = sized("Sana", 32)
    sana.transformer.register_to_config(sample_size=16)  # which has a list of sizes around 512
    kwargs, notes = {"guidance_scale": 1.0}, []
    size = {"height": 128, "width": 128}
    assert pixels_module.made(sana, "a", kwargs | size) == {"height": 512, "width": 512}
    assert fit(sana, "a", kwargs, size, notes) == {"use_resolution_binning": False}
    assert "a SanaPipeline makes height=512, width=512 where it is asked for height=128, width=128" in notes[0]
    assert fit(sana, "a", kwargs, {"height": 512, "width": 512}, notes) == {} and len(notes) == 1
    with pytest.raises(UserError, match="a FluxPipeline makes height=48, width=96 where .* make them in a size"):
        fit(sized("Flux", 8), "a", {}, {"height": 60, "width": 98}, notes)


def test_guidance_that_the_user_leaves_on_is_refused():
    pipeline = tiny.make("SD3")
    with pytest.raises(UserError, match="the student still guides"):
        student_module.student_kwargs(pipeline, Pairs(), tiny.SIZE, 4, {"guidance_scale": 3.0})
    with pytest.raises(UserError, match="has no guidance_scales"):
        student_module.student_kwargs(pipeline, Pairs(), tiny.SIZE, 4, {"guidance_scales": 3.0})
    with pytest.raises(UserError, match="sigmas must be a list of 4"):
        student_module.student_kwargs(pipeline, Pairs(), tiny.SIZE, 4, {"sigmas": [1.0, 0.5]})
    with pytest.raises(UserError, match="refuses"):
        student_module.student_kwargs(pipeline, Pairs(), {"height": 60}, 4, {})


# --- adapters


def test_adapters_go_into_every_layer_of_the_blocks_or_where_they_are_told():
    unet = tiny.make("SD1.5").unet
    targets = lora.target_paths(unet)
    assert "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q" in targets and "conv_in" not in targets
    assert "mid_block.resnets.0.conv1" in targets and "up_blocks.0.upsamplers.0.conv" in targets
    assert lora.target_paths(unet, ["to_q", "conv_in"]) == sorted(
        path for path, _ in unet.named_modules() if path.endswith("to_q") or path == "conv_in"
    )
