"""The table "What fits where" of docs/performance_measured.md: the largest batch on cards of 24, 48 and 80 GB.

    python -m tests.benchmarks.what_fits [sd15] [sdxl] [sd35m] [flux] [qwen]

Teachers are the public configurations of Stable Diffusion 1.5 and SDXL, without weights (`synthetic.SHAPES`). Each
method is simulated at two batch sizes with --gradient_checkpointing=full and bf16, images are encoded one by one, and
memory is a straight line in the batch size. Direct distillation of SD3.5-medium, Flux.1-dev and Qwen-Image: a LoRA of
rank 64, and all weights without and with 8-bit Adam, four steps, 1024 px, on 8 processes; denoiser and VAE from the
public configurations, embeddings of a prompt by their shape. Text encoders are let go before the first update.
"""

import contextlib
import importlib
import io
import sys
import tempfile
import unittest.mock
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import train_direct_distill as direct
from common.networks import teachers
from common.tools.demo import digits
from common.tools.plan import TRIED, needed_at, simulate
from tests.benchmarks import synthetic

import diffusers
import numpy as np
import torch

METHODS = {
    "LCM": ("train_lcm_distill_sd_wds", []),
    "LCM LoRA": ("train_lcm_distill_lora_sd_wds", []),
    "TSCD": ("train_tscd_distill_sd_wds", []),
    "TSCD LoRA": ("train_tscd_distill_lora_sd_wds", []),
}
CARDS = 24, 48, 80
NAMES = {"sd15": "SD 1.5, 512 px", "sdxl": "SDXL, 1024 px"}


def largest(needed, card, most=1024):
    return max((n for n in range(1, most) if needed(n) <= card), default=0)


def print_row(teacher, method, sizes, less=0):
    needed = needed_at(sizes, less)
    fits = " | ".join(str(largest(needed, card) or "none") for card in CARDS)
    gflops = sizes[1].flops / sizes[1].samples / 1e9
    print(f"| {teacher} | {method} | {needed(1):.1f} | {fits} | {gflops:,.0f} |", flush=True)


def rows(folder, shape):
    """A line of the table for each method, without and with 8-bit Adam."""
    shared = [
        f"--pretrained_teacher_model={folder / shape}", f"--train_shards_path_or_url={folder}/shards/train/*.tar",
        f"--output_dir={folder / 'out'}", f"--resolution={synthetic.SHAPES[shape].resolution}",
        "--mixed_precision=bf16", "--max_train_steps=1000", "--gradient_checkpointing=full",
        "--vae_encode_batch_size=1",
    ]  # fmt: skip
    for method, (name, own) in METHODS.items():
        script = importlib.import_module(name)
        sizes = [simulate(script, [*shared, *own, f"--train_batch_size={size}"], 1) for size in TRIED]
        eight = simulate(script, [*shared, *own, f"--train_batch_size={TRIED[0]}", "--use_8bit_adam"], 1)
        print_row(NAMES[shape], method, sizes)
        print_row(NAMES[shape], f"{method}, 8-bit Adam", sizes, sizes[0].between - eight.between)


# ---------------------------------------------------------------------------------------------------------------------
# Direct distillation


HEADS = {"attention_head_dim": 128, "num_attention_heads": 24, "axes_dims_rope": (16, 56, 56)}
BLOCKS = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16}
BLOCKS |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
SD3_VAE = BLOCKS | {"scaling_factor": 1.5305, "shift_factor": 0.0609}
FLUX_VAE = BLOCKS | {"scaling_factor": 0.3611, "shift_factor": 0.1159}


class Teacher(NamedTuple):
    """pipeline, denoiser, vae: classes and configurations. embed: what encode_prompt returns for B prompts."""

    name: str
    pipeline: type
    denoiser: tuple
    vae: tuple
    scheduler: dict
    latents: tuple  # shape of a sample's
    embed: Callable
    without: tuple  # parts of the pipeline that only encode prompts


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)


TEACHERS = {
    "sd35m": Teacher(
        "SD3.5-medium", diffusers.StableDiffusion3Pipeline,
        (diffusers.SD3Transformer2DModel, {
            "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
            "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
            "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"}),
        (diffusers.AutoencoderKL, SD3_VAE), {"shift": 3.0}, (16, 128, 128),
        lambda b: (zeros(b, 333, 4096), zeros(b, 333, 4096), zeros(b, 2048), zeros(b, 2048)),
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"),
    ),
    "flux": Teacher(
        "Flux.1-dev", diffusers.FluxPipeline,
        (diffusers.FluxTransformer2DModel, HEADS | {
            "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38,
            "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True}),
        (diffusers.AutoencoderKL, FLUX_VAE), {"shift": 3.0, "use_dynamic_shifting": True}, (4096, 64),
        lambda b: (zeros(b, 512, 4096), zeros(b, 768), torch.zeros(512, 3)),
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    ),
    "qwen": Teacher(
        "Qwen-Image", diffusers.QwenImagePipeline,
        (diffusers.QwenImageTransformer2DModel, HEADS | {
            "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60, "joint_attention_dim": 3584}),
        (diffusers.AutoencoderKLQwenImage, {}),
        {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256,
         "max_image_seq_len": 8192, "shift_terminal": 0.02}, (4096, 64),
        lambda b: (zeros(b, 128, 3584), torch.ones((b, 128), dtype=torch.long)), ("text_encoder", "tokenizer"),
    ),
}  # fmt: skip


class Pairs:
    """Pairs of no prompt, all of one size."""

    config, hashes, sizes = None, None, [(1024, 1024)]
    prompts, seeds = ["a prompt"] * 64, list(range(64))

    def __init__(self, shape):
        self.shape = shape

    def __len__(self):
        return len(self.prompts)

    def latents(self, indices):
        return torch.from_numpy(np.ones((len(indices), *self.shape), dtype=np.float32))  # with values, when simulated

    def call_kwargs(self, indices):
        return {"height": 1024, "width": 1024}


def load(teacher, dtype, scheduler):
    """The pipeline as `pipelines.load_pipeline` gives it, without text encoders: their weights are added later."""
    denoiser, vae = (cls.from_config(values) for cls, values in (teacher.denoiser, teacher.vae))
    denoiser.to(dtype.get("transformer", dtype["default"])), vae.to(dtype["default"])
    pipeline = teacher.pipeline(transformer=denoiser, vae=vae, scheduler=scheduler, **dict.fromkeys(teacher.without))

    def encode_prompt(*args, prompt=None, **kwargs):
        prompt = prompt if prompt is not None else args[0]
        return teacher.embed(1 if isinstance(prompt, str) else len(prompt))

    pipeline.encode_prompt = encode_prompt
    return teachers.frozen(pipeline)


def direct_rows(kind):
    teacher, scheduler = TEACHERS[kind], diffusers.FlowMatchEulerDiscreteScheduler
    cls, values = teacher.denoiser
    config = {"class": teacher.pipeline, "denoisers": {"transformer": (cls, values)}, "notes": []}
    config["scheduler"] = scheduler, dict(scheduler(**teacher.scheduler).config)
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (direct.pipelines, "read_pipeline_config", lambda *_, **__: config),
            (direct.pipelines, "load_pipeline", lambda name, dtype, scheduler, **_: load(teacher, dtype, scheduler)),
            (direct, "read_data", lambda args: setattr(args, "num_held_out", 1) or setattr(
                args, "num_inference_steps", 4) or Pairs(teacher.latents)),
            (direct.sources, "check_vae", lambda *_, **__: None),
        ):  # fmt: skip
            stack.enter_context(unittest.mock.patch.object(owner, name, value))
        words = ["--pretrained_teacher_model=teacher", "--pairs_dir=pairs", "--output_dir=no_such_folder", "--seed=1"]
        words += ["--mixed_precision=bf16", "--gradient_checkpointing=full", "--max_train_steps=100"]
        words += ["--gradient_accumulation_steps=1", "--num_inference_steps=4"]
        for method, own in (("direct LoRA", ["--lora_rank=64"]), ("direct", ["--lora_rank=0"])):
            sizes = [simulate(direct, [*words, *own, f"--train_batch_size={size}"], 8) for size in TRIED]
            print_row(f"{teacher.name}, 1024 px", method, sizes)
        eight = simulate(direct, [*words, "--lora_rank=0", "--use_8bit_adam", f"--train_batch_size={TRIED[0]}"], 8)
        print_row(f"{teacher.name}, 1024 px", "direct, 8-bit Adam", sizes, sizes[0].between - eight.between)


def main():
    warnings.filterwarnings("ignore")
    heads = " | ".join(f"{card} GB" for card in CARDS)
    print(f"| teacher | method | GiB for one sample | {heads} | GFLOPs a sample |\n|---|---|---|{'---|' * 4}")
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            digits.write_shards(Path(folder, "shards"))
        for shape in sys.argv[1:] or (*NAMES, *TEACHERS):
            if shape in TEACHERS:
                direct_rows(shape)
                continue
            synthetic.write_configurations(Path(folder, shape), synthetic.SHAPES[shape])
            rows(Path(folder), shape)


if __name__ == "__main__":
    main()
