"""Thresholds per exit: the search finds what trying everything finds, and its file leads to a calibration."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TASKS
from helpers_harness import exit_model, save_exits

from dynamax_lm_eval.calibration import command
from dynamax_lm_eval.calibration.options import CalibrateOptions
from dynamax_lm_eval.cli import main
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.requests import ScoringRequest
from dynamax_lm_eval.engine.scoring import score_all
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.resolve import policy_of_exits
from dynamax_lm_eval.measure import exit_thresholds
from dynamax_lm_eval.measure.exit_thresholds import (
    best_cascade,
    cascade_of,
    compared,
    exit_costs,
    refusal_costs,
    search,
)
from dynamax_lm_eval.measure.options import SearchOptions
from dynamax_lm_eval.measure.threshold_search import (
    FORMAT,
    Recorded,
    ThresholdPath,
    agreement_at,
    best_path,
    exits_at,
    improved,
    outcome,
)


def made(tokens: int, exits: int, seed: int = 0, texts: int = 20) -> Recorded:
    """Exits of unequal worth: the first is often wrong where it is sure, later ones less."""
    generator = np.random.default_rng(seed)
    ease = generator.random(tokens)
    confidence = np.clip(ease + generator.normal(0, 0.2, (exits, tokens)), 0, 0.999)
    right = generator.random((exits, tokens)) < ease * np.linspace(0.7, 1, exits)[:, None]
    agrees = np.vstack([right, np.ones((1, tokens))]).astype(np.float64)
    evaluation = np.full(exits, 0.004)
    return Recorded(confidence, agrees, np.linspace(0.5, 1, exits + 1), evaluation, np.arange(tokens) * texts // tokens)


def test_tokens_leave_at_the_first_exit_that_is_sure_enough() -> None:
    recorded = Recorded(
        np.array([[0.2, 0.8, 0.9], [0.9, 0.8, 0.1]]),
        np.array([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 1.0]]),
        np.array([0.5, 0.7, 1.0]),
        np.array([0.01, 0.02]),
        np.zeros(3, dtype=np.int64),
    )
    assert exits_at(recorded, np.array([0.85, 0.8])).tolist() == [1, 1, 0]
    assert exits_at(recorded, np.array([1.0, 1.0])).tolist() == [2, 2, 2], "1 never exits"
    agreement, fraction = outcome(recorded, np.array([0.85, 0.8]))
    assert (agreement, fraction) == (pytest.approx(2 / 3), pytest.approx((0.73 + 0.73 + 0.51) / 3))
    assert outcome(recorded, np.array([1.0, 0.8]))[1] == pytest.approx((0.72 + 0.72 + 1.02) / 3), "1 asks nobody"
    assert outcome(recorded, np.array([1.0, 1.0])) == (1, 1)
    of_tokens = np.array([[0.85, 1.0, 0.85], [0.8, 0.8, 0.8]])
    assert outcome(recorded, of_tokens)[1] == pytest.approx((0.73 + 0.72 + 0.51) / 3), "thresholds of each token"


@pytest.mark.parametrize("price", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("is_cascade", [False, True])
def test_no_single_threshold_can_be_changed_for_the_better(price: float, is_cascade: bool) -> None:
    recorded = cascades(400, 3, 0.4, 0.1) if is_cascade else made(400, 3)

    def worth(thresholds: np.ndarray) -> float:  # type: ignore[type-arg]
        agreement, fraction = outcome(recorded, thresholds)
        return agreement - price * fraction

    found = improved(recorded, price, np.ones(3))
    for e, k in product(range(3), range(201)):
        changed = found.copy()
        changed[e] = k / 200
        assert worth(changed) <= worth(found) + 1e-9


def test_the_path_is_as_good_as_any_shared_threshold_on_what_was_searched() -> None:
    recorded = made(3000, 4)
    path = best_path(recorded, np.geomspace(0.05, 20, 60))
    points = [outcome(recorded, np.asarray(thresholds)) for thresholds in path]
    fractions = [fraction for _, fraction in points]
    assert fractions == sorted(fractions, reverse=True), "from the most careful on"
    for threshold in np.linspace(0.3, 0.95, 14):
        agreement, fraction = outcome(recorded, np.full(4, threshold))
        best = agreement_at(points, fraction)
        assert np.isnan(best) or best >= agreement - 0.005, "up to the straight lines between points"


def test_gains_are_measured_on_other_documents() -> None:
    found = compared(made(6000, 3), seed=0)
    assert found["gains"]
    for gain in found["gains"]:
        assert gain["gain"] == pytest.approx(gain["per_exit"] - gain["shared"])
        assert gain["gain_stderr"] > 0
    again = compared(made(6000, 3), seed=0)
    assert found == again


def test_costs_are_those_of_the_engine(model_folder: Path, tmp_path: Path) -> None:
    """A text all of whose tokens leave at one exit, as the engine runs and accounts it."""
    lm = exit_model(model_folder, exits=str(save_exits(model_folder, tmp_path / "exits")))
    assert lm.exits is not None
    engine: Engine = lm.engine
    policy = policy_of_exits(lm.exits.config, "calm", 0.5, exit_scope="all")
    cost, evaluation = exit_costs(engine, policy, 12)
    costs = cost + np.append(np.cumsum(evaluation), evaluation.sum())
    forced = policy_of_exits(lm.exits.config, "calm", 0.0, exit_scope="all")
    (scoring,) = score_all(engine, [ScoringRequest(list(range(12)), 1, [[0]] * 12, forced)], 1)
    assert costs[0] == pytest.approx(1 / engine.account(scoring.trace, forced).compute_reduction)
    assert costs[-1] > 1, "classifiers were asked at every exit for nothing"
    assert list(costs) == sorted(costs)
    # Where a threshold is 1 the engine asks no classifier.
    later = (1.0, *(0.0 for _ in policy.exit_layers[1:]))
    forced = replace(forced, thresholds=later)
    (scoring,) = score_all(engine, [ScoringRequest(list(range(12)), 1, [[0]] * 12, forced)], 1)
    seen = Recorded(np.ones((len(later), 1)) * 0.9, np.ones((len(later) + 1, 1)), cost, evaluation, np.zeros(1, int))
    fraction = 1 / engine.account(scoring.trace, forced).compute_reduction
    assert outcome(seen, np.asarray(later))[1] == pytest.approx(fraction)
    assert outcome(seen, np.ones(len(later)))[1] == pytest.approx(1)


def cascades(tokens: int, exits: int, propose: float, read: float) -> Recorded:
    """A cascade whose read-out knows more than its classifier."""
    classifier = made(tokens, exits)
    confirmed = np.clip(classifier.agrees[:-1] * 0.5 + classifier.confidence * 0.5, 0, 0.999)
    return cascade_of(classifier, confirmed, np.full(exits, read), propose)


def test_a_refused_proposal_costs_a_read() -> None:
    classifier = Recorded(
        np.array([[0.2, 0.8, 0.9], [0.9, 0.8, 0.1]]),
        np.ones((3, 3)),
        np.array([0.5, 0.7, 1.0]),
        np.array([0.01, 0.02]),
        np.zeros(3, dtype=np.int64),
    )
    confirmed = np.array([[0.9, 0.4, 0.9], [0.7, 0.4, 0.9]])
    recorded = cascade_of(classifier, confirmed, np.array([0.1, 0.2]), 0.5)
    thresholds = np.array([0.6, 0.6])
    assert exits_at(recorded, thresholds).tolist() == [1, 2, 0], "proposed, and then confirmed"
    # The second is proposed and refused twice; the read of a token that leaves is its own.
    of_tokens = [0.73, 1.03 + 0.1 + 0.2, 0.51]
    assert outcome(recorded, thresholds)[1] == pytest.approx(np.mean(of_tokens))
    assert outcome(recorded, np.array([1.0, 0.6]))[1] == pytest.approx(np.mean([0.72, 1.02 + 0.2, 1.02]))
    assert outcome(recorded, np.array([[0.6] * 3, [1.0] * 3]))[1] == pytest.approx(np.mean([1.01, 1.11, 0.51]))


def test_what_was_not_proposed_stays_at_a_threshold_of_0() -> None:
    """As in the engine, where only proposals are read."""
    classifier = made(400, 3)
    confirmed = np.clip(classifier.confidence, 0, 0.999)
    recorded = cascade_of(classifier, confirmed, np.full(3, 0.1), 0.8)
    left = exits_at(recorded, np.zeros(3))
    proposed = classifier.confidence >= 0.8
    assert left.tolist() == np.vstack([proposed, np.ones((1, 400), dtype=bool)]).argmax(axis=0).tolist()
    for thresholds in best_path(recorded, np.geomspace(0.05, 20, 60)):
        exits = exits_at(recorded, np.asarray(thresholds))
        assert all(e == 3 or proposed[e, n] for n, e in enumerate(exits))


def test_what_is_proposed_is_chosen_by_what_reads_cost() -> None:
    """Reads for nothing let everything be asked; dear ones only what is likely to be confirmed."""
    chosen = []
    for read in (0.0, 0.3):
        found = best_cascade({propose: cascades(6000, 3, propose, read) for propose in (0.0, 0.8)}, seed=0)
        chosen.append(found["propose"])
        assert {line["propose"] for line in found["proposals"]} == {0.0, 0.8}
        assert found["gains"]
    assert chosen == [0.0, 0.8]


def test_costs_of_refused_reads_are_those_of_the_engine(model_folder: Path, tmp_path: Path) -> None:
    lm = exit_model(model_folder, exits=str(save_exits(model_folder, tmp_path / "exits")))
    assert lm.exits is not None
    engine: Engine = lm.engine
    policy = policy_of_exits(lm.exits.config, "calm", 0.9999, exit_scope="all")
    cost, evaluation = exit_costs(engine, policy, 12)
    cascade = replace(policy, confidence="cascade", propose=0.0)
    (scoring,) = score_all(engine, [ScoringRequest(list(range(12)), 1, [[0]] * 12, cascade)], 1)
    every = (1 << len(policy.exit_layers)) - 1
    assert set(scoring.trace.refused) == {every}, "all were proposed, and nothing was confirmed"
    exits = len(policy.exit_layers)
    seen = Recorded(np.ones((exits, 1)), np.ones((exits + 1, 1)), cost, evaluation, np.zeros(1, int))
    seen = cascade_of(seen, np.zeros((exits, 1)), refusal_costs(engine, policy, 12), 0.0)
    fraction = 1 / engine.account(scoring.trace, cascade).compute_reduction
    assert outcome(seen, np.full(exits, 0.9999))[1] == pytest.approx(fraction)


def test_errors_are_over_documents() -> None:
    """Rows that are cut from few documents are no separate evidence: the whole document agrees, or none of it."""
    rng = np.random.default_rng(0)
    errors = []
    for each in (1, 25):
        kinds = np.repeat(rng.random(6000 // each) < 0.7, each).astype(np.float64)
        confidence = np.clip(rng.normal(0.5, 0.2, (1, len(kinds))), 0, 0.999)
        agrees = np.vstack([kinds, np.ones(len(kinds))])
        document = np.arange(len(kinds)) // 25
        found = Recorded(confidence, agrees, np.array([0.5, 1.0]), np.array([0.001]), document)
        sums = exit_thresholds._by_document(found, np.array([0.5]))
        assert sums.shape == (3, len(kinds) // 25)
        errors.append(np.std(sums[1] / sums[0]))
    assert errors[1] > 3 * errors[0]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    sentences = ["the quick brown fox jumps over the lazy dog", "a stitch in time saves nine", "who wrote Hamlet?"]
    path.write_text("".join(json.dumps({"text": " ".join(sentences[i % 3 :] * 4)}) + "\n" for i in range(40)))
    return path


def test_the_file_leads_to_a_calibration(
    model_folder: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exits = save_exits(model_folder, tmp_path / "exits")
    file = tmp_path / "path.json"
    given = ["--backbone", str(model_folder), "--exits", str(exits), "--dataset", str(texts), "--tokens", "600"]
    given += ["--classifier", "calm", "--seq_len", "32", "--device", "cpu", "--output", str(file)]
    assert main(["exit-thresholds", *given]) == 0
    assert "agreement, per exit" in capsys.readouterr().out
    path = ThresholdPath.load(file)
    assert path.scorer == "calm"
    assert path.documents == 19, "600 tokens, of each document at most a row of 32"
    FORMAT.write(tmp_path / "earlier.json", {name: getattr(path, name) for name in vars(path) if name != "documents"})
    assert ThresholdPath.load(tmp_path / "earlier.json").documents is None, "files of earlier releases can be read"
    assert all(len(thresholds) == len(path.exit_layers) for thresholds in path.thresholds)
    assert main(["exit-thresholds", *given]) == 2, "it is not written over"

    options = CalibrateOptions(
        backbone=str(model_folder),
        tasks="tiny_generate",
        output=str(tmp_path / "out"),
        per_exit=str(file),
        confidence="calm",
        tolerance=0.99,
        level=0.9,
        model_args=f"exits={exits}",
        include_path=str(TASKS),
        device="cpu",
        test=False,
    )
    certificate, _ = command.calibrate(options)
    assert certificate.candidates == [list(thresholds) for thresholds in path.thresholds]


def test_thresholds_of_a_cascade_lead_to_its_calibration(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    exits = save_exits(model_folder, tmp_path / "exits")
    file = tmp_path / "path.json"
    given = {"backbone": str(model_folder), "exits": str(exits), "dataset": str(texts), "tokens": 600, "seq_len": 32}
    options = SearchOptions(**given, classifier="calm", device="cpu", output=str(file), propose="0.4,0.1")  # type: ignore[arg-type]
    found = search(options)
    assert (found.scorer, ThresholdPath.load(file)) == ("cascade:calm", found)
    assert found.propose in (0.1, 0.4)
    assert found.tokens == 600 - 19, "the first of each row may not leave"
    assert f"propose={found.propose:g}, of 0.1, 0.4" in exit_thresholds.table(found)

    wanted: dict[str, Any] = {"backbone": str(model_folder), "tasks": "tiny_generate", "per_exit": str(file)}
    wanted |= {"tolerance": 0.99, "level": 0.9, "model_args": f"exits={exits}", "device": "cpu", "test": False}
    wanted |= {"include_path": str(TASKS), "output": str(tmp_path / "out")}
    certificate, _ = command.calibrate(CalibrateOptions(**wanted))
    assert certificate.candidates == [list(thresholds) for thresholds in found.thresholds]
    bound = [certificate.model[f"policy.{name}"] for name in ("confidence", "classifier", "propose")]
    assert bound == ["cascade", "calm", found.propose]
    assert found.confirm == "read_out", "these exits have no confirmers"
    for other, message in ({"confidence": "calm"}, "--confidence calm does not fit"), ({"propose": 0.7}, "--propose"):
        with pytest.raises(UserError, match=message):
            command.calibrate(CalibrateOptions(**(wanted | other)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"propose": "0.5,often"}, "--propose must be numbers"),
        ({"propose": "1"}, "--propose must be numbers"),
        ({"tokens": 3}, "--tokens"),
        ({"documents": 3}, "--documents must be at least 4"),
        ({"tokens": 100, "seq_len": 40}, "are of 3 documents"),
        ({"classifier": "guess"}, "--classifier"),
        ({"dtype": "int8"}, "--dtype must be auto, float32, bfloat16 or float16, got .int8"),
        ({"seq_len": 1}, "--seq_len must be at least 2, got 1"),
        ({"state_mode": "forget"}, "--state_mode"),
        ({"output": "no/such/folder/x.json"}, "there is no folder"),
        ({}, "at most 500, by --documents=100.*--tokens=50000 are wanted; lower it or --documents"),
        ({"exits": None}, "no exits"),
    ],
)
def test_refusals(model_folder: Path, tmp_path: Path, texts: Path, changed: dict[str, str], message: str) -> None:
    exits = save_exits(model_folder, tmp_path / "exits")
    given = {"exits": str(exits), "output": str(tmp_path / "x.json"), **changed}
    with pytest.raises(UserError, match=message):
        search(SearchOptions(backbone=str(model_folder), dataset=str(texts), device="cpu", **given))  # type: ignore[arg-type]
