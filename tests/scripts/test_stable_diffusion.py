"""The scripts from end to end, on the digits."""

import gc
import re
import shlex
import sys
import types
from pathlib import Path

import train_lcm_distill_lora_sd_wds as lcm_lora
import train_lcm_distill_sd_wds as lcm
from common.keyed_random import keyed_generator
from common.networks import lora, teachers
from common.run import checkpointing
from tests.cases import (
    LORA_SCRIPTS,
    SCRIPTS,
    SD_SCRIPTS,
    digests,
    image_tags,
    micro_batches,
    one_sentence,
    scalars,
    soak_but,
    train,
)
from tests.fork_server import run_processes
from tests.scripts.test_flags import GUIDES

import numpy as np
import pytest
import torch
from accelerate import tracking
from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler, ModelMixin, TCDScheduler
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

# --- the result


def test_the_result_is_a_pipeline_that_stock_diffusers_loads(tmp_path, flags):
    out, own = tmp_path / "out", {"num_ddim_timesteps": 20, "timestep_scaling_factor": 8}
    train(flags(out, **own, validation_steps=2, validation_num_inference_steps="1,2"))
    pipeline = DiffusionPipeline.from_pretrained(out)
    assert isinstance(pipeline.scheduler, LCMScheduler) and pipeline.scheduler.config.timestep_scaling == 8
    assert pipeline.scheduler.config.original_inference_steps == 20
    for steps in (1, 4):
        image = pipeline("a three", num_inference_steps=steps, guidance_scale=2.0, output_type="np").images[0]
        assert image.shape == (16, 16, 3) and np.isfinite(image).all()
    trained = load_file(out / "checkpoint-4" / "model.safetensors")
    target = load_file(out / "checkpoint-4" / "target_unet.safetensors")
    saved = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[k], v) for k, v in trained.items())
    saved_target = load_file(out / "unet_target" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved_target[k], v) for k, v in target.items())
    assert any(not torch.equal(trained[k], target[k]) for k in trained)
    assert (out / "sample_grid.png").is_file() and "guidance_scale" in (out / "README.md").read_text()
    assert not (out / "safety_checker").exists()
    tags = image_tags(out)
    assert tags == {f"validation/{name}_{k}_steps" for name in ("student", "target") for k in (1, 2)}


@pytest.mark.parametrize(
    ("script", "prediction_type"),
    [(lcm, "epsilon"), (lcm, "v_prediction"), (lcm, "sample"), (lcm_lora, "v_prediction")],
    ids=["epsilon", "v_prediction", "sample", "lora"],
)
def test_the_first_loss_is_the_one_that_diffusers_schedulers_give(
    tmp_path, flags, teacher, shards, prediction_type, script
):
    """Algorithm 1 again, from diffusers' parts: DDIMScheduler for the teacher's step, LCMScheduler for f.

    At step 0 student, target and teacher are one network, so the loss depends on every formula of step 7.
    """
    changes = {"pretrained_teacher_model": teacher(prediction_type), "max_train_steps": 1}
    train(flags(tmp_path / "out", script, **changes), script)
    logged = scalars(tmp_path / "out", "loss")[1]

    pipe = DiffusionPipeline.from_pretrained(teacher(prediction_type), safety_checker=None)
    batch = next(micro_batches(shards))
    draw = keyed_generator(1, "lcm", 0, "cpu")
    with torch.no_grad():
        posterior = pipe.vae.encode(batch["images"] / 127.5 - 1).latent_dist
        latents = posterior.sample(draw) * pipe.vae.config.scaling_factor
        index = torch.randint(50, (4,), generator=draw)
        noise = torch.randn(latents.shape, generator=draw)
        w = 2 * torch.rand(4, generator=draw)
        embeds, _ = pipe.encode_prompt(batch["captions"], "cpu", 1, False)
        uncond, _ = pipe.encode_prompt([""], "cpu", 1, False)
        config = {"timestep_spacing": "trailing", "set_alpha_to_one": False, "clip_sample": False}
        ddim = DDIMScheduler.from_config(pipe.scheduler.config, **config)
        boundary = LCMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        ddim.set_timesteps(50)
        boundary.set_timesteps(1)
        losses = []
        for i in range(4):
            t, text = 20 * int(index[i]) + 19, embeds[i : i + 1]
            z = ddim.add_noise(latents[i : i + 1], noise[i : i + 1], torch.tensor([t]))
            cond, unc = pipe.unet(z, t, text).sample, pipe.unet(z, t, uncond).sample
            z_prev = ddim.step(unc + (w[i] + 1) * (cond - unc), t, z).prev_sample
            before = max(t - 20, 0)

            def f(z, t, text=text):
                boundary._step_index = None
                boundary.timesteps = torch.tensor([t])
                return boundary.step(pipe.unet(z, t, text).sample, t, z).denoised

            losses.append((f(z, t) - f(z_prev, before)).square().mean())
    assert logged == pytest.approx(torch.stack(losses).mean().item(), rel=2e-4)


def stock_pipeline(teacher_dir, lora_dir=None, weight_name=None):
    pipeline = DiffusionPipeline.from_pretrained(teacher_dir)
    if lora_dir:
        pipeline.load_lora_weights(lora_dir, **({"weight_name": weight_name} if weight_name else {}))
        scheduler = LCMScheduler if LCMScheduler.__name__ in Path(lora_dir, "README.md").read_text() else TCDScheduler
        pipeline.scheduler = scheduler.from_pretrained(lora_dir, subfolder="scheduler")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_lora_that_stock_diffusers_loads_is_the_student_that_was_trained(tmp_path, flags, teacher):
    out = tmp_path / "out"
    train(flags(out, lcm_lora, learning_rate=0.01, validation_steps=2), lcm_lora)
    trained = teachers.load_teacher(teacher()).unet
    lora.add_lora(trained, 4, 6)
    for name, tensor in load_file(out / "checkpoint-4" / "adapters.safetensors").items():
        lora.adapter_tensors(trained)[name].data.copy_(tensor)
    z, t, text = torch.randn(2, 4, 8, 8), torch.tensor([999, 19]), torch.randn(2, 77, 64)
    with torch.no_grad():
        student = trained(z, t, text).sample
        with lora.adapters_off(trained):
            base = trained(z, t, text).sample
        assert (student - base).abs().max() > 1e-2
        # of weights in other memory: equal up to rounding
        torch.testing.assert_close(base, stock_pipeline(teacher()).unet(z, t, text).sample)
        for weight_name in (None, "pytorch_lora_weights_kohya.safetensors"):
            loaded = stock_pipeline(teacher(), out, weight_name)
            assert (student - loaded.unet(z, t, text).sample).abs().max() <= 1e-6
    image = loaded("a three", num_inference_steps=4, guidance_scale=1.0, output_type="np").images[0]
    assert np.isfinite(image).all() and image.std() > 0
    train(flags(tmp_path / "next", lcm_lora, learning_rate=0, init_lora=out, max_train_steps=1), lcm_lora)  # goes on
    again = load_file(tmp_path / "next" / "checkpoint-1" / "adapters.safetensors")
    assert all(torch.equal(lora.adapter_tensors(trained)[name], tensor) for name, tensor in again.items())


def live_bytes():
    """Bytes of all tensors alive in this process that have memory, each storage once."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if torch.is_tensor(o) and o.device.type == "cpu"]
    tensors = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_only_adapters_train_and_one_network_is_resident(tmp_path, flags, teacher, monkeypatch):
    """Alive in the loop: the teacher's pipeline once; the adapters, their gradients, two moments; and little else."""
    parts = teachers.load_teacher(teacher()).components.values()
    sizes = [part.num_parameters() for part in parts if hasattr(part, "num_parameters")]
    del parts
    held, before, save = [], live_bytes(), checkpointing.save_checkpoint

    def measure(accelerator, *args):
        unets = [o for o in gc.get_objects() if isinstance(o, teachers.UNet2DConditionModel)]
        trained = {name: p.numel() for name, p in unets[0].named_parameters() if p.requires_grad}
        held.append((len(unets), live_bytes() - before, trained))
        return save(accelerator, *args)

    monkeypatch.setattr(checkpointing, "save_checkpoint", measure)
    train(flags(tmp_path / "out", lcm_lora, max_train_steps=2), lcm_lora)
    number, alive, trained = held[0]
    assert number == 1 and trained and all("lora_" in name for name in trained)
    expected = 4 * sum(sizes) + 16 * sum(trained.values())
    assert 0.9 * expected < alive < 1.25 * expected  # a second U-Net would make it 1.5 times or more


@pytest.mark.parametrize("name", soak_but("tscd_lora", names=SD_SCRIPTS))
def test_sdxl_teachers_run_in_the_same_script(tmp_path, flags, teacher, name):
    script = SD_SCRIPTS[name]
    changes = {"pretrained_teacher_model": teacher("sdxl"), "use_fix_crop_and_size": True, "mixed_precision": "bf16"}
    train(flags(tmp_path, script, **changes, validation_steps=2), script)
    expected = digests(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "COMPLETE").unlink()
    train(flags(tmp_path, script, **changes, resume_from_checkpoint="latest"), script)
    assert digests(tmp_path / "checkpoint-4") == expected
    is_lora, guidance_scale = script in LORA_SCRIPTS, 2.0 if script is lcm else 1.0
    pipeline = stock_pipeline(*((teacher("sdxl"), tmp_path) if is_lora else (tmp_path,)))
    image = pipeline("a three", num_inference_steps=2, guidance_scale=guidance_scale, output_type="np").images[0]
    assert type(pipeline).__name__ == "StableDiffusionXLPipeline" and image.shape == (16, 16, 3) and image.std() > 0


# --- precision, optimizer, memory levers


@pytest.mark.parametrize("keep", [False, True])
def test_dtypes_of_every_network(tmp_path, flags, teacher, monkeypatch, keep):
    """The defects: autocast without a dtype is fp16; masters, target and loss must stay fp32, of unrounded weights."""
    seen = {}

    def watch(conv_in, args):
        name = "teacher" if len(args[0]) == 8 else "student" if torch.is_grad_enabled() else "target"
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        seen[name] = (conv_in.weight.dtype, dtype)

    make_student = teachers.make_student

    def patched(teacher_unet, *args, **kwargs):
        teacher_unet.conv_in.register_forward_pre_hook(watch)
        student = make_student(teacher_unet, *args, **kwargs)
        student.conv_in.register_forward_pre_hook(watch)
        return student

    monkeypatch.setattr(teachers, "make_student", patched)
    extra = {"no-cast_teacher_unet": True} if keep else {}
    extra |= {"learning_rate": 0, "adam_weight_decay": 0}
    train(flags(tmp_path / "out", mixed_precision="bf16", max_train_steps=1, **extra))
    assert seen["student"] == seen["target"] == (torch.float32, torch.bfloat16)
    assert seen["teacher"][0] == (torch.float32 if keep else torch.bfloat16)
    saved = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    original = load_file(Path(teacher(), "unet", "diffusion_pytorch_model.safetensors"))
    assert all(torch.equal(saved[name], tensor) for name, tensor in original.items())


# --- resume


def test_a_run_can_be_extended_passes_its_first_end_and_keeps_precision_and_data_seed(
    tmp_path, flags, capsys, monkeypatch
):
    train(flags(tmp_path / "a", max_train_steps=4, data_seed=7))
    assert "is less than the 4 updates of the checkpoint" in one_sentence(
        capsys, train, flags(tmp_path / "a", max_train_steps=3, resume_from_checkpoint="latest")
    )  # it has no weights of 3 updates to export
    train(flags(tmp_path / "b", max_train_steps=2, data_seed=7))
    extended = flags(tmp_path / "b", max_train_steps=4, resume_from_checkpoint="checkpoint-2", seed=None)
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        assert "--mixed_precision was 'no' and is 'bf16'" in one_sentence(capsys, train, extended)
    train(extended)
    assert digests(tmp_path / "a" / "checkpoint-4") == digests(tmp_path / "b" / "checkpoint-4")
    state = checkpointing.read_state(tmp_path / "b" / "checkpoint-4")
    assert state["args"]["data_seed"] == 7 and state["data"]["next_micro_batch"] == 4


KILLED = """
import os, signal
import common.run.checkpointing as c
fsync, calls = c.sync, []
def dying(path):
    calls.append(path)
    if "checkpoint-4" in str(path) and "COMPLETE" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(path)
c.sync = dying
"""


def test_kill_9_inside_a_save_loses_nothing(tmp_path, flags, script=lcm_lora):
    """At other moments and of every script: tests/soak/test_kills.py."""
    done = run_processes(flags(tmp_path / "b", script), script, prelude=KILLED)
    assert done.returncode != 0
    assert [c.name for c in checkpointing.list_checkpoints(tmp_path / "b")] == ["checkpoint-2"]
    assert (tmp_path / "b" / "checkpoint-4.tmp").is_dir()
    train(flags(tmp_path / "b", script, resume_from_checkpoint="latest"), script)
    train(flags(tmp_path / "a", script), script)
    assert digests(tmp_path / "a" / "checkpoint-4") == digests(tmp_path / "b" / "checkpoint-4")
    assert not list((tmp_path / "b").glob("*.tmp"))


def test_one_update_with_a_w_that_matters_a_clipped_gradient_and_an_ema(tmp_path, flags, teacher, shards):
    """From a student whose embedding of w is not zero: loss, clipping and EMA against their definitions."""
    start = teachers.make_student(teachers.load_teacher(teacher()).unet, 32)
    torch.nn.init.normal_(start.time_embedding.cond_proj.weight, generator=torch.Generator().manual_seed(3))
    start.save_pretrained(tmp_path / "start" / "unet")
    options = {"init_unet": tmp_path / "start", "max_train_steps": 1, "loss_type": "huber", "huber_c": 0.05}
    train(flags(tmp_path / "out", **options, ema_decay=0.7, max_grad_norm=0.01, learning_rate=1e-3))

    checkpoint = tmp_path / "out" / "checkpoint-1"
    before, after = start.state_dict(), load_file(checkpoint / "model.safetensors")
    for name, target in load_file(checkpoint / "target_unet.safetensors").items():
        torch.testing.assert_close(target, 0.7 * before[name] + 0.3 * after[name], atol=1e-6, rtol=1e-5)
    optimizer = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    clipped = torch.stack([s["exp_avg"].norm() / 0.1 for s in optimizer.values()]).norm()
    assert clipped.item() == pytest.approx(0.01, rel=1e-3)

    pipe = DiffusionPipeline.from_pretrained(teacher())
    batch, draw = next(micro_batches(shards)), keyed_generator(1, "lcm", 0, "cpu")
    with torch.no_grad():
        posterior = pipe.vae.encode(batch["images"] / 127.5 - 1).latent_dist
        latents = posterior.sample(draw) * pipe.vae.config.scaling_factor
        t = 20 * torch.randint(50, (4,), generator=draw) + 19
        noise = torch.randn(latents.shape, generator=draw)
        w = 2 * torch.rand(4, generator=draw)
        text, uncond = (pipe.encode_prompt(p, "cpu", 1, False)[0] for p in (batch["captions"], [""] * 4))
        ddim = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        z, boundary = ddim.add_noise(latents, noise, t), LCMScheduler()
        alphas = ddim.alphas_cumprod[t].view(-1, 1, 1, 1)
        cond, unc = pipe.unet(z, t, text).sample, pipe.unet(z, t, uncond).sample
        eps = cond + w.view(-1, 1, 1, 1) * (cond - unc)
        s = (t - 20).clamp(min=0)
        z_prev = ddim.add_noise((z - (1 - alphas).sqrt() * eps) / alphas.sqrt(), eps, s)
        w_embedding = pipe.get_guidance_scale_embedding(w, 32)

        def f(z, t):
            out = start.eval()(z, t, text, timestep_cond=w_embedding).sample
            c_skip, c_out = (c.view(-1, 1, 1, 1) for c in boundary.get_scalings_for_boundary_condition_discrete(t))
            a = ddim.alphas_cumprod[t].view(-1, 1, 1, 1)
            return c_skip * z + c_out * (z - (1 - a).sqrt() * out) / a.sqrt()

        expected = (((f(z, t) - f(z_prev, s)) ** 2 + 0.05**2).sqrt() - 0.05).mean()
    assert scalars(tmp_path / "out", "loss")[1] == pytest.approx(expected.item(), rel=2e-3)


# --- what a user meets


@pytest.mark.parametrize("name", soak_but("lcm", names=SD_SCRIPTS))  # the commands differ in few flags
def test_the_guides_command_runs_with_paths_changed(tmp_path, teacher, shards, name):
    """Excluded: fp16 (GPU only, bf16 here), wandb and the hub (network services)."""
    script = SD_SCRIPTS[name]
    command = re.sub(r"\$MODEL_(DIR|NAME)", teacher(), GUIDES[script.__name__])
    command = command.replace("$OUTPUT_DIR", str(tmp_path / "out"))
    command = command.replace("--push_to_hub", "")
    command = command.replace("fp16", "bf16").replace("wandb", "tensorboard").replace("=512", "=16")
    start, end = command.index("pipe:"), command.index("?download=true")
    command = command[:start] + "pipe:cat " + shards + command[end + len("?download=true") :]
    command = re.sub(r"max_train_steps=\d+", "max_train_steps=4", command).replace("workers=8", "workers=2")
    words = shlex.split(command.replace("\\\n", ""))
    start = words.index(f"{script.__name__}.py") + 1
    train(words[start:], script)
    assert checkpointing.completeness(tmp_path / "out" / "checkpoint-4") is None
    result = "pytorch_lora_weights.safetensors" if script in LORA_SCRIPTS else "model_index.json"
    assert (tmp_path / "out" / result).is_file()


def test_dry_run_checks_everything_and_writes_nothing(tmp_path, flags, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for owner in (ModelMixin, PreTrainedModel):  # what opens weights; a simulation has its own
        monkeypatch.setattr(owner, "from_pretrained", None)
    flags = flags(tmp_path / "out", dry_run=True, max_train_steps=None, num_train_epochs=2)
    result = lcm.main(lcm.parse_args(flags))
    out = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    for words in ("samples per epoch   1437", "updates             720", "card     12 GB is the smallest that holds"):
        assert words in out
    assert result.updates == 720 and result.samples == 4 and not result.waits


def test_tokens_are_written_nowhere(tmp_path, flags, monkeypatch):
    token, uploads = "hf_VerySecretToken", []
    monkeypatch.setattr(lcm.export, "push_to_hub", lambda *args: uploads.append(args) or "address")
    command = flags(tmp_path / "out", max_train_steps=2, hub_token=token, push_to_hub=True, validation_steps=1)
    monkeypatch.setattr(sys, "argv", ["train_lcm_distill_sd_wds.py", *command])
    train(command)
    assert uploads == [(str(tmp_path / "out"), None, token, False)]
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(written) > 20 and not [path for path in written if token.encode() in path.read_bytes()]
    assert "--hub_token=***" in (tmp_path / "out" / "README.md").read_text()


def test_every_tracker_is_served_through_accelerate_and_continued(tmp_path, flags, monkeypatch):
    """accelerate's own wandb and comet trackers, on stand-ins for the two packages that record what they are told."""
    started, logged = [], {"wandb": [], "comet_ml": []}

    class Run:
        def __init__(self, name):
            self.name = name

        def log(self, values, step=None):
            logged[self.name] += [(key, step) for key in values]

        def log_metric(self, key, value, step=None):
            logged[self.name].append((key, step))

        def log_image(self, image, name=None, step=None):
            logged[self.name].append((name, step))

        def __getattr__(self, name):  # set_step, log_parameters, finish, end
            return lambda *args, **kwargs: None

    def start(name):
        return lambda **options: started.append((name, options)) or Run(name)

    wandb, comet = types.ModuleType("wandb"), types.ModuleType("comet_ml")
    wandb.init, wandb.Image = start("wandb"), lambda image: image
    wandb.config = types.SimpleNamespace(update=lambda *args, **kwargs: None)
    comet.start, comet.__version__ = start("comet_ml"), "3.58.8"
    names = ["tensorboard", "wandb", "comet_ml"]
    for module in (wandb, comet):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(tracking, f"is_{module.__name__}_available", lambda: True)
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType(name) for name in names])
    every = {"report_to": ",".join(names), "validation_steps": 1, "max_train_steps": 2}
    train(flags(tmp_path / "out", **every))
    train(flags(tmp_path / "out", **every | {"max_train_steps": 4}, resume_from_checkpoint="latest"))
    images = {f"validation/{name}_1_steps" for name in ("student", "target")}
    assert images | {"loss"} <= {key for key, step in logged["wandb"] if step == 1}
    assert {f"{tag}/0" for tag in images} | {"loss"} <= {key for key, step in logged["comet_ml"] if step == 3}
    assert {step for key, step in logged["wandb"] if key == "loss"} == {1, 2, 3, 4}
    ids = [options.get("id") or options.get("experiment_key") for _, options in started]
    assert [name for name, _ in started] == ["wandb", "comet_ml"] * 2 and len(set(ids)) == 1 and ids[0]
    wandb_options = started[0][1]
    assert wandb_options["resume"] == "allow" and wandb_options["dir"] == str(tmp_path / "out" / "logs")


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_script_length(script):
    lines = Path(script.__file__).read_text().splitlines()
    start = lines.index("def main(args):")
    end = next(i for i in range(start + 1, len(lines)) if lines[i] and not lines[i].startswith((" ", ")")))
    assert sum(1 for line in lines if line.strip()) <= 350
    assert sum(1 for line in lines[start:end] if line.strip()) <= 240
