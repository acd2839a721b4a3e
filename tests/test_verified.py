"""Exits as drafts: the texts are those of the full model, whatever the exits draft."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import LAYERS, tiny_model
from helpers_architectures import ARCHITECTURES, architecture
from helpers_engine import CLASSIFIERS, EXITS, KINDS, PROMPTS, engine_for
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper

from dynamax_lm_eval.backbones import make_backbone
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.generation import generate_all
from dynamax_lm_eval.engine.parity import check_drafts, check_policy, checked_engine
from dynamax_lm_eval.engine.requests import Generation, GenerationRequest
from dynamax_lm_eval.engine.rows import VerifiedRow
from dynamax_lm_eval.engine.sampling import Sampler
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.policy import ExitPolicy

NEW_TOKENS = 24
HYBRIDS = ("attention and Mamba-2", "linear attention and experts")
#: Run without a cache, with a cache of the family's own, or with K and V of other blocks.
REFUSED = ("ALiBi", "local and global heads, positions counted", "inputs per block and shared K and V")
FULL = ExitPolicy(LAYERS)


def drafting(threshold: float = 0.1, **changes: Any) -> ExitPolicy:
    """A policy under which tokens leave as drafts; on random models many of them are wrong."""
    thresholds = (threshold,) * len(EXITS)
    return ExitPolicy(LAYERS, EXITS, thresholds, **{"confidence": "softmax", "verify_tokens": 3, **changes})


def run(engine: Engine, policy: ExitPolicy, max_rows: int = 1, **request: Any) -> list[Generation]:
    """Generates for all prompts; ``sampler``: makes the sampler of a prompt, by its number."""
    sampler = request.pop("sampler", lambda _: Sampler())
    settings = {"max_new_tokens": NEW_TOKENS, "is_finished": lambda _: False, **request}
    requests = [
        GenerationRequest(prompt, policy=policy, sampler=sampler(number), **settings)
        for number, prompt in enumerate(PROMPTS)
    ]
    return generate_all(engine, requests, max_rows)


def texts(results: list[Generation]) -> list[list[int]]:
    return [result.tokens for result in results]


def rates(results: list[Generation]) -> tuple[int, int]:
    """How many drafts there were, and how many of them were right."""
    traces = [result.trace.verified for result in results]
    return sum(len(t.drafts) for t in traces if t), sum(len(t.right_drafts) for t in traces if t)


def assert_full_text(engine: Engine, policy: ExitPolicy, **request: Any) -> list[Generation]:
    """Asserts that texts are those without exits, alone and in batches, with the same drafts."""
    expected = texts(run(engine, FULL, **request))
    alone, together = run(engine, policy, **request), run(engine, policy, max_rows=4, **request)
    assert texts(alone) == texts(together) == expected
    assert [result.trace for result in alone] == [result.trace for result in together]
    return alone


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt_neox", "mamba2", "mamba"])
def test_texts_are_those_of_the_full_model(family: str) -> None:
    drafts, right = rates(assert_full_text(engine_for(family), drafting()))
    assert 0 < right < drafts  # so that some were taken back


@pytest.mark.parametrize("group", [HYBRIDS[0], pytest.param(HYBRIDS[1], marks=pytest.mark.slow)])
def test_hybrids_too(group: str) -> None:
    engine = Engine(make_backbone(architecture(group), max_length=256))
    drafts, right = rates(assert_full_text(engine, drafting(0.01)))
    assert 0 < right < drafts


@pytest.mark.parametrize("verify_tokens", [1, 2, pytest.param(7, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_any_number_of_drafts(family: str, verify_tokens: int) -> None:
    # Threshold 0: every token is drafted at the first exit, so that rows are verified when they have as many.
    results = assert_full_text(engine_for(family), drafting(0.0, verify_tokens=verify_tokens))
    for result in results:
        trace = result.trace.verified
        assert trace is not None
        assert {token.left for token in trace.fed} <= {EXITS[0], None}
        assert 0 < len(trace.drafts) <= trace.verifications * verify_tokens


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind == "hybrid" else ()) for kind in KINDS]
)
def test_with_every_classifier(kind: Any) -> None:
    engine = Engine(make_backbone(tiny_model("llama"), max_length=256), CLASSIFIERS)
    policy = drafting(0.5, confidence="classifier", classifier=kind)
    drafts, right = rates(assert_full_text(engine, policy))
    assert 0 < right < drafts


@pytest.mark.parametrize("confidence", ["entropy", "state"])
def test_with_every_confidence(confidence: Any) -> None:
    drafts, _ = rates(assert_full_text(engine_for("llama"), drafting(0.2, confidence=confidence)))
    assert drafts > 0


@pytest.mark.parametrize("confidence", ["softmax", "state"])
def test_drafts_from_a_part_of_the_vocabulary(confidence: Any) -> None:
    policy = drafting(0.1, confidence=confidence, vocab_subset=40)
    drafts, right = rates(assert_full_text(engine_for("llama"), policy))
    assert 0 < right < drafts


def test_penalties_see_the_text_as_it_will_be() -> None:
    def penalised(number: int) -> Sampler:
        return Sampler(LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7)]))

    results = assert_full_text(engine_for("llama"), drafting(), sampler=penalised)
    assert texts(results) != texts(run(engine_for("llama"), FULL))


@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_samples_are_those_of_the_full_model(family: str) -> None:
    def sampling(number: int) -> Sampler:
        return Sampler(LogitsProcessorList([TemperatureLogitsWarper(0.7)]), do_sample=True, seed=number)

    drafts, right = rates(assert_full_text(engine_for(family), drafting(), sampler=sampling))
    assert 0 < right < drafts


def test_texts_end_where_the_full_model_ends() -> None:
    engine = engine_for("llama")
    ends = {row[5] for row in texts(run(engine, FULL))}
    results = assert_full_text(engine, drafting(0.0), is_finished=lambda generated: generated[-1] in ends)
    assert {len(result.tokens) for result in results} != {NEW_TOKENS}
    for length in (1, 2, 3, 5):
        assert {len(row) for row in texts(assert_full_text(engine, drafting(0.0), max_new_tokens=length))} == {length}


def test_mixed_with_rows_that_exit_for_good() -> None:
    engine = engine_for("llama")
    policies = [drafting(), replace(drafting(), verify_tokens=None), FULL]
    requests = [
        GenerationRequest(prompt, NEW_TOKENS, policy, Sampler(), lambda _: False)
        for prompt in PROMPTS
        for policy in policies
    ]
    together = generate_all(engine, requests, max_rows=5)
    for request, result in zip(requests, together, strict=True):
        (alone,) = generate_all(engine, [request], max_rows=1)
        assert (alone.tokens, alone.trace) == (result.tokens, result.trace)


@pytest.mark.parametrize(
    "group",
    [
        pytest.param(group, marks=[] if group == "ALiBi" else [pytest.mark.slow])
        for group in ARCHITECTURES
        if group not in HYBRIDS
    ],
)
def test_every_architecture_verifies_or_refuses(group: str) -> None:
    engine = checked_engine(architecture(group), FULL, max_length=256)
    if group in REFUSED:
        with pytest.raises(UserError, match=r"verify is not possible on \w+, whose blocks cannot go on"):
            engine.check_policy(drafting())
        return
    check_policy(engine, drafting())
    drafts, _ = rates(assert_full_text(engine, drafting(0.01)))
    assert drafts > 0


@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_states_are_as_if_nothing_had_been_drafted(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts of a scripted kind: right up to one place, which is every place in turn."""
    engine = engine_for(family)
    full = texts(run(engine, FULL, max_new_tokens=10))[0]
    model = tiny_model(family)
    with torch.no_grad():
        expected = model(torch.tensor([[*PROMPTS[0], *full]])).logits[0, len(PROMPTS[0]) - 1 :].argmax(-1)
    assert expected[: len(full)].tolist() == full
    for wrong in range(1, 6):
        request = GenerationRequest(PROMPTS[0], 10, drafting(0.0, verify_tokens=6), Sampler(), lambda _: False)
        with monkeypatch.context() as patched:
            patched.setattr(VerifiedRow, "take", scripted(full, wrong))
            (result,) = generate_all(engine, [request], 1)
        assert result.tokens == full
        trace = result.trace.verified
        assert trace is not None
        # Six drafts: the one numbered ``wrong`` is not the full model's, and all behind it are fed for nothing.
        first = trace.fed[:7]
        assert [token.stands for token in first] == [number <= wrong for number in range(7)]
        assert [token.was_right for token in first[:6]] == [number < wrong for number in range(6)]


def scripted(full: list[int], wrong: int) -> Any:
    """A ``VerifiedRow.take`` that puts right drafts in place of those of the exits, but one of the first round."""
    take, rounds = VerifiedRow.take, []

    def scripted_take(row: VerifiedRow, chosen: Any) -> Any:
        if row.drafts and row.drafts[-1].proposal is None:
            number = len(row.drafts) - 1
            token = full[len(row.generated) + number]
            return take(row, {number: (token + 1) % 90 if not rounds and number == wrong else token})
        if row.generated:
            rounds.append(row.generated)
        return take(row, chosen)

    return scripted_take


def test_a_model_whose_drafts_go_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_drafts(engine_for("mamba2"))
    # Nothing is taken back.
    monkeypatch.setattr("dynamax_lm_eval.backbones.mamba.backbone.MambaStates.settle", lambda *_: None)
    with pytest.raises(UserError, match="verify is not possible on Mamba2ForCausalLM: the logits of tokens that go on"):
        check_drafts(engine_for("mamba2"))
