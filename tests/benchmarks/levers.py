"""What each lever changes in the loss over 50 updates, and in the time: `python tests/benchmarks/levers.py`.

Needs the demo's folder (`python -m common.tools.demo --teacher_only`), or makes a small teacher and shards of its own
in a temporary folder. Every row is a run of a script with the same seed as its plain run, in turn, in one process. The
difference is the largest of |loss - plain loss| / plain loss over the updates; the time is the median of an update's
after the first five, against the plain run's. A row that exceeds its tolerance ends the command with an error.
`--activations` prints instead what recomputation saves of SD 1.5 and SDXL at their sizes, without a weight (meta
tensors in bfloat16, one sample, attention kept as a flash kernel keeps it).
"""

import argparse
import os
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train_lcm_distill_lora_sd_wds as lcm_lora  # noqa: E402
import train_lcm_distill_sd_wds as lcm  # noqa: E402
from common.ct import unet as ct_unet  # noqa: E402
from common.flags import ArgumentParser, positive_int  # noqa: E402
from common.networks import performance  # noqa: E402
from common.run import checkpointing  # noqa: E402
from common.run.preemption import Stopper  # noqa: E402
from common.run.training_run import RunningMeans  # noqa: E402
from common.tools.demo import digits, stable_diffusion  # noqa: E402

import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from diffusers import UNet2DConditionModel, UNet2DModel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

ALL = {"compile": True, "channels_last": True, "gradient_checkpointing": "selective"}
BF16 = {"mixed_precision": "bf16"}
# name: (script, flags of the plain run, flags more, largest difference of the loss that is allowed)
ROWS = {
    "--gradient_checkpointing=selective": (lcm, {}, {"gradient_checkpointing": "selective"}, 0.0),
    "--gradient_checkpointing=full": (lcm, {}, {"gradient_checkpointing": "full"}, 0.0),
    "--channels_last": (lcm, {}, {"channels_last": True}, 1e-3),
    "--vae_encode_batch_size=2": (lcm, {}, {"vae_encode_batch_size": 2}, 1e-3),
    "--cast_teacher_unet": (lcm, BF16 | {"no-cast_teacher_unet": True}, BF16, 0.05),
    "LoRA: --gradient_checkpointing=selective": (lcm_lora, {}, {"gradient_checkpointing": "selective"}, 0.0),
    "LoRA: --channels_last": (lcm_lora, {}, {"channels_last": True}, 1e-3),
    "--compile": (lcm, {}, {"compile": True}, 1e-3),
    "--compile --channels_last --gradient_checkpointing=selective": (lcm, {}, ALL, 1e-3),
}


class Done(Exception):
    pass


def run(script, flags, folder, steps):
    """([loss of each update], seconds of an update)."""
    losses, times, take, check = [], [], RunningMeans.take, Stopper.check

    def taken(self, *args):
        means = take(self, *args)
        losses.append(means["loss"])
        return means

    def checked(self):
        times.append(time.perf_counter())
        return check(self)

    def end(*args):
        raise Done

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    RunningMeans.take, Stopper.check, save = taken, checked, checkpointing.save_checkpoint
    checkpointing.save_checkpoint = end
    flags = flags | {"output_dir": folder, "max_train_steps": steps, "logging_steps": 1, "report_to": "none"}
    words = [f"--{k}" if v is True else f"--{k}={v}" for k, v in flags.items()]
    try:
        script.main(script.parse_args([*words, "--checkpointing_steps=1000000", "--validation_steps=0", "--seed=0"]))
    except Done:
        pass
    finally:
        RunningMeans.take, Stopper.check, checkpointing.save_checkpoint = take, check, save
    assert len(losses) == steps
    return losses, median(b - a for a, b in zip(times[5:], times[6:], strict=False))


def compare(args, scratch):
    teacher, shards = args.demo / "teacher", args.demo / "shards" / "train"
    if not teacher.is_dir():
        stable_diffusion.build_teacher(scratch / "teacher")
        digits.write_shards(scratch / "shards")
        teacher, shards = scratch / "teacher", scratch / "shards" / "train"
    common = {"pretrained_teacher_model": teacher, "train_shards_path_or_url": shards / "{00000..00003}.tar"}
    common |= {"resolution": digits.RESOLUTION, "train_batch_size": 8, "lr_warmup_steps": 0}
    common |= {"loss_type": "huber", "w_min": 1, "w_max": 1, "validation_num_inference_steps": 1}
    rates = {lcm: {"learning_rate": 1e-6}, lcm_lora: {"learning_rate": 1e-4}}  # the guides'
    plain, failed = {}, []
    print("| lever | largest difference of the loss | tolerance | time of an update |\n|---|---|---|---|", flush=True)
    for number, (name, (script, base, more, tolerance)) in enumerate(ROWS.items()):
        if args.only and not any(word in name for word in args.only):
            continue
        key = script.__name__, *base
        if key not in plain:
            plain[key] = run(script, common | rates[script] | base, scratch / f"plain-{number}", args.steps)
        losses, seconds = run(script, common | rates[script] | more, scratch / str(number), args.steps)
        difference = max(abs(a - b) / b for a, b in zip(losses, plain[key][0], strict=True))
        failed += [name] if difference > tolerance else []
        allowed = f"{tolerance:g}" if tolerance else "equal"
        print(f"| `{name}` | {difference:.1e} | {allowed} | {seconds / plain[key][1]:.2f} |", flush=True)
    if failed:
        raise SystemExit(f"more than its tolerance: {', '.join(failed)}")


# ---------------------------------------------------------------------------------------------------------------------
# Activations of the real sizes

SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
NETWORKS = {
    "SD 1.5, 512 px": lambda: UNet2DConditionModel(**SD15),
    "SDXL, 1024 px": lambda: UNet2DConditionModel(**SDXL),
    "consistency training, 32 px": lambda: UNet2DModel(sample_size=32, **ct_unet.DEFAULT_CONFIGS[32]),
}


class FlashAttention(torch.autograd.Function):
    """Keeps what a flash kernel keeps for the backward pass: its inputs, its output, one number a row."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def activations(make, which):
    """(bytes kept for the backward pass beside the weights, FLOPs of both passes without attention's products)."""
    with torch.device("meta"):
        network = make().bfloat16().train()
        performance.recompute(network, which)
        size, channels = network.config.sample_size, network.config.in_channels
        inputs = [torch.empty(1, channels, size, size, dtype=torch.bfloat16), torch.empty(1)]
        options, weights, kept = {}, {p.untyped_storage()._cdata for p in network.parameters()}, {}
        if isinstance(network, UNet2DConditionModel):
            inputs.append(torch.empty(1, 77, network.config.cross_attention_dim, dtype=torch.bfloat16))
        if getattr(network.config, "addition_embed_type", None):
            options["added_cond_kwargs"] = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}

        def keep(tensor):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage
            return tensor

        attention, functional = torch.nn.functional.scaled_dot_product_attention, torch.nn.functional
        functional.scaled_dot_product_attention = lambda q, k, v, **_: FlashAttention.apply(q, k, v)
        try:
            with FlopCounterMode(display=False) as flops:
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    output = network(*inputs, **options).sample
                output.float().sum().backward()
        finally:
            functional.scaled_dot_product_attention = attention
    return sum(s.nbytes() for key, s in kept.items() if key not in weights), flops.get_total_flops()


def main():
    parser = ArgumentParser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--demo", type=Path, help="the demo's folder; default: demo, where there is one")
    parser.add_argument("--steps", type=positive_int, default=50, help="updates, at least 7")
    parser.add_argument("--only", nargs="+", help="rows whose name has one of these words")
    parser.add_argument("--activations", action="store_true")
    args = parser.parse_args()
    if args.demo and not (args.demo / "teacher").is_dir():
        parser.error(f"--demo={args.demo} holds no teacher; name a demo's folder, or drop it: one is made then")
    if args.steps < 7:
        parser.error(f"--steps={args.steps}: an update's time is taken after the first five; at least 7 are needed")
    for word in args.only or []:
        if not any(word in name for name in ROWS):
            parser.error(f"--only={word} is in the name of no row; the rows are {', '.join(ROWS)}")
    if args.activations and args.only:
        parser.error("--only: --activations prints all of its rows; drop one of them")
    args.demo = args.demo or ROOT / "demo"
    if not args.activations:
        with TemporaryDirectory() as scratch:
            return compare(args, Path(scratch))
    print("| network | `--gradient_checkpointing` | activations of a sample | FLOPs |\n|---|---|---|---|")
    for name, make in NETWORKS.items():
        plain = None
        for which in performance.CHECKPOINTING:
            kept, flops = activations(make, which)
            plain = plain or (kept, flops)
            print(f"| {name} | {which} | {kept / 2**30:.2f} GiB, {kept / plain[0]:.0%} | {flops / plain[1]:.1%} |")


if __name__ == "__main__":
    main()
