"""Counts what the operations of a program take: live memory, floating point operations, and waits for the device.

Memory is that of storages, each rounded up to 512 bytes as CUDA's allocator does, from the operation that makes one to
its end. The tensors may be real, or have a shape and no memory (`FakeTensorMode`).
"""

import functools
import linecache
import os
import sys
import weakref
from pathlib import Path

from common.errors import UserError

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
DEVICE = torch.ops.prim.device.default
BLOCK = 512  # bytes that CUDA's allocator hands out at least, and a multiple of which
READS = {aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten._unique2, aten.is_nonzero}
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
        sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)
    ),
}
LIBRARIES = Path(torch.__file__).parents[1]
OWN = {Path(__file__).with_name(name) for name in ("meter.py", "simulation.py", "stand_ins.py")}
# Functions that may ask: for optimizers that cannot skip an update on their own, and for a table on the host.
AGREED = {("updates.py", "step_if"), ("consistency.py", "sigma_probabilities")}
IN_PLACE = {aten._fused_sgd_}  # the EMA's kernel: FakeTensorMode knows no form of it, and would run it with values
TABLES = {aten.arange, aten.linspace}  # small ones are made for real, so that what is looked up in them is known


class Meter(TorchDispatchMode):
    """While entered, counts the storages on devices of type `device_type` that operations make.

    live: bytes. moment: what the program is doing, set from outside. From `start` on: events, [(serial number of a
    storage, bytes, negative where it ends, moment)]; flops, those of the operations; waits, {line: how often the host
    asked there for a value of the device}.
    """

    def __init__(self, device_type="cpu"):
        super().__init__()
        self.device_type, self.moment = device_type, "start"
        self.live = self.serial = self.flops = 0
        self.records, self.events, self.waits = False, [], {}
        self.refs, self.sizes = {}, {}  # {storage's address: (weak reference, serial)}, {serial: bytes}

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # the guard against compilation costs as much as the counting

    def start(self):
        """Note events, operations and waits from here on, and drop those before."""
        self.records, self.events, self.flops, self.waits = True, [], 0, {}
        self.alive_at_start = dict(self.sizes)

    def curve(self):
        """Live bytes and moment after each event: [(bytes, moment)]."""
        live, points = sum(self.alive_at_start.values()), []
        for _, size, moment in self.events:
            live += size
            points.append((live, moment))
        return points

    def alive_at(self, count):
        """{serial: bytes} of the storages that were alive after the first `count` events."""
        alive = dict(self.alive_at_start)
        for serial, size, _ in self.events[:count]:
            if size > 0:
                alive[serial] = size
            else:
                alive.pop(serial, None)
        return alive

    def add(self, tensor):
        """Count the storage of a tensor, unless it is counted already. Returns its serial number, or None."""
        if tensor.device.type != self.device_type or tensor.layout != torch.strided:
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.refs:
            return self.refs[key][1]
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self.serial += 1
        serial = self.serial
        self.refs[key] = weakref.ref(storage, lambda _: self._forget(key, serial)), serial
        self.sizes[serial] = size
        self._change(serial, size)
        return serial

    def forget(self, tensor):
        """Stop counting the storage of a tensor, which is not on the device."""
        _, serial = self.refs.get(tensor.untyped_storage()._cdata, (None, None))
        if serial in self.sizes:
            self._change(serial, -self.sizes.pop(serial))

    def _forget(self, key, serial):
        self.refs.pop(key)
        if serial in self.sizes:
            self._change(serial, -self.sizes.pop(serial))

    def _change(self, serial, size):
        self.live += size
        if self.records:
            self.events.append((serial, size, self.moment))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is DEVICE and isinstance(args[0], FakeTensor):  # most of all calls
            return args[0].fake_device
        kwargs = kwargs or {}
        if getattr(kwargs.get("device"), "type", None) == "cpu":  # of one of several processes it is cpu:0
            kwargs = kwargs | {"device": torch.device("cpu")}
        packet = func._overloadpacket
        if self.records and packet in READS:
            self._note_wait()
        result = self._run(func, packet, args, kwargs)
        if packet in CPU_ATTENTION:
            self.flops += CPU_ATTENTION[packet](*args, **kwargs)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        for tensor in _tensors(result):
            self.add(tensor)
        return result

    def _run(self, func, packet, args, kwargs):
        given = list(_tensors((*args, *kwargs.values())))
        is_known = packet in TABLES or kwargs.get("generator") or given
        if is_known and not any(isinstance(tensor, FakeTensor) for tensor in given):
            with unset_fake_temporarily():  # values are known, and so the rest of a real program's decisions
                return func(*args, **kwargs)
        if packet in IN_PLACE:
            return None
        try:
            if packet is aten.index and any(t.dtype == torch.bool for t in args[1] if t is not None):
                args = (args[0], [each for index in args[1] for each in _places(index)], *args[2:])
            return func(*args, **kwargs)
        except DataDependentOutputException:
            if packet is aten._local_scalar_dense:
                return _any_value(args[0])
            if packet is aten.equal:
                return True
            raise UserError(self._unknown()) from None
        except DynamicOutputShapeException:
            raise UserError(self._unknown()) from None

    def _unknown(self):
        return (
            f"`dry_run` cannot go on at {calling_line()}: what follows depends on values that the device computes, "
            "which waits for it; keep shapes independent of values"
        )

    def _note_wait(self):
        line = calling_line()
        if line:
            self.waits[line] = self.waits.get(line, 0) + 1


def calling_line():
    """`FILE:LINE: the code` of the innermost line that is no library's, with the library that it called if it is not
    torch; None where it may wait (AGREED)."""
    frame, library = sys._getframe(1), ""
    while frame is not None:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if LIBRARIES in path.parents:
            package = path.relative_to(LIBRARIES).parts[0]
            library = library or (f" (in {package})" if package != "torch" else "")
        elif path.is_absolute() and path not in OWN and path.exists():
            if (path.name, name) in AGREED:
                return None
            code = linecache.getline(str(path), frame.f_lineno).strip()
            return f"{os.path.relpath(path)}:{frame.f_lineno}: {code}{library}"
        frame = frame.f_back
    return None


def _any_value(tensor):
    """The value of a 0-dim fake tensor where it is known, else one that most programs go on with: true, or 1."""
    if tensor.constant is not None:
        return tensor.constant.item()
    return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1


def _places(index):
    if index is None or index.dtype != torch.bool:
        return [index]
    if isinstance(index, FakeTensor):
        raise DynamicOutputShapeException(aten.nonzero.default)
    with unset_fake_temporarily():
        return index.nonzero(as_tuple=True)


def _tensors(values):
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


# Functions of torch.nn.functional that autocast computes in float32 on a GPU and not on a CPU (ATen/autocast_mode.h).
FLOAT32_ON_GPUS = ("group_norm", "layer_norm", "rms_norm", "interpolate", "softmax", "softplus", "mse_loss")


def in_float32(function):
    """One of FLOAT32_ON_GPUS as autocast on a GPU has it, for tensors on the CPU."""

    @functools.wraps(function)
    def computed(*args, **kwargs):
        if torch.is_autocast_enabled("cpu"):
            args = [a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        return function(*args, **kwargs)

    return computed
