"""Statistics of reports, on points that are made by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from helpers_harness import made_results

from dynamax_lm_eval.reports import statistics
from dynamax_lm_eval.sweep.results import TaskResults


def test_scores_at_reductions_lie_between_points() -> None:
    x, y = np.asarray([1.5, 1.0]), np.asarray([0.9, 1.0])
    assert statistics.at_reduction(x, y, 1.25) == pytest.approx(0.95)
    assert math.isnan(statistics.at_reduction(x, y, 1.6))
    assert statistics.mean_until(x, y, 1.5) == pytest.approx(0.95)
    assert statistics.mean_until(x, y, 1.25) == pytest.approx(0.975)
    assert math.isnan(statistics.mean_until(x, y, 1.6))


def test_summary_and_intervals() -> None:
    found = statistics.summary(made_results(), "acc,none", "compute_reduction", count=2000)
    rows = found.set_index(["line", "what"])
    assert rows.loc[("calm, skip", "score at 1.2"), "value"] == pytest.approx(1 - 0.1 * 0.4)
    assert rows.loc[("calm, skip", "mean score up to 1.25"), "value"] == pytest.approx(0.975)
    assert rows.loc[("pruning, deepest", "mean score up to 1.25"), "value"] == pytest.approx(0.75)
    # At 1.5 the score is a mean of 40 draws with success 0.9: the bootstrap's spread is the binomial one.
    at_end = rows.loc[("calm, skip", "score at 1.5")]
    spread = 1.96 * math.sqrt(0.9 * 0.1 / 40)
    assert at_end["high"] - at_end["low"] == pytest.approx(2 * spread, rel=0.2)


def test_differences_from_pruning_are_paired() -> None:
    found = statistics.against_pruning(made_results(), "acc,none", "compute_vs_full", count=500)
    (row,) = found.to_dict("records")
    assert row["pruning"] == "p"
    assert row["reduction"] == pytest.approx(1.25)
    assert row["value"] == pytest.approx(0.95 - 0.5)
    assert row["low"] < row["value"] < row["high"]
    # The same documents in both: where pruning is the exits themselves, nothing is left to chance.
    task = made_results()
    same = replace(task.points[1], name="same", kind="pruning", series="pruning, deepest")
    twins = TaskResults("b", "t", [task.points[0], task.points[1], same])
    (row,) = statistics.against_pruning(twins, "acc,none", "compute_reduction", count=200).to_dict("records")
    assert (row["value"], row["low"], row["high"]) == pytest.approx((0, 0, 0))


def test_metrics_that_are_no_means_have_no_intervals() -> None:
    task = made_results()
    for item in task.points:
        item.scores["acc,none"] = (7.0, 0.0)
    assert len(statistics.summary(task, "acc,none", "compute_reduction")) == 0


def test_front() -> None:
    assert statistics.front([(1.0, 0.9), (1.2, 0.8), (1.1, 0.7), (1.3, 0.8), (1.4, 0.1)]) == [0, 3, 4]
