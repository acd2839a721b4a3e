"""``confidence=cascade``: a classifier proposes, and the read-out that an accepted exit needs anyway confirms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LAYERS, tiny_model
from helpers_engine import (
    CLASSIFIERS,
    EXITS,
    KINDS,
    NEW_TOKENS,
    PROMPTS,
    assert_confidences,
    classifier_policy,
    engine_with_exits,
    exits_config,
    is_separated,
    policy_of,
    run_generate,
    run_score,
    varied_classifiers,
)
from reference import reference_generate, reference_score

from dynamax_lm_eval.backbones import TransformerBackbone
from dynamax_lm_eval.compute.accounting import account
from dynamax_lm_eval.compute.cost import BackboneCost, BlockCost, ExitCost
from dynamax_lm_eval.compute.trace import Trace
from dynamax_lm_eval.config import DynamaxArgs
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.classifiers import ExitClassifiers
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.sweep.grid import grid
from dynamax_lm_eval.sweep.options import SweepOptions


def cascade(kind: str = "calm", **changes: Any) -> ExitPolicy:
    return classifier_policy(kind, confidence="cascade", propose=0.45, thresholds=(0.25,) * len(EXITS), **changes)


def refused_layers(trace: Trace) -> list[int]:
    """The exits at which tokens were refused, token by token."""
    return [EXITS[i] for bits in trace.refused for i in range(len(EXITS)) if bits >> i & 1]


@pytest.mark.parametrize("vocab_subset", [None, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_decides_as_the_reference(kind: str, vocab_subset: int | None) -> None:
    policy, model = cascade(kind, vocab_subset=vocab_subset), tiny_model("llama")
    expected = [reference_generate(model, policy, prompt, NEW_TOKENS, CLASSIFIERS) for prompt in PROMPTS]
    assert is_separated(*(row for _, row in expected))
    engine = engine_with_exits()
    results = run_generate(engine, [policy] * len(PROMPTS), PROMPTS, max_rows=3)
    waiting = run_generate(engine, [policy] * len(PROMPTS), PROMPTS, max_rows=2, rows_in_flight=4)
    left, refused = 0, 0
    for prompt, result, waited, (tokens, row) in zip(PROMPTS, results, waiting, expected, strict=True):
        assert result.tokens == tokens
        assert list(result.trace.exit_layers) == row.layers[len(prompt) :]
        assert refused_layers(result.trace) == row.refused
        # A token that waits at an exit for a full batch has been refused there all the same.
        assert waited.trace == result.trace
        for trace in (result.trace, waited.trace):
            assert_confidences(trace, row, policy)
        left += sum(layer < LAYERS for layer in result.trace.exit_layers)
        refused += len(row.refused)
    assert left and refused


def fitted() -> ExitClassifiers:
    """Exits with confirmers that weigh all that they see."""
    classifiers = varied_classifiers(exits_config(confirms=True))
    for i, layer in enumerate(EXITS):
        for kind in KINDS:
            confirmer = classifiers.confirmer(kind, layer)
            confirmer.weight.copy_(torch.tensor([1.5, 0.4 + 0.2 * i, 0.7]))
            confirmer.bias.fill_(-0.3)
    return classifiers


@pytest.mark.parametrize("kind", ["calm", "mamba"])
def test_confirms_by_both_as_the_reference(kind: str) -> None:
    policy, model, classifiers = cascade(kind, confirm="fitted"), tiny_model("llama"), fitted()
    expected = [reference_generate(model, policy, prompt, NEW_TOKENS, classifiers) for prompt in PROMPTS]
    assert is_separated(*(row for _, row in expected))
    engine = Engine(TransformerBackbone(model, max_length=256), classifiers)
    others = run_generate(engine, [replace(policy, confirm="read_out")] * len(PROMPTS), PROMPTS, max_rows=3)
    results = run_generate(engine, [policy] * len(PROMPTS), PROMPTS, max_rows=3)
    left, refused = 0, 0
    for prompt, result, (tokens, row) in zip(PROMPTS, results, expected, strict=True):
        assert result.tokens == tokens
        assert list(result.trace.exit_layers) == row.layers[len(prompt) :]
        assert refused_layers(result.trace) == row.refused
        left += sum(layer < LAYERS for layer in result.trace.exit_layers)
        refused += len(row.refused)
    assert left and refused
    assert [result.trace for result in results] != [other.trace for other in others]
    scored = run_score(engine, policy, [(prompt, [5, 17, 60, 3]) for prompt in PROMPTS], 3)
    alone = [run_score(engine, policy, [(prompt, [5, 17, 60, 3])], 1)[0] for prompt in PROMPTS]
    assert [result.trace for result in scored] == [result.trace for result in alone]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_confirmers_are_in_float32_under_autocast(dtype: torch.dtype) -> None:
    confirmer = fitted().confirmer("calm", EXITS[0])
    log_odds, two_best = torch.randn(20), torch.rand(20, 2).sort(descending=True).values / 2
    plain = confirmer(log_odds, two_best)
    with torch.autocast("cpu", dtype):
        narrow = confirmer(log_odds, two_best)
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow, plain)


def test_one_that_was_never_fitted_is_the_read_out() -> None:
    classifiers = varied_classifiers(exits_config(confirms=True))
    engine = Engine(TransformerBackbone(tiny_model("llama"), max_length=256), classifiers)
    first, second = (
        run_generate(engine, [cascade(confirm=confirm)] * len(PROMPTS), PROMPTS, 3)
        for confirm in ("fitted", "read_out")
    )
    assert [result.trace for result in first] == [result.trace for result in second]


@pytest.mark.parametrize("scope", ["generated", "all"])
def test_scored_as_one_by_one(scope: Any) -> None:
    policy = cascade(exit_scope=scope)
    pairs = [(prompt, [5, 17, 60, 3, 41, 8]) for prompt in PROMPTS]
    model = tiny_model("llama")
    expected = [reference_score(model, policy, *pair, CLASSIFIERS) for pair in pairs]
    assert is_separated(*(row for _, row in expected))
    for (context, _), result, (scores, row) in zip(
        pairs, run_score(engine_with_exits(), policy, pairs, 3), expected, strict=True
    ):
        assert [line[0] for line in result.log_probs] == pytest.approx(scores, abs=1e-4)
        first = 1 if scope == "all" else len(context)
        assert list(result.trace.exit_layers) == row.layers[first:]
        assert refused_layers(result.trace) == row.refused


def test_never_proposed_is_the_classifier_that_never_exits() -> None:
    policy = replace(cascade(), propose=1.0)
    full = ExitPolicy(LAYERS)
    engine = engine_with_exits()
    results = run_generate(engine, [policy] * len(PROMPTS), PROMPTS, 3)
    assert [r.tokens for r in results] == [r.tokens for r in run_generate(engine, [full] * len(PROMPTS), PROMPTS, 3)]
    assert all(result.trace.refused == () for result in results)


def test_always_proposed_costs_what_a_read_at_every_exit_costs() -> None:
    """With the classifier always sure, every exit is read, and the reads are those of ``softmax``."""
    engine = engine_with_exits()
    policy = replace(cascade(), propose=0.0)
    for result in run_generate(engine, [policy] * len(PROMPTS), PROMPTS, 3):
        record = engine.account(result.trace, policy)
        reads = sum(
            sum(exit_layer <= layer for exit_layer in EXITS) - (layer < LAYERS) for layer in result.trace.exit_layers
        )
        assert record.lm_head_macs == reads * engine.backbone.cost.lm_head
        assert len(result.tokens) == NEW_TOKENS


def test_counted_by_hand() -> None:
    cost = BackboneCost((BlockCost(100, 0, None, 10),) * 4, lm_head=30)
    terms = ExitCost((1, 2), (5, 6), False, False, frozenset(), 1, adapter_macs=(2, 3), confirm_read_macs=30)
    # The first token leaves at exit 1; the second is refused at both; the third at 1, and leaves at 2.
    trace = Trace(1, 4, 4, (1, 4, 2), generated=True, refused=(0b00, 0b11, 0b01))
    record = account(trace, terms, cost)
    assert record.classifier_macs == 5 + (5 + 6) + (5 + 6)
    assert record.lm_head_macs == 3 * 30
    # Refused reads went through the adapters as well as those that gave tokens.
    assert record.adapter_macs == (2 + 2 + 3) + (2 + 3)
    partial = replace(terms, confirm_read_macs=7, reads_to_confirm_alone=True)
    # Of a part of the vocabulary, a read gives no token: those that confirmed come on top.
    assert account(trace, partial, cost).lm_head_macs == (3 + 2) * 7


@pytest.mark.parametrize("vocab_subset", [None, 40])
def test_drafts_of_a_cascade_are_verified(vocab_subset: int | None) -> None:
    engine, full = engine_with_exits(), ExitPolicy(LAYERS)
    policy = cascade(verify_tokens=3, vocab_subset=vocab_subset)
    drafted = run_generate(engine, [policy] * len(PROMPTS), PROMPTS, 3)
    assert [r.tokens for r in drafted] == [r.tokens for r in run_generate(engine, [full] * len(PROMPTS), PROMPTS, 3)]
    alone = [run_generate(engine, [policy], [prompt], 1)[0].trace for prompt in PROMPTS]
    assert [result.trace for result in drafted] == alone
    refused = [token.refused for trace in alone if trace.verified for token in trace.verified.fed]
    assert any(refused)
    for trace in alone:
        assert trace.verified is not None
        record = engine.account(trace, policy)
        read = engine.backbone.cost.lm_head if vocab_subset is None else vocab_subset * engine.backbone.hidden_size
        fed = trace.verified.fed
        asked = sum(int(token.refused).bit_count() for token in fed) + len(trace.verified.drafts)
        taken_back = sum(not token.stands for token in fed) * engine.backbone.cost.lm_head
        assert record.lm_head_macs == asked * read + taken_back


def test_what_it_resolves_to() -> None:
    trained = replace(exits_config(), adapter="none")
    policy = policy_of(trained, confidence="cascade", threshold=(0.6,), classifier="calm")
    assert (policy.confidence, policy.classifier, policy.propose) == ("cascade", "calm", 0.5)
    assert policy_of(trained, confidence="cascade", threshold=(0.6,), propose=0.3).propose == 0.3
    with pytest.raises(UserError, match="propose needs confidence=cascade; this run uses classifier"):
        policy_of(trained, propose=0.3)
    with pytest.raises(UserError, match="confidence=cascade needs exits that were trained"):
        policy_of(None, confidence="cascade", threshold=(0.6,))
    assert policy_of(trained, confidence="cascade", threshold=(0.6,)).confirm == "read_out"
    with pytest.raises(UserError, match="confirm=fitted needs exits with confirmers"):
        policy_of(trained, confidence="cascade", threshold=(0.6,), confirm="fitted")
    confirms = replace(trained, confirms=True)
    assert policy_of(confirms, confidence="cascade", threshold=(0.6,)).confirm == "fitted"
    assert policy_of(confirms, confidence="cascade", threshold=(0.6,), confirm="read_out").confirm == "read_out"
    assert policy_of(confirms, confidence="cascade", threshold=(0.6,), vocab_subset=40).confirm == "read_out"
    assert policy_of(confirms).confirm == "read_out"
    with pytest.raises(UserError, match="confirm=fitted reads the whole vocabulary"):
        policy_of(confirms, confidence="cascade", threshold=(0.6,), vocab_subset=40, confirm="fitted")
    with pytest.raises(UserError, match="confirm needs confidence=cascade"):
        policy_of(confirms, confirm="fitted")
    with pytest.raises(UserError, match="cascade and final_block exclude each other"):
        policy_of(replace(trained, final_block=True), confidence="cascade", threshold=(0.6,))


def test_a_family_of_sweeps() -> None:
    options = SweepOptions(
        "x", "task", "out", confidences="calm,cascade:calm", propose="0.3,0.5", thresholds="0.6", state_modes="skip"
    )
    points = grid(options, DynamaxArgs("x"), exits_config())
    assert [point.name for point in points[1:]] == [
        "calm-skip-0.6",
        "cascade-calm-0.3-skip-0.6",
        "cascade-calm-0.5-skip-0.6",
    ]
    assert [(p.args.confidence, p.args.classifier, p.args.propose) for p in points[2:]] == [
        ("cascade", "calm", 0.3),
        ("cascade", "calm", 0.5),
    ]
    both = grid(replace(options, confirm="read_out"), DynamaxArgs("x"), exits_config())
    assert [point.args.confirm for point in both[1:]] == [None, "read_out", "read_out"]
    assert both[2].name == "cascade-calm-0.3-read_out-skip-0.6", "apart from points that say nothing"
    with pytest.raises(UserError, match="--confirm has no effect without a cascade"):
        replace(options, confidences="calm", propose=None, confirm="fitted")
    with pytest.raises(UserError, match="--confirm must be read_out or fitted"):
        replace(options, confirm="both")
    with pytest.raises(UserError, match="--propose must be numbers in"):
        grid(replace(options, propose="2"), DynamaxArgs("x"), exits_config())


def test_bits_are_those_of_the_exits_in_use() -> None:
    terms = ExitCost((2, 4), (0, 0), False, False, frozenset(), 1, confirm_read_macs=10)
    assert terms.refused_macs(np.asarray([0b10, 0b11, 0])) == (30, 0)
