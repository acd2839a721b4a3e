"""Each point against the full model on the same documents: differences with intervals, and whether they are chance.

Where a document's score is 0 or 1, McNemar's test in its exact form: of the documents on which the two differ, are more
right under one than chance explains. Else a bootstrap of the paired differences, centred on 0. Over the points of a
grid p-values are corrected by Holm's method (Holm 1979), which holds whatever they have to do with one another.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from dynamax_lm_eval.reports.statistics import draw
from dynamax_lm_eval.sweep.results import Floats, TaskResults

_TAILS = (0.025, 0.975)


def against_full(task: TaskResults, metric: str, count: int = 10_000, seed: int = 0) -> pd.DataFrame:
    """Returns a row for each point but the full model: its difference and its compute, with 95 % intervals.

    Columns: ``difference`` (of scores, point minus full model) with ``low`` and ``high``, ``test``, ``p_value`` (of no
    true difference), ``p_holm`` (corrected over the points of the table), and ``vs_full`` (compute of the full
    model's run over the point's) with ``vs_full_low`` and ``vs_full_high``. Empty where the metric is no mean over
    documents.

    Args:
        task: the results.
        metric: with its filter.
        count: draws of documents.
        seed: of these.
    """
    points = task.points[1:]
    whole = task.full.per_document(metric)
    if whole is None or not points or count < 1:
        return pd.DataFrame()
    try:
        drawn = draw(task, [task.full, *points], metric, "compute_vs_full", count, seed)
    except ValueError:
        return pd.DataFrame()
    rows = []
    for i, point in enumerate(points, start=1):
        own = point.per_document(metric)
        assert own is not None, "it was drawn"
        differences = drawn.scores[i] - drawn.scores[0]
        test, p_value = _test(whole, own, differences)
        low, high = np.quantile(differences[1:], _TAILS)
        vs_low, vs_high = np.quantile(drawn.reductions[i, 1:], _TAILS)
        rows.append(
            {
                "point": point.name,
                "difference": float(differences[0]),
                "low": float(low),
                "high": float(high),
                "test": test,
                "p_value": p_value,
                "vs_full": float(drawn.reductions[i, 0]),
                "vs_full_low": float(vs_low),
                "vs_full_high": float(vs_high),
            }
        )
    table = pd.DataFrame(rows)
    table.insert(6, "p_holm", holm(table["p_value"].tolist()))
    return table


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
