"""Run by torchrun from test_sharding.py: what is ours, on parameters that torch's fully_shard has split.

torchrun --nproc_per_node=2 tests/sharded_worker.py OUT sharded|plain FUSED
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

from common.ema import ema_update
from common.run.updates import UpdateGuard, total_norm

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

STEPS, BATCH, POISONED, MAX_GRAD_NORM, DECAY = 8, 8, 3, 0.5, 0.7


def network():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(5, 7), torch.nn.SiLU(), torch.nn.Linear(7, 3)]  # 5, 7 and 3 rows: uneven shards
    return torch.nn.Sequential(*layers)


def main(out, kind, fused):
    accelerator = Accelerator(cpu=True)
    world, rank = accelerator.num_processes, accelerator.process_index
    assert world == (2 if kind == "sharded" else 1), PartialState()
    unet, target = network(), network()
    if kind == "sharded":
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
        for module in (unet, target):
            for layer in (module[0], module[2], module):
                fully_shard(layer, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in [*unet.parameters(), *target.parameters()])
    optimizer = torch.optim.AdamW(unet.parameters(), lr=0.05, fused=fused == "fused")
    guard = UpdateGuard(accelerator, out, limit=5)
    data = torch.Generator().manual_seed(1)
    losses, norms = [], []
    for step in range(STEPS):
        x, y = torch.randn(BATCH, 5, generator=data), torch.randn(BATCH, 3, generator=data)
        if step == POISONED:
            x[-1] = float("nan")  # the last sample, that of the last rank
        x, y = x[rank::world], y[rank::world]
        loss = (unet(x) - y).square().mean()
        loss.backward()
        finite = guard.step(optimizer, unet.parameters(), MAX_GRAD_NORM, loss, [f"{step}.{rank}"])
        norms.append(total_norm(unet.parameters()).item())  # after clipping
        optimizer.zero_grad(set_to_none=True)
        ema_update(target.parameters(), unet.parameters(), DECAY, finite)
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    skipped = guard.count()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    states = [get_model_state_dict(module, options=options) for module in (unet, target)]
    if accelerator.is_main_process:
        torch.save({"losses": losses, "norms": norms, "skipped": skipped, "states": states}, Path(out, f"{kind}.pt"))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    args = SimpleNamespace(out=sys.argv[1], kind=sys.argv[2], fused=sys.argv[3])
    main(args.out, args.kind, args.fused)
    # Everything is written. The mesh's own groups outlive `end_training`; gloo's threads may abort the teardown.
    os._exit(0)
