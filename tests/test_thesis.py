"""``preset=thesis`` and its parts: pruning that spares the prompt, exits above a threshold, the code's own factor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LAYERS, random_ids, tiny_model
from helpers_engine import (
    CLASSIFIERS,
    PROMPTS,
    classifier_policy,
    drained,
    engine_for,
    exits_config,
    is_separated,
    policy_of,
    run_generate,
    run_score,
    separated_policy,
)
from reference import reference_generate, reference_score
from torch import nn

from dynamax_lm_eval.backbones import make_backbone
from dynamax_lm_eval.compute.accounting import account
from dynamax_lm_eval.compute.thesis import ThesisFormula
from dynamax_lm_eval.config import DynamaxArgs, parse_model_args
from dynamax_lm_eval.engine import prefixes
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.generation import generate
from dynamax_lm_eval.engine.requests import GenerationRequest
from dynamax_lm_eval.engine.sampling import Sampler
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.classifiers import Classifier, ClassifierOptions, ExitClassifiers
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.exits.resolve import resolve_policy

PRUNED = frozenset({2, 5})


class TestFormula:
    """Figures that the code gives where every token leaves at the first exit."""

    @pytest.mark.parametrize(
        ("formula", "with_penalty", "factor"),
        [
            (ThesisFormula(32, False, recomputes_state=True), False, 2.13),
            (ThesisFormula(32, False, recomputes_state=False), True, 2.00),
            (ThesisFormula(32, False, recomputes_state=True), True, 1.79),
            (ThesisFormula(64, True, recomputes_state=False), True, 2.00),
            (ThesisFormula(64, True, recomputes_state=True), True, 1.47),
        ],
    )
    def test_all_at_the_first_exit(self, formula: ThesisFormula, with_penalty: bool, factor: float) -> None:
        layers = [[formula.num_layers // 2] * 9, [formula.num_layers // 2] * 4]
        assert formula.reduction(layers, with_penalty) == pytest.approx(factor, abs=0.005)

    def test_tokens_at_full_depth_save_nothing(self) -> None:
        formula = ThesisFormula(32, False, recomputes_state=False)
        assert formula.reduction([[32, 32]]) == 1
        assert formula.reduction([[16, 32]]) == pytest.approx(64 / (16 + 32))
        assert formula.reduction([[], []]) == 1

    def test_pruned_blocks(self) -> None:
        formula = ThesisFormula(32, False, recomputes_state=False, num_pruned=4)
        assert formula.reduction([[32] * 3]) == 32 / 28
        assert formula.reduction([[32, 16]]) is None, "it prunes or exits, never both"


def spared(**changes: Any) -> ExitPolicy:
    return ExitPolicy(LAYERS, pruned_blocks=PRUNED, prune_scope="generated", **changes)


@pytest.mark.parametrize("exits", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3", "mamba2"])
def test_the_prompt_runs_blocks_that_its_answer_does_not(family: str, exits: bool) -> None:
    model, policy = tiny_model(family), spared()
    if exits:
        policy = separated_policy(
            model, spared(exit_layers=(3, 4), thresholds=(0.5, 0.5), confidence="state"), PROMPTS[0]
        )
    engine = engine_for(family)
    for prompt, result in zip(PROMPTS, run_generate(engine, [policy] * 5, PROMPTS, 3), strict=True):
        tokens, row = reference_generate(model, policy, prompt, 8)
        assert is_separated(row)
        assert (result.tokens, list(result.trace.exit_layers)) == (tokens, row.layers[len(prompt) :])
    pairs = [(prompt, random_ids(6, 60 + i)) for i, prompt in enumerate(PROMPTS[:3])]
    for pair, scoring in zip(pairs, run_score(engine, policy, pairs, 2), strict=True):
        scores, row = reference_score(model, policy, *pair)
        assert [line[0] for line in scoring.log_probs] == pytest.approx(scores, abs=1e-4)
    everywhere = replace(policy, prune_scope="all")
    (pruned,) = run_score(engine, everywhere, pairs[:1], 1)
    assert abs(pruned.log_probs[0][0] - reference_score(model, policy, *pairs[0])[0][0]) > 1e-3, "the scope matters"


def test_rows_wait_share_prefixes_and_run_in_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "MIN_SAVED_TOKENS", 1)
    model, shared = tiny_model("llama"), random_ids(20, 3)
    policy = classifier_policy("calm", prune_scope="generated", pruned_blocks=frozenset({1, 5}))
    policy = separated_policy(model, policy, PROMPTS[0], classifiers=CLASSIFIERS)
    policies = [policy, ExitPolicy(LAYERS), replace(policy, prune_scope="all")]
    pairs = [(policies[i % 3], shared + random_ids(2 + i, 50 + i)) for i in range(6)]
    plain = Engine(make_backbone(model, max_length=256), CLASSIFIERS)
    alone = [run_generate(plain, [policy], [prompt], 1)[0] for policy, prompt in pairs]
    for segments in (False, True):
        engine = Engine(plain.backbone, CLASSIFIERS)
        engine.use_segments(segments)
        requests = [GenerationRequest(prompt, 8, policy, Sampler(), lambda _: False) for policy, prompt in pairs]
        together, runs = drained(generate(engine, requests, 3, rows_in_flight=5), len(requests))
        assert [(a.tokens, a.trace) for a in alone] == [(b.tokens, b.trace) for b in together]
        assert runs, "rows that prune generated tokens alone share a prompt with those that prune nothing"


def test_what_the_prompt_costs() -> None:
    engine, policy = engine_for("llama"), spared()
    (result,) = run_generate(engine, [policy], PROMPTS[:1], 1)
    cost, prompt = engine.backbone.cost, len(PROMPTS[0])
    terms = policy.cost_terms(prompt)
    record, full = (account(result.trace, t, cost) for t in (terms, replace(terms, pruned_blocks=frozenset())))
    positions = range(prompt, prompt + 7)
    saved = sum(cost.blocks[block - 1].at(position) for block in PRUNED for position in positions)
    assert full.total_macs - record.total_macs == saved
    assert full.full_macs == record.full_macs


def test_above_a_threshold_and_at_it() -> None:
    at = ExitPolicy(LAYERS, (2, 3, 4), (0.5, 0.0, 1.0))
    above = replace(at, above_threshold=True)
    steps = np.asarray([0])
    assert at.effective_thresholds(steps, 1).tolist() == [[0.5, 0.0, np.inf]]
    found = above.effective_thresholds(steps, 1)[0]
    assert not np.float32(0.5) >= found[0] and np.nextafter(np.float32(0.5), np.float32(1)) >= found[0]
    assert not np.float32(0) >= found[1] and found[2] == np.inf
    assert "above_threshold" not in at.describe(), "what was described before is the same"
    assert above.describe() == {**at.describe(), "above_threshold": True}


class Even(Classifier):
    """A confidence of one half, exactly."""

    macs = 0

    def forward(self, hidden: Any, rows: Any = None, state: Any = None) -> Any:
        return torch.zeros(len(hidden), 2), None


def test_a_confidence_of_exactly_the_threshold() -> None:
    exits = ExitClassifiers((), (3,), 1, "silu", ClassifierOptions())
    exits.by_kind["calm"] = nn.ModuleDict({"3": Even(1)})
    engine = Engine(make_backbone(tiny_model("llama"), max_length=256), exits)
    policy = ExitPolicy(LAYERS, (3,), (0.5,), confidence="classifier", classifier="calm")
    policies = [policy, replace(policy, above_threshold=True)]
    at, above = run_generate(engine, policies, PROMPTS[:2], 2)
    assert set(at.trace.exit_layers) == {3}
    assert set(above.trace.exit_layers) == {LAYERS}


class TestPreset:
    def test_sets_what_the_code_does(self) -> None:
        args, _ = parse_model_args({"backbone": "x", "preset": "thesis", "prune_layers": 2}, ())
        assert (args.final_block, args.repetition_penalty, args.prune_scope) == (True, 1.0, "generated")
        policy = resolve_policy(args, LAYERS, exits_config(final_block=True))
        assert (policy.state_mode, policy.final_block, policy.above_threshold) == ("copy_previous", True, True)
        assert (policy.prune_scope, policy.exit_scope, policy.pruned_blocks) == ("generated", "generated", {4, 5})
        recurrent = resolve_policy(args, LAYERS, exits_config(final_block=True), recurrent_backbone=True)
        assert recurrent.state_mode == "skip"

    def test_arguments_beside_it_override_it(self) -> None:
        given = {"preset": "thesis", "state_mode": "recompute", "repetition_penalty": 1.2, "prune_scope": "all"}
        args, _ = parse_model_args({"backbone": "x", "prune_layers": 1, **given}, ())
        policy = resolve_policy(args, LAYERS, exits_config(final_block=True))
        assert (policy.state_mode, args.repetition_penalty, policy.prune_scope) == ("recompute", 1.2, "all")

    def test_without_pruned_blocks_there_is_no_scope(self) -> None:
        policy = policy_of(None, preset="thesis", prune_scope="generated", final_block=True, threshold=(1.0,))
        assert policy.prune_scope == "all"

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"prune_scope": "generated"}, "has no effect without prune_layers"),
            ({"prune_scope": "generated", "prune_layers": 1, "exit_scope": "all"}, "exit_scope=all exclude each other"),
            ({"preset": "thesis", "prune_layers": 1, "exit_scope": "all"}, "exit_scope=all exclude each other"),
            (
                {"prune_scope": "generated", "prune_layers": 1, "prompt_exit_layer": 2},
                "prompt_exit_layer exclude each other",
            ),
            ({"prune_scope": "prompt"}, "prune_scope must be one of all, generated"),
        ],
    )
    def test_what_does_not_go_together(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            parse_model_args({"backbone": "x", **given}, ())

    def test_sweeps_are_told_as_well(self) -> None:
        """A sweep puts numbers of pruned blocks in after arguments were checked."""
        args = DynamaxArgs("x", prune_layers=2, prune_scope="generated", exit_scope="all")
        with pytest.raises(UserError, match="exclude each other"):
            resolve_policy(args, LAYERS)
