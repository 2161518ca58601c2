"""Checkpoint folders, and what of them is kept: all but the values of tensors that hold more than one."""

import json
import zlib

import torch
from accelerate.utils import recursively_apply
from safetensors import safe_open
from safetensors.torch import save_file

MARK = "a tensor: "


def read(checkpoint):
    """{file: its content}: tensors and JSON, bytes where it is neither."""
    found = {}
    for path in sorted(checkpoint.iterdir()):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                found[path.name] = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
        elif path.suffix in (".bin", ".pt"):
            found[path.name] = torch.load(path, weights_only=True)
        else:
            found[path.name] = path.read_bytes() if path.suffix == ".pkl" else json.loads(path.read_text())
    return found


def write(checkpoint, content):
    """The folder that `read` gives `content` of; torch's files may have other sizes than they had."""
    checkpoint.mkdir(parents=True)
    for name, value in content.items():
        path = checkpoint / name
        if path.suffix == ".safetensors":
            save_file(value[0], path, value[1])
        elif path.suffix in (".bin", ".pt"):
            torch.save(value, path)
        else:
            path.write_bytes(value if path.suffix == ".pkl" else json.dumps(value, indent=1).encode())
    sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.name != "COMPLETE"}
    (checkpoint / "COMPLETE").write_text(json.dumps(content["COMPLETE"] | {"files": sizes}))


def skeleton(content):
    """A text for each tensor: type, shape, and the value where it is one. `filled` reads it."""

    def describe(tensor):
        value = tensor.item() if tensor.numel() == 1 else None
        return MARK + json.dumps([str(tensor.dtype).removeprefix("torch."), list(tensor.shape), value])

    return recursively_apply(describe, content)


def filled(content):
    """Tensors for the texts of `skeleton`. Large ones are drawn by the file's name, good for weights and moments."""

    def draw(text, generator):
        dtype, shape, value = json.loads(text.removeprefix(MARK))
        tensor = torch.rand(shape, generator=generator) / 10 if value is None else torch.full(shape, value)
        return tensor.to(getattr(torch, dtype))

    seeds = {name: torch.Generator().manual_seed(zlib.crc32(name.encode())) for name in content}
    is_text = lambda value: isinstance(value, str) and value.startswith(MARK)  # noqa: E731
    return {name: recursively_apply(draw, value, seeds[name], test_type=is_text) for name, value in content.items()}


def digest(tensor):
    return zlib.crc32(tensor.detach().contiguous().numpy())


def comparable(content):
    """Two checkpoints of one state agree in it."""

    def describe(tensor):
        return str(tensor.dtype), list(tensor.shape), digest(tensor)

    # without the random states themselves: the JSON has a hash of those that are drawn from
    content = {name: recursively_apply(describe, value) for name, value in content.items() if ".pkl" not in name}
    content["COMPLETE"] |= {"files": sorted(content["COMPLETE"]["files"])}
    return content
