"""FSDP2: each process holds a part of the weights, their gradients and the optimizer's states, of the networks that a
script names; a block's weights are gathered for its forward and its backward pass.

accelerate stays the engine of all else. Trained weights are float32, and gathered in the dtype of mixed precision;
what is computed follows autocast's rules, as without. Checkpoints hold what those of a run without FSDP2 hold, whole
and without pickles, so either goes on from the other's, on any number of processes.
"""

import contextlib
import functools
import os
from pathlib import Path

from common.ema import part
from common.errors import UserError
from common.networks import outlines, performance, sharded
from common.run import simulation

import torch
from accelerate import Accelerator
from accelerate.utils import SAFE_WEIGHTS_NAME, str_to_bool
from accelerate.utils.constants import OPTIMIZER_NAME
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

PREFIX = "FSDP_"
WAY_OUT = "or use `distributed_type: MULTI_GPU`"
OFF = {  # what accelerate's configuration may ask for and is not done here: {its name: what to do instead}
    "OFFLOAD_PARAMS": "set it to false",
    "ACTIVATION_CHECKPOINTING": "set it to false and pass `gradient_checkpointing`",
    "ACTIVATION_CHECKPOINTING_OFFLOAD": "set it to false",
    "IGNORED_MODULES": "drop it",
}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # in which weights are gathered, by mixed precision
KEPT_FLOAT32 = (torch.nn.Linear, torch.nn.modules.conv._ConvNd)  # what autocast would lower
NORMS = (torch.nn.GroupNorm, torch.nn.LayerNorm)  # what a GPU's autocast does in float32, and a CPU's as it comes


def take_settings(args):
    """{"reshard_after_forward": bool} of FSDP2 as the launcher's environment asks for it, or None where it does not.

    What accelerate and transformers would read of it is taken out of the environment, so that their own FSDP, which
    wraps the student alone and loads on the first process alone, does not start. Raises UserError for what cannot be
    had with FSDP2; needs no weights.
    """
    asked = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    given = {name.removeprefix(PREFIX): os.environ.pop(name) for name in list(os.environ) if name.startswith(PREFIX)}
    if simulation.wishes_fsdp2():
        given = {"VERSION": "2"}
    elif not asked:
        return None
    elif "RANK" not in os.environ:
        raise UserError(
            "ACCELERATE_USE_FSDP is set, and no launcher started this process; start it by `accelerate launch` with "
            "docs/fsdp2.yaml as its config_file, or unset the variable"
        )
    if given.get("VERSION", "1") != "2":
        _refuse(f"fsdp_version is {given.get('VERSION', '1')}; set it to 2, {WAY_OUT}")
    for name, instead in OFF.items():
        if given.get(name, "false").lower() not in ("false", "none", "0", ""):
            _refuse(f"fsdp_{name.lower()} is not supported; {instead}, {WAY_OUT}")
    try:
        reshard = bool(str_to_bool(given.get("RESHARD_AFTER_FORWARD", "true").lower()))
    except ValueError:
        _refuse(f"fsdp_reshard_after_forward is {given['RESHARD_AFTER_FORWARD']}; give true or false")
    if getattr(args, "quantize_base", None):
        raise UserError(f"`quantize_base` packs weights in a way that FSDP2 does not split; drop the flag, {WAY_OUT}")
    if args.use_8bit_adam:
        raise UserError(f"`use_8bit_adam` does not know weights that are split, as by FSDP2; drop the flag, {WAY_OUT}")
    if args.channels_last:
        raise UserError(f"`channels_last` is no layout that FSDP2 splits; drop the flag, {WAY_OUT}")
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision in HALF and not getattr(args, "cast_teacher", True):
        raise UserError(
            f"`cast_teacher`: FSDP2 gathers weights in {precision} alone; drop the flag, or pass `mixed_precision`=no"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not simulation.wishes_fsdp2():
        return None  # there is nobody to share with
    return {"reshard_after_forward": reshard}


def _refuse(sentence):
    raise UserError(f"`accelerate config`: {sentence}")


class ShardingAccelerator(Accelerator):
    """accelerate's engine of data parallel training, for a network that `shard` has split.

    sharding: as from `take_settings`.
    """

    def __init__(self, sharding, **options):
        super().__init__(**options)
        self.sharding, self.network, self.optimizer = sharding, None, None
        self.saved = SAFE_WEIGHTS_NAME, lambda: self.network.state_dict()  # the student's file in a checkpoint

    @functools.cached_property
    def mesh(self):
        return init_device_mesh(self.device.type, (self.num_processes,))

    def prepare(self, network, optimizer):
        """The student, computing under autocast, and its optimizer."""
        self.network = self.prepare_model(network, evaluation_mode=True)
        self.optimizer = self.prepare_optimizer(optimizer)
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(self.sharding["reshard_after_forward"], recurse=False)
        return self.network, self.optimizer

    def no_sync(self, model):
        return contextlib.nullcontext()  # each backward pass reduces: nowhere is room for whole gradients

    def clip_grad_norm_(self, parameters, max_norm, norm_type=2):
        """Norm and clipping of parts; the norm, a plain scalar tensor, is the same on all."""
        parameters = list(parameters)
        self.unscale_gradients(self.optimizer)  # of fp16
        norm = sharded.total_norm(parameters)
        gradients = [part(p.grad) for p in parameters if p.grad is not None]
        if gradients:  # none are kept in a simulation
            torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @contextlib.contextmanager
    def _without_student(self):
        models, optimizers, self._models, self._optimizers = self._models, self._optimizers, [], []
        try:
            yield
        finally:
            self._models, self._optimizers = models, optimizers

    def save_state(self, output_dir):
        """What `Accelerator.save_state` of a run without FSDP2 writes; called by every process."""
        with self._without_student():
            super().save_state(output_dir)
        name, tensors = self.saved
        sharded.write_tensors(Path(output_dir, name), tensors())
        sharded.write_optimizer(Path(output_dir, f"{OPTIMIZER_NAME}.bin"), self.optimizer)
        self.wait_for_everyone()

    def load_state(self, input_dir):
        with self._without_student():
            super().load_state(input_dir)
        name, tensors = self.saved
        sharded.read_tensors(Path(input_dir, name), tensors())
        sharded.read_optimizer(Path(input_dir, f"{OPTIMIZER_NAME}.bin"), self.optimizer)

    def free_memory(self, *objects):
        self.network = self.optimizer = None
        return super().free_memory(*objects)


def shard(accelerator, networks, plain=()):
    """Split the weights of networks, in place: each repeated block's, then the rest; on the accelerator's device.

    After copies were made and before an optimizer lists weights. networks: those that compute under autocast; plain:
    those that do so in their own dtype. Nothing where the accelerator does not shard.
    """
    if not isinstance(accelerator, ShardingAccelerator):
        return
    for network in (*networks, *plain):
        gathered = HALF.get(accelerator.mixed_precision) if network in networks else None
        if simulation.is_on():
            simulation.split(network, performance.repeated_blocks(network), gathered)
            continue
        _shard(network, accelerator.mesh, MixedPrecisionPolicy(gathered, torch.float32, cast_forward_inputs=False))


def is_on(accelerator):
    """Whether `shard` splits weights, which then need not be whole in main memory: see `outlines`."""
    return isinstance(accelerator, ShardingAccelerator) and not simulation.is_on()


def _lower_to_weights(norm, inputs):
    """A CPU has no kernel for float32, as from end layers that compute in it, beside gathered bf16 weights."""
    (hidden_states,) = inputs
    is_half = norm.weight is not None and norm.weight.dtype in HALF.values()
    return (hidden_states.to(norm.weight.dtype) if is_half else hidden_states,)


def _shard(network, mesh, policy):
    options = {"mesh": mesh, "reshard_after_forward": True}  # the root too: what lists weights finds parts
    # new ones are drawn by each process
    for parameter in (p for p in network.parameters() if p.requires_grad and not outlines.is_to_come(p)):
        values = parameter.detach().to(mesh.device_type)
        torch.distributed.broadcast(values, src=0)
        parameter.data.copy_(values)
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    if is_outline := outlines.is_one(network):
        outlines.begin(network)
    try:
        for path, module in network.named_modules():
            is_end = path in performance.END_LAYERS and any(True for _ in module.parameters())  # `float32_ends`
            if is_end or kept & set(path.split(".")) and isinstance(module, KEPT_FLOAT32):
                fully_shard(module, **options, mp_policy=MixedPrecisionPolicy(None, torch.float32))
            elif mesh.device_type == "cpu" and isinstance(module, NORMS):
                module.register_forward_pre_hook(_lower_to_weights)
        for block in performance.repeated_blocks(network):
            fully_shard(block, **options, mp_policy=policy)
        fully_shard(network, **options, mp_policy=policy)
        if is_outline:
            outlines.fill(network, mesh.device_type)
        if {(p.dtype, p.requires_grad) for p in network.parameters()} == {(torch.float32, False)}:
            network.requires_grad_(True)  # it may be trained later: gradients get the dtype of what is trained here
            fully_shard.state(network)._lazy_init()
            network.requires_grad_(False)
    except (ValueError, NotImplementedError) as error:
        name = type(network).__name__
        raise UserError(f"a {name} cannot be split by FSDP2 ({error}); use `distributed_type: MULTI_GPU`") from error
    for cls in {type(module) for module in network.modules() if isinstance(module, FSDPModule)}:
        for name in ("__name__", "__qualname__", "__module__"):  # by which a class is saved, and blocks are found
            setattr(cls, name, getattr(cls.__bases__[1], name))
