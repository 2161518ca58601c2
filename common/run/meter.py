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
from typing import NamedTuple

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

    live: bytes; most: the largest it was, until it is set again. moment: what the program is doing, set from outside.
    From `start` on: events, [(serial number of a storage, bytes, negative where it ends, moment)]; flops, those of the
    operations; waits, {line: how often the host asked there for a value of the device}.
    """

    def __init__(self, device_type="cpu"):
        super().__init__()
        self.device_type, self.moment = device_type, "start"
        self.live = self.most = self.serial = self.flops = 0
        self.records, self.events, self.waits = False, [], {}
        self.answers = {}  # {form of an operation and its arguments: _Answer, or None where each asks for itself}
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

    def remember(self, tensor):
        """Count the storage of a tensor again that was forgotten."""
        _, serial = self.refs.get(tensor.untyped_storage()._cdata, (None, None))
        if serial is not None and serial not in self.sizes:
            self.sizes[serial] = -(-tensor.untyped_storage().nbytes() // BLOCK) * BLOCK
            self._change(serial, self.sizes[serial])

    def _forget(self, key, serial):
        self.refs.pop(key)
        if serial in self.sizes:
            self._change(serial, -self.sizes.pop(serial))

    def _change(self, serial, size):
        self.live += size
        self.most = max(self.most, self.live)
        if self.records:
            self.events.append((serial, size, self.moment))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is DEVICE and isinstance(args[0], FakeTensor):  # most of all calls
            return args[0].fake_device
        kwargs = kwargs or {}
        form = _form(func, args, kwargs)
        answer = None if form is None else self.answers.get(form)
        if answer is not None:
            result, flops = answer.again(args), answer.flops
        else:
            result, flops = self._ask(func, args, kwargs, form)
        self.flops += flops
        for tensor in _tensors(result):
            self.add(tensor)
        return result

    def _ask(self, func, args, kwargs, form):
        """(the operation's result, its FLOPs), which are kept for arguments of the same form."""
        if getattr(kwargs.get("device"), "type", None) == "cpu":  # of one of several processes it is cpu:0
            kwargs = kwargs | {"device": torch.device("cpu")}
        packet, flops = func._overloadpacket, 0
        if self.records and packet in READS:
            self._note_wait()
        before = None if form is None else _storages(args, kwargs)
        result = self._run(func, packet, args, kwargs)
        if packet in CPU_ATTENTION:
            flops = CPU_ATTENTION[packet](*args, **kwargs)
        elif packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=result)
        known = form is None or form in self.answers or packet in READS
        if not known and _form(func, args, kwargs) == form and _storages(args, kwargs) == before:
            self.answers[form] = _Answer.of(args, kwargs, result, flops)
        return result, flops

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


# ---------------------------------------------------------------------------------------------------------------------
# The same operation on arguments of the same form gives a result of the same form: a block that a network has sixty
# times is asked once. Making its results again takes a fifth of the time of asking FakeTensorMode, whose own memory
# of answers is as exact, and slow.

PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}


def _form(func, args, kwargs):
    """What the form of an operation's results depends on, hashable; None where that is values, or not known."""
    form = [func, torch.get_default_dtype()]
    if not add_forms(form, args):
        return None
    if kwargs:
        form += kwargs
        if not add_forms(form, kwargs.values()):
            return None
    return tuple(form)


def add_forms(form, values):
    """Append the forms of values to a list; False where there are others than tensors and plain ones."""
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            if value.constant is not None or value.is_conj() or value.is_neg():
                return False
            form += (value.shape, value.stride(), value.dtype, value.storage_offset(), value.fake_device)
        elif kind is torch.Tensor:  # one with values, among those without
            if value.layout != torch.strided or value.is_conj() or value.is_neg():
                return False
            form += (kind, value.shape, value.stride(), value.dtype, value.device)
        elif kind in PLAIN:
            form += (kind, value)  # 1 and 1.0 are equal
        elif kind is list or kind is tuple:
            form += (kind, len(value))
            if not add_forms(form, value):
                return False
        else:
            return False
    return True


def _storages(args, kwargs):
    storages = (tensor.untyped_storage() for tensor in _tensors((*args, *kwargs.values())))
    return [(storage._cdata, storage.nbytes()) for storage in storages]


class _Answer(NamedTuple):
    """parts: how to make each tensor of the result, (place of the argument that it is, or is a view of, else None;
    attributes of the tensor, None where it is that argument; shape, stride, offset, dtype, device)."""

    kind: type | None  # of the result where it is several
    parts: list
    flops: int

    @classmethod
    def of(cls, args, kwargs, result, flops):
        """None for a result that cannot be made again so."""
        kind = type(result) if type(result) in (list, tuple) else None
        if not any(isinstance(tensor, FakeTensor) for tensor in _tensors((result, *args, *kwargs.values()))):
            return None  # it has values, and is to be computed
        given = {}
        twice = {tensor.untyped_storage()._cdata for tensor in _tensors(tuple(kwargs.values()))}
        for place, tensor in _places_of(args):
            storage = tensor.untyped_storage()._cdata
            if storage in given:
                twice.add(storage)
            given[storage] = place, tensor
        parts, made = [], set()
        for tensor in result if kind else [result]:
            if tensor is None:
                parts.append(None)
                continue
            if type(tensor) is not FakeTensor or tensor.constant is not None or tensor.is_conj() or tensor.is_neg():
                return None
            storage = tensor.untyped_storage()
            place, argument = given.get(storage._cdata, (None, None))
            same = next((place for place, each in _places_of(args) if each is tensor), None)
            metadata = tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.fake_device
            if same is not None:
                parts.append((same, None, *metadata))
                continue
            if storage._cdata in twice or storage._cdata in made or "_is_param" in tensor.__dict__:
                return None
            if argument is None:
                made.add(storage._cdata)
                with torch._C._DisableTorchDispatch():
                    plain = torch.empty_strided(*metadata[:2], dtype=metadata[3], device="meta")
                if metadata[2] or plain.untyped_storage().nbytes() != storage.nbytes():
                    return None
            parts.append((place, dict(tensor.__dict__), *metadata))
        return cls(kind, parts, flops)

    def again(self, args):
        with torch._C._DisableTorchDispatch():
            made = [part and _make(args, *part) for part in self.parts]
        return made[0] if self.kind is None else self.kind(made)


def _places_of(args):
    """(place, tensor) of the fake tensors among arguments and in lists of them."""
    for i, value in enumerate(args):
        if isinstance(value, FakeTensor):
            yield (i, None), value
        elif isinstance(value, (list, tuple)):
            yield from (((i, j), each) for j, each in enumerate(value) if isinstance(each, FakeTensor))


def _make(args, place, attributes, shape, stride, offset, dtype, device):
    if place is None:
        plain = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    else:
        argument = args[place[0]] if place[1] is None else args[place[0]][place[1]]
        if attributes is None:
            return argument
        plain = torch.empty(0, dtype=dtype, device="meta")
        plain.set_(argument.untyped_storage(), offset, shape, stride)
    keys = {"dispatch_device": True, "device_for_backend_keys": device}
    tensor = torch.Tensor._make_subclass(FakeTensor, plain, False, **keys)
    torch._C._set_throw_on_mutable_data_ptr(tensor)
    tensor.__dict__.update(attributes)
    return tensor


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
