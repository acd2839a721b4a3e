"""Blocks in fewer operations against the families' own code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import LAYERS, TRANSFORMERS, random_ids, tiny_model

from dynamax_lm_eval.backbones import linear, make_backbone
from dynamax_lm_eval.backbones.transformer.fused_llama import FusedLlamaBlock
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.generation import generate_all
from dynamax_lm_eval.engine.requests import GenerationRequest, ScoringRequest
from dynamax_lm_eval.engine.sampling import Sampler
from dynamax_lm_eval.engine.scoring import score_all
from dynamax_lm_eval.exits.policy import ExitPolicy

LEAN = ("llama", "mistral", "qwen2", "qwen3")
TEXTS = [random_ids(length, 40 + length) for length in (3, 17, 9)]


def log_probs(model: Any) -> list[float]:
    engine = Engine(make_backbone(model, max_length=64))
    requests = [ScoringRequest(t[:-1], 1, [[i] for i in t[1:]], ExitPolicy(LAYERS)) for t in TEXTS]
    return [value for scoring in score_all(engine, requests, 2) for line in scoring.log_probs for value in line]


def greedy(model: Any) -> list[list[int]]:
    engine = Engine(make_backbone(model, max_length=64))
    requests = [GenerationRequest(text, 8, ExitPolicy(LAYERS), Sampler(), lambda _: False) for text in TEXTS]
    return [generation.tokens for generation in generate_all(engine, requests, 3)]


@pytest.mark.parametrize("family", LEAN)
def test_lean_blocks_compute_what_the_families_do(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    ours = log_probs(model), greedy(model)
    monkeypatch.setattr(FusedLlamaBlock, "may_replace", False)
    theirs = log_probs(model), greedy(model)
    assert ours[0] == pytest.approx(theirs[0], abs=1e-4)
    assert ours[1] == theirs[1]


@pytest.mark.parametrize("family", LEAN)
def test_in_half_precision_they_round_as_the_families_do(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the order in which processors add up products, which is that of one kernel here."""
    monkeypatch.setattr(linear, "_FEW", range(0))
    model = tiny_model(family, torch.bfloat16)
    ours = log_probs(model)
    monkeypatch.setattr(FusedLlamaBlock, "may_replace", False)
    assert ours == log_probs(model)


def test_families_of_another_kind_run_their_own_code() -> None:
    for family in TRANSFORMERS:
        assert (make_backbone(tiny_model(family), max_length=64).rung == "fused") == (family in LEAN)


@pytest.mark.parametrize("part", ["", "self_attn", "self_attn.k_proj", "input_layernorm", "mlp"])
def test_hooks_are_called(part: str) -> None:
    """Whoever watches a module of the model still sees it run."""
    model = tiny_model("llama")
    engine = Engine(make_backbone(model, max_length=64))
    calls: list[int] = []
    hook = model.model.layers[2].get_submodule(part).register_forward_hook(lambda *_: calls.append(1))
    try:
        generate_all(engine, [GenerationRequest([5, 6], 4, ExitPolicy(LAYERS), Sampler(), lambda _: False)], 1)
    finally:
        hook.remove()
    assert len(calls) == 4


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 4, 96, 97])
def test_linear_layers(num_tokens: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 40, bias=bias)
    x = torch.randn(num_tokens, 24)
    with torch.no_grad():
        torch.testing.assert_close(linear.linear(layer, x), layer(x))
        torch.testing.assert_close(linear.linear(layer, x.unsqueeze(0)), layer(x).unsqueeze(0))


def test_layers_that_are_more_than_linear_are_called() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    layer, x = Doubled(24, 40), torch.randn(8, 24)
    torch.testing.assert_close(linear.linear(layer, x), layer(x))
