"""Exponential moving averages of parameters."""

import contextlib
import math

import torch
from torch.distributed.tensor import DTensor
from torch.optim.sgd import sgd

MOST_OF_START = math.exp(-3)  # of an average that is used; a constant decay reaches it after 3 / (1 - decay) updates


@torch.no_grad()
def ema_update(target_parameters, source_parameters, decay, finite=None):
    """target <- decay * target + (1 - decay) * source, in place, each weight read and written once.

    finite: 0-dim bool tensor as from `UpdateGuard.step`; the target stays what it is where it is false, decided on the
    device.

    Both are equally long iterables of tensors of the same shapes and dtypes (float32: a step of 1 - decay times an
    update of 1e-6 is lost in half precision). Where both are split over processes, each updates its parts.
    """
    targets, sources = ([part(p) for p in each] for each in (target_parameters, source_parameters))
    if decay < 0.5:  # the first updates of a warm-up: exact where it is a copy, a kernel for each tensor
        weight = 1.0 - decay if finite is None else [(1.0 - decay) * finite] * len(targets)
        torch._foreach_lerp_(targets, sources, weight)
        return
    # One kernel for all, which wants one layout in memory of each pair. It is that of SGD, which can skip on its
    # device: with weight decay 1, uphill, target <- target - (1 - decay) (target - source).
    sources = [
        s if s.stride() == t.stride() else torch.empty_like(t).copy_(s) for t, s in zip(targets, sources, strict=True)
    ]
    found_inf = None if finite is None else (~finite).float()
    options = {"has_sparse_grad": False, "foreach": False, "fused": True, "grad_scale": None, "found_inf": found_inf}
    options |= {"weight_decay": 1.0, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "maximize": True}
    sgd(targets, sources, [None] * len(targets), lr=1.0 - decay, **options)


def part(tensor):
    """This process's part of a tensor that is split over processes, in the memory of it, without gradients.

    Of a plain tensor, all of it.
    """
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def ema_decay(step, max_decay, min_decay=None, inv_gamma=None, power=0.75, gamma=None):
    """The decay of the update that ends step `step` (1, 2, ...); the first one copies the weights.

    Constant: max_decay, or with `min_decay` n / (9 + n) between the two, for n = step. With `inv_gamma`, warm-up:
    1 - (1 + (n - 1) / inv_gamma)^-power between min_decay (0 unless given) and max_decay: both as diffusers' EMAModel.
    With `gamma`, the power function (1 - 1 / n)^(gamma + 1), whose memory grows with the run (2312.02696, eq. 127).
    """
    if step <= 1:
        return 0.0
    if gamma is not None:
        return (1 - 1 / step) ** (gamma + 1)
    if inv_gamma is not None:
        decay = 1 - (1 + (step - 1) / inv_gamma) ** -power
    elif min_decay is None:
        return max_decay
    else:
        decay = step / (9 + step)
    return min(max_decay, max(min_decay or 0.0, decay))


def ema_start_share(num_steps, **options):
    """How much of an EMA over `num_steps` updates is still the weights after the first one; options of `ema_decay`."""
    share = 1.0
    for step in range(2, num_steps + 1):
        share *= ema_decay(step, **options)
    return share


@contextlib.contextmanager
def exchanged(parameters, others):
    """Inside, `parameters` hold the values of `others`, equally many tensors, and the other way round. No copy, but
    of one tensor that is split over processes: what gathers it reads the memory that it had."""

    @torch.no_grad()
    def exchange():
        for a, b in pairs:
            if isinstance(a, DTensor):
                a, b = part(a), part(b)
                values = a.clone()
                a.copy_(b)
                b.copy_(values)
            else:
                a.data, b.data = b.data, a.data

    pairs = list(zip(parameters, others, strict=True))
    exchange()
    try:
        yield
    finally:
        exchange()
