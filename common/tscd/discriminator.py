"""The discriminator of adversarial distillation: the teacher's encoder with a head that tells real from fake latents.

As in SDXL-Lightning (2402.13929, Section 3.3): it works on noised latents, sees the time and the text as the U-Net
does, and first also the point x_t of the trajectory that the student started from (conditional), then not.
"""

import contextlib
import copy
import math

from common.networks import outlines
from common.run import simulation

import torch


class Discriminator(torch.nn.Module):
    """Logits for "this is the teacher's" from the features of the U-Net's middle block.

    unet: the teacher's float32 UNet2DConditionModel; its embeddings, down and mid blocks are copied. latent_size: the
    height and width of the latents. frozen_dtype: train the head alone and keep the encoder in this dtype; None: train
    both in float32. device: where it is made. Parameters require gradients only inside `trainable()`, so that the
    student's loss leaves none.
    """

    def __init__(self, unet, latent_size, frozen_dtype=None, device="cpu"):
        super().__init__()
        self.encoder, self.freeze_encoder = copy_encoder(unet), frozen_dtype is not None
        torch.nn.Module.to(self.encoder, frozen_dtype or torch.float32)  # diffusers' own warns of nothing at length
        self.channels = unet.config.block_out_channels[-1]
        num_downsamplers = sum(block.downsamplers is not None for block in unet.down_blocks)
        self.feature_size = math.ceil(latent_size / 2**num_downsamplers)
        self.head = make_head(self.channels, self.feature_size, seed=0)
        if outlines.is_one(self.encoder):
            outlines.load(self.encoder, device)
        self.initial_encoder = None
        if not self.freeze_encoder and _is_main():
            # stays in the main process's main memory; taken before a checkpoint is loaded into the encoder
            self.initial_encoder = {n: value.to("cpu", copy=True) for n, value in self.encoder.state_dict().items()}
            simulation.in_main_memory(self.initial_encoder.values())
        self.requires_grad_(False).train().to(device)

    def forward(self, samples, timesteps, cond, noisy_latents, start_timesteps, conditional):
        """float32 logits (M, B) of M alternatives for the same B places on trajectories.

        samples: M tensors (B, C, h, w) noised to `timesteps` (B,). cond: as from `encoders.conditioning`, for B.
        noisy_latents, start_timesteps: x_t (B, C, h, w) and t (B,), whose features stand beside a sample's where
        `conditional`, and zeros else. While the discriminator trains, all go through the encoder as one batch; for
        the student's loss, x_t goes on its own, so that its activations are not kept.
        """
        num_samples = len(samples)
        if conditional and self.head[-1].weight.requires_grad:
            *features, reference = self.features(
                [*samples, noisy_latents], [*[timesteps] * num_samples, start_timesteps], cond
            )
        else:
            features = self.features(samples, [timesteps] * num_samples, cond)
            reference = torch.zeros_like(features[0])
            if conditional:
                with torch.no_grad():
                    (reference,) = self.features([noisy_latents], [start_timesteps], cond)
        stacked = torch.cat([torch.cat([feature, reference], dim=1) for feature in features])
        return self.head(stacked).float().reshape(num_samples, -1)

    def features(self, samples, timesteps, cond):
        """The middle block's output (B, c, h', w') for each of M samples (B, C, h, w) at their M times (B,)."""
        num_samples = len(samples)
        batch = torch.cat([sample.to(self.encoder.dtype) for sample in samples])
        output = self.encoder(batch, torch.cat(timesteps), **repeat_conditioning(cond, num_samples))
        return output.sample.chunk(num_samples)

    @contextlib.contextmanager
    def trainable(self):
        """Parameters take gradients inside the block (forward and backward), and nowhere else."""
        trained = self.head if self.freeze_encoder else self
        trained.requires_grad_(True)
        try:
            yield
        finally:
            trained.requires_grad_(False)

    def make_optimizer(self, learning_rate, head_learning_rate, use_scaler):
        """AdamW with betas (0, 0.99), with a rate for the encoder (unless it is frozen) and one for the head, and a
        GradScaler, which does nothing unless `use_scaler`."""
        groups = [] if self.freeze_encoder else [{"params": list(self.encoder.parameters()), "lr": learning_rate}]
        groups.append({"params": list(self.head.parameters()), "lr": head_learning_rate})
        device = next(self.head.parameters()).device.type
        optimizer = torch.optim.AdamW(groups, betas=(0.0, 0.99), fused=device == "cuda" or simulation.is_on())
        return optimizer, torch.amp.GradScaler(device, enabled=use_scaler)

    def reset(self, seed):
        """Start anew: the teacher's encoder, a head drawn from `seed`, the same on every process; called by all."""
        if self.initial_encoder is not None:
            self.encoder.load_state_dict(self.initial_encoder)
        if not self.freeze_encoder and torch.distributed.is_initialized() and not simulation.is_on():
            for tensor in self.encoder.state_dict().values():
                torch.distributed.broadcast(tensor, src=0)
        self.head.load_state_dict(make_head(self.channels, self.feature_size, seed).state_dict())


def _is_main():
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def copy_encoder(unet):
    """A copy of the U-Net that ends after the middle block: its `sample` is that block's output (B, c, h', w')."""
    up_blocks, unet.up_blocks = unet.up_blocks, torch.nn.ModuleList()
    try:
        encoder = copy.deepcopy(unet)
    finally:
        unet.up_blocks = up_blocks
    encoder.conv_norm_out, encoder.conv_out = None, torch.nn.Identity()
    return encoder


def make_head(channels, feature_size, seed):
    """(B, 2 channels, h', w') -> (B, 1): two convolutions with GroupNorm and SiLU, the mean over places, a linear map.

    Convolutions are 4x4 with stride 2, and 3x3 with stride 1 where the features are smaller than 4x4. 32 groups, fewer
    in narrow networks: a group of one channel would take away what the mean over places could tell.
    """
    with torch.random.fork_rng(devices=[]):  # the run's own random state stays what it is without a discriminator
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs' generators too
        return torch.nn.Sequential(*_head_layers(channels, feature_size))


def _head_layers(channels, feature_size):
    layers, width = [], 2 * channels
    for _ in range(2):
        halve = feature_size >= 4
        kernel, stride = (4, 2) if halve else (3, 1)
        layers.append(torch.nn.Conv2d(width, channels, kernel, stride, padding=1))
        layers += [torch.nn.GroupNorm(math.gcd(32, max(1, channels // 8)), channels), torch.nn.SiLU()]
        width, feature_size = channels, feature_size // 2 if halve else feature_size
    return [*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(channels, 1)]


def repeat_conditioning(cond, times):
    """`conditioning`'s keyword arguments for the same B samples `times` over."""
    return {
        name: repeat_conditioning(value, times)
        if isinstance(value, dict)
        else value.repeat(times, *[1] * (value.ndim - 1))
        for name, value in cond.items()
    }
