"""Rows that wait at exits for full batches: the same answers as alone, and batches that are fuller."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from helpers import LAYERS, random_ids, tiny_model
from helpers_engine import (
    CLASSIFIERS,
    NEW_TOKENS,
    PROMPTS,
    assert_confidences,
    classifier_policy,
    drained,
    reference_of_all,
    run_generate,
    separated_policy,
)
from torch import nn

from dynamax_lm_eval.backbones import make_backbone
from dynamax_lm_eval.engine.engine import Engine, PassResult
from dynamax_lm_eval.engine.generation import generate
from dynamax_lm_eval.engine.requests import GenerationRequest
from dynamax_lm_eval.engine.sampling import Sampler
from dynamax_lm_eval.engine.waiting import READ_OUT, WaitingRow, WaitingRows
from dynamax_lm_eval.exits.classifiers import Classifier, ClassifierOptions, ExitClassifiers
from dynamax_lm_eval.exits.policy import ExitPolicy

#: Families that go on at any block, with their state modes.
CASES = [
    pytest.param(family, mode, marks=[pytest.mark.slow] if family == "mistral" else [])
    for family, modes in {
        "llama": ("recompute", "copy", "copy_previous", "skip"),
        "mistral": ("recompute", "skip"),
        "mamba2": ("recompute", "skip"),
        "mamba": ("recompute",),
    }.items()
    for mode in modes
]


def engine_of(family: str) -> Engine:
    return Engine(make_backbone(tiny_model(family), max_length=256), CLASSIFIERS)


#: Each confidence with and without the final block; one of the two is slow.
CONFIDENCES = [
    pytest.param(confidence, final_block, marks=[] if final_block == quick else [pytest.mark.slow])
    for confidence, quick in {"state": False, "softmax": True, "mamba": False, "calm": True}.items()
    for final_block in (False, True)
]


@pytest.mark.parametrize(("confidence", "final_block"), CONFIDENCES)
@pytest.mark.parametrize(("family", "mode"), CASES)
def test_answers_are_those_of_the_reference(family: str, mode: Any, confidence: str, final_block: bool) -> None:
    if confidence in ("state", "softmax"):
        policy = ExitPolicy(LAYERS, (2, 3, 5), (0.5,) * 3, confidence=confidence, state_mode=mode)  # type: ignore[arg-type]
    else:
        policy = classifier_policy(confidence, state_mode=mode)
    policy, expected = reference_of_all(family, policy.__class__(**{**vars(policy), "final_block": final_block}))
    for max_rows, rows_in_flight in ((2, 3), (2, 5), (3, 5)):
        results = run_generate(engine_of(family), [policy] * len(PROMPTS), PROMPTS, max_rows, rows_in_flight)
        for (tokens, row), result in zip(expected, results, strict=True):
            assert result.tokens == tokens
            assert list(result.trace.exit_layers) == row.layers[result.trace.prompt_tokens :]
            assert_confidences(result.trace, row, policy)
    assert {layer for _, row in expected for layer in row.layers} > {LAYERS}


@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_rows_of_different_policies_wait_together(family: str) -> None:
    model, engine = tiny_model(family), engine_of(family)
    shared = random_ids(80, 3)
    pairs: list[tuple[ExitPolicy, list[int]]] = [(ExitPolicy(LAYERS), shared + random_ids(3, 40))]
    for i, kind in enumerate(("mamba", "calm", "ffn")):
        for scope in ("generated", "all"):
            policy = classifier_policy(kind, exit_scope=scope, pruned_blocks=frozenset({4} if i else ()))
            policy = separated_policy(model, policy, PROMPTS[0], classifiers=CLASSIFIERS)
            pairs += [(policy, shared + random_ids(2 + i, 50 + i)), (policy, random_ids(1 + 4 * i, 60 + i))]
    alone = [run_generate(engine, [policy], [prompt], 1)[0] for policy, prompt in pairs]
    requests = [GenerationRequest(prompt, NEW_TOKENS, policy, Sampler(), lambda _: False) for policy, prompt in pairs]
    together, prefixes = drained(generate(engine, requests, 3, rows_in_flight=8), len(requests))
    assert prefixes
    for a, b in zip(alone, together, strict=True):
        assert (a.tokens, a.trace) == (b.tokens, b.trace)
        assert len(a.trace.confidences) == len(b.trace.confidences)
        for of_token, again in zip(a.trace.confidences, b.trace.confidences, strict=True):
            assert of_token == pytest.approx(again, abs=0.0011)
    assert all(result.trace.confidences for result in together[1:]) and not together[0].trace.confidences


class EverySecond(Classifier):
    """An exit that every second token takes."""

    macs = 0

    def __init__(self) -> None:
        super().__init__(1)
        self._seen = 0

    def forward(self, hidden: Any, rows: Any = None, state: Any = None) -> Any:
        numbers = torch.arange(self._seen, self._seen + len(hidden))
        self._seen += len(hidden)
        return torch.stack([torch.zeros(len(hidden)), torch.where(numbers % 2 == 0, 5.0, -5.0)], dim=1), None


@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_blocks_behind_an_exit_run_in_full_batches(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exits = ExitClassifiers((), (3,), 1, "silu", ClassifierOptions())
    exits.by_kind["calm"] = nn.ModuleDict({"3": EverySecond()})
    engine = Engine(make_backbone(tiny_model(family), max_length=256), exits)
    policy = ExitPolicy(LAYERS, (3,), (0.5,), confidence="classifier", classifier="calm")
    prompts = [random_ids(3 + i % 5, 200 + i) for i in range(24)]
    advance = Engine.advance
    deep: list[int] = []

    def noting(run: Engine, batch: Any, *args: Any, **kwargs: Any) -> PassResult:
        result = advance(run, batch, *args, **kwargs)
        if batch.layout.positions.min() > 0:  # decoding
            deep.append(int((result.layers == LAYERS).sum()))
        return result

    monkeypatch.setattr(Engine, "advance", noting)
    found = []
    for rows_in_flight in (None, 12):
        deep.clear()
        run_generate(engine, [policy] * len(prompts), prompts, 4, rows_in_flight)
        found.append(statistics.median(count for count in deep if count))
    assert found == [2, 4]


def test_the_fullest_batch_runs_next() -> None:
    waiting: WaitingRows[str] = WaitingRows(4)
    waiting.add(0, [WaitingRow(name) for name in "abcdef"])
    place, rows = waiting.take(room=0)
    assert (place, [waited.row for waited in rows]) == (0, list("abcd"))
    # Two of four go on after block 3: two others wait to be fed, and two to be read out.
    assert not waiting.holds(3, 2)
    assert not waiting.holds(3, 4)
    assert waiting.holds(3, 1)
    waiting.add(3, [WaitingRow("a", torch.zeros(1, 1, 2))])
    waiting.add(READ_OUT, [WaitingRow(name, torch.zeros(1, 1, 2)) for name in "bcd"])
    place, rows = waiting.take(room=0)
    assert (place, [waited.row for waited in rows]) == (READ_OUT, list("bcd"))
    waiting.add(0, [WaitingRow(name) for name in "bcd"])
    # Requests that could be started count with those that wait to be fed.
    assert len(waiting) == 6
    place, rows = waiting.take(room=3)
    assert (place, [waited.row for waited in rows]) == (0, list("efbc"))
    # With those that wait after block 3 already, it is fuller than what goes on alone.
    waiting.add(3, [WaitingRow("x", torch.zeros(1, 1, 2))])
    assert waiting.holds(3, 2)
    # Where nothing is fuller, what has run through most blocks comes first, and nothing waits for nobody.
    assert waiting.take(room=0)[0] == 3
