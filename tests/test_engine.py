"""The engine against transformers, and against early exit written a second time (``reference``)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import FAMILIES, LAYERS, MAMBAS, TRANSFORMERS, random_ids, tiny_model
from helpers_engine import (
    FULL,
    MODES,
    NEW_TOKENS,
    PROMPTS,
    assert_scored_as_one_by_one,
    engine_for,
    is_separated,
    model_scores,
    run_generate,
    run_score,
    separated_policy,
    with_modes,
)
from reference import reference_generate

from dynamax_lm_eval.backbones import make_backbone
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.requests import ScoringRequest
from dynamax_lm_eval.engine.scoring import score_all
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.confidences.softmax import SoftmaxConfidence
from dynamax_lm_eval.exits.policy import ExitPolicy


@pytest.mark.parametrize("family", FAMILIES)
def test_exits_off_generates_what_transformers_generates(family: str) -> None:
    model = tiny_model(family)
    results = run_generate(engine_for(family), [FULL] * len(PROMPTS), PROMPTS, max_rows=3)
    for prompt, result in zip(PROMPTS, results, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert result.tokens == expected[0, len(prompt) :].tolist()
        assert set(result.trace.exit_layers) == {LAYERS}
        assert len(result.trace.exit_layers) == NEW_TOKENS - 1


@pytest.mark.parametrize("family", FAMILIES)
def test_exits_off_scores_what_transformers_scores(family: str) -> None:
    model = tiny_model(family)
    pairs = [(prompt, random_ids(6, 50 + i)) for i, prompt in enumerate(PROMPTS)]
    for (context, continuation), result in zip(pairs, run_score(engine_for(family), FULL, pairs, 3), strict=True):
        expected, greedy = model_scores(model, context, continuation)
        assert [line[0] for line in result.log_probs] == pytest.approx(expected, abs=1e-4)
        assert result.greedy_tokens == greedy


@with_modes(*TRANSFORMERS, *MAMBAS)
def test_generation_equals_the_reference(family: str, mode: Any) -> None:
    model = tiny_model(family)
    exited = 0
    for confidence in ("softmax", "entropy", "state"):
        policy = ExitPolicy(LAYERS, (2, 3, 5), (0.5,) * 3, confidence=confidence, state_mode=mode)  # type: ignore[arg-type]
        policy = separated_policy(model, policy, PROMPTS[0])
        expected = [reference_generate(model, policy, prompt, NEW_TOKENS) for prompt in PROMPTS[:3]]
        assert is_separated(*(row for _, row in expected))
        results = run_generate(engine_for(family), [policy] * 3, PROMPTS[:3], max_rows=2)
        for (tokens, row), result in zip(expected, results, strict=True):
            assert result.tokens == tokens
            assert list(result.trace.exit_layers) == row.layers[result.trace.prompt_tokens :]
            exited += sum(layer < LAYERS for layer in row.layers)
    assert exited > 0


@pytest.mark.parametrize("scope", [pytest.param("generated", marks=pytest.mark.slow), "all"])
@with_modes("llama", "mistral", "qwen3", "gpt_neox", "gemma3", *MAMBAS)
def test_scoring_in_parallel_equals_feeding_one_by_one(family: str, mode: Any, scope: Any) -> None:
    exited = 0
    for confidence in ("softmax", "entropy", "state"):
        policy = ExitPolicy(
            LAYERS,
            (2, 3, 5),
            (0.5,) * 3,
            confidence=confidence,
            state_mode=mode,
            exit_scope=scope,  # type: ignore[arg-type]
        )
        exited += assert_scored_as_one_by_one(family, policy)
    assert exited > 0


#: The first block, one in the middle, those right behind an exit, and the last one: with exits at 2 and 5.
PRUNED = ((1, 4), (1,), (3,), (6,), (3, 4, 6))


@pytest.mark.parametrize("pruned", PRUNED)
@with_modes("llama", "mistral", "phi3", *MAMBAS)
def test_prompts_that_exit_and_pruned_blocks_follow_the_reference(
    family: str, mode: Any, pruned: tuple[int, ...]
) -> None:
    model = tiny_model(family)
    policy = ExitPolicy(LAYERS, (2, 5), (0.5, 0.5), state_mode=mode, exit_scope="all", pruned_blocks=frozenset(pruned))
    policy = separated_policy(model, policy, PROMPTS[0])
    expected = [reference_generate(model, policy, prompt, NEW_TOKENS) for prompt in PROMPTS[:3]]
    assert is_separated(*(row for _, row in expected))
    results = run_generate(engine_for(family), [policy] * 3, PROMPTS[:3], max_rows=2)
    for (tokens, row), result in zip(expected, results, strict=True):
        assert result.tokens == tokens
        assert list(result.trace.exit_layers) == row.layers[1:]
    assert any(layer < LAYERS for _, row in expected for layer in row.layers[:4]), "a prompt token left"


@pytest.mark.parametrize("decay", [None, 4.0])
def test_thresholds_per_exit_and_decay_follow_the_reference(decay: float | None) -> None:
    model = tiny_model("llama")
    policy = ExitPolicy(LAYERS, (1, 3, 4), (1.0, 0.3, 0.15), threshold_decay=decay)
    tokens, row = reference_generate(model, policy, PROMPTS[0], NEW_TOKENS)
    assert is_separated(row)
    result = run_generate(engine_for("llama"), [policy], PROMPTS[:1], 1)[0]
    assert result.tokens == tokens
    assert list(result.trace.exit_layers) == row.layers[len(PROMPTS[0]) :]
    assert 1 not in row.layers, "threshold 1 never exits"


@pytest.mark.parametrize(("family", "third_mode"), [("llama", "copy"), ("mamba2", "recompute")])
def test_rows_do_not_depend_on_who_shares_the_batch(family: str, third_mode: Any) -> None:
    """Different policies in one batch give each row what it gets alone."""
    model, engine = tiny_model(family), engine_for(family)
    base = ExitPolicy(LAYERS, (2, 3, 5), (0.5,) * 3)
    policies = [
        separated_policy(model, replace(base, state_mode="skip"), PROMPTS[0]),
        FULL,
        separated_policy(model, replace(base, state_mode=third_mode, confidence="state"), PROMPTS[0]),
        replace(FULL, pruned_blocks=frozenset({4, 5})),
        separated_policy(model, replace(base, confidence="entropy", pruned_blocks=frozenset({4})), PROMPTS[0]),
    ]
    together = run_generate(engine, policies, PROMPTS, max_rows=5)
    few = run_generate(engine, policies, PROMPTS, max_rows=2)
    for i, policy in enumerate(policies):
        alone = run_generate(engine, [policy], [PROMPTS[i]], max_rows=1)[0]
        assert together[i] == alone
        assert few[i] == alone
        tokens, _ = reference_generate(model, policy, PROMPTS[i], NEW_TOKENS)
        assert alone.tokens == tokens


def test_threshold_one_is_the_backbone_and_evaluates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_for("qwen2")
    policy = ExitPolicy(LAYERS, (2, 4), (1.0, 1.0))

    def forbidden(*_: Any) -> None:
        raise AssertionError("an exit was evaluated")

    expected = run_generate(engine, [FULL] * 2, PROMPTS[:2], 2)
    monkeypatch.setattr(SoftmaxConfidence, "score", forbidden)
    assert run_generate(engine, [policy] * 2, PROMPTS[:2], 2) == expected


def test_pruning_equals_a_model_without_the_blocks() -> None:
    import copy

    model = tiny_model("mistral")
    smaller = copy.deepcopy(model)
    smaller.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(smaller.model.layers) if i not in (3, 4))
    for i, layer in enumerate(smaller.model.layers):
        layer.self_attn.layer_idx = i
    smaller.config.num_hidden_layers = LAYERS - 2
    policy = replace(FULL, pruned_blocks=frozenset({4, 5}))
    for prompt, result in zip(PROMPTS, run_generate(engine_for("mistral"), [policy] * 5, PROMPTS, 2), strict=True):
        expected = smaller.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert result.tokens == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("mode", MODES)
def test_blocks_are_really_skipped(mode: Any) -> None:
    """The number of tokens that each block sees is the number of tokens that ran it, pruning included."""
    model = tiny_model("llama")
    policy = ExitPolicy(LAYERS, (2, 3), (0.5,) * 2, state_mode=mode, pruned_blocks=frozenset({5}))
    policy = separated_policy(model, policy, PROMPTS[0])
    seen = [0] * (LAYERS + 1)
    hooks = [
        layer.register_forward_hook(
            lambda _, args, __, block=block: seen.__setitem__(block, seen[block] + args[0].shape[1])
        )
        for block, layer in enumerate(model.model.layers, start=1)
    ]
    try:
        results = run_generate(engine_for("llama"), [policy] * 3, PROMPTS[:3], 2)
    finally:
        for hook in hooks:
            hook.remove()
    prompts = sum(len(prompt) for prompt in PROMPTS[:3])
    layers = [layer for result in results for layer in result.trace.exit_layers]
    assert min(layers) < LAYERS
    for block in range(1, LAYERS + 1):
        ran = 0 if block == 5 else prompts + sum(layer >= block for layer in layers)
        assert seen[block] == ran


def test_several_last_tokens_share_one_row() -> None:
    engine = engine_for("llama")
    context, last = PROMPTS[0], [5, 9, 11]
    [found] = score_all(engine, [ScoringRequest([*context, 7], len(context), [[7], last], FULL)], 1)
    alone = run_score(engine, FULL, [(context, [7, token]) for token in last], 3)
    assert found.log_probs[1] == pytest.approx([result.log_probs[1][0] for result in alone], abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_half_precision_stays_near_full_precision(family: str, dtype: torch.dtype) -> None:
    """With every token leaving at the first exit, scores differ from float32 by rounding only."""
    policy = ExitPolicy(LAYERS, (3,), (0.0,), confidence="state")
    pairs = [(prompt, random_ids(6, 50 + i)) for i, prompt in enumerate(PROMPTS)]
    # A calm model: with the wide weights of the other tests, rounding grows from block to block.
    models = [calm_model(family, kind) for kind in (torch.float32, dtype)]
    full, half = (run_score(Engine(make_backbone(model, 256)), policy, pairs, 3) for model in models)
    for ours, exact in zip(half, full, strict=True):
        assert ours.trace == exact.trace
        assert set(ours.trace.exit_layers) == {3}
        values = [line[0] for line in ours.log_probs]
        assert values == pytest.approx([line[0] for line in exact.log_probs], abs=0.08)


def calm_model(family: str, dtype: torch.dtype) -> Any:
    import copy

    model = copy.deepcopy(tiny_model(family))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 0.3
    return model.to(dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox"])
def test_cuda_gives_what_the_cpu_gives(family: str, mode: Any) -> None:
    import copy

    model = tiny_model(family)
    policy = separated_policy(model, ExitPolicy(LAYERS, (2, 3, 5), (0.5,) * 3, state_mode=mode), PROMPTS[0])
    on_gpu = Engine(make_backbone(copy.deepcopy(model).cuda(), max_length=256))
    expected = run_generate(engine_for(family), [policy] * 3, PROMPTS[:3], 2)
    assert run_generate(on_gpu, [policy] * 3, PROMPTS[:3], 2) == expected


def test_copy_is_refused_between_different_rotary_settings() -> None:
    policy = ExitPolicy(LAYERS, (2,), (0.5,), state_mode="copy")
    with pytest.raises(UserError, match="state_mode=copy is not possible on Gemma3"):
        engine_for("gemma3").check_policy(policy)
    engine_for("llama").check_policy(policy)
