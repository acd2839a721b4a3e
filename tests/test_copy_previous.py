"""State mode copy_previous: blocks get what the row wrote last there, with K turned to the token's own position."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import LAYERS, random_ids, tiny_model
from helpers_engine import (
    CLASSIFIERS,
    PROMPTS,
    assert_scored_as_one_by_one,
    classifier_policy,
    engine_for,
    is_separated,
    model_scores,
    policy_of,
    run_generate,
    run_score,
    separated_policy,
)
from reference import Reference, reference_generate

from dynamax_lm_eval.backbones import make_backbone
from dynamax_lm_eval.backbones.transformer.previous import turned
from dynamax_lm_eval.config import parse_model_args
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.policy import ExitPolicy

#: Llama, a sliding window, and K that is normalised before it is turned.
FAMILIES = ("llama", "mistral", "qwen3")


def make_policy(**changes: Any) -> ExitPolicy:
    return ExitPolicy(LAYERS, (2, 3, 5), (0.5,) * 3, state_mode="copy_previous", confidence="state", **changes)


@pytest.mark.parametrize("changes", [{}, {"final_block": True}, {"pruned_blocks": frozenset({4})}])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_the_reference(family: str, changes: dict[str, Any]) -> None:
    model = tiny_model(family)
    policy = separated_policy(model, make_policy(**changes), PROMPTS[0])
    results = run_generate(engine_for(family), [policy] * 3, PROMPTS[:3], max_rows=2)
    for prompt, result in zip(PROMPTS[:3], results, strict=True):
        tokens, row = reference_generate(model, policy, prompt, 8)
        assert is_separated(row)
        assert result.tokens == tokens
        assert list(result.trace.exit_layers) == row.layers[len(prompt) :]
    assert min(layer for result in results for layer in result.trace.exit_layers) < LAYERS


@pytest.mark.parametrize("changes", [{}, {"exit_scope": "all"}, {"exit_scope": "all", "final_block": True}])
@pytest.mark.parametrize("family", FAMILIES)
def test_scoring_in_parallel_equals_feeding_one_by_one(family: str, changes: dict[str, Any]) -> None:
    assert assert_scored_as_one_by_one(family, make_policy(**changes)) > 10


def test_rows_of_all_modes_in_one_batch() -> None:
    engine, model = Engine(make_backbone(tiny_model("llama"), max_length=256), CLASSIFIERS), tiny_model("llama")
    policies = [
        separated_policy(model, classifier_policy("calm", state_mode=mode), PROMPTS[0], classifiers=CLASSIFIERS)
        for mode in ("copy_previous", "recompute", "copy", "skip", "copy_previous")
    ]
    alone = [run_generate(engine, [policy], [prompt], 1)[0] for policy, prompt in zip(policies, PROMPTS, strict=True)]
    together = run_generate(engine, policies, PROMPTS, 5)
    assert [(a.tokens, a.trace) for a in alone] == [(b.tokens, b.trace) for b in together]
    assert len({layer for result in together for layer in result.trace.exit_layers}) > 1


def test_two_tokens_that_left_one_after_the_other_take_over_from_the_same() -> None:
    """By hand: a block's K at positions 5 and 6 is that of position 4, turned by 1 and by 2."""
    model = tiny_model("llama")
    reference = Reference(model, ExitPolicy(LAYERS), 8, 1)
    for token in PROMPTS[0][:5]:
        reference.feed(token)
    cache = reference.caches[3]
    backbone = make_backbone(model, max_length=256)
    reference._block(4, reference.inputs[4], 5)
    reference._block(4, reference.inputs[4], 6)
    keys = torch.stack([key[0, :, 0] for key in cache.keys])
    distances = torch.tensor([1, 2])
    found = turned(keys[[4, 4]], *backbone.turning(distances, keys))  # type: ignore[attr-defined]
    torch.testing.assert_close(found, keys[[5, 6]], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(cache.values[4], cache.values[6])


def test_scaled_rotary_embeddings_scale_once() -> None:
    """YaRN scales K; what is turned further is scaled already."""
    config = copy.deepcopy(tiny_model("llama").config)
    config.rope_parameters = {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    model = type(tiny_model("llama"))(config).eval()
    assert model.model.rotary_emb.attention_scaling > 1.1
    policy = separated_policy(model, make_policy(), PROMPTS[0])
    (result,) = run_generate(Engine(make_backbone(model, max_length=256)), [policy], PROMPTS[:1], 1)
    tokens, row = reference_generate(model, policy, PROMPTS[0], 8)
    assert is_separated(row)
    assert (result.tokens, list(result.trace.exit_layers)) == (tokens, row.layers[len(PROMPTS[0]) :])
    assert min(result.trace.exit_layers) < LAYERS


def test_blocks_that_somebody_hooked() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    policy = separated_policy(model, make_policy(exit_scope="all"), PROMPTS[0])
    plain = run_generate(Engine(make_backbone(model, max_length=256)), [policy] * 3, PROMPTS[:3], 2)
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: None)
    hooked = run_generate(Engine(make_backbone(model, max_length=256)), [policy] * 3, PROMPTS[:3], 2)
    assert [(a.tokens, a.trace) for a in plain] == [(b.tokens, b.trace) for b in hooked]


def test_costs_nothing_and_is_nothing_without_exits() -> None:
    model, engine = tiny_model("llama"), engine_for("llama")
    policy = separated_policy(model, make_policy(), PROMPTS[0])
    (result,) = run_generate(engine, [policy], PROMPTS[:1], 1)
    assert engine.account(result.trace, policy).recompute_macs == 0
    never = ExitPolicy(LAYERS, (2,), (1.0,), state_mode="copy_previous")
    pair = (PROMPTS[0], random_ids(5, 3))
    (scoring,) = run_score(engine, never, [pair], 1)
    assert [line[0] for line in scoring.log_probs] == pytest.approx(model_scores(model, *pair)[0], abs=1e-4)


@pytest.mark.parametrize(
    ("family", "reason"),
    [("gpt_neox", "is known of Llama's kind alone"), ("mamba2", "sum up the whole past"), ("gemma3", "Llama's kind")],
)
def test_refused_elsewhere(family: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        engine_for(family).check_policy(make_policy())


def test_refused_where_first_tokens_leave() -> None:
    with pytest.raises(UserError, match="prompt_exit_layer and state_mode=copy_previous exclude each other"):
        parse_model_args({"backbone": "x", "prompt_exit_layer": 3, "state_mode": "copy_previous"}, ())
    assert policy_of(None, state_mode="copy_previous").state_mode == "copy_previous"
