"""Loading the model that is measured, and sampling it."""

import inspect
import json
import time
from pathlib import Path

from common.errors import UserError
from common.networks import teachers, weights
from common.run.checkpointing import CONFIG
from common.tools.prompt_metrics import prompt_labels

import numpy as np
import torch
from tqdm import tqdm


def find_labels(feature_network, prompts, cache_dir=None):
    """The class that each prompt names, from the classifier's configuration alone."""
    from transformers import AutoConfig

    if prompts is None:
        raise UserError("--prompt_accuracy needs --prompts that name the classes")
    try:
        config = AutoConfig.from_pretrained(feature_network, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise UserError(f"--feature_network {feature_network} cannot be loaded: {error}") from error
    if not any("ForImageClassification" in name for name in config.architectures or []):
        raise UserError(f"--prompt_accuracy needs an image classifier: --feature_network {feature_network} is none")
    try:
        return prompt_labels(config.id2label, prompts)
    except ValueError as error:
        raise UserError(f"--prompt_accuracy: {error}") from error


def load_index(path, where):
    """A pipeline's model_index.json."""
    import diffusers

    try:
        index = diffusers.DiffusionPipeline.load_config(path, **where)
    except (OSError, ValueError) as error:
        raise UserError(f"--pretrained_model {path} cannot be loaded: {error}") from error
    if not isinstance(index, dict):
        raise UserError(f"--pretrained_model {path}: its model_index.json holds no names of parts")
    return index


def unet_class(index):
    """The class of a pipeline's U-Net."""
    import diffusers

    if "unet" not in index:
        raise UserError(f"--unet: a {index.get('_class_name')} has no U-Net: drop the flag")
    return getattr(diffusers, index["unet"][1])


def lora_file(path):
    """The one .safetensors file of a LoRA folder, or the file itself."""
    path = Path(path)
    if path.is_file() and path.suffix == ".safetensors":
        return path
    standard = path / "pytorch_lora_weights.safetensors"
    found = [standard] if standard.is_file() else sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise UserError(f"--lora {path} must be a .safetensors file or a folder with one: it has {len(found)}")
    return found[0]


def load_pipeline(
    path, unet=None, lora=None, scheduler="keep", dtype=torch.float32, device="cpu", revision=None, variant=None,
    cache_dir=None,
):  # fmt: skip
    """A stock diffusers pipeline without its safety checker.

    unet: folder that replaces its U-Net; lora: folder or file; with the scheduler beside either, where there is one;
    scheduler: keep, ddim, lcm or tcd, the last three made from the configuration of the pipeline's own, ddim from the
    last timestep down (trailing), which few steps need. UserError: not loadable, or the LoRA fits nothing.
    """
    import diffusers

    where = {"revision": revision, "cache_dir": cache_dir}
    parts = {}
    index = load_index(path, where)
    if unet:
        parts["unet"] = load_unet(index, unet, dtype)
    flag = f"--pretrained_model {path}"
    try:
        cls = pipeline_class(path, index, is_student=bool(unet or lora), **where)
        pipeline = teachers.load_checked(flag, path, index, cls, dtype, variant=variant, **where, **parts)
    except teachers.LOAD_ERRORS as error:
        raise UserError(f"{flag} cannot be loaded: {error}") from error
    weights.fit_tokenizers(pipeline)
    if scheduler == "keep" and (lora or unet):
        pipeline.scheduler = scheduler_beside(lora or Path(unet).parent) or pipeline.scheduler
    if scheduler != "keep":
        if not hasattr(pipeline.scheduler, "alphas_cumprod"):
            name = type(pipeline.scheduler).__name__
            raise UserError(f"--scheduler {scheduler} cannot be made from {path}'s {name}: use --scheduler keep")
        cls = {"ddim": diffusers.DDIMScheduler, "lcm": diffusers.LCMScheduler, "tcd": diffusers.TCDScheduler}[
            scheduler
        ]
        # Its defaults too, which from_config leaves to the new class: LCM's and TCD's betas are others.
        config = {k: v for k, v in pipeline.scheduler.config.items() if k != "_use_default_values"}
        spacing = {"timestep_spacing": "trailing"} if scheduler == "ddim" else {}
        pipeline.scheduler = cls.from_config({"clip_sample": False} | config | spacing)
    if lora:
        load_lora(pipeline, lora)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def plain_class(index):
    """The plain text-to-image class of what model_index.json describes, None where that is no Stable Diffusion."""
    try:
        return teachers.PLAIN[teachers.check_kind("", index)]
    except UserError:
        return None


def pipeline_class(path, index, is_student, **where):
    """What `path` is loaded as: the class that saved it; plain text-to-image where that one starts from an image, or
    guides in ways of its own (PAG), which a student of training has not seen."""
    import diffusers

    saved, plain = getattr(diffusers, str(index.get("_class_name")), None), plain_class(index)
    if plain in (None, saved):
        return diffusers.DiffusionPipeline
    unet = diffusers.UNet2DConditionModel.load_config(path, subfolder="unet", **where)
    takes = inspect.signature(saved.__call__).parameters if saved else {"image"}
    if unet["in_channels"] != unet["out_channels"] or not (is_student or {"image", "control_image"} & set(takes)):
        return diffusers.DiffusionPipeline
    print(f"{path}: saved by {index.get('_class_name')}, measured as {plain.__name__}", flush=True)
    return plain


def trained_size(path, unet=None, lora=None):
    """{"height", "width"} that a student of ours was trained at, in pixels, by the training_config.json of its run; {}
    where there is none."""
    folder = Path(lora or unet or path)
    for place in (folder, *(folder.absolute().parents[:2] if lora or unet else ())):
        if (place / CONFIG).is_file():
            side = json.loads((place / CONFIG).read_text(encoding="utf-8"))["flags"].get("resolution")
            return {"height": side, "width": side} if side else {}
    return {}


def scheduler_beside(folder):
    """The scheduler that a training script saved in FOLDER/scheduler, or None."""
    import diffusers

    file = Path(folder, "scheduler", "scheduler_config.json")
    if not file.is_file():
        return None
    cls = getattr(diffusers, json.loads(file.read_text())["_class_name"])
    return cls.from_pretrained(folder, subfolder="scheduler")


def load_unet(index, unet, dtype):
    """The U-Net of a folder, in the class that the pipeline's index names."""
    try:
        return teachers.load_network(f"--unet {unet}", unet_class(index), unet, dtype=dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"--unet {unet} cannot be loaded: {error}") from error


def load_lora(pipeline, lora):
    if not hasattr(pipeline, "load_lora_weights"):
        raise UserError(f"--lora: {type(pipeline).__name__} takes no LoRA: drop the flag")
    file = lora_file(lora)
    try:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, use_safetensors=True)
    except Exception as error:  # the loader raises whatever a foreign state dict leads to
        raise UserError(f"--lora {lora} does not fit the pipeline: {error}") from error
    if not pipeline.get_list_adapters():
        raise UserError(f"--lora {lora} holds no weights for any part of this pipeline")


def generate_images(pipeline, prompts, num_inference_steps, guidance_scale, seed, batch_size, **pipeline_kwargs):
    """Images from a diffusers pipeline, image i from prompts[i] and a CPU generator with seed + i.

    prompts: N strings, or N times None for an unconditional pipeline. guidance_scale: None leaves the pipeline's
    default. pipeline_kwargs go to the pipeline as they are (height, width, eta, timesteps).
    Returns (uint8 (N, 3, H, W) on the CPU, seconds per image); the first batch warms up and is not timed where there
    are others. ValueError: the pipeline does not take an argument, or returned NaN.
    """
    accepted = inspect.signature(pipeline.__call__).parameters
    options = dict(pipeline_kwargs, num_inference_steps=num_inference_steps)
    if guidance_scale is not None:
        options["guidance_scale"] = guidance_scale
    conditional = prompts[0] is not None
    if missing := [name for name in (*options, *["prompt"] * conditional) if name not in accepted]:
        raise ValueError(f"{type(pipeline).__name__} takes no {missing[0]}")
    if "eta" in options and not uses_eta(pipeline):
        raise ValueError(f"{type(pipeline.scheduler).__name__} has no eta: drop it or take another scheduler")
    if not conditional and "prompt" in accepted:
        raise ValueError(f"{type(pipeline).__name__} needs prompts")
    images, timed = [], []
    with tqdm(total=len(prompts), desc=f"{num_inference_steps} steps", unit="image", delay=5) as progress:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            generators = [torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(batch))]
            inputs = {"prompt": batch} if conditional else {"batch_size": len(batch)}
            started = time.perf_counter()
            output = pipeline(**inputs, **options, generator=generators, output_type="np").images  # (B, H, W, C) 0..1
            timed.append((time.perf_counter() - started, len(batch)))  # the copy to the CPU has waited for the GPU
            images.append(to_uint8(output))
            progress.update(len(batch))
    timed = timed[1:] or timed
    return torch.cat(images), sum(seconds for seconds, _ in timed) / sum(count for _, count in timed)


def to_uint8(images):
    """float (B, H, W, C) in 0..1 -> uint8 (B, 3, H, W); one channel becomes three equal ones."""
    if not np.isfinite(images).all():
        raise ValueError("the pipeline returned NaN: its VAE may need another --dtype, such as bfloat16 or float32")
    images = torch.from_numpy((images * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)
    return images.expand(-1, 3, -1, -1).contiguous()


def used_value(pipeline, name, value):
    """What the pipeline ran with: the flag's value, else the pipeline's own default; None if it has none."""
    parameter = inspect.signature(pipeline.__call__).parameters.get(name)
    if parameter is None or (name == "eta" and not uses_eta(pipeline)):
        return None
    return parameter.default if value is None else value


def uses_eta(pipeline):
    return "eta" in inspect.signature(pipeline.scheduler.step).parameters
