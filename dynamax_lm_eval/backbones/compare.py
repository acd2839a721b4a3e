"""Comparison of two tensors that should be equal, up to rounding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Values that are compared at once.
_AT_ONCE = 2**24
#: The largest and the mean relative difference that rounding explains when equal computations differ in order.
_TOLERANCES = {
    torch.float64: (1e-8, 1e-10),
    torch.float32: (2e-4, 2e-5),
    torch.float16: (2e-2, 1e-2),
    torch.bfloat16: (1e-1, 2e-2),
}


def is_close(ours: Tensor, theirs: Tensor, computed_in: torch.dtype | None = None) -> bool:
    """Returns whether two tensors that should be equal differ by no more than rounding explains.

    The largest difference catches an error in one place; the mean one, which rounding averages out,
    catches a small error everywhere. ``computed_in``: the dtype on the way, where that is not the tensors' own.
    """
    largest, mean = differences(ours, theirs)
    dtypes = {ours.dtype, computed_in or ours.dtype}
    allowed = [_TOLERANCES.get(dtype, _TOLERANCES[torch.bfloat16]) for dtype in dtypes]
    return largest <= max(a for a, _ in allowed) and mean <= max(b for _, b in allowed)


def differences(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Returns the largest difference over largest value, and the mean difference over the mean value."""
    largest_gap = largest = total_gap = total = 0.0
    # In parts: logits of a whole text are large in double precision.
    for a, b in zip(ours.reshape(-1).split(_AT_ONCE), theirs.reshape(-1).split(_AT_ONCE), strict=True):
        b = b.double().cpu()
        gap, size = (a.double().cpu() - b).abs(), b.abs().clamp_min(1e-9)
        largest_gap, largest = max(largest_gap, _largest(gap)), max(largest, _largest(size))
        total_gap, total = total_gap + float(gap.sum()), total + float(size.sum())
    return largest_gap / largest, total_gap / total


def _largest(values: Tensor) -> float:
    """Returns the largest value; infinite where one is no number, which nothing is close to."""
    largest = float(values.max())
    return math.inf if math.isnan(largest) else largest
