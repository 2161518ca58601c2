"""Networks whose weights are split over the processes: their parts, whole tensors, and files of these.

Weights are torch's DTensors, split into as many parts along their first dimension as there are processes (FSDP2). What
says "called by every process" here exchanges tensors: the others wait where one does not call it.
"""

import contextlib
import json
import os
import zipfile
from pathlib import Path

from common.ema import part

import torch
from safetensors import safe_open
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.serialization import skip_data

NAMES = {  # of dtypes in files
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def whole(tensor):
    """A tensor with all of its values, on its device, without gradients; called by every process."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_split(tensor):
    return isinstance(tensor, DTensor)


@torch.no_grad()
def fill(tensor, values):
    """Copy into this process's part of `tensor` its rows of `values`: a whole tensor, or a slice of a file."""
    part(tensor).copy_(values[_rows(tensor)] if isinstance(tensor, DTensor) else values[...])


def _rows(tensor):
    size = -(-tensor.shape[0] // tensor.device_mesh.size())  # as torch.chunk, the last ones less or nothing
    start = min(tensor.device_mesh.get_local_rank() * size, tensor.shape[0])
    return slice(start, min(start + size, tensor.shape[0]))


def total_norm(parameters):
    """The norm of all gradients, a scalar tensor, the same on all processes where they are split."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([part(gradient) for gradient in gradients])
    if any(is_split(gradient) for gradient in gradients):
        squares = norm.square()
        torch.distributed.all_reduce(squares)
        norm = squares.sqrt()
    return norm


def is_sharded(module):
    """Whether weights of a module are split."""
    reshard(module)
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def reshard(*modules):
    """Let go of what a forward without gradients has gathered: the next one gathers what the weights are then."""
    for network in modules:
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def gather_for_backward(network, tensors):
    """Let a backward pass that begins at tensors inside of a network find its weights, which FSDP2 gathers where one
    comes from its output; called by every process. Nothing for a network that is not split."""
    for tensor in tensors if isinstance(network, FSDPModule) else ():
        if tensor.requires_grad:
            tensor.register_hook(lambda _: network.unshard())


def plain_forward(network):
    """The network's forward as it is now, without what is put around it later (autocast), its weights gathered."""
    forward = network.forward

    def call(*args, **kwargs):
        if not isinstance(network, FSDPModule):
            return forward(*args, **kwargs)
        later, network.forward = network.forward, forward  # called by way of the hooks that gather
        try:
            return network(*args, **kwargs)
        finally:
            network.forward = later

    return call


def _is_main():
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _write(file, offset, tensor):
    """Called by every process; the main one has a file."""
    values = whole(tensor)
    if file is not None:
        file.seek(offset)
        file.write(values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _opened(path, mode):
    return open(path, mode) if _is_main() else contextlib.nullcontext()


def write_tensors(path, tensors, metadata=None):
    """Write {name: tensor} as a safetensors file, one gathered at a time.

    Called by every process; the main one writes.
    """
    header, named, offset = {"__metadata__": {"format": "pt"} | (metadata or {})}, {}, 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        named[name], offset = (offset, tensor), offset + size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with _opened(path, "wb") as file:
        if file is not None:
            file.write(len(head).to_bytes(8, "little") + head)
        for start, tensor in named.values():
            _write(file, 8 + len(head) + start, tensor)


def read_tensors(path, tensors):
    """Fill {name: tensor}, split or plain, with the values of a safetensors file; each process reads its parts alone.

    ValueError where the file's names or shapes are others.
    """
    with safe_open(path, "pt") as file:
        other = set(file.keys()) ^ set(tensors)
        if other:
            raise ValueError(f"{Path(path).name} holds other tensors, like {min(other)}")
        for name, tensor in tensors.items():
            values = file.get_slice(name)
            if values.get_shape() != list(tensor.shape):
                raise ValueError(f"{name} in {Path(path).name} has another shape")
            fill(tensor, values if tensor.ndim else file.get_tensor(name))


def write_optimizer(path, optimizer):
    """Write the state_dict() of an optimizer over split weights, as torch.save writes that of whole ones, one tensor
    gathered at a time; called by every process, the main one writes."""
    saved = optimizer.state_dict()
    tensors = [t for state in saved["state"].values() for t in state.values() if isinstance(t, torch.Tensor)]
    if _is_main():
        empty = {  # takes no memory: nothing is written to it
            index: {n: torch.empty(t.shape, dtype=t.dtype) if torch.is_tensor(t) else t for n, t in state.items()}
            for index, state in saved["state"].items()
        }
        with skip_data():
            torch.save(saved | {"state": empty}, path)
    with _opened(path, "r+b") as file:
        offsets = _data_offsets(path) if file is not None else [0] * len(tensors)
        for offset, tensor in zip(offsets, tensors, strict=True):
            _write(file, offset, tensor)


def _data_offsets(path):
    """Where the values of each tensor begin in a file of torch.save, in the order in which they were saved."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        records = {info.filename.partition("/data/")[2]: info for info in archive.infolist()}
        offsets = []
        for number in range(sum(name.isdigit() for name in records)):
            file.seek(records[str(number)].header_offset + 26)  # of a zip file's local header of 30 bytes
            lengths = [int.from_bytes(file.read(2), "little") for _ in range(2)]
            offsets.append(records[str(number)].header_offset + 30 + sum(lengths))
    return offsets


def read_optimizer(path, optimizer):
    """Load into an optimizer over split weights what `write_optimizer` or a run of whole ones wrote.

    Each process reads its parts alone. ValueError for another network's.
    """
    saved = torch.load(path, "cpu", weights_only=True, mmap=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    number = sum(len(group["params"]) for group in saved["param_groups"])
    if number != len(parameters):
        raise ValueError(f"optimizer states of {number} weights for {len(parameters)}")
    states = {}
    for index, state in saved["state"].items():
        states[index] = {}
        for name, value in state.items():
            if torch.is_tensor(value) and value.ndim:
                if value.shape != parameters[index].shape:
                    raise ValueError(f"optimizer states of another shape, {name} of weight {index}")
                split = torch.zeros_like(parameters[index], dtype=value.dtype, requires_grad=False)
                fill(split, value)
                value = split
            states[index][name] = value
    optimizer.load_state_dict(saved | {"state": states})


def write_network(folder, network, max_shard_size=100 * 2**30):
    """As diffusers' `save_pretrained` writes a network, of split weights one tensor gathered at a time.

    Called by every process; the main one writes. Weights lie in files of at most `max_shard_size` bytes.
    """
    folder = Path(folder)
    if not is_sharded(network):
        if _is_main():
            network.save_pretrained(folder, max_shard_size=max_shard_size)
        return
    if _is_main():
        folder.mkdir(parents=True, exist_ok=True)
        network.save_config(folder)
    files, size = [{}], 0
    for name, tensor in network.state_dict().items():
        added = tensor.numel() * tensor.element_size()
        if files[-1] and size + added > max_shard_size:
            files.append({})
            size = 0
        files[-1][name] = tensor
        size += added
    stem = "diffusion_pytorch_model"
    if len(files) == 1:
        return write_tensors(folder / f"{stem}.safetensors", files[0])
    names = [f"{stem}-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    for name, tensors in zip(names, files, strict=True):
        write_tensors(folder / name, tensors)
    if _is_main():
        total = sum(t.numel() * t.element_size() for tensors in files for t in tensors.values())
        places = {key: name for name, tensors in zip(names, files, strict=True) for key in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        Path(folder, f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + os.linesep)
