"""Linear layers on few tokens: in the order of operands that a CPU multiplies fastest, in few operations on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamax_lm_eval.models.placement import is_only_placed

#: Numbers of tokens for which W x^T was faster than x W^T on a CPU, in float32 and in bfloat16: up to twice.
_FEW = range(4, 97)
#: In float32 W x^T takes twice as long as for one token from the first token on, so x W^T is faster for up to 5 tokens,
#: and with weights of up to so many elements for up to 15.
_FEW_IN_FLOAT32 = range(6, 97)
_FEW_WITH_SMALL_WEIGHTS = range(16, 97)
_SMALL_WEIGHTS = 2**21


def is_changed(attributes: Mapping[str, Any]) -> bool:
    """Returns whether somebody has hooked or replaced the forward of a module with these attributes, its ``vars``.

    What only places modules on devices changes nothing: passes bring tensors and weights there by themselves.
    """
    if attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]:
        return True
    return "forward" in attributes and not is_only_placed(attributes)


def is_plain(module: nn.Module) -> bool:
    """Returns whether a module is a linear layer whose weights may be read instead of calling it."""
    return type(module) is nn.Linear and not is_changed(vars(module))


def linear(module: Any, x: Tensor) -> Tensor:
    """Returns what ``module`` makes of x (1, n, in) or (n, in); anything but a plain linear layer is called as it is.

    The result need not be contiguous.
    """
    if not is_plain(module):
        called: Tensor = module(x)
        return called
    return product(x, module.weight, module.bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns x W^T and the bias (out,), if any, for x (1, n, in) or (n, in) and W (out, in), as :func:`linear`."""
    if x.device.type != "cpu" or (x.ndim == 3 and len(x) > 1) or x.shape[-2] not in _few(weight):
        return F.linear(x, weight, bias)
    output = torch.mm(weight, (x if x.ndim == 2 else x[0]).t()).t()
    if bias is not None:
        output = output + bias
    return output if x.ndim == 2 else output.unsqueeze(0)


def _few(weight: Tensor) -> range:
    """Returns the numbers of tokens for which W x^T is faster."""
    if weight.dtype != torch.float32:
        return _FEW
    return _FEW_WITH_SMALL_WEIGHTS if weight.numel() <= _SMALL_WEIGHTS else _FEW_IN_FLOAT32


class StackedLinear:
    """Linear layers of the same input as one product: on a GPU their weights lie one after the other in one tensor.

    The weights of the modules are views of it, so whoever calls the modules or saves the model sees no difference, and
    no memory is taken. On a CPU nothing is stacked.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        """``modules``: layers (in -> out_i)."""
        self._modules = modules
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        weights, biases = (_parameters(modules, name) for name in ("weight", "bias"))
        if weights and (len(biases) in (0, len(modules))) and all(is_plain(module) for module in modules):
            self._weight = _stacked(weights)
            self._bias = _stacked(biases) if biases and self._weight is not None else None
            if biases and self._bias is None:
                self._weight = None
        self._pointers = [weight.data_ptr() for weight in weights]

    @property
    def is_stacked(self) -> bool:
        """Whether the modules may be called as one: they are plain, and their weights still lie in one tensor."""
        return self._weight is not None and all(
            is_plain(module) and module.weight.data_ptr() == pointer  # type: ignore[operator]
            for module, pointer in zip(self._modules, self._pointers, strict=True)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the outputs of all layers side by side, (1, n, sum of out_i), for (1, n, in)."""
        assert self._weight is not None
        return F.linear(x, self._weight, self._bias)

    def last(self, count: int, x: Tensor) -> Tensor:
        """Returns the last ``count`` of the outputs of :meth:`__call__`."""
        assert self._weight is not None
        return F.linear(x, self._weight[-count:], None if self._bias is None else self._bias[-count:])


def add_product(hidden: Tensor, module: Any, x: Tensor) -> Tensor:
    """Returns hidden (1, n, out), which nobody else needs, plus what ``module`` makes of x (1, n, in)."""
    if hidden.device.type == "cuda" and is_plain(module) and module.bias is None:
        weight = module.weight
        if hidden.dtype == x.dtype == weight.dtype:  # they differ under autocast
            hidden[0].addmm_(x[0], weight.t())
            return hidden
    return hidden + linear(module, x)


def _parameters(modules: Sequence[nn.Module], name: str) -> list[nn.Parameter]:
    found = (vars(module)["_parameters"].get(name) for module in modules)
    return [parameter for parameter in found if parameter is not None]


def _stacked(parts: Sequence[nn.Parameter]) -> Tensor | None:
    """Returns parameters as one tensor, of which they are views from now on; None where that is of no use."""
    first = parts[0]
    if first.device.type != "cuda" or any(
        (part.device, part.dtype, part.shape[1:]) != (first.device, first.dtype, first.shape[1:]) for part in parts
    ):
        return None
    if _are_neighbours(parts):  # another backbone of the same model has made them so
        return first.data.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())
    if any(part.untyped_storage().nbytes() != part.nbytes for part in parts):
        return None  # memory that others hold too would be held twice
    whole = torch.cat([part.data for part in parts])
    for part, data in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = data
    return whole


def _are_neighbours(parts: Sequence[Tensor]) -> bool:
    place, end = parts[0].untyped_storage().data_ptr(), parts[0].storage_offset()
    for part in parts:
        if not part.is_contiguous() or (part.untyped_storage().data_ptr(), part.storage_offset()) != (place, end):
            return False
        end += part.numel()
    return True
