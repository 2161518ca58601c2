"""What stands in a simulation for what would open weights, need memory, or need a GPU: networks are built from their
configurations, parameters are replaced rather than changed, and 8-bit AdamW keeps what bitsandbytes lays out.
"""

import functools
import inspect
import math
import os
import weakref

from common.run.meter import add_forms

import diffusers
import torch
import transformers
from huggingface_hub import snapshot_download
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_flatten, tree_unflatten

CONFIGURATIONS = ["*.json", "*.txt", "*.model", "*.jinja"]  # of a repository of the hub; its weights stay there
LOADING_INFO = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def apply(module, function, recurse=True):
    """`torch.nn.Module._apply`, which cannot put another tensor into a parameter without memory: parameters are
    replaced instead, ties among them kept."""
    made = {}
    for each in module.modules() if recurse else [module]:
        for name, parameter in each._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                with torch.no_grad():
                    new = function(parameter)
                kinds = [(x.dtype, x.device.type, x.stride()) for x in (parameter, new)]
                same = new is parameter or isinstance(new, FakeTensor) and kinds[0] == kinds[1]
                made[id(parameter)] = parameter if same else torch.nn.Parameter(new.detach(), parameter.requires_grad)
            each._parameters[name] = made[id(parameter)]
        for name, buffer in each._buffers.items():
            each._buffers[name] = None if buffer is None else function(buffer)
    return module


def deepcopy(tensor, memo):
    """torch's own makes a storage that no operation has made, and that is not the one of its views."""
    if id(tensor) not in memo:
        copy = tensor.detach().clone()
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy
    return memo[id(tensor)]


_PIPELINE_FROM_PRETRAINED = diffusers.DiffusionPipeline.__dict__["from_pretrained"].__func__


def download(cls, name, revision=None, cache_dir=None, **_):
    place = {"revision": revision, "cache_dir": cache_dir}
    return snapshot_download(name, allow_patterns=CONFIGURATIONS, ignore_patterns=["*.index.json"], **place)


def configurations_only(cls, name, **options):
    place = {key: options.pop(key, None) for key in ("revision", "cache_dir", "variant")}
    folder = name if os.path.isdir(name) else download(cls, name, **place)  # variants differ in weights alone
    return _PIPELINE_FROM_PRETRAINED(cls, folder, **options)


def build_diffusers(cls, name, **options):
    known = inspect.signature(cls.__init__).parameters
    changes = {key: value for key, value in options.items() if key in known}
    return _built(cls, name, options, lambda **place: cls.from_config(cls.load_config(name, **place), **changes))


def build_transformers(cls, name, *_, config=None, **options):
    def build(**place):
        is_given = isinstance(config, transformers.PretrainedConfig)
        return cls._from_config(config if is_given else cls.config_class.from_pretrained(name, **place))

    return _built(cls, name, options, build)


def _built(cls, name, options, build):
    place = {key: options[key] for key in ("subfolder", "revision", "cache_dir") if options.get(key) is not None}
    try:
        network = build(**place)
    except (LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:200]
        where = os.path.basename(name) if os.path.isdir(name) else place.get("subfolder", name)
        raise ValueError(f"the configuration of its {where} describes no {cls.__name__} ({reason})") from None
    network = network.to(options.get("dtype") or options.get("torch_dtype") or torch.float32).eval()
    return (network, {name: [] for name in LOADING_INFO}) if options.get("output_loading_info") else network


def remembered(call, may):
    """`__call__` of networks of one class: where `may()`, a call without gradients whose arguments have the form of
    an earlier one's gives results of that one's form, and computes nothing. Hooks of the network run.

    What a pipeline does is found out by calls that differ in values alone.
    """
    known = weakref.WeakKeyDictionary()

    def answer(network, forward, *args, **kwargs):
        answers, form = known.setdefault(network, {}), [network.training, torch.is_autocast_enabled("cpu")]
        leaves, structure = tree_flatten((args, kwargs))
        if not add_forms(form, leaves):
            return forward(*args, **kwargs)
        form = (*form, structure)
        if form not in answers:
            result = forward(*args, **kwargs)
            made, kind = tree_flatten(result)
            if not all(isinstance(x, FakeTensor) and x.constant is None or x is None for x in made):
                return result
            answers[form] = kind, [x if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in made]
            return result
        kind, parts = answers[form]
        made = [x and torch.empty_strided(*x[:2], dtype=x[2], device=x[3]) for x in parts]
        return tree_unflatten(made, kind)

    @functools.wraps(call)
    def called(network, *args, **kwargs):
        if torch.is_grad_enabled() or not may():
            return call(network, *args, **kwargs)
        own = vars(network).get("forward")
        network.forward = functools.partial(answer, network, network.forward)
        try:
            return call(network, *args, **kwargs)
        finally:
            if own is None:
                del network.forward
            else:
                network.forward = own

    return called


def reach(tensors, *_, **__):
    """Stands for the backward pass of a check before the first update, which asks no more than what gets a gradient:
    what the graph leads to."""
    nodes, seen = [tensor.grad_fn for tensor in ([tensors] if isinstance(tensors, torch.Tensor) else tensors)], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad" and node.variable.grad is None:
            node.variable.grad = torch.empty_like(node.variable)
        nodes += [following for following, _ in node.next_functions]


def without_values(load):
    """One file holds no configuration: it is loaded, and its networks lose their values."""

    @functools.wraps(load)
    def loaded(*args, **options):
        with unset_fake_temporarily():
            pipeline = load(*args, **options)
        for module in pipeline.components.values():
            if isinstance(module, torch.nn.Module):
                module._apply(_without_values)
        return pipeline

    return staticmethod(loaded)


def _without_values(tensor):
    """A tensor of no memory in its place; tables of positions stay."""
    if not tensor.is_floating_point():
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def pack(real):
    """`quantized.pack` with what bitsandbytes lays out for nf4: half a byte a weight, and scales of 64 weights in
    bytes, with a float32 for every 256 of them. Its tables, 2 KiB a layer, are left out."""

    def packed(weight, kind):
        if kind != "nf4":
            return real(weight, kind)
        number = weight.numel()
        values = torch.empty(-(-number // 2), 1, dtype=torch.uint8, device=weight.device)
        scales = torch.empty(-(-number // 64), dtype=torch.uint8, device=weight.device)
        seconds = torch.empty(-(-number // (64 * 256)), device=weight.device)
        return values, scales, (weight.shape, weight.dtype, seconds)

    return packed


def unpack(real):
    def whole(packed, scales, state, dtype):
        if state is None:
            return real(packed, scales, state, dtype)
        return torch.empty(state[0], dtype=state[1], device=packed.device).to(dtype)

    return whole


class AdamW8bit(torch.optim.Optimizer):
    """The memory of bitsandbytes' optimizer: two states of 8 bits with a float32 scale for every 256 values; float32
    states of tensors with less than 4,096."""

    def __init__(self, parameters, lr, betas, weight_decay, eps):
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state, size = self.state[parameter], parameter.numel()
            if state:
                continue
            dtype = torch.float32 if size < 4096 else torch.uint8
            for number in (1, 2):
                state[f"state{number}"] = torch.zeros_like(parameter, dtype=dtype)
                if dtype == torch.uint8:
                    state[f"absmax{number}"] = torch.zeros(math.ceil(size / 256), device=parameter.device)
