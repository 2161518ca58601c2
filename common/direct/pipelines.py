"""Any text-to-image or -video pipeline of diffusers as a differentiable function, without per-model code.

diffusers runs `__call__` under `torch.no_grad`; the function that it decorates is the pipeline itself, and gradients
go through all of its steps. So training and inference cannot differ. What a pipeline does is found out in `probes.py`.
Left out: pipelines that start from an image (`tasks.py`), and guidance that is a component (`guider`) instead of an
argument.
"""

import functools
import inspect
import json
from pathlib import Path

from common.direct import tasks
from common.errors import UserError, blame, line_of
from common.networks import fusing, lora, outlines, performance, sharded, teachers
from common.networks.weights import check_name, check_parts, check_pipeline
from common.results import export

import diffusers
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from peft import PeftConfig
from safetensors.torch import save_file

LOWERED = torch.nn.Linear, torch.nn.modules.conv._ConvNd  # by autocast to a half precision
DENOISERS = ("unet", "transformer", "transformer_2", "prior")
SCHEDULE_ARGUMENTS = ("num_inference_steps", "sigmas", "timesteps")  # of a call: teacher and student differ in them


def read_pipeline_config(name, revision=None, cache_dir=None, variant=None, teacher_lora=None):
    """What a pipeline consists of, without its weights: {"class", "denoisers": {name: (class, configuration)},
    "scheduler": (class, configuration), "has_vae", "notes": [sentences]}. The class is that which makes images of text
    alone, where another one has saved the same parts.

    name: a folder or hub repository in diffusers layout. teacher_lora: see `fusing`. Raises UserError when it is
    missing or partial, when its weights are damaged or pickles, when diffusers has no such pipeline, when its call
    cannot be distilled, or when a LoRA is another model's.
    """
    flag = f"`pretrained_teacher_model`={name}"
    options = {"revision": revision, "cache_dir": cache_dir}
    check_name(flag, name)
    if Path(name).exists() and not Path(name, "model_index.json").is_file():
        raise UserError(f"{flag}: no model_index.json in it, so it is not a pipeline in diffusers layout")
    errors = OSError, ValueError, AttributeError, TypeError, IndexError
    with blame(f"{flag}: neither a folder nor a model that the hub gives", *errors):
        index = teachers.read_index(flag, name, **options)
        if index.get("requires_aesthetics_score"):
            raise UserError(f"{flag}: {teachers.REFINER}")
        parts = {key: value for key, value in index.items() if isinstance(value, list) and value[1] is not None}
        pipeline_class = getattr(diffusers, str(index.get("_class_name")), None)
        if pipeline_class is None:
            raise UserError(f"{flag}: diffusers {diffusers.__version__} has no {index.get('_class_name')}")
        objection = tasks.objection(pipeline_class)
        found = {part: getattr(diffusers, parts[part][1], None) for part in DENOISERS if part in parts}
        if not objection and (not found or None in found.values() or "scheduler" not in parts):
            objection, found = "it has no denoiser and scheduler of diffusers", {}
        configs = {part: (cls, cls.load_config(name, subfolder=part, **options)) for part, cls in found.items() if cls}
        sibling = tasks.text_class(pipeline_class, parts, [config for _, config in configs.values()])
        if objection and not (configs and sibling):
            raise UserError(f"{flag}: a {pipeline_class.__name__} cannot be distilled by this script, {objection}")
        scheduler_class = getattr(diffusers, parts["scheduler"][1], None)
        if scheduler_class is None:
            raise UserError(f"{flag}: diffusers {diffusers.__version__} has no {parts['scheduler'][1]}")
        scheduler = scheduler_class, scheduler_class.load_config(name, subfolder="scheduler", **options)
    for part, (_, values) in {**configs, "scheduler": scheduler}.items():
        if not isinstance(values, dict):
            raise UserError(f"{flag}: the configuration of its {part} is no JSON object")
    check_parts(flag, name, index, teachers.NOT_TRAINED)
    check_pipeline(flag, name, index, variant, **options, skip=teachers.NOT_TRAINED)
    used = sibling or pipeline_class
    fusing.check(teacher_lora, used, configs)
    change = f"{flag}: a {pipeline_class.__name__} saved it, a {used.__name__} samples it here, from text alone"
    notes = [change] if sibling else []
    return {
        "class": used,
        "denoisers": configs,
        "scheduler": scheduler,
        "has_vae": "vae" in parts,
        "notes": notes,
    }


def check_performance(denoisers, gradient_checkpointing, compiles, has_channels_last):
    """UserError where a lever can do nothing for a network; needs no weights.

    denoisers: {name: (class, configuration)} as from `read_pipeline_config`.
    """
    for name, (cls, values) in denoisers.items():
        if gradient_checkpointing == "selective" and not getattr(cls, "_supports_gradient_checkpointing", False):
            raise UserError(
                f"`gradient_checkpointing`=selective: the teacher's {name}, a {cls.__name__}, can be recomputed as a "
                "whole only; pass full"
            )
        if not compiles and not has_channels_last:
            continue
        with torch.device("meta"):
            network = cls.from_config(values)
        if compiles and not performance.repeated_blocks(network):
            raise UserError(f"`compile`: the teacher's {name}, a {cls.__name__}, has no repeated blocks; drop it")
        if has_channels_last and not has_convolutions(network):
            raise UserError(
                f"`channels_last` is a layout of convolutions, and the teacher's {name}, a {cls.__name__}, is a "
                "transformer without them; drop it"
            )


def has_convolutions(network):
    """Whether blocks of the network convolve: a transformer does so once, to make patches of an image."""
    paths = [path for path, module in network.named_modules() if isinstance(module, torch.nn.Conv2d)]
    return any(part.isdigit() for path in paths for part in path.split("."))


def load_pipeline(
    name,
    dtype=torch.float32,
    revision=None,
    variant=None,
    cache_dir=None,
    teacher_lora=None,
    outlined=False,
    **replaced,
):
    """The pipeline on the CPU in `dtype`, every weight frozen and in eval mode, without safety checkers.

    name: folder or hub repository in diffusers layout. dtype: of all, or {part or "default": dtype}; what a network
    keeps in float32 stays there, so it is moved to its device by `.to(device)` alone. teacher_lora: fused into it.
    outlined: denoisers are `outlines`. replaced: parts that are there already and are not loaded.
    """
    index = DiffusionPipeline.load_config(name, revision=revision, cache_dir=cache_dir)
    skipped = {part: None for part in teachers.NOT_TRAINED if part in index}
    options = {"revision": revision, "variant": variant, "cache_dir": cache_dir, "dtype": dtype}
    flag = f"`pretrained_teacher_model`={name}"
    parts = [part for part, value in index.items() if isinstance(value, list)]
    loader = tasks.text_class(getattr(diffusers, index["_class_name"]), parts) or DiffusionPipeline
    try:
        found = outlines.of_pipeline(flag, name, index, loader, DENOISERS, **options) if outlined else {}
        load = functools.partial(teachers.load_checked, flag, name, index, loader, **options)
        pipeline = teachers.with_lora(lambda parts: load(**skipped | parts), teacher_lora, replaced, outlined=found)
    except (*teachers.LOAD_ERRORS, ImportError) as error:
        raise UserError(f"{flag} cannot be loaded: {line_of(error)}") from None
    for network in denoisers(pipeline).values():
        keep_float32(network)
    return pipeline


def keep_float32(network):
    """Let layers that the library keeps in float32 compute in it also under autocast, in place: so does the card. Only
    those that autocast would lower are touched; what others give them there may come in a half precision."""
    kept = set(network._keep_in_fp32_modules or ())
    for path, module in network.named_modules():
        if kept & set(path.split(".")) and isinstance(module, LOWERED):
            teachers.without_autocast(module)
            module.register_forward_pre_hook(_in_own_dtype)


def _in_own_dtype(module, args):
    return tuple(x.to(module.weight.dtype) for x in args)


def load_vae(name, revision=None, variant=None, cache_dir=None):
    """The VAE of a pipeline alone, as `load_pipeline` gives it in float32."""
    index = DiffusionPipeline.load_config(name, revision=revision, cache_dir=cache_dir)
    others = [part for part, value in index.items() if isinstance(value, list) and part != "vae"]
    place = {"revision": revision, "variant": variant, "cache_dir": cache_dir}
    return load_pipeline(name, **place, **dict.fromkeys(others)).vae


def exempt_vae(pipeline):
    """Let the VAE compute in its own dtype also under autocast: SDXL's overflows in float16."""
    vae = getattr(pipeline, "vae", None)
    if vae is None:
        return
    original = vae.decode

    def decode(latents, *args, **kwargs):
        with torch.autocast(latents.device.type, enabled=False):
            return original(latents.to(vae.dtype), *args, **kwargs)

    vae.decode = decode


def denoisers(pipeline):
    """{name: module} of the networks that denoise, in the order of DENOISERS."""
    parts = {name: getattr(pipeline, name, None) for name in DENOISERS}
    return {name: module for name, module in parts.items() if isinstance(module, torch.nn.Module)}


def bring_others(pipeline, device):
    """Move what is no denoiser of a pipeline to a device."""
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module) and part not in denoisers(pipeline).values():
            part.to(device)


def weights_sample(pipeline, num_tensors=32, num_values=4, encoder=False):
    """{parameter's name: its first values as floats} of some of the denoisers' tensors: enough to tell two teachers
    apart, whatever their folders are called and whichever precision they were loaded in. encoder: of the VAE's
    encoder instead, which made the latents of images."""
    modules = {"vae.encoder": pipeline.vae.encoder} if encoder else denoisers(pipeline)
    named = [(f"{d}.{n}", p) for d, module in modules.items() for n, p in module.named_parameters()]
    named = [(name.replace(".base_layer.", "."), p) for name, p in named if ".lora_" not in name]
    chosen = named[:: max(1, len(named) // num_tensors)]
    return {name: sharded.whole(p).flatten()[:num_values].float().tolist() for name, p in chosen}


def generators(seeds):
    """One CPU generator a sample: the noise of a sample depends on its seed alone, not on batch, rank or device."""
    return [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]


def call(pipeline, prompts, seeds, output_type="latent", **kwargs):
    """The pipeline's own call, differentiable in its denoisers: B prompts and seeds -> its first output.

    output_type "latent": whatever the pipeline calls latents, (B, ...), in its dtype; "pt": images (B, C, H, W) or
    videos (B, F, C, H, W) in 0..1. seeds: B integers, or B generators. kwargs: for the call; a negative_prompt that is
    a string is every sample's. Nothing is recorded for gradients under torch.no_grad.
    """
    if isinstance(kwargs.get("negative_prompt"), str):
        kwargs["negative_prompt"] = [kwargs["negative_prompt"]] * len(prompts)
    drawn = seeds if isinstance(seeds[0], torch.Generator) else generators(seeds)
    options = {"generator": drawn, "output_type": output_type, "return_dict": False}
    try:
        undecorated = inspect.unwrap(type(pipeline).__call__)  # without torch.no_grad and whatever else wraps it
        answer = undecorated(pipeline, prompt=list(prompts), **options, **kwargs)[0]
    except Exception as error:
        if type(error) is not Exception:
            raise
        answer = error  # bare, as diffusers raises where a pipeline knows no latents: LDM3D, which makes depth too
    if output_type == "latent" and not isinstance(answer, torch.Tensor):
        name, why = type(pipeline).__name__, str(answer) if isinstance(answer, Exception) else type(answer).__name__
        raise UserError(f"`pretrained_teacher_model`: a {name} cannot be distilled, its call gives no latents ({why})")
    return answer


class Rollout(torch.nn.Module):
    """Owns the denoisers of a pipeline and runs its call: this is what DDP wraps, while the pipeline keeps the
    networks themselves, of which it reads configuration and dtype."""

    def __init__(self, pipeline, **kwargs):
        super().__init__()
        self.denoisers = torch.nn.ModuleDict(denoisers(pipeline))
        self.pipeline, self.kwargs = pipeline, kwargs

    def train(self, mode=True):
        """Denoisers stay in eval mode: some change what they return, and checkpointing does not depend on it. Only the
        adapters' dropout follows."""
        super().train(False)
        self.training = mode
        for layer in lora.lora_layers(self).values():
            layer.lora_dropout.train(mode)
        return self

    def forward(self, prompts=None, seeds=None, again=None, **kwargs):
        """The latents of prompts and seeds; or what `again`, a `stepwise.Call` of a denoiser, gives: whatever wraps
        this module goes round that too."""
        return again() if again else call(self.pipeline, prompts, seeds, **self.kwargs | kwargs)


class _Answer:
    """A scheduler whose every step leads to the latents that it was given."""

    def __init__(self, scheduler, latents):
        self._scheduler, self._latents = scheduler, latents

    def __getattr__(self, name):
        return getattr(self._scheduler, name)

    def step(self, *args, return_dict=True, **kwargs):
        sample = kwargs.get("sample", args[2] if len(args) > 2 else self._latents)
        answer = self._latents.to(sample.dtype, copy=True)  # pairs may be kept in another one than the run computes in
        if return_dict:
            return type("Output", (), {"prev_sample": answer, "pred_original_sample": answer})()
        return answer, answer


@torch.no_grad()
def decode(pipeline, latents, prompts, **kwargs):
    """Images (B, C, H, W) or videos in 0..1 of latents (B, ...) as `call` returns them, by the pipeline's decoding;
    None where the pipeline changes latents after its last step, so that theirs cannot be put in from outside.

    kwargs: of a student's call. The pipeline runs with a scheduler that answers every step with these latents.
    """
    scheduler, part = pipeline.scheduler, next(iter(denoisers(pipeline).values()))
    latents = latents.to(part.device)
    pipeline.scheduler = _Answer(scheduler, latents)
    try:
        seeds = range(len(prompts))
        if not torch.equal(call(pipeline, prompts, seeds, **kwargs).to(latents.dtype), latents):
            return None
        return call(pipeline, prompts, seeds, "pt", **kwargs)
    finally:
        pipeline.scheduler = scheduler


def to_pixels(images):
    """Images (B, C, H, W) or videos (B, F, C, H, W) in 0..1 -> uint8 (B, H, W, 3); of a video the middle frame."""
    images = images[:, images.shape[1] // 2] if images.ndim == 5 else images
    pixels = (images.float().clamp(0, 1) * 255.0).round().to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()


def add_lora(pipeline, rank, alpha, dropout=0.0, names=None, init_lora=None):
    """Attach adapters to every denoiser, in place; names: see `lora.target_paths`, init_lora: `lora.add_lora`."""
    for part, module in denoisers(pipeline).items():
        lora.add_lora(module, rank, alpha, dropout, lora.target_paths(module, names), init_lora, part)
        module.eval()  # until training, nothing draws


def lora_files(pipeline_class, names):
    """{denoiser: (file, keyword of save_lora_weights, keywords of load_lora_weights)}; None where the pipeline class
    has no LoRA in diffusers."""
    if not hasattr(pipeline_class, "save_lora_weights"):
        return None
    arguments = inspect.signature(pipeline_class.save_lora_weights).parameters
    files = {}
    for name in names:
        if f"{name}_lora_layers" in arguments:
            files[name] = lora.WEIGHTS, name, {}
        else:  # Wan 2.2: the second transformer's LoRA is a file of its own
            files[name] = (
                lora.WEIGHTS.replace(".", f"_{name}.", 1),
                name.rpartition("_")[0],
                {f"load_into_{name}": True},
            )
    return files


@torch.no_grad()
def merged_weights(network):
    """A copy of a denoiser with its adapter added to its weights, float32 on the CPU, without any trace of PEFT.

    Called by every process where weights are split.
    """
    weights = {}
    for path, tensor in network.state_dict().items():
        if ".lora_" not in path:
            weights[path.replace(".base_layer.", ".")] = sharded.whole(tensor).float().cpu()
    for path, layer in lora.lora_layers(network).items():
        up, down = (sharded.whole(part[lora.ADAPTER].weight).float().cpu() for part in (layer.lora_B, layer.lora_A))
        delta = layer.scaling[lora.ADAPTER] * (up.flatten(1) @ down.flatten(1))
        weights[f"{path}.weight"] += delta.reshape(weights[f"{path}.weight"].shape)
    copy = type(network).from_config(network.config)
    copy.load_state_dict(weights)
    return copy


def save_lora(output_dir, pipeline):
    """Write the adapters for `pipe.load_lora_weights`; returns the names of what was written. Called by every process,
    the main one writes.

    Of a pipeline class that takes no LoRA in diffusers, each denoiser is written twice: as a PEFT adapter
    (`NAME_adapter/`) and with the adapter merged into its weights (`NAME/`), which stock diffusers loads as `NAME=`.
    """
    output_dir, parts = Path(output_dir), denoisers(pipeline)
    files, written = lora_files(type(pipeline), parts), []
    is_main = PartialState().is_main_process
    for name, module in parts.items():
        tensors = lora.saved_tensors(module)
        merged = None if files else merged_weights(module)
        if not is_main:
            continue
        if files:
            file, keyword, _ = files[name]
            metadata = {f"{keyword}_lora_adapter_metadata": lora.saved_metadata(module)}
            layers = {f"{keyword}_lora_layers": tensors} | metadata
            type(pipeline).save_lora_weights(output_dir, weight_name=file, **layers)
            written.append(file)
            continue
        folder = output_dir / f"{name}_adapter"
        folder.mkdir(parents=True, exist_ok=True)
        save_file({f"base_model.model.{k}": v for k, v in tensors.items()}, folder / "adapter_model.safetensors")
        PeftConfig.save_pretrained(module.peft_config[lora.ADAPTER], folder)
        merged.save_pretrained(output_dir / name)
        written += [f"{name}_adapter", name]
    return written


def save_denoisers(output_dir, pipeline):
    """Write the denoisers, each into its folder; returns their names. Called by every process, the main one writes."""
    for name, module in denoisers(pipeline).items():
        sharded.write_network(Path(output_dir, name), module, max_shard_size=10 * 10**9)
    return list(denoisers(pipeline))


def student_code(pipeline, model, prompt, kwargs, files=(), teacher=None):
    """Python that makes images of a prompt with a student, for its card.

    model: where it is, as from `export.model_code`; kwargs: of the call. A LoRA needs teacher too, the arguments of
    `export.load_code` that name it with its own "lora", and files, what `save_lora` has written.
    """
    loader, scheduler, parts, fused = type(pipeline).__name__, type(pipeline.scheduler).__name__, {}, []
    teacher = dict(teacher or {})
    if teacher:  # of merged denoisers, each in its folder
        parts = {name: type(part).__name__ for name, part in denoisers(pipeline).items() if name in files}
    names = {loader, *([scheduler] if teacher else []), *parts.values()}
    lines = ["import torch", f"from diffusers import {', '.join(sorted(names))}", ""]
    for name, part in parts.items():
        lines.append(f'{name} = {part}.from_pretrained({model}, subfolder="{name}", dtype=torch.bfloat16)')
    more = "".join(f", {name}={name}" for name in parts) + ", dtype=torch.bfloat16"
    load = f"{loader}.from_pretrained({model}{more})"
    if teacher:
        fused = fusing.code(teacher.pop("lora", None))
        load = export.load_code(loader, more=more, **teacher)
    lines += [f'pipe = {load}.to("cuda")', *fused]
    if teacher:
        lines.append(f'pipe.scheduler = {scheduler}.from_pretrained({model}, subfolder="scheduler")')
    for file, _, extra in (lora_files(type(pipeline), denoisers(pipeline)) or {}).values():
        if file in files:
            more = "".join(f", {name}={value}" for name, value in extra.items())
            lines.append(f'pipe.load_lora_weights({model}, weight_name="{file}"{more})')
    return "\n".join([*lines, f"images = pipe({export.quoted(prompt)}, {public_kwargs(kwargs)})[0]"])


def public_kwargs(kwargs):
    """Keyword arguments as they stand in a call in Python: `guidance_scale=1.0, num_inference_steps=4`."""
    return ", ".join(f"{name}={value!r}" for name, value in sorted(kwargs.items()))


def parse_kwargs(flag, text):
    """The dict of a flag that holds a JSON object; UserError otherwise."""
    with blame(f"{flag}={text} is no JSON", ValueError, way_out="write it like '{\"guidance_scale\": 1}'"):
        value = json.loads(text or "{}")
    if not isinstance(value, dict):
        raise UserError(f"{flag}={text} is no JSON object; write it like '{{\"guidance_scale\": 1}}'")
    return value
