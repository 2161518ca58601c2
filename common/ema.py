"""Exponential moving average of parameters."""

import torch


@torch.no_grad()
def ema_update(target_parameters, source_parameters, decay, finite=None):
    """target <- decay * target + (1 - decay) * source, in place, a few fused kernels for the whole list.

    finite: 0-dim bool tensor as from `UpdateGuard.step`; the target stays what it is where it is false, decided on the
    device.

    Both are equally long iterables of tensors of the same shapes and dtypes (float32: a step of 1 - decay times an
    update of 1e-6 is lost in half precision). Works on the sharded parameters themselves under FSDP.
    """
    targets, sources = ([p.detach() for p in each] for each in (target_parameters, source_parameters))
    if finite is None:
        torch._foreach_lerp_(targets, sources, 1.0 - decay)
        return
    steps = torch._foreach_sub(sources, targets)  # as large as the gradients, which are freed by now
    torch._foreach_mul_(steps, (1.0 - decay) * finite)
    torch._foreach_add_(targets, steps)
