"""Two updates of a training script on tensors that have a shape and no memory: what `dry_run` goes on with.

`begin` is called by a script's main() where its checks are over. From there on everything that main() does, it does
simulated: networks are built from their configurations, no weight is opened, nothing is written, and after the second
update `Finished` is raised, which `training_run.user_errors` turns into the report. So what is simulated is the script
as it stands, an edited copy too. The parts of the report are named as main()'s variables are.

Stated rules instead of a run: several processes have the buckets of DistributedDataParallel, in which gradients live;
FSDP2 has this process's part of gradients, states and weights; 8-bit AdamW's states are those of
bitsandbytes. Without a GPU the device is the CPU, with fused AdamW and with autocast's rules of a GPU.
"""

import contextlib
import functools
import itertools
import math
import signal
import sys
import threading
import time
from typing import NamedTuple

from common.data import cached_latents
from common.networks import fusing, lora, performance, quantized, weights
from common.run import stand_ins
from common.run.meter import FLOAT32_ON_GPUS, Meter, in_float32
from common.run.preemption import Stopper

import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from tqdm import tqdm

UPDATES = 2  # the second one has the optimizer's states from its start on
MICRO_BATCHES = 2  # of an update, at most; more take the same memory, and one does where the gradients are there
CARDS = (12, 16, 24, 40, 48, 80, 141)  # GB
CONTEXT = 0.75 * 2**30  # bytes that CUDA, cuBLAS and cuDNN take, stated until a GPU has measured it
FRAGMENTATION = 0.05  # of the peak, likewise
NEVER = sys.maxsize
BEFORE = "before updates"  # the moment of what `before_updates` surrounds


class Finished(Exception):
    """The simulated updates are over; `result` is their `Result`, None on processes other than the main one."""

    def __init__(self, result, is_reported=True):
        super().__init__("the simulated updates are over")
        self.result, self.is_reported = result, is_reported


class Result(NamedTuple):
    """What a simulated update takes, on one process. Bytes, of storages rounded up to 512."""

    peak: int
    moment: str  # in which the peak is
    moments: dict  # {moment: its peak}, in order; the first may be BEFORE
    parts: dict  # {what: bytes} at the peak
    between: int  # bytes that are alive between two updates
    flops: int  # of an update
    waits: dict  # {line of code: how often an update waited there for a value of the device}
    curve: list  # [(live bytes, moment)] over the update
    trained: int  # parameters
    frozen: int
    samples: int  # of an update, on one process
    updates: int  # of the run
    processes: int
    seconds: float  # that the simulation took

    @property
    def needed(self):
        """Bytes of a card: the peak, and what a CUDA context and fragmentation add."""
        return needed(self.peak)

    @property
    def card(self):
        """GB of the smallest of CARDS that holds it, or None."""
        return next((size for size in CARDS if self.needed <= size * 2**30), None)


def needed(peak):
    """Bytes of a card for a peak of live tensors."""
    return peak * (1 + FRAGMENTATION) + CONTEXT


def number(value):
    """With three digits or all before the point, for people."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def as_size(size):
    """Bytes, for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.2f} MiB"


_active = []  # the one `_Simulation` of this process that runs
_wishes = {"processes": None, "fsdp2": False, "like_gpu": True, "fake": True, "report": True, "updates": UPDATES}


def is_on():
    return bool(_active)


def wishes_fsdp2():
    return _wishes["fsdp2"]


@contextlib.contextmanager
def wishing(**wishes):
    """Inside, simulations have other settings: processes, the number of them; fsdp2, True where these split their
    weights; like_gpu, False for the rules of a run on the CPU; fake, False to run the real update under the same
    counter; report, False to print none; updates, 1 to make the optimizers' states without a first update, and the
    gradients without a first micro-batch, which takes a quarter of the time."""
    before = dict(_wishes)
    _wishes.update(wishes)
    try:
        yield
    finally:
        _wishes.update(before)


def begin(args, accelerator, batch=None):
    """From here on, the calling main() is simulated. Returns an endless iterator over `batch`.

    args: its flags, which are changed so that nothing is logged, saved, sampled or evaluated. Processes other than the
    main one end here.
    """
    if _wishes["fake"] and not accelerator.is_main_process:
        raise Finished(None)
    simulation = _Simulation(args, accelerator, sys._getframe(1), **_wishes)
    _active.append(simulation)
    simulation.enter()
    return itertools.repeat(batch)


@contextlib.contextmanager
def ending(args):
    """Around main(): a dry run needs no weights; what `begin` has changed is undone."""
    weights.dry_run = getattr(args, "dry_run", False)
    try:
        yield
    finally:
        weights.dry_run = False
        while _active:
            simulation = _active.pop()
            simulation.stack.close()
            simulation.frame = None


def in_main_memory(tensors):
    """Tensors that stay in main memory do not count; nothing outside of a simulation."""
    for simulation in _active:
        for tensor in tensors:
            simulation.meter.forget(tensor)


@contextlib.contextmanager
def waiting(networks):
    """Inside, weights of networks are still in main memory; nothing outside of a simulation."""
    tensors = [t for network in networks for t in (*network.parameters(), *network.buffers())] if _active else []
    in_main_memory(tensors)
    yield
    for simulation in _active:
        for tensor in tensors:
            simulation.meter.remember(tensor)


def split(network, blocks, dtype):
    """Count this process's part of a network's weights, and of what is gathered in `dtype` (None: as it is) the
    largest of `blocks` twice: one is computed with while the next one comes."""
    for simulation in _active:
        simulation.split(network, blocks, dtype)


@contextlib.contextmanager
def before_updates(networks):
    """Around what a script does on the device before its first update and may take more than one: it counts too.
    networks: {name: module} that are there, others than modules are passed over. Nothing outside of a simulation."""
    entered = [(simulation, simulation.enter_before(networks)) for simulation in _active]
    del networks  # what is let go inside is not held here
    yield
    for simulation, parts in entered:
        simulation.leave_before(parts)


class _Simulation:
    def __init__(self, args, accelerator, frame, processes, fsdp2, like_gpu, fake, report, updates):
        self.args, self.accelerator, self.frame, self.fake = args, accelerator, frame, fake
        self.processes = processes or accelerator.num_processes
        self.like_gpu = like_gpu and fake
        self.meter, self.stack, self.started = Meter(accelerator.device.type), contextlib.ExitStack(), time.time()
        self.updates, self.num_updates, self.num_micro_batches = updates, 0, 0
        self.owners, self.counts = {}, {True: 0, False: 0}  # {serial: what it is}; parameters, by whether they train
        self.moments_of, self.in_backward = {}, False
        self.report, self.progress, self.splits = report, None, []
        self.before = {}  # {part: bytes} at the peak before the updates
        self.views = {}  # {parameter: its gradient's place in the buckets of several processes}
        self.max_train_steps, self.accumulation = args.max_train_steps, args.gradient_accumulation_steps

    @property
    def is_split(self):
        return getattr(self.accelerator, "sharding", None) is not None

    # ----- what is changed for as long as it lasts

    def enter(self):
        args, accelerator, replace = self.args, self.accelerator, self._replace
        if threading.current_thread() is threading.main_thread():  # there is nothing to save before the end
            self.stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, signal.SIG_DFL))
        for name in ("logging_steps", "checkpointing_steps", "max_train_steps"):
            setattr(args, name, NEVER)
        for name in ("validation_steps", "eval_steps"):
            setattr(args, name, 0)
        most = MICRO_BATCHES if self.updates > 1 else 1
        accelerator.gradient_accumulation_steps = min(most, self.accumulation)
        accelerate = accelerator.accumulate
        accelerator.accumulate = lambda *models: self._micro_batch() or accelerate(*models)
        replace(Stopper, "check", lambda stopper: self._update_is_over())
        replace(torch.autograd, "backward", self._timed_backward(torch.autograd.backward))
        hooks = [
            register_optimizer_step_pre_hook(self._enter_step),
            register_optimizer_step_post_hook(lambda *_: self._enter_moment("after the step")),
            torch.nn.modules.module.register_module_forward_pre_hook(self._enter_module),
        ]
        for hook in hooks:
            self.stack.callback(hook.remove)
        if self.fake:
            self._enter_fake()
        self.stack.enter_context(self.meter)
        is_hidden = None if self.report else True  # None: where stderr is no terminal
        self.progress = tqdm(total=None, desc="simulating: networks", disable=is_hidden, leave=False)
        self.stack.callback(self.progress.close)

    def _enter_fake(self):
        replace, accelerator = self._replace, self.accelerator
        _leave_the_others(accelerator)
        replace(accelerator, "prepare", self._prepare)
        replace(accelerator, "backward", functools.partial(Accelerator.backward, accelerator))
        replace(torch.distributed, "all_reduce", lambda *_, **__: None)
        replace(torch.nn.Module, "_apply", stand_ins.apply)
        replace(FakeTensor, "__deepcopy__", stand_ins.deepcopy)
        for kind in (diffusers.ModelMixin, transformers.PreTrainedModel):
            replace(kind, "__call__", stand_ins.remembered(kind.__call__, lambda: self.num_micro_batches == 0))
        replace(diffusers.ModelMixin, "from_pretrained", classmethod(stand_ins.build_diffusers))
        replace(transformers.PreTrainedModel, "from_pretrained", classmethod(stand_ins.build_transformers))
        replace(diffusers.DiffusionPipeline, "download", classmethod(stand_ins.download))
        replace(diffusers.DiffusionPipeline, "from_pretrained", classmethod(stand_ins.configurations_only))
        for module, name in (
            (weights, "check_pipeline"),
            (cached_latents, "check_encoder"),
            (lora, "start_from"),
            (fusing, "fuse"),
        ):
            replace(module, name, lambda *_, **__: None)  # the headers were checked before, values are not there
        replace(quantized, "pack", stand_ins.pack(quantized.pack))
        replace(quantized, "unpack", stand_ins.unpack(quantized.unpack))
        replace(performance, "compile_blocks", lambda network: None)  # operations are counted as they are written
        for pipeline in (diffusers.StableDiffusionPipeline, diffusers.StableDiffusionXLPipeline):
            replace(pipeline, "from_single_file", stand_ins.without_values(pipeline.from_single_file))
        if self.args.use_8bit_adam:
            import bitsandbytes

            replace(bitsandbytes.optim, "AdamW8bit", stand_ins.AdamW8bit)
        if self.like_gpu and accelerator.device.type == "cpu":
            for name in FLOAT32_ON_GPUS:
                replace(torch.nn.functional, name, in_float32(getattr(torch.nn.functional, name)))
        self.mode = self.stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))

    def _replace(self, owner, name, value):
        own = vars(owner).get(name, self)
        setattr(owner, name, value)
        undo = (delattr, owner, name) if own is self else (setattr, owner, name, own)
        self.stack.callback(*undo)

    def _prepare(self, network, optimizer):
        """accelerate's, without processes; what several take is laid out by their rules."""
        accelerator = self.accelerator
        network = accelerator.prepare_model(network, evaluation_mode=True)
        network.train()
        parameters = [p for p in network.parameters() if p.requires_grad]
        if self.is_split:
            self._divide(parameters)
        elif self.processes > 1:
            self._share_buckets(parameters)
        return network, accelerator.prepare_optimizer(optimizer)

    def _share_buckets(self, parameters):
        """DistributedDataParallel keeps all gradients in buckets, from the start to the end."""
        device = parameters[0].device
        self.buckets = torch.empty(sum(p.numel() for p in parameters), device=device)
        self._own([self.buckets], "gradients")
        start = 0
        for parameter in parameters:
            self.views[parameter] = view = self.buckets[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()
            parameter.register_post_accumulate_grad_hook(functools.partial(_put, view))

    def _divide(self, parameters):
        """FSDP2: a part of gradients and of two states; no gradient is kept whole."""
        part = math.ceil(sum(p.numel() for p in parameters) / self.processes)
        self.buckets = [torch.empty(part, device=parameters[0].device) for _ in range(3)]
        self._own(self.buckets, "FSDP2's part of gradients and states")
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(functools.partial(_put, None))

    def split(self, network, blocks, dtype):
        parts = [torch.empty(-(-p.numel() // self.processes), dtype=p.dtype) for p in network.parameters()]
        if dtype is not None:  # what is computed with: no other copy is made
            torch.nn.Module.to(network, dtype)
        largest = max(blocks, key=lambda block: sum(p.numel() for p in block.parameters()), default=network)
        gathered = [torch.empty_like(p) for p in largest.parameters() for _ in range(2)]
        in_main_memory(network.parameters())  # not whole anywhere
        self._own(parts, f"FSDP2's part of the weights of a {type(network).__name__}")
        self._own(gathered, f"FSDP2's gathered blocks of a {type(network).__name__}")
        self.splits.append((parts, gathered))

    def _own(self, tensors, name):
        for tensor in tensors:
            self.owners[self.meter.add(tensor)] = name

    # ----- where the program is

    def _enter_moment(self, name):
        if self.in_backward:
            return
        if self.progress is not None and name != self.meter.moment:
            self.progress.set_description(
                f"simulating: update {self.num_updates + 1} of {self.updates}, {name}", refresh=False
            )
            self.progress.update()
        self.meter.moment = name

    def _enter_module(self, module, _):
        name = self.moments_of.get(id(module))
        if name is not None and not self.in_backward:
            self._enter_moment(f"forward of {name}" if torch.is_grad_enabled() else f"{name}, without gradients")

    def _enter_step(self, optimizer, *_):
        self._enter_moment("optimizer step")
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.owners.setdefault(self.meter.add(parameter.grad), "gradients")

    def _timed_backward(self, backward):
        @functools.wraps(backward)
        def timed(*args, **kwargs):
            if self.in_backward:  # a checkpoint's own
                return backward(*args, **kwargs)
            if self.fake and self.num_micro_batches == 0:
                return stand_ins.reach(*args, **kwargs)
            self._enter_moment("backward" if self.meter.moment != "after the step" else "backward, second")
            self.in_backward = True
            try:
                return backward(*args, **kwargs)
            finally:
                self.in_backward = False
                self._enter_moment("after the backward")

        return timed

    def enter_before(self, networks):
        named = [(name, {serial}) for serial, name in self.owners.items()]  # what FSDP2 has split
        for name, module in networks.items():
            if isinstance(module, torch.nn.Module):
                named.append((f"weights of {name}, frozen", {self.meter.add(p) for p in module.parameters()}))
        parts, self.meter.most = {}, self.meter.live
        for name, serials in named:
            for serial in serials & self.meter.sizes.keys():  # others are in main memory
                parts[name] = parts.get(name, 0) + self.meter.sizes[serial]
        return parts

    def leave_before(self, parts):
        parts |= {"activations and the rest": max(0, self.meter.most - sum(parts.values()))}
        self.before = max(self.before, parts, key=lambda each: sum(each.values()))

    def _micro_batch(self):
        if self.num_micro_batches == 0:
            self._find_parts()
            if self.updates == 1:
                self._make_states()
        self.num_micro_batches += 1
        self._enter_moment("start of a micro-batch")
        if self.num_updates == self.updates - 1 and not self.meter.records:
            self.meter.start()

    def _update_is_over(self):
        """Stands for `Stopper.check`, which all scripts call after an update."""
        self.num_updates += 1
        if self.num_updates < self.updates:
            self.progress.total = self.updates * self.progress.n
            return False
        raise Finished(self._result(), self.report)

    def _make_states(self):
        """The optimizers' states as a first update leaves them, and the gradients as a first micro-batch does, but for
        those that FSDP2 has divided."""
        if self.is_split:
            return
        for optimizer in self._optimizers():
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()
            for parameter in parameters:
                if self.accumulation == 1:
                    parameter.grad = None
                else:
                    parameter.grad = self.views.get(parameter, parameter.grad)  # in DDP's buckets

    def _find_parts(self):
        """Weights by the names of main()'s variables; what is not a script's own is found in its pipelines."""
        seen, trained = set(), {id(p) for o in self._optimizers() for g in o.param_groups for p in g["params"]}
        for name, module in _networks(self.frame.f_locals):
            if self.is_split and isinstance(module, torch.nn.ParameterList):  # an average of split weights
                in_main_memory(module.parameters())
                self.splits.append([torch.empty(-(-p.numel() // self.processes)) for p in module.parameters()])
                self._own(self.splits[-1], f"FSDP2's part of {name}")
            for submodule in module.modules():
                self.moments_of.setdefault(id(submodule), name)
                for parameter in submodule._parameters.values():
                    if parameter is not None and id(parameter) not in seen:
                        seen.add(id(parameter))
                        self.counts[id(parameter) in trained] += parameter.numel()
                for tensor in (*submodule._parameters.values(), *submodule._buffers.values()):
                    serial = None if tensor is None else self.meter.add(tensor)
                    if serial is not None:
                        kind = "trained" if id(tensor) in trained else "frozen"
                        self.owners.setdefault(serial, f"weights of {name}, {kind}")

    def _own_states(self):
        for state in (state for optimizer in self._optimizers() for state in optimizer.state.values()):
            self._own([x for x in state.values() if isinstance(x, torch.Tensor)], "optimizer states")

    def _optimizers(self):
        found = (getattr(value, "optimizer", value) for value in self.frame.f_locals.values())
        return [value for value in found if isinstance(value, torch.optim.Optimizer)]

    # ----- the result

    def _result(self):
        meter = self.meter
        self._own_states()
        curve = meter.curve()
        sizes = [size for size, _ in curve]
        index = max(range(len(sizes)), key=sizes.__getitem__)
        parts, before = {}, sum(self.before.values())
        moments = {BEFORE: before} if self.before else {}
        for serial, size in meter.alive_at(index + 1).items():
            name = self.owners.get(serial, "activations and the rest")
            parts[name] = parts.get(name, 0) + size
        for size, moment in curve:
            moments[moment] = max(moments.get(moment, 0), size)
        peak, moment = sizes[index], curve[index][1]
        if before > peak:
            peak, moment, parts = before, BEFORE, self.before
        scale = self.accumulation / self.accelerator.gradient_accumulation_steps
        return Result(
            peak=peak,
            moment=moment,
            moments=moments,
            parts=dict(sorted(parts.items(), key=lambda item: -item[1])),
            between=sum(meter.alive_at_start.values()),
            flops=round(meter.flops * scale),
            waits=meter.waits,
            curve=curve,
            trained=self.counts[True],
            frozen=self.counts[False],
            samples=self.args.train_batch_size * self.accumulation,
            updates=self.max_train_steps,
            processes=self.processes,
            seconds=time.time() - self.started,
        )


def _networks(variables):
    """(name, module) of main()'s variables, and of the parts of pipelines among them."""
    for name, value in variables.items():
        value = getattr(value, "pipeline", None) or value
        if isinstance(value, diffusers.DiffusionPipeline):
            for part, module in value.components.items():
                if isinstance(module, torch.nn.Module):
                    yield f"{name}.{part}", module
        elif isinstance(value, torch.nn.Module):
            yield name, value


def _put(gradient, parameter):
    parameter.grad = gradient


def _leave_the_others(accelerator):
    """The main process goes on alone: no collective call waits for the others, which have ended."""
    if accelerator.num_processes > 1:
        for state in (PartialState._shared_state, AcceleratorState._shared_state):
            state |= {"num_processes": 1, "distributed_type": DistributedType.NO}
