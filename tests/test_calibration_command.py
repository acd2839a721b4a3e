"""The command ``calibrate`` on a tiny model."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import TASKS
from helpers_harness import calibrate_options, run_calibrated, save_exits

from dynamax_lm_eval.calibration import command
from dynamax_lm_eval.calibration.command import CERTIFICATE_NAME, TEST_SAMPLES_NAME
from dynamax_lm_eval.cli import main
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.checkpoint import ExitCheckpoint
from dynamax_lm_eval.harness.certificate import Certificate
from dynamax_lm_eval.harness.responder import Responder


@pytest.fixture
def own_exits(model_folder: Path, tmp_path: Path) -> Path:
    """Equal exits, for calibrations whose certificates other tests must not find beside theirs."""
    return save_exits(model_folder, tmp_path / "exits")


def test_candidates_that_save_nothing_give_the_full_model(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_reduction", lambda _point: 0.98)
    exits = save_exits(model_folder, tmp_path / "exits")
    options = calibrate_options(model_folder, exits, tmp_path / "out", thresholds="0.2")
    certificate, kept = command.calibrate(options)
    assert certificate.certified > 0 and certificate.thresholds == [1.0] and certificate.compute_reduction == 1
    assert certificate.test is None
    said = command.summary(certificate, kept, options)
    assert "none saves compute (the largest expected compute_reduction is 0.980)" in said
    assert "use it" not in said


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
    found = run_calibrated(model_folder, own_exits, path, samples, classifier="calm")
    assert found["results"]["tiny_generate"]["compute_reduction,none"] == 1


def test_answers_that_exits_learned_from_do_not_calibrate_them(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exits = save_exits(model_folder, tmp_path / "exits")
    options = calibrate_options(model_folder, exits, tmp_path / "out", thresholds="0.2")
    plain, _ = command.calibrate(options)
    learned = set(plain.calibration_documents[:2])
    monkeypatch.setattr(ExitCheckpoint, "trained_on", lambda _, documents: len(learned.intersection(documents)))
    other, _ = command.calibrate(replace(options, output=str(tmp_path / "other")))
    assert not learned.intersection(other.calibration_documents)
    assert other.population == plain.population - 2


def test_what_cannot_be_written_is_found_before_anything_is_answered(
    model_folder: Path, exits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "sweep", lambda *_: pytest.fail("something was answered"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output .*file cannot be written"):
        command.calibrate(calibrate_options(model_folder, exits_folder, tmp_path / "file"))
    monkeypatch.setenv("DYNAMAX_CACHE", str(tmp_path / "file"))
    options = replace(
        calibrate_options(model_folder, exits_folder, tmp_path / "out"), confidence="state", model_args=""
    )
    with pytest.raises(UserError, match=r"the folder of the certificate, .*file.* cannot be written .*DYNAMAX_CACHE"):
        command.calibrate(options)
    assert not (tmp_path / "out").exists()


def test_a_metric_that_the_task_lacks_is_found_before_the_model_loads(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "load", lambda _: pytest.fail("the model was loaded"))
    options = calibrate_options(model_folder, tmp_path, tmp_path / "out", loss="metric", metric="exact_macth")
    message = "--metric: unknown metric of tiny_generate 'exact_macth'; did you mean 'exact_match'"
    with pytest.raises(UserError, match=message):
        command.calibrate(options)
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        command.calibrate(replace(options, metric="exact_match,none"))


def test_one_confidence_is_calibrated(model_folder: Path, own_exits: Path, tmp_path: Path) -> None:
    options = calibrate_options(
        model_folder, own_exits, tmp_path / "out", confidence=None, thresholds="0.9", test=False
    )
    certificate, _ = command.calibrate(options)
    kinds = ExitCheckpoint.open(own_exits).config.classifiers
    assert certificate.model["policy.classifier"] == kinds[0]
    names = sorted(path.name for path in (tmp_path / "out" / "calibration" / "points").iterdir())
    assert names == sorted(["full", f"{kinds[0]}-recompute-0.9"])


def test_a_restart_answers_nothing_twice(
    model_folder: Path, own_exits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = calibrate_options(model_folder, own_exits, tmp_path / "out", test=False)
    first, _ = command.calibrate(options)
    monkeypatch.setattr(Responder, "generations", _never)
    for file in (tmp_path / "out" / "calibration").rglob("point.json"):  # as an earlier version wrote it
        point = json.loads(file.read_text())
        point["asked"].pop("recorded")
        point["run"]["tiny_generate"].pop("fewshot_draw")
        file.write_text(json.dumps(point))
    again, _ = command.calibrate(replace(options, method="crc"))
    assert again.run == first.run, "what was not recorded then is recorded now"
    monkeypatch.undo()
    mamba, _ = command.calibrate(replace(options, confidence="mamba"))
    assert mamba.model["policy.classifier"] == "mamba", "another line in the same folder is told apart"
    assert again.losses == first.losses
    assert again.level is None and again.bound is None


def _never(_self: Any, asked: Any, *_args: Any, **_kwargs: Any) -> Any:
    assert not asked, "everything was answered before"
    return (answer for answer in ())


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


def test_a_cascade_is_calibrated_with_its_proposals(model_folder: Path, own_exits: Path, tmp_path: Path) -> None:
    options = calibrate_options(
        model_folder, own_exits, tmp_path / "out", thresholds="0.2,0.4", confidence="cascade:calm", test=False
    )
    certificate, _ = command.calibrate(options)
    policy = certificate.model
    found = [policy[f"policy.{name}"] for name in ("confidence", "classifier", "propose")]
    assert found == ["cascade", "calm", 0.5]
    with pytest.raises(UserError, match="the full model's text loses nothing, so there is nothing to certify"):
        replace(options, state_mode="verify")
