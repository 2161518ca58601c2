"""What makes a step smaller or faster and leaves its result alone: recomputed activations, compiled blocks, layout.

All of it is done in place, so that names in checkpoints and results stay what they are; docs/performance.md says what
each is worth. Call these after networks were copied and adapters attached, and before `accelerator.prepare`.
"""

import functools
import importlib.util
import os
import shutil
import types

import torch
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

CHECKPOINTING = ("none", "selective", "full")
LAST_LAYERS = ("conv_out", "proj_out")  # of a U-Net, of a transformer
END_LAYERS = ("conv_in", "conv_norm_out", *LAST_LAYERS)
COMPILE_OPTIONS = {"dynamic": False}  # of torch.compile; a resolution and a batch size are a run's
# Variants of one block that are kept: its shapes times student, target, teacher and discriminator. By default there
# are 8, and what comes after runs uncompiled without a word. SD 1.5 has 57, with the discriminator of TSCD 90.
RECOMPILE_LIMIT = 512


def repeated_blocks(network):
    """The modules of a denoiser that are compiled one by one, in order: ResNet and transformer blocks of a U-Net (in a
    UNet2DModel, attention), what diffusers calls a model's repeated blocks, or else the members of its lists."""
    names = ["Attention"] if isinstance(network, UNet2DModel) else getattr(network, "_repeated_blocks", None) or []
    found = [m for m in network.modules() if isinstance(m, ResnetBlock2D) or type(m).__name__ in names]
    return found or list(_members(network))


def _members(module, inside=False):
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList):
            yield from _members(child, inside=True)
        elif inside:
            yield child


def recomputed_blocks(network):
    """The modules whose blocks `selective` recomputes: of a U-Net the levels from the full resolution down to the
    first one with attention to the text, half of the activations for less than half of the work. The first level of
    SD 1.5 and of U-Nets without text; the first two of SDXL, whose first is cheap. Of others every second block."""
    if hasattr(network, "down_blocks") and hasattr(network, "up_blocks"):
        attends = [getattr(block, "has_cross_attention", False) for block in network.down_blocks]
        levels = attends.index(True) + 1 if any(attends) else 1
        chosen = [*network.down_blocks[:levels], *network.up_blocks[-levels:]]
    else:
        chosen = repeated_blocks(network)[::2]
    return {module for block in chosen for module in block.modules()}


def recompute(network, which):
    """Recompute activations in the backward pass: none, selective (`recomputed_blocks`) or full.

    full: block by block; a denoiser that diffusers cannot recompute so as a whole, call by call.
    """
    if which == "none":
        return
    if not getattr(network, "_supports_gradient_checkpointing", False):
        assert which == "full", "check_denoiser comes first"
        network.forward = functools.partial(checkpoint, network.forward, use_reentrant=False)
    elif which == "full":
        network.enable_gradient_checkpointing()
    else:
        chosen = recomputed_blocks(network)

        def run(block, *args, **kwargs):
            if getattr(block, "__self__", block) in chosen:
                return checkpoint(block, *args, use_reentrant=False, **kwargs)
            return block(*args, **kwargs)

        network.enable_gradient_checkpointing(gradient_checkpointing_func=run)


def missing_for_xformers():
    """What xformers' attention lacks on this machine, in words, or None; diffusers tries whether its kernels run."""
    if importlib.util.find_spec("xformers") is None:
        return "the package xformers"
    return None if torch.cuda.is_available() else "a GPU"


def missing_to_compile():
    """What torch.compile lacks on this machine, in words, or None."""
    if torch.cuda.is_available():
        if importlib.util.find_spec("triton") is None:
            return "the package triton"
        compilers = os.environ.get("CC"), "gcc", "clang"
    else:
        compilers = os.environ.get("CXX"), "g++"
    return None if any(name and shutil.which(name) for name in compilers) else "a C++ compiler such as g++"


def compile_blocks(network):
    """torch.compile of every repeated block, for its next call on; blocks of the same kind and shape share a graph."""
    config = torch._dynamo.config
    config.recompile_limit = config.accumulated_recompile_limit = RECOMPILE_LIMIT
    config.optimize_ddp = False  # it would cut a block where a bucket ends: blocks are smaller than buckets
    torch._inductor.config.fallback_random = True  # dropout draws the masks that it draws uncompiled
    for block in repeated_blocks(network):
        if isinstance(block, FSDPModule):  # what gathers its weights, hooks around its forward, is not compiled
            block.forward = torch.compile(block.forward, **COMPILE_OPTIONS)
        else:
            block.compile(**COMPILE_OPTIONS)


def float32_ends(network):
    """Let a denoiser's first and last layers compute in float32 under autocast, in place; their weights become so.

    A consistency loss is a difference of nearly equal outputs, most of which half precision rounds away, and much of
    that where latents enter and the prediction leaves. Outside of autocast, as the teacher that is the base of a LoRA
    runs, such a layer answers in the dtype that it is given. Networks that end in none of these stay what they are.
    """
    if all(isinstance(getattr(network, name, None), torch.nn.Identity | None) for name in LAST_LAYERS):
        return
    dtype = network.dtype
    for name in END_LAYERS:
        layer = getattr(network, name, None)
        if isinstance(layer, torch.nn.Module):
            layer.float()
            layer.forward = types.MethodType(_forward_in_float32, layer)
            layer.answers_in = dtype if name == "conv_in" else torch.float32  # under autocast


def _forward_in_float32(layer, hidden_states):
    device_type = hidden_states.device.type
    dtype = layer.answers_in if torch.is_autocast_enabled(device_type) else hidden_states.dtype
    with torch.autocast(device_type, enabled=False):
        return type(layer).forward(layer, hidden_states.float()).to(dtype)


def channels_last(network):
    """Convolutions' weights (N, C, H, W) with C innermost in memory; activations take over the layout from them."""
    torch.nn.Module.to(network, memory_format=torch.channels_last)
