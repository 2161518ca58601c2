"""Which part of a tool's work a process does, where many share it and none waits for another.

Left out: tasks of one `srun` (set RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS for them).
"""

import os

from common.errors import UserError
from common.flags import non_negative_int, positive_int

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_device_argument(add):
    add("--device", help="default: this process's GPU, else the CPU")


def find_device(name):
    """The torch device --device, without it this process's GPU, or else the CPU; UserError where it cannot be used."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    try:
        device = torch.device(name or (f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).cpu()  # there and back: meta is a device too
    except (RuntimeError, AssertionError) as error:
        line = str(error).split("\n")[0].split(". ")[0]
        raise UserError(f"--device={name} cannot be used here ({line}); take cuda, cuda:1 or cpu") from None
    return device


def add_work_arguments(add):
    """Which part of a tool's work this process does, for `resolve_work`."""
    add("--shard_index", type=non_negative_int, help="which part of the shards; default: the SLURM array, or RANK")
    add("--num_shards", type=positive_int, help="how many parts; default: the SLURM array, or WORLD_SIZE")


def resolve_work(parser, args):
    """Fill in --shard_index and --num_shards: shards [shard_index::num_shards] are this process's."""
    if (args.shard_index is None) != (args.num_shards is None):
        parser.error("--shard_index and --num_shards go together")
    if args.num_shards is None:
        args.shard_index, args.num_shards = _part_of_the_work(parser)
    if args.shard_index >= args.num_shards:
        parser.error(f"--shard_index={args.shard_index} must be less than --num_shards={args.num_shards}")


def task_of(args):
    """What a bar and the last line call this process."""
    return f"task {args.shard_index} of {args.num_shards}" if args.num_shards > 1 else "encoding"


def _part_of_the_work(parser):
    """(index, count) of this process: those of the SLURM array, of the launcher's ranks, or of both."""
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP", "SLURM_ARRAY_TASK_COUNT")
    defaults = {"SLURM_ARRAY_TASK_STEP": "1", "RANK": "0", "WORLD_SIZE": "1"}
    if names[0] not in os.environ:
        defaults |= dict(zip(names, "0011", strict=True))
    given = {name: os.environ.get(name, defaults.get(name, "")) for name in (*names, "RANK", "WORLD_SIZE")}
    wrong = [f"{name}={value!r}" for name, value in given.items() if not value.isdecimal()]
    if wrong:
        parser.error(f"the environment variable {wrong[0]} is no number; pass --shard_index and --num_shards")
    task, first, step, count, rank, world_size = map(int, given.values())
    if rank >= world_size:
        parser.error(f"RANK={rank} is not below WORLD_SIZE={world_size}; pass --shard_index and --num_shards")
    task, rest = divmod(task - first, max(1, step))
    if rest or not 0 <= task < count:
        parser.error(
            f"SLURM's array has {count} tasks from {first} on in steps of {step}, and this one is "
            f"{given['SLURM_ARRAY_TASK_ID']}: pass an unbroken --array such as 0-{max(0, count - 1)}, or "
            "--shard_index and --num_shards; what is finished is left out in any case"
        )
    return task * world_size + rank, count * world_size
