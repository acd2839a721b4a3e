"""Calibration: the procedures keep their promises, and a certificate is used for what it covers and nothing else."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import numpy.typing as npt
import pytest
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file
from test_lm import TASKS
from test_trained_exits import save_exits

from dynamax_lm_eval.calibration import command
from dynamax_lm_eval.calibration.certificate import Certificate
from dynamax_lm_eval.calibration.command import CERTIFICATE_NAME, TEST_SAMPLES_NAME, split_documents
from dynamax_lm_eval.calibration.losses import LossKind
from dynamax_lm_eval.calibration.options import CalibrateOptions
from dynamax_lm_eval.calibration.testing import (
    BOUNDS,
    betting_p_value,
    conformal_risk_control,
    fewest_documents,
    hoeffding_bentkus_p_value,
    learn_then_test,
)
from dynamax_lm_eval.cli import main
from dynamax_lm_eval.config import UserError
from dynamax_lm_eval.exits.checkpoint import WEIGHTS_NAME, ExitCheckpoint
from dynamax_lm_eval.lm import DynamaxLM

Floats = npt.NDArray[np.float64]
DRAWS = 2000


# The procedures, on losses with known expectations.

#: Expected loss of each candidate, the most careful first: rising, and not.
CURVES = {
    "monotone": np.array([0.01, 0.03, 0.06, 0.09, 0.12, 0.2]),
    "not monotone": np.array([0.02, 0.11, 0.05, 0.15, 0.08, 0.02]),
    "at the edge": np.array([0.101, 0.101, 0.101]),
}


def drawn(curve: Floats, n: int, seed: int, kind: str) -> Floats:
    """(C, n) losses with these expectations: the same documents are hard for all candidates."""
    generator = np.random.default_rng(seed)
    hard = generator.random(n)
    if kind == "coins":
        return (hard < curve[:, None]).astype(np.float64)
    return np.where(hard < 2 * curve[:, None], generator.random((len(curve), n)), 0.0)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("kind", ["coins", "uniform"])
@pytest.mark.parametrize("name", CURVES)
def test_learn_then_test_is_wrong_at_most_as_often_as_its_level(name: str, kind: str, bound: Any) -> None:
    curve, tolerance, level, n = CURVES[name], 0.1, 0.1, 150
    wrong = 0
    for seed in range(DRAWS):
        chosen = learn_then_test(drawn(curve, n, seed, kind), tolerance, level, bound).chosen
        wrong += chosen is not None and curve[chosen] > tolerance
    assert wrong / DRAWS <= level + 3 * math.sqrt(level * (1 - level) / DRAWS)


@pytest.mark.parametrize("kind", ["coins", "uniform"])
@pytest.mark.parametrize("name", CURVES)
def test_risk_control_keeps_the_mean(name: str, kind: str) -> None:
    curve, tolerance, n = CURVES[name], 0.1, 60
    lost = []
    for seed in range(DRAWS):
        losses = drawn(curve, n + 1, seed, kind)  # the last document is the new one
        chosen = conformal_risk_control(losses[:, :-1], tolerance).chosen
        lost.append(0.0 if chosen is None else losses[chosen, -1])
    assert np.mean(lost) <= tolerance + 3 * np.std(lost) / math.sqrt(DRAWS)


def test_something_is_chosen_where_there_is_something_to_choose() -> None:
    curve = CURVES["monotone"]
    ltt = [learn_then_test(drawn(curve, 600, seed, "uniform"), 0.1, 0.05).chosen for seed in range(100)]
    assert np.mean([chosen is not None and chosen >= 2 for chosen in ltt]) > 0.9
    crc = [conformal_risk_control(drawn(curve, 600, seed, "coins"), 0.1).chosen for seed in range(100)]
    assert np.mean([chosen is not None and chosen >= 3 for chosen in crc]) > 0.7


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("tolerance", [0.05, 0.3])
def test_p_values_are_valid_at_the_edge_of_the_hypothesis(bound: str, tolerance: float) -> None:
    generator = np.random.default_rng(0)
    found = []
    for _ in range(DRAWS):
        losses = (generator.random(80) < tolerance).astype(np.float64)
        is_betting = bound == "betting"
        found.append(
            betting_p_value(losses, tolerance, 0.1) if is_betting else hoeffding_bentkus_p_value(losses, tolerance)
        )
    for level in (0.01, 0.05, 0.1, 0.3):
        assert np.mean(np.asarray(found) <= level) <= level + 3 * math.sqrt(level * (1 - level) / DRAWS)


def test_bentkus_by_hand() -> None:
    losses = np.zeros(10)
    losses[0] = 1.0
    at_most_one = 0.5**10 * (1 + 10)
    entropy = 0.1 * math.log(0.1 / 0.5) + 0.9 * math.log(0.9 / 0.5)
    assert hoeffding_bentkus_p_value(losses, 0.5) == pytest.approx(min(math.exp(-10 * entropy), math.e * at_most_one))


def test_the_first_candidate_that_fails_is_never_chosen() -> None:
    """Regression: the candidate before it is."""
    good, bad = np.zeros(200), np.ones(200)
    losses = np.stack([good, good, bad, good])
    for found in (learn_then_test(losses, 0.1, 0.05), conformal_risk_control(losses, 0.1)):
        assert found.chosen == 1, "what lies behind the first failure is not looked at"
        assert len(found.scores) == 3
    for found in (learn_then_test(losses[2:], 0.1, 0.05), conformal_risk_control(losses[2:], 0.1)):
        assert found.chosen is None
    for found in (learn_then_test(losses[:2], 0.1, 0.05), conformal_risk_control(losses[:2], 0.1)):
        assert found.chosen == 1


def test_fewest_documents() -> None:
    for level in (0.05, None):
        n = fewest_documents(0.05, level)
        for count, passes in ((n, True), (n - 1, False)):
            nothing = np.zeros((1, count))
            found = conformal_risk_control(nothing, 0.05) if level is None else learn_then_test(nothing, 0.05, level)
            assert (found.chosen is not None) == passes
    assert fewest_documents(0.05, None) == 19, "(n 0 + 1) / (n + 1) <= 0.05"


def test_numbers_out_of_range() -> None:
    for tolerance in (0.0, 1.0, -0.1):
        with pytest.raises(UserError, match="tolerance"):
            learn_then_test(np.zeros((1, 5)), tolerance, 0.1)
    with pytest.raises(UserError, match="level"):
        learn_then_test(np.zeros((1, 5)), 0.1, 0.0)
    with pytest.raises(UserError, match="losses"):
        learn_then_test(np.full((1, 5), 1.5), 0.1, 0.1)
    with pytest.raises(UserError, match="no documents"):
        conformal_risk_control(np.zeros((1, 0)), 0.1)


def test_equal_documents_stay_together() -> None:
    hashes = [str(i % 7) for i in range(20)]
    split = split_documents(hashes, 0.5, seed=1)
    assert sorted(split.calibration + split.test) == list(range(20))
    assert not {hashes[i] for i in split.calibration} & {hashes[i] for i in split.test}
    assert split == split_documents(hashes, 0.5, seed=1)
    assert any(split != split_documents(hashes, 0.5, seed=seed) for seed in range(2, 6))
    with pytest.raises(UserError, match="none"):
        split_documents(["a", "a"], 0.5, 0)


# The command, on a tiny model.


@pytest.fixture(scope="module")
def exits_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_exits(model_folder, tmp_path_factory.mktemp("exits") / "exits")


@pytest.fixture
def own_exits(model_folder: Path, tmp_path: Path) -> Path:
    """Equal exits, for calibrations whose certificates other tests must not find beside theirs."""
    return save_exits(model_folder, tmp_path / "exits")


def options_for(model_folder: Path, exits: Path, output: Path, **changed: Any) -> CalibrateOptions:
    given: dict[str, Any] = {
        "backbone": str(model_folder),
        "tasks": "tiny_generate",
        "output": str(output),
        "thresholds": "0.2,0.5,0.9",
        "confidence": "calm",
        "tolerance": 0.99,  # random exits lose nearly everything
        "level": 0.9,
        "model_args": f"exits={exits}",
        "include_path": str(TASKS),
        "device": "cpu",
        "batch_size": 5,
    }
    return CalibrateOptions(**{**given, **changed})


@pytest.fixture(scope="module")
def made(
    model_folder: Path, exits_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Certificate, Path]:
    """Folder, certificate, and its place beside the exits."""
    folder = tmp_path_factory.mktemp("calibrate") / "out"
    certificate, kept = command.calibrate(options_for(model_folder, exits_folder, folder))
    return folder, certificate, kept


def run(
    model_folder: Path, exits: Path, threshold: str, samples: Any = None, task: str = "tiny_generate", **args: Any
) -> Any:
    lm = DynamaxLM(backbone=str(model_folder), exits=str(exits), threshold=threshold, device="cpu", **args)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    return lm_eval.simple_evaluate(lm, tasks=[task], task_manager=manager, samples=samples, bootstrap_iters=0)


def test_the_certificate_says_what_was_measured(made: tuple[Path, Certificate, Path], exits_folder: Path) -> None:
    folder, certificate, kept = made
    assert kept.parent == exits_folder / "certificates"
    assert Certificate.load(kept) == Certificate.load(folder / CERTIFICATE_NAME) == certificate
    assert certificate.candidates == [[0.9], [0.5], [0.2]]
    assert certificate.task == "tiny_generate"
    assert certificate.test is not None
    samples = json.loads((folder / TEST_SAMPLES_NAME).read_text())["tiny_generate"]
    assert certificate.test["documents"] == len(samples)
    assert certificate.thresholds == certificate.candidates[len([p for p in certificate.scores if p <= 0.9]) - 1]
    index = certificate.candidates.index(certificate.thresholds)
    assert 0 <= certificate.losses[index] <= certificate.tolerance


def test_a_run_uses_it(made: tuple[Path, Certificate, Path], model_folder: Path, exits_folder: Path) -> None:
    folder, certificate, kept = made
    samples = json.loads((folder / TEST_SAMPLES_NAME).read_text())
    direct = run(model_folder, exits_folder, str(certificate.thresholds[0]), samples, classifier="calm")
    for named in (str(kept), "calibrated"):
        found = run(model_folder, exits_folder, named, samples, classifier="calm")
        metrics = found["results"]["tiny_generate"]
        assert metrics == direct["results"]["tiny_generate"]
        assert metrics["compute_reduction,none"] == pytest.approx(certificate.test["compute_reduction"])  # type: ignore[index]
        written = found["config"]["dynamax"]["certificate"]
        assert written["guarantee"] == {"tiny_generate": True}
        assert written["thresholds"] == certificate.thresholds
        assert found["config"]["dynamax"]["policy"]["thresholds"][0] == certificate.thresholds[0]


def test_documents_of_the_calibration_are_refused(
    made: tuple[Path, Certificate, Path], model_folder: Path, exits_folder: Path
) -> None:
    _, _, kept = made
    with pytest.raises(UserError, match="chosen on"):
        run(model_folder, exits_folder, str(kept), classifier="calm")
    with pytest.raises(UserError, match="chosen on"):  # whatever else is allowed
        run(model_folder, exits_folder, str(kept), classifier="calm", certificate_any_task=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"classifier": "mamba"}, "policy.classifier"),
        ({"classifier": "calm", "state_mode": "skip"}, "policy.state_mode"),
        ({"classifier": "calm", "prune_layers": 1}, "policy.pruned_blocks"),
        ({"classifier": "calm", "repetition_penalty": 1.3}, "repetition_penalty"),
        ({"classifier": "calm", "dtype": "bfloat16"}, "dtype"),
    ],
)
def test_foreign_certificates_are_refused(
    made: tuple[Path, Certificate, Path],
    model_folder: Path,
    exits_folder: Path,
    changed: dict[str, Any],
    message: str,
) -> None:
    _, _, kept = made
    with pytest.raises(UserError, match=message):
        run(model_folder, exits_folder, str(kept), **changed)


def test_other_exits_are_refused(made: tuple[Path, Certificate, Path], model_folder: Path, tmp_path: Path) -> None:
    _, _, kept = made
    other = save_exits(model_folder, tmp_path / "other")
    weights = load_file(other / WEIGHTS_NAME)
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, other / WEIGHTS_NAME)
    with pytest.raises(UserError, match="exits"):
        run(model_folder, other, str(kept), classifier="calm")
    with pytest.raises(UserError, match="no certificate"):
        run(model_folder, other, "calibrated", classifier="calm")


def test_another_task_needs_the_flag_and_has_no_guarantee(
    made: tuple[Path, Certificate, Path], model_folder: Path, exits_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _, kept = made
    given = {"task": "tiny_choice", "classifier": "calm"}
    samples = {"tiny_choice": json.loads((folder / TEST_SAMPLES_NAME).read_text())["tiny_generate"]}
    with pytest.raises(UserError, match="chosen on"):  # the other task has the same documents
        run(model_folder, exits_folder, str(kept), **given)
    with pytest.raises(UserError, match="certificate_any_task"):
        run(model_folder, exits_folder, str(kept), samples, **given)
    with caplog.at_level(logging.WARNING):
        found = run(model_folder, exits_folder, str(kept), samples, **given, certificate_any_task=True)
    assert found["config"]["dynamax"]["certificate"]["guarantee"] == {"tiny_choice": False}
    assert "No guarantee" in caplog.text


def test_an_impossible_tolerance_gives_the_full_model(
    model_folder: Path, own_exits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    given = ["--backbone", str(model_folder), "--tasks", "tiny_generate", "--output", str(tmp_path / "out")]
    given += ["--thresholds", "0.2", "--confidence", "calm", "--tolerance", "0.001", "--device", "cpu"]
    given += ["--model_args", f"exits={own_exits}", "--include_path", str(TASKS)]
    with caplog.at_level(logging.WARNING):
        assert main(["calibrate", *given]) == 0
    assert "no candidate passed" in capsys.readouterr().out
    assert "cannot certify" in caplog.text
    certificate = Certificate.load(tmp_path / "out" / CERTIFICATE_NAME)
    assert certificate.thresholds == [1.0] and not certificate.certifies_exits and certificate.test is None
    samples = json.loads((tmp_path / "out" / TEST_SAMPLES_NAME).read_text())
    path = str(tmp_path / "out" / CERTIFICATE_NAME)
    found = run(model_folder, own_exits, path, samples, classifier="calm")
    assert found["results"]["tiny_generate"]["compute_reduction,none"] == 1


def test_one_confidence_is_calibrated(model_folder: Path, own_exits: Path, tmp_path: Path) -> None:
    options = options_for(model_folder, own_exits, tmp_path / "out", confidence=None, thresholds="0.9", test=False)
    certificate, _ = command.calibrate(options)
    kinds = ExitCheckpoint.open(own_exits).config.classifiers
    assert certificate.model["policy.classifier"] == kinds[0]
    names = sorted(path.name for path in (tmp_path / "out" / "calibration" / "points").iterdir())
    assert names == sorted(["full", f"{kinds[0]}-recompute-0.9"])


def test_a_restart_answers_nothing_twice(
    model_folder: Path, own_exits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_for(model_folder, own_exits, tmp_path / "out", test=False)
    first, _ = command.calibrate(options)
    monkeypatch.setattr(DynamaxLM, "answer_generations", _never)
    again, _ = command.calibrate(replace(options, method="crc"))
    monkeypatch.undo()
    mamba, _ = command.calibrate(replace(options, confidence="mamba"))
    assert mamba.model["policy.classifier"] == "mamba", "another line in the same folder is told apart"
    assert again.losses == first.losses
    assert again.level is None and again.bound is None


def _never(_self: Any, asked: Any, *_args: Any, **_kwargs: Any) -> None:
    assert not asked, "everything was answered before"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--tolerance", "0"], "tolerance"),
        (["--confidence", "state,softmax"], "--confidence"),
        (["--level", "1"], "level"),
        (["--share", "0"], "share"),
        (["--bound", "guess"], "bound"),
        (["--metric", "exact_match"], "--loss metric"),
        (["--loss", "metric", "--metric", "bleu"], "bleu"),
        (["--likeness", "cosine"], "likeness"),
        (["--tasks", "tiny_generate,tiny_choice"], "one task"),
        (["--tasks", "tiny_group"], "one task"),
        (["--tasks", "tiny_nothing"], "tiny_nothing"),
        (["--model_args", "threshold=0.3"], "threshold"),
        (["--per_exit", "nowhere.json"], "nowhere.json"),
        (["--tolerence", "0.1"], "--tolerance"),
    ],
)
def test_refusals(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: list[str], message: str
) -> None:
    given = ["--backbone", str(model_folder), "--tasks", "tiny_generate", "--output", str(tmp_path / "out")]
    given += ["--include_path", str(TASKS), "--device", "cpu", "--confidence", "state", "--thresholds", "0.5"]
    assert main(["calibrate", *given, *changed]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_metric_losses_are_what_the_full_model_had_and_the_exits_lost() -> None:
    from test_report import made as made_results
    from test_report import point

    task = made_results(4)
    full = point("full", "full model", [1.0, 1.0, 0.0, 0.0], 1.0, family="full")
    ours = point("p", "a", [1.0, 0.0, 1.0, 0.0], 1.5)
    task.points[:] = [full, ours]
    kind = LossKind.chosen("metric", None, task)
    assert kind.of(task, ours).tolist() == [0, 1, 0, 0]
    assert kind.of(task, full).tolist() == [0, 0, 0, 0]
    name = kind.measured_by.partition(",")[0]
    full.higher_is_better = {name: False}
    assert kind.of(task, ours).tolist() == [0, 0, 1, 0]
