"""DeepSpeed's ZeRO-2 for the student: each process holds a part of its gradients and optimizer states.

Weights stay whole on every process, and float32, so the average, samples and the export are what they are without it.
accelerate stays the engine of all else, and computes the student under autocast as ever. Checkpoints hold what those
of a run without ZeRO hold, whole and without pickles, so either goes on from the other's, on any number of processes.
DeepSpeed clips to `max_grad_norm`, and skips an update that is not finite, when the script's step asks it to.
"""

import contextlib
import importlib.util
import json
import logging
import math
import os
import warnings
from pathlib import Path

from common.errors import UserError

import torch
from accelerate import Accelerator
from accelerate.utils import SAFE_WEIGHTS_NAME
from accelerate.utils.constants import OPTIMIZER_NAME
from safetensors.torch import load_file, save_file

PREFIX = "ACCELERATE_DEEPSPEED_"
WAY_OUT = "use `distributed_type: MULTI_GPU`"
DEFAULTS = {"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}  # values; DeepSpeed's own: 2 GB
SWITCHES = ("overlap_comm", "contiguous_gradients", "reduce_scatter", "allgather_partitions")
BY_FLAGS = {  # what accelerate's configuration and the script's flags both have: {variable: flag}
    "ACCELERATE_GRADIENT_CLIPPING": "max_grad_norm",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
}


def take_settings(args):
    """DeepSpeed's `zero_optimization` as the launcher's environment asks for it, or None where it does not.

    What accelerate would read of it is taken out of the environment, so that its own DeepSpeed engine, whose
    checkpoints are pickles and which updates inside of the backward pass, does not start. Raises UserError for what
    cannot be had with ZeRO-2; needs no weights.
    """
    if os.environ.pop("ACCELERATE_USE_DEEPSPEED", "false").lower() not in ("true", "1"):
        return None
    if importlib.util.find_spec("deepspeed") is None:
        _refuse(f"DeepSpeed is not installed; pip install deepspeed, or {WAY_OUT}")
    if "RANK" not in os.environ:
        raise UserError(
            "ACCELERATE_USE_DEEPSPEED is set, and no launcher started this process; start it by `accelerate launch` "
            "with docs/zero2.yaml as its config_file, or unset the variable"
        )
    given = {variable: os.environ.pop(variable, "auto") for variable in BY_FLAGS}
    for variable, flag in BY_FLAGS.items():
        launchers_own = ["auto", "none"] + ["1"] * (flag == "gradient_accumulation_steps")
        name, value, ours = variable.removeprefix("ACCELERATE_").lower(), given[variable].lower(), getattr(args, flag)
        if value not in (*launchers_own, str(ours), str(float(ours or 0))):
            _refuse(f"{name} is {value} and `{flag}`={ours}; drop it from DeepSpeed's configuration, the flag decides")
    zero = _zero_optimization()
    if zero["stage"] not in (2, "2"):
        reason = "samples, targets and exports need the whole student on each GPU"
        _refuse(f"zero_stage is {zero['stage']}; {reason}, set it to 2, or {WAY_OUT}")
    if offloaded := [name for name in zero if name.startswith("offload_")]:
        _refuse(f"{offloaded[0]} is not supported; set its device to none, or {WAY_OUT}")
    for name, value in zero.items():
        _check_setting(name, value)
    if getattr(args, "lora_rank", 0):
        raise UserError(
            f"`lora_rank`={args.lora_rank}: a LoRA has hardly any gradients and states to split over GPUs; {WAY_OUT} "
            "in `accelerate config`"
        )
    for flag in ("use_8bit_adam", "channels_last"):
        if getattr(args, flag):
            raise UserError(
                f"`{flag}` works on each weight by itself, and ZeRO-2 lays the weights out one behind the other; drop "
                f"the flag, or {WAY_OUT} in `accelerate config`"
            )
    if (args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) == "fp16":
        raise UserError("`mixed_precision`=fp16 is not supported with ZeRO-2; pass bf16 or no")
    return zero | {"stage": 2}


def _refuse(sentence):
    raise UserError(f"`accelerate config`: {sentence}")


def _check_setting(name, value):
    """UserError for a setting of `zero_optimization` that DeepSpeed would not take, or of which it is not known that a
    run and its checkpoints stay what they are: with round_robin_gradients, DeepSpeed mistakes one weight's states for
    another's."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name in DEFAULTS and not (is_number and 1 <= value < math.inf and value % 1 == 0):
        _refuse(f"zero_optimization: {name} is {value!r}; give a number of values")
    if name in SWITCHES and not isinstance(value, bool):
        _refuse(f"zero_optimization: {name} is {value!r}; give true or false")
    known = ("stage", *DEFAULTS, *SWITCHES)
    if name not in known:
        _refuse(f"zero_optimization: {name} is not supported; drop it, there are {', '.join(known)}")


def _is_auto(value):
    """Whether all of a setting of DeepSpeed's is left to the one who reads it."""
    return all(map(_is_auto, value.values())) if isinstance(value, dict) else value == "auto"


def _zero_optimization():
    """The block of DeepSpeed's configuration file, or what accelerate's own fields make of it."""
    path = os.environ.get(f"{PREFIX}CONFIG_FILE", "none")
    if path == "none":
        zero = DEFAULTS | {"stage": os.environ.get(f"{PREFIX}ZERO_STAGE", "2")}
        for part in ("optimizer", "param"):
            device = os.environ.get(f"{PREFIX}OFFLOAD_{part.upper()}_DEVICE", "none")
            zero |= {f"offload_{part}": {"device": device}} if device != "none" else {}
        return zero
    try:
        config = dict(json.loads(Path(path).read_text(encoding="utf-8-sig")))
        zero = dict(config.pop("zero_optimization"))
    except (OSError, ValueError, TypeError, KeyError) as error:
        _refuse(f"deepspeed_config_file={path} cannot be read ({error!r})")
    if others := [key for key, value in sorted(config.items()) if not _is_auto(value)]:
        way_out = "keep nothing in it but `zero_optimization`"
        _refuse(f"deepspeed_config_file={path} sets {others[0]}, which the script's flags decide; {way_out}")
    unset = {n for n, v in zero.items() if v in ("auto", None) or isinstance(v, dict) and v.get("device") == "none"}
    decided = {name: value for name, value in zero.items() if name not in unset}
    return DEFAULTS | {"stage": 0} | decided


class ZeroAccelerator(Accelerator):
    """accelerate's engine of data parallel training, with the one network that is prepared under ZeRO-2.

    zero: as from `take_settings`. max_grad_norm: None for no clipping. batch_size: samples of a micro-batch.
    """

    def __init__(self, zero, max_grad_norm, batch_size, **options):
        super().__init__(**options)
        self.engine, self.parameters = None, []
        self.zero_config = {
            "zero_optimization": zero,
            "gradient_clipping": max_grad_norm or 0.0,
            "train_micro_batch_size_per_gpu": batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1 << 60,
        }

    def prepare(self, network, optimizer):
        """The student and its optimizer of one group, as an engine and what stands for its optimizer."""
        os.environ.setdefault("DS_ACCELERATOR", self.device.type)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*deprecated")  # what DeepSpeed calls
        import deepspeed

        self.parameters = list(optimizer.param_groups[0]["params"])
        network = self.prepare_model(network, evaluation_mode=True)  # on its device, computing under autocast
        self._models.remove(network)  # not for accelerate to save: see save_state
        deepspeed.init_distributed(verbose=False)
        self.engine, zero, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=self.zero_config)
        if not hasattr(zero, "_lazy_init_hp_params_optimizer_state"):  # known now, rather than at a resume
            raise UserError(
                f"DeepSpeed {deepspeed.__version__} keeps its states otherwise; pip install deepspeed==0.19.8"
            )
        return self.engine, ZeroOptimizer(self.engine, zero)

    def no_sync(self, model):
        return contextlib.nullcontext()  # ZeRO-2 reduces in each backward: nowhere is room for whole gradients

    def backward(self, loss, **options):
        self.engine.set_gradient_accumulation_boundary(self.sync_gradients)
        self.engine.backward(loss, **options)

    def free_memory(self, *objects):
        if self.engine is not None:
            self.engine.destroy()
        self.engine, self.parameters = None, []
        return super().free_memory(*objects)

    def save_state(self, output_dir):
        """What `Accelerator.save_state` of a run without ZeRO writes; called by every process."""
        super().save_state(output_dir)
        states = self._gather_optimizer()
        if self.is_main_process:
            weights = {name: tensor.to("cpu", copy=True) for name, tensor in self.engine.module.state_dict().items()}
            save_file(weights, Path(output_dir, SAFE_WEIGHTS_NAME), metadata={"format": "pt"})
            torch.save(states, Path(output_dir, f"{OPTIMIZER_NAME}.bin"))
        self.wait_for_everyone()

    def load_state(self, input_dir):
        super().load_state(input_dir)
        self.engine.module.load_state_dict(load_file(Path(input_dir, SAFE_WEIGHTS_NAME)), strict=True)
        self.engine.optimizer.refresh_fp32_params()  # ZeRO's own copy of its part of the weights
        self._split_optimizer(torch.load(Path(input_dir, f"{OPTIMIZER_NAME}.bin"), "cpu", weights_only=True))

    def _flat(self):
        """torch's optimizer and its only parameter: this process's part of all weights, one behind the other."""
        inner = self.engine.optimizer.optimizer
        return inner, inner.param_groups[0]["params"][0]

    def _gather_optimizer(self):
        """torch's optimizer state over whole parameters, on the CPU; called by every process, the main one gets it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        inner, flat = self._flat()
        states = {index: {} for index in range(len(self.parameters)) if inner.state.get(flat)}
        for name, value in sorted(inner.state.get(flat, {}).items()):
            for index, parameter in enumerate(self.parameters):
                is_split = torch.is_tensor(value) and value.shape == flat.shape
                whole = safe_get_full_optimizer_state(parameter, name) if is_split else value
                if self.is_main_process:
                    states[index][name] = whole.to("cpu", copy=True) if torch.is_tensor(whole) else whole
        group = {name: value for name, value in inner.param_groups[0].items() if name != "params"}
        return {"state": states, "param_groups": [group | {"params": list(range(len(self.parameters)))}]}

    def _split_optimizer(self, saved):
        """The inverse of `_gather_optimizer`; called by every process. ValueError for another network's."""
        from deepspeed.utils import safe_set_full_optimizer_state

        states, (group,) = saved["state"], saved["param_groups"]
        if len(group["params"]) != len(self.parameters):
            raise ValueError(f"optimizer states of {len(group['params'])} weights for {len(self.parameters)}")
        inner, flat = self._flat()
        split = {name for name, value in states.get(0, {}).items() if torch.is_tensor(value) and value.ndim}
        own = {name: torch.zeros_like(flat) if name in split else value for name, value in states.get(0, {}).items()}
        inner.load_state_dict({"state": {0: own} if own else {}, "param_groups": [group | {"params": [0]}]})
        if not own:
            return
        zero = self.engine.optimizer
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
        for index, parameter in enumerate(self.parameters):
            for name in sorted(split):
                safe_set_full_optimizer_state(parameter, states[index][name].to(parameter.device), name)


class ZeroOptimizer:
    """Stands for the optimizer where a script asks for an update. `defaults` are those of torch's."""

    def __init__(self, engine, zero):
        self.engine, self.zero, self.defaults = engine, zero, zero.optimizer.defaults

    def clip_and_step(self):
        """Clip and update, unless a gradient is not finite. Returns the 0-dim bool tensor that says so."""
        self.engine.step()
        return torch.tensor(not self.zero.overflow, device=self.engine.device)

    def zero_grad(self, set_to_none=True):
        """Nothing: an update has freed the gradients, and between updates they are what is accumulated."""
