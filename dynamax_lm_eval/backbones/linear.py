"""Linear layers on few tokens, in the order of operands that a CPU multiplies fastest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Numbers of tokens for which W x^T was faster than x W^T on a CPU, in float32 and in bfloat16: up to twice.
_FEW = range(4, 97)


def is_changed(attributes: Mapping[str, Any]) -> bool:
    """Whether somebody has hooked or replaced the forward of a module with these attributes, its ``vars``."""
    return bool("forward" in attributes or attributes["_forward_hooks"] or attributes["_forward_pre_hooks"])


def linear(linear: Any, x: Tensor) -> Tensor:
    """What the module ``linear`` makes of x (1, n, in) or (n, in); anything but a plain layer is called as it is.

    The result need not be contiguous.
    """
    if type(linear) is not nn.Linear or is_changed(vars(linear)):
        called: Tensor = linear(x)
        return called
    weight, bias = linear.weight, linear.bias
    if x.shape[-2] not in _FEW or x.device.type != "cpu" or (x.ndim == 3 and len(x) > 1):
        return F.linear(x, weight, bias)
    output = torch.mm(weight, (x if x.ndim == 2 else x[0]).t()).t()
    if bias is not None:
        output = output + bias
    return output if x.ndim == 2 else output.unsqueeze(0)
