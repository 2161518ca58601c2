"""The demo's second teacher: a small Stable Diffusion 3 of the digits, a transformer trained with flow matching.

A StableDiffusion3Pipeline in everything but its size: AutoencoderKL, two CLIP text encoders with projections and a T5,
SD3Transformer2DModel, FlowMatchEulerDiscreteScheduler with shift 3. Left out: no text is longer than TEXT_LENGTH and
T5_LENGTH tokens, and calls say so with CALL_KWARGS, since the pipeline would add 256 tokens of padding to 16 patches.
"""

from pathlib import Path

from common.tools.demo import digits, stable_diffusion

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast

TEXT_LENGTH, T5_LENGTH = 12, 8  # tokens of a caption: CLIP's, T5's
CALL_KWARGS = {"max_sequence_length": T5_LENGTH}  # for every call of this teacher and its students
SHIFT = 3.0


def build_teacher(
    output_dir, seed=0, vae_steps=400, steps=2500, batch_size=64, learning_rate=2e-3, width=64, layers=6
):
    """Train the autoencoder, then text encoders and transformer together; save a StableDiffusion3Pipeline."""
    torch.manual_seed(seed)
    (images, labels), _ = digits.load_split()
    pixels, labels = digits.to_tensor(images), torch.from_numpy(labels)

    vae = stable_diffusion.train_vae(pixels, vae_steps)
    vae.register_to_config(shift_factor=0.0)
    pipeline = untrained_pipeline(vae, width, layers)
    train_transformer(pipeline, pixels, labels, steps, batch_size, learning_rate)
    pipeline.save_pretrained(output_dir)
    for name in ("tokenizer", "tokenizer_2"):
        digits.save_tokenizer_files(getattr(pipeline, name), Path(output_dir) / name)
    digits.write_card(
        output_dir,
        "A small Stable Diffusion 3 of handwritten digits",
        f"{digits.RESOLUTION} pixels, flow matching, seed {seed}: {vae_steps} steps of the autoencoder, {steps} of "
        f"transformer and text encoders (batch {batch_size}), 10 % empty prompts. "
        f'Prompts such as "{digits.canonical_prompts(1)[0]}"; guidance_scale 2, {T5_LENGTH} T5 tokens.',
    )


def untrained_pipeline(vae, width=64, layers=6):
    """`vae` and random weights: two text encoders 32 wide, a transformer over 4 x 4 patches of the 8 x 8 latents."""
    tokenizers = [digits.build_tokenizer(), digits.build_tokenizer(pad_token="!")]
    for tokenizer in tokenizers:
        tokenizer.model_max_length = TEXT_LENGTH
    encoders = []
    for tokenizer in tokenizers:
        config = stable_diffusion.text_config(tokenizer, 32).to_dict() | {"max_position_embeddings": TEXT_LENGTH}
        encoders.append(CLIPTextModelWithProjection(CLIPTextConfig(**config)))
    tokenizer_3 = build_t5_tokenizer()
    text_encoder_3 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer_3),
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=1,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )
    transformer = SD3Transformer2DModel(
        sample_size=digits.RESOLUTION // 2,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=width // 16,
        joint_attention_dim=64,
        caption_projection_dim=width,
        pooled_projection_dim=64,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


def build_t5_tokenizer():
    """A T5 tokenizer with one token for each word of the captions; any other word is the unknown one."""
    words = sorted({word for template in digits.TEMPLATES for word in template.split()} - {"{}", "{},"})
    words += [word + comma for word in digits.WORDS for comma in ("", ",")]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5TokenizerFast(vocab=special + [("\u2581" + word, -1.0) for word in words], extra_ids=0)


def train_transformer(pipeline, pixels, labels, steps, batch_size, learning_rate):
    """Flow matching, z_t = (1 - t) z_0 + t eps with target eps - z_0 (Esser et al., arXiv 2403.03206, section 2), one
    caption template a step; what stays in the models is their average."""
    vae, transformer = pipeline.vae, pipeline.transformer
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]
    latent_mean, latent_std = stable_diffusion.encode(vae, pixels)
    captions = [[t.format(word) for word in digits.WORDS] + [""] for t in digits.TEMPLATES]

    parameters = [p for module in (transformer, *encoders) for p in module.parameters()]
    averages = [parameter.detach().clone() for parameter in parameters]
    averaged_steps = max(steps // 20, 1)
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.01)
    schedule = stable_diffusion.cosine_schedule(optimizer, steps)
    progress = tqdm(range(steps), desc="transformer and text encoders", unit="step")
    for step in progress:
        index = torch.randint(len(labels), (batch_size,))
        latents = latent_mean[index] + latent_std[index] * torch.randn_like(latent_mean[index])
        latents = latents * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        # t from each of batch_size equal parts of (0, 1)
        t = ((torch.arange(batch_size) + torch.rand(batch_size)) / batch_size).view(-1, 1, 1, 1)
        noisy_latents = (1 - t) * latents + t * noise

        prompt = torch.where(torch.rand(batch_size) < 0.1, 10, labels[index])  # 10 % empty
        template = torch.randint(len(digits.TEMPLATES), ()).item()
        embeds, _, pooled, _ = pipeline.encode_prompt(
            captions[template], None, None, do_classifier_free_guidance=False, **CALL_KWARGS
        )
        prediction = transformer(
            hidden_states=noisy_latents,
            timestep=t.flatten() * 1000,
            encoder_hidden_states=embeds[prompt],
            pooled_projections=pooled[prompt],
        ).sample
        loss = F.mse_loss(prediction, noise - latents)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()

        decay = min(1 - 1 / averaged_steps, (1 + step) / (10 + step))
        torch._foreach_lerp_(averages, [parameter.detach() for parameter in parameters], 1 - decay)
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    for parameter, average in zip(parameters, averages, strict=True):
        parameter.data.copy_(average)
    for module in (transformer, *encoders):
        module.eval().requires_grad_(False)
