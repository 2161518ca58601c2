"""Networks without memory, whose weights come from their files when they are split: each process reads its part.

An outline has the shapes, dtypes and tables of what `from_pretrained` loads, so it can be copied, cast, cut and given
adapters. A LoRA that is fused into it is added to each tensor as that is read. Left out: a teacher in one file, which
diffusers converts as a whole.
"""

import copy
import functools
from pathlib import Path

from common.errors import CALL_ERRORS, blame
from common.networks import sharded, weights

import accelerate
import diffusers
import torch
from diffusers.models.model_loading_utils import _fetch_remapped_cls_from_config
from diffusers.models.modeling_utils import LegacyModelMixin, no_init_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open


class Outline:
    """What the class of a network is as well, while its weights are still to come: neither copies nor casts take
    memory, and a device is left to `fill`."""

    def __deepcopy__(self, memo):
        for parameter in self.parameters():
            if is_to_come(parameter):
                empty = _empty(parameter.shape, parameter.dtype)
                memo[id(parameter)] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
        memo |= {id(shared): shared for shared in (self._files, self._loras)}
        outlined, self.__class__ = type(self), type(self).__bases__[1]
        try:
            other = copy.deepcopy(self, memo)
        finally:
            self.__class__ = outlined
        other.__class__ = outlined
        return other

    def _apply(self, function, recurse=True):
        def apply(tensor):
            if not is_to_come(tensor):
                return function(tensor)
            return _empty(tensor.shape, function(tensor.detach()[(0,) * tensor.ndim]).dtype)

        return super()._apply(apply, recurse)


@functools.cache
def _outlined(cls):
    return type(cls.__name__, (Outline, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def _empty(shape, dtype):
    return torch.empty((), dtype=dtype).expand(shape)  # one value in memory


def is_to_come(tensor):
    """Whether a weight of an outline is read later; the others are adapters and what its files lack."""
    return tensor.numel() > 1 and not any(tensor.stride())


def of_pipeline(flag, name, index, loader, parts, dtype, variant=None, **place):
    """{part: outline} of those `parts` that a pipeline of the class `loader` has; of the hub's, once it is downloaded.

    index: its model_index.json. dtype: one, or {part: dtype} with a "default". place: revision and cache_dir.
    """
    if not Path(name).is_dir():
        loader.download(name, use_safetensors=True, trust_remote_code=False, variant=variant, **place)
    folder, found = weights.local_folder(name, **place), {}
    for part in (part for part in parts if isinstance(index.get(part), list) and index[part][1]):
        own = dtype.get(part, dtype["default"]) if isinstance(dtype, dict) else dtype
        chosen = variant if variant and weights.has_variant(folder / part, variant) else None
        found[part] = outline(flag, folder / part, getattr(diffusers, index[part][1]), own, chosen)
    return found


def outline(flag, folder, cls, dtype, variant=None, **changes):
    """The network of diffusers that the folder holds, frozen, in eval mode, in `dtype` but for what its class keeps in
    float32. changes: of its configuration. UserError where its files lack tensors or show another network."""
    folder = Path(folder)
    config = cls.load_config(folder)
    if issubclass(cls, LegacyModelMixin) and "norm_type" in config:
        cls = _fetch_remapped_cls_from_config(config, cls)
    weights.check_network(flag, folder, cls, variant, of_pipeline=True)
    network = _build(cls, config, dtype, changes)
    network._files, network._loras = list(_places(network, folder, cls, variant)), {}
    network.register_to_config(_name_or_path=str(folder))
    return network.eval()


def like(other, **changes):
    """An outline of the same files with changes of its configuration; what the files lack is zero, and in memory."""
    network = _build(type(other).__bases__[1], other.config, other.dtype, changes)
    network._files, network._loras = other._files, other._loras
    new = network.state_dict().keys() - {name for _, _, name in other._files}
    for name in new:
        tensor = network.get_parameter(name)
        _put(network, name, torch.nn.Parameter(torch.zeros(tensor.shape, dtype=tensor.dtype)))
    return network


def _build(cls, config, dtype, changes):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # of tables too
    try:
        with no_init_weights(), accelerate.init_empty_weights(include_buffers=False):
            network = cls.from_config(config, **changes)
    finally:
        torch.set_default_dtype(before)
    kept = set(cls._keep_in_fp32_modules or ())
    for name, parameter in list(network.named_parameters()):
        own = torch.float32 if kept & set(name.split(".")) else dtype
        _put(network, name, torch.nn.Parameter(_empty(parameter.shape, own), requires_grad=False))
    network.__class__ = _outlined(cls)
    return network


def _put(network, name, tensor):
    path, _, last = name.rpartition(".")
    setattr(network.get_submodule(path), last, tensor)


def _places(network, folder, cls, variant):
    """(file, name in it, name in the network) of each tensor that the network has."""
    files, named = weights.find_files(folder, cls, variant)
    names_of_all = network.state_dict().keys()
    for path in files:
        with safe_open(path, "pt") as file:
            state = {name: torch.empty(0, device="meta") for name in file.keys()}
        names = {id(tensor): name for name, tensor in state.items()}
        if not named.endswith(".json"):
            network._fix_state_dict_keys_on_load(state)
        for name, tensor in state.items():
            if name in names_of_all:
                yield path, names[id(tensor)], name


def is_one(network):
    """Whether weights of a network are still to come."""
    return isinstance(network, Outline)


def fuse(flag, network, scale):
    """Take the LoRA that diffusers has loaded onto an outline, times `scale`, as one of those that `fill` adds, as
    `fuse_lora` adds it; `unload_lora_weights` may follow. flag: whose it is."""
    for path, layer in network.named_modules():
        if isinstance(layer, BaseTunerLayer):
            if scale != 1.0:
                layer.scale_layer(scale)
            own, base = copy.copy(layer), copy.copy(layer.base_layer)
            base._parameters = {name: p if p is None else p.detach() for name, p in base._parameters.items()}
            own._modules = layer._modules | {"base_layer": base}
            network._loras.setdefault(path, []).append((flag, own))


def _fused(layers, kind, read):
    """A tensor of a layer, its `kind` of weight or bias, as `read()` gives it whole, with the LoRAs added."""
    values = read()
    for flag, layer in layers:
        base, empty = layer.base_layer, dict(layer.base_layer._parameters)
        values = values.to(empty[kind].dtype)  # in which the LoRA was loaded
        for name, tensor in empty.items():
            if tensor is not None:
                tensor = values if name == kind else torch.zeros(tensor.shape, dtype=tensor.dtype)
                base._parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)
        layer.merged_adapters = []
        with blame(f"{flag}: it cannot be fused into the teacher", RuntimeError, *CALL_ERRORS):
            layer.merge(safe_merge=True)
        values, base._parameters = base._parameters[kind].data, empty
    return values


def begin(network):
    """Before it is split: weights that are to come get no memory at all."""
    network.__class__ = type(network).__bases__[1]
    for name, parameter in list(network.named_parameters()):
        if is_to_come(parameter):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            _put(network, name, torch.nn.Parameter(empty, requires_grad=parameter.requires_grad))


@torch.no_grad()
def fill(network, device):
    """After it was split: read this process's part of each tensor of its files into memory of the device."""
    network._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    tensors = {name.replace(".base_layer.", "."): tensor for name, tensor in network.state_dict().items()}
    paths = {name.replace(".base_layer.", "."): name for name in network.state_dict()}
    parameters, opened = {name for name, _ in network.named_parameters()}, {}
    files, loras = (vars(network).pop(name) for name in ("_files", "_loras"))
    for path, key, name in files:
        if name not in tensors:  # of a layer that was cut off
            continue
        if path not in opened:
            opened = {path: safe_open(path, "pt")}  # one at a time
        module, _, kind = name.rpartition(".")
        layers = [pair for pair in loras.get(module, ()) if kind == "weight" or any(pair[1].lora_bias.values())]
        whole = functools.partial(opened[path].get_tensor, key)
        if layers:
            sharded.fill(tensors[name], _fused(layers, kind, whole))
        elif paths[name] in parameters:
            sharded.fill(tensors[name], opened[path].get_slice(key) if tensors[name].ndim else whole())
        else:  # a table, which has the file's values in the network's dtype
            table = whole().to(device)
            _put(network, paths[name], table.to(tensors[name].dtype) if table.is_floating_point() else table)


def load(network, device):
    """Read all of an outline into memory of the device, tensor by tensor, in place."""
    begin(network)
    fill(network, device)
