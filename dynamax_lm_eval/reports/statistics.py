"""Accuracy against compute: areas, values at fixed reductions, and comparisons with pruning, with bootstrap intervals.

Documents are drawn with replacement, the same ones for all points of a task, so that differences are paired. A score
is a mean over the drawn documents, a reduction a ratio of their sums. A line begins at the full model and is straight
between its points in the fraction of compute (1 / reduction): that is what a mixture of two points gives. P points, D
draws, the data first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dynamax_lm_eval.reports.resampling import percentile, ratio, sums
from dynamax_lm_eval.sweep.baselines import PRUNING, STATIC
from dynamax_lm_eval.sweep.results import Floats, PointResult, TaskResults

#: Compute axes, and what they are called.
AXES = {"compute_reduction": "per-token compute reduction", "compute_vs_full": "whole-run compute reduction"}
#: Where lines are read: fixed beforehand, so that no draw of documents decides it.
REDUCTIONS = (1.02, 1.05, 1.1, 1.2, 1.3, 1.5, 2.0)
#: Reductions that differ by less are one.
_SAME = 1e-9
#: Families of points that exits are compared with.
BASELINES = (PRUNING, STATIC)


@dataclass(frozen=True)
class Draws:
    """The scores and reductions of points, (P, D)."""

    scores: Floats
    reductions: Floats


def draw(
    task: TaskResults,
    points: Sequence[PointResult],
    metric: str,
    axis: str,
    count: int,
    seed: int,
    without_loops: bool = False,
) -> Draws:
    """Draws documents for some points of a task.

    ``without_loops``: each point without the documents that :meth:`TaskResults.loops` names, and as its score the
    difference from the full model's on the documents that are left.

    Raises:
        ValueError: the metric is no mean over documents.
    """
    whole = task.full.per_document(metric)
    columns = []
    for point in points:
        value = point.per_document(metric)
        if value is None or whole is None:
            raise ValueError(f"{metric} is no mean over documents")
        kept = ~task.loops(point) if without_loops else np.ones(len(value), dtype=np.bool_)
        score = value - whole if without_loops else value
        if axis == "compute_reduction":
            full, spent = point.macs("eligible_full"), point.macs("eligible")
        else:
            full, spent = task.full.macs("total"), point.macs("total")
        columns += [column * kept for column in (np.ones(len(value)), score, full, spent)]
    drawn = sums(np.column_stack(columns), count, seed).T.reshape(len(points), 4, -1)
    documents, scores, full, spent = np.moveaxis(drawn, 1, 0)
    # A draw in which nothing was eligible saves nothing.
    reductions = np.divide(full, spent, out=np.ones_like(full), where=(full > 0) & (spent > 0))
    return Draws(ratio(scores, documents), np.where(documents > 0, reductions, np.nan))


def scores_at(line: Draws, reduction: float | Floats, extend: bool = True) -> Floats:
    """Returns the score (D,) of a line at a reduction above 1, which may be another one in each draw.

    The line's first point is the full model. Where a line ends before the reduction, it goes on straight from the full
    model through its last point; without ``extend`` it is NaN there.
    """
    fractions, scores = _sorted(line)
    at = np.broadcast_to(1 / np.asarray(reduction, dtype=np.float64), fractions.shape[1:])
    above = np.minimum((fractions < at).sum(axis=0), len(fractions) - 1)  # the first point that costs as much or more
    below = np.maximum(above - 1, 0)
    (x0, x1), (y0, y1) = (
        [np.take_along_axis(values, place[None], axis=0)[0] for place in (below, above)]
        for values in (fractions, scores)
    )
    share = np.divide(at - x0, x1 - x0, out=np.zeros_like(x0), where=x1 > x0)
    inside = y0 + share * (y1 - y0)
    beyond = at < fractions[0] - _SAME
    saved = 1 - fractions[0]
    factor = np.divide(1 - at, saved, out=np.zeros_like(saved), where=saved > 1e-9)
    extended = line.scores[0] + factor * (scores[0] - line.scores[0])
    found: Floats = np.where(beyond, extended if extend else np.nan, inside)
    return np.where(np.isnan(line.reductions).any(axis=0), np.nan, found)


def means_until(line: Draws, last: float, extend: bool = True) -> Floats:
    """Returns the mean score (D,) of a line over fractions of compute from 1 to 1 / ``last``, as :func:`scores_at`."""
    fractions, scores = _sorted(line)
    end = scores_at(line, last, extend)
    x = np.vstack([np.full_like(end, 1 / last), np.clip(fractions, 1 / last, 1)])
    y = np.vstack([end, np.where(fractions < 1 / last, end, np.where(fractions > 1, line.scores[0], scores))])
    area: Floats = np.trapezoid(y, x, axis=0)
    return area / (1 - 1 / last)


def summary(
    task: TaskResults, metric: str, axis: str, count: int = 1000, seed: int = 0, without_loops: bool = False
) -> pd.DataFrame:
    """Returns for each series the mean score up to a reduction that all reach, and scores at fixed reductions.

    Every series begins at the full model. The reductions are those of ``REDUCTIONS``, and a number stands where the
    line reaches it. Columns ``low`` and ``high`` are a 95 % interval over draws, ``extended`` is the share of draws in
    which the line ends before the reduction and goes on as :func:`scores_at` says, ``left_out`` the number of draws
    that say nothing (in which no document is left). Empty where the metric is no mean over documents.

    ``without_loops``: as :func:`draw` says; numbers are differences from the full model then.
    """
    try:
        drawn = {
            name: draw(task, [task.full, *points], metric, axis, count, seed, without_loops)
            for name, points in task.valid_series().items()
        }
    except ValueError:
        return pd.DataFrame()
    reached = {name: float(d.reductions[:, 0].max()) + _SAME for name, d in drawn.items()}
    least = min((value for value in reached.values() if value >= REDUCTIONS[0]), default=1.0)
    common = max((reduction for reduction in REDUCTIONS if reduction <= least), default=None)
    word = "difference" if without_loops else "score"
    rows = []
    for name, draws in drawn.items():
        numbers = {}
        if common is not None and reached[name] >= common:
            numbers[f"mean {word} up to {common:g}"] = common, means_until(draws, common)
        numbers |= {
            f"{word} at {reduction:g}": (reduction, scores_at(draws, reduction))
            for reduction in REDUCTIONS
            if reached[name] >= reduction
        }
        for what, (reduction, values) in numbers.items():
            short = draws.reductions.max(axis=0)[1:] < reduction - _SAME
            rows.append({"line": name, "what": what, **_interval(values), **_drawn(values, short)})
    return pd.DataFrame(rows)


def against_pruning(
    task: TaskResults, metric: str, axis: str, count: int = 1000, seed: int = 0, without_loops: bool = False
) -> pd.DataFrame:
    """Returns for each series of exits and each baseline the difference of scores at the baseline's compute.

    Baselines are pruned models and static exits.

    Columns as in :func:`summary`.
    """
    series = task.valid_series()
    baselines = [point for points in series.values() for point in points if point.kind in BASELINES]
    rows = []
    for name, points in series.items():
        if not baselines or points[0].kind != "exits":
            continue
        try:
            draws = draw(task, [task.full, *points, *baselines], metric, axis, count, seed, without_loops)
        except ValueError:
            return pd.DataFrame()
        end = 1 + len(points)
        line = Draws(draws.scores[:end], draws.reductions[:end])
        for i, point in enumerate(baselines, start=end):
            at = draws.reductions[i]
            if not 1 <= at[0] <= line.reductions[:, 0].max() + _SAME:
                continue
            differences = scores_at(line, np.maximum(at, 1)) - draws.scores[i]
            short = (line.reductions.max(axis=0) < at - _SAME)[1:]
            where = {"line": name, "pruning": point.name, "reduction": float(at[0])}
            rows.append({**where, **_interval(differences), **_drawn(differences, short)})
    return pd.DataFrame(rows)


def minus_pruning(task: TaskResults, metric: str, count: int, seed: int) -> pd.DataFrame:
    """Returns for each point of exits its score minus that of each baseline at the same ``compute_vs_full``.

    Columns: ``point``, and for each line of pruned models or static exits ``minus_LINE`` with ``_low`` and ``_high``;
    NaN where the line does not reach that far. Empty without exits or baselines, or where the metric is no mean over
    documents.
    """
    series = task.valid_series()
    exits = [point for points in series.values() for point in points if point.kind == "exits"]
    lines = {name: points for name, points in series.items() if points[0].kind in BASELINES}
    if not exits or not lines or count < 1:
        return pd.DataFrame()
    points = [task.full, *exits, *(point for line in lines.values() for point in line)]
    try:
        draws = draw(task, points, metric, "compute_vs_full", count, seed)
    except ValueError:
        return pd.DataFrame()
    rows: list[dict[str, object]] = [{"point": point.name} for point in exits]
    first = 1 + len(exits)
    for name, members in lines.items():
        places = [0, *range(first, first + len(members))]
        first += len(members)
        line = Draws(draws.scores[places], draws.reductions[places])
        column = "minus_" + name.replace(", ", "_").replace(" ", "_")
        for i, row in enumerate(rows, start=1):
            at = draws.reductions[i]
            if 1 <= at[0] <= line.reductions[:, 0].max() + _SAME:
                values = draws.scores[i] - scores_at(line, np.maximum(at, 1))
                row |= dict(zip((column, f"{column}_low", f"{column}_high"), _interval(values).values(), strict=True))
    table = pd.DataFrame(rows)
    return table if len(table.columns) > 1 else pd.DataFrame()


def front(points: Sequence[tuple[float, float]], higher_is_better: bool = True) -> list[int]:
    """Returns the indices of the Pareto front of points (reduction, score), by rising reduction."""
    if not higher_is_better:
        points = [(reduction, -score) for reduction, score in points]
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1]))
    best, kept = -np.inf, []
    for i in order:
        if points[i][1] > best:
            best = points[i][1]
            kept.append(i)
    return kept[::-1]


def _sorted(line: Draws) -> tuple[Floats, Floats]:
    """Returns fractions of compute and scores (P, D), by rising fraction in each draw."""
    fractions = 1 / line.reductions
    order = np.argsort(fractions, axis=0, kind="stable")
    return np.take_along_axis(fractions, order, axis=0), np.take_along_axis(line.scores, order, axis=0)


def _interval(values: Floats) -> dict[str, float]:
    low, high = percentile(values)
    return {"value": float(values[0]), "low": low, "high": high}


def _drawn(values: Floats, short: Floats) -> dict[str, float]:
    """Returns what became of the draws behind a number: (D,) its values, (D - 1,) whether the line was too short."""
    return {
        "extended": float(short.mean()) if len(short) else 0.0,
        "left_out": int(np.isnan(values[1:]).sum()),
    }
