"""What figures show, on points that are made by hand: ranges, bars, joined points, labels, names, chosen documents."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest
from helpers_harness import made_results, point

from dynamax_lm_eval.reports import curves, runs
from dynamax_lm_eval.reports.names import first_metric, metric_name, setting
from dynamax_lm_eval.reports.texts import changes, shown_documents
from dynamax_lm_eval.sweep.results import PointResult, TaskResults, _timing

METRIC = "acc,none"


def line(*places: tuple[float, float], documents: int = 10) -> TaskResults:
    """A full model that is right everywhere, and points of one series at (reduction, score) by rising threshold."""
    full = point("full", "full model", [1.0] * documents, 1.0, "full")
    points = []
    for i, (reduction, score) in enumerate(places):
        right = round(score * documents)
        points.append(point(f"p{i}", "calm, skip", [1.0] * right + [0.0] * (documents - right), reduction))
        points[-1].x = 0.1 * (i + 1)
    return TaskResults("b", "t", [full, *points])


def names(points: list[PointResult]) -> list[str]:
    return [found.name for found in points]


class TestRanges:
    @pytest.mark.parametrize("score", [0.0, 1.0])
    def test_equal_shares_stand_between_0_and_1(self, score: float) -> None:
        task = line((1.5, score), (1.2, score))
        task.full.samples = [{**sample, "acc": score} for sample in task.full.samples]
        task.full.scores[METRIC] = (score, 0.0)
        low, high = curves.score_range(task, METRIC)
        assert -0.1 < low < 0 and 1 < high < 1.1

    def test_shares_have_no_room_for_what_cannot_be(self) -> None:
        task = line((1.5, 0.1), (1.2, 1.0))
        task.points[1].scores[METRIC] = (0.1, 0.2)  # the bar would reach below 0
        low, high = curves.score_range(task, METRIC)
        assert -0.1 < low < 0.1 and 1 < high < 1.1

    def test_other_scores_have_room_in_their_own_measure(self) -> None:
        task = line((1.5, 1.0))
        for found in task.points:
            found.samples = [{**sample, "acc": 40.0} for sample in found.samples]
            found.scores[METRIC] = (40.0, 0.0)
        low, high = curves.score_range(task, METRIC)
        assert 30 < low < 40 < high < 50

    def test_equal_reductions_have_room(self) -> None:
        low, high = curves.reduction_range(line((1.0, 0.5)), METRIC, "compute_vs_full")
        assert low < 1 < high

    def test_one_wide_interval_does_not_press_the_others_together(self) -> None:
        table = pd.DataFrame(
            [
                {"point": "full", "compute_vs_full_low": 1.0, "compute_vs_full_high": 1.0},
                {"point": "p0", "compute_vs_full_low": 1.0, "compute_vs_full_high": 90.0},
            ]
        )
        low, high = curves.reduction_range(line((1.5, 0.5)), METRIC, "compute_vs_full", table)
        assert low < 1 and 1.5 < high < 2


def test_bars_are_95_percent_intervals() -> None:
    task = line((1.5, 0.5))
    found = task.points[1]
    found.scores[METRIC] = (0.5, 0.1)
    found.compute["compute_reduction_stderr"] = 0.05
    of_token = curves.place(task, found, METRIC, "compute_reduction")
    assert of_token.y_bar == pytest.approx((0.304, 0.696), abs=1e-3)
    assert of_token.x_bar == pytest.approx((1.402, 1.598), abs=1e-3)
    table = pd.DataFrame([{"point": "p0", "compute_vs_full_low": 1.3, "compute_vs_full_high": 1.9}])
    assert curves.place(task, found, METRIC, "compute_vs_full", table).x_bar == (1.3, 1.9)
    assert all(math.isnan(end) for end in curves.place(task, found, METRIC, "compute_vs_full").x_bar)


def test_a_reduction_without_a_standard_error_has_no_bar() -> None:
    """One document has none, and result files say null."""
    task = line((1.5, 1.0))
    task.points[1].compute["compute_reduction_stderr"] = None
    place = curves.place(task, task.points[1], METRIC, "compute_reduction", pd.DataFrame())
    assert place.x == 1.5
    assert all(math.isnan(bound) for bound in place.x_bar)


class TestJoined:
    def test_in_order_of_the_setting_where_compute_falls_along_it(self) -> None:
        """Also where scores go up and down."""
        task = line((2.0, 0.5), (1.5, 0.2), (1.1, 0.9))
        assert names(curves.joined(task, task.points[1:], METRIC, "compute_reduction")) == ["full", "p2", "p1", "p0"]

    def test_not_backwards_where_texts_get_longer(self) -> None:
        """Two blocks less save more of a token than one, and less of the run."""
        task = line((1.09, 0.9), (1.2, 0.5))
        for found, whole in zip(task.points[1:], (1.34, 1.05), strict=True):
            own = [
                {**sample, "macs": {**sample["macs"], "total": sample["macs"]["total_full"] / whole}}
                for sample in found.samples
            ]
            found.samples = own
        assert [task.reduction(p, "compute_vs_full") for p in task.points[1:]] == pytest.approx([1.34, 1.05], abs=0.01)
        assert names(curves.joined(task, task.points[1:], METRIC, "compute_vs_full")) == ["full", "p0"]

    def test_along_its_own_front_where_it_does_not(self) -> None:
        task = line((1.3, 0.5), (1.5, 0.4), (1.1, 0.4), (0.9, 0.9))
        assert names(curves.joined(task, task.points[1:], METRIC, "compute_vs_full")) == ["full", "p0", "p1"]

    def test_without_points_that_are_left_out(self) -> None:
        task = line((2.0, 0.5), (1.5, 0.9))
        task.points[1].valid = False
        assert names(curves.joined(task, task.points[1:], METRIC, "compute_reduction")) == ["full", "p1"]
        assert names(curves.pareto_front(task, METRIC, "compute_reduction")) == ["full", "p1"]


def test_ends_and_every_third_point_bear_their_setting() -> None:
    task = line(*((2 - 0.1 * i, 0.5) for i in range(9)))
    assert names(curves.labelled(task)) == ["p0", "p8", "p3", "p6"]
    assert names(curves.labelled(line((1.5, 0.5)))) == ["p0"]


class TestNames:
    def test_metrics_are_called_what_people_call_them(self) -> None:
        assert metric_name("rougeL_acc,none") == "Closer to true answers, by ROUGE-L"
        assert metric_name("consistency_exact") == "Same text as the full model"
        assert metric_name("own_score,none") == "own score"
        both = ["exact_match,strict", "exact_match,flexible"]
        assert metric_name(both[0], both) == "Exact match (strict)"

    def test_truthfulqa_does_not_begin_with_bleu_max(self) -> None:
        task = made_results()
        task.full.scores = {"bleu_max,none": (1.0, 0.0), "rougeL_acc,none": (0.5, 0.0), "consistency_exact": (1.0, 0.0)}
        assert first_metric(task) == "rougeL_acc,none"
        del task.full.scores["rougeL_acc,none"]
        assert first_metric(task) == "bleu_max,none"

    @pytest.mark.parametrize(
        ("kind", "x", "long", "short"),
        [
            ("exits", 0.8, "threshold 0.8", "0.8"),
            ("pruning", 1, "1 block pruned", "1 block"),
            ("pruning", 4, "4 blocks pruned", "4 blocks"),
            ("static", 18, "exit 18", "exit 18"),
        ],
    )
    def test_settings(self, kind: str, x: float, long: str, short: str) -> None:
        found = point("p", "line", [1.0], 1.0, kind)
        found.x = x
        assert (setting(found), setting(found, is_short=True)) == (long, short)


class TestDocuments:
    @staticmethod
    def task() -> TaskResults:
        """20 documents; one point loses the last, one gains on document 3 and changes document 5."""
        full = point("full", "full model", [1.0] * 3 + [0.0] + [1.0] * 16, 1.0, "full")
        loses = point("a", "calm", [1.0] * 3 + [0.0] + [1.0] * 15 + [0.0], 1.5)
        gains = point("b", "calm", [1.0] * 20, 1.2)
        for found, changed in ((full, ()), (loses, (19,)), (gains, (3, 5))):
            found.answers = ["other" if i in changed else "text" for i in range(20)]
        return TaskResults("b", "t", [full, loses, gains])

    def test_each_point_has_one_that_changed(self) -> None:
        assert shown_documents(self.task(), METRIC, 2) == [3, 19]

    def test_what_changed_comes_before_what_did_not(self) -> None:
        shown = shown_documents(self.task(), METRIC, 4)
        assert {3, 19} < set(shown) and len(shown) == 4
        assert 5 in shown_documents(self.task(), METRIC, 6)
        assert shown_documents(self.task(), METRIC, 100) == list(range(20))
        assert shown_documents(self.task(), METRIC, 0) == []

    def test_changes_are_counted_over_all_documents(self) -> None:
        task = self.task()
        assert [changes(task, found, METRIC) for found in task.points[1:]] == [
            {"worse": 1, "better": 0, "same": 19},
            {"worse": 0, "better": 1, "same": 19},
        ]
        for found in task.points:
            found.higher_is_better = {"acc": False}
        assert changes(task, task.points[1], METRIC) == {"worse": 0, "better": 1, "same": 19}


def test_latency_and_energy_are_read_where_a_point_has_its_own() -> None:
    means = {"time_to_first_token_ms": {"mean": 30.0}, "time_per_output_token_ms": {"mean": 7.0}}
    energy = {"energy": {"per_generated_token": 0.2}}
    overall: dict[str, Any] = {"latency": {"by_task": {"t": means}}, "seconds_total": 4.0, **energy}
    own = {"time_to_first_token_ms": 30.0, "time_per_output_token_ms": 7.0, "joules_per_token": 0.2}
    assert _timing(overall, "t", is_alone=True) == {**own, "seconds": 4.0}
    assert _timing(overall, "t", is_alone=False) == own, "the seconds are of other tasks as well"
    assert _timing({"latency": None, "energy": {"per_generated_token": None}}, "t", is_alone=True) == {}


def test_a_command_that_cannot_be_known_is_no_command(tmp_path: Any) -> None:
    (tmp_path / "sweep.yaml").write_text("[damaged")
    assert runs.commands([tmp_path]) == ["# sweep.yaml is damaged: the command is not known"]
    assert runs.commands([tmp_path / "nothing"]) == []
