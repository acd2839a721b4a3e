"""Learned states: in the engine against early exit written a second time; fitted, counted, saved and refused."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LAYERS, random_ids, tiny_model
from helpers_engine import (
    EXITS,
    HIDDEN,
    NEW_TOKENS,
    PROMPTS,
    classifier_policy,
    exits_config,
    is_separated,
    policy_of,
    run_generate,
    run_score,
    separated_policy,
    varied_classifiers,
)
from helpers_segments import NOT_ALL, passes_of
from helpers_training import ROWS
from reference import reference_generate, reference_score

from dynamax_lm_eval.backbones import ReplayBackbone, make_backbone
from dynamax_lm_eval.compute.accounting import account
from dynamax_lm_eval.compute.trace import Trace
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits import checkpoint
from dynamax_lm_eval.exits.checkpoint import ExitCheckpoint
from dynamax_lm_eval.exits.classifiers import ExitClassifiers
from dynamax_lm_eval.exits.state_maps import StateMapOptions
from dynamax_lm_eval.frozen.passes import FrozenPass
from dynamax_lm_eval.training import state_maps
from dynamax_lm_eval.training.batches import MicroBatches

#: Three ways of running blocks: fused, Mamba, and as their family wrote them.
FAMILIES = ["llama", "mistral", "qwen3", "mamba2", "mamba", "gpt_neox"]


def exits_for(family: str, kind: str, backbone: Any = None) -> ExitClassifiers:
    """Exits whose maps make states of their own."""
    backbone = backbone or make_backbone(tiny_model(family), max_length=256)
    sizes = state_maps.projection_sizes(FrozenPass(backbone, EXITS, False, 1))
    exits = varied_classifiers(exits_config(states=StateMapOptions(kind, sizes)))
    torch.manual_seed(5)
    for parameter in exits.state_maps.parameters():
        parameter.copy_(0.3 * torch.randn_like(parameter))
    return exits


def learned_policy(kind: str = "calm", **changes: Any) -> Any:
    return classifier_policy(kind, state_mode="learned", **changes)


@pytest.mark.parametrize("kind", ["linear", "lowrank:3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_the_reference(family: str, kind: str) -> None:
    model = tiny_model(family)
    backbone = make_backbone(model, max_length=256)
    exits = exits_for(family, kind, backbone)
    policy = separated_policy(model, learned_policy("mamba"), PROMPTS[0], classifiers=exits)
    expected = [reference_generate(model, policy, prompt, NEW_TOKENS, exits) for prompt in PROMPTS[:3]]
    assert is_separated(*(row for _, row in expected))
    engine = Engine(backbone, exits)
    others = [policy, replace(policy, state_mode="recompute"), policy, replace(policy, state_mode="skip"), policy]
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[1], PROMPTS[0], PROMPTS[2]]
    results = run_generate(engine, others, prompts, max_rows=3)
    for (tokens, row), result in zip(expected, [results[0], results[2], results[4]], strict=True):
        assert result.tokens == tokens
        assert list(result.trace.exit_layers) == row.layers[result.trace.prompt_tokens :]
    assert {layer for _, row in expected for layer in row.layers} > {LAYERS}
    waiting = run_generate(engine, others, prompts, max_rows=2, rows_in_flight=5)
    assert [result.tokens for result in waiting] == [result.tokens for result in results]


@pytest.mark.parametrize("kind", ["linear", "lowrank:3"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mamba2", "mamba"])
def test_segments_give_the_same(family: str, kind: str) -> None:
    """Rows whose tokens left at several exits, some recomputed and some learned, on places that stay where they are."""
    model = tiny_model(family)
    backbone = make_backbone(model, max_length=256)
    exits = exits_for(family, kind, backbone)
    policy = separated_policy(model, learned_policy(), PROMPTS[0], classifiers=exits)
    policies = [policy, policy, replace(policy, state_mode="recompute"), policy, replace(policy, final_block=True)]
    for rows, in_flight in ((1, None), (5, None), (2, 5)):
        expected = run_generate(Engine(backbone, exits), policies, PROMPTS, rows, in_flight)
        engine = Engine(backbone, exits)
        engine.use_segments(True)
        assert run_generate(engine, policies, PROMPTS, rows, in_flight) == expected
        assert set(passes_of(engine)) <= NOT_ALL
        assert passes_of(engine)["static"] > 0.5 * passes_of(engine).total()
    assert len({layer for result in expected[:4] for layer in result.trace.exit_layers}) > 2, "tokens left at several"


@pytest.mark.parametrize("final_block", [False, True])
@pytest.mark.parametrize("family", ["llama", "mamba2", "gpt_neox"])
def test_scoring_equals_feeding_one_by_one(family: str, final_block: bool) -> None:
    model = tiny_model(family)
    backbone = make_backbone(model, max_length=256)
    exits = exits_for(family, "linear", backbone)
    policy = learned_policy(exit_scope="all", final_block=final_block)
    policy = separated_policy(model, policy, PROMPTS[0], classifiers=exits)
    pairs = [(prompt, random_ids(9, 70 + i)) for i, prompt in enumerate(PROMPTS)]
    for (context, continuation), result in zip(
        pairs, run_score(Engine(backbone, exits), policy, pairs, 3), strict=True
    ):
        expected, row = reference_score(model, policy, context, continuation, exits)
        assert is_separated(row)
        assert [line[0] for line in result.log_probs] == pytest.approx(expected, abs=1e-4)


def test_hooked_blocks_and_blocks_of_the_family_do_as_fused_ones() -> None:
    model = copy.deepcopy(tiny_model("qwen3"))
    exits = exits_for("qwen3", "lowrank:3")
    policy = separated_policy(model, learned_policy(), PROMPTS[0], classifiers=exits)
    backbone = make_backbone(model, max_length=256)
    expected = run_generate(Engine(backbone, exits), [policy] * 3, PROMPTS[:3], 2)
    assert run_generate(Engine(ReplayBackbone(model, 256), exits), [policy] * 3, PROMPTS[:3], 2) == expected
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: None)
    assert run_generate(Engine(make_backbone(model, max_length=256), exits), [policy] * 3, PROMPTS[:3], 2) == expected


def fitted(frozen: FrozenPass, kind: str, rows: list[list[int]]) -> ExitClassifiers:
    count = sum(map(len, rows))
    exits = exits_config(states=state_maps.make_options(frozen, kind)).build().requires_grad_(False)
    state_maps.fit(frozen, exits, lambda: MicroBatches(lambda _, first: iter(rows[first:]), count, 64), 1)
    return exits


@pytest.mark.parametrize("family", ["llama", "mamba2", "gpt_neox"])
def test_maps_are_least_squares(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_maps, "RIDGE", 1e-6)  # inputs of a LayerNorm sum to 0
    rows = [random_ids(50, i) for i in range(4)]
    backbone = make_backbone(tiny_model(family), max_length=256)
    frozen = FrozenPass(backbone, EXITS, False, 1)
    exits = fitted(frozen, "linear", rows)
    maps = exits.maps_by_exit_and_block()
    assert set(maps) == {(layer, block) for layer in EXITS for block in range(layer + 2, LAYERS + 1)}
    for projected in state_maps._projections(frozen, rows):
        y = projected.true.project(projected.true.inputs)
        for layer, own in projected.at_exit.items():
            if (found := maps.get((layer, projected.block))) is None:  # it is given the exit state in any case
                torch.testing.assert_close(own.project(own.inputs), y)
                continue
            extended = torch.cat([own.inputs, torch.ones(len(y), 1)], dim=1).double()
            best = torch.linalg.lstsq(extended, y.double(), rcond=1e-5, driver="gelsd").solution
            torch.testing.assert_close(found(own.inputs, own.project), (extended @ best).float(), rtol=1e-3, atol=2e-3)


def test_moments_that_are_too_large_take_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [random_ids(50, i) for i in range(4)]
    frozen = FrozenPass(make_backbone(tiny_model("llama"), max_length=256), EXITS, False, 1)
    whole = fitted(frozen, "linear", rows).state_dict()
    monkeypatch.setattr(state_maps, "MOMENT_BYTES", 2 * 4 * 33 * (33 + 32))
    passes = state_maps._passes(state_maps.make_options(frozen, "linear"), [(2, 4), (2, 5), (2, 6), (3, 5), (3, 6)])  # type: ignore[arg-type]
    assert passes == [[(2, 4), (2, 5)], [(2, 6), (3, 5)], [(3, 6)]]
    for name, tensor in fitted(frozen, "linear", rows).state_dict().items():
        torch.testing.assert_close(tensor, whole[name])


def test_a_low_rank_map_of_full_rank_is_the_full_one_and_a_lower_one_explains_less() -> None:
    rows = [random_ids(50, i) for i in range(4)]
    frozen = FrozenPass(make_backbone(tiny_model("llama"), max_length=256), EXITS, False, 1)
    by_kind = {
        kind: state_maps.explained(frozen, fitted(frozen, kind, rows), rows)["2"]["4"]
        for kind in ("linear", "lowrank:32", "lowrank:4")
    }
    assert by_kind["linear"]["learned"] == pytest.approx(by_kind["lowrank:32"]["learned"], abs=1e-4)
    assert by_kind["linear"]["learned"] > by_kind["lowrank:4"]["learned"] > by_kind["linear"]["recompute"]
    assert len({measured["recompute"] for measured in by_kind.values()}) == 1


@pytest.mark.parametrize("kind", ["linear", "lowrank:4"])
def test_where_blocks_do_nothing_learned_states_are_the_recomputed_ones(kind: str) -> None:
    model = copy.deepcopy(tiny_model("llama"))
    for layer in model.model.layers[EXITS[0] :]:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    backbone = make_backbone(model, max_length=256)
    frozen = FrozenPass(backbone, EXITS, False, 1)
    exits = fitted(frozen, kind, [random_ids(40, i) for i in range(3)])
    measured = state_maps.explained(frozen, exits, ROWS)
    assert all(r2 == pytest.approx(1) for at in measured.values() for block in at.values() for r2 in block.values())
    policy = dataclasses.replace(learned_policy(), thresholds=(0.2,) * 3)
    engine = Engine(backbone, exits)
    learned, recomputed = (
        run_generate(engine, [replace(policy, state_mode=mode)] * 2, PROMPTS[:2], 2)
        for mode in ("learned", "recompute")
    )
    assert learned == recomputed


def test_macs() -> None:
    backbone = make_backbone(tiny_model("llama"), max_length=256)
    trace = Trace(4, 7, 4, (LAYERS, 2, 4), generated=True)
    recompute = account(trace, classifier_policy("calm").cost_terms(4), backbone.cost)
    for kind, added in (("linear", 0), ("lowrank:3", 3 * (HIDDEN + 2 * 16))):
        exits = exits_for("llama", kind, backbone)
        record = Engine(backbone, exits).account(trace, learned_policy())
        skipped = (LAYERS - 2) + (LAYERS - 4)
        assert record.recompute_macs == recompute.recompute_macs + skipped * added
        assert (
            Engine(backbone, exits).account(trace, classifier_policy("calm")).recompute_macs == recompute.recompute_macs
        )


def test_round_trip_and_the_policy(tmp_path: Path) -> None:
    exits = exits_for("llama", "lowrank:3")
    config = exits_config(states=exits.states)
    checkpoint.save(tmp_path, config, exits)
    opened = ExitCheckpoint.open(tmp_path)
    assert opened.config.states == exits.states
    loaded = opened.load()
    for key, state_map in exits.maps_by_exit_and_block().items():
        assert torch.equal(loaded.maps_by_exit_and_block()[key].weight, state_map.weight)
    assert policy_of(opened.config).state_mode == "learned"
    assert policy_of(opened.config, state_mode="recompute").state_mode == "recompute"
    assert policy_of(exits_config()).state_mode == "recompute"
    # They serve training-free confidences as well.
    assert policy_of(opened.config, confidence="softmax", exits="x").state_mode == "learned"


def test_what_cannot_be_had_is_refused() -> None:
    with pytest.raises(UserError, match="state_mode=learned needs exits with state maps"):
        policy_of(exits_config(), state_mode="learned")
    backbone = make_backbone(tiny_model("llama"), max_length=256)
    without = exits_config().build()
    with pytest.raises(UserError, match=r"state maps at exit_layers \[2, 3, 4\]"):
        Engine(backbone, without).check_policy(learned_policy())
    sizes = ((32, 32),) * LAYERS
    with pytest.raises(UserError, match="the rank must be at most 32"):
        exits_config(states=StateMapOptions("lowrank:33", sizes)).build()
    for kind in ("affine", "lowrank:0", "lowrank:x", "lowrank"):
        with pytest.raises(UserError, match="states must be none, linear or lowrank:R"):
            exits_config(states=StateMapOptions(kind, sizes)).check()
    with pytest.raises(UserError, match=f"no sizes for each of {LAYERS} blocks"):
        exits_config(states=StateMapOptions("linear", ((32, 32),))).check()
