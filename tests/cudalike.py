"""A device that says it is cuda:0 and computes on the CPU, so that tests can ask what a GPU would be asked.

Within :func:`cuda_like` a tensor of the device holds real values, refuses to be mixed with tensors of the CPU, and all
that is done with it is counted: kernels launched, copies to the device (blocking, or asynchronous from pinned memory),
and values read back. It needs neither a GPU nor a compiler, and changes nothing of torch outside the ``with`` block.

What a kernel is follows CUDA in eager mode: composite operations are taken apart, views and allocations cost nothing,
operations on no elements are not launched. It says nothing of time, of memory or of a GPU's rounding.
"""

from __future__ import annotations

import copy
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
Module = TypeVar("Module", bound=nn.Module)

#: Operations that allocate without writing, and views that do not say so.
_FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "lift_fresh"}
#: Operations that wait for the device to learn a size or a value.
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2", "is_nonzero"}
#: Composite operations that are one kernel of CUDA's.
_KERNELS = {"scaled_dot_product_attention": 1, "rms_norm": 1, "conv1d": 1, "repeat_interleave": 1, "_varlen_attn": 2}
#: Methods that hand a value to the host.
_READ = {"tolist", "item", "cpu", "__bool__", "__int__", "__float__", "__index__", "__contains__"}
#: What is known of a tensor without asking the device.
_KNOWN = {
    "size", "stride", "dim", "numel", "nelement", "element_size", "is_contiguous", "storage_offset", "is_complex",
    "is_floating_point", "ndimension", "data_ptr", "__len__", "untyped_storage", "is_inference",
}  # fmt: skip
#: What the tensor itself says, not its values.
_OF_THE_DEVICE = {"device", "is_cuda", "is_cpu", "requires_grad", "grad", "grad_fn", "is_leaf"}


class CudaTensor(Tensor):
    """A tensor of the device; ``values`` are what it holds, on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> CudaTensor:
        # Tensors of inference mode cannot be wrapped; whether one is, is asked of its values.
        with torch.inference_mode(False):
            self: CudaTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                values.size(),
                strides=values.stride(),
                storage_offset=values.storage_offset(),
                dtype=values.dtype,
                layout=values.layout,
                device=CUDA,
            )
        self.values = values
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values)
        raise RuntimeError(f"{func} reached a tensor of the device outside of cuda_like")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CudaTensor({self.values!r})"


@dataclass
class Counts:
    """What the device was asked."""

    launches: Counter[str] = field(default_factory=Counter)  # by operation
    shapes: list[str] = field(default_factory=list)  # operations with the shapes of their tensors, in order
    #: Operations with all that they are called with, in order, where somebody asks for that: tensors by shape and
    #: place in memory (``made`` where it was allocated meanwhile), anything else as it is.
    calls: list[str] | None = None
    made: set[int] = field(default_factory=set)  # places in memory
    #: Places in the code, each as often as it was passed.
    blocking_uploads: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)  # asynchronous
    read_backs: Counter[str] = field(default_factory=Counter)


class _Device(TorchFunctionMode):
    """Runs what is called with tensors of the device on their values."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counts | None = None
        self.operations = _Operations(self)

    def note(self, kind: str) -> None:
        if self.counts is not None:
            getattr(self.counts, kind)[_place()] += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        own = [tensor for tensor in tensors if isinstance(tensor, CudaTensor)]
        if name == "__get__" or name in _KNOWN:
            return self._attribute(func, args, kwargs)
        if name == "__set__" and own:
            return self._assign(func, *args)
        if name == "pin_memory" and not own:
            pinned = args[0].clone()
            pinned.is_pinned_here = True
            return pinned
        if name in ("to", "cuda") and (target := _target(name, args, kwargs)) is not None:
            return self._move(func, args, kwargs, target)
        if name in ("tensor", "as_tensor", "asarray") and _is_ours(kwargs.get("device")):
            kwargs["device"] = CUDA if own else None
            made = func(*map(_values, args), **{**kwargs, "device": None})
            if not own:
                self.note("blocking_uploads")
            return CudaTensor(made)
        if own and name in _READ:
            self.note("read_backs")
            return func(*tree_map(_values, args), **tree_map(_values, kwargs))
        if name == "copy_" and isinstance(args[0], CudaTensor) and getattr(args[1], "is_pinned_here", False):
            self.note("uploads" if kwargs.get("non_blocking") else "blocking_uploads")
            args[0].values.copy_(args[1])
            return args[0]
        if own and name == "numpy":
            raise TypeError("can't convert cuda:0 device type tensor to numpy: copy it to the host first")
        if own:
            self._check_devices(name, tensors)
        elif not _is_ours(kwargs.get("device")):
            return func(*args, **kwargs)
        if _is_ours(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        return self._run(func, args, kwargs, own)

    def _run(self, func: Any, args: Any, kwargs: Any, own: Sequence[CudaTensor]) -> Any:
        same = {id(tensor.values): tensor for tensor in own}
        with self.operations.on_device():
            results = func(*tree_map(_values, args), **tree_map(_values, kwargs))

        def wrapped(result: Any) -> Any:
            if not isinstance(result, Tensor):
                return result
            return same[id(result)] if id(result) in same else CudaTensor(result)

        return tree_map(wrapped, results)

    def _attribute(self, func: Any, args: Any, kwargs: Any) -> Any:
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if attribute in _OF_THE_DEVICE or not isinstance(args[0], CudaTensor):
            return func(*args, **kwargs)
        result = func(*tree_map(_values, args), **kwargs)
        return CudaTensor(result) if isinstance(result, Tensor) else result

    def _assign(self, func: Any, tensor: Any, value: Any) -> None:
        if not isinstance(value, CudaTensor):
            func(tensor, value)
            return
        # ``data``: other memory behind the same tensor.
        assert (value.shape, value.dtype, value.stride()) == (tensor.shape, tensor.dtype, tensor.stride())
        tensor.values = value.values

    def _move(self, func: Any, args: Any, kwargs: Any, target: torch.device) -> Any:
        tensor = args[0]
        is_own, rest = isinstance(tensor, CudaTensor), args[1:] if func.__name__ == "to" else ()
        # Modules are moved by (device, dtype or None, non_blocking).
        is_asynchronous = kwargs.pop("non_blocking", False) or any(value is True for value in rest)
        others = [value for value in rest if isinstance(value, torch.dtype | Tensor)]
        kwargs.pop("device", None)
        if is_own and target.type == "cuda":
            return self._run(Tensor.to, (tensor, *others), kwargs, [tensor]) if others or kwargs else tensor
        values = _values(tensor)
        moved = values.to(*others, **kwargs) if others or kwargs else values.clone()
        if target.type == "cuda" and moved.numel():
            asynchronous = is_asynchronous and getattr(tensor, "is_pinned_here", False)
            self.note("uploads" if asynchronous else "blocking_uploads")
        elif is_own:
            self.note("read_backs")
        return CudaTensor(moved) if target.type == "cuda" else moved

    def _check_devices(self, name: str, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            if isinstance(tensor, CudaTensor) or tensor.ndim == 0:
                continue
            if name == "copy_":
                is_upload = isinstance(tensors[0], CudaTensor)
                self.note("blocking_uploads" if is_upload else "read_backs")
            elif name in ("__getitem__", "__setitem__", "index_put_", "index_put"):
                self.note("blocking_uploads")  # indices may be on the host; they are copied
            else:
                raise RuntimeError(f"{name} was given tensors of cuda:0 and of the cpu at {_place()}")


class _Operations(TorchDispatchMode):
    """Sees every operation on the values of the device's tensors, and counts it."""

    def __init__(self, device: _Device) -> None:
        super().__init__()
        self._device = device
        self._counts = False

    @contextmanager
    def on_device(self) -> Iterator[None]:
        before, self._counts = self._counts, True
        try:
            yield
        finally:
            self._counts = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if not self._counts:
            return func(*args, **kwargs)
        if name not in _KERNELS:
            # In inference mode composite operations come whole.
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        results = attend_runs(*args) if name == "_varlen_attn" else func(*args, **kwargs)
        if name in _WAITING or _waits(name, args, kwargs):
            self._device.note("read_backs")
        elif (counts := self._device.counts) is not None and not func.is_view and name not in _FREE:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, results)) if isinstance(leaf, Tensor)]
            if any(tensor.numel() for tensor in tree_leaves(results) if isinstance(tensor, Tensor)):
                counts.launches[name] += _KERNELS.get(name, 1)
                counts.shapes.append(f"{name} {[tuple(tensor.shape) for tensor in tensors]}")
        if self._device.counts is not None:
            _note_call(self._device.counts, name, (args, kwargs), results)
        return results


def _note_call(counts: Counts, name: str, given: Any, results: Any) -> None:
    if counts.calls is None:
        return
    counts.calls.append(f"{name} {[_described(leaf, counts.made) for leaf in tree_leaves(given)]}")
    known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(given) if isinstance(leaf, Tensor)}
    found = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(results) if isinstance(leaf, Tensor)}
    counts.made |= found - known


def _described(value: Any, made: set[int]) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    place = value.untyped_storage().data_ptr()
    where = "made" if place in made else f"{place:x}"
    return f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.storage_offset()} {where}"


def attend_runs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_query: Tensor,
    first_key: Tensor,
    longest: int,
    most_keys: int,
    causal: bool,
    scaling: float | None,
    window: list[int],
    grouped: bool,
    num_keys: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel behind ``torch.nn.attention.varlen.varlen_attn`` computes, run by run and without it.

    Queries (n, H, P) stand at the end of their run's keys (C, H_kv, P), of which ``num_keys`` count. As the kernel, it
    refuses indices of another type, and runs that are longer than it was told.
    """
    if {tensor.dtype for tensor in (first_query, first_key, num_keys)} != {torch.int32}:
        raise RuntimeError("cu_seqlens and seqused must have dtype int32")
    if query.shape[1] % key.shape[1] or (not grouped and query.shape[1] != key.shape[1]):
        raise RuntimeError("the number of heads of keys must divide that of queries")
    outputs = []
    for run, count in enumerate(num_keys.tolist()):
        q = query[first_query[run] : first_query[run + 1]]
        assert 0 < len(q) <= longest and 0 < count <= most_keys
        k, v = (cache[first_key[run] : first_key[run] + count] for cache in (key, value))
        own = torch.arange(count - len(q), count)[:, None]  # (queries, 1) the keys of the queries themselves
        keys = torch.arange(count)
        seen = torch.ones(len(q), count, dtype=torch.bool)
        if causal or window[1] == 0:
            seen &= keys <= own
        if window[0] >= 0:
            seen &= keys >= own - window[0]
        parts = [part.float().transpose(0, 1) for part in (q, k, v)]
        out = F.scaled_dot_product_attention(*parts, attn_mask=seen, scale=scaling, enable_gqa=grouped)
        outputs.append(out.transpose(0, 1).to(query.dtype))
    return torch.cat(outputs), torch.empty(0), torch.empty(0)


def _waits(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    if name in ("index", "index_put", "index_put_"):
        return any(index.dtype in (torch.bool, torch.uint8) for index in args[1] if index is not None)
    return name == "repeat_interleave" and kwargs.get("output_size") is None


def _values(value: Any) -> Any:
    return value.values if isinstance(value, CudaTensor) else value


def _is_ours(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


def _target(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.device | None:
    """Returns the device that a tensor is moved to; None where it stays where it is."""
    if name == "cuda":
        return CUDA
    named = [a for a in (*args[1:2], kwargs.get("device")) if isinstance(a, str | torch.device)]
    likes = [a for a in args[1:2] if isinstance(a, Tensor)]
    target = torch.device(named[0]) if named else likes[0].device if likes else None
    return target if target is not None and (target.type == "cuda" or isinstance(args[0], CudaTensor)) else None


def _place() -> str:
    """Returns where the package, or else transformers, called torch."""
    frames = traceback.extract_stack()
    for part in ("dynamax_lm_eval/", "transformers/"):
        for frame in reversed(frames):
            if part in frame.filename and "/tests/" not in frame.filename:
                return f"{frame.filename.rpartition(part)[2]}:{frame.lineno}"
    return "tests"


_device: _Device | None = None


@contextmanager
def cuda_like() -> Iterator[None]:
    """Makes tensors of ``cuda:0`` possible within."""
    global _device
    with ExitStack() as stack:
        _device = _Device()
        stack.callback(_leave)
        stack.enter_context(_device.operations)
        stack.enter_context(_device)
        yield


def _leave() -> None:
    global _device
    _device = None


@contextmanager
def counting(calls: bool = False) -> Iterator[Counts]:
    """Counts what the device is asked within; only inside of :func:`cuda_like`. ``calls``: keeps ``Counts.calls``."""
    assert _device is not None
    before, _device.counts = _device.counts, Counts(calls=[] if calls else None)
    try:
        yield _device.counts
    finally:
        _device.counts = before


def as_one_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that counts as one kernel, whatever plain torch it takes to stand for that kernel."""

    def launch(*args: Any, **kwargs: Any) -> Any:
        assert _device is not None
        counts, _device.counts = _device.counts, None
        try:
            results = function(*args, **kwargs)
        finally:
            _device.counts = counts
        if counts is not None:
            counts.launches[function.__name__] += 1
            counts.shapes.append(f"{function.__name__} {[tuple(x.shape) for x in args if isinstance(x, Tensor)]}")
        return results

    return launch


def on_cuda(module: Module) -> Module:
    """Returns a copy of a module on the device."""
    moved = copy.deepcopy(module)
    for part in moved.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(CudaTensor(parameter.data), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = CudaTensor(buffer)
    return moved
