"""Networks without memory, whose weights come from their files when they are split: each process reads its part.

An outline has the shapes, dtypes and tables of what `from_pretrained` loads, so adapters can be attached to it. Left
out: a teacher with a LoRA fused into it, which is loaded whole.
"""

from pathlib import Path

from common.networks import sharded, weights

import accelerate
import torch
from diffusers.models.model_loading_utils import _fetch_remapped_cls_from_config
from diffusers.models.modeling_utils import LegacyModelMixin, no_init_weights
from safetensors import safe_open


def outline(flag, folder, cls, dtype, variant=None):
    """The network of diffusers that the folder holds, frozen, in eval mode, in `dtype` but for what its class keeps in
    float32. UserError where its files lack tensors or show another network."""
    folder = Path(folder)
    config = cls.load_config(folder)
    if issubclass(cls, LegacyModelMixin) and "norm_type" in config:
        cls = _fetch_remapped_cls_from_config(config, cls)
    weights.check_network(flag, folder, cls, variant, of_pipeline=True)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # of tables too
    try:
        with no_init_weights(), accelerate.init_empty_weights(include_buffers=False):
            network = cls.from_config(config)
    finally:
        torch.set_default_dtype(before)
    kept = set(cls._keep_in_fp32_modules or ())

    def own(name):
        return torch.float32 if kept & set(name.split(".")) else dtype

    for name, parameter in list(network.named_parameters()):
        empty = torch.empty((), dtype=own(name)).expand(parameter.shape)  # one value in memory
        _put(network, name, torch.nn.Parameter(empty, requires_grad=False))
    network._files = list(_places(network, folder, cls, variant, {name: own(name) for name in network.state_dict()}))
    network.register_to_config(_name_or_path=str(folder))
    return network.eval()


def _put(network, name, tensor):
    path, _, last = name.rpartition(".")
    setattr(network.get_submodule(path), last, tensor)


def _places(network, folder, cls, variant, dtypes):
    """(file, name in it, name in the network, dtype) of each tensor that the network has."""
    files, named = weights.find_files(folder, cls, variant)
    for path in files:
        with safe_open(path, "pt") as file:
            state = {name: torch.empty(0, device="meta") for name in file.keys()}
        names = {id(tensor): name for name, tensor in state.items()}
        if not named.endswith(".json"):
            network._fix_state_dict_keys_on_load(state)
        for name, tensor in state.items():
            if name in dtypes:
                yield path, names[id(tensor)], name, dtypes[name]


def is_one(network):
    """Whether weights of a network are still to come."""
    return "_files" in vars(network)


def begin(network):
    """Before it is split: weights that are to come get no memory at all."""
    for name, parameter in list(network.named_parameters()):
        if ".lora_" not in name:
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            _put(network, name, torch.nn.Parameter(empty, requires_grad=False))


@torch.no_grad()
def fill(network, device):
    """After it was split: read this process's part of each tensor of its files into memory of the device."""
    network._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    tensors = {name.replace(".base_layer.", "."): tensor for name, tensor in network.state_dict().items()}
    paths = {name.replace(".base_layer.", "."): name for name in network.state_dict()}
    parameters, opened = {name for name, _ in network.named_parameters()}, {}
    for path, key, name, dtype in vars(network).pop("_files"):
        if path not in opened:
            opened = {path: safe_open(path, "pt")}  # one at a time
        if paths[name] in parameters:
            read = opened[path].get_slice if tensors[name].ndim else opened[path].get_tensor
            sharded.fill(tensors[name], read(key))
        else:  # a table, which has the file's values in the network's dtype
            table = opened[path].get_tensor(key).to(device)
            _put(network, paths[name], table.to(dtype) if table.is_floating_point() else table)
