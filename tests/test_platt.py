"""Calibrated confidences: the scale and the shift, what they are fitted to, and that they are in the weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_ids
from helpers_engine import EXITS, KINDS, varied_classifiers
from helpers_training import frozen, train, training_options
from scipy.optimize import minimize
from test_training_resume import tensors

from dynamax_lm_eval.exits.classifiers import ExitClassifiers
from dynamax_lm_eval.exits.confirmers import Confirmer
from dynamax_lm_eval.frozen.model import load_backbone
from dynamax_lm_eval.frozen.observe import Observations, observe
from dynamax_lm_eval.training import command, confirming, platt
from dynamax_lm_eval.training.batches import Answer
from dynamax_lm_eval.training.evaluation import calibration_error
from dynamax_lm_eval.training.options import RunOptions

BATCHES = [[random_ids(40, seed), random_ids(24, seed + 50)] for seed in range(6)]
ROWS = [row for rows in BATCHES for row in rows]


def made_up(scale: float, shift: float, count: int = 400_000) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds, and labels that are 1 with probability sigmoid(scale z + shift)."""
    rng = np.random.default_rng(0)
    z = 3 * rng.standard_normal(count)
    return z, rng.random(count) < 1 / (1 + np.exp(-scale * z - shift))


class TestFit:
    @pytest.mark.parametrize(
        ("scale", "shift"), [(1.0, 0.0), (0.4, -1.5), (3.0, 0.7), pytest.param(0.02, 4.0, marks=pytest.mark.slow)]
    )
    def test_known_scales_are_found(self, scale: float, shift: float) -> None:
        found = platt.fit_scaling(*made_up(scale, shift))
        assert found is not None
        assert found == pytest.approx((scale, shift), abs=0.03)

    def test_it_is_where_scipy_finds_the_least_loss(self) -> None:
        z, labels = made_up(0.5, -1, 300)
        n1 = labels.sum()
        targets = np.where(labels, (n1 + 1) / (n1 + 2), 1 / (300 - n1 + 2))

        def loss(x: np.ndarray) -> float:
            p = 1 / (1 + np.exp(-x[0] * z - x[1]))
            return float(-(targets * np.log(p) + (1 - targets) * np.log(1 - p)).sum())

        assert platt.fit_scaling(z, labels) == pytest.approx(minimize(loss, [1, 0], tol=1e-10).x, abs=1e-5)

    def test_labels_that_confidences_part_give_a_finite_scale(self) -> None:
        z = np.asarray([-2.0, -1.0, 1.0, 200.0])
        found = platt.fit_scaling(z, z > 0)
        assert found is not None
        assert 0 < found.scale < 100

    @pytest.mark.parametrize("labels", [np.zeros(4, bool), np.ones(4, bool), np.asarray([True, True, False, False])])
    def test_what_would_turn_the_order_around_is_left(self, labels: np.ndarray) -> None:
        assert platt.fit_scaling(np.asarray([-2.0, -1.0, 1.0, 2.0]), labels) is None

    def test_confirmers_are_found(self) -> None:
        """Labels drawn by a known confirmer give it back."""
        rng = np.random.default_rng(0)
        known = Confirmer()
        known.weight.copy_(torch.tensor([0.8, 0.5, 1.5]))
        known.bias.fill_(-1.0)
        log_odds = torch.from_numpy(rng.normal(0, 2, 200_000))
        first = rng.uniform(0.05, 0.99, 200_000)
        two_best = torch.from_numpy(np.stack([first, np.minimum(first, 1 - first) * rng.random(200_000)], 1))
        probability = known(log_odds, two_best).numpy()
        found = Confirmer()
        confirming.fit_confirmer(found, log_odds, two_best, rng.random(200_000) < probability)
        assert found(log_odds, two_best).numpy() == pytest.approx(probability, abs=0.02)
        same = Confirmer()
        confirming.fit_confirmer(same, log_odds, two_best, np.ones(200_000, dtype=bool))
        assert same(log_odds, two_best).numpy() == pytest.approx(two_best[:, 0].numpy(), abs=1e-6)

    def test_undone(self) -> None:
        z = np.asarray([-30.0, -1.0, 0.0, 2.5])
        scaled = 1 / (1 + np.exp(-(0.3 * z - 1)))
        np.testing.assert_allclose(platt.Scaling(0.3, -1).undone(scaled), 1 / (1 + np.exp(-z)), rtol=1e-9)


class TestFolded:
    @pytest.fixture(scope="class")
    def seen(self) -> tuple[Observations, Observations, platt.Scalings, ExitClassifiers]:
        classifiers = varied_classifiers()
        before = observe(frozen(top_k=30), classifiers, ROWS, 64)
        scalings = platt.calibrate(frozen(top_k=30), classifiers, BATCHES)
        return before, observe(frozen(top_k=30), classifiers, ROWS, 64), scalings, classifiers

    def test_log_odds_become_what_was_fitted(
        self, seen: tuple[Observations, Observations, platt.Scalings, ExitClassifiers]
    ) -> None:
        before, after, scalings, _ = seen
        fitted = [(kind, i, scalings[kind][layer]) for kind in KINDS for i, layer in enumerate(EXITS)]
        assert sum(scaling is not None for *_, scaling in fitted) >= 4
        for kind, i, scaling in fitted:
            was, now = before.confidences[kind][i], after.confidences[kind][i]
            if scaling is None:
                np.testing.assert_array_equal(was, now)
                continue
            z = np.log(was) - np.log1p(-was)
            np.testing.assert_allclose(now, 1 / (1 + np.exp(-scaling.scale * z - scaling.shift)), atol=1e-5)
            # Confidences that differ by more than rounding are in the same order.
            order = np.argsort(z, kind="stable")
            assert np.diff(now[order]).min() > -1e-6
            assert calibration_error(now, before.within_k[i]) < calibration_error(was, before.within_k[i]) + 0.02

    def test_mean_confidence_is_the_share_of_labels(
        self, seen: tuple[Observations, Observations, platt.Scalings, ExitClassifiers]
    ) -> None:
        """On the text of the fit: the derivative by the shift is zero there."""
        _, after, scalings, _ = seen
        for kind in KINDS:
            for i, layer in enumerate(EXITS):
                if scalings[kind][layer] is not None:
                    assert after.confidences[kind][i].mean() == pytest.approx(after.within_k[i].mean(), abs=5e-3)

    def test_it_is_written_down(self, seen: tuple[Observations, Observations, platt.Scalings, ExitClassifiers]) -> None:
        before, after, scalings, _ = seen
        lines = platt.report({**scalings, "calm": {**scalings["calm"], 2: None}}, after, EXITS)
        assert lines["calm"]["2"] is None
        for kind in KINDS:
            for i, layer in enumerate(EXITS):
                if (line := lines[kind][str(layer)]) is not None:
                    expected = calibration_error(before.confidences[kind][i], before.within_k[i])
                    assert line["expected_calibration_error_before"] == pytest.approx(expected, abs=1e-4)

    def test_prompts_of_answers_do_not_count(self) -> None:
        """They may not leave: what is fitted is the same whatever would be right there."""
        calm, again = varied_classifiers(), varied_classifiers()
        rows = [[Answer(row, 7) for row in rows] for rows in BATCHES]
        found = platt.calibrate(frozen(top_k=30), calm, rows)
        pass_ = frozen(top_k=30)
        label = pass_.label

        def labelled_only(batch: object, positions: torch.Tensor, *args: object, **wanted: bool) -> object:
            assert len(positions) == 40 + 24 - 14
            return label(batch, positions, *args, **wanted)  # type: ignore[arg-type]

        pass_.label = labelled_only  # type: ignore[method-assign, assignment]
        assert platt.calibrate(pass_, again, rows) == found


class TestCommand:
    def test_only_the_last_layers_differ(self, model_folder: Path, texts: Path, tmp_path: Path) -> None:
        """Text is held out for it either way here, so that both train on the same."""
        text = command._data

        def unused(*args: object) -> command._Text:
            return text(*args)._replace(calibration=[])  # type: ignore[arg-type]

        calibrated = train(model_folder, texts, tmp_path / "a", top_k=30)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(command, "_data", unused)
            plain = train(model_folder, texts, tmp_path / "b", top_k=30)
        results = json.loads((tmp_path / "a" / "evaluation.json").read_text())["calibration"]
        assert set(results) == {"mamba", "calm"}
        theirs, changed = tensors(plain), copy.deepcopy(tensors(calibrated))
        for name, tensor in changed.items():
            if name.startswith("confirmers."):
                begun = torch.tensor([0.0, 1.0, 0.0]) if name.endswith("weight") else torch.tensor(0.0)
                assert torch.equal(theirs[name], begun)
                labels_differ = results["calm"][name.split(".")[2]] is not None
                assert torch.equal(tensor, begun) != labels_differ
                continue
            kind, layer, part = name.removeprefix("by_kind.").split(".", 2)
            line = results[kind][layer]
            scale, shift = (1.0, 0.0) if line is None else (line["scale"], line["shift"])
            expected = theirs[name] * scale if part.startswith("out_proj") else theirs[name]
            if part == "out_proj.bias":
                expected = expected + torch.tensor([-shift / 2, shift / 2])
            torch.testing.assert_close(tensor, expected)
        evaluation = json.loads((tmp_path / "a" / "evaluation.json").read_text())
        assert set(evaluation["confirmers"]) == {"read_out", "mamba", "calm"}
        assert "| read-out alone |" in (tmp_path / "a" / "README.md").read_text()
        measured = evaluation["classifiers"]["calm"]["exits"]["2"]
        was, now = results["calm"]["2"]["expected_calibration_error_before"], measured["expected_calibration_error"]
        assert f"{was:.3f} to {now:.3f}" in (tmp_path / "a" / "README.md").read_text()

    def test_texts_are_apart(self, model_folder: Path, texts: Path, tmp_path: Path) -> None:
        options = training_options(model_folder, texts)
        backbone = load_backbone(options.reading(RunOptions(device="cpu")))
        text = command._data(options, backbone, (), tmp_path)
        assert sum(len(row) for batch in text.calibration for row in batch) == 128
        trained = [document for document in text.documents(0, 0) if document]
        held = [*text.held_out.rows, *(row for batch in text.calibration for row in batch)]
        assert not any(row == document[i : i + len(row)] for row in held for document in trained for i in range(0, 400))
        assert not any(row in text.held_out.rows for batch in text.calibration for row in batch)
        off = command._data(training_options(model_folder, texts, calibrate=False), backbone, (), tmp_path)
        assert off.calibration == []
        assert sum(map(bool, off.documents(0, 0))) > len(trained)
