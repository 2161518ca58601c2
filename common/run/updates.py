"""Updates whose gradients are not finite: skipped and counted; too many in a row end the run.

Whether an update is skipped is decided on the device. The host asks at log entries, at checkpoints and after 1,000
updates, so no step waits for it (optimizers that are not fused excepted, as those of 8 bits: they cannot skip).
"""

import json
from pathlib import Path

from common.ema import part
from common.errors import UserError
from common.networks.sharded import is_split, total_norm
from common.run.screen import say

import torch
from accelerate.utils import gather_object

LOG = "nonfinite_updates.jsonl"
MAX_PENDING = 1_000  # updates after which the host asks in any case
MAX_KEYS = 64  # sample keys in the sentence that ends a run
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REPAIR = (
    "take other weights or another `mixed_precision`; if training made them so, start anew with a lower "
    "`learning_rate` in another `output_dir`"
)


def step_if(finite, optimizer):
    """optimizer.step() where `finite` (0-dim bool tensor) is true; else weights and states stay what they are.

    A fused optimizer decides on its device; for the others the host reads `finite`.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper holds it
    if inner.defaults.get("fused"):
        inner.grad_scale, inner.found_inf = None, (~finite).float()
        try:
            optimizer.step()
        finally:
            del inner.grad_scale, inner.found_inf
    elif finite:
        optimizer.step()


def networks_of(pipeline):
    """{"the teacher's NAME": module} of all that a pipeline computes with."""
    parts = pipeline.components.items()
    return {f"the teacher's {name}": part for name, part in parts if isinstance(part, torch.nn.Module)}


def broken_weights(networks):
    """The first tensor of {name: module} that holds NaN or infinity, in words, or None. Waits for the device; called
    by every process where weights are split."""
    for name, network in networks.items():
        for key, tensor in network.state_dict().items():
            if tensor.dtype not in FLOATS or tensor.is_meta:
                continue
            count = (~part(tensor).isfinite()).sum()
            if is_split(tensor):
                torch.distributed.all_reduce(count)
            if count:
                dtype = str(tensor.dtype).removeprefix("torch.")
                return f"{name} holds NaN or infinity in {key}, {count} of {tensor.numel()} values ({dtype})"
    return None


class UpdateGuard:
    """Clips and updates, skips what is not finite, and knows the samples that it came from.

    limit: skipped updates in a row at which the run ends. global_step and num_skipped: those before this start.
    networks: {name: module} of all that a loss depends on, whose weights are looked at before samples are blamed.
    """

    def __init__(self, accelerator, output_dir, limit, global_step=0, num_skipped=0, networks=None):
        self.networks = networks or {}
        self.accelerator, self.log, self.limit = accelerator, Path(output_dir, LOG), limit
        self.global_step, self.num_skipped, self.in_a_row = global_step, num_skipped, 0
        self.keys, self.losses_finite = [], True  # of the micro-batches of the next update
        self.pending = []  # (keys, 0-dim bool tensor: the update was finite), not asked for yet

    def step(self, optimizer, parameters, max_grad_norm, loss, keys):
        """After each backward: clip to max_grad_norm (None: do not) and update, once the gradients are complete.

        loss: the micro-batch's; keys: its samples'. Returns the 0-dim bool tensor that `ema_update` takes: false
        where the update was skipped; None between updates. A GradScaler decides by itself. What it
        skips with a finite loss counts only where its scale is below 1: above, it looks for a smaller one.
        """
        if len(self.pending) >= MAX_PENDING:  # here, as `count_as_skipped_unless` may follow a step
            self.count()
        self.keys += keys
        self.losses_finite = loss.detach().isfinite() & self.losses_finite
        if not self.accelerator.sync_gradients:
            return None
        finite, counts_as_finite = self._clip_and_step(optimizer, list(parameters), max_grad_norm)
        self.pending.append((self.keys, counts_as_finite))
        self.keys, self.losses_finite = [], True
        return finite

    def _clip_and_step(self, optimizer, parameters, max_grad_norm):
        accelerator = self.accelerator
        if max_grad_norm is None:
            accelerator.unscale_gradients(optimizer)
            norm = total_norm(parameters)
        else:
            norm = torch.as_tensor(accelerator.clip_grad_norm_(parameters, max_grad_norm))
        finite = norm.isfinite()
        if accelerator.scaler is None:
            step_if(finite, optimizer)
            return finite, finite
        scale_can_fall = accelerator.scaler._get_scale_async() >= 1.0
        optimizer.step()
        return finite, self.losses_finite & (finite | scale_can_fall)

    def count_as_skipped_unless(self, finite):
        """Count the latest update as skipped if the gradients of another optimizer on its samples were not finite."""
        keys, counts_as_finite = self.pending[-1]
        self.pending[-1] = keys, counts_as_finite & finite

    def count(self):
        """How many updates were skipped, over all starts of the run; called by all processes at the same step.

        Lists the samples of new ones in nonfinite_updates.jsonl. Raises UserError with `limit` of them in a row, and
        with the first of a row if weights are not finite: then no other update can be finite.
        """
        if not self.pending:
            return self.num_skipped
        pending, self.pending = self.pending, []
        finite = torch.stack([flag for _, flag in pending]).float()
        finite, looked = self.accelerator.reduce(finite, "mean").tolist(), False
        for (keys, _), value in zip(pending, finite, strict=True):
            self.global_step += 1
            if value == 1.0:
                self.in_a_row = 0
                continue
            self.num_skipped += 1
            self.in_a_row += 1
            if self.in_a_row == 1 and not looked:
                looked = gather_object([broken_weights(self.networks) or ""])  # one process may have met it alone
                if found := next(filter(None, looked), None):
                    raise UserError(f"step {self.global_step} has no finite gradient: {found}; {REPAIR}")
            self._report(gather_object(list(keys)))
        return self.num_skipped

    def _report(self, keys):
        if self.accelerator.is_main_process:
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.global_step, "keys": keys}) + "\n")
            if self.num_skipped == 1:
                say(
                    f"WARNING: step {self.global_step} changed nothing, its gradient is not finite: "
                    f"{LOG} lists the samples of such updates"
                )
        if self.in_a_row >= self.limit:
            raise UserError(
                f"`max_nonfinite_steps`={self.limit}: the loss or its gradient was not finite in {self.in_a_row} "
                f"updates in a row, the last is step {self.global_step} with the samples "
                f"{', '.join(keys[:MAX_KEYS])}; start anew with a lower `learning_rate` in another `output_dir`, "
                f"or remove the samples that {LOG} lists and go on with another `data_seed`; "
                "the checkpoints before it are whole"
            )


def step_beside(optimizer, scaler, world_size, max_grad_norm=None):
    """Average the gradients over all processes, then one optimizer step through the GradScaler; gradients are freed.

    optimizer, scaler: of a network beside the student, not prepared by accelerate, whose clip_grad_norm_ would unscale
    them with the student's. max_grad_norm: to which they are clipped; None: they are not. Returns
    a 0-dim bool tensor: false where the gradients were not finite and the step was skipped. Under a scaler that is in
    use it is true while its scale can fall: skipping belongs to how that one finds its scale.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if world_size > 1:
        for parameter in parameters:
            if parameter.grad is None:  # another process may have one
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= world_size
    if max_grad_norm is not None:
        scaler.unscale_(optimizer)
    norm = total_norm(parameters)
    finite = norm.isfinite()
    if max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    if scaler.is_enabled():
        finite = finite | (scaler._get_scale_async() >= 1.0)
        scaler.step(optimizer)
        scaler.update()
    else:
        step_if(finite, optimizer)
    optimizer.zero_grad(set_to_none=True)
    return finite
