"""Early exit on Mamba backbones, against early exit written a second time (``reference``) and against transformers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import LAYERS, MAMBAS, random_ids, tiny_model
from helpers_engine import (
    CLASSIFIERS,
    FULL,
    NEW_TOKENS,
    PROMPTS,
    classifier_policy,
    exits_config,
    is_separated,
    model_scores,
    run_generate,
    run_score,
    separated_policy,
    varied_classifiers,
)
from reference import reference_generate, reference_score
from torch import nn

from dynamax_lm_eval.backbones import MambaBackbone
from dynamax_lm_eval.backbones.mamba.rows import RaggedRows
from dynamax_lm_eval.backbones.mamba.ssm import channel_scan
from dynamax_lm_eval.config import DynamaxArgs
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.parity import check_against_model
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.exits.resolve import resolve_policy


def engine_for(family: str) -> Engine:
    return Engine(MambaBackbone(tiny_model(family)), CLASSIFIERS)


@pytest.mark.parametrize("lengths", [[1, 7, 16, 3, 9], [4, 3], [1, 1], [23]])
@pytest.mark.parametrize("with_state", [False, True])
def test_scan_of_single_channels_equals_the_recurrence(lengths: Sequence[int], with_state: bool) -> None:
    torch.manual_seed(3)
    total = sum(lengths)
    x, dt, decay = torch.randn(total, 6), torch.rand(total, 6), -3 * torch.rand(6, 4)
    b, c = torch.randn(total, 4), torch.randn(total, 4)
    state = torch.randn(len(lengths), 6, 4) if with_state else None
    scanned, after = channel_scan(x, dt, decay, b, c, RaggedRows(lengths, chunk=4), state)
    start = 0
    for row, length in enumerate(lengths):
        current = torch.zeros(6, 4) if state is None else state[row]
        for t in range(start, start + length):
            current = (dt[t][:, None] * decay).exp() * current + (dt[t] * x[t])[:, None] * b[t]
            torch.testing.assert_close(scanned[t], (current * c[t]).sum(-1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after[row], current, rtol=1e-4, atol=1e-5)
        start += length


@pytest.mark.parametrize("family", MAMBAS)
def test_tokens_in_flight_and_those_that_left_are_projected_alike(family: str) -> None:
    """In one product or in two, and with none in flight."""
    block = MambaBackbone(tiny_model(family)).blocks[1]
    hidden = torch.randn(100, block.mixer.module.hidden_size, generator=torch.Generator().manual_seed(0))
    gates, updates = block.mixer.project(block.normed(hidden))
    for end in (5, 100):
        for split in (0, 2):
            gate, update = block.project(hidden[:split], hidden[split:end])
            torch.testing.assert_close(update, updates[:end])
            assert (gate is None) == (split == 0)
            if gate is not None:
                torch.testing.assert_close(gate, gates[:split])


@pytest.mark.parametrize("final_block", [False, True])
@pytest.mark.parametrize("mode", ["recompute", "skip"])
@pytest.mark.parametrize("kind", ["mamba", "hybrid", "ffn", "calm"])
def test_generation_through_classifiers_equals_the_reference(kind: str, mode: Any, final_block: bool) -> None:
    model = tiny_model("mamba2")
    policy = classifier_policy(kind, state_mode=mode, final_block=final_block)
    policy = separated_policy(model, policy, PROMPTS[0], classifiers=CLASSIFIERS)
    prompts = PROMPTS[:4]
    expected = [reference_generate(model, policy, prompt, NEW_TOKENS, CLASSIFIERS) for prompt in prompts]
    assert is_separated(*(row for _, row in expected))
    results = run_generate(engine_for("mamba2"), [policy] * 4, prompts, max_rows=2)
    for (tokens, row), result in zip(expected, results, strict=True):
        assert result.tokens == tokens
        assert list(result.trace.exit_layers) == row.layers[result.trace.prompt_tokens :]
    assert {layer for _, row in expected for layer in row.layers} > {LAYERS}


@pytest.mark.parametrize("scope", ["generated", "all"])
@pytest.mark.parametrize("mode", ["recompute", "skip"])
@pytest.mark.parametrize(
    ("family", "kind", "final_block"),
    [
        ("mamba2", "mamba", False),
        ("mamba2", "mamba", True),
        ("mamba2", "ffn", True),
        ("mamba2", "calm", False),
        ("mamba2", "hybrid", False),
        ("mamba", "mamba", False),
    ],
)
def test_scoring_through_classifiers_equals_feeding_one_by_one(
    family: str, kind: str, final_block: bool, mode: Any, scope: Any
) -> None:
    """Tokens that left and tokens in flight move the states on in their order."""
    model = tiny_model(family)
    policy = classifier_policy(kind, state_mode=mode, exit_scope=scope, final_block=final_block)
    policy = separated_policy(model, policy, PROMPTS[0], classifiers=CLASSIFIERS)
    pairs = [(prompt, random_ids(7, 70 + i)) for i, prompt in enumerate(PROMPTS[1:4])]
    results = run_score(engine_for(family), policy, pairs, 3)
    left_early = 0
    for (context, continuation), result in zip(pairs, results, strict=True):
        expected, row = reference_score(model, policy, context, continuation, CLASSIFIERS)
        assert is_separated(row)
        assert [line[0] for line in result.log_probs] == pytest.approx(expected, abs=1e-4)
        assert list(result.trace.exit_layers) == row.layers[1 if scope == "all" else len(context) :]
        left_early += sum(layer < LAYERS for layer in row.layers)
    assert left_early > 0


def test_adapters_correct_the_read_out_and_leave_the_state_alone() -> None:
    model = tiny_model("mamba2")
    exits = varied_classifiers(exits_config(adapter="lowrank:3"))
    with torch.no_grad():
        for parameter in exits.adapters.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    policy = separated_policy(model, classifier_policy("calm", adapter="lowrank:3"), PROMPTS[0], classifiers=exits)
    engine = Engine(MambaBackbone(model), exits)
    expected = [reference_generate(model, policy, prompt, NEW_TOKENS, exits) for prompt in PROMPTS[:3]]
    results = run_generate(engine, [policy] * 3, PROMPTS[:3], 3)
    assert [result.tokens for result in results] == [tokens for tokens, _ in expected]
    plain = run_generate(engine, [replace(policy, adapter="none")] * 3, PROMPTS[:3], 3)
    assert [result.tokens for result in plain] != [tokens for tokens, _ in expected]


@pytest.mark.parametrize("family", MAMBAS)
def test_pruning_equals_a_model_without_the_blocks(family: str) -> None:
    smaller = copy.deepcopy(tiny_model(family))
    smaller.backbone.layers = nn.ModuleList(layer for i, layer in enumerate(smaller.backbone.layers) if i not in (3, 4))
    policy = replace(FULL, pruned_blocks=frozenset({4, 5}))
    pairs = [(prompt, random_ids(6, 50 + i)) for i, prompt in enumerate(PROMPTS)]
    for (context, continuation), result in zip(pairs, run_score(engine_for(family), policy, pairs, 2), strict=True):
        expected, _ = model_scores(smaller, context, continuation)
        assert [line[0] for line in result.log_probs] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("mode", ["recompute", "skip"])
def test_blocks_are_really_skipped(mode: Any) -> None:
    """Tokens that left run neither gate nor out_proj of later blocks."""
    model = tiny_model("mamba2")
    policy = separated_policy(model, ExitPolicy(LAYERS, (2, 3), (0.5,) * 2, state_mode=mode), PROMPTS[0])
    seen = [0] * (LAYERS + 1)
    hooks = [
        layer.mixer.out_proj.register_forward_hook(
            lambda _, args, __, block=block: seen.__setitem__(block, seen[block] + args[0].shape[0])
        )
        for block, layer in enumerate(model.backbone.layers, start=1)
    ]
    try:
        results = run_generate(engine_for("mamba2"), [policy] * 3, PROMPTS[:3], 2)
    finally:
        for hook in hooks:
            hook.remove()
    prompts = sum(len(prompt) for prompt in PROMPTS[:3])
    layers = [layer for result in results for layer in result.trace.exit_layers]
    assert min(layers) < LAYERS
    for block in range(1, LAYERS + 1):
        assert seen[block] == prompts + sum(layer >= block for layer in layers)


class _Wrapped(nn.Module):
    """A projection whose weights cannot be read by rows, as quantised layers and LoRA are."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.base(inputs)
        return output


@pytest.mark.parametrize("family", MAMBAS)
def test_projections_that_are_not_plain_are_called_and_counted_whole(family: str) -> None:
    model = copy.deepcopy(tiny_model(family))
    policy = separated_policy(model, ExitPolicy(LAYERS, (2, 3), (0.5,) * 2, exit_scope="all"), PROMPTS[0])
    pairs = [(PROMPTS[0], random_ids(9, 70))]
    plain = MambaBackbone(model)
    assert plain.scans_by == "torch"
    expected = run_score(Engine(plain), policy, pairs, 1)
    for layer in model.backbone.layers:
        layer.mixer.in_proj = _Wrapped(layer.mixer.in_proj)
    wrapped = MambaBackbone(model)
    (result,) = run_score(Engine(wrapped), policy, pairs, 1)
    assert result.trace == expected[0].trace
    assert min(result.trace.exit_layers) < LAYERS
    assert result.log_probs == [pytest.approx(line, abs=1e-4) for line in expected[0].log_probs]
    for with_all, without in zip(wrapped.cost.blocks, plain.cost.blocks, strict=True):
        assert with_all.weights == without.weights
        assert with_all.state_recompute == without.state_recompute + 32 * 64  # the gate's rows


def test_step_sizes_are_clamped_in_every_form() -> None:
    model = copy.deepcopy(tiny_model("mamba2"))
    for layer in model.backbone.layers:
        layer.mixer.time_step_limit = (0.0, 0.05)
    pairs = [(PROMPTS[0], random_ids(6, 50))]
    (result,) = run_score(Engine(MambaBackbone(model)), FULL, pairs, 1)
    expected, _ = model_scores(model, *pairs[0])
    assert [line[0] for line in result.log_probs] == pytest.approx(expected, abs=1e-4)
    (generated,) = run_generate(Engine(MambaBackbone(model)), [FULL], [PROMPTS[0]], 1)
    text = [*PROMPTS[0], *generated.tokens]
    with torch.no_grad():
        greedy = model(torch.tensor([text])).logits[0].argmax(-1).tolist()
    assert generated.tokens == greedy[len(PROMPTS[0]) - 1 : -1]


def test_copy_is_refused() -> None:
    policy = ExitPolicy(LAYERS, (2,), (0.5,), state_mode="copy")
    with pytest.raises(UserError, match="state_mode=copy is not possible on Mamba2ForCausalLM"):
        engine_for("mamba2").check_policy(policy)
    args = DynamaxArgs(backbone="x", threshold=(0.5,), state_mode="copy")
    with pytest.raises(UserError, match="state_mode=copy is not possible"):
        resolve_policy(args, LAYERS, recurrent_backbone=True)


def test_another_mixer_is_refused() -> None:
    hybrid = copy.deepcopy(tiny_model("mamba2"))
    hybrid.backbone.layers[1].mixer = nn.Linear(32, 32)
    with pytest.raises(UserError, match="no Mamba mixer"):
        MambaBackbone(hybrid)


def test_another_form_of_the_block_is_refused() -> None:
    model = copy.deepcopy(tiny_model("mamba2"))
    engine = Engine(MambaBackbone(model))
    model.backbone.layers[0].mixer.D.data += 0.5
    check_against_model(engine, model)
    model.backbone.layers[0].register_forward_hook(lambda _, __, output: 1.1 * output)
    with pytest.raises(UserError, match="more than rounding explains"):
        check_against_model(engine, model)


@pytest.mark.parametrize("family", MAMBAS)
def test_forward_with_gradients_equals_the_models_own(family: str) -> None:
    """Rows side by side, as a training from scratch lays them."""
    model = copy.deepcopy(tiny_model(family)).train()
    rows = [random_ids(length, 30 + length) for length in (13, 4, 1, 9)]
    logits = MambaBackbone(model).train_forward(
        torch.tensor([token for row in rows for token in row]), RaggedRows([len(row) for row in rows])
    )
    logits.square().mean().backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    expected = torch.cat([model(torch.tensor([row]), use_cache=False).logits[0] for row in rows])
    expected.square().mean().backward()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
