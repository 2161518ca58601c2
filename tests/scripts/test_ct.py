"""train_cm_ct_unconditional.py from end to end, on the digits at 8 pixels."""

import functools
import shlex

import train_cm_ct_unconditional as ct
from common.ct import consistency, sampling
from common.ct import unet as ct_unet
from common.ct.data import decode_image_label, open_images
from common.ct.scheduler import PreconditionedConsistencyScheduler
from common.data.folders import IMAGE_KEYS
from common.data.stream import TrainingData
from common.keyed_random import keyed_generator
from common.networks import performance
from common.results.metrics import load_feature_network
from common.run import checkpointing, engine, simulation
from tests.cases import digests, finished, image_tags, one_sentence, scalars
from tests.cases import train as run_script
from tests.ct.test_flags import GUIDE_CT
from tests.made import CONFIG, NUM_IMAGES

import datasets
import pytest
import torch
from accelerate import Accelerator
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel
from PIL import Image
from safetensors.torch import load_file


@pytest.fixture
def flags(ct_flags):
    return ct_flags


def train(words):
    run_script(words, ct)


def weights(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_guides_command_runs_on_a_data_set_with_its_columns(tmp_path, data_set, monkeypatch):
    """Changed: paths, fp16 to bf16 (no fp16 on a CPU), fewer steps, a small network in the 54 M default's place."""
    monkeypatch.setitem(ct_unet.DEFAULT_CONFIGS, 32, CONFIG)
    command = GUIDE_CT.replace("cifar10", str(data_set)).replace("/path/to/output/dir", str(tmp_path / "out"))
    command = command.replace("fp16", "bf16").replace("max_train_steps=1000", "max_train_steps=8")
    command = command.replace("--validation_steps=100", "--validation_steps=8").replace("workers=8", "workers=2")
    train(shlex.split(command.replace("\\\n", ""))[3:])
    pipeline = quiet(ConsistencyModelPipeline.from_pretrained(tmp_path / "out"))
    assert pipeline(class_labels=3, num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)


# --- the method


def stream(data_set, **options):
    shards, source = open_images(None, data_set, image_column="img", label_column="label")
    decode = functools.partial(decode_image_label, resolution=8, num_classes=10)
    return TrainingData(shards, decode, source=source, required=(IMAGE_KEYS, ("cls", "json")), **options)


def pasted(card):
    """The names that the snippet of a card defines, as a user would paste it."""
    names = {}
    exec(card.split("```python\n")[1].split("```")[0].replace('pipe.to("cuda")', ""), names)
    return names


@pytest.mark.parametrize("objective", ["ict", "ict, skipping", "ect", "ect at sigma_min", "pretraining"])
def test_the_first_loss_is_the_papers_with_diffusers_scheduler_as_f(tmp_path, flags, data_set, objective):
    """Everything of step 7 again, f by CMStochasticIterativeScheduler.step, the rest by the formulas."""
    torch.manual_seed(0)
    start = UNet2DModel.from_config(CONFIG | {"num_class_embeds": 10, "sample_size": 8, "dropout": 0.0})
    start.save_pretrained(tmp_path / "start")
    extra = {
        "ict": {},
        "ict, skipping": {"skip_steps": 3},
        "ect": {"objective": "ect", "ect_q": 4.0, "ect_stages": 2},
        "ect at sigma_min": {"objective": "ect", "ect_q": 256.0, "ect_stages": 1, "p_mean": -20.0},
        "pretraining": {"pretrain_steps": 1},
    }[objective]
    extra |= {"model_config_name_or_path": None, "pretrained_model_name_or_path": tmp_path / "start"}
    train(flags(tmp_path / "out", max_train_steps=8, checkpointing_steps=8, **extra))
    logged = scalars(tmp_path / "out", "loss")[1]

    batch = next(iter(stream(data_set, batch_size=4, seed=1, shuffle_block_samples=16)))
    draw = keyed_generator(1, "ct", 0, "cpu")
    x = batch["images"].double() / 127.5 - 1
    skip = extra.get("skip_steps", 1)
    if objective.startswith("ict"):
        grid = consistency.karras_sigmas(11)
        index = torch.multinomial(consistency.sigma_probabilities(grid, skip_steps=skip), 4, True, generator=draw)
        t, r = grid[index + skip].float().double(), grid[index].float().double()
    else:
        mean, std = (-1.2, 1.2) if objective == "pretraining" else (extra.get("p_mean", -1.1), 2.0)
        t = torch.exp(mean + std * torch.randn(4, generator=draw)).clamp(0.002, 80).double()
        r = (t * (1 - (1 + 8 / (1 + torch.exp(t))) / extra.get("ect_q", 4.0))).clamp(min=0)
    z = torch.randn(x.shape, generator=draw).double()
    unet = start.eval().double()

    @torch.no_grad()
    def f(x, sigma, label):
        scheduler = CMStochasticIterativeScheduler(clip_denoised=False)
        scheduler.sigmas, scheduler.timesteps = torch.stack([sigma, sigma]), 250 * sigma.log()[None]
        time = scheduler.timesteps[0]
        output = unet(scheduler.scale_model_input(x, time), time, label).sample
        return scheduler.step(output, time, x).prev_sample

    losses = []
    for i in range(4):
        label = batch["class_labels"][i : i + 1]
        student = f(x[i : i + 1] + t[i] * z[i : i + 1], t[i], label)
        if objective == "pretraining":
            losses.append((student - x[i : i + 1]).square().mean() * (t[i] ** 2 + 0.25) / (0.5 * t[i]) ** 2)
            continue
        x_r = x[i : i + 1] + r[i] * z[i : i + 1]
        target = f(x_r, r[i], label) if r[i] >= 0.002 else x_r  # the identity up to sigma_min; r = 0: the data
        c = 0.00054 * (3 * 8 * 8) ** 0.5 if objective.startswith("ict") else 0.0
        losses.append((((student - target) ** 2).sum() + c**2).sqrt().sub(c) / (t[i] - r[i]))
    assert logged == pytest.approx(torch.stack(losses).mean().item(), rel=2e-4)
    if objective == "ect at sigma_min":  # f(x_t) - x_r = (t - r) z, whatever the weights are
        assert logged == pytest.approx(z.flatten(1).norm(dim=1).mean().item(), rel=2e-4)


def test_both_sides_have_the_same_dropout_and_every_step_has_another(tmp_path, flags, monkeypatch):
    """At equal noise levels student and target are equal; the global generator is not moved."""
    pairs, masks, states = [], [[]], []
    huber, dropout = consistency.pseudo_huber, torch.nn.Dropout.forward

    def watched_dropout(self, x):
        out = dropout(self, x)
        if self.training and out.device.type != "meta":
            masks[-1].append(((out == 0) & (x != 0)).flatten(1).sum(1).tolist())
        return out

    def watched_loss(a, b, c):
        pairs.append((a.detach(), b))
        states.append(torch.get_rng_state())
        masks.append([])
        return huber(a, b, c)

    monkeypatch.setattr(consistency, "ect_target_sigma", lambda t, *args: t)
    monkeypatch.setattr(consistency, "loss_weight", lambda t, r, *args: torch.ones_like(t))
    monkeypatch.setattr(consistency, "pseudo_huber", watched_loss)
    monkeypatch.setattr(torch.nn.Dropout, "forward", watched_dropout)
    start = {"objective": "ect", "pretrained_model_name_or_path": tmp_path / "a", "model_config_name_or_path": None}
    train(flags(tmp_path / "a", max_train_steps=8, report_to="none"))  # F of a new network is zero
    for values in (pairs, states):
        values.clear()
    masks[:] = [[]]
    train(flags(tmp_path / "b", max_train_steps=3, report_to="none", dropout=0.5, **start))
    assert len(pairs) == 3
    for student, target in pairs:  # with and without gradients, which may take other kernels: equal up to rounding
        torch.testing.assert_close(student, target)
    assert all(torch.equal(state, states[0]) for state in states)
    layers = len(masks[0]) // 2
    assert layers > 4 and masks[0][:layers] == masks[0][layers:] and masks[0][0] != masks[1][-1]
    assert len({str(step[-layers:]) for step in masks[:3]}) == 3


@pytest.mark.parametrize("cast_teacher", [True, False])
def test_images_noise_levels_and_loss_are_float32_under_bf16(tmp_path, flags, monkeypatch, cast_teacher):
    seen, huber = {}, consistency.pseudo_huber

    def watch(self, x, *args, **kwargs):
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        if x.device.type != "meta":  # the first ones: samples come later
            seen.setdefault("student" if torch.is_grad_enabled() else "target", (x.dtype, self.dtype, dtype))
        return forward(self, x, *args, **kwargs)

    def loss(a, b, c):
        seen["loss"] = (a.dtype, b.dtype)
        return huber(a, b, c)

    forward = UNet2DModel.forward
    monkeypatch.setattr(UNet2DModel, "forward", watch)
    monkeypatch.setattr(consistency, "pseudo_huber", loss)
    extra = {} if cast_teacher else {"no-cast_teacher": True}
    train(flags(tmp_path / "out", mixed_precision="bf16", max_train_steps=4, eval_nfe=1, **extra))
    fp32, bf16 = torch.float32, torch.bfloat16
    assert seen["loss"] == (fp32, fp32) and seen["student"] == (fp32, fp32, bf16)
    assert seen["target"] == (fp32, fp32, bf16 if cast_teacher else None)


def test_a_gradient_scaler_drives_the_step_and_is_resumed(tmp_path, flags, monkeypatch):
    """fp16's path without a GPU: torch's scaler for the CPU, whose first scale overflows, around bf16's autocast."""
    scales, make = [], engine.make_accelerator

    def with_scaler(args):
        accelerator = make(args)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=2)
        return accelerator

    monkeypatch.setattr(engine, "make_accelerator", with_scaler)
    save = checkpointing.save_checkpoint

    def saved(accelerator, *args):
        scales.append(accelerator.scaler.get_scale())
        return save(accelerator, *args)

    monkeypatch.setattr(checkpointing, "save_checkpoint", saved)
    options = {"mixed_precision": "bf16", "max_train_steps": 16, "checkpointing_steps": 4, "max_grad_norm": 1.0}
    train(flags(tmp_path / "a", **options))
    assert scales[0] < 2.0**126 and all(torch.isfinite(w).all() for w in weights(tmp_path / "a" / "unet").values())
    assert scalars(tmp_path / "a", "loss_scale")[16] == scales[-1]
    expected = digests(tmp_path / "a" / "checkpoint-16")
    (tmp_path / "a" / "checkpoint-16" / "COMPLETE").unlink()
    train(flags(tmp_path / "a", **options, resume_from_checkpoint="latest"))
    assert digests(tmp_path / "a" / "checkpoint-16") == expected


@pytest.mark.soak
def test_constant_images_are_learnt(tmp_path, flags):
    """Data of one grey value, 0.498: samples of one and two steps are of that value."""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    grey = [Image.new("RGB", (8, 8), (191,) * 3)] * 16
    datasets.Dataset.from_dict({"img": grey, "label": [0] * 16}, features).save_to_disk(tmp_path / "grey")
    options = {"dataset_name": tmp_path / "grey", "class_conditional": None, "dropout": 0.0, "discretization_s_1": 10}
    options |= {"max_train_steps": 160, "train_batch_size": 8, "checkpointing_steps": 160, "ema_max_decay": 0.95}
    train(flags(tmp_path / "out", **options | {"learning_rate": 4e-3, "logging_steps": 80}))
    pipeline = quiet(ConsistencyModelPipeline.from_pretrained(tmp_path / "out"))
    for timesteps in ([0], [6, 0]):
        images = pipeline(
            batch_size=64, timesteps=timesteps, num_inference_steps=None, output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip
        assert (2 * images - 1).mean().item() == pytest.approx(0.498, abs=0.05)


# --- the result


def test_the_result_is_a_stock_pipeline_of_the_average_and_is_sampled_in_eval_mode(tmp_path, flags, monkeypatch):
    modes, call = [], ConsistencyModelPipeline.__call__

    def watched(self, *args, **kwargs):
        modes.append(self.unet.training)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(ConsistencyModelPipeline, "__call__", watched)
    out = tmp_path / "out"
    train(flags(out, validation_steps=4))
    assert image_tags(out) == {f"validation/{name}_{k}_steps" for name in ("raw", "ema") for k in (1, 2)}
    assert len(modes) == 8 and not any(modes)
    pipeline = quiet(ConsistencyModelPipeline.from_pretrained(out))
    assert type(pipeline.scheduler) is CMStochasticIterativeScheduler
    assert pipeline.scheduler.config.num_train_timesteps == 41 and pipeline.unet.config.sample_size == 8
    checkpoint = out / "checkpoint-8"
    assert same(weights(out / "unet"), load_file(checkpoint / "ema_unet.safetensors"))
    assert same(weights(out / "unet_raw"), load_file(checkpoint / "model.safetensors"))
    assert not same(weights(out / "unet"), weights(out / "unet_raw"))
    card = (out / "README.md").read_text()
    assert "timesteps=[25, 0]" in card and "Warning" not in card and "unconditional-image-generation" in card
    names = pasted(card)
    assert len(names["one_step"]) == len(names["two_steps"]) == 8
    assert (out / "sample_grid.png").is_file()


def test_a_run_too_short_for_its_average_gives_the_last_weights(tmp_path, flags, capsys):
    train(flags(tmp_path / "out", ema_max_decay=0.999))
    out = tmp_path / "out"
    assert same(weights(out / "unet"), load_file(out / "checkpoint-8" / "model.safetensors"))
    assert same(weights(out / "unet_ema"), load_file(out / "checkpoint-8" / "ema_unet.safetensors"))
    printed = capsys.readouterr().out
    assert "99% of it still its start at the end: too much" in printed.partition("steps:")[0]  # before hours are spent
    assert "WARNING: the run is too short for its average, 99% of which" in printed
    assert "WARNING: the run is too short" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "decays"),
    [
        ({"ema_max_decay": 0.25, "ema_min_decay": 0.1}, [0, 2 / 11, 0.25, 0.25]),
        ({"ema_max_decay": 0.9, "use_ema_warmup": True, "ema_power": 1.0}, [0, 1 / 2, 2 / 3, 3 / 4]),
        ({"ema_gamma": 1.0, "ema_max_decay": None}, [0, 1 / 4, 4 / 9, 9 / 16]),
    ],
)
def test_averages(tmp_path, flags, changes, decays):
    train(flags(tmp_path / "out", max_train_steps=4, checkpointing_steps=1, **changes))
    expected = None
    for step, decay in enumerate(decays, 1):
        folder = tmp_path / "out" / f"checkpoint-{step}"
        model, ema = (load_file(folder / f"{name}.safetensors") for name in ("model", "ema_unet"))
        expected = model if expected is None else {n: decay * expected[n] + (1 - decay) * model[n] for n in model}
        for name in model:
            torch.testing.assert_close(ema[name], expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "changes", [{"noise_precond_type": "edm"}, {"noise_precond_type": "none"}, {"input_precond_type": "none"}]
)
def test_other_preconditionings_train_and_are_saved_with_their_scheduler(tmp_path, flags, changes):
    train(flags(tmp_path / "out", validation_steps=4, **changes))
    out = tmp_path / "out"
    card = (out / "README.md").read_text()
    assert "WARNING: `noise_precond_type` or `input_precond_type` is not cm" in card
    assert not (out / "model_index.json").exists()
    names = pasted(card)
    assert type(names["pipe"].scheduler) is PreconditionedConsistencyScheduler and len(names["two_steps"]) == 8


def test_unconditional_training(tmp_path, flags):
    train(flags(tmp_path / "out", class_conditional=None, validation_steps=2, use_ema=None, ema_max_decay=None))
    pipeline = quiet(ConsistencyModelPipeline.from_pretrained(tmp_path / "out"))
    assert pipeline.unet.config.num_class_embeds is None and not (tmp_path / "out" / "unet_raw").exists()
    assert pipeline(batch_size=2, output_type="np").images.shape == (2, 8, 8, 3)


def test_classes_as_timesteps_reach_the_network_and_xformers_both_networks(tmp_path, flags, monkeypatch):
    asked = []
    monkeypatch.setattr(UNet2DModel, "enable_xformers_memory_efficient_attention", lambda self: asked.append(self))
    monkeypatch.setattr(performance, "missing_for_xformers", lambda: None)
    train(flags(tmp_path / "out", class_embed_type="timestep", enable_xformers_memory_efficient_attention=True))
    assert len(asked) == 2  # the student and its average
    pipeline = quiet(ConsistencyModelPipeline.from_pretrained(tmp_path / "out"))
    draw = lambda k: pipeline(class_labels=k, output_type="pt", generator=torch.Generator().manual_seed(0)).images  # noqa: E731
    assert not torch.equal(draw(1), draw(2))


def test_pretraining_alone_is_no_consistency_model_and_a_start_for_ect(tmp_path, flags, capsys):
    train(flags(tmp_path / "a", pretrain_steps=8, objective="ect"))
    assert "WARNING: every update was diffusion training" in (tmp_path / "a" / "README.md").read_text()
    options = {"model_config_name_or_path": None, "pretrained_model_name_or_path": tmp_path / "a"}
    train(flags(tmp_path / "b", objective="ect", learning_rate=0, adam_weight_decay=0, **options))
    assert same(weights(tmp_path / "a" / "unet"), weights(tmp_path / "b" / "unet_raw"))
    again = {"max_train_steps": 16, "resume_from_checkpoint": "latest"}
    train(flags(tmp_path / "a", pretrain_steps=8, objective="ect", **again))
    assert scalars(tmp_path / "a", "ect_stage") == {9 + i: 1 + i for i in range(8)}
    assert "has 10 classes; pass --class_conditional" in one_sentence(
        capsys, train, flags(tmp_path / "c", **options, class_conditional=None)
    )
    scheduler = tmp_path / "a" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("CMStochasticIterativeScheduler", "DDPMScheduler"))
    assert "was trained for DDPMScheduler" in one_sentence(capsys, train, flags(tmp_path / "c", **options))


def test_an_extended_run_keeps_its_curriculum(tmp_path, flags):
    train(flags(tmp_path / "out", max_train_steps=6, checkpointing_steps=3))
    train(flags(tmp_path / "out", max_train_steps=9, checkpointing_steps=3, resume_from_checkpoint="latest"))
    levels = scalars(tmp_path / "out", "discretization_steps")
    assert [levels[step] for step in range(1, 10)] == [11, 11, 21, 21, 41, 41, 41, 41, 41]


def test_steps_follow_from_epochs_by_default(tmp_path, flags, capsys, monkeypatch):
    monkeypatch.setattr(simulation, "begin", finished)
    train(flags(tmp_path / "out", max_train_steps=None, num_train_epochs=1, max_train_samples=16, dry_run=True))
    out = capsys.readouterr().out
    assert "updates             4" in out and "noise levels        11 to 41" in out and not (tmp_path / "out").exists()


# --- samples and evaluation


def test_the_distance_to_the_data_themselves_is_nearly_nothing(tmp_path, classifier, data_set, monkeypatch):
    """Samples that are the reference images: distance 0, whatever is measured in between."""
    images, labels = sampling.read_reference(stream(data_set, batch_size=1, seed=0, num_lanes=1), 10**6)
    assert len(images) == NUM_IMAGES == len(labels)
    position = iter(range(0, NUM_IMAGES, 16))

    def sample(unet, scheduler, classes, *args):
        start = next(position)
        assert classes == labels[start : start + 16]
        return images[start : start + 16]

    monkeypatch.setattr(sampling, "sample", sample)
    network = load_feature_network(classifier)
    options = {"name": "classifier", "num_samples": NUM_IMAGES, "batch_size": 16}
    evaluate = sampling.open_evaluation(Accelerator(cpu=True), network, (images, labels), **options)
    (row,) = evaluate(sampling.sampled(evaluate, {"raw": None}, None, {1: [0]}, seed=0), ["raw"], [1])
    assert row["frechet_distance"] < 1e-3 and abs(row["kernel_distance"]) < 0.1
    assert all(row[key] == pytest.approx(evaluate.mark[key]) for key in ("diversity", "saturation"))
