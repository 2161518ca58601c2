"""A user's LoRAs as a part of the teacher: read by the pipeline's own loader and added to its weights in memory.

Files may be diffusers' or kohya's, with text encoders or without: what `pipe.load_lora_weights` takes.
"""

import hashlib
import re
from pathlib import Path

from common.errors import CALL_ERRORS, UserError, blame
from common.networks import outlines
from common.networks.lora import WEIGHTS
from common.networks.weights import check_name

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

ADAPTER = re.compile(r"(?P<part>\w+)\.(?P<path>.+)\.(?P<side>lora_A|lora_B|lora\.down|lora\.up)\.weight")
ERRORS = (OSError, RuntimeError, SafetensorError, *CALL_ERRORS)


def parse(text):
    """[(file, scale)] of `teacher_lora`, a comma list of PATH or PATH:SCALE; [] for None. A folder means its LoRA.

    UserError for what is no file, and for a scale of 0, which is no LoRA.
    """
    found = []
    for part in filter(None, (part.strip() for part in str(text or "").split(","))):
        path, _, end = part.rpartition(":")
        is_scaled = path and re.fullmatch(r"-?\d+(\.\d+)?", end)
        path, scale = (path, float(end)) if is_scaled else (part, 1.0)
        flag, place = f"`teacher_lora`={part}", Path(path).expanduser()
        check_name(flag, path)
        files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
        files = [file for file in files if file.name == WEIGHTS] or files
        if len(files) != 1 or scale == 0:
            why = "its scale is 0" if scale == 0 else f"{len(files)} LoRA files there"
            raise UserError(f"{flag}: {why}; give FILE.safetensors or FILE.safetensors:SCALE, several with commas")
        found.append((files[0], scale))
    return found


def identity(text):
    """What tells one `teacher_lora` from another, wherever the files lie: [[SHA-256, scale]]."""
    return [[hashlib.sha256(file.read_bytes()).hexdigest(), scale] for file, scale in parse(text)]


def check(text, pipeline_class, networks):
    """UserError unless each LoRA adapts these denoisers, or a text encoder; needs no weights of theirs.

    networks: {part: (class, configuration)}.
    """
    loras = parse(text)
    if loras and not hasattr(pipeline_class, "lora_state_dict"):
        raise UserError(
            f"`teacher_lora`: a {pipeline_class.__name__} takes no LoRA in diffusers; name a teacher that has it in it"
        )
    shapes = {}
    for part, (cls, values) in networks.items() if loras else ():
        with torch.device("meta"):
            network = cls.from_config(values)
        named = network.named_modules()
        shapes[part] = {path: m.weight.shape for path, m in named if hasattr(m, "weight") and m.weight is not None}
    for file, _ in loras:
        flag, adapts = f"`teacher_lora`={file}", 0
        with blame(f"{flag}: it cannot be read", *ERRORS):
            tensors = load_file(file)
        with blame(f"{flag}: it is no LoRA that a {pipeline_class.__name__} takes", *ERRORS):
            state = pipeline_class.lora_state_dict(dict(tensors))
        for name, tensor in (state[0] if isinstance(state, tuple) else state).items():
            match = ADAPTER.fullmatch(name)
            adapts += bool(match or name.startswith("text_encoder"))
            if match and match["part"] in shapes:
                right = shapes[match["part"]].get(match["path"])
                down = match["side"] in ("lora_A", "lora.down")
                fits = right and (tensor.shape[1] == right[1] if down else tensor.shape[0] == right[0])
                if not fits:
                    raise UserError(
                        f"{flag}: it belongs to another model, its {name} is {tuple(tensor.shape)} and that layer of "
                        f"the teacher is {tuple(right) if right else 'not there'}; name the teacher it was made for"
                    )
        if not adapts:
            raise UserError(f"{flag}: it is no LoRA that a {pipeline_class.__name__} takes, it adapts no layer")


def fuse(pipeline, text):
    """Add each LoRA of `teacher_lora`, times its scale, to the weights of the pipeline, in place, in their dtype.

    To those of `outlines` it is added when they are read.
    """
    for file, scale in parse(text):
        with blame(f"`teacher_lora`={file}: it cannot be fused into the teacher", *ERRORS):
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, local_files_only=True)
            parts = [
                p for p in pipeline._lora_loadable_modules if getattr(getattr(pipeline, p, None), "peft_config", 0)
            ]
            outlined = [part for part in parts if outlines.is_one(getattr(pipeline, part))]
            for part in outlined:
                outlines.fuse(f"`teacher_lora`={file}", getattr(pipeline, part), scale)
            if outlined != parts or not parts:  # of which diffusers says that the LoRA adapts nothing
                components = [part for part in parts if part not in outlined]
                pipeline.fuse_lora(components=components, lora_scale=scale, safe_fusing=True)
            pipeline.unload_lora_weights()


def code(text):
    """[lines of Python] that do the same with a pipeline `pipe`."""
    lines = []
    for file, scale in parse(text):
        lines.append(f"pipe.load_lora_weights({str(file.parent.absolute())!r}, weight_name={file.name!r})")
        lines += [f"pipe.fuse_lora(lora_scale={scale:g})", "pipe.unload_lora_weights()"]
    return lines
