"""Backward through one denoiser call at a time: what it keeps for gradients is alive of one call, not of all K.

A rollout is x_{k+1} = s(x_k, o_k) with o_k = f(x_k; w), s the scheduler's arithmetic and f the denoiser. Recorded, f
runs without gradients and each o_k is a leaf, so the loss goes back through s alone, to dL/do_k. Then, from the last
call to the first, f is computed again and taken back from dL/do_k, to w and to x_k, and from there through s to the
calls before. Gradients are those of the ordinary backward pass up to rounding; a forward pass a call is added.
Each call's is a backward pass of its own: nested in one, as a reentrant checkpoint is, FSDP2 gives wrong gradients.
"""

import contextlib
import dataclasses

from common.direct.pipelines import denoisers
from common.errors import UserError

import torch
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten


@dataclasses.dataclass
class Call:
    """A recorded call of a denoiser: what is needed to make it again, and the leaves that its results became."""

    network: torch.nn.Module
    given: list  # the values of its arguments; tensors as they came, some with the graph of what made them
    form: object  # of the arguments, for `tree_unflatten`
    versions: list  # of given tensors: whoever writes into one afterwards changes it
    random_state: tuple | None  # as from `_random_state`, where dropout draws
    results: list = dataclasses.field(default_factory=list)
    inputs: list = dataclasses.field(default_factory=list)  # of the second time: (place in given, leaf)

    def __call__(self):
        """The results once more, with gradients: a list of tensors and other values, in the order of `results`."""
        if self.versions != _versions(self.given):
            raise UserError(
                "`backward`=stepwise: this pipeline writes into what it has given its denoiser; pass `backward`=whole"
            )
        values = list(self.given)
        for place, value in enumerate(values):
            if isinstance(value, torch.Tensor) and value.requires_grad:
                values[place] = value.detach().requires_grad_()
                self.inputs.append((place, values[place]))
        args, kwargs = tree_unflatten(values, self.form)
        with _drawing_again(self.random_state):
            return tree_flatten(self.network(*args, **kwargs))[0]


@contextlib.contextmanager
def recording(rollout, is_on=True):
    """Inside, each denoiser call of a rollout is made without gradients and noted. Yields the list of `Call`s.

    rollout: a `Rollout`, or DDP of one, which expects no backward pass of what runs inside. is_on: False for the
    ordinary graph, and no calls.
    """
    calls, grad_mode = [], torch.is_grad_enabled()
    if not is_on:
        yield calls
        return

    def begin(network, args, kwargs):
        given, form = tree_flatten((args, kwargs))
        draws = any(isinstance(m, _DropoutNd) and m.training and m.p > 0 for m in network.modules())
        calls.append(Call(network, given, form, _versions(given), _random_state(given) if draws else None))
        torch.set_grad_enabled(False)

    def end(network, args, result):
        torch.set_grad_enabled(grad_mode)
        values, form = tree_flatten(result)
        leaves = [v.detach().requires_grad_() if _has_gradient(v) else v for v in values]
        calls[-1].results = leaves
        return tree_unflatten([v.clone() if _has_gradient(v) else v for v in leaves], form)  # may be written into

    student = rollout.module if isinstance(rollout, DistributedDataParallel) else rollout
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_grad_enabled, grad_mode)
        for network in denoisers(student.pipeline).values():
            stack.callback(network.register_forward_pre_hook(begin, prepend=True, with_kwargs=True).remove)
            stack.callback(network.register_forward_hook(end).remove)
        if student is not rollout:
            stack.enter_context(rollout.no_sync())
        yield calls


def take_back(rollout, calls):
    """After the loss's backward pass, with retain_graph: that of each recorded call, the last one first.

    calls: as from `recording`, which are used up. Gradients of weights are added to what is there, as ever. Of DDP all
    but the last backward pass run without synchronisation, unless that is off already.
    """
    is_parallel = isinstance(rollout, DistributedDataParallel)
    while calls:
        call, waits = calls.pop(), is_parallel and bool(calls)
        with rollout.no_sync() if waits else contextlib.nullcontext():
            made = rollout(again=call)
        pairs = [(y, leaf.grad) for y, leaf in zip(made, call.results, strict=True) if _has_gradient(leaf)]
        pairs = [(y, grad.to(y.dtype)) for y, grad in pairs if grad is not None]
        if is_parallel and rollout.require_backward_grad_sync and not waits:  # it waits for every weight
            pairs += [(p, p.new_zeros(()).expand_as(p)) for p in rollout.parameters() if p.requires_grad]
        if pairs:
            torch.autograd.backward(*zip(*pairs, strict=True))
        pairs = [(call.given[place], leaf.grad) for place, leaf in call.inputs if leaf.grad is not None]
        if pairs:  # through the scheduler, to the results of the calls before
            torch.autograd.backward(*zip(*pairs, strict=True), retain_graph=True)


def _has_gradient(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _versions(values):
    return [v._version for v in values if isinstance(v, torch.Tensor) and not v.is_inference()]


def _random_state(values):
    """(the processor's state, a device among these values or None, its state)"""
    tensors = [v for v in values if isinstance(v, torch.Tensor) and v.device.type != "cpu"]
    device = tensors[0].device if tensors else None
    return torch.get_rng_state(), device, device and torch.get_device_module(device).get_rng_state(device)


@contextlib.contextmanager
def _drawing_again(state):
    """Inside, random numbers are those that were drawn from `state` on; None changes nothing."""
    if state is None:
        yield
        return
    here, device, there = state
    with torch.random.fork_rng([device] if device else [], device_type=device.type if device else "cuda"):
        torch.set_rng_state(here)
        if device:
            torch.get_device_module(device).set_rng_state(there, device)
        yield
