"""Quality of exits and the curve that is predicted for them."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import random_ids
from helpers_engine import EXITS, exits_config
from helpers_training import frozen

from dynamax_lm_eval.exits.classifiers import ClassifierOptions, ExitClassifiers
from dynamax_lm_eval.frozen.text import HeldOut
from dynamax_lm_eval.training import evaluation
from dynamax_lm_eval.training.curve import beginnings


class TestEvaluation:
    def test_quality_on_known_numbers(self) -> None:
        confidence = np.asarray([0.1, 0.4, 0.35, 0.8, 0.95, 0.6])
        label = np.asarray([False, False, True, True, True, False])
        quality = evaluation.exit_quality(confidence, label)
        # Of the nine pairs of a right and a wrong one, seven are in order.
        assert quality["auroc"] == pytest.approx(7 / 9)
        assert quality["thresholds"]["0.5"] == {"precision": 2 / 3, "recall": 2 / 3, "share": 0.5}
        assert quality["thresholds"]["0.9"]["precision"] == 1
        # Every number is alone in its bin.
        assert quality["expected_calibration_error"] == pytest.approx(np.abs(confidence - label).mean())
        assert sum(quality["histogram"]["tokens"]) == 6
        assert evaluation.exit_quality(confidence, np.ones(6, dtype=bool))["auroc"] is None

    def test_errors_of_auroc_are_over_documents(self) -> None:
        """Against the spread over samples, where tokens of a document are alike in confidence and in label."""
        rng = np.random.default_rng(0)
        found, errors, as_tokens = [], [], []
        for _ in range(300):
            ease = rng.normal(size=60)
            document = np.repeat(np.arange(60), rng.integers(5, 30, 60))
            label = rng.random(len(document)) < 1 / (1 + np.exp(-2 * ease[document]))
            confidence = label + 1.5 * rng.normal(size=60)[document] + rng.normal(size=len(document))
            found.append(evaluation.auroc(confidence, label))
            errors.append(evaluation.auroc_stderr(confidence, label, document))
            as_tokens.append(evaluation.auroc_stderr(confidence, label, np.arange(len(document))))
        spread = np.std(np.asarray(found, dtype=float))
        assert np.mean(np.asarray(errors, dtype=float)) == pytest.approx(spread, rel=0.1)
        assert np.mean(np.asarray(as_tokens, dtype=float)) < 0.6 * spread
        assert evaluation.auroc_stderr(confidence, label, np.zeros(len(document))) is None
        assert evaluation.auroc_stderr(confidence, np.ones(len(document), dtype=bool), document) is None

    def test_later_exits_are_judged_on_the_tokens_that_reach_them(self) -> None:
        confidences = np.asarray([[0.95, 0.85, 0.2, 0.1, 0.3], [0.9, 0.8, 0.4, 0.6, 0.7]])
        labels = np.asarray([[True] * 5, [True, True, True, False, True]])
        assert evaluation.auroc(confidences[1], labels[1]) == pytest.approx(3 / 4)
        later = evaluation.reaching(confidences, labels, 1)
        assert later["0.8"] == {"share": pytest.approx(3 / 5), "auroc": pytest.approx(1 / 2)}
        assert later["0.9"]["share"] == pytest.approx(4 / 5)
        assert evaluation.reaching(confidences, labels, 0)["0.5"]["share"] == 1, "all tokens come to the first exit"

    def test_the_predicted_curve_equals_what_the_engine_does_when_states_do_not_matter(self) -> None:
        """Tokens of a single row that exit where predicted cost what is predicted."""
        config = exits_config(classifiers=("calm",))
        classifiers = ExitClassifiers(("calm",), EXITS, 32, "silu", ClassifierOptions())
        seen = evaluation.Observations(
            (3,),
            np.zeros((3, 3), dtype=bool),
            np.asarray([[True, True, False], [True, True, True], [True, False, True]]),
            {"calm": np.asarray([[0.9, 0.9, 0.1], [0.0, 0.0, 0.8], [0.9, 0.9, 0.9]])},
        )
        cost = frozen().backbone.cost
        point = evaluation.predicted_point(seen, "calm", 0.7, config, classifiers, cost, "recompute")
        # The first token of a row may not exit; the others leave at 2 (right) and 3 (right).
        assert point["share_exiting"] == 1
        assert point["agreement"] == 1
        assert point["mean_exit_layer"] == 2.5
        full = sum(block.at(1) + block.at(2) for block in cost.blocks)
        spent = sum(block.at(1) for block in cost.blocks[:2]) + sum(block.at(2) for block in cost.blocks[:3])
        spent += 64 * (1 + 2) + sum(block.state_recompute for block in (*cost.blocks[2:], *cost.blocks[3:]))
        assert point["compute_reduction"] == pytest.approx(full / spent)


class TestTokensOfTheCurve:
    def test_of_many_documents_each_gives_its_beginning(self) -> None:
        rows = [random_ids(64, i) for i in range(100)]
        texts, number = beginnings(HeldOut(rows, list(range(100)), 100), 800)
        assert texts == [row[:20] for row in rows[:40]]
        assert number == list(range(40))

    def test_of_few_documents_each_gives_more_rows(self) -> None:
        rows = [random_ids(10, i) for i in range(20)]
        texts, number = beginnings(HeldOut(rows, [i // 10 for i in range(20)], 2), 50)
        assert [len(text) for text in texts] == [10, 10, 5, 10, 10, 5]
        assert number == [0, 0, 0, 1, 1, 1]

    def test_short_documents_are_made_up_for_by_others(self) -> None:
        rows = [random_ids(2 if i % 2 else 30, i) for i in range(200)]
        texts, number = beginnings(HeldOut(rows, list(range(200)), 200), 400)
        assert sum(map(len, texts)) in range(398, 401)
        assert number == list(range(0, 80, 2)), "rows of two tokens show nothing"

    def test_the_fewest_tokens_are_one_piece(self) -> None:
        texts, _ = beginnings(HeldOut([random_ids(9, i) for i in range(50)], list(range(50)), 50), 3)
        assert [len(text) for text in texts] == [3]
