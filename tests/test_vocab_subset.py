"""Confidences made of the logits of a part of the vocabulary, against early exit written a second time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LAYERS, VOCAB, random_ids, tiny_model
from helpers_engine import (
    EXITS,
    NEW_TOKENS,
    PROMPTS,
    classifier_policy,
    drained,
    engine_for,
    engine_with_exits,
    exits_config,
    is_separated,
    policy_of,
    run_generate,
    run_score,
    separated,
    separated_policy,
    varied_classifiers,
)
from reference import Reference, reference_generate, reference_score

from dynamax_lm_eval.backbones import make_backbone
from dynamax_lm_eval.backbones.whole_rows import WholeRowBackbone
from dynamax_lm_eval.compute.trace import Trace
from dynamax_lm_eval.config import parse_model_args
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.generation import generate
from dynamax_lm_eval.engine.requests import GenerationRequest
from dynamax_lm_eval.engine.sampling import Sampler
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.exits.vocabulary import row_vocabulary
from dynamax_lm_eval.models import devices

#: Of a fused Llama, a replayed block with a soft-capped read-out or none, and Mamba.
FAMILIES = ("llama", "gemma3", "gpt_neox", "mamba2")
SIZE = 20


def policy_with(confidence: Any = "softmax", size: int | None = SIZE, **changes: Any) -> ExitPolicy:
    return replace(ExitPolicy(LAYERS, EXITS, (0.5,) * 3, confidence=confidence, vocab_subset=size), **changes)


@pytest.mark.parametrize(
    ("prompt", "size", "expected"),
    [
        ([7, 3, 7, 90], 6, {7, 3, 90, 0, 1, 2}),
        ([0, 1, 2], 3, {0, 1, 2}),
        ([0, 1, 2], 5, {0, 1, 2, 3, 4}),
        ([50, 60, 50, 70, 80], 3, {50, 70, 80}),
        ([2], 2, {0, 2}),
        ([0], 2, {0, 1}),
        ([1, 3, 5], 4, {0, 1, 3, 5}),
    ],
)
def test_the_tokens_of_a_row(prompt: list[int], size: int, expected: set[int]) -> None:
    found = row_vocabulary(prompt, size)
    assert found.ids.tolist() == sorted(expected)
    assert all(token >= found.first for token in found.others)


@pytest.mark.parametrize("confidence", ["softmax", "entropy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_the_reference_alone_and_in_a_batch(family: str, confidence: Any) -> None:
    model, prompts = tiny_model(family), PROMPTS[:4]
    policy = separated_policy(model, policy_with(confidence), prompts[0])
    expected = [reference_generate(model, policy, prompt, NEW_TOKENS) for prompt in prompts]
    assert is_separated(*(row for _, row in expected))
    for max_rows in (1, 3):
        results = run_generate(engine_for(family), [policy] * 4, prompts, max_rows)
        for (tokens, row), result in zip(expected, results, strict=True):
            assert result.tokens == tokens
            assert list(result.trace.exit_layers) == row.layers[result.trace.prompt_tokens :]
    assert {layer for _, row in expected for layer in row.layers} > {LAYERS}


@pytest.mark.parametrize("scope", ["generated", "all"])
@pytest.mark.parametrize("final_block", [False, True])
def test_scoring_equals_feeding_one_by_one(scope: Any, final_block: bool) -> None:
    model = tiny_model("mistral")
    policy = separated_policy(model, policy_with(exit_scope=scope, final_block=final_block), PROMPTS[0])
    pairs = [(prompt, random_ids(9, 70 + i)) for i, prompt in enumerate(PROMPTS)]
    results = run_score(engine_for("mistral"), policy, pairs, 3)
    for (context, continuation), result in zip(pairs, results, strict=True):
        expected, row = reference_score(model, policy, context, continuation)
        assert is_separated(row)
        assert [line[0] for line in result.log_probs] == pytest.approx(expected, abs=1e-4)
        assert list(result.trace.exit_layers) == row.layers[1 if scope == "all" else len(context) :]


def test_adapters_correct_what_is_read() -> None:
    model = tiny_model("llama")
    classifiers = varied_classifiers(exits_config(adapter="affine"))
    with torch.no_grad():
        for parameter in classifiers.adapters.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    policy = separated_policy(model, policy_with(adapter="affine"), PROMPTS[0], classifiers=classifiers)
    engine = Engine(make_backbone(model, max_length=256), classifiers)
    expected = [reference_generate(model, policy, prompt, NEW_TOKENS, classifiers) for prompt in PROMPTS[:3]]
    for (tokens, row), result in zip(expected, run_generate(engine, [policy] * 3, PROMPTS[:3], 3), strict=True):
        assert result.tokens == tokens
        assert list(result.trace.exit_layers) == row.layers[result.trace.prompt_tokens :]
    # The state is corrected once at every evaluation, as where all logits are read.
    trace = Trace(4, 6, 3, (2, LAYERS), generated=True)
    assert engine.account(trace, policy).adapter_macs == engine.account(trace, policy_with(size=None)).adapter_macs
    assert engine.account(trace, policy).adapter_macs == (1 + 3) * 32 * 32


def test_rows_of_one_batch_may_look_at_different_parts() -> None:
    policies = [
        separated(policy)
        for policy in (
            policy_with(size=20),
            policy_with(size=5),
            policy_with("entropy", 20),
            policy_with(size=None),
            classifier_policy("calm"),
        )
    ]
    alone = [
        run_generate(engine_with_exits(), [policy], [prompt], 1)[0]
        for policy, prompt in zip(policies, PROMPTS, strict=True)
    ]
    assert run_generate(engine_with_exits(), policies, PROMPTS, 5) == alone


@pytest.mark.parametrize("scope", ["generated", "all"])
def test_shared_prefixes_change_nothing(scope: Any) -> None:
    """Where prompt tokens may leave, they depend on the prompt as a whole, and nothing is shared."""
    preamble = random_ids(70, 5)
    prompts = [[*preamble, *prompt] for prompt in PROMPTS[:3]]
    policy = separated_policy(tiny_model("llama"), policy_with(exit_scope=scope), prompts[0])
    requests = [GenerationRequest(prompt, NEW_TOKENS, policy, Sampler(), lambda _: False) for prompt in prompts]
    shared, runs = drained(generate(engine_for("llama"), requests, 3), 3)
    alone, _ = drained(generate(engine_for("llama"), requests, 3, share_prefixes=False), 3)
    assert bool(runs) == (scope == "generated")
    assert [(r.tokens, r.trace) for r in shared] == [(r.tokens, r.trace) for r in alone]


def test_rows_that_wait_at_exits_change_nothing() -> None:
    policy = separated(policy_with())
    prompts = [*PROMPTS, *(random_ids(5, 40 + i) for i in range(4))]
    expected = run_generate(engine_for("llama"), [policy] * 9, prompts, 2)
    assert run_generate(engine_for("llama"), [policy] * 9, prompts, 2, rows_in_flight=6) == expected


@pytest.mark.parametrize("confidence", ["softmax", "entropy"])
def test_all_tokens_but_one_are_nearly_all(confidence: Any) -> None:
    """Confidences differ by what the one token has of the probability."""
    model, prompt = tiny_model("llama"), PROMPTS[0]
    seen: list[list[float]] = []
    for size in (None, VOCAB - 1):
        reference = Reference(model, policy_with(confidence, size, thresholds=(0.9999,) * 3), len(prompt), 9, None)
        reference.prompt = prompt
        for token in [*prompt, *random_ids(8, 3)]:
            reference.feed(token)
        seen.append(reference.row.confidences)
    assert np.median(np.abs(np.subtract(*seen))) < 0.02
    scored = [
        run_score(engine_for("llama"), policy_with(confidence, size), [(prompt, random_ids(9, 3))], 1)[0]
        for size in (None, VOCAB - 1)
    ]
    layers = np.asarray([scoring.trace.exit_layers for scoring in scored])
    assert (layers[0] == layers[1]).mean() >= 0.8


@pytest.mark.parametrize("final_block", [False, True])
def test_compute_by_hand(final_block: bool) -> None:
    """A prompt of 5 tokens, then tokens that left at 2, at 4 and not at all: 1, 3 and 3 evaluations."""
    engine = engine_for("llama")
    trace = Trace(5, 8, 4, (2, 4, LAYERS), generated=True)
    record = engine.account(trace, policy_with(final_block=final_block))
    assert record.lm_head_macs == (1 + 3 + 3) * SIZE * 32
    assert record.classifier_macs == record.adapter_macs == 0
    whole = engine.account(trace, policy_with(size=None, final_block=final_block))
    assert whole.lm_head_macs == (7 if final_block else 5) * VOCAB * 32, "two of them give the tokens that left"
    assert record.total_macs - whole.total_macs == record.lm_head_macs - whole.lm_head_macs
    unit = engine.backbone.cost.mean_block_weights
    assert (record.paper_spent - whole.paper_spent) * unit == pytest.approx(record.lm_head_macs - whole.lm_head_macs)


def test_no_more_is_read_for_a_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted is what is read."""
    engine, policy = engine_for("llama"), separated(policy_with())
    backbone, read = engine.backbone, [0]
    readout_of = backbone.readout_of

    def counting(hidden: torch.Tensor, first: int, others: torch.Tensor) -> torch.Tensor:
        logits = readout_of(hidden, first, others)
        read[0] += logits.numel()
        return logits

    monkeypatch.setattr(backbone, "readout_of", counting)
    (result,) = run_generate(engine, [policy], PROMPTS[:1], 1)
    assert engine.account(result.trace, policy).lm_head_macs == read[0] * 32 > 0


class TestRefusals:
    @pytest.mark.parametrize("size", ["1", "-3", "all", "2.5"])
    def test_sizes(self, size: str) -> None:
        with pytest.raises(UserError, match="vocab_subset must be"):
            parse_model_args({"backbone": "x", "vocab_subset": size}, ())
        assert parse_model_args({"backbone": "x", "vocab_subset": "2"}, ())[0].vocab_subset == 2

    @pytest.mark.parametrize("confidence", ["state", "classifier"])
    def test_other_confidences(self, confidence: Any) -> None:
        with pytest.raises(UserError, match=f"vocab_subset needs confidence=softmax, entropy or .* uses {confidence}"):
            policy_of(exits_config() if confidence == "classifier" else None, confidence=confidence, vocab_subset=9)

    def test_it_is_part_of_the_policy_only_where_it_is_used(self) -> None:
        assert policy_of(None, vocab_subset=9).describe()["vocab_subset"] == 9
        assert "vocab_subset" not in policy_of(None).describe()
        assert policy_of(None, vocab_subset=9, threshold=(1.0,)).vocab_subset is None

    @pytest.mark.parametrize("size", [VOCAB, VOCAB + 1])
    def test_a_part_is_smaller_than_the_whole(self, size: int) -> None:
        with pytest.raises(UserError, match=f"vocab_subset={size} must be below .* vocabulary, {VOCAB}"):
            engine_for("llama").check_policy(policy_with(size=size))

    def test_heads_whose_rows_cannot_be_read(self) -> None:
        engine_for("llama").check_policy(policy_with())
        whole_rows = Engine(WholeRowBackbone(tiny_model("llama")))
        with pytest.raises(UserError, match="vocab_subset is not possible on LlamaForCausalLM"):
            whole_rows.check_policy(policy_with())

    def test_a_hooked_head(self) -> None:
        engine = engine_for("qwen2")
        head = tiny_model("qwen2").get_output_embeddings()
        handle = head.register_forward_hook(lambda *_: None)
        try:
            with pytest.raises(UserError, match="linear LM head whose rows can be read"):
                engine.check_policy(policy_with())
        finally:
            handle.remove()

    def test_processes_that_share_the_head(self) -> None:
        devices.check_whole_head(True, None)
        with pytest.raises(UserError, match="vocab_subset is not possible with tp_plan"):
            devices.check_whole_head(True, 9)
