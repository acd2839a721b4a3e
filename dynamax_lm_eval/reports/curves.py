"""What a figure of score against compute shows, for plots and the page alike: places, bars, joined points, labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd

from dynamax_lm_eval.reports.statistics import front
from dynamax_lm_eval.sweep.results import PointResult, TaskResults

#: Of lines, on light and on dark paper; each has a contrast of 4.5 at least. Grey tells lines apart by dash and marker.
COLOURS = (
    ("#0b5cad", "#6cb6ff"),
    ("#b3440b", "#ff9e64"),
    ("#0a6e4f", "#4ed6a4"),
    ("#8e2f86", "#f09ce8"),
    ("#6b5900", "#e2c44f"),
    ("#0e7490", "#5fd4ea"),
    ("#9b1c31", "#ff8a98"),
    ("#4b5563", "#b8c0cc"),
    ("#5b3fbf", "#b9a5ff"),
    ("#7a4a21", "#dda777"),
)
#: A normal 95 % interval in standard errors.
_NORMAL = 1.959964
#: Every so many points of a line bear their setting.
_LABELLED = 3
_SAME = 1e-9


class Place(NamedTuple):
    """Where a point lies, and its 95 % intervals as (low, high), NaN where there is none."""

    x: float
    y: float
    x_bar: tuple[float, float]
    y_bar: tuple[float, float]


def place(task: TaskResults, point: PointResult, metric: str, axis: str, points: pd.DataFrame | None = None) -> Place:
    """Returns where a point lies on an axis.

    Args:
        task: its results.
        point: one of them.
        metric: the score, with its filter.
        axis: one of ``statistics.AXES``.
        points: as ``paired.of_points`` returns it, with intervals of ``compute_vs_full``.
    """
    x = task.reduction(point, axis)
    score, stderr = point.scores[metric]
    if axis == "compute_vs_full":
        x_bar = _interval_in(points, point.name)
    else:
        # None, where one document cannot have a standard error.
        x_stderr = point.compute.get("compute_reduction_stderr")
        x_bar = _normal(x, math.nan if x_stderr is None else float(x_stderr))
    return Place(x, score, x_bar, _normal(score, stderr))


def joined(task: TaskResults, points: Sequence[PointResult], metric: str, axis: str) -> list[PointResult]:
    """Returns the points of one series that a line joins, from the full model on.

    Those are all valid ones in order of their setting where compute falls along it. On the axis of the whole run it
    need not, because texts get longer or shorter; then they are the Pareto front of the series.
    """
    valid = [point for point in points if point.valid]
    # Thresholds save less as they rise, numbers of blocks more: the tokens' compute tells which.
    if valid and task.reduction(valid[0], "compute_reduction") > task.reduction(valid[-1], "compute_reduction"):
        valid = valid[::-1]
    line = [task.full, *valid]
    reductions = [task.reduction(point, axis) for point in line]
    if all(later >= earlier - _SAME for earlier, later in pairwise(reductions)):
        return line
    best = front([(task.reduction(p, axis), p.scores[metric][0]) for p in line], task.higher_is_better(metric))
    return [line[i] for i in best]


def pareto_front(task: TaskResults, metric: str, axis: str) -> list[PointResult]:
    """Returns the Pareto front of the valid points, the full model among them, by rising reduction."""
    valid = [point for point in task.points if point.valid]
    places = [(task.reduction(point, axis), point.scores[metric][0]) for point in valid]
    return [valid[i] for i in front(places, task.higher_is_better(metric))]


def labelled(task: TaskResults) -> list[PointResult]:
    """Returns the points that bear their setting: the ends of all lines first, then every third point between them."""
    lines = task.series().values()
    ends = [point for points in lines for point in (*points[:1], *points[1:][-1:])]
    return ends + [point for points in lines for point in points[_LABELLED:-1:_LABELLED]]


def is_share(task: TaskResults, metric: str) -> bool:
    """Says whether a metric lies between 0 and 1 in all documents of all points."""
    for point in task.points:
        values = point.per_document(metric)
        values = np.asarray([point.scores[metric][0]]) if values is None else values
        if not ((values >= 0) & (values <= 1)).all():
            return False
    return True


def score_range(task: TaskResults, metric: str) -> tuple[float, float]:
    """Returns the least and the greatest score that an axis shows: of shares nothing beyond 0 and 1, but for a rim."""
    places = [place(task, point, metric, "compute_reduction") for point in task.points]
    low, high = _extent([value for found in places for value in (found.y, *found.y_bar)])
    if not is_share(task, metric):
        return _padded(low, high, 0.05 * max(abs(low), 1.0))
    if high - low < _SAME:
        return (-0.06, 1.06)
    low, high = _padded(max(low, 0.0), min(high, 1.0), 0.05)
    return max(low, -0.03), min(high, 1.03)


def reduction_range(
    task: TaskResults, metric: str, axis: str, points: pd.DataFrame | None = None
) -> tuple[float, float]:
    """Returns the least and the greatest reduction that an axis shows; bars may run out of it."""
    places = [place(task, point, metric, axis, points) for point in task.points]
    low, high = _extent([found.x for found in places])
    reach = max(high - low, 0.05)
    # A wide interval of one point would press all others together.
    bars = [min(max(bar, low - reach / 2), high + reach / 2) for found in places for bar in found.x_bar]
    return _padded(*_extent([low, high, *bars]), 0.05)


def _interval_in(points: pd.DataFrame | None, name: str) -> tuple[float, float]:
    if points is not None and "compute_vs_full_low" in points:
        for row in points[points["point"] == name][["compute_vs_full_low", "compute_vs_full_high"]].to_numpy():
            return float(row[0]), float(row[1])
    return math.nan, math.nan


def _normal(value: float, stderr: float) -> tuple[float, float]:
    return value - _NORMAL * stderr, value + _NORMAL * stderr


def _extent(values: Sequence[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)]
    return min(finite), max(finite)


def _padded(low: float, high: float, least: float) -> tuple[float, float]:
    """Returns a range with room at both ends, and some where all values are equal."""
    if high - low < _SAME:
        return low - least, high + least
    return low - 0.08 * (high - low), high + 0.08 * (high - low)
