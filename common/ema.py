"""Exponential moving average of parameters."""

import torch


@torch.no_grad()
def ema_update(target_parameters, source_parameters, decay):
    """target <- decay * target + (1 - decay) * source, in place, a few fused kernels for the whole list.

    Both are equally long iterables of tensors of the same shapes and dtypes (float32: a step of 1 - decay times an
    update of 1e-6 is lost in half precision). Works on the sharded parameters themselves under FSDP.
    """
    torch._foreach_lerp_([p.detach() for p in target_parameters], [p.detach() for p in source_parameters], 1.0 - decay)
