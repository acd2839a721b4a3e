"""Statistics of reports, on points that are made by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers_harness import made_results

from dynamax_lm_eval.reports import statistics
from dynamax_lm_eval.reports.statistics import Draws
from dynamax_lm_eval.reports.tables import intervals, settled
from dynamax_lm_eval.sweep.results import TaskResults


def line(reductions: list[float], scores: list[float]) -> Draws:
    """A line in one draw, the full model first."""
    return Draws(np.asarray(scores)[:, None], np.asarray(reductions)[:, None])


def test_scores_at_reductions_lie_between_points_in_the_fraction_of_compute() -> None:
    two = line([1.0, 1.5], [1.0, 0.9])
    (found,) = statistics.scores_at(two, 1.2)
    assert found == pytest.approx(0.95), "1 / 1.2 is halfway between 1 and 1 / 1.5"
    assert statistics.scores_at(two, 1.5) == pytest.approx([0.9])
    assert math.isnan(statistics.scores_at(two, 1.6, extend=False)[0])
    assert statistics.scores_at(two, 2.0) == pytest.approx([0.85]), "straight on from the full model"
    assert statistics.means_until(two, 1.5) == pytest.approx([0.95])
    assert statistics.means_until(two, 1.2) == pytest.approx([0.975])
    assert statistics.means_until(two, 2.0) == pytest.approx([0.925])
    assert math.isnan(statistics.means_until(two, 1.6, extend=False)[0])
    # In any order, beside points that cost more than the full model.
    four = line([1.0, 0.8, 2.0, 1.25], [1.0, 0.2, 0.5, 0.9])
    assert statistics.scores_at(four, 1 / 0.65) == pytest.approx([0.7])
    assert statistics.means_until(four, 2.0) == pytest.approx([(0.2 * 0.95 + 0.3 * 0.7) / 0.5])
    assert statistics.scores_at(line([1.0, 0.9], [0.8, 0.1]), 1.1) == pytest.approx([0.8]), "nothing is saved"


def test_summary_and_intervals() -> None:
    found = statistics.summary(made_results(), "acc,none", "compute_reduction", count=2000)
    rows = found.set_index(["line", "what"])
    assert rows.loc[("calm, skip", "score at 1.2"), "value"] == pytest.approx(0.95)
    assert rows.loc[("calm, skip", "mean score up to 1.2"), "value"] == pytest.approx(0.975)
    assert rows.loc[("pruning, deepest", "mean score up to 1.2"), "value"] == pytest.approx(1 - 0.25 * (1 / 6) / 0.2)
    assert ("pruning, deepest", "score at 1.3") not in rows.index, "it ends at 1.25"
    assert (found["left_out"] == 0).all() and (found["extended"] == 0).all(), "every document saves the same"
    # At 1.5 the score is a mean of 40 draws with success 0.9: the bootstrap's spread is the binomial one.
    at_end = rows.loc[("calm, skip", "score at 1.5")]
    spread = 1.96 * math.sqrt(0.9 * 0.1 / 40)
    assert at_end["high"] - at_end["low"] == pytest.approx(2 * spread, rel=0.2)


def test_differences_from_pruning_are_paired() -> None:
    found = statistics.against_pruning(made_results(), "acc,none", "compute_vs_full", count=500)
    (row,) = found.to_dict("records")
    assert row["pruning"] == "p"
    assert row["reduction"] == pytest.approx(1.25)
    assert row["value"] == pytest.approx(1 - 0.1 * 0.2 / (1 / 3) - 0.5)
    assert row["low"] < row["value"] < row["high"]
    # The same documents in both: where pruning is the exits themselves, nothing is left to chance.
    task = made_results()
    same = replace(task.points[1], name="same", kind="pruning", series="pruning, deepest")
    twins = TaskResults("b", "t", [task.points[0], task.points[1], same])
    (row,) = statistics.against_pruning(twins, "acc,none", "compute_reduction", count=200).to_dict("records")
    assert (row["value"], row["low"], row["high"]) == pytest.approx((0, 0, 0))


def test_static_exits_are_compared_with_as_pruned_models_are() -> None:
    task = made_results()
    pruned = next(point for point in task.points if point.kind == "pruning")
    static = replace(pruned, name="s", kind="static", series="static exit, skip")
    task.points.append(static)
    rows = statistics.against_pruning(task, "acc,none", "compute_vs_full", count=50).set_index("pruning")
    assert rows.loc["s", "value"] == rows.loc["p", "value"]
    pairs = zip(task.points[1].samples, pruned.samples, strict=True)
    task.points[1] = replace(task.points[1], samples=[{**own, "macs": other["macs"]} for own, other in pairs])
    (row,) = statistics.minus_pruning(task, "acc,none", 50, 0).to_dict("records")
    assert row["minus_static_exit_skip"] == row["minus_pruning_deepest"]


def test_points_less_pruning_at_their_own_compute() -> None:
    task = made_results()
    samples = [{**sample, "macs": {**sample["macs"], "total": 100 / 1.2}} for sample in task.points[1].samples]
    task.points.insert(2, replace(task.points[1], name="near", x=1.2, samples=samples))
    table = statistics.minus_pruning(task, "acc,none", 400, 0).set_index("point")
    near = table.loc["near"]
    assert near["minus_pruning_deepest"] == pytest.approx(0.9 - (1 - 0.5 * (1 / 6) / 0.2))
    assert near["minus_pruning_deepest_low"] < near["minus_pruning_deepest"] < near["minus_pruning_deepest_high"]
    assert math.isnan(table.loc["e", "minus_pruning_deepest"]), "no pruned model saves as much as 1.5"


def test_metrics_that_are_no_means_have_no_intervals() -> None:
    task = made_results()
    for item in task.points:
        item.scores["acc,none"] = (7.0, 0.0)
    assert len(statistics.summary(task, "acc,none", "compute_reduction")) == 0


def test_front() -> None:
    assert statistics.front([(1.0, 0.9), (1.2, 0.8), (1.1, 0.7), (1.3, 0.8), (1.4, 0.1)]) == [0, 3, 4]


def test_no_interval_is_shown_that_rests_on_lines_beyond_their_ends() -> None:
    table = pd.DataFrame({"value": [0.5, 0.4], "low": [0.1, 0.3], "high": [0.9, 0.5], "extended": [0.4, 0.1]})
    shown = intervals(settled(table))
    assert shown["value"].tolist() == ["0.500", "0.400 [0.300, 0.500]"]
