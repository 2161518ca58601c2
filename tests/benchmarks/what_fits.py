"""The table "What fits where" of docs/performance_measured.md: the largest batch on cards of 24, 48 and 80 GB.

    python -m tests.benchmarks.what_fits [sd15] [sdxl] [sd35m] [flux] [qwen]
    python -m tests.benchmarks.what_fits one flux | qwen

Teachers are the public configurations of Stable Diffusion 1.5 and SDXL, without weights (`synthetic.SHAPES`). Each
method is simulated at two batch sizes with --gradient_checkpointing=full and bf16, images are encoded one by one, and
memory is a straight line in the batch size. Direct distillation of SD3.5-medium, Flux.1-dev and Qwen-Image: a LoRA of
rank 64, and all weights, with FSDP2 and 8-bit Adam too, four steps, 1024 px, on 8 processes, from the public
configurations. Text encoders are let go before the first update; what is on the card with them counts.

`one` is the table of one sample: denoisers of 2 and of 4 blocks of each kind are simulated, and memory in each moment
is a straight line in the number of blocks. Text encoders have one layer there, which lie alone on the card.
"""

import contextlib
import importlib
import io
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import train_direct_distill as direct
from common.direct import pairs
from common.run import simulation
from common.tools.demo import digits
from common.tools.plan import TRIED, needed_at, simulate
from tests.benchmarks import synthetic

import diffusers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

PAIRS = 16
METHODS = {
    "LCM": ("train_lcm_distill_sd_wds", []),
    "LCM LoRA": ("train_lcm_distill_lora_sd_wds", []),
    "TSCD": ("train_tscd_distill_sd_wds", []),
    "TSCD LoRA": ("train_tscd_distill_lora_sd_wds", []),
}
DIRECT = {
    "direct LoRA": ["--lora_rank=64"],
    "direct LoRA, stepwise": ["--lora_rank=64", "--backward=stepwise"],
    "direct LoRA, stepwise, nf4": ["--lora_rank=64", "--backward=stepwise", "--quantize_base=nf4"],
    "direct, FSDP2": ["--lora_rank=0"],
    "direct, FSDP2, stepwise": ["--lora_rank=0", "--backward=stepwise"],
    "direct": ["--lora_rank=0"],  # the last one, which the row with 8-bit Adam starts from
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
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768, "num_hidden_layers": 12}
CLIP_L |= {"num_attention_heads": 12, "hidden_act": "quick_gelu"}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280, "num_hidden_layers": 32}
CLIP_G |= {"num_attention_heads": 20, "hidden_act": "gelu"}
T5_XXL = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "d_kv": 64, "vocab_size": 32128}
T5_XXL |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
QWEN_TEXT = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
QWEN_TEXT |= {"num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 128000, "rope_theta": 1e6}
QWEN_TEXT |= {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
QWEN_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}


class Teacher(NamedTuple):
    """pipeline: its class. networks: {part: (class, configuration)}, of text encoders too, in order; each of these has
    a tokenizer. guided: what its call gets when pairs are made."""

    name: str
    pipeline: type
    networks: dict
    scheduler: dict
    latents: tuple  # shape of a sample's
    guided: dict


def clip(sizes):
    return synthetic.text_config(digits.build_tokenizer(), sizes)


def clip_l():
    return transformers.CLIPTextModelWithProjection, clip(CLIP_L)


def t5():
    return transformers.T5EncoderModel, transformers.T5Config(**T5_XXL)


def qwen_vl():
    config = transformers.Qwen2_5_VLConfig(text_config=QWEN_TEXT, vision_config=QWEN_VISION)
    return transformers.Qwen2_5_VLForConditionalGeneration, config


TEACHERS = {
    "sd35m": lambda: Teacher(
        "SD3.5-medium", diffusers.StableDiffusion3Pipeline,
        {"transformer": (diffusers.SD3Transformer2DModel, {
            "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
            "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
            "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"}),
         "vae": (diffusers.AutoencoderKL, SD3_VAE), "text_encoder": clip_l(),
         "text_encoder_2": (transformers.CLIPTextModelWithProjection, clip(CLIP_G)), "text_encoder_3": t5()},
        {"shift": 3.0}, (16, 128, 128), {"guidance_scale": 4.5},
    ),
    "flux": lambda: Teacher(
        "Flux.1-dev", diffusers.FluxPipeline,
        {"transformer": (diffusers.FluxTransformer2DModel, HEADS | {
            "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38,
            "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True}),
         "vae": (diffusers.AutoencoderKL, FLUX_VAE),
         "text_encoder": (transformers.CLIPTextModel, clip(CLIP_L)), "text_encoder_2": t5()},
        {"shift": 3.0, "use_dynamic_shifting": True}, (4096, 64), {"guidance_scale": 3.5},
    ),
    "qwen": lambda: Teacher(
        "Qwen-Image", diffusers.QwenImagePipeline,
        {"transformer": (diffusers.QwenImageTransformer2DModel, HEADS | {
            "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60, "joint_attention_dim": 3584}),
         "vae": (diffusers.AutoencoderKLQwenImage, {}), "text_encoder": qwen_vl()},
        {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256,
         "max_image_seq_len": 8192, "shift_terminal": 0.02}, (4096, 64),
        {"true_cfg_scale": 4.0, "negative_prompt": " "},
    ),
}  # fmt: skip


def save_tokenizer(folder, encoder_class):
    """A tokenizer of few words for a text encoder; its class. It fills prompts up as the public one does, but Qwen's,
    which has a token for each letter."""
    if encoder_class is transformers.T5EncoderModel:
        words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
        tokenizer = transformers.T5TokenizerFast(vocab=words, extra_ids=0)
    elif encoder_class is transformers.Qwen2_5_VLForConditionalGeneration:
        words = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        tokenizer = transformers.Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    else:
        tokenizer = digits.build_tokenizer()
    tokenizer.save_pretrained(folder)
    if isinstance(tokenizer, transformers.CLIPTokenizer):
        digits.save_tokenizer_files(tokenizer, folder)
    return type(tokenizer)


def write_teacher(folder, teacher, size=1024):
    """Configurations of a teacher, and pairs of size x size pixels, as `common.tools.generate_pairs` writes them:
    FOLDER/teacher and FOLDER/pairs."""
    place, parts = folder / "teacher", {}
    for name, (network_class, config) in teacher.networks.items():
        library = network_class.__module__.split(".")[0]
        parts[name] = [library, network_class.__name__]
        if library == "diffusers":
            with torch.device("meta"):
                network_class.from_config(config).save_config(place / name)
            continue
        config.architectures = [network_class.__name__]
        config.save_pretrained(place / name)
        tokenizer = name.replace("text_encoder", "tokenizer")
        parts[tokenizer] = [library, save_tokenizer(place / tokenizer, network_class).__name__]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**teacher.scheduler)
    scheduler.save_pretrained(place / "scheduler")
    parts["scheduler"] = ["diffusers", type(scheduler).__name__]
    index = {"_class_name": teacher.pipeline.__name__, "_diffusers_version": diffusers.__version__, **parts}
    (place / "model_index.json").write_text(json.dumps(index))
    kwargs = {"num_inference_steps": 40, "height": size, "width": size, **teacher.guided}
    config = {
        "format": pairs.FORMAT, "model": teacher.name, "pipeline": teacher.pipeline.__name__, "weights_sample": {},
        "scheduler": pairs.recorded(scheduler), "kwargs": kwargs, "num_pairs": PAIRS, "samples_per_shard": PAIRS,
    }  # fmt: skip
    pairs.write_config(folder / "pairs", config)
    latents = torch.ones(teacher.latents, dtype=torch.bfloat16)
    made = ((i, f"the prompt of image {i}", i, latents, None, None) for i in range(PAIRS))
    pairs.write_shard(pairs.shard_path(folder / "pairs", 0), made)


def direct_rows(folder, teacher):
    write_teacher(folder, teacher)
    words = direct_words(folder)
    name = f"{teacher.name}, 1024 px"
    for method, own in DIRECT.items():
        fsdp2 = "FSDP2" in method
        sizes = [simulate(direct, [*words, *own, f"--train_batch_size={size}"], 8, fsdp2) for size in TRIED]
        print_row(name, method, sizes)
        print(f"Its start: {sizes[0].moments[simulation.BEFORE] / 2**30:.1f} GiB.", file=sys.stderr, flush=True)
    eight = simulate(direct, [*words, "--lora_rank=0", "--use_8bit_adam", f"--train_batch_size={TRIED[0]}"], 8)
    print_row(name, "direct, 8-bit Adam", sizes, sizes[0].between - eight.between)


# ---------------------------------------------------------------------------------------------------------------------
# One sample, from a few blocks

STEPWISE = ["--backward=stepwise"]
ONE = {  # flags, processes, whether these split
    "LoRA": (["--lora_rank=64"], 1, False),
    "LoRA, stepwise": (["--lora_rank=64", *STEPWISE], 1, False),
    "LoRA, stepwise, score": (["--lora_rank=64", *STEPWISE, "--score_weight=1"], 1, False),
    "LoRA, stepwise, 8-bit Adam": (["--lora_rank=64", *STEPWISE, "--use_8bit_adam"], 1, False),
    "LoRA, stepwise, nf4": (["--lora_rank=64", *STEPWISE, "--quantize_base=nf4"], 1, False),
    "LoRA, stepwise, nf4, 8-bit Adam": (
        ["--lora_rank=64", *STEPWISE, "--quantize_base=nf4", "--use_8bit_adam"], 1, False),
    "all weights, stepwise, FSDP2 on 8": (["--lora_rank=0", *STEPWISE], 8, True),
    "all weights, stepwise, score, FSDP2 on 8": (["--lora_rank=0", *STEPWISE, "--score_weight=1"], 8, True),
}  # fmt: skip
BLOCKS = {"qwen": ({"num_layers": 1}, 60), "flux": ({"num_layers": 1, "num_single_layers": 2}, 19)}  # of a step, steps
FEW = 2, 4


def one_sample(folder, shape, method):
    """Bytes at the peak of each moment, {moment: bytes}, of a row of ONE."""
    own, processes, fsdp2 = ONE[method]
    step, depth = BLOCKS[shape]
    small, large = (
        simulate(direct, [*few_blocks(folder / f"{n}", shape, step, n), *own], processes, fsdp2) for n in FEW
    )
    line = {name: (large.moments[name] - size) / (FEW[1] - FEW[0]) for name, size in small.moments.items()}
    return {name: size + line[name] * (depth - FEW[0]) for name, size in small.moments.items()}


def few_blocks(folder, shape, step, times):
    """The words of a run of a teacher with few blocks and little text encoders."""
    teacher, networks = TEACHERS[shape](), {}
    for name, (cls, config) in teacher.networks.items():
        if name == "transformer":
            config = config | {key: number * times for key, number in step.items()}
        elif cls is transformers.Qwen2_5_VLForConditionalGeneration:
            text, vision = QWEN_TEXT | {"num_hidden_layers": 1}, QWEN_VISION | {"depth": 1}
            config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        elif cls is transformers.T5EncoderModel:
            config = transformers.T5Config(**T5_XXL | {"num_layers": 1})
        networks[name] = cls, config
    if not (folder / "teacher").exists():
        write_teacher(folder, teacher._replace(networks=networks))
    return [*direct_words(folder), "--train_batch_size=1"]


def direct_words(folder):
    words = [f"--pretrained_teacher_model={folder / 'teacher'}", f"--pairs_dir={folder / 'pairs'}"]
    words += [f"--output_dir={folder / 'out'}", "--mixed_precision=bf16", "--gradient_checkpointing=full"]
    return [*words, "--max_train_steps=100", "--gradient_accumulation_steps=1", "--num_inference_steps=4"]


def one_row(shape, method, moments):
    """A line of the table of one sample: its peak, what a card needs with the allowances, and when."""
    moment = max(moments, key=moments.get)
    allowed, where = simulation.needed(moments[moment]) / 2**30, moment.replace("pipeline.", "")
    return f"| {shape} | {method} | {moments[moment] / 1e9:.1f} | {allowed:.1f} | {where} |"


def print_one(shape):
    print("| teacher | one sample | peak, GB | with the allowances, GiB | moment |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for method in ONE:
            print(one_row(shape, method, one_sample(Path(folder), shape, method)), flush=True)


def main():
    warnings.filterwarnings("ignore")
    if sys.argv[1:2] == ["one"]:
        return print_one(sys.argv[2])
    heads = " | ".join(f"{card} GB" for card in CARDS)
    print(f"| teacher | method | GiB for one sample | {heads} | GFLOPs a sample |\n|---|---|---|{'---|' * 4}")
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            digits.write_shards(Path(folder, "shards"))
        for shape in sys.argv[1:] or (*NAMES, *TEACHERS):
            if shape in TEACHERS:
                direct_rows(Path(folder, shape), TEACHERS[shape]())
                continue
            synthetic.write_configurations(Path(folder, shape), synthetic.SHAPES[shape])
            rows(Path(folder), shape)


if __name__ == "__main__":
    main()
