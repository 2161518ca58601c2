"""The U-Nets of unconditional and class-conditional image models: default ones, their configuration, their weights."""

import json
from pathlib import Path

from common.data import tables
from common.errors import UserError, blame
from common.networks import teachers, weights

import torch
from diffusers import CMStochasticIterativeScheduler, UNet2DModel

CONV_DOWN, ATTN_DOWN, CONV_UP, ATTN_UP = "DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"
# About the papers' sizes: 54 M parameters for CIFAR-10 (attention at 16 px), 296 M for ImageNet-64 (at 32, 16, 8 px).
DEFAULT_CONFIGS = {
    32: {
        "block_out_channels": (256, 256, 256),
        "layers_per_block": 4,
        "down_block_types": (CONV_DOWN, ATTN_DOWN, CONV_DOWN),
        "up_block_types": (CONV_UP, ATTN_UP, CONV_UP),
        "attention_head_dim": 256,
        "time_embedding_dim": 512,
        "dropout": 0.3,
    },
    64: {
        "block_out_channels": (192, 384, 576, 768),
        "layers_per_block": 3,
        "down_block_types": ("ResnetDownsampleBlock2D", ATTN_DOWN, ATTN_DOWN, ATTN_DOWN),
        "up_block_types": (ATTN_UP, ATTN_UP, ATTN_UP, "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 32,
        "attention_head_dim": 64,
        "dropout": 0.2,
    },
}


def read_unet_config(
    resolution,
    config_name=None,
    pretrained_name=None,
    num_classes=None,
    class_embed_type=None,
    dropout=None,
    revision=None,
    cache_dir=None,
    stock_scheduler=True,
    variant=None,
):
    """The configuration of a UNet2DModel, as a dict, without its weights.

    From `pretrained_name` (a folder or hub name of a model or pipeline), else from `config_name` (one of those, or a
    .json file), else a default for 32 and 64 pixels. num_classes: None for no classes. dropout: None keeps what the
    configuration says. stock_scheduler: whether the network is told what stock diffusers tells it. UserError when it
    is missing, or is no network that can be trained here, or its weights are damaged or pickles.
    """
    pretrained = pretrained_name is not None
    name = pretrained_name if pretrained else config_name
    flag = f"--{'pretrained' if pretrained else 'model_config'}_name_or_path={name}"
    flag = flag.replace("pretrained_name", "pretrained_model_name")
    if name is None:
        if resolution not in DEFAULT_CONFIGS:
            raise UserError(
                f"`resolution`={resolution}: there are default networks for 32 and 64 pixels only; pass "
                "`model_config_name_or_path`, the config.json of a UNet2DModel"
            )
        config = dict(DEFAULT_CONFIGS[resolution])
    else:
        weights.check_name(flag, name)
        config = _load_config(flag, name, revision, cache_dir)
    if pretrained:
        _check_pretrained(flag, name, config, resolution, num_classes, stock_scheduler, revision, cache_dir)
        place = {"revision": revision, "cache_dir": cache_dir}
        weights.check_alone(flag, name, UNet2DModel, _subfolder(name), variant=variant, **place)
    config |= {"sample_size": resolution, "num_class_embeds": num_classes}
    if class_embed_type is not None or num_classes is None:
        config["class_embed_type"] = class_embed_type
    if dropout is not None:
        config["dropout"] = dropout
    _check_config(flag if name else "the default network", config)
    return config


def _load_config(flag, name, revision, cache_dir):
    if Path(name).is_file():
        with blame(f"{flag}: the file is not JSON", ValueError, RecursionError):
            config = json.loads(tables.read_text(name, flag))
    else:
        options = {"revision": revision, "cache_dir": cache_dir, "subfolder": _subfolder(name)}
        with blame(f"{flag}: neither a U-Net's folder nor a model that the hub gives", OSError, ValueError):
            config = dict(UNet2DModel.load_config(name, **options))
    if not isinstance(config, dict) or config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise UserError(f"{flag} is not the configuration of a UNet2DModel")
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _subfolder(name):
    """A local folder tells whether it is a U-Net's or a pipeline's; of the hub, pipelines are taken."""
    return None if Path(name, "config.json").is_file() else "unet"


def _check_pretrained(flag, name, config, resolution, num_classes, stock_scheduler, revision, cache_dir):
    """The weights must be those of the same function f: told 250 ln(sigma), for the same images and classes."""
    options = {"subfolder": "scheduler", "revision": revision, "cache_dir": cache_dir}
    try:
        scheduler = CMStochasticIterativeScheduler.load_config(name, **options).get("_class_name")
    except (OSError, ValueError):  # a U-Net's folder, alone
        scheduler = None
    ours = "CMStochasticIterativeScheduler" if stock_scheduler else "PreconditionedConsistencyScheduler"
    if scheduler not in (None, ours):
        raise UserError(
            f"{flag} was trained for {scheduler}: its weights mean another function; use a model of this script, such "
            "as one of `pretrain_steps` alone"
        )
    if config.get("sample_size") not in (None, resolution):
        raise UserError(f"{flag} is a network for {config['sample_size']} pixels; pass that as `resolution`")
    if config.get("num_class_embeds") != num_classes:
        raise UserError(
            f"{flag} has {config.get('num_class_embeds') or 'no'} classes; pass `class_conditional` and `num_classes` "
            "as it was trained"
        )


def _check_config(flag, config):
    if config.get("time_embedding_type", "positional") != "positional":
        raise UserError(
            f"{flag}: time_embedding_type {config['time_embedding_type']} cannot be trained here (fourier takes the "
            "logarithm of a number that is negative for sigma < 1); use positional"
        )
    if config.get("in_channels", 3) != 3 or config.get("out_channels", 3) != 3:
        raise UserError(f"{flag}: in_channels and out_channels must be 3, the colours")
    channels = config.get("block_out_channels", (224, 448, 672, 896))
    if not isinstance(channels, (list, tuple)) or not channels:
        raise UserError(f"{flag} describes no network that can be built (block_out_channels is {channels!r})")
    levels = len(channels)
    if config["sample_size"] % 2 ** (levels - 1):
        raise UserError(
            f"{flag}: {levels} levels need a `resolution` that {2 ** (levels - 1)} divides, "
            f"not {config['sample_size']}"
        )
    try:
        with torch.device("meta"):
            UNet2DModel.from_config(config)
    except (ValueError, TypeError, RuntimeError, IndexError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{flag} describes no network that can be built ({reason})") from None


def make_unet(config, pretrained_name=None, outlined=False, revision=None, variant=None, cache_dir=None):
    """A UNet2DModel in float32: new, its last convolution zero so that f starts as c_skip x, or with given weights.

    outlined: with these it is one of `outlines`.
    """
    if pretrained_name is None:
        unet = UNet2DModel.from_config(config).train()
        torch.nn.init.zeros_(unet.conv_out.weight)
        torch.nn.init.zeros_(unet.conv_out.bias)
        return unet
    flag = f"`pretrained_model_name_or_path`={pretrained_name}"
    changes = {key: config[key] for key in ("dropout", "sample_size") if key in config}
    try:
        place = {"revision": revision, "variant": variant, "cache_dir": cache_dir}
        place["subfolder"] = _subfolder(pretrained_name)
        unet = teachers.load_network(flag, UNet2DModel, pretrained_name, outlined, **place, **changes)
        return unet.requires_grad_(True).train()  # from_pretrained leaves it in eval mode, without dropout
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{flag}: its weights cannot be loaded ({reason})") from None
