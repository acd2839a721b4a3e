"""Budgets: thresholds follow what was spent, the same at every batch size, and nothing else does."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lm_eval
import numpy as np
import pytest
from helpers import TASKS
from helpers_harness import instance, numbers
from lm_eval.tasks import TaskManager

from dynamax_lm_eval.budget import controller as budgets
from dynamax_lm_eval.budget import runner as runner
from dynamax_lm_eval.budget.controller import Curve, LatencyController, Measurement, ThresholdController, blocks_of
from dynamax_lm_eval.compute.accounting import ComputeRecord
from dynamax_lm_eval.config import DynamaxArgs
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.lm import DynamaxLM


def true_fraction(threshold: float) -> float:
    """Of some exits: nothing is saved above 0.9, and much is below 0.6."""
    return float(np.interp(threshold, [0, 0.3, 0.6, 0.9, 1], [0.6, 0.65, 0.75, 0.99, 1]))


def spent_by(budget: ThresholdController, documents: int, seed: int) -> float:
    """Runs documents that differ in length and in how easy they are; returns the reduction in the end."""
    generator = np.random.default_rng(seed)
    full = spent = 0.0
    for start in range(0, documents, budgets.BLOCK):
        count = min(budgets.BLOCK, documents - start)
        threshold = budget.threshold()
        lengths = generator.integers(5, 40, count)
        ease = generator.normal(0, 0.03, count)
        cost = float((lengths * np.clip(true_fraction(threshold) + ease, 0.6, 1)).sum())
        budget.record(threshold, count, float(lengths.sum()), cost)
        full, spent = full + float(lengths.sum()), spent + cost
    return full / spent


@pytest.mark.parametrize("target", [1.1, 1.2, 1.3, 1.5])
def test_a_budget_is_held_within_two_percent(target: float) -> None:
    for seed in range(8):
        found = spent_by(ThresholdController(1 / target, Curve(0.55), 300), 300, seed)
        assert found == pytest.approx(target, rel=0.02)


def test_the_curve_never_falls_and_knows_its_ends() -> None:
    curve = Curve(0.5, [Measurement(0.8, 100, 70), Measurement(0.6, 100, 80), Measurement(0.9, 100, 95)])
    found = [curve.threshold_for(fraction) for fraction in np.linspace(0, 1.1, 50)]
    assert found == sorted(found)
    assert (found[0], found[-1]) == (0, 1)
    assert curve.threshold_for(0.75) == pytest.approx(0.8), "what contradicts is averaged; the careful end wins"
    assert curve.threshold_for(0.85) == pytest.approx(0.85)
    assert Curve(0.5).threshold_for(0.75) == pytest.approx(0.5)


def test_latency_is_held() -> None:
    seconds_of_full = 0.02
    budget = LatencyController(0.016, Curve(0.55), 320)
    total = tokens = 0.0
    for _ in range(10):
        threshold = budget.threshold()
        fraction = true_fraction(threshold)
        budget.record(threshold, 32, 1000, 1000 * fraction)
        budget.timed(300 * seconds_of_full * fraction, 300)
        total, tokens = total + 300 * seconds_of_full * fraction, tokens + 300
    assert budget.trajectory[0]["threshold"] == 1, "the first block measures the machine"
    assert total / tokens == pytest.approx(0.016, rel=0.03)
    assert budget.trajectory[-1]["ms_per_token_so_far"] == pytest.approx(1e3 * total / tokens)


def test_blocks_are_made_of_documents() -> None:
    documents = [("t", i // 3) for i in range(3 * (budgets.BLOCK + 2))]
    first, second = blocks_of(documents)
    assert first == list(range(3 * budgets.BLOCK))
    assert second == list(range(3 * budgets.BLOCK, 3 * (budgets.BLOCK + 2)))
    assert blocks_of([0, 1, 0, 1]) == [[0, 1, 2, 3]], "repeats belong to their document"


# Runs of a tiny model, with blocks of two documents.


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "BLOCK", 2)


def run(model_folder: Path, exits: Path, task: str = "tiny_generate", **args: Any) -> Any:
    lm = DynamaxLM(backbone=str(model_folder), exits=str(exits), device="cpu", classifier="calm", **args)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    return lm_eval.simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=0)


def told(results: Any, task: str) -> Any:
    """What must not depend on how a run was batched: texts, or scores up to rounding; exits and thresholds exactly."""
    answers = [response[0] for sample in results["samples"][task] for response in sample["resps"]]
    if task != "tiny_generate":
        answers = numbers(answers)
    exits = [sample["exit_layers"] for sample in results["samples"][task]]
    return answers, exits, results["config"]["dynamax"]["budget"], results["results"][task]["compute_reduction,none"]


@pytest.mark.parametrize("task", ["tiny_generate", "tiny_choice", "tiny_rolling"])
@pytest.mark.parametrize("strategy", ["online", "two_pass"])
def test_batch_size_changes_nothing(model_folder: Path, exits_folder: Path, task: str, strategy: str) -> None:
    scope = "all" if task == "tiny_rolling" else "generated"
    found = [
        run(model_folder, exits_folder, task, target_reduction=1.1, budget=strategy, batch_size=size, exit_scope=scope)
        for size in (1, 16)
    ]
    ours, theirs = told(found[0], task), told(found[1], task)
    assert ours[1:] == theirs[1:]
    assert ours[0] == (theirs[0] if task == "tiny_generate" else pytest.approx(theirs[0], abs=1e-4))
    (trajectory,) = found[0]["config"]["dynamax"]["budget"]["trajectory"].values()
    documents = len(found[0]["samples"][task])
    assert sum(block["documents"] for block in trajectory) == documents
    assert len(trajectory) == (1 if strategy == "two_pass" else -(-documents // 2))
    assert trajectory[-1]["compute_reduction_so_far"] == found[0]["results"][task]["compute_reduction,none"]
    assert found[0]["config"]["dynamax"]["policy"]["thresholds"] is None


@pytest.mark.parametrize(("tokens", "warned"), [(6, False), (30, True)])
def test_texts_that_got_longer_than_a_budget_saves_are_told_of(
    tokens: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Answers at 0.95 and above have 10 tokens; those below it, which the budget chooses, others."""

    class Account:
        def account(self, _trace: Any, _policy: Any) -> ComputeRecord:
            return ComputeRecord(full_macs=200, block_macs=100, eligible_tokens=1)

    def answered(jobs: Any) -> Any:
        for place, (policy, _) in enumerate(jobs):
            threshold = policy.thresholds[0]
            count = 10 if threshold >= 0.95 else tokens
            full, spent = 100 * count, round(count * 100 / (2 - threshold))
            record = ComputeRecord(full_macs=full, block_macs=spent, eligible_tokens=count, generations=1)
            record.full_total_macs, record.total_macs = full + 50, spent + 50
            yield place, SimpleNamespace(record=record)

    args = DynamaxArgs(backbone="b", target_reduction=1.3, budget="two_pass")
    policy = ExitPolicy(4, (2,), (0.5,))
    budget = runner.BudgetRunner(args, policy, cast(Any, Account()))
    with caplog.at_level(logging.WARNING):
        found = list(budget.answers([("t", i) for i in range(8)], policy, answered))
    assert len(found) == 8
    assert any("texts got longer: the 8 documents" in record.message for record in caplog.records) == warned


def test_each_block_runs_at_its_threshold(model_folder: Path, exits_folder: Path) -> None:
    results = run(model_folder, exits_folder, target_reduction=1.1, batch_size=4)
    (trajectory,) = results["config"]["dynamax"]["budget"]["trajectory"].values()
    assert len({block["threshold"] for block in trajectory}) > 1
    for block in trajectory:
        chosen = list(range(block["first_document"], block["first_document"] + block["documents"]))
        alone = lm_eval.simple_evaluate(
            DynamaxLM(
                backbone=str(model_folder),
                exits=str(exits_folder),
                device="cpu",
                classifier="calm",
                threshold=block["threshold"],
            ),
            tasks=["tiny_generate"],
            task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
            samples={"tiny_generate": chosen},
            bootstrap_iters=0,
        )
        assert alone is not None
        ours = [sample["resps"] for sample in results["samples"]["tiny_generate"] if sample["doc_id"] in chosen]
        assert ours == [sample["resps"] for sample in alone["samples"]["tiny_generate"]]


def test_requests_made_by_hand_are_documents_of_their_own(model_folder: Path, exits_folder: Path) -> None:
    lm = DynamaxLM(
        backbone=str(model_folder), exits=str(exits_folder), device="cpu", target_reduction=1.1, classifier="calm"
    )
    lm.generate_until([instance("generate_until", (f"The {i}", {"until": [], "max_gen_toks": 8}), 0) for i in range(7)])
    (trajectory,) = lm.get_model_info()["dynamax"]["budget"]["trajectory"].values()
    assert sum(block["documents"] for block in trajectory) == 7
    assert len(trajectory) > 1
    # An error names the request of the whole call, not of its block.
    texts = [f"The quick {'river' if i == 5 else 'fox'}" for i in range(7)]
    poisoned = set(lm.tokenizer.encode(texts[5])) - set(lm.tokenizer.encode(texts[0] + " brown is on a"))
    lm.model.get_input_embeddings().weight.data[list(poisoned)] = float("nan")
    with pytest.raises(UserError, match="not finite for request 5"):
        lm.loglikelihood([instance("loglikelihood", (text, " brown fox"), 0) for text in texts])


def test_latency_budget_runs_and_says_that_it_is_of_this_machine(model_folder: Path, exits_folder: Path) -> None:
    results = run(model_folder, exits_folder, target_latency_ms=1e6)
    shown = results["config"]["dynamax"]["budget"]
    assert shown["reproducible"] is False
    assert all(block["ms_per_token"] > 0 for block in shown["trajectory"]["tiny_generate"])
    assert shown["trajectory"]["tiny_generate"][-1]["threshold"] == 1, "there is time for the full model"
    with pytest.raises(UserError, match="generated token"):
        run(model_folder, exits_folder, "tiny_choice", target_latency_ms=1e6)


def test_a_missed_budget_is_warned_of(
    model_folder: Path, exits_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_MISSED", 0.0)
    run(model_folder, exits_folder, target_latency_ms=1e-6)
    assert "ms per token is" in caplog.text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"target_reduction": 1}, "above 1"),
        ({"target_reduction": 50}, "cannot be reached"),
        ({"target_reduction": 1.1, "threshold": 0.5}, "threshold and target_reduction"),
        ({"target_reduction": 1.1, "target_latency_ms": 5}, "each decide"),
        ({"target_latency_ms": 0}, "above 0"),
        ({"budget": "online"}, "target_reduction"),
        ({"target_latency_ms": 5, "budget": "two_pass"}, "target_reduction"),
        ({"target_reduction": 1.1, "threshold_decay": 4}, "threshold_decay"),
        ({"target_reduction": 1.1, "budget": "daily"}, "budget"),
        ({"threshold": "calibrated", "target_reduction": 1.1}, "certificate and target_reduction"),
        ({"threshold": "calibrated", "certificate": "x.json"}, "write threshold=FILE"),
        ({"certificate_any_task": True}, "certificate_any_task"),
    ],
)
def test_refusals(model_folder: Path, exits_folder: Path, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(model_folder, exits_folder, **args)


def test_use_cache_is_refused(model_folder: Path, exits_folder: Path, tmp_path: Path) -> None:
    lm = DynamaxLM(backbone=str(model_folder), exits=str(exits_folder), device="cpu", target_reduction=1.1)
    with pytest.raises(UserError, match="--use_cache"):
        lm_eval.simple_evaluate(
            lm,
            tasks=["tiny_generate"],
            task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
            use_cache=str(tmp_path / "cache"),
        )
