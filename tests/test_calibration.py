"""Calibration: the procedures keep their promises, and a certificate is used for what it covers and nothing else."""

from __future__ import annotations

import inspect
import json
import logging
import math
import random
import shutil
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import numpy.typing as npt
import pytest
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file
from test_lm import TASKS, add_post_processor
from test_trained_exits import save_exits

from dynamax_lm_eval.calibration import command
from dynamax_lm_eval.calibration.command import CERTIFICATE_NAME, TEST_SAMPLES_NAME, split_documents
from dynamax_lm_eval.calibration.losses import LossKind
from dynamax_lm_eval.calibration.options import CalibrateOptions
from dynamax_lm_eval.calibration.testing import (
    BOUNDS,
    Selection,
    betting_p_values,
    conformal_risk_control,
    fewest_documents,
    hoeffding_bentkus_p_values,
    learn_then_test,
)
from dynamax_lm_eval.cli import main
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.checkpoint import WEIGHTS_NAME, ExitCheckpoint
from dynamax_lm_eval.harness.certificate import Certificate, directory, find_certificate, run_settings
from dynamax_lm_eval.harness.responder import Responder
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
        certified = learn_then_test(drawn(curve, n, seed, kind), tolerance, level, bound, seed=seed).certified
        wrong += bool((curve[:certified] > tolerance).any())
    assert wrong / DRAWS <= level + 3 * math.sqrt(level * (1 - level) / DRAWS)


@pytest.mark.parametrize("kind", ["coins", "uniform"])
@pytest.mark.parametrize("name", CURVES)
def test_risk_control_keeps_the_mean(name: str, kind: str) -> None:
    curve, tolerance, n = CURVES[name], 0.1, 60
    lost = []
    for seed in range(DRAWS):
        losses = drawn(curve, n + 1, seed, kind)  # the last document is the new one
        certified = conformal_risk_control(losses[:, :-1], tolerance).certified
        lost.append(losses[certified - 1, -1] if certified else 0.0)
    assert np.mean(lost) <= tolerance + 3 * np.std(lost) / math.sqrt(DRAWS)


#: Expected losses of the parts of a task whose documents are sorted; their means are above 0.1.
SORTED = {"halves": (0.02, 0.22), "thirds": (0.0, 0.18, 0.18), "quarters": (0.05, 0.1, 0.13, 0.17)}
SPLITS = 1000


def at_most(level: float) -> float:
    """The largest share in SPLITS that still agrees with a probability of ``level``: three standard errors above."""
    return level + 3 * math.sqrt(level * (1 - level) / SPLITS)


def sorted_population(name: str, mean: float | None, seed: int = 0) -> Floats:
    """Losses (1200,) that are 0 or 1 times a factor, part by part, with the parts' exact means; ``mean``: scaled to."""
    size = 1200 // len(SORTED[name])
    parts = [np.arange(size) < round(size * loss) for loss in SORTED[name]]
    losses = np.concatenate([np.random.default_rng([seed, 1]).permutation(part) for part in parts]).astype(np.float64)
    return losses if mean is None else losses * (mean / losses.mean())


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("mean", [None, 0.1 + 1e-9])
@pytest.mark.parametrize("name", SORTED)
def test_sorted_documents_are_wrongly_certified_at_most_as_often_as_the_level(
    name: str, mean: float | None, bound: Any
) -> None:
    """Regression: bets that followed the task's order certified these in 32 to 100 % of splits."""
    level, population = 0.05, sorted_population(name, mean)
    documents = [str(i) for i in range(len(population))]
    assert population.mean() > 0.1
    p_values = []
    for seed in range(SPLITS):
        split = split_documents(documents, 0.25, seed)
        assert split.calibration == sorted(split.calibration), "in the task's order, as a sweep's results are"
        losses = population[None, split.calibration]
        found = learn_then_test(losses, 0.1, level, bound, seed=seed, population=split.population)
        assert found.certified == (found.scores[0] <= level)
        p_values.append(found.scores[0])
    for probability in (0.01, level, 0.1, 0.3):
        assert np.mean(np.asarray(p_values) <= probability) <= at_most(probability)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("name", SORTED)
def test_independent_draws_that_come_sorted_are_certified_as_rarely(name: str, bound: Any) -> None:
    """The same where a new document is none of a fixed set."""
    parts, level = np.asarray(SORTED[name]) * 0.1 / np.mean(SORTED[name]), 0.05
    wrong = 0
    for seed in range(SPLITS):
        generator = np.random.default_rng([seed, 2])
        chances = np.sort(parts[generator.integers(len(parts), size=300)])
        losses = (generator.random(300) < chances).astype(np.float64)[None]
        wrong += learn_then_test(losses, 0.1, level, bound, seed=seed).certified
        wrong += learn_then_test(losses, 0.1, level, bound, seed=seed, population=600).certified
    assert wrong / 2 / SPLITS <= at_most(level)


@pytest.mark.parametrize("name", SORTED)
def test_risk_control_keeps_the_mean_of_the_other_documents_of_a_sorted_task(name: str) -> None:
    hard = np.random.default_rng(3).random(1200)
    expected = np.repeat(SORTED[name], 1200 // len(SORTED[name]))
    curve = np.array([[0.3], [0.6], [0.8], [0.9], [1.0], [1.3]])
    losses = (hard < curve * expected).astype(np.float64)
    documents = [str(i) for i in range(1200)]
    lost = []
    for seed in range(SPLITS):
        split = split_documents(documents, 0.25, seed)
        best = conformal_risk_control(losses[:, split.calibration], 0.1).best(range(2, 8))
        lost.append(0.0 if best is None else losses[best, split.test].mean())
    assert 0.05 < np.mean(lost) <= 0.1 + 3 * np.std(lost) / math.sqrt(SPLITS)


def test_all_candidates_are_bet_on_in_one_order_which_the_seed_decides() -> None:
    losses = np.sort(np.random.default_rng(0).random(200) * 0.15)
    first, second = betting_p_values(np.stack([losses, losses]), 0.1, 0.05, seed=0)
    assert first == second
    assert betting_p_values(losses[None], 0.1, 0.05, seed=0) == first
    assert betting_p_values(losses[None], 0.1, 0.05, seed=1) != first
    assert hoeffding_bentkus_p_values(losses[None], 0.1) == pytest.approx(
        hoeffding_bentkus_p_values(losses[None, ::-1], 0.1)
    )
    with pytest.raises(ValueError, match="200 documents cannot be drawn from 199"):
        betting_p_values(losses[None], 0.1, 0.05, seed=0, population=199)


@pytest.mark.parametrize("population", [None, 5])
def test_betting_by_hand(population: int | None) -> None:
    tolerance, level, n = 0.5, 0.9, 3

    def by_hand(losses: tuple[float, ...]) -> float:
        capital = most = 1.0
        seen: list[float] = []
        spread = 0.25
        for loss in losses:
            bet = min(1, math.sqrt(2 * math.log(1 / level) / (n * spread / (len(seen) + 1))))
            expected = tolerance
            if population is not None:  # what the other documents have on average where the hypothesis begins
                expected = min(tolerance, (population * tolerance - sum(seen)) / (population - len(seen)))
            capital *= 1 - bet * (loss - expected)
            most = max(most, capital)
            seen.append(loss)
            spread += (loss - (0.5 + sum(seen)) / (len(seen) + 1)) ** 2
        return 1 / most

    losses = (0.05, 0.3, 0.95)
    found = [
        betting_p_values(np.array([losses]), tolerance, level, seed=seed, population=population)[0]
        for seed in range(60)
    ]
    orders = {by_hand(order) for order in permutations(losses)}
    assert sorted(set(np.round(found, 12))) == pytest.approx(sorted(set(np.round(list(orders), 12))))


def test_the_certified_candidate_that_saves_the_most_is_the_best() -> None:
    assert Selection(3, ()).best([1.02, 1.06, 1.01, 1.5]) == 1, "the last is not certified"
    assert Selection(3, ()).best([1.02, 1.06, 1.06, 1.5]) == 1, "of equals the most careful"
    assert Selection(3, ()).best([0.9, 0.99, 1.0, 1.5]) is None, "nothing is saved"
    assert Selection(0, ()).best([1.2]) is None


def test_something_is_chosen_where_there_is_something_to_choose() -> None:
    curve = CURVES["monotone"]
    ltt = [learn_then_test(drawn(curve, 600, i, "uniform"), 0.1, 0.05, seed=i).certified for i in range(100)]
    assert np.mean([certified >= 3 for certified in ltt]) > 0.9
    crc = [conformal_risk_control(drawn(curve, 600, seed, "coins"), 0.1).certified for seed in range(100)]
    assert np.mean([certified >= 4 for certified in crc]) > 0.7


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("tolerance", [0.05, 0.3])
def test_p_values_are_valid_at_the_edge_of_the_hypothesis(bound: str, tolerance: float) -> None:
    generator = np.random.default_rng(0)
    found = []
    for seed in range(DRAWS):
        losses = (generator.random((1, 80)) < tolerance).astype(np.float64)
        is_betting = bound == "betting"
        found.append(
            betting_p_values(losses, tolerance, 0.1, seed=seed)[0]
            if is_betting
            else hoeffding_bentkus_p_values(losses, tolerance)[0]
        )
    for level in (0.01, 0.05, 0.1, 0.3):
        assert np.mean(np.asarray(found) <= level) <= level + 3 * math.sqrt(level * (1 - level) / DRAWS)


def test_bentkus_by_hand() -> None:
    losses = np.zeros((1, 10))
    losses[0, 0] = 1.0
    at_most_one = 0.5**10 * (1 + 10)
    entropy = 0.1 * math.log(0.1 / 0.5) + 0.9 * math.log(0.9 / 0.5)
    p_value = min(math.exp(-10 * entropy), math.e * at_most_one)
    assert hoeffding_bentkus_p_values(losses, 0.5) == pytest.approx([p_value])


def test_the_first_candidate_that_fails_is_never_certified() -> None:
    """Regression: the candidate before it is."""
    good, bad = np.zeros(200), np.ones(200)
    losses = np.stack([good, good, bad, good])
    for found in (learn_then_test(losses, 0.1, 0.05, seed=0), conformal_risk_control(losses, 0.1)):
        assert found.certified == 2, "what lies behind the first failure is not looked at"
        assert len(found.scores) == 3
    for found in (learn_then_test(losses[2:], 0.1, 0.05, seed=0), conformal_risk_control(losses[2:], 0.1)):
        assert found.certified == 0
    for found in (learn_then_test(losses[:2], 0.1, 0.05, seed=0), conformal_risk_control(losses[:2], 0.1)):
        assert found.certified == 2


def test_fewest_documents() -> None:
    for level in (0.05, None):
        n = fewest_documents(0.05, level)
        for count, passes in ((n, True), (n - 1, False)):
            nothing = np.zeros((1, count))
            found = (
                conformal_risk_control(nothing, 0.05)
                if level is None
                else learn_then_test(nothing, 0.05, level, seed=1, population=2 * count)
            )
            assert (found.certified > 0) == passes
    assert fewest_documents(0.05, None) == 19, "(n 0 + 1) / (n + 1) <= 0.05"


def test_numbers_out_of_range() -> None:
    for tolerance in (0.0, 1.0, -0.1):
        with pytest.raises(UserError, match="tolerance"):
            learn_then_test(np.zeros((1, 5)), tolerance, 0.1, seed=0)
    with pytest.raises(UserError, match="level"):
        learn_then_test(np.zeros((1, 5)), 0.1, 0.0, seed=0)
    with pytest.raises(UserError, match="losses"):
        learn_then_test(np.full((1, 5), 1.5), 0.1, 0.1, seed=0)
    with pytest.raises(UserError, match="no documents"):
        conformal_risk_control(np.zeros((1, 0)), 0.1)


def test_equal_documents_stay_together() -> None:
    hashes = [str(i % 7) for i in range(20)]
    split = split_documents(hashes, 0.5, seed=1)
    assert sorted(split.calibration + split.test) == list(range(20))
    assert not {hashes[i] for i in split.calibration} & {hashes[i] for i in split.test}
    assert split == split_documents(hashes, 0.5, seed=1)
    assert any(split != split_documents(hashes, 0.5, seed=seed) for seed in range(2, 6))
    assert [hashes[split.calibration[i]] for i in split.first] == list(
        dict.fromkeys(hashes[i] for i in split.calibration)
    )
    assert split.population == 7
    with pytest.raises(UserError, match="none"):
        split_documents(["a", "a"], 0.5, 0)


def test_a_limit_draws_from_the_whole_task() -> None:
    """Regression: it took the first documents, which in a sorted task are of one kind."""
    documents = [str(i) for i in range(1000)]
    split = split_documents(documents, 0.5, 0, limit=100)
    assert len(split.calibration) == len(split.test) == 50 and split.population == 1000
    for part in (split.calibration, split.test):
        assert min(np.histogram(part, bins=4, range=(0, 1000))[0]) >= 5, "of all quarters"


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
    model_folder: Path,
    exits: Path,
    threshold: str,
    samples: Any = None,
    task: str = "tiny_generate",
    seeds: Any = None,
    **args: Any,
) -> Any:
    lm = DynamaxLM(backbone=str(model_folder), exits=str(exits), threshold=threshold, device="cpu", **args)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    return lm_eval.simple_evaluate(
        lm, tasks=[task], task_manager=manager, samples=samples, bootstrap_iters=0, **(seeds or {})
    )


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
        found = run(model_folder, exits_folder, "calibrated", samples, classifier="calm")
    assert found["config"]["dynamax"]["certificate"]["path"] == str(kept), "it does not stand in the way of a new one"
    assert "no longer valid" in caplog.text
    old.unlink()


def test_another_draw_of_examples_is_refused(model_folder: Path, tmp_path: Path) -> None:
    exits = save_exits(model_folder, tmp_path / "exits")
    options = options_for(model_folder, exits, tmp_path / "out", tasks="tiny_drawn", thresholds="0.2", test=False)
    certificate, kept = command.calibrate(options)
    samples = json.loads((tmp_path / "out" / TEST_SAMPLES_NAME).read_text())
    given = {"task": "tiny_drawn", "classifier": "calm"}
    found = run(model_folder, exits, str(kept), samples, **given)
    assert found["config"]["dynamax"]["certificate"]["guarantee"] == {"tiny_drawn": True}
    with pytest.raises(UserError, match="fewshot_draw"):
        run(model_folder, exits, str(kept), samples, **given, seeds={"fewshot_random_seed": 7})
    with pytest.raises(UserError, match="fewshot_examples"):
        run(model_folder, exits, str(kept), samples, **given, seeds={"num_fewshot": 1})
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


def test_candidates_that_save_nothing_give_the_full_model(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_reduction", lambda _point: 0.98)
    exits = save_exits(model_folder, tmp_path / "exits")
    options = options_for(model_folder, exits, tmp_path / "out", thresholds="0.2")
    certificate, kept = command.calibrate(options)
    assert certificate.certified > 0 and certificate.thresholds == [1.0] and certificate.compute_reduction == 1
    assert certificate.test is None
    said = command.summary(certificate, kept, options)
    assert "none saves compute (the largest expected compute_reduction is 0.980)" in said


def test_another_tokenizer_is_refused(
    made: tuple[Path, Certificate, Path], model_folder: Path, exits_folder: Path, tmp_path: Path
) -> None:
    folder, _, kept = made
    samples = json.loads((folder / TEST_SAMPLES_NAME).read_text())
    moved = shutil.copytree(model_folder, tmp_path / "moved")
    assert run(moved, exits_folder, str(kept), samples, classifier="calm")
    add_post_processor(moved)
    with pytest.raises(UserError, match="differs in tokenizer"):
        run(moved, exits_folder, str(kept), samples, classifier="calm")


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


def test_what_cannot_be_written_is_found_before_anything_is_answered(
    model_folder: Path, exits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "sweep", lambda *_: pytest.fail("something was answered"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output .*file cannot be written"):
        command.calibrate(options_for(model_folder, exits_folder, tmp_path / "file"))
    monkeypatch.setenv("DYNAMAX_CACHE", str(tmp_path / "file"))
    options = replace(options_for(model_folder, exits_folder, tmp_path / "out"), confidence="state", model_args="")
    with pytest.raises(UserError, match=r"the folder of the certificate, .*file.* cannot be written .*DYNAMAX_CACHE"):
        command.calibrate(options)
    assert not (tmp_path / "out").exists()


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
    return iter(())


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
    full = point("full", "full model", [1.0, 1.0, 0.0, 0.0], 1.0, kind="full")
    ours = point("p", "a", [1.0, 0.0, 1.0, 0.0], 1.5)
    task.points[:] = [full, ours]
    kind = LossKind.find("metric", None, task)
    assert kind.of(task, ours).tolist() == [0, 1, 0, 0]
    assert kind.of(task, full).tolist() == [0, 0, 0, 0]
    name = kind.measured_by.partition(",")[0]
    full.higher_is_better = {name: False}
    assert kind.of(task, ours).tolist() == [0, 0, 1, 0]
