"""Teachers (Stable Diffusion layout), students and what they are conditioned on."""

from pathlib import Path

from common import UserError
from common.schedules import PREDICTION_TYPES

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

NOT_TRAINED = ("safety_checker", "feature_extractor", "image_encoder")  # neither loaded nor copied into outputs


def read_teacher_config(name, revision=None, variant=None, cache_dir=None):
    """The configurations of a teacher, without its weights: {"model_index", "unet", "vae", "scheduler",
    "text_encoder"}.

    name: a folder or hub repository in diffusers layout. Raises UserError when it is missing, partial, not a
    text-to-image latent diffusion model, or cannot be distilled (see `check_schedule`).
    """
    flag = f"--pretrained_teacher_model={name}"
    folder = Path(name)
    if folder.suffix == ".safetensors":
        return _read_single_file(flag, name, cache_dir)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise UserError(f"{flag}: the folder has no model_index.json, so it is not a pipeline in diffusers layout")
    options = {"revision": revision, "cache_dir": cache_dir}
    try:
        index = DiffusionPipeline.load_config(name, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"{flag}: neither a folder nor a model that the hub gives ({_line(error)})") from None
    parts = {part: index.get(part, [None, None])[1] for part in ("unet", "vae", "text_encoder", "scheduler")}
    wanted = {"unet": ("UNet2DConditionModel",), "vae": ("AutoencoderKL",)}
    wanted["text_encoder"] = ("CLIPTextModel", "CLIPTextModelWithProjection")
    for part, classes in wanted.items():
        if parts[part] not in classes:
            raise UserError(f"{flag}: not a text-to-image latent diffusion teacher, its {part} is {parts[part]}")
    if "text_encoder_2" in index:
        raise UserError(f"{flag}: an SDXL teacher, which is not trained yet; use an SD1.x or SD2.x teacher")
    for part in [key for key, value in index.items() if isinstance(value, list) and value[0] is not None]:
        if folder.is_dir() and part not in NOT_TRAINED:
            _check_part(flag, folder / part, variant)
    try:
        configs = {
            "unet": UNet2DConditionModel.load_config(name, subfolder="unet", **options),
            "vae": AutoencoderKL.load_config(name, subfolder="vae", **options),
            "scheduler": DDPMScheduler.load_config(name, subfolder="scheduler", **options),
            "text_encoder": CLIPTextConfig.from_pretrained(name, subfolder="text_encoder", **options),
        }
    except (OSError, ValueError) as error:
        raise UserError(f"{flag}: a part of the teacher is missing or unreadable ({_line(error)})") from None
    check_unet(flag, configs["unet"], configs["vae"])
    check_schedule(flag, configs["scheduler"])
    return {"model_index": index} | configs


def _read_single_file(flag, name, cache_dir):
    if not Path(name).is_file():
        raise UserError(f"{flag}: there is no such file")
    pipeline = load_teacher(name, cache_dir=cache_dir)  # one file holds no configuration: it is read off the weights
    configs = {part: dict(getattr(pipeline, part).config) for part in ("unet", "vae", "scheduler")}
    check_unet(flag, configs["unet"], configs["vae"])
    check_schedule(flag, configs["scheduler"])
    return {"model_index": dict(pipeline.config), "text_encoder": pipeline.text_encoder.config} | configs


def _line(error):
    return str(error).strip().split("\n")[0]


def _check_part(flag, folder, variant):
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not names:
        raise UserError(f"{flag}: the teacher is partial, its folder {folder.name}/ is missing or empty")
    is_model = "config.json" in names
    infix = f".{variant}." if variant else "."
    weights = [n for n in names if n.endswith((".safetensors", ".bin"))]
    if is_model and not any(infix in n for n in weights):
        what = f"weights of the variant {variant!r} (drop --variant)" if variant and weights else "weights"
        raise UserError(f"{flag}: the teacher is partial, its folder {folder.name}/ has no {what}")


def check_unet(flag, unet, vae):
    """UserError unless the U-Net's configuration denoises this VAE's latents and is conditioned on text alone."""
    channels = vae.get("latent_channels", 4)
    if unet["in_channels"] != channels or unet["out_channels"] != channels:
        raise UserError(
            f"{flag}: not a text-to-image teacher, its U-Net maps {unet['in_channels']} to {unet['out_channels']} "
            f"channels where the VAE has {channels} (inpainting and editing models cannot be used)"
        )
    for key in ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim_type"):
        if unet.get(key) is not None:
            raise UserError(f"{flag}: its U-Net has {key}={unet[key]!r}, only text conditioning is supported")
    if unet.get("time_cond_proj_dim") is not None:
        raise UserError(f"{flag}: its U-Net is already distilled (time_cond_proj_dim); use it as --init_unet instead")


def check_schedule(flag, scheduler):
    """UserError unless the scheduler's configuration has betas, a known prediction type, and invertible alphas."""
    prediction_type = scheduler.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(f"{flag}: prediction_type {prediction_type!r} is none of {', '.join(PREDICTION_TYPES)}")
    if "beta_schedule" not in scheduler and scheduler.get("trained_betas") is None:
        raise UserError(f"{flag}: its scheduler {scheduler.get('_class_name')} has no beta schedule")
    last = DDPMScheduler.from_config(scheduler).alphas_cumprod[-1]
    if prediction_type == "epsilon" and last < 1e-6:
        raise UserError(
            f"{flag}: zero terminal SNR (alpha_T = 0) with epsilon prediction cannot be inverted to x_0; "
            "use a v_prediction teacher or one without rescale_betas_zero_snr"
        )


def load_teacher(name, revision=None, variant=None, cache_dir=None, vae=None, vae_revision=None, **replaced):
    """The teacher as a diffusers pipeline: every weight float32 on the CPU, frozen, in eval mode.

    name: folder, hub repository, or one `.safetensors` file. vae: folder or hub name of another VAE, or None.
    replaced: parts that are there already and are not loaded (unet, scheduler).
    """
    options = {"cache_dir": cache_dir, "dtype": torch.float32}
    parts = options | replaced
    if Path(name).suffix == ".safetensors":
        pipeline = StableDiffusionPipeline.from_single_file(name, safety_checker=None, **parts)
    else:
        index = DiffusionPipeline.load_config(name, revision=revision, cache_dir=cache_dir)
        skipped = {part: None for part in NOT_TRAINED if part in index}
        if "safety_checker" in index:
            skipped["requires_safety_checker"] = False
        pipeline = DiffusionPipeline.from_pretrained(name, revision=revision, variant=variant, **skipped, **parts)
    if vae is not None:
        subfolder = "vae" if Path(vae, "vae", "config.json").is_file() else None
        pipeline.vae = AutoencoderKL.from_pretrained(vae, subfolder=subfolder, revision=vae_revision, **options)
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_student(teacher_unet, time_cond_proj_dim, init_unet=None):
    """A trainable float32 copy of the teacher's U-Net with an embedding of w, as wide as `time_cond_proj_dim`.

    The new projection `time_embedding.cond_proj` starts at zero, so that the student equals the teacher at step 0 for
    every w. init_unet: a folder with an earlier student to start from instead (its `unet/` when it is a pipeline).
    """
    if init_unet is not None:
        subfolder = "unet" if Path(init_unet, "unet").is_dir() else None
        unet = UNet2DConditionModel.from_pretrained(init_unet, subfolder=subfolder, dtype=torch.float32)
        if unet.config.time_cond_proj_dim != time_cond_proj_dim:
            raise UserError(
                f"--init_unet={init_unet}: its time_cond_proj_dim is {unet.config.time_cond_proj_dim}; pass the same "
                "number as --unet_time_cond_proj_dim"
            )
        return unet.train()
    unet = UNet2DConditionModel.from_config(dict(teacher_unet.config) | {"time_cond_proj_dim": time_cond_proj_dim})
    missing, unexpected = unet.load_state_dict(teacher_unet.state_dict(), strict=False)
    assert missing == ["time_embedding.cond_proj.weight"] and not unexpected, (missing, unexpected)
    torch.nn.init.zeros_(unet.time_embedding.cond_proj.weight)
    return unet.train()


@torch.no_grad()
def encode_prompts(pipeline, prompts):
    """Text embeddings as the stock pipeline makes them: list of B strings -> (B, 77, d), the text encoder's dtype."""
    return pipeline.encode_prompt(prompts, pipeline.text_encoder.device, 1, False)[0]


@torch.no_grad()
def encode_images(vae, images, generator, batch_size):
    """Latents z_0 = (sample of the posterior - shift) * scaling_factor, float32.

    images: uint8 (B, 3, H, W) on the VAE's device, encoded `batch_size` at a time in the VAE's dtype. generator: the
    device generator of the posterior's noise. Returns (B, 4, h, w).
    """
    pixels = images.to(vae.dtype) / 127.5 - 1.0
    moments = torch.cat([vae.encode(chunk).latent_dist.parameters for chunk in pixels.split(batch_size)]).float()
    mean, logvar = moments.chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    latents = mean + noise * (0.5 * logvar.clamp(-30.0, 20.0)).exp()
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def check_resolution(config, resolution):
    """UserError unless `resolution` is a whole number of latents."""
    multiple = vae_scale_factor(config["vae"])
    if resolution % multiple:
        raise UserError(f"--resolution={resolution} is not a multiple of {multiple}, the factor of the teacher's VAE")


def vae_scale_factor(vae_config):
    """How many pixels one latent is wide: 2 per level but the first."""
    return 2 ** (len(vae_config["block_out_channels"]) - 1)


def count_parameters_and_flops(config, resolution, **student_overrides):
    """Numbers for one sample without any weights (meta device), 2 FLOPs per multiply-add, attention included.

    config: as from `read_teacher_config`; resolution in pixels; student_overrides: what the student's U-Net
    configuration adds. Returns {"unet_parameters", "vae_parameters", "text_encoder_parameters",
    "unet_forward_flops", "vae_encode_flops", "text_encode_flops"}.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(config["unet"]) | student_overrides).eval()
        vae = AutoencoderKL.from_config(config["vae"]).eval()
        text_encoder = CLIPTextModel(config["text_encoder"]).eval()
        size = resolution // vae_scale_factor(config["vae"])
        latents = torch.empty(1, unet.config.in_channels, size, size)
        text = torch.empty(1, 77, unet.config.cross_attention_dim)
        w = unet.config.time_cond_proj_dim and torch.empty(1, unet.config.time_cond_proj_dim)
        with torch.no_grad(), FlopCounterMode(display=False) as unet_flops:
            unet(latents, torch.empty(1, dtype=torch.long), encoder_hidden_states=text, timestep_cond=w)
        with torch.no_grad(), FlopCounterMode(display=False) as vae_flops:
            vae.encode(torch.empty(1, vae.config.in_channels, resolution, resolution))
        with torch.no_grad(), FlopCounterMode(display=False) as text_flops:
            text_encoder(torch.empty(1, 77, dtype=torch.long))
    return {
        "unet_parameters": sum(p.numel() for p in unet.parameters()),
        "vae_parameters": sum(p.numel() for p in vae.parameters()),
        "text_encoder_parameters": sum(p.numel() for p in text_encoder.parameters()),
        "unet_forward_flops": unet_flops.get_total_flops(),
        "vae_encode_flops": vae_flops.get_total_flops(),
        "text_encode_flops": text_flops.get_total_flops(),
    }
