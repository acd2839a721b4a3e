"""Blocks up to an exit in one call on places that stay where they are: the same answers, and what a graph would need.

Segments on a GPU are in ``test_segment_graphs``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cudalike import cuda_like
from helpers import LAYERS, random_ids, tiny_model
from helpers_engine import (
    CLASSIFIERS,
    FULL,
    PROMPTS,
    classifier_policy,
    drained,
    reference_of_all,
    run_generate,
    run_score,
    separated_policy,
)
from helpers_harness import dynamax, generation_requests
from helpers_segments import NOT_ALL, Collected, ReplayedGraphs, engine_of, fed, passes_of, policy_of
from torch import Tensor

from dynamax_lm_eval.backbones import make_backbone
from dynamax_lm_eval.backbones import segments as static
from dynamax_lm_eval.backbones.segments import bucket
from dynamax_lm_eval.backbones.transformer import varlen
from dynamax_lm_eval.engine.batch import FlatBatch
from dynamax_lm_eval.engine.engine import Engine, RowStates
from dynamax_lm_eval.engine.generation import generate
from dynamax_lm_eval.engine.requests import GenerationRequest
from dynamax_lm_eval.engine.sampling import Sampler
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.harness import describe

#: Families with state modes of theirs, and confidences: trained ones of each kind, and one that reads two states.
CASES = [
    ("llama", "recompute"), ("llama", "copy"), ("llama", "copy_previous"), ("llama", "skip"),
    *(pytest.param(family, "recompute", marks=pytest.mark.slow) for family in ("mistral", "qwen3")),
    ("mamba2", "recompute"), ("mamba2", "skip"), ("mamba", "recompute"),
]  # fmt: skip
CONFIDENCES = [("state", False), ("calm", True), ("ffn", False), ("mamba", True)]


@pytest.mark.parametrize(("confidence", "final_block"), CONFIDENCES)
@pytest.mark.parametrize(("family", "mode"), CASES)
def test_answers_are_those_of_the_reference(family: str, mode: str, confidence: str, final_block: bool) -> None:
    """Alone, in batches, and with rows that wait at exits; what segments cannot do is counted with its reason."""
    policy, expected = reference_of_all(family, policy_of(confidence, mode, final_block))
    engine = engine_of(family)
    for max_rows, rows_in_flight in ((1, None), (3, None), (2, 5)):
        results = run_generate(engine, [policy] * len(PROMPTS), PROMPTS, max_rows, rows_in_flight)
        for (tokens, row), result in zip(expected, results, strict=True):
            assert result.tokens == tokens
            assert list(result.trace.exit_layers) == row.layers[result.trace.prompt_tokens :]
    passes = passes_of(engine)
    if (family, mode) == ("llama", "skip"):
        assert set(passes) == {"state_mode=skip", "prompts in the same pass"}
    else:
        assert set(passes) <= NOT_ALL
        assert passes["static"] > 0.8 * passes.total()
    # A text that is fed at once leaves at the same layers as token by token.
    pairs = [(PROMPTS[i], expected[i][0]) for i in range(3)]
    for scored, result in zip(run_score(engine, policy, pairs, 2), results, strict=False):
        assert scored.trace.exit_layers == result.trace.exit_layers


@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_rows_of_different_policies(family: str) -> None:
    """Scopes, pruned blocks, a shared prefix and rows without exits in one batch; rows wait at exits."""
    model, engine = tiny_model(family), engine_of(family)
    shared = random_ids(80, 3)
    pairs: list[tuple[ExitPolicy, list[int]]] = [(FULL, shared + random_ids(3, 40))]
    for i, kind in enumerate(("mamba", "calm", "ffn")):
        for scope in ("generated", "all"):
            policy = classifier_policy(kind, exit_scope=scope, pruned_blocks=frozenset({4} if i else ()))
            policy = separated_policy(model, policy, PROMPTS[0], classifiers=CLASSIFIERS)
            pairs += [(policy, shared + random_ids(2 + i, 50 + i)), (policy, random_ids(1 + 4 * i, 60 + i))]
    block_by_block = Engine(engine.backbone, CLASSIFIERS)
    alone = [run_generate(block_by_block, [policy], [prompt], 1)[0] for policy, prompt in pairs]
    requests = [GenerationRequest(prompt, 8, policy, Sampler(), lambda _: False) for policy, prompt in pairs]
    for max_rows, rows_in_flight in ((13, None), (3, 8), (1, None)):
        together, prefixes = drained(generate(engine, requests, max_rows, rows_in_flight=rows_in_flight), len(requests))
        assert prefixes
        for a, b in zip(alone, together, strict=True):
            assert (a.tokens, a.trace) == (b.tokens, b.trace)
    passes = passes_of(engine)
    assert passes["static"] > 0 and passes["rows that prune different blocks"] > 0
    assert set(passes) <= NOT_ALL | {"rows that prune different blocks"}


@pytest.mark.parametrize("family", ["llama", "mamba2", "mamba"])
def test_places_without_a_token_change_no_row(family: str) -> None:
    """Three rows of four go on, on four places; one leaves and goes deep in the next pass, with places of its own."""
    engine = engine_of(family)
    states = engine.new_states(4 * 12, row_stride=12)
    slots = [slot for slot in (states.allocate_row(12) for _ in range(4)) if slot is not None]
    prompts = [fed(random_ids(3 + i, i), 0, slot, FULL) for i, slot in enumerate(slots)]
    engine.forward(FlatBatch.build(prompts), states, Collected())
    leaving, staying = (ExitPolicy(LAYERS, (2,), (value,), confidence="state") for value in (0.0, 0.9999))
    for step in range(4):
        if step == 1:
            before = states_of(states)  # the places have been taken by four tokens
        policies = [leaving if step == 1 else staying, *[FULL] * (3 if step == 0 else 2)]
        rows = [fed([5 + step], 3 + i + step, slots[i], policy) for i, policy in enumerate(policies)]
        engine.forward(FlatBatch.build(rows), states, Collected())
    assert passes_of(engine) == {"static": 4}
    scratch = getattr(states.backbone, "scratch_slot", None), getattr(states.backbone, "scratch_line", None)
    written = {place for place in scratch if place is not None}
    for i in range(3):
        written |= {slots[i]} if "mamba" in family else {slots[i] + 3 + i + step for step in (1, 2, 3)}
    for old, new in zip(before, states_of(states), strict=True):
        changed = {int(line) for line in np.flatnonzero((old != new).flatten(1).any(1))}
        assert changed == written


def states_of(states: RowStates) -> list[Tensor]:
    """Copies of all that blocks keep, one line for each row, or token of one."""
    kept: Any = states.backbone
    if hasattr(kept, "keys"):
        return [cache.clone() for cache in (*kept.keys, *kept.values) if cache is not None]
    return [part.clone() for block in range(1, LAYERS + 1) for part in kept.of(block)]


def test_reasons_are_counted() -> None:
    """Hooks, autocast, other blocks, and processes that share them keep passes from segments, not from being right."""
    model, mixer = tiny_model("llama"), tiny_model("mamba2").backbone.layers[1].mixer
    for family, part in (("llama", model.model.layers[1].self_attn.q_proj), ("mamba2", mixer.norm)):
        hooked, calls = engine_of(family), list[int]()
        handle = part.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        try:
            run_generate(hooked, [FULL] * 2, PROMPTS[:2], 2)
        finally:
            handle.remove()
        assert set(passes_of(hooked)) == {"blocks that are hooked, adapted or quantised"}
        assert len(calls) == 8  # a prompt and 7 tokens of both rows
    narrow = Engine(make_backbone(model, max_length=256), autocast_dtype=torch.bfloat16)
    narrow.use_segments(True)
    run_generate(narrow, [FULL] * 2, PROMPTS[:2], 2)
    assert set(passes_of(narrow)) == {"autocast"}
    shared = engine_of("llama")
    shared.use_segments(True, "blocks that several processes share")
    run_generate(shared, [FULL] * 2, PROMPTS[:2], 2)
    assert set(passes_of(shared)) == {"blocks that several processes share"}
    replayed = engine_of("gpt_neox")
    run_generate(replayed, [FULL] * 2, PROMPTS[:2], 2)
    assert set(passes_of(replayed)) == {"blocks of a kind that runs one by one"}
    for engine in (narrow, shared, replayed):
        engine.use_segments(None)
        assert engine.segments is None  # on a CPU


def test_without_a_kernel_keys_are_copied_only_where_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "Graphs", ReplayedGraphs)
    with cuda_like():
        varlen.is_available.cache_clear()
        engine = engine_of("llama", on_gpu=True)
        engine.use_segments(None)
        run_generate(engine, [FULL] * 2, PROMPTS[:2], 2)
    assert set(passes_of(engine)) == {"no kernel of ragged rows"}


def test_the_argument_and_the_result_file(model_folder: Any) -> None:
    requests = generation_requests(["The quick", "A lazy", "The", "brown fox jumps"])
    exits = {"threshold": 0.1, "exit_layers": [2, 4], "batch_size": 2}
    answers = []
    for choice in ("auto", True, "false"):
        lm = dynamax(model_folder, static_segments=choice, **exits)
        answers.append(lm.generate_until(requests, disable_tqdm=True))
        counted = describe.run_settings(lm)["static_segments"]
        assert (counted is None) == (choice is not True)
    assert answers[0] == answers[1] == answers[2]
    lm.use_policy(replace(lm.args, static_segments=True))
    assert lm.generate_until(requests, disable_tqdm=True) == answers[0]
    assert describe.run_settings(lm)["static_segments"]["static"] > 0


def test_places_are_powers_of_two() -> None:
    assert [bucket(count) for count in (0, 1, 2, 3, 4, 5, 8, 9)] == [0, 1, 2, 4, 4, 8, 8, 16]
