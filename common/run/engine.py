"""What the flags make of accelerate, the optimizer and the networks."""

import datetime
import functools
import os
from pathlib import Path

from common.errors import UserError
from common.flags import spelled
from common.networks import performance
from common.run import sharding, simulation

import torch
from accelerate import Accelerator, AutocastKwargs, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, ProjectConfiguration
from diffusers.optimization import get_scheduler

# Processes wait so long for each other, while the first one writes tens of GB or uploads them; torch: 10 minutes.
PROCESS_TIMEOUT = datetime.timedelta(hours=3)


def make_accelerator(args):
    """accelerate's engine as the flags ask for it; trackers write under output_dir.

    Raises UserError where the launcher's processes do not see each other (each would be a run of its own) and for an
    engine that is not supported.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    settings = sharding.take_settings(args)
    make = Accelerator if settings is None else functools.partial(sharding.ShardingAccelerator, settings)
    given = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    stands_in = given == "fp16" and not torch.cuda.is_available()  # in a dry run
    # Half precision copies of all weights would be there from a rollout's first call to its last one's end, and where
    # blocks are recomputed each is made again anyway.
    is_rollout = hasattr(args, "backward")
    accelerator = make(
        mixed_precision="bf16" if stands_in else args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.dry_run else args.report_to or None,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))),
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT),
            AutocastKwargs(cache_enabled=not is_rollout or args.gradient_checkpointing != "full"),
        ],
    )
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(
            f"`accelerate config`: {accelerator.distributed_type.value} is not supported; use FSDP2 "
            "(`distributed_type: FSDP`, `fsdp_version: 2`), which splits weights, gradients and states"
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise UserError(
            f"{started} processes were started but did not join (no GPU?); "
            "set ACCELERATE_USE_CPU=true, or launch one process"
        )
    args.mixed_precision = accelerator.mixed_precision  # accelerate's configuration decides where no flag does
    if stands_in:
        args.mixed_precision = given
        accelerator.print("Note: fp16 needs a GPU, so what is simulated is bf16, which takes the same memory")
    made_for_gpus = [accelerator.mixed_precision] * (accelerator.mixed_precision != "no")
    made_for_gpus += ["8-bit Adam"] * args.use_8bit_adam
    if accelerator.device.type == "cpu" and made_for_gpus and not args.dry_run:
        accelerator.print(f"Note: this runs on the CPU, with {' and '.join(made_for_gpus)}, made for GPUs")
    if args.enable_xformers_memory_efficient_attention and (missing := performance.missing_for_xformers()):
        args.enable_xformers_memory_efficient_attention = False
        flag = spelled("`enable_xformers_memory_efficient_attention`")
        accelerator.print(
            f"{flag}: xformers needs {missing}, and there is none; torch's attention is taken instead, which does not "
            "need more memory"
        )
    return accelerator


def make_optimizer(args, parameters, total_batch_size, learning_rate=None):
    """AdamW (fused on CUDA), bitsandbytes' 8-bit AdamW, or RAdam over the list of trainable `parameters`.

    learning_rate: another than the flag's. RAdam is for scripts that have `optimizer_type`; its weight decay is
    decoupled, as AdamW's.
    """
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        optimizer_class, options = AdamW8bit, {}
    elif getattr(args, "optimizer_type", "adamw") == "radam":
        optimizer_class, options = torch.optim.RAdam, {"decoupled_weight_decay": True}
    else:
        optimizer_class, options = torch.optim.AdamW, {"fused": torch.cuda.is_available() or simulation.is_on()}
    return optimizer_class(
        parameters,
        lr=(learning_rate or args.learning_rate) * (total_batch_size if args.scale_lr else 1),
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        **options,
    )


def state_bytes(optimizer, part=lambda parameter: parameter):
    """What an optimizer's states will take: two as large as each weight; of 8-bit AdamW, 8 bits and a scale of 256.

    part: what of a weight is counted, as `ema.part` for that of this process.
    """
    is_8bit = "8bit" in type(getattr(optimizer, "optimizer", optimizer)).__name__
    sizes = [part(weight).numel() for group in optimizer.param_groups for weight in group["params"]]
    return sum(2 * size + size // 32 if is_8bit and size >= 4096 else 8 * size for size in sizes)


def apply_performance_flags(args, trained, frozen, vae=None):
    """`gradient_checkpointing`, `float32_end_layers`, `channels_last`, `compile` and xformers' kernels, on denoisers,
    in place.

    trained: those with a backward pass; frozen: the others. After copies and adapters were made, before `prepare`.
    """
    half = args.mixed_precision in ("fp16", "bf16")
    for network in trained:
        performance.recompute(network, args.gradient_checkpointing)
    for network in (*trained, *(each for each in frozen if each.dtype == torch.float32)):  # a half teacher stays half
        if half and getattr(args, "float32_end_layers", False):
            performance.float32_ends(network)
    for network in (*trained, *frozen):
        if args.enable_xformers_memory_efficient_attention:
            network.enable_xformers_memory_efficient_attention()
        if args.compile:
            performance.compile_blocks(network)
    for network in (*trained, *frozen, *([vae] if vae else [])):
        if args.channels_last:
            performance.channels_last(network)


def make_lr_scheduler(args, optimizer):
    """The `lr_scheduler` over `max_train_steps`; not prepared by accelerate, which would step it once per process."""
    steps = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
    return get_scheduler(args.lr_scheduler, optimizer, **steps)
