"""The noise floor of a sweep: the full model once more, with another number of rows in flight, and nothing else.

How a sum is rounded depends on what else is in a batch, so the same model may answer a document in two ways. What
differs between the two runs is no difference between models. Knows points and rows; the report compares them.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from dynamax_lm_eval.sweep.grid import Point
from dynamax_lm_eval.sweep.options import SweepOptions

logger = logging.getLogger(__name__)

#: The family of such points; they stand on no line.
NOISE = "noise"


def rows_of(options: SweepOptions, dtype: torch.dtype, device: torch.device) -> int:
    """Returns how many rows are in flight in the second run of the full model; 0: there is none.

    By default there is one where rounding may show: in half precision, and on a GPU, whose kernels are chosen by the
    size of a batch. In float32 on a CPU near-ties are so rare that a second run would cost more than it tells.

    Args:
        options: of the sweep.
        dtype: in which the backbone computes.
        device: on which it does.
    """
    if options.noise_rows is not None:
        return options.noise_rows
    if not is_half(dtype) and device.type == "cpu":
        return 0
    return options.batch_size // 2 or 2


def is_half(dtype: torch.dtype) -> bool:
    """Says whether numbers of this type have fewer bits than float32's."""
    return torch.finfo(dtype).bits < 32


def with_noise(points: list[Point], rows: int) -> list[Point]:
    """Returns the points with the second run of the full model, which is the first of them, at their end.

    Its name says how many rows it had: after a change of ``--batch_size`` it is another point.
    """
    if not rows:
        return points
    return [*points, replace(points[0], name=f"{points[0].name}-rows{rows}", kind=NOISE, series="noise floor")]


def warn_of_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    """Logs that a CPU gains little from half precision, where it is used."""
    if device.type == "cpu" and is_half(dtype):
        logger.warning(
            "Answers are made in %s on a CPU, where some differences between points are rounding; add dtype=float32 to "
            "--model_args",
            str(dtype).removeprefix("torch."),
        )
