"""Networks of a named shape with random weights, images to train on, and the FLOPs of a training step.

The speed of a step does not depend on the values of weights. A teacher is complete all the same, in diffusers' layout,
so that the scripts load it as they load any other. Its tokenizer is the demo's, which knows few words.
"""

import dataclasses
import json
import math
import struct
import sys
from pathlib import Path

from common.ct import unet as ct_unet
from common.networks import teachers
from common.networks.encoders import NUM_TIME_IDS, vae_scale_factor
from common.networks.lora import ADAPTER
from common.networks.lora import add_lora as add_adapters
from common.tools.demo import digits, stable_diffusion
from tests.benchmarks.data import natural_image, write_shards

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection


@dataclasses.dataclass(frozen=True)
class Shape:
    """Configurations of a teacher, of consistency training's network the first two. text: keyword arguments of each
    text encoder; resolution: of the images, pixels."""

    resolution: int
    unet: dict
    vae: dict = dataclasses.field(default_factory=dict)
    text: tuple = ()
    half: bool = True  # weights are written in float16, which halves the file; they are loaded in float32 anyway


def _vae(*channels, layers=2, scaling_factor=0.18215):
    blocks = len(channels)
    return {
        "latent_channels": 4,
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        "norm_num_groups": math.gcd(32, channels[0]),
        "scaling_factor": scaling_factor,
    }


def _text(width, layers, heads, hidden_act="quick_gelu"):
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
    return sizes | {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_act": hidden_act}


CROSS_DOWN, CROSS_UP = ("CrossAttnDownBlock2D",) * 3, ("CrossAttnUpBlock2D",) * 3
SD_BLOCKS = {"down_block_types": (*CROSS_DOWN, "DownBlock2D"), "up_block_types": ("UpBlock2D", *CROSS_UP)}
SDXL_UNET = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", *CROSS_DOWN[:2]),
    "up_block_types": (*CROSS_UP[:2], "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1280 + 6 * 256,
}
SHAPES = {
    # the proportions of SD 1.5 between U-Net, VAE and text encoder, at a 700th of its FLOPs
    "tiny": Shape(
        128,
        {"block_out_channels": (48, 96, 192, 192), "cross_attention_dim": 64, "norm_num_groups": 16, **SD_BLOCKS},
        _vae(20, 40, 80, 80),
        (_text(64, 2, 4),),
        half=False,
    ),
    "sd15": Shape(
        512,
        {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, **SD_BLOCKS},
        _vae(128, 256, 512, 512),
        (_text(768, 12, 12),),
    ),
    "sdxl": Shape(
        1024,
        SDXL_UNET,
        _vae(128, 256, 512, 512, scaling_factor=0.13025),
        (_text(768, 12, 12), _text(1280, 32, 20, "gelu")),
    ),
}
CT_UNETS = ct_unet.DEFAULT_CONFIGS
CT_SHAPES = {
    # the network for CIFAR-10 with a quarter of its channels and half of its layers, a 26th of its FLOPs
    "tiny": Shape(
        32, CT_UNETS[32] | {"block_out_channels": (64,) * 3, "layers_per_block": 2, "attention_head_dim": 64}
    ),
    "ct32": Shape(32, CT_UNETS[32]),
    "ct64": Shape(64, CT_UNETS[64]),
}
CT_SCRIPTS = ("ict", "ect")


def shapes(script):
    """{name: Shape} of what a script can train."""
    return CT_SHAPES if script in CT_SCRIPTS else SHAPES


def write_unet_config(path, shape):
    """The configuration of consistency training's network, whose weights the script makes; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"_class_name": "UNet2DModel", **shape.unet}))
    return path


def write_teacher(folder, shape, device="cpu"):
    """A pipeline with random weights, seeded, in `folder`."""
    torch.manual_seed(0)
    pipeline = build_teacher(shape, device)
    pipeline.to(dtype=torch.float16 if shape.half else torch.float32).save_pretrained(folder)
    _save_tokenizers(folder, pipeline)


def write_configurations(folder, shape):
    """What `write_teacher` writes, without a weight: what --dry_run needs of a teacher."""
    pipeline = build_teacher(shape, "meta")
    save_configurations(folder, pipeline)
    _save_tokenizers(folder, pipeline)


def save_configurations(folder, pipeline):
    """`pipeline.save_pretrained` of networks without memory: their files have all names and shapes, and no block of
    the disk."""
    pipeline.save_config(folder)
    for name, part in pipeline.components.items():
        place = Path(folder, name)
        if not isinstance(part, torch.nn.Module):
            if part is not None:
                part.save_pretrained(place)
            continue
        of_diffusers = hasattr(part, "save_config")
        if of_diffusers:
            part.save_config(place)
        else:
            part.config.architectures = [type(part).__name__]
            part.config.save_pretrained(place)
        file = "diffusion_pytorch_model.safetensors" if of_diffusers else "model.safetensors"
        write_empty_weights(place / file, part)


def write_empty_weights(path, network):
    """A safetensors file of a network's tensors in bfloat16, a hole on the disk where their values would be."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    tied = getattr(network, "_tied_weights_keys", None) or ()
    for name, tensor in network.state_dict().items():
        if name not in tied:
            start, end = end, end + 2 * tensor.numel()
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def build_teacher(shape, device="cpu"):
    parts = {"scheduler": stable_diffusion.build_scheduler("epsilon", sdxl=len(shape.text) > 1)}
    with torch.device(device):
        sample_size = shape.resolution // vae_scale_factor(shape.vae)
        parts["unet"] = UNet2DConditionModel(sample_size=sample_size, **shape.unet)
        parts["vae"] = AutoencoderKL(sample_size=shape.resolution, **shape.vae)
        for suffix, sizes in zip(("", "_2"), shape.text, strict=False):
            tokenizer = digits.build_tokenizer(**({"pad_token": "!"} if suffix else {}))
            text_class = CLIPTextModelWithProjection if suffix else CLIPTextModel
            parts["text_encoder" + suffix] = text_class(text_config(tokenizer, sizes))
            parts["tokenizer" + suffix] = tokenizer
    if len(shape.text) > 1:
        return diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return diffusers.StableDiffusionPipeline(**parts, **nothing)


def _save_tokenizers(folder, pipeline):
    for name, part in pipeline.components.items():
        if name.startswith("tokenizer"):
            digits.save_tokenizer_files(part, Path(folder, name))


def text_config(tokenizer, sizes):
    """A text encoder with CLIP's 49,408 words, of which `tokenizer` uses the first."""
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **sizes, **tokens)


def write_images(folder, shards=4, samples=64):
    """Tar shards of 640 x 480 JPEG pictures with captions; nothing is done where they stand."""
    folder = Path(folder)
    if not (folder / f"{shards - 1:05d}.tar").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_shards(folder, shards, samples)
    return folder


def write_image_folder(folder, count, size):
    """PNG pictures of size x size pixels, as consistency training's data are; nothing is done where they stand."""
    folder, rng = Path(folder), np.random.default_rng(0)
    if not (folder / f"{count - 1:05d}.png").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            natural_image(rng, size, size).save(folder / f"{number:05d}.png")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs, 2 per multiply-add, attention included, counted on the meta device


def step_flops(folder, script, resolution, *, cached=False, lora_rank=64, steps=4):
    """FLOPs per sample of a training step, nothing recomputed: what model FLOPs utilization divides.

    script: lcm, tscd (without the discriminator's), each also with _lora; direct, direct_lora (`steps` steps); ict,
    ect. folder: the teacher, of ict and ect the network's configuration. cached: the VAE does not run. Updates of
    weights (optimizer, EMA) are not counted.
    """
    if script in CT_SCRIPTS:
        forward, both = unet2d_flops(ct_unet.read_unet_config(resolution, str(folder)))
        return forward + both  # the target is the student without gradients
    config = teachers.read_teacher_config(str(folder))
    images, text = frozen_flops(config, resolution)
    rank = lora_rank if script.endswith("_lora") else None
    forward, both = unet_flops(config, resolution, rank)
    if script.startswith("direct"):
        return steps * both + text
    without = unet_flops(config, resolution)[0] if rank else forward
    target = forward  # of a LoRA it is the student, without gradients
    return 2 * without + target + both + (0 if cached else images) + text


def frozen_flops(config, resolution):
    """(VAE's encoder, text encoders) for one sample. config: as from `teachers.read_teacher_config`."""
    with torch.device("meta"), torch.no_grad():
        vae = AutoencoderKL.from_config(config["vae"])
        encoders = [CLIPTextModel(config["text_encoder"])]
        if "text_encoder_2" in config:
            encoders.append(CLIPTextModelWithProjection(config["text_encoder_2"]))
        with FlopCounterMode(display=False) as flops:
            vae.encode(torch.empty(1, vae.config.in_channels, resolution, resolution))
        images = flops.get_total_flops()
        with FlopCounterMode(display=False) as flops:
            for encoder in encoders:
                encoder(torch.empty(1, 77, dtype=torch.long))
    return images, flops.get_total_flops()


def unet_flops(config, resolution, lora_rank=None):
    """(forward, forward and backward) of the student's U-Net, all weights or a LoRA trained, for one sample."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config["unet"]).train()
        size = resolution // vae_scale_factor(config["vae"])
        latents = torch.empty(1, unet.config.in_channels, size, size)
        cond = {"encoder_hidden_states": torch.empty(1, 77, unet.config.cross_attention_dim)}
        if "text_encoder_2" in config:
            pooled = torch.empty(1, config["text_encoder_2"].projection_dim)
            cond["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.empty(1, NUM_TIME_IDS)}
        if lora_rank:
            add_adapters(unet, lora_rank, lora_rank)
            assert ADAPTER in unet.peft_config
        return both_passes(unet, latents, torch.empty(1, dtype=torch.long), **cond)


def unet2d_flops(config):
    """(forward, forward and backward) of consistency training's network, for one image."""
    with torch.device("meta"):
        unet = UNet2DModel.from_config(config).train()
        size = config["sample_size"]
        return both_passes(unet, torch.empty(1, unet.config.in_channels, size, size), torch.empty(1))


def both_passes(network, *inputs, **conditioning):
    with FlopCounterMode(display=False) as flops:
        output = network(*inputs, **conditioning).sample
        forward = flops.get_total_flops()
        output.mean().backward()
    return forward, flops.get_total_flops()


if __name__ == "__main__":  # in a process of its own: FOLDER SHAPE
    write_teacher(sys.argv[1], SHAPES[sys.argv[2]], "cuda" if torch.cuda.is_available() else "cpu")
