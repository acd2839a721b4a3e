"""Root-mean-square norms of a family's modules, recognised by what they compute, so that they run in one operation.

T tokens, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamax_lm_eval.backbones.linear import is_changed


class RmsNorm(NamedTuple):
    """x / sqrt(mean(x^2) + eps) * weight, the mean over groups of channels."""

    eps: float
    group_size: int

    def __call__(self, x: Tensor, weight: Tensor, gate: Tensor | None = None) -> Tensor:
        """Returns the norm of x (T, D), or of x * silu(gate)."""
        if gate is not None:
            x = x * F.silu(gate)
        if self.group_size == len(weight):
            return F.rms_norm(x, (self.group_size,), weight, self.eps)
        groups = x.unflatten(-1, (-1, self.group_size))
        return F.rms_norm(groups, (self.group_size,), eps=self.eps).flatten(-2) * weight


def recognised(module: Any, gated: bool = False) -> RmsNorm | None:
    """Returns the norm that a module is; None where it is none, or somebody has hooked it.

    Args:
        module: called with x (T, D), and with a gate (T, D) where it is gated.
        gated: whether it normalises x * silu(gate).
    """
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or weight.ndim != 1 or weight.is_meta or not isinstance(eps, float) or is_changed(vars(module)):
        return None
    size = len(weight)
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(2, size, generator=generator) for _ in range(2 if gated else 1)]
    with torch.no_grad():
        tensors = {name: value.to("cpu", torch.float32) for name, value in module.state_dict().items()}
        try:
            expected = torch.func.functional_call(module, tensors, tuple(given))
        except Exception:
            return None
        for group_size in dict.fromkeys((int(getattr(module, "group_size", size)), size)):
            norm = RmsNorm(eps, group_size)
            ours = norm(given[0], tensors["weight"], *given[1:])
            if expected.shape == ours.shape and torch.allclose(expected, ours, rtol=1e-4, atol=1e-5):
                return norm
    return None
