"""The wrapper around the harness's ``evaluate``: whoever calls it, and however, results have their compute."""

from __future__ import annotations

import inspect
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from helpers import TASKS
from helpers_harness import EXIT_ARGS, dynamax, save_exits
from lm_eval import evaluator
from lm_eval.tasks import TaskManager

from dynamax_lm_eval.compute.accounting import ComputeRecord
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.harness import evaluate as harness
from dynamax_lm_eval.harness.ledger import RequestKey, ResponseLedger, request_keys
from dynamax_lm_eval.lm import DynamaxLM


@pytest.fixture
def tasks() -> Any:
    return TaskManager(include_path=str(TASKS), include_defaults=False).load(["tiny_generate"])


@pytest.mark.slow
def test_names_bound_before_the_package_was_imported(model_folder: Path) -> None:
    code = f"""
from lm_eval import evaluate
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
import sys
assert not any(name.startswith("dynamax_lm_eval.h") for name in sys.modules)
from dynamax_lm_eval import DynamaxLM
lm = DynamaxLM({str(model_folder)!r}, threshold=0.1, exit_layers=[2, 4], batch_size=3, device="cpu")
manager = TaskManager(include_path={str(TASKS)!r}, include_defaults=False)
for results in (
    evaluate(lm, manager.load(["tiny_generate"]), bootstrap_iters=0),
    simple_evaluate(lm, tasks=["tiny_generate"], task_manager=manager, bootstrap_iters=0),
):
    print(results["results"]["tiny_generate"]["compute_reduction,none"], results["compute"]["overall"]["documents"])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ}
    )
    assert result.returncode == 0, result.stderr
    first, second = (line.split() for line in result.stdout.splitlines()[-2:])
    assert first == second
    assert float(first[0]) != 1
    assert first[1] == "8"


def test_arguments_by_position(model_folder: Path, tasks: Any) -> None:
    chosen = {"tiny_generate": [2, 5]}
    lm = dynamax(model_folder, **EXIT_ARGS)
    by_name = lm_eval.evaluate(lm=lm, task_dict=tasks, samples=chosen, bootstrap_iters=0)
    for instance in tasks["tasks"]["tiny_generate"].instances:
        instance.resps.clear()
    by_place = lm_eval.evaluate(lm, tasks, None, chosen, False, False, 0)
    assert by_name is not None and by_place is not None
    assert by_place["compute"]["by_task"] == by_name["compute"]["by_task"]
    assert [sample["doc_id"] for sample in by_place["samples"]["tiny_generate"]] == [2, 5]
    assert all("exit_layers" in sample for sample in by_place["samples"]["tiny_generate"])


def test_a_call_past_the_wrapper_is_noticed(
    model_folder: Path, tasks: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = inspect.unwrap(evaluator.evaluate)
    with caplog.at_level(logging.WARNING, "dynamax_lm_eval"):
        results = theirs(dynamax(model_folder, **EXIT_ARGS), tasks, bootstrap_iters=0)
    assert "compute" not in results
    assert sum("will have no compute" in message for message in caplog.messages) == 1
    exits = save_exits(model_folder, tmp_path / "exits")
    budgeted = DynamaxLM(
        str(model_folder), exits=str(exits), classifier="calm", target_reduction=1.1, batch_size=3, device="cpu"
    )
    with pytest.raises(
        UserError, match=r"a budget cannot be .* past dynamax-lm-eval; import dynamax_lm_eval.lm before"
    ):
        theirs(budgeted, tasks, bootstrap_iters=0)


def test_a_release_without_the_decorator(model_folder: Path, tasks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = inspect.unwrap(evaluator.evaluate)
    monkeypatch.setattr(evaluator, "evaluate", plain)
    harness.install()
    wrapped = evaluator.evaluate
    harness.install()
    assert evaluator.evaluate is wrapped
    assert inspect.unwrap(wrapped) is plain
    results = lm_eval.evaluate(dynamax(model_folder, **EXIT_ARGS), tasks, bootstrap_iters=0)
    assert results is not None
    assert results["compute"]["overall"]["documents"] == 8


def test_installed_once() -> None:
    before = evaluator.evaluate.__closure__[0].cell_contents  # type: ignore[attr-defined]
    harness.install()
    assert evaluator.evaluate.__closure__[0].cell_contents is before  # type: ignore[attr-defined]


def test_equal_requests_are_numbered() -> None:
    """The key says which of several equal requests one is, in the form that stores of responses have."""
    requests = [("generate_until", ("a", {"until": []})), ("generate_until", ("b", {"until": []}))]
    first, other, again, scored = request_keys([*requests, requests[0], ("loglikelihood", requests[0][1])])
    assert (first.occurrence, other.occurrence, again.occurrence, scored.occurrence) == (0, 0, 1, 0)
    assert len({first.digest, other.digest, scored.digest}) == 3
    assert str(again) == f"{first.digest}:1"
    assert RequestKey.digest_in(str(again)) == first.digest
    ledger = ResponseLedger()
    ledger.keep("generate_until", [(requests[0][1], ComputeRecord(fed_tokens=n)) for n in (3, 5)])
    assert [ledger.find(key).fed_tokens for key in (first, again)] == [3, 5]
    with pytest.raises(RuntimeError, match="no compute record for a generate_until request"):
        ledger.find(other)
