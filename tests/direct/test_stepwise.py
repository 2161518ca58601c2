"""Backward one denoiser call at a time gives the gradients of the ordinary backward pass."""

import train_direct_distill as direct
from common.direct import pipelines, probes, stepwise
from common.direct.student import roll_out
from common.errors import UserError
from common.networks import performance, sharded
from common.run import sharding
from tests import tiny_pipelines as tiny
from tests.cases import scalars, train, undo
from tests.direct.test_pipelines import Pairs, student
from tests.fork_server import run_processes

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

TOLERANCE = 1e-5  # of all gradients together: the same sums in another order; most are 1e-7 apart, SD's 1e-6


def make(name, rank=0, guided=False, recomputed="none", steps=3):
    """A rollout that trains all weights, or adapters with dropout that are not zero; guided: with the teacher's
    arguments, so that some pipelines ask their denoiser twice a step."""
    if guided:
        pipeline, kwargs = tiny.make(name), tiny.KWARGS[name] | {"num_inference_steps": steps}
        scheduler = pipeline.scheduler
        pipeline.scheduler, _ = probes.student_scheduler(type(scheduler), dict(scheduler.config))
    else:
        pipeline, kwargs, _ = student(name, steps)
    torch.manual_seed(1)
    if rank:
        pipelines.add_lora(pipeline, rank, float(rank), 0.3)
        for network in pipelines.denoisers(pipeline).values():
            for path, parameter in network.named_parameters():
                if "lora_B" in path:
                    torch.nn.init.normal_(parameter, std=0.2)
    rollout = pipelines.Rollout(pipeline, **kwargs)
    if not rank:
        rollout.requires_grad_(True)
    for network in rollout.denoisers.values():
        performance.recompute(network, recomputed)
    return rollout.train()


def gradients(rollout, is_stepwise, indices=(0, 1), seed=5):
    """(loss, all gradients as one vector, the random state afterwards, the number of recorded calls)"""
    torch.manual_seed(seed)
    with stepwise.recording(rollout, is_stepwise) as calls:
        latents = roll_out(rollout, Pairs(), list(indices))
    number, loss = len(calls), latents.square().mean()
    loss.backward(retain_graph=is_stepwise)
    stepwise.take_back(rollout, calls)
    parts = [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in rollout.parameters()]
    return loss.item(), torch.cat(parts).double(), torch.get_rng_state(), number


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


CASES = [(name, {"guided": True}) for name in tiny.PIPELINES]
CASES += [(name, {"rank": 2}) for name in ("SD1.5", "SDXL", "SD3", "Flux", "Qwen-Image", "Wan2.2", "Z-Image")]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_gradients_are_those_of_the_ordinary_backward_pass(name, options):
    """Of all weights through guidance, and of adapters with dropout, whose calls recompute their blocks."""
    loss, whole, state, _ = gradients(make(name, **options), False)
    recomputed = "full" if "rank" in options else "none"
    again, parts, after, calls = gradients(make(name, **options, recomputed=recomputed), True)
    asks_twice = "guided" in options and name in ("Qwen-Image", "Lumina2", "Wan", "Wan2.2", "CogView4", "Chroma")
    assert calls == 3 * (1 + asks_twice)
    assert again == pytest.approx(loss, rel=1e-6) and torch.equal(state, after)
    assert whole.norm() > 1e-4 and distance(parts, whole) < TOLERANCE


@pytest.mark.parametrize("missing", ["random state", "inputs"])
def test_what_is_left_out_is_noticed(missing, monkeypatch):
    _, whole, _, _ = gradients(make("SD3", rank=2), False)
    if missing == "random state":
        monkeypatch.setattr(stepwise, "_random_state", lambda _: None)
    else:
        call = stepwise.Call.__call__
        monkeypatch.setattr(stepwise.Call, "__call__", lambda self: (call(self), self.inputs.clear())[0])
    _, parts, _, _ = gradients(make("SD3", rank=2), True)
    assert distance(parts, whole) > 0.01


def test_what_a_pipeline_writes_into_later_is_refused(monkeypatch):
    rollout = make("SD3")
    step = rollout.pipeline.scheduler.step

    def in_place(out, t, latents, **options):
        answer = step(out, t, latents, **options)
        latents.data.add_(0.0), latents.detach().mul_(1.0)
        return answer

    monkeypatch.setattr(rollout.pipeline.scheduler, "step", in_place)
    with pytest.raises(UserError, match="writes into what it has given its denoiser; pass `backward`=whole"):
        gradients(rollout, True)


def test_a_rollout_keeps_nothing_of_its_calls():
    """Bytes that it saves for gradients, weights apart: of three and of six steps, stepwise and whole."""
    kept = {}
    for is_stepwise in (True, False):
        for steps in (3, 6):
            rollout, sizes = make("Qwen-Image", steps=steps), {}
            weights = {p.untyped_storage().data_ptr() for p in rollout.parameters()}

            def pack(tensor, sizes=sizes, weights=weights):
                if tensor.untyped_storage().data_ptr() not in weights:
                    sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), stepwise.recording(rollout, is_stepwise):
                roll_out(rollout, Pairs(), [0, 1])
            kept[is_stepwise, steps] = sum(sizes.values())
    assert kept[True, 6] < 0.02 * kept[False, 3] and kept[False, 6] > 1.5 * kept[False, 3]


def compare_sharded(name):
    """In each of two processes, under FSDP2: gradients of all weights against those of one process, in float32."""
    accelerator = sharding.ShardingAccelerator({"reshard_after_forward": True}, cpu=True)
    index = accelerator.process_index
    whole, rollout = gradients(make(name), False)[1], make(name)
    sharding.shard(accelerator, list(rollout.denoisers.values()))
    student, _ = accelerator.prepare(rollout, torch.optim.SGD(rollout.parameters(), lr=0.0))
    for repeats in (1, 2):
        torch.manual_seed(5)
        with stepwise.recording(student) as calls:
            latents = roll_out(student, Pairs(), [index])
        latents.square().mean().backward(retain_graph=True)
        stepwise.take_back(student, calls)
        parts = [sharded.whole(torch.zeros_like(p) if p.grad is None else p.grad) for p in rollout.parameters()]
        parts = torch.cat([part.flatten() for part in parts]).double()
        assert distance(parts / repeats, whole) < TOLERANCE, distance(parts / repeats, whole)
    dist.destroy_process_group()


def compare_two_processes(name):
    """In each of two processes: gradients of DDP, each with one pair, against those of both pairs here; twice, so that
    DDP has sorted its buckets anew, and with a micro-batch that is not synchronised between."""
    dist.init_process_group("gloo")
    index = dist.get_rank()
    whole = gradients(make(name), False)[1]
    rollout = DistributedDataParallel(make(name), gradient_as_bucket_view=True)
    for repeats in (1, 2):
        for parameter in rollout.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        for last in [False] * (repeats - 1) + [True]:
            rollout.require_backward_grad_sync = last  # as `no_sync` does
            parts = gradients(rollout, True, [index])[1]
        assert distance(parts / repeats, whole) < TOLERANCE
        other = parts.clone()
        dist.broadcast(other, 0)
        assert torch.equal(other, parts)
    return rollout  # its end would wait for a thread of gloo, which waits for Python


@pytest.mark.parametrize("compare", ["compare_two_processes", "compare_sharded"])
def test_two_processes_have_the_gradients_of_one(compare):
    """Of DDP, which reduces once, and of FSDP2, which reduces after each call. Wan 2.2 has two denoisers, of which the
    call that is taken back last asks one."""
    prelude = f"import os; from tests.direct.test_stepwise import {compare} as c; kept = c('Wan2.2'); os._exit(0)"
    done = run_processes([], direct, 2, prelude)
    assert done.returncode == 0, done.stderr


def test_the_script_gives_the_same_losses_and_goes_on_either_way(tmp_path, command):
    flags = {"logging_steps": 1, "max_train_steps": 2, "checkpointing_steps": 1, "gradient_accumulation_steps": 2}
    for which in ("whole", "stepwise"):
        train(command("direct lora", tmp_path / which, backward=which, **flags), direct)
    whole, stepped = (scalars(tmp_path / which, "loss") for which in ("whole", "stepwise"))
    assert len(whole) == 2 and stepped == pytest.approx(whole, rel=1e-5)
    again = undo(tmp_path / "whole" / "checkpoint-2")
    train(command("direct lora", tmp_path / "whole", backward="stepwise", **flags, **again), direct)
    assert scalars(tmp_path / "whole", "loss")[2] == pytest.approx(stepped[2], rel=1e-5)
