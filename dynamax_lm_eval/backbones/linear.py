"""Linear layers on few tokens, in the order of operands that a CPU multiplies fastest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamax_lm_eval.models.placement import is_only_placed

#: Numbers of tokens for which W x^T was faster than x W^T on a CPU, in float32 and in bfloat16: up to twice.
_FEW = range(4, 97)


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
    weight, bias = module.weight, module.bias
    if x.shape[-2] not in _FEW or x.device.type != "cpu" or (x.ndim == 3 and len(x) > 1):
        return F.linear(x, weight, bias)
    output = torch.mm(weight, (x if x.ndim == 2 else x[0]).t()).t()
    if bias is not None:
        output = output + bias
    return output if x.ndim == 2 else output.unsqueeze(0)
