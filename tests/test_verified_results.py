"""Exits as drafts in the harness: scores of the full model, what is counted, and what is refused."""

from __future__ import annotations

import base64
import gzip
import json
import re
import statistics
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers_engine import drained, policy_of
from helpers_harness import dynamax, evaluate, responses, sweep_options
from lm_eval.tasks import TaskManager

from dynamax_lm_eval.budget.fastest import find_fastest
from dynamax_lm_eval.compute.accounting import account
from dynamax_lm_eval.compute.cost import BackboneCost, BlockCost, ExitCost
from dynamax_lm_eval.compute.trace import Trace
from dynamax_lm_eval.compute.verified import FedToken, VerifiedTrace
from dynamax_lm_eval.config import parse_model_args
from dynamax_lm_eval.engine.requests import Generation, GenerationRequest
from dynamax_lm_eval.engine.sampling import Sampler
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.harness.roofline import DEVICES
from dynamax_lm_eval.harness.speed import SpeedLog, paired
from dynamax_lm_eval.reports.command import report
from dynamax_lm_eval.reports.options import ReportOptions
from dynamax_lm_eval.sweep.command import sweep
from dynamax_lm_eval.sweep.files import finished_points
from dynamax_lm_eval.sweep.results import read

DRAFTING: dict[str, Any] = {"threshold": 0.1, "exit_layers": [2, 4], "verify": True, "verify_tokens": 4}
TASKS = ("tiny_generate", "tiny_choice", "tiny_rolling")


def test_scores_are_those_of_the_full_model(model_folder: Path, manager: TaskManager) -> None:
    full = evaluate(dynamax(model_folder), manager, *TASKS)
    drafted = evaluate(dynamax(model_folder, roofline="h100", **DRAFTING), manager, *TASKS)
    for task in TASKS:
        assert responses(drafted, task) == responses(full, task)
        own = {
            key: value for key, value in full["results"][task].items() if "compute" not in key and "layer" not in key
        }
        assert drafted["results"][task].items() >= own.items()
    compute = drafted["compute"]
    # Scores need no drafts.
    assert compute["by_task"]["tiny_choice"]["compute_reduction"] == 1
    assert compute["by_task"]["tiny_choice"]["drafts"] is None
    drafts = compute["by_task"]["tiny_generate"]["drafts"]
    assert 0 < drafts["accepted"] < drafts["drafted"]
    assert drafts["draft_acceptance"] == drafts["accepted"] / drafts["drafted"]
    assert sum(found["drafted"] for found in drafts["by_exit"].values()) == drafts["drafted"]
    assert drafts["accepted_length"] == 1 + drafts["accepted"] / drafts["verifications"]
    # Nothing is saved, and what was drafted for nothing is lost.
    assert compute["by_task"]["tiny_generate"]["compute_reduction"] < 1
    weights, roofline = compute["overall"]["weights"], compute["overall"]["roofline"]
    assert weights["reduction"] == pytest.approx(
        weights["bytes_per_generated_token_full"] / weights["bytes_per_generated_token"]
    )
    tokens = compute["by_task"]["tiny_generate"]["tokens"]["generated"]
    least = weights["bytes_per_generated_token_full"] * tokens / DEVICES["h100"].bytes_per_second
    assert roofline["seconds_full"] == pytest.approx(least)
    assert drafted["config"]["dynamax"]["label"].startswith("softmax-verify-0.1-")
    assert full["compute"]["overall"]["weights"]["reduction"] == 1


def test_counted_by_hand() -> None:
    """Two blocks of 100 weights and two MACs per position in sight; a head of 30; one exit after the first block."""
    cost = BackboneCost((BlockCost(100, 2, None, 10), BlockCost(100, 2, None, 10)), lm_head=30)
    terms = ExitCost((1,), (5,), False, False, frozenset(), first_eligible=4, draft_read_macs=7)
    # A prompt of 4. Token 4 is drafted from, then 5; 6 may not leave. The draft behind 5 is wrong, so 6 was for
    # nothing. The full model's own token then runs to the end by itself.
    fed = (
        FedToken(4, left=1, evaluated=True, stands=True, was_right=True),
        FedToken(5, left=1, evaluated=True, stands=True, was_right=False),
        FedToken(6, left=None, evaluated=False, stands=False, was_right=False),
        FedToken(6, left=None, evaluated=True, stands=True, was_right=False),
    )
    passes = ((0, 1), (0, 1), (0, 2), (0, 2))
    trace = Trace(4, 7, 4, (1, 1, 2), generated=True, verified=VerifiedTrace(fed, passes, verifications=1))
    record = account(trace, terms, cost)

    def token(position: int) -> int:
        return 2 * (100 + 2 * (position + 1))

    assert record.full_macs == token(4) + token(5) + token(6)
    assert record.block_macs == token(4) + token(5) + 2 * token(6)
    assert record.classifier_macs == 3 * 5
    # Two drafts are read, and what was said behind the token that does not stand.
    assert record.lm_head_macs == 2 * 7 + 30
    prompt = sum(token(position) for position in range(4))
    assert record.full_total_macs == record.full_macs + prompt + 4 * 30
    assert record.total_macs == record.spent_macs + prompt + 4 * 30
    assert record.full_weights_read == 4 * 200 + 4 * 30
    # The prompt; a block twice; all blocks twice. One read each of the prompt and of the two passes to the end.
    assert record.weights_read == 200 + 2 * 100 + 2 * 200 + 3 * 30 + 2 * 7 + 3 * 5
    assert (record.drafts, record.right_drafts, record.verifications) == ([[1, 1]], [[1]], 1)
    assert record.exit_layers == [[1, 1, 2]]
    assert record.paper_spent == pytest.approx(4 * 2 + (2 * 7 + 30) / 100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"verify_tokens": 4, "verify": False}, "verify_tokens has no effect without verify=true"),
        ({"state_mode": "skip"}, "verify=true and state_mode exclude each other"),
        ({"target_reduction": 1.2}, "verify=true and target_reduction exclude each other"),
        ({"threshold": "calibrated"}, "verify=true and certificate exclude each other"),
        ({"prune_layers": 1}, "verify=true and prune_layers exclude each other"),
        ({"prompt_exit_layer": 3}, "verify=true and prompt_exit_layer exclude each other"),
        ({"exit_scope": "all"}, "verify=true and exit_scope=all exclude each other"),
        ({"preset": "paper"}, "verify=true and preset exclude each other"),
        ({"rows_in_flight": 8, "batch_size": 2}, "verify=true and rows_in_flight exclude each other"),
        ({"verify_tokens": 0}, "verify_tokens"),
        ({"threshold": "speed", "verify": False}, "threshold=speed needs verify=true"),
        ({"threshold": "speed", "tp_plan": "auto"}, "tp_plan and threshold=speed exclude each other"),
        ({"threshold": "speed", "measure_speed": True}, "threshold=speed and measure_speed exclude each other"),
        ({"threshold": "speed", "target_reduction": 1.2}, "target_reduction and threshold=speed each decide"),
    ],
)
def test_what_goes_against_it_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_model_args({"backbone": "x", "verify": True, **arguments}, ["batch_size", "tp_plan"])


def test_what_it_resolves_to() -> None:
    policy = policy_of(None, verify=True, threshold=(0.5,))
    assert (policy.verify_tokens, policy.state_mode, policy.drafts) == (8, "recompute", True)
    assert policy_of(None, verify=True, threshold=(1.0,)).drafts is False
    assert policy_of(None, verify=True, threshold=(0.5,), confidence="state", vocab_subset=7).vocab_subset == 7
    with pytest.raises(UserError, match="verify is not possible with exits that were trained with a final block"):
        policy_of(None, verify=True, threshold=(0.5,), final_block=True)


@pytest.mark.parametrize("verify", [True, False])
def test_the_clock_against_the_full_model(verify: bool, model_folder: Path, manager: TaskManager) -> None:
    full = evaluate(dynamax(model_folder), manager, "tiny_generate")
    arguments = {**DRAFTING, "verify": verify, "verify_tokens": 4 if verify else None}
    results = evaluate(dynamax(model_folder, measure_speed=True, **arguments), manager, "tiny_generate")
    plain = evaluate(dynamax(model_folder, **arguments), manager, "tiny_generate")
    assert responses(results, "tiny_generate") == responses(plain, "tiny_generate")
    speed, overall = results["compute"]["overall"]["speed"], results["compute"]["overall"]
    texts = zip(responses(plain, "tiny_generate"), responses(full, "tiny_generate"), strict=True)
    assert speed["same_texts"] == pytest.approx(sum(a == b for a, b in texts) / speed["requests"])
    assert speed["same_texts"] == 1 or not verify
    assert speed["realised_speedup"] == pytest.approx(statistics.median(speed["ratios"]))
    # Three requests run side by side, so they are a block.
    assert len(speed["ratios"]) == -(-speed["requests"] // 3)
    assert plain["compute"]["overall"]["speed"] is None
    assert overall["energy"]["joules"] is None and "full model" in overall["energy"]["reason"]


def test_turns_are_taken() -> None:
    """A clock that stands still but for what runs: the full model takes 3 a request, the run 2."""
    now, order = [0.0], []

    def run(requests: Any) -> Any:
        is_full = not requests[0].policy.active_exits
        order.append(is_full)
        for index, _ in enumerate(requests):
            now[0] += 3 if is_full else 2
            yield index, Generation([index], Trace(1, 1, 1, (), True))
        return [is_full]

    policy = policy_of(None, threshold=(0.5,))
    requests = [GenerationRequest([1], 1, policy, Sampler(), lambda _: True) for _ in range(9)]
    log = SpeedLog()
    found, prefixes = drained(paired(requests, 2, run, lambda: now[0], log), len(requests))
    assert len(found) == 9
    assert prefixes == [False] * 5  # of the run's own, of every block
    assert order == [False, True, True, False, False, True, True, False, False, True]
    assert log.to_json() == {"realised_speedup": 1.5, "ratios": [1.5] * 5, "requests": 9, "same_texts": 1.0}


def test_the_fastest_threshold_is_found() -> None:
    """A clock on which a request takes 1 at full depth, and less the nearer a threshold is to 0.8."""
    now, blocks = [0.0], []

    def run(threshold: float, requests: Any) -> None:
        blocks.append((threshold, tuple(requests)))
        now[0] += len(requests) * (1 if threshold == 1 else 0.9 + abs(threshold - 0.8))

    documents = [f"document {i // 2}" for i in range(40)]  # two requests of each
    found = find_fastest(documents, run, lambda: now[0])
    assert (found.threshold, found.documents) == (0.8, 20)
    assert found.speedups[0.8] == pytest.approx(1 / 0.9)
    tried = [requests for threshold, requests in blocks if threshold == 0.6]
    assert sorted(i for requests in tried for i in requests) == list(range(40))
    # Nothing is gained where a draft costs more than it saves.
    slow = find_fastest(documents, lambda threshold, _: now.append(now.pop() + 2 - threshold), lambda: now[-1])
    assert slow.threshold == 1


def test_a_run_at_the_fastest_threshold(model_folder: Path, manager: TaskManager) -> None:
    arguments = {**DRAFTING, "threshold": "speed"}
    results = evaluate(dynamax(model_folder, **arguments), manager, "tiny_generate", "tiny_choice")
    full = evaluate(dynamax(model_folder), manager, "tiny_generate", "tiny_choice")
    for task in ("tiny_generate", "tiny_choice"):
        assert responses(results, task) == responses(full, task)
    section = results["config"]["dynamax"]
    # Scores are made at once, so there is nothing to choose.
    assert list(section["budget"]["by_task"]) == ["tiny_generate"]
    assert set(section["budget"]["by_task"]["tiny_generate"]["speedups"]) == {"0.5", "0.6", "0.7", "0.8", "0.9", "0.95"}
    assert section["label"].startswith("softmax-verify-speed-")
    assert section["policy"]["thresholds"] is None


def test_a_family_of_sweeps(model_folder: Path, tmp_path: Path) -> None:
    options = sweep_options(
        model_folder, tmp_path, state_modes="verify,recompute", verify_at="2,4", verify_tokens=3, prune=""
    )
    sweep(options)
    names = {point["point"] for point in finished_points(tmp_path)}
    assert names >= {"full", "state-verify-0.3", "state-recompute-0.3", "verify-at-2", "verify-at-4"}
    for task in read([tmp_path], 1.0):
        for point in task.points:
            if point.kind == "verified":
                assert point.answers == task.full.answers
                assert point.scores == task.full.scores
                assert point.policy["verify_tokens"] == 3
    report(ReportOptions([str(tmp_path)], draws=50, bootstrap=20))
    table = pd.read_csv(tmp_path / "report" / "points.csv")
    drafted = table[(table["family"] == "verified") & (table["task"] == "tiny_generate")]
    assert len(drafted) == 4
    assert (drafted["accepted_length"] >= 1).all()
    assert table[table["point"] == "full"]["weights_reduction"].dropna().tolist() == [1.0]
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    _, title, after = text.partition("### Exits as drafts")
    section = after.partition("\n##")[0]
    assert title and "| verify-at-2" in section and "weights_reduction" in section
    (page_text,) = re.findall(r'id="data">\n(\S+)\n', (tmp_path / "report" / "report.html").read_text(encoding="utf-8"))
    tasks = json.loads(gzip.decompress(base64.b64decode(page_text)))["tasks"]
    elsewhere = re.sub("### Exits as drafts.*?(?=\n##)", "", text, flags=re.DOTALL)
    assert not re.search("verify-at|state-verify|drafts at one exit", elsewhere)
    drafted_names = {"state-verify-0.3", "state-verify-0.6", "verify-at-2", "verify-at-4"}
    for task in tasks:
        assert {point["name"] for point in task["points"]} == {"full", "state-recompute-0.3", "state-recompute-0.6"}
        assert {row["point"] for row in task["drafts"]} == drafted_names
        assert not any(drafted_names & set(pairs) for pairs in task["pairs"].values())
    assert drafted["p_value"].isna().all(), "nothing is compared that is the same by design"
    # They save nothing, so they are on no line.
    assert "drafts at one exit" not in [name for task in read([tmp_path], 1.0) for name in task.series()]


def test_options_of_sweeps_go_together(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--verify_tokens has no effect without --state_modes verify or --verify_at"):
        sweep_options(model_folder, tmp_path, verify_tokens=3)
    with pytest.raises(UserError, match="--verify_tokens must be at least 1"):
        sweep_options(model_folder, tmp_path, state_modes="verify", verify_tokens=0)
