"""The adversarial part of the loss: its noise and its two sides."""

from common.schedules import append_dims

import torch
from torch.nn import functional


def draw_renoising(alpha, end_timesteps, top_timesteps, shape, generator):
    """One noising for both sides of an adversarial comparison: (t* (B,) int64, q (B, 1, ..), noise of `shape`).

    x* = q x_s + noise carries x_s from s = end_timesteps up to t* ~ U{s..top_timesteps}, q = alpha_{t*} / alpha_s and
    noise = sqrt(1 - q^2) eps*, eps* normal: what the forward process does between s and t*. float32; t* = s changes
    nothing. alpha: (T,) as from `schedules.alpha_sigma`.
    """
    device = end_timesteps.device
    draw = torch.rand(end_timesteps.shape, generator=generator, device=device)
    timesteps = end_timesteps + (draw * (top_timesteps - end_timesteps + 1)).long()
    q = append_dims(alpha[timesteps] / alpha[end_timesteps], len(shape))
    noise = torch.randn(shape, generator=generator, device=device)
    return timesteps, q, (1.0 - q**2).sqrt() * noise


def discriminator_loss(real_logits, fake_logits):
    """L_D = softplus(-l_real) + softplus(l_fake) of each sample; all (B,); float32."""
    return functional.softplus(-real_logits.float()) + functional.softplus(fake_logits.float())


def generator_loss(fake_logits):
    """L_G = softplus(-l_fake) of each sample, the non-saturating loss (1406.2661, Section 3); (B,), float32."""
    return functional.softplus(-fake_logits.float())


def masked_mean(values, mask, count=None):
    """The sum of values (B,) where mask (B,) is true, over `count`. float32 scalar, no host sync.

    count: how often mask is expected to be true. Then the mean over micro-batches and processes is unbiased, and does
    not depend on how an update is split into them. None: how often it is true; a mean for people, 0 of nothing.
    """
    return (values.float() * mask).sum() / (mask.sum().clamp(min=1) if count is None else count)
