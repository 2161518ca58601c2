"""LoRA on a denoiser: which modules, attach, switch off for the teacher, save for other programs, checkpoint.

The base is frozen in any dtype, the adapters are float32 and the only thing that trains. One network is both student
(adapters on) and teacher (`adapters_off`). Left out: LoRA on text encoders, DoRA, several adapters at once. Files for
other programs are a U-Net's alone.
"""

import contextlib
import json
import warnings
from pathlib import Path

from common.errors import UserError, blame
from common.files import whole
from common.networks import sharded
from common.networks.weights import check_name

import torch
from accelerate import PartialState
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

# As in LCM-LoRA (arXiv 2311.05556): attention, feed-forward, ResNet convolutions, samplers, time projections.
TARGET_MODULES = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)
WEIGHTS = "pytorch_lora_weights.safetensors"
KOHYA_WEIGHTS = "pytorch_lora_weights_kohya.safetensors"
CHECKPOINT = "adapters.safetensors"
ADAPTER = "default"


def parse_target_modules(text):
    """Names from the comma list of `lora_target_modules`; None means TARGET_MODULES."""
    if text is None:
        return TARGET_MODULES
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UserError("`lora_target_modules` names no module; leave the flag out for LCM-LoRA's list")
    return names


def target_paths(network, names=None):
    """The paths of the modules of a denoiser that get adapters, sorted; needs no weights.

    names: each selects the modules whose path is it or ends with it, as in PEFT; None: every Linear and Conv2d in a
    repeated block, a member of a ModuleList. Raises UserError for a name that selects nothing, or anything but Linear
    and Conv2d; of TARGET_MODULES itself, what a network does not have is left out.
    """
    modules = dict(network.named_modules())
    layers = {path: m for path, m in modules.items() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    fits = {path for path, layer in layers.items() if getattr(layer, "groups", 1) == 1}
    if names is None:
        return sorted(path for path in fits if any(part.isdigit() for part in path.split(".")))
    selected = {name: {path for path in modules if f".{path}".endswith(f".{name}")} for name in names}
    for name, paths in selected.items():
        if paths - fits or not (paths or tuple(names) == TARGET_MODULES):
            raise UserError(
                f"`lora_target_modules`: {name!r} does not select Linear or Conv2d modules of the teacher's denoiser; "
                f"name ends of module paths, like {','.join(TARGET_MODULES[:3])}"
            )
    return sorted(set().union(*selected.values()))


def check_rank(config, rank, target_modules, network_class=UNet2DConditionModel, of="lora_rank"):
    """UserError for modules that the denoiser does not have, and for a rank above what any of them can have, which
    adds memory alone; needs no weights of the denoiser, which it returns on meta. of: the parameter."""
    with torch.device("meta"):
        network = network_class.from_config(config)
    weights = [network.get_submodule(path).weight for path in target_paths(network, target_modules)]
    most = max(min(weight.shape[0], weight[0].numel()) for weight in weights)
    if rank > most:
        raise UserError(
            f"`{of}`={rank}: the largest of the adapted layers has rank {most}, so more than that cannot be learnt; "
            f"pass at most {most}"
        )
    return network


def check_lora(config, rank, alpha, target_modules, init_lora=None, network_class=UNet2DConditionModel, part="unet"):
    """`check_rank`, and UserError unless the LoRA of `init_lora` can be the start."""
    network = check_rank(config, rank, target_modules, network_class)
    if init_lora is not None:
        names = target_modules if target_modules is not None else target_paths(network)
        add_lora(network, rank, alpha, 0.0, names, init_lora, part)


def add_lora(network, rank, alpha, dropout=0.0, target_modules=TARGET_MODULES, init_lora=None, part="unet"):
    """Freeze a denoiser and attach float32 adapters to it, in place; they add alpha / rank * B A x to each module.

    B starts at zero, so that student and teacher agree at step 0. target_modules: as in PEFT. init_lora: a folder with
    an earlier run's LoRA, or one file in either format, whose adapters are the start instead; UserError when it does
    not fit.
    """
    network.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(target_modules))
    if hasattr(network, "add_adapter"):
        network.add_adapter(config, ADAPTER)
    else:
        inject_adapter_in_model(config, network, ADAPTER)
    for parameter in lora_parameters(network):
        parameter.data = parameter.data.float()
    network._lora_layers = list(lora_layers(network).values())  # for adapters_off, which runs at every step
    if init_lora is not None:
        start_from(network, init_lora, rank, alpha, part)


def add_second(network, rank, adapter):
    """Attach another float32 adapter, of alpha = rank, to the modules that have one, in place; that one stays on, and
    alone takes gradients. See `adapter_on`."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(lora_layers(network)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*multiple adapters in the model")
        if hasattr(network, "add_adapter"):
            network.add_adapter(config, adapter)
        else:
            inject_adapter_in_model(config, network, adapter)
    for parameter in adapter_tensors(network, adapter).values():
        parameter.data = parameter.data.float()
    for layer in network._lora_layers:
        layer.set_adapter(ADAPTER)


def start_from(network, init_lora, rank, alpha, part="unet"):
    """Copy an earlier LoRA into the adapters, as `add_lora` says. part: what files call the network."""
    _copy_tensors(_read_lora(network, init_lora, rank, alpha, part), adapter_tensors(network))


def lora_layers(unet):
    """{path: LoraLayer} of a denoiser, which may be wrapped by DDP or torch.compile."""
    return {path: module for path, module in _unwrap(unet).named_modules() if isinstance(module, LoraLayer)}


def adapter_tensors(unet, adapter=ADAPTER):
    """{path.lora_A.weight or path.lora_B.weight: parameter} of an adapter, in the order of the network."""
    tensors = {}
    for path, layer in lora_layers(unet).items():
        tensors[f"{path}.lora_A.weight"] = layer.lora_A[adapter].weight
        tensors[f"{path}.lora_B.weight"] = layer.lora_B[adapter].weight
    return tensors


def lora_parameters(unet):
    """The adapters' parameters, which are all that trains."""
    return list(adapter_tensors(unet).values())


@contextlib.contextmanager
def adapters_off(unet):
    """Inside, `unet` computes the base network, for the teacher's forward; adapters come back on even after an error.

    Only under no_grad: a backward pass of the student that ran inside, or checkpointed activations recomputed inside,
    would go through the base without a word. PEFT's disable_adapters() is not used, it sets requires_grad to False.
    """
    assert not torch.is_grad_enabled(), "adapters_off is for the teacher: enter it under torch.no_grad()"
    layers = _unwrap(unet)._lora_layers
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextlib.contextmanager
def adapter_on(unet, adapter):
    """Inside, `unet` computes with another of its adapters; a backward pass of that belongs inside too, since what is
    recomputed in it is recomputed as the network is then. Nobody's requires_grad changes."""
    layers = _unwrap(unet)._lora_layers
    before = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = [adapter]
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = active


def saved_tensors(network):
    """`adapter_tensors` as they stand in files; called by every process where weights are split."""
    return {name: sharded.whole(p).cpu().contiguous() for name, p in adapter_tensors(network).items()}


def saved_metadata(network):
    """What stands beside the tensors. Not config.to_dict(): another version of PEFT refuses fields that it does not
    know."""
    config = _unwrap(network).peft_config[ADAPTER]
    return {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}


def _unwrap(model):
    while isinstance(model, DistributedDataParallel) or "_orig_mod" in model._modules:
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
    return model


def save_lora(output_dir, unet):
    """Write both files into `output_dir`, each complete or not at all; called by every process, the main one writes.

    `pytorch_lora_weights.safetensors` is for diffusers: `pipe.load_lora_weights(output_dir)`; alpha and rank are in
    its metadata, which old versions of diffusers ignore: where alpha is not the rank they need the other file.
    `pytorch_lora_weights_kohya.safetensors` is for ComfyUI and A1111, with alpha beside each module's weights, and
    diffusers reads it too (weight_name=). Returns the two paths.
    """
    output_dir, unet = Path(output_dir), _unwrap(unet)
    config, tensors, metadata = unet.peft_config[ADAPTER], saved_tensors(unet), saved_metadata(unet)
    if not PartialState().is_main_process:
        return output_dir / WEIGHTS, output_dir / KOHYA_WEIGHTS
    output_dir.mkdir(parents=True, exist_ok=True)
    with whole(output_dir / WEIGHTS) as unfinished:
        StableDiffusionPipeline.save_lora_weights(
            unfinished.parent,
            unet_lora_layers=tensors,
            weight_name=unfinished.name,
            unet_lora_adapter_metadata=metadata,
        )
    kohya = {}
    for path, key in kohya_keys(unet.config, lora_layers(unet)).items():
        kohya[f"{key}.lora_down.weight"] = tensors[f"{path}.lora_A.weight"]
        kohya[f"{key}.lora_up.weight"] = tensors[f"{path}.lora_B.weight"]
        kohya[f"{key}.alpha"] = torch.tensor(float(config.lora_alpha))
    header = {"format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": str(config.r)}
    header["ss_network_alpha"] = str(config.lora_alpha)
    with whole(output_dir / KOHYA_WEIGHTS) as unfinished:
        save_file(kohya, unfinished, metadata=header)
    return output_dir / WEIGHTS, output_dir / KOHYA_WEIGHTS


def kohya_keys(unet_config, paths):
    """{path of a module: its name in kohya files}, `lora_unet_` and a path with underscores.

    The path is the diffusers one, except for a U-Net laid out like SDXL's: there it is the original checkpoint's
    (`input_blocks_...`), which kohya's trainer writes. ComfyUI and diffusers read both; A1111 does not find
    `up_blocks_0_upsamplers_0_conv` of SDXL under the diffusers name.
    """
    layers, up_blocks = unet_config["layers_per_block"], unet_config["up_block_types"]
    is_sdxl = unet_config.get("addition_embed_type") == "text_time" and isinstance(layers, int)
    # `_sgm_path` holds with attention before every upsampler; and diffusers reads block numbers of one digit
    if is_sdxl and set(up_blocks[:-1]) <= {"CrossAttnUpBlock2D"} and len(up_blocks) * (layers + 1) <= 10:
        return {path: kohya_key(_sgm_path(path, layers)) for path in paths}
    return {path: kohya_key(path) for path in paths}


def kohya_key(path):
    return "lora_unet_" + path.replace(".", "_")


SGM_NAMES = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def _sgm_path(path, layers_per_block):
    """The path in the original SDXL checkpoint, where a resnet, its attention and a sampler share one block."""
    side, *rest = path.split(".")
    if side == "mid_block":
        kind, index, *rest = rest
        number = 1 if kind == "attentions" else 2 * int(index)
        return f"middle_block.{number}.{SGM_NAMES.get(rest[0], '.'.join(rest))}"
    if side not in ("down_blocks", "up_blocks"):
        return SGM_NAMES.get(path, path)
    block, kind, index, *rest = rest
    number = int(block) * (layers_per_block + 1) + int(index)
    if kind == "downsamplers":
        return f"input_blocks.{number + layers_per_block + 1}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{number + layers_per_block}.2.conv"
    name = f"{1 if kind == 'attentions' else 0}.{SGM_NAMES.get(rest[0], '.'.join(rest))}"
    return f"input_blocks.{number + 1}.{name}" if side == "down_blocks" else f"output_blocks.{number}.{name}"


def _files(folder, part):
    """Where a LoRA of a network may lie in a folder: of diffusers (the second of two networks has a file of its own),
    kohya, or PEFT."""
    second = [WEIGHTS.replace(".", f"_{part}.", 1)] if part.endswith("_2") else []
    names = second or [WEIGHTS, KOHYA_WEIGHTS]
    return [Path(folder, name) for name in (*names, f"{part}_adapter/adapter_model.safetensors")]


def _read_lora(network, source, rank, alpha, part):
    """Adapter tensors of a file, or of a folder's file, named as in `adapter_tensors`; UserError unless they fit."""
    flag = f"`init_lora`={source}"
    files = [Path(source)] if Path(source).is_file() else _files(source, part)
    file = next((file for file in files if file.is_file()), None)
    check_name(flag, source)
    if file is None:
        names = " or ".join(file.name for file in files[:2])
        raise UserError(f"{flag}: neither a LoRA file nor a folder with {names}")
    with blame(f"{flag}: {file.name} cannot be read", SafetensorError, ValueError):
        saved = load_file(file)
        with safe_open(file, "pt") as opened:
            header = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    targets, tensors, alphas, called = adapter_tensors(network), {}, set(), part.removesuffix("_2")
    spellings = [{path: kohya_key(path) for path in lora_layers(network)}]
    if isinstance(network, UNet2DConditionModel):
        spellings.append(kohya_keys(network.config, lora_layers(network)))
    for path, key in [pair for spelling in spellings for pair in spelling.items()]:
        for end, kohya_end in (("lora_A.weight", "lora_down.weight"), ("lora_B.weight", "lora_up.weight")):
            for name in {
                f"{called}.{path}.{end}",
                f"base_model.model.{path}.{end}",
                f"{key}.{kohya_end}",
            } & saved.keys():
                tensors[f"{path}.{end}"] = saved.pop(name)
        if f"{key}.alpha" in saved:
            alphas.add(saved.pop(f"{key}.alpha").item())
    missing = [name for name in targets if name not in tensors]
    if saved or missing:
        raise UserError(
            f"{flag}: it adapts other modules than this run ({len(missing)} tensors are missing and {len(saved)} are "
            f"too many, like {[*saved, *missing][0]}); pass the `lora_target_modules` it was trained with"
        )
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_A.weight")}
    if ranks != {rank}:
        raise UserError(
            f"{flag}: its rank is {', '.join(map(str, sorted(ranks)))}, not {rank}; pass it as `lora_rank`"
        )
    config = file.with_name("adapter_config.json")
    if file.parent.name == f"{part}_adapter" and config.is_file():
        with blame(f"{flag}: {config.name} cannot be read", OSError, ValueError):
            header = {f"{called}.lora_alpha": json.loads(config.read_text())["lora_alpha"]}
    alphas = alphas or {header.get(f"{called}.lora_alpha", rank)}
    if any(abs(other - alpha) > 1e-6 * abs(alpha) for other in alphas):
        raise UserError(
            f"{flag}: its alpha is {', '.join(map(str, sorted(alphas)))}, not {alpha}; pass it as `lora_alpha`"
        )
    wrong = [name for name, tensor in tensors.items() if tensor.shape != targets[name].shape]
    if wrong:
        raise UserError(f"{flag}: it belongs to another network, {wrong[0]} has another shape")
    return tensors


@torch.no_grad()
def _copy_tensors(source, targets):
    for name, parameter in targets.items():
        parameter.copy_(source[name])


def register_adapter_checkpointing(accelerator, unet):
    """Make save_state write the adapters of `unet` (prepared or not) as adapters.safetensors, without the base.

    load_state copies them back in place, bit by bit; the base is the teacher's again and is not in the checkpoint.
    Other prepared models are saved as ever. Call it once, before save_state or load_state.
    """
    unet = _unwrap(unet)
    if hasattr(accelerator, "saved"):  # of one that splits weights
        accelerator.saved = CHECKPOINT, lambda: adapter_tensors(unet)
        return

    def position(models):
        return next(i for i, model in enumerate(models) if _unwrap(model) is unet)

    def save(models, weights, output_dir):
        weights.pop(position(models))  # what is left in the list is what accelerate writes
        if accelerator.is_main_process:
            save_file(saved_tensors(unet), Path(output_dir, CHECKPOINT))

    def load(models, input_dir):
        models.pop(position(models))
        saved, targets = load_file(Path(input_dir, CHECKPOINT)), adapter_tensors(unet)
        assert saved.keys() == targets.keys(), "the checkpoint holds other adapters"
        _copy_tensors(saved, targets)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
