"""The demo's teacher: a small Stable Diffusion of the digits, trained on a CPU."""

import math
from pathlib import Path

from common.networks import encoders
from common.tools.demo.digits import (
    NAMED,
    RESOLUTION,
    WORDS,
    build_tokenizer,
    canonical_prompts,
    load_split,
    save_tokenizer_files,
    to_tensor,
    write_card,
)

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessorPil,
)


def tokenize(tokenizer, prompts):
    return tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


def build_teacher(
    output_dir,
    prediction_type="epsilon",
    seed=0,
    vae_steps=400,
    vae_batch_size=64,
    unet_steps=1500,
    unet_channels=(32, 64),
    unet_batch_size=64,
    unet_learning_rate=2e-3,
    sdxl=False,
    captions=NAMED,
):
    """Train the autoencoder, then text encoders and U-Net together; save a StableDiffusion(XL)Pipeline."""
    torch.manual_seed(seed)
    (images, labels), _ = load_split()
    pixels, labels = to_tensor(images), torch.from_numpy(labels)

    vae = train_vae(pixels, vae_steps, vae_batch_size)
    pipeline = untrained_pipeline(vae, prediction_type, unet_channels, sdxl, captions)
    words = torch.from_numpy(captions.word_of(labels.numpy()))
    train_unet(pipeline, pixels, words, unet_steps, unet_batch_size, unet_learning_rate, captions)
    pipeline.save_pretrained(output_dir)
    for name in ("tokenizer", "tokenizer_2")[: 1 + sdxl]:
        save_tokenizer_files(getattr(pipeline, name), Path(output_dir) / name)
    kind = "SDXL" if sdxl else "Stable Diffusion"
    empty = "10 % captions left out, as zeros" if sdxl else "10 % empty prompts"
    write_card(
        output_dir,
        f"A small {kind} of handwritten digits",
        f"{RESOLUTION} pixels, prediction_type {prediction_type}, seed {seed}: {vae_steps} steps of the autoencoder, "
        f"{unet_steps} of U-Net and text encoder (batch {unet_batch_size}), {empty}. "
        f'Prompts such as "{canonical_prompts(1, captions)[0]}"; guidance_scale 1.5 to 2.',
    )


def untrained_pipeline(vae, prediction_type, unet_channels, sdxl, captions=NAMED):
    """`vae` and random weights: one text encoder 64 wide, or, as in SDXL, two that are 32 wide, one of them pooled."""
    width = 32 if sdxl else 64
    tokenizer = build_tokenizer(captions=captions)
    text_encoder = CLIPTextModel(text_config(tokenizer, width))
    addition = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": width + 6 * 8,
    }
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 2,
        in_channels=4,
        out_channels=4,
        block_out_channels=unet_channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
        **(addition if sdxl else {}),
    )
    scheduler = build_scheduler(prediction_type, sdxl)
    parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet, "scheduler": scheduler}
    if not sdxl:
        return StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    parts["tokenizer_2"] = build_tokenizer(pad_token="!", captions=captions)
    parts["text_encoder_2"] = CLIPTextModelWithProjection(text_config(parts["tokenizer_2"], width))
    return StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=True, add_watermarker=False)


def text_config(tokenizer, width):
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_scheduler(prediction_type, sdxl):
    """What the checkpoints ship with: PNDM in Stable Diffusion, Euler in SDXL; DDIM where those know no x_0."""
    schedule = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "prediction_type": prediction_type,
        "clip_sample": False,  # as those ship it, for the schedulers that are made of theirs and know it
    }
    if prediction_type == "sample":
        return DDIMScheduler(**schedule, set_alpha_to_one=False)
    if sdxl:
        return EulerDiscreteScheduler.from_config(schedule, timestep_spacing="leading")
    return PNDMScheduler.from_config(schedule, skip_prk_steps=True)


def train_vae(pixels, steps, batch_size=64, learning_rate=2e-3, kl_weight=1e-3):
    """Pixels (N, 3, 16, 16) to latents (N, 4, 8, 8): squared error plus a small KL term, no adversary."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=RESOLUTION,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), learning_rate, weight_decay=0.0)
    schedule = cosine_schedule(optimizer, steps)
    progress = tqdm(range(steps), desc="autoencoder", unit="step")
    for _ in progress:
        batch = pixels[torch.randint(len(pixels), (batch_size,))]
        posterior = vae.encode(batch).latent_dist
        error = F.mse_loss(vae.decode(posterior.sample()).sample, batch)
        loss = error + kl_weight * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(mse=f"{error.item():.4f}", refresh=False)
    vae.eval().requires_grad_(False)
    standardize_latents(vae, pixels)
    return vae


def standardize_latents(vae, pixels):
    """Give each latent channel zero mean and the same std; the convolutions beside it take the inverse, exactly."""
    mean, std = encode(vae, pixels)
    latents = mean + std * torch.randn_like(mean)
    shift, scale = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)) / latents.std()  # (4,)
    before, after = vae.quant_conv, vae.post_quant_conv
    before.weight.data[:4] /= scale.view(4, 1, 1, 1)
    before.bias.data[:4] = (before.bias.data[:4] - shift) / scale
    before.bias.data[4:] -= 2 * scale.log()  # the log variance
    after.bias.data += after.weight.data[:, :, 0, 0] @ shift
    after.weight.data *= scale.view(1, 4, 1, 1)
    mean, std = encode(vae, pixels)
    vae.register_to_config(scaling_factor=1 / (mean + std * torch.randn_like(mean)).std().item())


@torch.no_grad()
def encode(vae, pixels):
    """Mean and standard deviation of the latents, both (N, 4, 8, 8), not scaled."""
    moments = [vae.encode(batch).latent_dist for batch in pixels.split(256)]
    return torch.cat([m.mean for m in moments]), torch.cat([m.std for m in moments])


def train_unet(pipeline, pixels, words, steps, batch_size, learning_rate, captions=NAMED):
    """Ordinary diffusion training, with one caption template a step; what stays in the models is their average.

    words: (N,) int64, the index in captions.words of each image's.
    """
    vae, unet = pipeline.vae, pipeline.unet
    text_encoders = encoders.text_encoders(pipeline)
    tokenizers = [getattr(pipeline, name) for name in ("tokenizer", "tokenizer_2")[: len(text_encoders)]]
    latent_mean, latent_std = encode(vae, pixels)
    templates, empty = captions.templates, len(captions.words)
    texts = [[template.format(word) for word in captions.words] + [""] for template in templates]
    token_ids = [[tokenize(tokenizer, each) for tokenizer in tokenizers] for each in texts]  # each (W + 1, 77)
    alphas_cumprod = pipeline.scheduler.alphas_cumprod.view(-1, 1, 1, 1)
    prediction_type = pipeline.scheduler.config.prediction_type

    parameters = [*unet.parameters(), *(p for text_encoder in text_encoders for p in text_encoder.parameters())]
    averages = [parameter.detach().clone() for parameter in parameters]
    averaged_steps = max(steps // 20, 1)
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.01)
    schedule = cosine_schedule(optimizer, steps)
    progress = tqdm(range(steps), desc="U-Net and text encoder", unit="step")
    for step in progress:
        index = torch.randint(len(words), (batch_size,))
        latents = latent_mean[index] + latent_std[index] * torch.randn_like(latent_mean[index])
        latents = latents * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        # one timestep from each of batch_size equal parts of the range
        timesteps = ((torch.arange(batch_size) + torch.rand(batch_size)) * (1000 / batch_size)).long()
        alpha_t, sigma_t = alphas_cumprod[timesteps].sqrt(), (1 - alphas_cumprod[timesteps]).sqrt()
        noisy_latents = alpha_t * latents + sigma_t * noise

        prompt = torch.where(torch.rand(batch_size) < 0.1, empty, words[index])  # 10 % empty
        template = torch.randint(len(templates), ()).item()
        prediction = unet(noisy_latents, timesteps, **condition(text_encoders, token_ids[template], prompt)).sample
        if prediction_type == "epsilon":
            loss = F.mse_loss(prediction, noise)
        elif prediction_type == "v_prediction":
            loss = F.mse_loss(prediction, alpha_t * noise - sigma_t * latents)
        else:
            loss = ((prediction - latents) ** 2 * (alpha_t / sigma_t).square().clamp(1, 20)).mean()
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
    unet.eval().requires_grad_(False)
    for text_encoder in text_encoders:
        text_encoder.eval().requires_grad_(False)


def condition(text_encoders, token_ids, prompt):
    """What the U-Net is told, with gradients: the captions `prompt` (B,) out of W + 1, the last of them empty.

    token_ids: (W + 1, 77) for each encoder. As in SDXL, two encoders give their states before the last layer, the
    second its pooled state too, and no caption is all zeros.
    """
    if len(text_encoders) == 1:
        return {"encoder_hidden_states": text_encoders[0](token_ids[0])[0][prompt]}  # (B, 77, 64)
    outputs = [e(ids, output_hidden_states=True) for e, ids in zip(text_encoders, token_ids, strict=True)]
    has_caption = (prompt < len(token_ids[0]) - 1).float().view(-1, 1)
    prompt_embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)[prompt]  # (B, 77, 64)
    time_ids = torch.tensor([RESOLUTION, RESOLUTION, 0, 0, RESOLUTION, RESOLUTION]).expand(len(prompt), -1)
    return {
        "encoder_hidden_states": prompt_embeds * has_caption[:, :, None],
        "added_cond_kwargs": {"text_embeds": outputs[1].text_embeds[prompt] * has_caption, "time_ids": time_ids},
    }


def cosine_schedule(optimizer, steps):
    """Linear warm-up over a twentieth of the steps, then a cosine to zero."""
    warmup = max(steps // 20, 1)

    def factor(step):
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(step / max(steps, 1), 1)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def build_classifier(output_dir, seed=0, steps=600, batch_size=64, learning_rate=3e-3):
    """Train a small ResNet on the digits and return its held-out accuracy; its pooled features have 64 dimensions."""
    torch.manual_seed(seed)
    (images, labels), (held_out_images, held_out_labels) = load_split()
    pixels, labels = to_tensor(images), torch.from_numpy(labels)
    model = ResNetForImageClassification(
        ResNetConfig(
            num_channels=3,
            embedding_size=32,
            hidden_sizes=[32, 64],
            depths=[1, 1],
            layer_type="basic",
            id2label=dict(enumerate(WORDS)),
            label2id={word: index for index, word in enumerate(WORDS)},
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.05)
    schedule = cosine_schedule(optimizer, steps)
    progress = tqdm(range(steps), desc="classifier", unit="step")
    for _ in progress:
        index = torch.randint(len(labels), (batch_size,))
        batch = shift(pixels[index])
        loss = F.cross_entropy(model(batch).logits, labels[index], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    model.eval()
    with torch.no_grad():
        predicted = model(to_tensor(held_out_images)).logits.argmax(dim=1).numpy()
    accuracy = float((predicted == held_out_labels).mean())
    print(f"classifier: accuracy {accuracy:.4f} on {len(held_out_labels)} held-out digits")

    model.save_pretrained(output_dir)
    ViTImageProcessorPil(
        size={"height": RESOLUTION, "width": RESOLUTION}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(output_dir)
    write_card(
        output_dir,
        "A classifier of handwritten digits",
        f"ResNet for {RESOLUTION} pixels, accuracy {accuracy:.4f} on {len(held_out_labels)} held-out digits.",
    )
    return accuracy


def shift(pixels):
    """Move each image by up to one pixel in each direction, over black."""
    batch_size, _, height, width = pixels.shape
    padded = F.pad(pixels, (1, 1, 1, 1), value=-1.0)
    rows = torch.arange(height) + torch.randint(3, (batch_size, 1))  # (B, H)
    columns = torch.arange(width) + torch.randint(3, (batch_size, 1))  # (B, W)
    batch = torch.arange(batch_size)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
