"""K and V of tokens that left: computed where a later token needs them, and forgotten afterwards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import LAYERS, tiny_model
from helpers_engine import NEW_TOKENS, PROMPTS, engine_for, run_generate, separated_policy

from dynamax_lm_eval.backbones.deferring import DeferredTokens
from dynamax_lm_eval.backbones.transformer.fused_pass import FusedPass
from dynamax_lm_eval.exits.policy import ExitPolicy


@pytest.mark.parametrize("scope", ["generated", "all"])
def test_states_are_recomputed_only_where_a_later_token_needs_them(scope: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """K and V of a token that left: once per block, and never after the row's last token that goes there."""
    model = tiny_model("llama")
    engine = engine_for("llama")
    policy = ExitPolicy(LAYERS, (2, 4), (0.5,) * 2, exit_scope=scope)
    policy = separated_policy(model, policy, PROMPTS[0])
    recomputed = [0] * (LAYERS + 1)
    project = FusedPass.project

    def count(run: FusedPass, block: int, hidden: torch.Tensor, *given: Any) -> Any:
        recomputed[block] += hidden.shape[1]
        return project(run, block, hidden, *given)

    monkeypatch.setattr(FusedPass, "project", count)
    (result,) = run_generate(engine, [policy], PROMPTS[:1], 1)
    layers = [LAYERS] * (result.trace.fed_tokens - len(result.trace.exit_layers)) + list(result.trace.exit_layers)
    prompt = len(PROMPTS[0])
    for block in range(1, LAYERS + 1):
        reached = [position for position, layer in enumerate(layers) if layer >= block]
        last = max(reached)
        # A pass takes the whole prompt at once, so whoever left in it counts for any of its tokens.
        needed = [p for p, layer in enumerate(layers) if layer < block and (p < last or (last < prompt and p < prompt))]
        assert recomputed[block] == len(needed)
    assert 0 < sum(recomputed) <= sum(LAYERS - layer for layer in layers)


@pytest.mark.parametrize("changes", [{"pruned_blocks": frozenset({6})}, {"final_block": True}])
def test_nothing_stays_owed_to_blocks_that_are_given_nothing(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens that left are forgotten once the last block that gets their states has them, while their row goes on."""
    policy = ExitPolicy(LAYERS, (2,), (0.0,), confidence="state", exit_scope="all", **changes)
    owing: list[int] = []
    add = DeferredTokens.add

    def count(owed: DeferredTokens, *given: Any) -> None:
        add(owed, *given)
        owing.append(len(owed))

    monkeypatch.setattr(DeferredTokens, "add", count)
    # Position 0 goes on, so the prompt's states are needed at once; those of generated tokens, which all leave, never.
    run_generate(engine_for("llama"), [policy], PROMPTS[:1], 1)
    assert owing == [len(PROMPTS[0]) - 1, *range(1, NEW_TOKENS)]
    owing.clear()
    run_generate(engine_for("llama"), [replace(policy, exit_layers=(5,))], PROMPTS[:1], 1)
    assert owing == []
