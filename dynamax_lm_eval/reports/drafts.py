"""Points whose exits are drafts: their score is the full model's, so what a report shows of them is weights and drafts.

The line of points against compute leaves them out, for they save none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from dynamax_lm_eval.reports.resampling import percentile, ratio, sums
from dynamax_lm_eval.sweep.options import VERIFIED
from dynamax_lm_eval.sweep.results import PointResult, TaskResults

_EXACT = "consistency_exact"


def others(task: TaskResults) -> TaskResults:
    """Returns a task's results without the points that verify, which have a table of their own."""
    return replace(task, points=[point for point in task.points if point.kind != VERIFIED])


def table(task: TaskResults, count: int, seed: int) -> pd.DataFrame:
    """Returns a row for each point that verifies: the weights of the full model's run over its own, and its drafts.

    ``weights_reduction`` has a 95 % interval over documents: what the clock can gain at most where few rows decode at a
    time. ``same_texts`` is less than 1 where rounding decided a near-tie.

    Args:
        task: the results.
        count: draws of documents.
        seed: of these.
    """
    rows: list[dict[str, Any]] = []
    for point in task.points:
        weights = _weights(point)
        if point.kind != VERIFIED:
            continue
        # None in files of earlier releases: the point has its row all the same, for it is in no other table.
        drawn = np.full(1, math.nan) if weights is None else ratio(*sums(weights, count, seed).T)
        low, high = percentile(drawn)
        drafts = point.compute.get("drafts") or {}
        rows.append(
            {
                "point": point.name,
                "weights_reduction": float(drawn[0]),
                "low": low,
                "high": high,
                "drafted": drafts.get("drafted", 0),
                "draft_acceptance": drafts.get("draft_acceptance", math.nan),
                "accepted_length": drafts.get("accepted_length", math.nan),
                "compute_reduction": float(point.compute["compute_reduction"]),
                "same_texts": point.consistency.get(_EXACT, math.nan),
            }
        )
    return pd.DataFrame(rows)


def columns(results: Sequence[TaskResults], points: pd.DataFrame) -> pd.DataFrame:
    """Returns the table of points with weights and drafts, where any point has drafts."""
    if not any(point.kind == VERIFIED for task in results for point in task.points):
        return points
    found: dict[tuple[str, str, str], tuple[Any, ...]] = {}
    for task in results:
        for point in task.points:
            weights, drafts = _weights(point), point.compute.get("drafts") or {}
            reduction = None if weights is None else float(np.divide(*weights.sum(axis=0)))
            found[task.backbone, task.task, point.name] = (
                reduction,
                drafts.get("draft_acceptance"),
                drafts.get("accepted_length"),
            )
    keys = list(zip(points["backbone"], points["task"], points["point"], strict=True))
    names = ("weights_reduction", "draft_acceptance", "accepted_length")
    return points.assign(**{name: [found[key][i] for key in keys] for i, name in enumerate(names)})


def _weights(point: PointResult) -> np.ndarray | None:
    """Returns the weights (n, 2) that each document reads under the full model and under a point; None without any."""
    if not all("weights" in sample for sample in point.samples):
        return None
    pairs = [(sample["weights"]["full"], sample["weights"]["read"]) for sample in point.samples]
    return np.asarray(pairs, dtype=np.float64)
