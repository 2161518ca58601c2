"""Exponential moving averages of parameters."""

import torch
from torch.distributed.tensor import DTensor
from torch.optim.sgd import sgd


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
