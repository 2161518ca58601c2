"""The frozen base of a LoRA in 4 or 8 bits: linear layers of the repeated blocks, which hold nearly all weights.

nf4 is QLoRA's: 16 values of a normal distribution, a scale for every 64 weights, the scales in 8 bits too (Dettmers et
al. 2023, section 3), 0.52 bytes a weight, by bitsandbytes. int8 has a scale a row, and needs no library. A layer is
made whole for each product, so that its gradient is that of the rounded weights. What lies outside of the blocks, and
what a model keeps in float32, stays as it is. Left out: quantising while a teacher is read from disk.
"""

import importlib.util

from common.errors import UserError, first_line
from common.networks.performance import repeated_blocks

import torch
from torch.distributed.tensor import DTensor

KINDS = ("nf4", "int8")


def pack(weight, kind):
    """(uint8 or int8 values, scales, what else `unpack` needs) of a matrix."""
    if kind == "nf4":
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        return packed, state.absmax, state
    scales = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127  # (out, 1)
    return (weight.float() / scales).round().to(torch.int8), scales, None


def unpack(packed, scales, state, dtype):
    """The matrix (out, in) again, rounded, in `dtype`."""
    if state is not None:
        from bitsandbytes import functional

        return functional.dequantize_4bit(packed, state).to(dtype)
    return (packed * scales).to(dtype)


class _Product(torch.autograd.Function):
    """x W^T + b, which keeps nothing of W for its backward pass."""

    @staticmethod
    def forward(ctx, x, layer, dtype):
        ctx.layer, ctx.dtype = layer, x.dtype
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return torch.nn.functional.linear(x.to(dtype), layer.whole(dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        return (grad @ ctx.layer.whole(grad.dtype)).to(ctx.dtype), None, None


class QuantizedLinear(torch.nn.Linear):
    """A linear layer (in) -> (out) that is frozen; `weight` holds its packed values."""

    def __init__(self, linear, kind, device):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = linear.in_features, linear.out_features, kind
        packed, scales, self.state = pack(linear.weight.detach().to(device), kind)
        self.weight, self.bias = torch.nn.Parameter(packed, requires_grad=False), linear.bias
        self.register_buffer("scales", scales, persistent=False)

    def whole(self, dtype):
        return unpack(self.weight, self.scales, self.state, dtype)

    def forward(self, x):
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return _Product.apply(x, self, dtype)

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, {self.kind}"


def check(kind, denoisers, pipeline_class, device=None):
    """UserError where a base cannot be quantised: a library or a kernel is missing, or the result needs whole weights.

    denoisers: {part: (class, configuration)}. device: None in a dry run, which may be on another machine.
    """
    if kind is None:
        return
    if not hasattr(pipeline_class, "save_lora_weights"):
        raise UserError(
            f"`quantize_base`: a {pipeline_class.__name__} takes no LoRA in diffusers, so its student is saved with "
            "the LoRA in whole weights; drop it"
        )
    if kind == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("`quantize_base`=nf4: bitsandbytes is not installed; pip install bitsandbytes, or pass int8")
    for part, (cls, values) in denoisers.items():
        with torch.device("meta"):
            network = cls.from_config(values)
        if not layers(network):
            raise UserError(f"`quantize_base`: the teacher's {part}, a {cls.__name__}, has no linear layer in a block")
    if device is None:
        return
    try:
        unpack(*pack(torch.ones(64, 64, device=device), kind), torch.float32)
    except Exception as error:  # what a missing kernel raises is each backend's own
        raise UserError(
            f"`quantize_base`={kind} does not run on {device} here ({first_line(error)}); use a GPU, or pass int8"
        ) from None


def layers(network):
    """{path: linear layer} of a denoiser that are quantised."""
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    inside = {id(module) for block in repeated_blocks(network) for module in block.modules()}
    named = network.named_modules()
    found = {path: m for path, m in named if type(m) is torch.nn.Linear and id(m) in inside}
    return {path: m for path, m in found.items() if not kept & set(path.split("."))}


def quantize(networks, kind, device):
    """Quantise denoisers on the CPU, in place, layer by layer onto the device: never are they there as a whole.

    kind: of KINDS, or None, which leaves them alone. UserError for weights that processes share.
    """
    for network in networks if kind else ():
        for path, layer in layers(network).items():
            if isinstance(layer.weight, DTensor):
                raise UserError("`quantize_base`: the base is sharded over processes already; drop one of the two")
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, QuantizedLinear(layer, kind, device))
