"""Exponential moving average of parameters."""

import contextlib

import torch


@torch.no_grad()
def ema_update(target_parameters, source_parameters, decay):
    """target <- decay * target + (1 - decay) * source, in place, a few fused kernels for the whole list.

    Both are equally long iterables of tensors of the same shapes and dtypes (float32: a step of 1 - decay times an
    update of 1e-6 is lost in half precision). Works on the sharded parameters themselves under FSDP.
    """
    torch._foreach_lerp_([p.detach() for p in target_parameters], [p.detach() for p in source_parameters], 1.0 - decay)


@contextlib.contextmanager
def exchanged(parameters, others):
    """Inside, `parameters` hold the values of `others`, equally many tensors, and the other way round. No copy."""

    def exchange():
        for a, b in pairs:
            a.data, b.data = b.data, a.data

    pairs = list(zip(parameters, others, strict=True))
    exchange()
    try:
        yield
    finally:
        exchange()
