"""Points against the full model: tests and intervals that are right where the truth is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers_harness import point
from scipy.stats import binom

from dynamax_lm_eval.reports import statistics
from dynamax_lm_eval.reports.paired import against_full, holm, of_points, without_loops
from dynamax_lm_eval.sweep.results import TaskResults


def results(full: Any, *others: Any, macs: Any = None) -> TaskResults:
    """Results whose documents have these scores, and this compute by point."""
    columns = [[float(value) for value in column] for column in (full, *others)]
    points = [point("full", "full model", columns[0], 1.0, "full")]
    points += [point(f"p{i}", "line", column, 1.5) for i, column in enumerate(columns[1:])]
    for one, own in zip(points, macs or (), strict=False):
        for sample, value in zip(one.samples, own, strict=True):
            sample["macs"] = {**sample["macs"], "total": float(value)}
    return TaskResults("b", "t", points)


def test_mcnemar_by_hand() -> None:
    full = [1] * 12 + [0] * 8
    worse = [1] * 5 + [0] * 7 + [1] + [0] * 7  # seven lost, one won
    (row,) = against_full(results(full, worse), "acc,none", 200).to_dict("records")
    assert row["test"] == "McNemar"
    assert row["difference"] == pytest.approx(-6 / 20)
    assert row["p_value"] == pytest.approx(2 * binom.cdf(1, 8, 0.5))
    (same,) = against_full(results(full, full), "acc,none", 200).to_dict("records")
    assert (same["difference"], same["p_value"], same["low"], same["high"]) == (0, 1, 0, 0)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_no_more_than_the_level_is_found_where_there_is_nothing() -> None:
    rng = np.random.default_rng(0)
    found = {"score": [], "answer": []}  # type: dict[str, list[float]]
    for seed in range(300):
        n = 80
        quality = rng.normal(size=n)
        full, own = quality + rng.normal(size=n), quality + rng.normal(size=n)
        found["score"].append(float(against_full(results(full, own), "acc,none", 400, seed)["p_value"][0]))
        answers = results((full > 0).astype(int), (own > 0).astype(int))
        found["answer"].append(float(against_full(answers, "acc,none", 2, seed)["p_value"][0]))
    for p_values in found.values():
        assert np.mean(np.asarray(p_values) < 0.05) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 300)


def test_intervals_cover_the_truth() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(300):
        full = rng.normal(size=100)
        own = full + 0.2 + rng.normal(scale=0.5, size=100)
        (row,) = against_full(results(full, own), "acc,none", 400, seed).to_dict("records")
        covered += row["low"] <= 0.2 <= row["high"]
    assert covered / 300 > 0.95 - 4 * np.sqrt(0.05 * 0.95 / 300)


def test_what_is_there_is_found_and_corrected_over_the_grid() -> None:
    rng = np.random.default_rng(2)
    full = rng.normal(size=200)
    points = [full + rng.normal(scale=0.3, size=200) - shift for shift in (0.5, 0.0, 0.0, 0.0)]
    table = against_full(results(full, *points), "acc,none", 2000)
    assert table["p_holm"].tolist() == holm(table["p_value"].tolist())
    assert table["p_holm"][0] < 0.01 and (table["p_holm"][1:] > 0.05).all()
    assert len(against_full(results(full, *points), "acc,none", 0)) == 0


def test_compute_against_the_full_run_has_its_interval() -> None:
    rng = np.random.default_rng(3)
    macs = [rng.uniform(50, 150, 100), rng.uniform(40, 120, 100)]
    task = results(np.zeros(100), np.zeros(100), macs=macs)
    row = of_points(task, 2000).set_index("point").loc["p0"]
    value = task.vs_full(task.points[1])
    assert row["compute_vs_full_low"] < value < row["compute_vs_full_high"]
    assert row["compute_vs_full_high"] - row["compute_vs_full_low"] == pytest.approx(0.2, abs=0.08)
    assert row["median_vs_full"] == pytest.approx(np.median(macs[0] / macs[1]))


def test_what_texts_that_loop_hide() -> None:
    """Two of forty documents loop in one run each; they hold most compute, and all that is saved."""
    macs = [np.full(40, 100.0), np.full(40, 100.0)]
    macs[0][0], macs[1][0] = 4000, 400
    macs[0][1], macs[1][1] = 100, 1000
    score = np.ones(40)
    own = score.copy()
    own[:2] = 0
    task = results(score, own, score, macs=[*macs, macs[0]])
    task.full.looping = [True, *[False] * 39]
    task.points[1].looping = [False, True, *[False] * 38]
    table = without_loops(task, "acc,none", 200).set_index("point")
    found, other = table.loc["p0"], table.loc["p1"]
    assert (found["left_out"], found["documents"]) == (2, 38), "left out whichever of the two runs loops"
    assert task.vs_full(task.points[1]) > 1.4 and found["vs_full"] == 1 and found["difference"] == 0
    assert (other["left_out"], other["documents"]) == (1, 39)
    medians = of_points(task, 0).set_index("point")["median_vs_full"]
    assert medians["p0"] == 1
    for one in task.points:
        one.looping = [True] * 40
    row = without_loops(task, "acc,none", 20).set_index("point").loc["p0"]
    assert row["documents"] == 0 and len(without_loops(results(score, own), "acc,none", 20)) == 0


def test_report_tables_without_loops_are_differences_on_what_is_left() -> None:
    score, own = np.tile([1.0, 0.0], 20), np.tile([1.0, 0.0], 20)
    score[0], own[0], own[2] = 1, 0, 0
    task = results(score, own)
    task.full.looping = [True, *[False] * 39]
    rows = statistics.summary(task, "acc,none", "compute_reduction", 50, without_loops=True).set_index("what")
    assert rows.loc["difference at 1.5", "value"] == pytest.approx(-1 / 39)
    whole = statistics.summary(task, "acc,none", "compute_reduction", 50).set_index("what")
    assert whole.loc["score at 1.5", "value"] == pytest.approx(own.mean())
