"""Each point against the full model on the same documents: differences with intervals, and whether they are chance.

Where a document's score is 0 or 1, McNemar's test in its exact form: of the documents on which the two differ, are more
right under one than chance explains. Else a bootstrap of the paired differences, centred on 0. Over the points of a
grid p-values are corrected by Holm's method (Holm 1979), which holds whatever they have to do with one another.
Intervals are 95 % BCa intervals over documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from dynamax_lm_eval.reports.resampling import interval_of_ratio, sums
from dynamax_lm_eval.sweep.results import Floats, TaskResults


def against_full(task: TaskResults, metric: str, count: int = 10_000, seed: int = 0) -> pd.DataFrame:
    """Returns a row for each point but the full model: the difference of its score, with an interval and a test.

    Columns: ``point``, ``difference`` (point minus full model) with ``low`` and ``high``, ``test``, ``p_value`` (of no
    true difference), ``p_holm`` (corrected over the points of the table). Empty where the metric is no mean over
    documents.

    Args:
        task: the results.
        metric: with its filter.
        count: draws of documents.
        seed: of these.
    """
    points = task.points[1:]
    whole = task.full.per_document(metric)
    columns = [point.per_document(metric) for point in points]
    if whole is None or not points or count < 1 or any(column is None for column in columns):
        return pd.DataFrame()
    differences = np.column_stack([column - whole for column in columns if column is not None])
    n = len(whole)
    drawn = sums(differences, count, seed) / n
    one = np.ones(n)
    rows = []
    for i, point in enumerate(points):
        own = differences[:, i]
        low, high = interval_of_ratio(n * drawn[:, i], np.full(len(drawn), float(n)), own, one)
        test, p_value = _test(whole, whole + own, drawn[:, i])
        difference = float(drawn[0, i])
        row = {"point": point.name, "difference": difference, "low": low, "high": high, "test": test}
        rows.append({**row, "p_value": p_value})
    table = pd.DataFrame(rows)
    table["p_holm"] = holm(table["p_value"].tolist())
    return table


def of_points(task: TaskResults, count: int = 10_000, seed: int = 0) -> pd.DataFrame:
    """Returns for each point what does not depend on a metric.

    Columns: ``point``; ``compute_vs_full_low`` and ``_high``, the same for each name of a similarity to the full
    model's answers; ``median_reduction`` and ``median_vs_full``, those of the median document.
    """
    full = task.full.macs("total")
    columns, places = [full], []
    for point in task.points:
        places.append(len(columns))
        columns += [point.macs("total"), *(np.asarray(values) for values in point.similarity.values())]
    drawn = sums(np.column_stack(columns), max(count, 0), seed)
    one, documents = np.ones(len(full)), np.full(len(drawn), float(len(full)))
    rows = []
    for point, place in zip(task.points, places, strict=True):
        eligible = point.macs("eligible")
        own = np.divide(point.macs("eligible_full"), eligible, out=np.ones_like(eligible), where=eligible > 0)
        row: dict[str, Any] = {
            "point": point.name,
            "median_reduction": float(np.median(own)),
            "median_vs_full": float(np.median(full / columns[place])),
        }
        intervals = {"compute_vs_full": interval_of_ratio(drawn[:, 0], drawn[:, place], full, columns[place])}
        for i, name in enumerate(point.similarity, start=place + 1):
            intervals[name] = interval_of_ratio(drawn[:, i], documents, columns[i], one)
        for name, (low, high) in intervals.items():
            row |= {f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def without_loops(task: TaskResults, metric: str, count: int = 10_000, seed: int = 0) -> pd.DataFrame:
    """Returns for each point but the full model its numbers without the documents that :meth:`TaskResults.loops` names.

    Columns: ``point``, ``documents`` that are left and ``left_out``; ``difference`` of the scores and ``vs_full``, each
    with ``_low`` and ``_high``; ``compute_reduction``, and ``rouge_l`` where answers are texts. Empty where no run of
    the task has such a document, or the metric is no mean over documents.
    """
    points = task.points[1:]
    whole = task.full.per_document(metric)
    columns = [point.per_document(metric) for point in points]
    loops = [task.loops(point) for point in points]
    if whole is None or count < 1 or not any(some.any() for some in loops) or any(found is None for found in columns):
        return pd.DataFrame()
    full = task.full.macs("total")
    parts = []
    for point, own, some in zip(points, columns, loops, strict=True):
        assert own is not None, "it was looked at above"
        spent, likeness = (
            point.macs("total"),
            np.asarray(point.similarity.get("consistency_rouge_l", np.zeros(len(own)))),
        )
        sides = [point.macs(name) for name in ("eligible_full", "eligible")]
        parts.append(np.column_stack([np.ones(len(own)), own - whole, full, spent, *sides, likeness]) * ~some[:, None])
    drawn = sums(np.hstack(parts), count, seed).reshape(1 + count, len(points), -1)
    rows = []
    for i, (point, part) in enumerate(zip(points, parts, strict=True)):
        one, difference, whole_macs, spent = part.T[:4]
        row: dict[str, Any] = {"point": point.name, "documents": int(one.sum()), "left_out": int((one == 0).sum())}
        for name, (top, bottom), pair in (
            ("difference", (1, 0), (difference, one)),
            ("vs_full", (2, 3), (whole_macs, spent)),
        ):
            low, high = interval_of_ratio(drawn[:, i, top], drawn[:, i, bottom], *pair)
            row |= {name: _quotient(drawn[0, i, top], drawn[0, i, bottom]), f"{name}_low": low, f"{name}_high": high}
        row["compute_reduction"] = _quotient(drawn[0, i, 4], drawn[0, i, 5])
        if "consistency_rouge_l" in point.similarity:
            row["rouge_l"] = _quotient(drawn[0, i, 6], drawn[0, i, 0])
        rows.append(row)
    return pd.DataFrame(rows)


def _quotient(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else float("nan")


def _test(whole: Floats, own: Floats, differences: Floats) -> tuple[str, float]:
    """Returns the test of two columns of scores (n,) and its p-value; ``differences``: the data's, then drawn ones."""
    if set(np.unique([whole, own])) <= {0.0, 1.0}:
        better, worse = int((own > whole).sum()), int((own < whole).sum())
        return "McNemar", float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
    found, null = abs(differences[0]), np.abs(differences[1:] - differences[0])
    return "bootstrap", float((1 + (null >= found - 1e-12).sum()) / (1 + len(null)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values corrected for as many tests, in their order (Holm's step-down method)."""
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values)[order] * np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return [float(value) for value in corrected]
