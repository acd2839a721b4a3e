"""Quality of exits and the curve that is predicted for them."""

from __future__ import annotations

import numpy as np
import pytest
from helpers_engine import EXITS, exits_config
from helpers_training import frozen

from dynamax_lm_eval.exits.classifiers import ClassifierOptions, ExitClassifiers
from dynamax_lm_eval.training import evaluation


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
