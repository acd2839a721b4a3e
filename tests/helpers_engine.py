"""Requests for the engine, policies whose decisions do not hang on rounding, and exits to try."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import LAYERS, MAMBAS, random_ids, tiny_model
from reference import reference_generate, reference_score

from dynamax_lm_eval.backbones import TransformerBackbone, make_backbone
from dynamax_lm_eval.backbones.mamba.kernels import ScanKernels
from dynamax_lm_eval.compute.trace import Trace
from dynamax_lm_eval.config import DynamaxArgs
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.generation import generate_all
from dynamax_lm_eval.engine.prefixes import PrefixRun
from dynamax_lm_eval.engine.requests import Generation, GenerationRequest, Scoring, ScoringRequest
from dynamax_lm_eval.engine.sampling import Sampler
from dynamax_lm_eval.engine.scoring import score_all
from dynamax_lm_eval.exits.checkpoint import BackboneIdentity, ExitConfig
from dynamax_lm_eval.exits.classifiers import ClassifierOptions, ExitClassifiers
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.exits.resolve import (
    resolve_policy,
)
from dynamax_lm_eval.models.fingerprint import model_fingerprint

FULL = ExitPolicy(LAYERS)
PROMPTS = [random_ids(length, seed) for seed, length in enumerate((13, 4, 9, 1, 7))]
NEW_TOKENS = 8
MODES = ("recompute", "copy", "copy_previous", "skip")
#: Families of blocks that differ in kind: K and V apart, rotary embedding and window by layer, K and V fused, Mamba.
KINDS_OF_BLOCKS = ("llama", "gemma3", "gpt_neox", *MAMBAS)


def with_modes(*families: str) -> Any:
    """Families with each of their state modes; copy is refused on Gemma 3 and on Mamba, which has tests of its own.

    copy_previous, which is for Llama's kind alone, has others too (test_copy_previous).

    Families whose kind of block another one has too are slow.
    """
    pairs = [
        pytest.param(family, mode, marks=[] if family in KINDS_OF_BLOCKS else [pytest.mark.slow])
        for family in families
        for mode in MODES
        if not (mode == "copy" and (family == "gemma3" or "mamba" in family))
        if mode != "copy_previous" or family == "llama"
    ]
    return pytest.mark.parametrize(("family", "mode"), pairs)


def engine_for(family: str, *dtype: torch.dtype) -> Engine:
    return Engine(make_backbone(tiny_model(family, *dtype), max_length=256))


def run_generate(
    engine: Engine,
    policies: list[ExitPolicy],
    prompts: list[list[int]],
    max_rows: int,
    rows_in_flight: int | None = None,
) -> list[Generation]:
    requests = [
        GenerationRequest(prompt, NEW_TOKENS, policy, Sampler(), lambda _: False)
        for prompt, policy in zip(prompts, policies, strict=True)
    ]
    return generate_all(engine, requests, max_rows, rows_in_flight)


def run_score(
    engine: Engine, policy: ExitPolicy, pairs: list[tuple[list[int], list[int]]], max_rows: int
) -> list[Scoring]:
    requests = [
        ScoringRequest([*context, *continuation[:-1]], len(context), [[t] for t in continuation], policy)
        for context, continuation in pairs
    ]
    return score_all(engine, requests, max_rows)


def drained(
    running: Generator[tuple[int, Any], None, list[PrefixRun]], count: int
) -> tuple[list[Any], list[PrefixRun]]:
    """Returns the results of all ``count`` requests in their order, and what was run for prefixes."""
    results: dict[int, Any] = {}
    while True:
        try:
            index, result = next(running)
        except StopIteration as end:
            return [results.pop(i) for i in range(count)], end.value
        assert 0 <= index < count
        results[index] = result


@torch.no_grad()
def model_scores(model: Any, context: list[int], continuation: list[int]) -> tuple[list[float], list[int]]:
    """Log-probabilities of a continuation by transformers' own forward, and the most probable tokens there."""
    logits = model(torch.tensor([[*context, *continuation[:-1]]])).logits[0, len(context) - 1 :]
    scores = logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])[:, 0]
    return scores.tolist(), logits.argmax(-1).tolist()


def separated_policies(
    model: Any,
    policy: ExitPolicy,
    prompt: list[int],
    quantile: float = 0.5,
    classifiers: Any = None,
    generate: Any = reference_generate,
) -> Iterator[ExitPolicy]:
    """The policy with thresholds at which some tokens exit; those farthest from the prompt's confidences first."""
    never_exits = replace(policy, thresholds=(0.9999,) * len(policy.exit_layers))
    _, never = generate(model, never_exits, prompt, 12, classifiers)
    values = sorted(value + 0.9999 for value in never.confidences)
    middle = values[int(quantile * len(values)) :]
    gaps = [(b - a, (a + b) / 2) for a, b in itertools.pairwise(middle)]
    for _, threshold in sorted(gaps[: len(gaps) // 2 + 1], reverse=True):
        yield replace(policy, thresholds=(threshold,) * len(policy.exit_layers))


def separated_policy(*args: Any, **kwargs: Any) -> ExitPolicy:
    """The policy with thresholds at which no token of the prompt is within rounding of deciding otherwise."""
    return next(separated_policies(*args, **kwargs))


def is_separated(*rows: Any, by: float = 1e-5) -> bool:
    return all(abs(value) > by for row in rows for value in row.confidences)


EXITS = (2, 3, 4)
KINDS = ("mamba", "hybrid", "ffn", "calm")
HIDDEN = 32


def exits_config(model: Any = None, **changes: Any) -> ExitConfig:
    """What a checkpoint for the tiny Llama says of itself."""
    model = model or tiny_model("llama")
    identity = BackboneIdentity("tiny", "main", "llama", HIDDEN, LAYERS, model_fingerprint(model))
    options = ClassifierOptions(mamba_state=5, mamba_expand=0.75, mamba_kernel=3, hybrid_expand=0.5)
    config = ExitConfig(identity, EXITS, KINDS, "silu", options)
    return replace(config, **changes)


def varied_classifiers(config: ExitConfig | None = None) -> ExitClassifiers:
    """Classifiers whose confidences differ from token to token, as after training."""
    torch.manual_seed(7)
    classifiers = (config or exits_config()).build(3)
    with torch.no_grad():
        for kind in classifiers.kinds:
            for layer in classifiers.exit_layers:
                classifiers.at(kind, layer).out_proj.weight.mul_(3)
    return classifiers.requires_grad_(False).eval()


CLASSIFIERS = varied_classifiers()


def engine_with_exits(family: str = "llama") -> Engine:
    return Engine(TransformerBackbone(tiny_model(family), max_length=256), CLASSIFIERS)


def classifier_policy(kind: str, **changes: Any) -> ExitPolicy:
    policy = ExitPolicy(LAYERS, EXITS, (0.5,) * len(EXITS), confidence="classifier", classifier=kind)  # type: ignore[arg-type]
    return replace(policy, **changes)


def separated(policy: ExitPolicy, family: str = "llama") -> ExitPolicy:
    return separated_policy(tiny_model(family), policy, PROMPTS[0], classifiers=CLASSIFIERS)


def policy_of(trained: ExitConfig | None, **args: Any) -> ExitPolicy:
    return resolve_policy(DynamaxArgs("x", **args), LAYERS, trained)


class KernelsOnCpu(ScanKernels):
    """Kernels that are used on a CPU as on a GPU: stand-ins, or interpreted ones."""

    def can_run(self, inputs: torch.Tensor) -> bool:
        return not inputs.requires_grad


def reference_of_all(family: str, policy: ExitPolicy) -> tuple[ExitPolicy, list[Any]]:
    """The policy at thresholds where none of ``PROMPTS`` decides within rounding, and what the reference makes."""
    model = tiny_model(family)
    for candidate in separated_policies(model, policy, PROMPTS[0], classifiers=CLASSIFIERS):
        expected = [reference_generate(model, candidate, prompt, NEW_TOKENS, CLASSIFIERS) for prompt in PROMPTS]
        if is_separated(*(row for _, row in expected)):
            return candidate, expected
    pytest.fail("every threshold is next to a confidence")


def assert_confidences(trace: Trace, row: Any, policy: ExitPolicy) -> None:
    """The confidences of a generation are those that the reference's ``row`` decided by."""
    first = max(policy.first_eligible_position(trace.prompt_tokens), trace.prompt_tokens - 1)
    expected = [row.asked.get(position, {}) for position in range(first, trace.fed_tokens)]
    assert len(trace.confidences) == len(expected) > 0
    for found, asked in zip(trace.confidences, expected, strict=True):
        reached = [layer for layer in policy.active_exits if layer <= max(asked, default=0)]
        assert found == pytest.approx([asked.get(layer) for layer in reached], abs=0.0006)


def assert_scored_as_one_by_one(family: str, policy: ExitPolicy) -> int:
    """Scores ``PROMPTS`` with continuations in batches and one token after the other; returns how many tokens left.

    At thresholds that no confidence is next to.
    """
    model = tiny_model(family)
    pairs = [(prompt, random_ids(9, 70 + i)) for i, prompt in enumerate(PROMPTS)]
    # Of this many tokens, some are next to almost any threshold.
    for candidate in separated_policies(model, policy, PROMPTS[0]):
        expected = [reference_score(model, candidate, *pair) for pair in pairs]
        if is_separated(*(row for _, row in expected), by=3e-5):
            break
    else:
        pytest.fail("every threshold is next to a confidence")
    for (scores, row), result in zip(expected, run_score(engine_for(family), candidate, pairs, 3), strict=True):
        first = candidate.first_eligible_position(result.trace.prompt_tokens)
        assert list(result.trace.exit_layers) == row.layers[first:]
        assert [line[0] for line in result.log_probs] == pytest.approx(scores, abs=1e-4)
    return sum(layer < LAYERS for _, row in expected for layer in row.layers)
