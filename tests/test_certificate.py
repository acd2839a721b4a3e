"""A certificate is used for what it covers and for nothing else."""

from __future__ import annotations

import inspect
import json
import logging
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
from helpers import TASKS
from helpers_harness import add_post_processor, calibrate_options, instance, run_calibrated, save_exits
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file

from dynamax_lm_eval.calibration import command
from dynamax_lm_eval.calibration.command import CERTIFICATE_NAME, TEST_SAMPLES_NAME
from dynamax_lm_eval.config import DynamaxArgs
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits import lookup
from dynamax_lm_eval.exits.checkpoint import WEIGHTS_NAME
from dynamax_lm_eval.harness.certificate import Certificate, directory, file_name, find_certificate, run_settings
from dynamax_lm_eval.lm import DynamaxLM


@pytest.fixture(scope="module")
def made(
    model_folder: Path, exits_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Certificate, Path]:
    """Folder, certificate, and its place beside the exits."""
    folder = tmp_path_factory.mktemp("calibrate") / "out"
    certificate, kept = command.calibrate(calibrate_options(model_folder, exits_folder, folder))
    return folder, certificate, kept


def test_the_certificate_says_what_was_measured(made: tuple[Path, Certificate, Path], exits_folder: Path) -> None:
    folder, certificate, kept = made
    assert kept.parent == exits_folder / "certificates"
    assert Certificate.load(kept) == Certificate.load(folder / CERTIFICATE_NAME) == certificate
    assert certificate.candidates == [[0.9], [0.5], [0.2]]
    assert certificate.task == "tiny_generate"
    assert certificate.test is not None
    samples = json.loads((folder / TEST_SAMPLES_NAME).read_text())["tiny_generate"]
    assert certificate.test["documents"] == len(samples)
    assert certificate.certified == len([p for p in certificate.scores if p <= 0.9]) > 0
    index = int(np.argmax(certificate.reductions[: certificate.certified]))
    assert certificate.thresholds == certificate.candidates[index], "the best of those that are certified"
    assert certificate.compute_reduction == certificate.reductions[index] > 1
    assert (certificate.seed, certificate.population) == (0, 7)
    assert 0 <= certificate.losses[index] <= certificate.tolerance


def test_another_calibration_stands_beside_it(made: tuple[Path, Certificate, Path]) -> None:
    certificate = made[1]
    name = file_name(certificate, "calm", "skip")
    others = [replace(certificate, **changed) for changed in ({"seed": 7}, {"calibration_documents": ["a"]})]
    assert len({name, *(file_name(other, "calm", "skip") for other in others)}) == 3
    again = replace(certificate, created="2000-01-01", test=None)
    assert file_name(again, "calm", "skip") == name, "the same calibration again takes its place"


def test_a_run_uses_it(made: tuple[Path, Certificate, Path], model_folder: Path, exits_folder: Path) -> None:
    folder, certificate, kept = made
    samples = json.loads((folder / TEST_SAMPLES_NAME).read_text())
    direct = run_calibrated(model_folder, exits_folder, str(certificate.thresholds[0]), samples, classifier="calm")
    for named in (str(kept), "calibrated"):
        found = run_calibrated(model_folder, exits_folder, named, samples, classifier="calm")
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
        run_calibrated(model_folder, exits_folder, str(kept), classifier="calm")
    with pytest.raises(UserError, match="chosen on"):  # whatever else is allowed
        run_calibrated(model_folder, exits_folder, str(kept), classifier="calm", certificate_any_task=True)


def test_documents_given_by_position_are_those_that_are_checked(
    made: tuple[Path, Certificate, Path], model_folder: Path, exits_folder: Path
) -> None:
    folder, _, kept = made
    lm = DynamaxLM(
        backbone=str(model_folder), exits=str(exits_folder), threshold=str(kept), device="cpu", classifier="calm"
    )
    tasks = TaskManager(include_path=str(TASKS), include_defaults=False).load(["tiny_generate"])
    lm_eval.evaluate(lm, tasks, None, json.loads((folder / TEST_SAMPLES_NAME).read_text()))
    assert lm.get_model_info()["dynamax"]["certificate"]["guarantee"] == {"tiny_generate": True}
    with pytest.raises(UserError, match="chosen on"):
        lm_eval.evaluate(lm, tasks)
    with pytest.raises(UserError, match="a certificate cannot be checked"):
        inspect.unwrap(lm_eval.evaluator.evaluate)(lm, tasks)
    requests = tasks["tasks"]["tiny_generate"].instances
    with pytest.raises(UserError, match="a certificate cannot be checked where the model is called directly"):
        lm.generate_until(requests)
    with pytest.raises(UserError, match="a certificate cannot be checked where the model is called directly"):
        lm.loglikelihood([instance("loglikelihood", ("a", " b"), 0)])


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
        run_calibrated(model_folder, exits_folder, str(kept), **changed)


def test_certificates_that_followed_the_tasks_order_are_refused(
    made: tuple[Path, Certificate, Path], model_folder: Path, exits_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _, kept = made
    old = kept.with_name("old.json")
    old.write_text(json.dumps({**json.loads(kept.read_text()), "format_version": 1}))
    with pytest.raises(UserError, match=r"order of the task's documents.*calibrate again"):
        Certificate.load(old)
    samples = json.loads((folder / TEST_SAMPLES_NAME).read_text())
    with caplog.at_level(logging.WARNING):
        found = run_calibrated(model_folder, exits_folder, "calibrated", samples, classifier="calm")
    assert found["config"]["dynamax"]["certificate"]["path"] == str(kept), "it does not stand in the way of a new one"
    assert "no longer valid" in caplog.text
    old.unlink()


def test_another_draw_of_examples_is_refused(model_folder: Path, tmp_path: Path) -> None:
    exits = save_exits(model_folder, tmp_path / "exits")
    options = calibrate_options(model_folder, exits, tmp_path / "out", tasks="tiny_drawn", thresholds="0.2", test=False)
    certificate, kept = command.calibrate(options)
    samples = json.loads((tmp_path / "out" / TEST_SAMPLES_NAME).read_text())
    given = {"task": "tiny_drawn", "classifier": "calm"}
    found = run_calibrated(model_folder, exits, str(kept), samples, **given)
    assert found["config"]["dynamax"]["certificate"]["guarantee"] == {"tiny_drawn": True}
    with pytest.raises(UserError, match="fewshot_draw"):
        run_calibrated(model_folder, exits, str(kept), samples, **given, seeds={"fewshot_random_seed": 7})
    with pytest.raises(UserError, match="fewshot_examples"):
        run_calibrated(model_folder, exits, str(kept), samples, **given, seeds={"num_fewshot": 1})
    other, _ = command.calibrate(replace(options, fewshot_seed=7, output=str(tmp_path / "other")))
    assert other.run["fewshot_draw"] != certificate.run["fewshot_draw"]


def test_the_seed_is_free_where_no_examples_are_drawn() -> None:
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    settings = []
    for seed, count in ((1, 2), (2, 2), (1, 1), (1, 0)):
        task = manager.load(["tiny_shots"])["tasks"]["tiny_shots"]
        task.set_config(key="num_fewshot", value=count)
        task.set_fewshot_seed(seed)
        settings.append(run_settings(task, False, None, True))
    assert settings[0] == settings[1] != settings[2]
    assert settings[0]["fewshot_draw"] is None, "the first examples are shown"
    assert settings[3]["fewshot_examples"] is None
    assert run_settings(task, True, None, True) != run_settings(task, True, None, False)


def test_noting_the_examples_changes_none() -> None:
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    prompts, settings = [], []
    for noted in (False, True):
        task = manager.load(["tiny_drawn"])["tasks"]["tiny_drawn"]
        task.set_fewshot_seed(5)
        settings += [run_settings(task, False, None, None) for _ in range(2)] if noted else []
        prompts.append([task.fewshot_context(doc, 2) for doc in task.eval_docs])
    assert prompts[0] == prompts[1]
    assert settings[0] == settings[1]

    class Own:
        """A sampler that counts its draws."""

        rnd, draws = random.Random(0), 0

        def sample(self, n: int, **_: Any) -> list[Any]:
            self.draws += 1
            return []

    task.sampler = Own()
    first = run_settings(task, False, None, None)["fewshot_draw"]
    task.sampler.rnd = random.Random(1)
    assert first != run_settings(task, False, None, None)["fewshot_draw"] and task.sampler.draws == 0


def test_another_tokenizer_is_refused(
    made: tuple[Path, Certificate, Path], model_folder: Path, exits_folder: Path, tmp_path: Path
) -> None:
    folder, _, kept = made
    samples = json.loads((folder / TEST_SAMPLES_NAME).read_text())
    moved = shutil.copytree(model_folder, tmp_path / "moved")
    assert run_calibrated(moved, exits_folder, str(kept), samples, classifier="calm")
    add_post_processor(moved)
    with pytest.raises(UserError, match="differs in tokenizer"):
        run_calibrated(moved, exits_folder, str(kept), samples, classifier="calm")


def test_calibrated_finds_certificates_of_weights_that_are_not_known_yet(
    made: tuple[Path, Certificate, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNAMAX_CACHE", str(tmp_path))
    _, certificate, _ = made
    kept = directory("me/model", certificate.fingerprint, None)
    kept.mkdir(parents=True)
    certificate.save(kept / "c.json")
    policy = {n.removeprefix("policy."): v for n, v in certificate.model.items() if n.startswith("policy.")}
    for fingerprint in (certificate.fingerprint, None):
        assert find_certificate("calibrated", "me/model", fingerprint, None, policy) == (kept / "c.json", certificate)
    with pytest.raises(UserError, match="no certificate"):
        find_certificate("calibrated", "me/model", "0" * 32, None, policy)


def test_other_exits_are_refused(made: tuple[Path, Certificate, Path], model_folder: Path, tmp_path: Path) -> None:
    _, _, kept = made
    other = save_exits(model_folder, tmp_path / "other")
    weights = load_file(other / WEIGHTS_NAME)
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, other / WEIGHTS_NAME)
    with pytest.raises(UserError, match="exits"):
        run_calibrated(model_folder, other, str(kept), classifier="calm")
    with pytest.raises(UserError, match="no certificate"):
        run_calibrated(model_folder, other, "calibrated", classifier="calm")


def test_a_certificate_of_the_full_model_binds_its_exits_all_the_same() -> None:
    """Where no candidate passed the threshold is 1; the run is then still one of the certificate's policy."""
    full = DynamaxArgs(backbone="a", threshold=(1.0,))
    assert not lookup.may_use_exits(full)
    assert lookup.may_use_exits(replace(full, certificate="calibrated"))
    assert not lookup.may_use_exits(replace(full, certificate="calibrated", confidence="entropy"))


def test_another_task_needs_the_flag_and_has_no_guarantee(
    made: tuple[Path, Certificate, Path], model_folder: Path, exits_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _, kept = made
    given = {"task": "tiny_choice", "classifier": "calm"}
    samples = {"tiny_choice": json.loads((folder / TEST_SAMPLES_NAME).read_text())["tiny_generate"]}
    with pytest.raises(UserError, match="chosen on"):  # the other task has the same documents
        run_calibrated(model_folder, exits_folder, str(kept), **given)
    with pytest.raises(UserError, match="certificate_any_task"):
        run_calibrated(model_folder, exits_folder, str(kept), samples, **given)
    with caplog.at_level(logging.WARNING):
        found = run_calibrated(model_folder, exits_folder, str(kept), samples, **given, certificate_any_task=True)
    assert found["config"]["dynamax"]["certificate"]["guarantee"] == {"tiny_choice": False}
    assert "No guarantee" in caplog.text
