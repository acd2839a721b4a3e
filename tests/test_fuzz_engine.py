"""Random requests under random policies: alone, in batches with shared beginnings, and early exit written again."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import pytest
import torch
from helpers import FAMILIES, LAYERS, random_ids, tiny_model
from helpers_engine import EXITS, KINDS, drained, exits_config, varied_classifiers
from reference import reference_generate, reference_score

from dynamax_lm_eval.backbones import make_backbone
from dynamax_lm_eval.engine import prefixes
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.generation import generate
from dynamax_lm_eval.engine.requests import GenerationRequest, ScoringRequest
from dynamax_lm_eval.engine.sampling import Sampler
from dynamax_lm_eval.engine.scoring import score
from dynamax_lm_eval.exits.policy import ExitPolicy

CLASSIFIERS = varied_classifiers(exits_config(adapter="affine"))
#: The reference reads out in the backbone's float64.
IN_FLOAT64 = copy.deepcopy(CLASSIFIERS)
IN_FLOAT64.adapters.double()
THRESHOLDS = (0.0, 0.0, 0.02, 0.1, 0.3, 0.47, 0.52, 0.6, 0.8, 0.93, 1.0)


def random_policy(rng: random.Random, family: str, scope: Any = None) -> ExitPolicy:
    confidence: Any = rng.choice(["softmax", "entropy", "state", "classifier"])
    pruned = frozenset(rng.sample([*range(1, LAYERS + 1), LAYERS, LAYERS], rng.choice([0, 1, 1, 2, 3])))
    final_block = rng.random() < 0.25
    possible = set(EXITS if confidence == "classifier" else range(1, LAYERS - final_block)) - pruned
    exits = tuple(sorted(rng.sample(sorted(possible), rng.randint(0, len(possible)))))
    modes = ["recompute", "skip"] if "mamba" in family or family == "gemma3" else ["recompute", "copy", "skip"]
    return ExitPolicy(
        LAYERS,
        exits,
        tuple(rng.choice(THRESHOLDS) for _ in exits),
        confidence=confidence,
        state_mode=rng.choice(modes),  # type: ignore[arg-type]
        pruned_blocks=pruned,
        exit_scope=scope or rng.choice(["generated", "all"]),
        threshold_decay=rng.choice([None, None, None, 3.0]),
        classifier=rng.choice(KINDS) if confidence == "classifier" else None,  # type: ignore[arg-type]
        classifier_warmup=rng.choice([0, 3, 16]),
        final_block=final_block,
        adapter="affine" if exits and set(exits) <= set(EXITS) and not final_block and rng.random() < 0.3 else "none",
    )


def random_prompts(rng: random.Random, count: int) -> list[list[int]]:
    """Many of them begin with others, or with parts of others."""
    prompts: list[list[int]] = []
    for _ in range(count):
        begun = rng.choice(prompts)[: rng.randint(0, 40)] if prompts and rng.random() < 0.8 else []
        prompts.append([*begun, *random_ids(rng.choice([0, 1, 1, 2, 5, 12]), rng.randrange(1000))] or [5])
    return prompts


def check(seed: int) -> None:
    rng = random.Random(seed)
    family = rng.choice(FAMILIES)
    model = tiny_model(family, torch.float64)
    engine = Engine(make_backbone(model, max_length=256), CLASSIFIERS)
    in_segments = Engine(engine.backbone, CLASSIFIERS)
    in_segments.use_segments(True)
    policies = [random_policy(rng, family, rng.choice([None, "all"])) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    prompts = random_prompts(rng, rng.choice([1, 2, 9, 9]))
    followed = [rng.choice(policies) for _ in prompts]
    limits = [rng.choice([1, 2, 6]) for _ in prompts]
    ends = [rng.choice([0, 0, 2, 5]) for _ in prompts]  # tokens that such a number divides end a row
    asked = [
        GenerationRequest(prompt, limit, policy, Sampler(), lambda ids, end=end: bool(end) and ids[-1] % end == 0)  # type: ignore[misc]
        for prompt, limit, policy, end in zip(prompts, limits, followed, ends, strict=True)
    ]
    endings = [random_ids(limit, 7 * i) for i, limit in enumerate(limits)]
    texts = [
        ScoringRequest([*prompt, *ending[:-1]], len(prompt), [*([t] for t in ending[:-1]), [ending[-1], 9]], policy)
        for prompt, ending, policy in zip(prompts, endings, followed, strict=True)
    ]
    for run, requests in ((generate, asked), (score, texts)):
        alone = [drained(run(engine, [request], 1), 1)[0][0] for request in requests]  # type: ignore[operator]
        sizes = [rng.choice([1, 2, 4, 16]) for _ in range(2)]
        for (share, max_rows), used in itertools.product(zip((True, False), sizes, strict=True), (engine, in_segments)):
            running = run(used, requests, max_rows, share_prefixes=share)  # type: ignore[operator, arg-type]
            results, _ = drained(running, len(requests))
            for ours, theirs in zip(results, alone, strict=True):
                assert ours.trace == theirs.trace, (seed, family, share)
                if run is generate:
                    assert ours.tokens == theirs.tokens, (seed, family, share)
                else:
                    for line, expected in zip(ours.log_probs, theirs.log_probs, strict=True):
                        assert line == pytest.approx(expected, abs=1e-4), (seed, family, share)
        for i in rng.sample(range(len(prompts)), min(2, len(prompts))):
            policy, first = followed[i], followed[i].first_eligible_position(len(prompts[i]))
            if run is generate:
                tokens, row = reference_generate(model, policy, prompts[i], limits[i], IN_FLOAT64)
                given = alone[i].tokens
                assert given == tokens[: len(given)], (seed, family, policy)
            else:
                scores, row = reference_score(model, policy, prompts[i], endings[i], IN_FLOAT64)
                assert [line[0] for line in alone[i].log_probs] == pytest.approx(scores, abs=1e-4), (
                    seed,
                    family,
                    policy,
                )
            assert list(alone[i].trace.exit_layers) == row.layers[first : alone[i].trace.fed_tokens], (seed, policy)


@pytest.fixture(autouse=True)
def short_prefixes_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "MIN_SAVED_TOKENS", 1)


#: In the last two, shared tokens leave before a last block that is pruned.
@pytest.mark.parametrize("seed", [*range(10), 78, 90])
def test_rows_answer_the_same_however_they_run(seed: int) -> None:
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_many_rows_answer_the_same_however_they_run(part: int) -> None:
    for seed in range(100 + 40 * part, 140 + 40 * part):
        check(seed)
