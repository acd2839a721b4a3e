"""Every group of architectures: what transformers computes with exits off, and a slow reference with exits on."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import random_ids
from helpers_architectures import ARCHITECTURES, DEPTH, architecture
from helpers_engine import (
    drained,
    is_separated,
    model_scores,
    run_generate,
    run_score,
    separated_policies,
    varied_classifiers,
)
from reference_any import any_generate, any_score
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from dynamax_lm_eval.engine import prefixes
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.generation import generate
from dynamax_lm_eval.engine.parity import checked_engine
from dynamax_lm_eval.engine.requests import GenerationRequest
from dynamax_lm_eval.engine.sampling import Sampler
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.checkpoint import BackboneIdentity, ExitConfig
from dynamax_lm_eval.exits.classifiers import ClassifierOptions, ExitClassifiers
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.frozen.passes import FrozenPass
from dynamax_lm_eval.measure.prune_profile import last_states

EXITS = (2, 3, 5)
#: Texts longer than the windows and chunks of the models, which begin alike.
START = random_ids(6, 0)
PROMPTS = [START + random_ids(length, seed) for seed, length in enumerate((13, 3, 8))] + [random_ids(5, 9)]
NEW_TOKENS = 7
NO_COPY = {"attention or Mamba-2", "attention and Mamba-2", "attention, then Mamba-2", "linear attention and experts"}
NO_COPY |= {"inputs per block and shared K and V"}
ONLY_RECOMPUTE = {"ALiBi", "local and global heads, positions counted"}
MODES = [
    (group, mode)
    for group in ARCHITECTURES
    for mode in ("recompute", "copy", "skip")
    if mode == "recompute" or (group not in ONLY_RECOMPUTE and (mode == "skip" or group not in NO_COPY))
]
#: All modes but the first are slow; where another group runs in the same way, all are.
QUICK = {"attention and Mamba-2", "soft-caps"}
ONE_OF_EACH = {*QUICK, "experts", "ALiBi"}
MODES_BY_TIME = [
    pytest.param(
        group,
        mode,
        marks=[] if mode == "recompute" and group in ONE_OF_EACH else [pytest.mark.slow],
    )
    for group, mode in MODES
]
every_group = pytest.mark.parametrize("group", ARCHITECTURES)


@pytest.fixture(autouse=True)
def short_prefixes_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "MIN_SAVED_TOKENS", 1)


def classifiers_of(engine: Engine) -> ExitClassifiers:
    """Classifiers whose confidences differ from token to token, as after training."""
    identity = BackboneIdentity("tiny", "main", "tiny", engine.backbone.hidden_size, DEPTH, "0" * 32)
    options = ClassifierOptions(mamba_state=5, mamba_expand=0.75, mamba_kernel=3)
    return varied_classifiers(ExitConfig(identity, EXITS, ("mamba", "calm"), "silu", options))


def engine_of(group: str, mode: Any = "recompute") -> Engine:
    """The engine that a user gets, with classifiers."""
    engine = checked_engine(architecture(group), ExitPolicy(DEPTH, EXITS, (0.5,) * 3, state_mode=mode), 128)
    engine.classifiers = classifiers_of(engine)
    return engine


@every_group
def test_exits_off_is_what_transformers_computes(group: str) -> None:
    model, engine, policy = architecture(group), engine_of(group), ExitPolicy(DEPTH)
    assert engine.backbone.rung == ARCHITECTURES[group][0]
    for prompt, result in zip(PROMPTS, run_generate(engine, [policy] * 4, PROMPTS, max_rows=3), strict=True):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert result.tokens == expected[0, len(prompt) :].tolist()
    pairs = [(prompt, random_ids(6, 50 + i)) for i, prompt in enumerate(PROMPTS)]
    for (context, continuation), scoring in zip(pairs, run_score(engine, policy, pairs, 3), strict=True):
        scores, greedy = model_scores(model, context, continuation)
        assert [line[0] for line in scoring.log_probs] == pytest.approx(scores, abs=1e-4)
        assert scoring.greedy_tokens == greedy


@pytest.mark.parametrize(("group", "mode"), MODES_BY_TIME)
def test_exits_are_those_of_the_reference(group: str, mode: Any) -> None:
    """Generated and scored in batches with shared beginnings, against one row fed token by token."""
    model, engine = architecture(group), engine_of(group, mode)
    exited = 0
    for confidence, kind, scope in (("classifier", "mamba", "generated"), ("state", None, "all")):
        start = ExitPolicy(
            DEPTH,
            EXITS,
            (0.5,) * 3,
            confidence=confidence,  # type: ignore[arg-type]
            classifier=kind,  # type: ignore[arg-type]
            classifier_warmup=2,
            state_mode=mode,
            exit_scope=scope,  # type: ignore[arg-type]
        )
        pairs = [(prompt, random_ids(6, 70 + i)) for i, prompt in enumerate(PROMPTS)]
        for policy in separated_policies(
            model, start, PROMPTS[0], classifiers=engine.classifiers, generate=any_generate
        ):
            texts = [any_generate(model, policy, prompt, NEW_TOKENS, engine.classifiers) for prompt in PROMPTS]
            scored = [any_score(model, policy, *pair, engine.classifiers) for pair in pairs]
            if is_separated(*(row for _, row in [*texts, *scored]), by=3e-5):
                break
        else:
            pytest.fail("every threshold is next to a confidence")
        requests = [GenerationRequest(prompt, NEW_TOKENS, policy, Sampler(), lambda _: False) for prompt in PROMPTS]
        results, shared = drained(generate(engine, requests, 3), len(PROMPTS))
        assert shared
        for (tokens, row), result in zip(texts, results, strict=True):
            assert result.tokens == tokens
            first = policy.first_eligible_position(result.trace.prompt_tokens)
            assert list(result.trace.exit_layers) == row.layers[first:]
            exited += sum(layer < DEPTH for layer in row.layers)
        # Rows that wait at exits, where blocks can go on by themselves.
        waited, _ = drained(generate(engine, requests, 2, rows_in_flight=4), len(PROMPTS))
        assert [(r.tokens, r.trace) for r in waited] == [(r.tokens, r.trace) for r in results]
        for (scores, row), scoring in zip(scored, run_score(engine, policy, pairs, 3), strict=True):
            first = policy.first_eligible_position(scoring.trace.prompt_tokens)
            assert list(scoring.trace.exit_layers) == row.layers[first:]
            assert [line[0] for line in scoring.log_probs] == pytest.approx(scores, abs=1e-4)
    assert exited > 0


@pytest.mark.parametrize(
    ("group", "changes"),
    [
        pytest.param(
            group, changes, marks=[] if group in QUICK or (pruned and group in ONE_OF_EACH) else [pytest.mark.slow]
        )
        for group in ARCHITECTURES
        if group != "inputs per block and shared K and V"
        for pruned, changes in ((True, {"pruned_blocks": frozenset({4, 6})}), (False, {"final_block": True}))
    ],
)
def test_pruned_and_final_blocks(group: str, changes: dict[str, Any]) -> None:
    model, engine = architecture(group), engine_of(group)
    exits = (2, 3)
    start = ExitPolicy(DEPTH, exits, (0.5, 0.5), confidence="classifier", classifier="calm", **changes)
    never = replace(start, thresholds=(0.9999, 0.9999))
    _, row = any_generate(model, never, PROMPTS[0], 12, engine.classifiers)
    values = sorted(value + 0.9999 for value in row.confidences)
    at = max(range(len(values) // 4, 3 * len(values) // 4), key=lambda i: values[i + 1] - values[i])
    policy = replace(start, thresholds=((values[at] + values[at + 1]) / 2,) * 2)
    expected = [any_generate(model, policy, prompt, NEW_TOKENS, engine.classifiers) for prompt in PROMPTS[:3]]
    results = run_generate(engine, [policy] * 3, PROMPTS[:3], max_rows=2)
    assert is_separated(*(row for _, row in expected))
    for (tokens, row), result in zip(expected, results, strict=True):
        assert result.tokens[:NEW_TOKENS] == tokens
        length = result.trace.prompt_tokens + NEW_TOKENS - 1
        assert list(result.trace.exit_layers)[: NEW_TOKENS - 1] == row.layers[result.trace.prompt_tokens : length]


@pytest.mark.parametrize(("group", "mode"), sorted(({*itertools.product(ARCHITECTURES, ("copy", "skip"))}) - {*MODES}))
def test_modes_that_mean_nothing_are_refused(group: str, mode: Any) -> None:
    with pytest.raises(UserError, match=f"^state_mode={mode} is not possible on "):
        engine_of(group, mode)


@every_group
def test_blocks_go_on_by_themselves_where_they_only_attend(group: str) -> None:
    # Blocks that take tokens in order, or K and V of other blocks.
    depend = ("two attentions in a block", "inputs per block and shared K and V")
    assert engine_of(group).backbone.resumes == (ARCHITECTURES[group][0] == "flat" and group not in depend)


@every_group
def test_frozen_passes_give_the_hidden_states_of_the_model(group: str) -> None:
    """What exits are trained on and angular profiles are measured by."""
    model, backbone = architecture(group), engine_of(group).backbone
    rows = PROMPTS[:2]
    states = last_states(backbone, rows)
    batch = FrozenPass(backbone, (2, 5), True, 1).run(rows)
    assert batch.reads[2].shape == batch.exits[2].shape
    blocks = backbone.replay.blocks  # type: ignore[attr-defined]
    for row, found in zip(rows, states, strict=True):
        for theirs, ours in zip(hidden_states(model, blocks, row), found[1:], strict=True):
            flat = theirs.movedim(-2, 0).flatten(1)[-1] if theirs.ndim == 4 else theirs[0, -1]
            torch.testing.assert_close(ours, flat, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def hidden_states(model: Any, blocks: list[torch.nn.Module], row: list[int]) -> list[torch.Tensor]:
    """What every block returns in the model's own forward."""
    seen: list[torch.Tensor] = []

    def note(_: Any, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_hook(note) for block in blocks]
    model(torch.tensor([row]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


#: Some of its experts are the identity, so a token costs what it is sent to.
UNEVEN = "two attentions in a block"


@pytest.mark.parametrize(
    "group", [group for group in ARCHITECTURES if ARCHITECTURES[group][0] != "whole rows" and group != UNEVEN]
)
def test_costs_are_what_the_flop_counter_sees(group: str) -> None:
    """One token through transformers' eager code; of modules with a recurrence, what their linear layers do."""
    engine = engine_of(group)
    for context in (3, 11):
        expected = [block.at(context) - block.recurrence for block in engine.backbone.cost.blocks]
        assert counted(architecture(group), engine.backbone, context) == expected


def counted(model: Any, backbone: Any, context: int) -> list[int]:
    """The MACs of every block for a token at position ``context`` that torch's own counter sees."""
    names = {module: name for name, module in model.named_modules()}
    recurrent = {
        mixer.module for block in backbone.blocks for mixer in block.mixers if getattr(mixer, "is_recurrent", True)
    }
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    cache = {"cache": DynamicCache(config=model.config), "use_cache": True}
    if "cache" not in inspect.signature(model.forward).parameters:
        cache["past_key_values"] = cache.pop("cache")
    ids = torch.tensor([[3 + i % 50 for i in range(context + 1)]])
    positions = torch.arange(context + 1)[None]
    try:
        with torch.inference_mode():
            model(ids[:, :context], position_ids=positions[:, :context], **cache)
            with FlopCounterMode(display=False) as counter:
                model(ids[:, context:], position_ids=positions[:, context:], **cache)
    finally:
        model.set_attn_implementation(before)

    def seen(module: torch.nn.Module) -> int:
        counts = counter.flop_counts.get(f"{type(model).__name__}.{names[module]}", {})
        return sum(counts.values()) // 2

    found = []
    for block in backbone.replay.blocks:
        macs = seen(block)
        for module in block.modules():
            if module in recurrent:
                macs += sum(seen(leaf) for leaf in module.modules() if isinstance(leaf, torch.nn.Linear)) - seen(module)
        found.append(macs)
    return found
