"""Teachers (Stable Diffusion and SDXL layout), students and what they are conditioned on."""

import functools
import inspect
import types
from pathlib import Path

from common.errors import UserError, blame
from common.networks import fusing, outlines, weights
from common.networks.encoders import NUM_TIME_IDS, is_sdxl, vae_scale_factor
from common.schedules import PREDICTION_TYPES

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from huggingface_hub.errors import StrictDataclassError
from packaging.version import Version
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextConfig

PARTS = ("unet", "vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")  # SDXL: all
NOT_TRAINED = ("safety_checker", "feature_extractor", "image_encoder")  # neither loaded nor copied into outputs
REFINER = "the SDXL refiner, which starts from a finished image; use an SDXL base model"
LOAD_ERRORS = (OSError, ValueError, IndexError, KeyError, AttributeError, TypeError, RuntimeError, SafetensorError)
PLAIN = {False: StableDiffusionPipeline, True: StableDiffusionXLPipeline}  # text-to-image, by whether it is an SDXL
DEFAULT_RESOLUTION = {False: 512, True: 1024}  # where the U-Net's sample_size does not say it


def read_teacher_config(name, revision=None, variant=None, cache_dir=None, lora=None):
    """The configurations of a teacher, without its weights: {"is_sdxl", "model_index", "unet", "vae", "scheduler",
    "text_encoder"}, and "text_encoder_2" of SDXL.

    name: a folder or hub repository in diffusers layout, or one `.safetensors` file. lora: `teacher_lora`, which is to
    fit. Raises UserError when it is missing, partial, not a text-to-image latent diffusion model, or cannot be
    distilled (see `check_schedule`).
    """
    config = _read_teacher_config(name, revision, variant, cache_dir)
    fusing.check(lora, PLAIN[config["is_sdxl"]], {"unet": (UNet2DConditionModel, config["unet"])})
    return config


def _read_teacher_config(name, revision, variant, cache_dir):
    flag = f"`pretrained_teacher_model`={name}"
    folder = Path(name)
    weights.check_name(flag, name)
    if folder.suffix == ".safetensors":
        return _read_single_file(flag, name, cache_dir)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise UserError(f"{flag}: the folder has no model_index.json, so it is not a pipeline in diffusers layout")
    options = {"revision": revision, "cache_dir": cache_dir}
    index = read_index(flag, name, **options)
    sdxl = check_kind(flag, index)
    parts = {part: index[part] for part in PARTS[: len(PARTS) if sdxl else -2] if part in index}
    weights.check_parts(flag, name, parts)  # a ControlNet or an adapter beside them is not loaded
    errors = OSError, ValueError, AttributeError, TypeError, StrictDataclassError
    with blame(f"{flag}: a part of the teacher is missing or unreadable", *errors):
        configs = {
            "unet": UNet2DConditionModel.load_config(name, subfolder="unet", **options),
            "vae": AutoencoderKL.load_config(name, subfolder="vae", **options),
            "scheduler": DDPMScheduler.load_config(name, subfolder="scheduler", **options),
        }
        for part in ("text_encoder", "text_encoder_2")[: 1 + sdxl]:
            configs[part] = CLIPTextConfig.from_pretrained(name, subfolder=part, **options)
    config = _checked_config(flag, {"is_sdxl": sdxl, "model_index": index} | configs)
    weights.check_pipeline(flag, name, parts, variant, **options)
    return config


def read_index(flag, name, **options):
    """The model_index.json of a folder or hub repository; UserError where it is none. options: revision, cache_dir."""
    index = _read_config(flag, "a folder", DiffusionPipeline, name, **options)
    if not isinstance(index, dict):
        raise UserError(f"{flag}: its model_index.json is no pipeline's, it holds no names of parts")
    return index


def _read_config(flag, what, cls, name, **options):
    with blame(f"{flag}: neither {what} nor a model that the hub gives", OSError, ValueError):
        return cls.load_config(name, **options)


def _read_single_file(flag, name, cache_dir):
    if not Path(name).is_file():
        raise UserError(f"{flag}: there is no such file")
    with blame(f"{flag}: the file is damaged or no safetensors file", SafetensorError):
        if _single_file_kind(name) == "refiner":
            raise UserError(f"{flag}: {REFINER}")
    # one file holds no configuration: diffusers fetches that of the kind of model that the weights show
    with blame(
        f"{flag}: the file cannot be loaded",
        *LOAD_ERRORS,
        way_out="a single file needs the hub, or a cache, for its configuration: convert it once to a folder in "
        "diffusers layout where there is no network",
    ):
        pipeline = _load_teacher(name, None, None, cache_dir, None, None, {})
    configs = {"is_sdxl": is_sdxl(pipeline), "model_index": dict(pipeline.config)}
    configs |= {part: dict(getattr(pipeline, part).config) for part in ("unet", "vae", "scheduler")}
    names = ("text_encoder", "text_encoder_2")[: 1 + is_sdxl(pipeline)]
    return _checked_config(flag, configs | {part: getattr(pipeline, part).config for part in names})


def _single_file_kind(name):
    """What a checkpoint in one file is, by the names of its tensors: "sd", "sdxl" or "refiner"."""
    with safe_open(name, framework="pt") as file:
        embedders = {key.split(".")[2] for key in file.keys() if key.startswith("conditioner.embedders.")}
    return "sd" if not embedders else "sdxl" if "1" in embedders else "refiner"


def read_vae_config(name, config, revision=None, cache_dir=None):
    """`config` with the configuration of the VAE that `pretrained_vae_model_name_or_path` names instead of its own.

    Needs no weights. Raises UserError when that VAE is missing, partial, or has other latents than the teacher's.
    """
    flag = f"`pretrained_vae_model_name_or_path`={name}"
    weights.check_name(flag, name)
    subfolder, options = vae_subfolder(name), {"revision": revision, "cache_dir": cache_dir}
    vae = _read_config(flag, "a VAE's folder", AutoencoderKL, name, subfolder=subfolder, **options)
    if vae.get("_class_name") != "AutoencoderKL" or vae.get("latent_channels", 4) != config["unet"]["in_channels"]:
        raise UserError(f"{flag}: not an AutoencoderKL with {config['unet']['in_channels']} latent channels")
    weights.check_alone(flag, name, AutoencoderKL, subfolder, has_variant_flag=False, **options)
    return _checked_config(flag, config | {"vae": vae})


def vae_subfolder(name):
    """Where a VAE lies in its folder: in `vae` of a whole pipeline's, else None."""
    return "vae" if Path(name, "vae", "config.json").is_file() else None


def check_init_unet(name, config, time_cond_proj_dim, revision=None, cache_dir=None):
    """UserError unless the U-Net of `init_unet` has the teacher's shape and this embedding of w; needs no weights."""
    flag = f"`init_unet`={name}"
    weights.check_name(flag, name)
    subfolder = "unet" if Path(name, "unet").is_dir() else None
    options = {"revision": revision, "cache_dir": cache_dir}
    unet = _read_config(flag, "a U-Net's folder", UNet2DConditionModel, name, subfolder=subfolder, **options)
    if unet.get("time_cond_proj_dim") != time_cond_proj_dim:
        raise UserError(
            f"{flag}: its time_cond_proj_dim is {unet.get('time_cond_proj_dim')}; pass the same number as "
            "`unet_time_cond_proj_dim`"
        )
    shape = ("in_channels", "out_channels", "block_out_channels", "layers_per_block", "cross_attention_dim")
    for key in (*shape, "down_block_types", "up_block_types", "addition_embed_type", "attention_head_dim"):
        if unet.get(key) != config["unet"].get(key):
            raise UserError(f"{flag}: it is no student of this teacher, its {key} is {unet.get(key)}")
    weights.check_alone(flag, name, UNet2DConditionModel, subfolder, has_variant_flag=False, **options)


def check_kind(flag, index):
    """Whether model_index.json is SDXL's; UserError unless it names what a teacher of its kind consists of."""
    parts = {part: index[part][1] for part in PARTS if isinstance(index.get(part), list) and len(index[part]) == 2}
    sdxl = parts.get("text_encoder_2") is not None or parts.get("tokenizer_2") is not None
    if sdxl and (parts.get("text_encoder") is None or index.get("requires_aesthetics_score")):
        raise UserError(f"{flag}: {REFINER}")
    wanted = {"unet": ("UNet2DConditionModel",), "vae": ("AutoencoderKL",)}
    wanted["text_encoder"] = ("CLIPTextModel",) if sdxl else ("CLIPTextModel", "CLIPTextModelWithProjection")
    if sdxl:
        wanted["text_encoder_2"] = ("CLIPTextModelWithProjection",)
    for tokenizer in ("tokenizer", "tokenizer_2")[: 1 + sdxl]:
        wanted[tokenizer] = ("CLIPTokenizer", "CLIPTokenizerFast")
    kind = "an SDXL" if sdxl else "a text-to-image latent diffusion"
    for part, classes in wanted.items():
        if parts.get(part) not in classes:
            raise UserError(f"{flag}: not {kind} teacher, its {part} is {parts.get(part)}")
    return sdxl


def _checked_config(flag, config):
    try:
        check_unet(flag, config["unet"], config["vae"], config.get("text_encoder_2"))
        check_schedule(flag, config["scheduler"])
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{flag}: a part's configuration is not what diffusers writes ({error!r})") from None
    unknown = ["shift_factor"] if config["is_sdxl"] else ["shift_factor", "latents_mean"]
    if found := [key for key in unknown if config["vae"].get(key)]:
        plain = PLAIN[config["is_sdxl"]].__name__
        raise UserError(f"{flag}: its VAE has {found[0]}, which {plain} does not undo: its images would be others")
    return config


def check_unet(flag, unet, vae, text_encoder_2=None):
    """UserError unless the U-Net's configuration denoises this VAE's latents and is conditioned on text alone, of SDXL
    (which `text_encoder_2`'s configuration tells) on text and sizes."""
    channels = vae.get("latent_channels", 4)
    if unet["in_channels"] != channels or unet["out_channels"] != channels:
        raise UserError(
            f"{flag}: not a text-to-image teacher, its U-Net maps {unet['in_channels']} to {unet['out_channels']} "
            f"channels where the VAE has {channels} (inpainting and editing models cannot be used)"
        )
    addition = None if text_encoder_2 is None else "text_time"
    if addition and unet.get("addition_embed_type") != addition:
        has = unet.get("addition_embed_type")
        raise UserError(f"{flag}: its U-Net has addition_embed_type={has!r} where SDXL's is {addition!r}")
    for key in ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim_type"):
        if unet.get(key) not in (None, addition):
            raise UserError(f"{flag}: its U-Net has {key}={unet[key]!r}, only text conditioning is supported")
    if addition:
        takes = unet.get("projection_class_embeddings_input_dim")
        gets = text_encoder_2.projection_dim + NUM_TIME_IDS * (unet.get("addition_time_embed_dim") or 0)
        if takes != gets:
            raise UserError(
                f"{flag}: its U-Net takes {takes} numbers beside the text, its text_encoder_2 and SDXL's sizes make "
                f"{gets}"
            )
    if unet.get("time_cond_proj_dim") is not None:
        raise UserError(f"{flag}: its U-Net is already distilled (time_cond_proj_dim); use it as `init_unet` instead")


def check_schedule(flag, scheduler):
    """UserError unless the scheduler's configuration has betas, a known prediction type, and invertible alphas."""
    prediction_type = scheduler.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(f"{flag}: prediction_type {prediction_type!r} is none of {', '.join(PREDICTION_TYPES)}")
    if "beta_schedule" not in scheduler and scheduler.get("trained_betas") is None:
        raise UserError(f"{flag}: its scheduler {scheduler.get('_class_name')} has no beta schedule")
    last = DDPMScheduler.from_config(scheduler).alphas_cumprod[-1]
    if prediction_type == "epsilon" and last < 1e-6:
        raise UserError(
            f"{flag}: zero terminal SNR (alpha_T = 0) with epsilon prediction cannot be inverted to x_0; "
            "use a v_prediction teacher or one without rescale_betas_zero_snr"
        )


def lcm_scheduler(scheduler_config, num_ddim_timesteps, timestep_scaling):
    """LCMScheduler with a teacher's betas and prediction type, the trained grid and boundary scaling.

    Only what the scheduler knows is taken over: it would save the rest, and warn about it whenever it is loaded.
    """
    trained = {"original_inference_steps": num_ddim_timesteps, "timestep_scaling": timestep_scaling}
    return scheduler_like(LCMScheduler, scheduler_config, **trained)


def scheduler_like(scheduler_class, scheduler_config, **trained):
    # By DDPMScheduler, as in training: the classes do not agree on what a configuration that lacks a key means.
    trained_by = DDPMScheduler.from_config(scheduler_config)
    known = inspect.signature(scheduler_class.__init__).parameters.keys()
    taken = {name: value for name, value in trained_by.config.items() if name in known}
    taken |= trained | {"clip_sample": False, "thresholding": False}
    try:
        return scheduler_class(**taken)
    except NotImplementedError:  # DDPMScheduler knows more kinds of betas
        return scheduler_class(**taken | {"trained_betas": trained_by.betas.tolist(), "rescale_betas_zero_snr": False})


def load_teacher(
    name,
    revision=None,
    variant=None,
    cache_dir=None,
    vae=None,
    vae_revision=None,
    lora=None,
    outlined=False,
    **replaced,
):
    """The teacher as the plain text-to-image pipeline, whatever class it was saved by: every weight float32 on the
    CPU, frozen, in eval mode.

    name: folder, hub repository, or one `.safetensors` file. vae: folder or hub name of another VAE, or None.
    lora: `teacher_lora`, fused into it. outlined: the U-Net is one of `outlines`, but of one file. replaced: parts
    that are there already and are not loaded (unet, scheduler).
    Weights are safetensors, and no code of a repository is run. Raises UserError where something cannot be loaded.
    """
    flag = f"`pretrained_teacher_model`={name}" + (f", `pretrained_vae_model_name_or_path`={vae}" if vae else "")
    with blame(f"{flag}: the weights cannot be loaded", *LOAD_ERRORS):
        place, found = {"revision": revision, "cache_dir": cache_dir}, {}
        is_replaced = lora and isinstance(replaced.get("unet"), torch.nn.Module)  # by one with the LoRA in it
        if (outlined or is_replaced) and Path(name).suffix != ".safetensors":
            index = DiffusionPipeline.load_config(name, **place)
            loader, options = PLAIN[check_kind(name, index)], {"dtype": torch.float32, "variant": variant} | place
            found = outlines.of_pipeline(
                f"`pretrained_teacher_model`={name}", name, index, loader, ["unet"], **options
            )
        load = functools.partial(_load_teacher, name, revision, variant, cache_dir, vae, vae_revision)
        return with_lora(load, lora, replaced, found)


def with_lora(load, lora, replaced, outlined):
    """The pipeline that `load` makes of the parts that replace its own, with the LoRAs of `teacher_lora` in what is
    loaded, or in `outlined` parts: a network that replaces another is put in afterwards."""
    later = {name: part for name, part in replaced.items() if lora and isinstance(part, torch.nn.Module)}
    pipeline = load(outlined | {name: part for name, part in replaced.items() if name not in later})
    fusing.fuse(pipeline, lora)
    pipeline.register_modules(**later)
    return frozen(pipeline)


def _load_teacher(name, revision, variant, cache_dir, vae, vae_revision, replaced):
    options = {"cache_dir": cache_dir, "dtype": torch.float32}
    parts = options | replaced
    if Path(name).suffix == ".safetensors":
        plain = PLAIN[_single_file_kind(name) == "sdxl"]
        parts |= {"safety_checker": None} if plain is StableDiffusionPipeline else {}
        pipeline = plain.from_single_file(name, **parts)
        weights.check_made(f"`pretrained_teacher_model`={name}", pipeline)
    else:
        index = DiffusionPipeline.load_config(name, revision=revision, cache_dir=cache_dir)
        plain = PLAIN[check_kind(name, index)]
        takes = inspect.signature(plain.__init__).parameters
        parts |= {part: None for part in NOT_TRAINED if part in takes}
        parts |= {"variant": variant, "revision": revision, "cls": plain}
        pipeline = load_checked(f"`pretrained_teacher_model`={name}", name, index, **parts)
    if vae is not None:
        place = {"subfolder": vae_subfolder(vae), "revision": vae_revision} | options
        flag = f"`pretrained_vae_model_name_or_path`={vae}"
        pipeline.vae = load_network(flag, AutoencoderKL, vae, **place)
    return pipeline


def load_checked(flag, name, index, cls=DiffusionPipeline, dtype=torch.float32, **options):
    """`cls.from_pretrained` of safetensors, without a repository's code, after a check of the weights, and without the
    safety checker, which would replace images by black ones.

    index: its model_index.json. dtype: as there. options: variant, revision, cache_dir, and parts that are not loaded.
    """
    options |= {"use_safetensors": True, "trust_remote_code": False}
    parts = index if cls is DiffusionPipeline else inspect.signature(cls.__init__).parameters
    if "safety_checker" in parts:
        options |= {"safety_checker": None, "requires_safety_checker": False}
    if not Path(name).is_dir():  # a folder's were checked before
        cls.download(name, **options)
        place = {key: options.get(key) for key in ("variant", "revision", "cache_dir")}
        if cls is not DiffusionPipeline:  # which takes what the index names
            index = {part: index[part] for part in parts if part in index}
        weights.check_pipeline(flag, name, index, **place, skip=(*NOT_TRAINED, *options), downloaded=True)
    return cls.from_pretrained(name, dtype=dtype, **options)


def load_network(flag, cls, name, outlined=False, **options):
    """`cls.from_pretrained` of safetensors, in float32; UserError where tensors lack or show another network.

    outlined: as one of `outlines` instead. options: subfolder, revision, variant, cache_dir, configuration's changes.
    """
    if outlined:
        place = {key: options.pop(key, None) for key in ("subfolder", "revision", "cache_dir")}
        network = outlines.outline(flag, weights.network_folder(name, **place), cls, torch.float32, **options)
        network.register_to_config(_name_or_path=str(name))
        return network
    options = {"dtype": torch.float32} | options
    network, info = cls.from_pretrained(name, use_safetensors=True, output_loading_info=True, **options)
    weights.check_loaded(flag, network, info)
    return network


def frozen(pipeline):
    """The pipeline, every network frozen and in eval mode, without a progress bar. Text encoders compute in the dtype
    that they are in also under autocast, which would cast again what T5 keeps in float32."""
    for name, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False).eval()
            if name.startswith("text_encoder"):
                without_autocast(module)
    weights.fit_tokenizers(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def without_autocast(module):
    """Let the module compute in its own dtype also under autocast, in place."""

    @functools.wraps(type(module).forward)
    def forward(self, *args, **kwargs):
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            return type(self).forward(self, *args, **kwargs)

    module.forward = types.MethodType(forward, module)  # of a copy, copy.deepcopy makes the copy's own


def make_student(teacher_unet, time_cond_proj_dim=None, init_unet=None, revision=None, cache_dir=None):
    """A trainable float32 copy of the teacher's float32 U-Net with an embedding of w, as wide as `time_cond_proj_dim`,
    or without one (None).

    The new projection `time_embedding.cond_proj` starts at zero, so that the student equals the teacher at step 0 for
    every w. init_unet: a folder with an earlier student to start from instead (its `unet/` when it is a pipeline). A
    student of a teacher that is one of `outlines` is one too.
    """
    is_outline = outlines.is_one(teacher_unet)
    if init_unet is not None:
        subfolder = "unet" if Path(init_unet, "unet").is_dir() else None
        place = {"subfolder": subfolder, "revision": revision, "cache_dir": cache_dir}
        unet = load_network(f"`init_unet`={init_unet}", UNet2DConditionModel, init_unet, outlined=is_outline, **place)
        assert unet.config.time_cond_proj_dim == time_cond_proj_dim, "check_init_unet comes first"
        return unet.requires_grad_(True).train()
    assert teacher_unet.dtype == torch.float32, "a student of rounded weights is not the teacher"
    if is_outline:
        return outlines.like(teacher_unet, time_cond_proj_dim=time_cond_proj_dim).requires_grad_(True).train()
    # as a keyword: diffusers ignores a value in the configuration itself where the teacher's file lacks the key
    unet = UNet2DConditionModel.from_config(teacher_unet.config, time_cond_proj_dim=time_cond_proj_dim)
    missing, unexpected = unet.load_state_dict(teacher_unet.state_dict(), strict=False)
    new = [] if time_cond_proj_dim is None else ["time_embedding.cond_proj.weight"]
    assert missing == new and not unexpected, (missing, unexpected)
    if new:
        torch.nn.init.zeros_(unet.time_embedding.cond_proj.weight)
    return unet.train()


def native_size(config):
    """(height, width) in pixels of the images that the teacher's U-Net was made for, None where it does not say."""
    unet = config["unet"]
    size, factor = unet.get("sample_size"), vae_scale_factor(config["vae"])
    if size is None:
        return None
    if isinstance(size, int) and not config["is_sdxl"] and "_diffusers_version" in unet:
        # the first releases wrote 32 for 64, which StableDiffusionPipeline puts right
        size = max(size, 64) if Version(Version(unet["_diffusers_version"]).base_version) < Version("0.9.0") else size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return height * factor, width * factor


def default_resolution(config):
    """The side of the square images that the teacher was made for, in pixels; UserError where they are not square."""
    height, width = native_size(config) or (DEFAULT_RESOLUTION[config["is_sdxl"]],) * 2
    if height != width:
        raise UserError(
            f"`resolution`: the teacher's own images are {height} x {width} pixels and those trained on are square; "
            "pass their side"
        )
    return height


def samples_by_default_at(config, resolution):
    """Whether the stock pipeline makes square images of this side where a call names no size."""
    is_one = isinstance(config["unet"].get("sample_size"), int) or not config["is_sdxl"]  # SDXL's takes no list
    return is_one and native_size(config) == (resolution, resolution)
