"""What a denoiser is told and given: prompts, sizes and latents, by the teacher's text encoders and VAE."""

import math

from common.errors import UserError

import torch

VAE_ENCODE_BATCH_SIZE = {False: 32, True: 2}  # by whether it is an SDXL, whose VAE takes 2.5 GiB an image in float32


NUM_TIME_IDS = 6  # original height and width, crop top and left, target height and width


def is_sdxl(pipeline):
    return getattr(pipeline, "text_encoder_2", None) is not None


def text_encoders(pipeline):
    """The pipeline's one (SD) or two (SDXL) text encoders."""
    return [pipeline.text_encoder, pipeline.text_encoder_2] if is_sdxl(pipeline) else [pipeline.text_encoder]


def to_device(pipeline, config, device, weight_dtype):
    """The VAE and the text encoders of a teacher on `device`, in the dtype that they compute in."""
    pipeline.vae.to(device, vae_dtype(config, weight_dtype))
    for text_encoder in text_encoders(pipeline):
        text_encoder.to(device, weight_dtype)


def vae_dtype(config, weight_dtype):
    """The dtype that the VAE computes in: `weight_dtype`, but float32 for a VAE of SDXL that overflows in float16, as
    its `force_upcast` says. The Stable Diffusion pipeline does not ask for that, whose VAEs do not overflow.

    config: as from `read_teacher_config`, of the VAE that is used.
    """
    return torch.float32 if config["is_sdxl"] and config["vae"].get("force_upcast", True) else weight_dtype


@torch.no_grad()
def conditioning(pipeline, captions, time_ids=None):
    """The keyword arguments that tell a U-Net the captions, as the stock pipeline makes them.

    captions: B strings. time_ids: (B, 6) as from `time_ids`; used by SDXL alone. Returns {"encoder_hidden_states":
    (B, 77, d)} and for SDXL "added_cond_kwargs": {"text_embeds": (B, p), "time_ids": (B, 6)} too: embeddings in the
    text encoders' dtype, time_ids as they are, all on the text encoders' device.
    """
    # Not by the pipeline's encode_prompt, whose copy to the device waits for all that the device has queued.
    if not is_sdxl(pipeline):
        return {"encoder_hidden_states": _encode_text(pipeline.tokenizer, pipeline.text_encoder, captions)[0]}
    first = _encode_text(pipeline.tokenizer, pipeline.text_encoder, captions, output_hidden_states=True)
    second = _encode_text(pipeline.tokenizer_2, pipeline.text_encoder_2, captions, output_hidden_states=True)
    hidden_states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    cond = {"encoder_hidden_states": hidden_states, "added_cond_kwargs": {"text_embeds": second[0]}}
    if time_ids is not None:
        cond["added_cond_kwargs"]["time_ids"] = time_ids.to(hidden_states.device, non_blocking=True)
    return cond


def _encode_text(tokenizer, text_encoder, captions, **options):
    length = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    tokens = tokenizer(captions, return_tensors="pt", **length)
    if getattr(text_encoder.config, "use_attention_mask", False):
        options["attention_mask"] = tokens.attention_mask.to(text_encoder.device, non_blocking=True)
    return text_encoder(tokens.input_ids.to(text_encoder.device, non_blocking=True), **options)


@torch.no_grad()
def uncond_conditioning(pipeline):
    """`conditioning` without a caption for one sample, (1, 77, d) and (1, p), without time_ids; made once for a run.

    It is the empty prompt's; zeros for an SDXL with `force_zeros_for_empty_prompt`.
    """
    uncond = conditioning(pipeline, [""])
    if is_sdxl(pipeline) and pipeline.config.force_zeros_for_empty_prompt:
        uncond["encoder_hidden_states"].zero_()
        uncond["added_cond_kwargs"]["text_embeds"].zero_()
    return uncond


def concat_conditioning(cond, uncond, dtype=None):
    """Keyword arguments for one forward over 2B samples: B as in `cond`, then the same B without their captions.

    cond: as from `conditioning`; uncond: as from `uncond_conditioning`. The second half has the first half's time_ids.
    dtype: what the embeddings are cast to; time_ids stay integers.
    """

    def concat(with_caption, without):
        return torch.cat([with_caption, without.expand_as(with_caption)]).to(dtype or with_caption.dtype)

    both = {"encoder_hidden_states": concat(cond["encoder_hidden_states"], uncond["encoder_hidden_states"])}
    if "added_cond_kwargs" in cond:
        added = cond["added_cond_kwargs"]
        both["added_cond_kwargs"] = {
            "text_embeds": concat(added["text_embeds"], uncond["added_cond_kwargs"]["text_embeds"]),
            "time_ids": added["time_ids"].repeat(2, 1),
        }
    return both


def time_ids(batch, resolution, fix_crop_and_size=False):
    """What SDXL is told of a sample's origin: int64 (B, 6), original height and width, crop top
    and left, target height and width.

    batch: with `original_sizes` int64 (B, 2), (height, width) before the resize, and `crop_top_lefts` int64 (B, 2),
    (top, left) of the crop. resolution: in pixels. fix_crop_and_size: say of every sample that it was never resized
    or cropped, as the pipeline does by default. Integers, so that no cast to a half precision rounds them.
    """
    original_sizes, crop_top_lefts = batch["original_sizes"], batch["crop_top_lefts"]
    target_sizes = torch.full_like(original_sizes, resolution)
    if fix_crop_and_size:
        original_sizes, crop_top_lefts = target_sizes, torch.zeros_like(crop_top_lefts)
    return torch.cat([original_sizes, crop_top_lefts, target_sizes], dim=1)


@torch.no_grad()
def encode_batch(vae, batch, generator, batch_size):
    """Latents z_0 (B, 4, h, w) of a micro-batch, float32 on the VAE's device, as from `encode_images`.

    batch: with `images` uint8 (B, 3, H, W), or with the cached `latent_means` and `latent_stds` float16 (B, 4, h, w),
    of which the same draws of `generator` make the same latents up to float16's rounding; no encoder is needed then.
    """
    if "images" in batch:
        return encode_images(vae, batch["images"].to(vae.device, non_blocking=True), generator, batch_size)
    mean, std = (batch[name].to(vae.device, non_blocking=True).float() for name in ("latent_means", "latent_stds"))
    return _sample_posterior(vae, mean, std, generator)


@torch.no_grad()
def encode_images(vae, images, generator, batch_size):
    """Latents z_0 = sample of the posterior * scaling_factor, float32; with the VAE's latents_mean and latents_std
    (4,), z_0 = (sample - mean) / std * scaling_factor, what the SDXL pipeline undoes.

    images: uint8 (B, 3, H, W) on the VAE's device, encoded `batch_size` at a time in the VAE's dtype. generator: the
    device generator of the posterior's noise. Returns (B, 4, h, w).
    """
    return _sample_posterior(vae, *posterior(vae, images, batch_size), generator)


@torch.no_grad()
def posterior(vae, images, batch_size):
    """Mean and standard deviation (B, 4, h, w) float32 of the latents of uint8 images, neither shifted nor scaled."""
    pixels = (images.float() / 127.5 - 1.0).to(vae.dtype)
    moments = torch.cat([vae.encode(chunk).latent_dist.parameters for chunk in pixels.split(batch_size)]).float()
    mean, logvar = moments.chunk(2, dim=1)
    return mean, (0.5 * logvar.clamp(-30.0, 20.0)).exp()


def _sample_posterior(vae, mean, std, generator):
    latents = mean + std * torch.randn(mean.shape, generator=generator, device=mean.device)
    shift, scale = _shift_and_scale(vae)
    return (latents - shift) * scale


@torch.no_grad()
def decode_latents(vae, latents):
    """The inverse of `encode_images`: latents z_0 (B, 4, h, w) -> images (B, 3, H, W) float32, about -1 to 1."""
    shift, scale = _shift_and_scale(vae)
    return vae.decode((latents.float() / scale + shift).to(vae.dtype)).sample.float()


def _shift_and_scale(vae):
    shift, scale = 0.0, vae.config.scaling_factor  # a VAE with a `shift_factor` is refused
    if vae.config.latents_mean is not None and vae.config.latents_std is not None:
        mean, std = vae.config.latents_mean, vae.config.latents_std
        shift, std = (torch.tensor(x, device=vae.device).view(1, -1, 1, 1) for x in (mean, std))
        scale = scale / std
    return shift, scale


def check_resolution(config, resolution):
    """UserError unless `resolution` is a whole number of latents, and of 8, which the pipelines ask for."""
    multiple = math.lcm(vae_scale_factor(config["vae"]), 8)
    if resolution % multiple:
        raise UserError(f"`resolution`={resolution} is not a multiple of {multiple}, as VAE and pipeline need")


def latent_shape(vae_config, resolution):
    """(C, h, w) of the latents of square images."""
    size = resolution // vae_scale_factor(vae_config)
    return vae_config.get("latent_channels", 4), size, size


def vae_scale_factor(vae_config):
    """How many pixels one latent is wide: 2 per level but the first."""
    return 2 ** (len(vae_config["block_out_channels"]) - 1)
