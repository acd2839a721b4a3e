"""Prompts that leave: all prompt tokens but the last few exit at one layer, without a decision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from helpers import LAYERS, random_ids, tiny_model
from helpers_engine import (
    CLASSIFIERS,
    EXITS,
    NEW_TOKENS,
    PROMPTS,
    exits_config,
    is_separated,
    policy_of,
    run_generate,
    run_score,
    separated_policy,
)
from reference import reference_generate, reference_score
from test_learned_states import exits_for

from dynamax_lm_eval.backbones import make_backbone
from dynamax_lm_eval.compute.trace import Trace
from dynamax_lm_eval.config import parse_model_args
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.generation import generate_all
from dynamax_lm_eval.engine.requests import GenerationRequest
from dynamax_lm_eval.engine.sampling import Sampler
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.exits.state_maps import StateMapOptions


def prompt_policy(mode: str, confidence: str = "classifier", keep: int = 3, **changes: Any) -> ExitPolicy:
    kind = "mamba" if confidence == "classifier" else None
    policy = ExitPolicy(LAYERS, EXITS, (0.5,) * 3, confidence=confidence, classifier=kind, state_mode=mode)  # type: ignore[arg-type]
    return replace(policy, prompt_exit_layer=3, prompt_exit_keep=keep, **changes)


@pytest.mark.parametrize("mode", ["learned", "recompute", "copy", "skip"])
@pytest.mark.parametrize("family", ["llama", "mistral", "mamba2", "gpt_neox"])
def test_generation_equals_the_reference(family: str, mode: str) -> None:
    if family == "mamba2" and mode == "copy":
        pytest.skip("a state that sums up the past has nothing of one token to copy")
    model = tiny_model(family)
    backbone = make_backbone(model, max_length=256)
    exits = exits_for(family, "linear", backbone) if mode == "learned" else CLASSIFIERS
    policy = separated_policy(model, prompt_policy(mode), PROMPTS[0], classifiers=exits)
    expected = [reference_generate(model, policy, prompt, NEW_TOKENS, exits) for prompt in PROMPTS[:3]]
    assert is_separated(*(row for _, row in expected))
    results = run_generate(Engine(backbone, exits), [policy] * 3, PROMPTS[:3], max_rows=2)
    for prompt, (tokens, row), result in zip(PROMPTS, expected, results, strict=False):
        assert row.layers[: len(prompt)] == [3] * (len(prompt) - 3) + [LAYERS] * 3
        assert result.tokens == tokens
        assert list(result.trace.exit_layers) == row.layers[len(prompt) :]


def test_scoring_and_rows_without_exits_of_prompts() -> None:
    model = tiny_model("llama")
    engine = Engine(make_backbone(model, max_length=256), CLASSIFIERS)
    policy = separated_policy(model, prompt_policy("recompute", keep=1), PROMPTS[0], classifiers=CLASSIFIERS)
    pairs = [(prompt, random_ids(9, 70 + i)) for i, prompt in enumerate(PROMPTS)]
    for (context, continuation), result in zip(pairs, run_score(engine, policy, pairs, 3), strict=True):
        expected, row = reference_score(model, policy, context, continuation, CLASSIFIERS)
        assert is_separated(row)
        assert [line[0] for line in result.log_probs] == pytest.approx(expected, abs=1e-4)
    mixed = [policy, replace(policy, prompt_exit_layer=None), replace(policy, thresholds=(1.0,) * 3)]
    together = run_generate(engine, mixed, PROMPTS[:3], 3)
    alone = [run_generate(engine, [p], [prompt], 1)[0] for p, prompt in zip(mixed, PROMPTS[:3], strict=True)]
    assert together == alone
    assert len({tuple(result.tokens) for result in run_generate(engine, mixed, [PROMPTS[0]] * 3, 3)}) > 1


@pytest.mark.parametrize("mode", ["recompute", "learned"])
@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_shared_prefixes_end_before_the_tokens_that_stay(family: str, mode: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("dynamax_lm_eval.engine.prefixes.MIN_SAVED_TOKENS", 1)
    model = tiny_model(family)
    backbone = make_backbone(model, max_length=256)
    engine = Engine(backbone, exits_for(family, "linear", backbone))
    policy = prompt_policy(mode, keep=4)
    start = random_ids(12, 3)
    # One prompt is hardly longer than what they share, so that its own last tokens lie in that.
    prompts = [[*start, *random_ids(n, 20 + n)] for n in (1, 6, 9)]
    requests = [GenerationRequest(p, NEW_TOKENS, policy, Sampler(), lambda _: False) for p in prompts]
    shared = generate_all(engine, requests, 3)
    assert [result.shared_tokens for result in shared] == [9, 12, 12]
    alone = [generate_all(engine, [request], 1)[0] for request in requests]
    assert [(r.tokens, r.trace) for r in shared] == [(r.tokens, r.trace) for r in alone]


def test_cost() -> None:
    engine = Engine(make_backbone(tiny_model("llama"), max_length=256), CLASSIFIERS)
    trace = Trace(10, 12, 3, (LAYERS, 2), generated=True)
    leaving = prompt_policy("recompute", "state")
    staying = replace(leaving, prompt_exit_layer=None)
    ours, full = engine.account(trace, leaving), engine.account(trace, staying)
    blocks = engine.backbone.cost.blocks
    saved = sum(block.at(position) - block.state_recompute for position in range(7) for block in blocks[3:])
    assert full.total_macs - ours.total_macs == saved
    assert ours.full_total_macs == full.full_total_macs
    assert ours.compute_reduction == full.compute_reduction
    assert ours.compute_reduction_total > full.compute_reduction_total


def test_arguments() -> None:
    policy = policy_of(exits_config(), prompt_exit_layer=3, threshold=(1.0,))
    assert (policy.prompt_exit_layer, policy.prompt_exit_keep, policy.used_exits) == (3, 16, (3,))
    assert policy.describe()["prompt_exit_layer"] == 3
    assert "prompt_exit_layer" not in policy_of(exits_config()).describe()
    learned = exits_config(states=StateMapOptions("linear", ((32, 32),) * LAYERS))
    assert policy_of(learned, prompt_exit_layer=4).state_mode == "learned"
    for given, message in (
        ({"prompt_exit_layer": 3, "exit_scope": "all"}, "exclude each other"),
        ({"prompt_exit_layer": 3, "final_block": True}, "exclude each other"),
        ({"prompt_exit_layer": 3, "preset": "paper"}, "exclude each other"),
        ({"prompt_exit_keep": 3}, "has no effect without prompt_exit_layer"),
        ({"prompt_exit_layer": 3, "prompt_exit_keep": 0}, "at least 1"),
        ({"prompt_exit_layer": "a"}, "prompt_exit_layer must be a number"),
    ):
        with pytest.raises(UserError, match=message):
            parse_model_args({"backbone": "x", **given}, ())
    for given, message in (
        ({"prompt_exit_layer": LAYERS}, f"prompt_exit_layer must lie in 1..{LAYERS - 1}"),
        ({"prompt_exit_layer": 3, "prune_layers": (3,)}, "end with a pruned block"),
    ):
        with pytest.raises(UserError, match=message):
            policy_of(exits_config(), **given)
    with pytest.raises(UserError, match=r"maps for states after \[2, 3, 4\] blocks and none after \[1\]"):
        policy_of(learned, prompt_exit_layer=1)
