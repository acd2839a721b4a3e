"""Exit classifiers and final blocks in the engine, against early exit written a second time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import LAYERS, random_ids, tiny_model
from helpers_engine import (
    CLASSIFIERS,
    EXITS,
    KINDS,
    NEW_TOKENS,
    PROMPTS,
    classifier_policy,
    engine_with_exits,
    is_separated,
    run_generate,
    run_score,
    separated,
    separated_policy,
)
from reference import RECURRENT, reference_generate, reference_score

from dynamax_lm_eval.backbones import make_backbone
from dynamax_lm_eval.compute.accounting import account
from dynamax_lm_eval.compute.cost import EvaluationCost
from dynamax_lm_eval.compute.trace import Trace
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.exits.policy import ExitPolicy


@pytest.mark.parametrize("final_block", [False, True])
@pytest.mark.parametrize("mode", ["recompute", "copy", "skip"])
@pytest.mark.parametrize("kind", KINDS)
def test_generation_through_classifiers_equals_the_reference(kind: str, mode: Any, final_block: bool) -> None:
    model = tiny_model("llama")
    policy = separated(classifier_policy(kind, state_mode=mode, final_block=final_block))
    prompts = PROMPTS[:4]
    expected = [reference_generate(model, policy, prompt, NEW_TOKENS, CLASSIFIERS) for prompt in prompts]
    assert is_separated(*(row for _, row in expected))
    results = run_generate(engine_with_exits(), [policy] * 4, prompts, max_rows=2)
    for (tokens, row), result in zip(expected, results, strict=True):
        assert result.tokens == tokens
        assert list(result.trace.exit_layers) == row.layers[result.trace.prompt_tokens :]
    assert {layer for _, row in expected for layer in row.layers} > {LAYERS}


@pytest.mark.parametrize("scope", ["generated", "all"])
@pytest.mark.parametrize("warmup", [16, 0, 3])
@pytest.mark.parametrize("final_block", [False, True])
@pytest.mark.parametrize("kind", RECURRENT)
def test_scoring_through_recurrent_classifiers_equals_feeding_one_by_one(
    kind: str, scope: Any, warmup: int, final_block: bool
) -> None:
    model = tiny_model("mistral")
    policy = classifier_policy(kind, exit_scope=scope, classifier_warmup=warmup, final_block=final_block)
    policy = separated(policy, "mistral")
    pairs = [(prompt, random_ids(9, 70 + i)) for i, prompt in enumerate(PROMPTS)]
    results = run_score(engine_with_exits("mistral"), policy, pairs, 3)
    for (context, continuation), result in zip(pairs, results, strict=True):
        expected, row = reference_score(model, policy, context, continuation, CLASSIFIERS)
        assert is_separated(row)
        assert [line[0] for line in result.log_probs] == pytest.approx(expected, abs=1e-4)
        first = 1 if scope == "all" else len(context)
        assert list(result.trace.exit_layers) == row.layers[first:]


@pytest.mark.parametrize("confidence", ["softmax", "entropy", "state"])
def test_final_block_with_training_free_confidences(confidence: Any) -> None:
    model = tiny_model("qwen3")
    policy = ExitPolicy(LAYERS, EXITS, (0.5,) * 3, confidence=confidence, final_block=True)
    policy = separated_policy(model, policy, PROMPTS[0])
    engine = Engine(make_backbone(model, max_length=256))
    expected = [reference_generate(model, policy, prompt, NEW_TOKENS) for prompt in PROMPTS[:3]]
    for (tokens, row), result in zip(expected, run_generate(engine, [policy] * 3, PROMPTS[:3], 3), strict=True):
        assert result.tokens == tokens
        assert list(result.trace.exit_layers) == row.layers[result.trace.prompt_tokens :]


def test_rows_of_one_batch_may_use_different_confidences() -> None:
    policies = [separated(classifier_policy(kind)) for kind in KINDS]
    policies.append(separated(classifier_policy("mamba", final_block=True, state_mode="skip")))
    for name in ("softmax", "entropy", "state"):
        policies.append(separated(ExitPolicy(LAYERS, EXITS, (0.5,) * 3, confidence=name)))  # type: ignore[arg-type]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(policies))]
    alone = [
        run_generate(engine_with_exits(), [policy], [prompt], 1)[0]
        for policy, prompt in zip(policies, prompts, strict=True)
    ]
    assert run_generate(engine_with_exits(), policies, prompts, len(policies)) == alone


def test_threshold_1_evaluates_no_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    for layer in EXITS:
        monkeypatch.setattr(CLASSIFIERS.at("mamba", layer), "forward", lambda *_, layer=layer: calls.append(layer))
    run_generate(engine_with_exits(), [classifier_policy("mamba", thresholds=(1.0,) * 3)], PROMPTS[:1], 1)
    assert calls == []


@pytest.mark.parametrize("kind", RECURRENT)
def test_compute_of_classifiers_warm_up_and_final_block(kind: str) -> None:
    """One row by hand: a prompt of 5 tokens, then tokens that left at 2, at 4 and not at all."""
    cost = engine_with_exits().backbone.cost
    costs = {layer: EvaluationCost(macs, 2 * macs) for layer, macs in {2: 100, 3: 10, 4: 1}.items()}
    trace = Trace(5, 8, 4, (2, 4, LAYERS), generated=True)
    policy = classifier_policy(kind, final_block=True, classifier_warmup=3)
    record = account(trace, policy.cost_terms(5, costs), cost)
    assert record.classifier_macs == 3 * 111 + 100 + 111 + 111
    blocks = [block.at for block in cost.blocks]
    left_at = [(5, (1, 2, 6)), (6, (1, 2, 3, 4, 6)), (7, tuple(range(1, 7)))]
    assert record.block_macs == sum(blocks[b - 1](position) for position, ran in left_at for b in ran)
    skipped = [3, 4, 5, 5]  # by the first token and by the second; block 6 wrote its own state
    assert record.recompute_macs == sum(cost.blocks[b - 1].state_recompute for b in skipped)
    weights = 2 * record.classifier_macs
    assert record.paper_spent == pytest.approx(3 + 5 + 6 + 4 / 6 + weights / cost.mean_block_weights)
    calm = account(trace, classifier_policy("calm").cost_terms(5, costs), cost)
    assert calm.classifier_macs == 100 + 111 + 111


def test_without_eligible_tokens_there_is_no_reduction() -> None:
    """Also where prompts warmed a classifier, which costs something."""
    trace = Trace(5, 5, 1, (), generated=True)
    costs = dict.fromkeys(EXITS, EvaluationCost(100, 100))
    record = account(trace, classifier_policy("mamba").cost_terms(5, costs), engine_with_exits().backbone.cost)
    assert record.classifier_macs == 3 * 5 * 100
    assert record.compute_reduction == record.compute_reduction_paper == 1
    assert record.compute_reduction_total < 1


def test_lengths_of_rows_are_found_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that finishes frees its line for the next, whose state begins anew."""
    engine = engine_with_exits()
    policy = separated(classifier_policy("mamba"))
    together = run_generate(engine, [policy] * len(PROMPTS), PROMPTS, 2)
    alone = [run_generate(engine, [policy], [prompt], 1)[0] for prompt in PROMPTS]
    assert together == alone
    assert np.any([layer < LAYERS for result in alone for layer in result.trace.exit_layers])
