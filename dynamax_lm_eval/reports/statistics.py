"""Accuracy against compute: areas, values at fixed reductions, and comparisons with pruning, with bootstrap intervals.

Documents are drawn with replacement, the same ones for all points of a task, so that differences are paired. A score
is a mean over the drawn documents, a reduction a ratio of their sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dynamax_lm_eval.sweep.results import Floats, PointResult, TaskResults

#: Compute axes, and what they are called.
AXES = {"compute_reduction": "compute reduction", "compute_vs_full": "compute against the full model's run"}
REDUCTIONS = (1.1, 1.2, 1.3, 1.5, 2.0)
_LEVEL = 0.95


@dataclass(frozen=True)
class Draws:
    """The scores and reductions of points, (P, 1 + B): the data first, then B draws of documents."""

    scores: Floats
    reductions: Floats


def draw(task: TaskResults, points: Sequence[PointResult], metric: str, axis: str, count: int, seed: int) -> Draws:
    """Draws documents for some points of a task.

    Raises:
        ValueError: the metric is no mean over documents.
    """
    values = [point.per_document(metric) for point in points]
    n = len(task.full.samples)
    weights = np.vstack([np.ones(n), np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=count)])
    scores, reductions = [], []
    for point, value in zip(points, values, strict=True):
        if value is None:
            raise ValueError(f"{metric} is no mean over documents")
        scores.append(weights @ value / n)
        if axis == "compute_reduction":
            full, spent = weights @ point.macs("eligible_full"), weights @ point.macs("eligible")
        else:
            full, spent = weights @ task.full.macs("total"), weights @ point.macs("total")
        # A draw in which nothing was eligible saves nothing.
        reductions.append(np.divide(full, spent, out=np.ones_like(full), where=(full > 0) & (spent > 0)))
    return Draws(np.asarray(scores), np.asarray(reductions))


def at_reduction(reductions: Floats, scores: Floats, reduction: float) -> float:
    """Returns the score of a series at a reduction, between its points; NaN beyond them."""
    order = np.argsort(reductions, kind="stable")
    return float(np.interp(reduction, reductions[order], scores[order], left=np.nan, right=np.nan))


def mean_until(reductions: Floats, scores: Floats, last: float) -> float:
    """Returns the area under a series from reduction 1 to ``last``, over its width; NaN where it ends before."""
    order = np.argsort(reductions, kind="stable")
    x, y = reductions[order], scores[order]
    if last <= 1 or x[0] > 1 or x[-1] < last:
        return float("nan")
    grid = np.unique(np.concatenate([[1.0, last], x[(x > 1) & (x < last)]]))
    return float(np.trapezoid(np.interp(grid, x, y), grid) / (last - 1))


def summary(task: TaskResults, metric: str, axis: str, count: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Returns for each series the mean score up to the reduction that all reach, and scores at fixed reductions.

    Every series begins at the full model. Columns ``low`` and ``high`` are a 95 % interval of the draws in which the
    number exists; empty without draws or where the metric is no mean over documents.
    """
    try:
        drawn = {
            name: draw(task, [task.full, *points], metric, axis, count, seed)
            for name, points in task.valid_series().items()
        }
    except ValueError:
        return pd.DataFrame()
    reached = {name: float(d.reductions[:, 0].max()) for name, d in drawn.items()}
    common = min((value for value in reached.values() if value > 1), default=1.0)
    rows = []
    for name, draws in drawn.items():
        number = {f"mean score up to {common:.2f}": [mean_until(x, y, common) for x, y in _columns(draws)]}
        for reduction in REDUCTIONS:
            number[f"score at {reduction:g}"] = [at_reduction(x, y, reduction) for x, y in _columns(draws)]
        for what, values in number.items():
            if not np.isnan(values[0]):
                rows.append({"line": name, "what": what, **_interval(values)})
    return pd.DataFrame(rows)


def against_pruning(task: TaskResults, metric: str, axis: str, count: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Returns for each series of exits and each pruned model the difference of scores at the pruned model's compute."""
    series = task.valid_series()
    pruned = [point for points in series.values() for point in points if point.kind == "pruning"]
    rows = []
    for name, points in series.items():
        if not pruned or points[0].kind != "exits":
            continue
        try:
            draws = draw(task, [task.full, *points, *pruned], metric, axis, count, seed)
        except ValueError:
            return pd.DataFrame()
        end = 1 + len(points)
        for i, point in enumerate(pruned, start=end):
            differences = [at_reduction(x[:end], y[:end], float(x[i])) - float(y[i]) for x, y in _columns(draws)]
            if not np.isnan(differences[0]):
                at = {"line": name, "pruning": point.name, "reduction": float(draws.reductions[i, 0])}
                rows.append({**at, **_interval(differences)})
    return pd.DataFrame(rows)


def front(points: Sequence[tuple[float, float]], higher_is_better: bool = True) -> list[int]:
    """Returns the indices of the points (reduction, score) that no other surpasses in both, by rising reduction."""
    if not higher_is_better:
        points = [(reduction, -score) for reduction, score in points]
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1]))
    best, kept = -np.inf, []
    for i in order:
        if points[i][1] > best:
            best = points[i][1]
            kept.append(i)
    return kept[::-1]


def _columns(draws: Draws) -> list[tuple[Floats, Floats]]:
    return [(draws.reductions[:, b], draws.scores[:, b]) for b in range(draws.scores.shape[1])]


def _interval(values: Sequence[float]) -> dict[str, float]:
    drawn = [value for value in values[1:] if not np.isnan(value)]
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail]) if drawn else (np.nan, np.nan)
    return {"value": float(values[0]), "low": float(low), "high": float(high)}
