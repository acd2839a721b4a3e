"""Arguments become a policy for a number of blocks and the exits at hand, or are refused."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import LAYERS
from helpers_engine import EXITS, exits_config, policy_of

from dynamax_lm_eval.config import DynamaxArgs
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.resolve import (
    default_exit_layers,
    resolve_exit_layers,
    resolve_policy,
    resolve_pruned_blocks,
    resolve_thresholds,
)
from dynamax_lm_eval.sweep.command import _resolve
from dynamax_lm_eval.sweep.grid import Point
from dynamax_lm_eval.sweep.options import SweepOptions


def test_default_exits_of_the_paper() -> None:
    assert default_exit_layers(32) == (16, 20, 24, 28)
    assert default_exit_layers(30) == (15, 18, 22, 26)
    assert default_exit_layers(64) == (32, 40, 48, 56)
    assert default_exit_layers(2) == (1,)
    assert default_exit_layers(1) == ()
    for depth in range(1, 70):
        expected = {math.floor(depth / 2 + i * depth / 8) for i in range(4)} - {0, depth}
        assert default_exit_layers(depth) == tuple(sorted(expected))


def test_pruning_disables_blocks_before_the_last() -> None:
    assert resolve_pruned_blocks(0, 30) == frozenset()
    assert resolve_pruned_blocks(2, 30) == {28, 29}
    assert resolve_pruned_blocks((20, 30), 30) == {20, 30}
    with pytest.raises(UserError, match="prune_layers=99 must be at most 28"):
        resolve_pruned_blocks(99, 30)
    with pytest.raises(UserError, match="block 31"):
        resolve_pruned_blocks((31,), 30)
    with pytest.raises(UserError, match="all 2 blocks"):
        resolve_pruned_blocks((1, 2), 2)


def test_exits_and_thresholds_must_fit_the_depth() -> None:
    with pytest.raises(UserError, match=r"1\.\.29 for this backbone of 30 blocks, got 30"):
        resolve_exit_layers((10, 30), 30)
    with pytest.raises(UserError, match="threshold has 2 values but there are 3 exit layers"):
        resolve_thresholds((0.5, 0.6), (1, 2, 3))
    assert resolve_thresholds((0.5,), (1, 2)) == (0.5, 0.5)


def test_a_policy_follows_the_exits_at_hand() -> None:
    trained = exits_config(final_block=True)
    policy = policy_of(trained, threshold=(0.7,))
    assert (policy.confidence, policy.classifier) == ("classifier", "mamba")
    assert policy.exit_layers == EXITS
    assert policy.final_block
    assert policy_of(trained, classifier="calm", exit_layers=(3,)).exit_layers == (3,)
    assert policy_of(trained, classifier="hybrid", classifier_warmup=4).classifier_warmup == 4
    assert policy_of(trained, confidence="softmax").classifier is None
    assert policy_of(None).confidence == "softmax"
    assert policy_of(trained, preset="paper", final_block=True).state_mode == "copy"
    # The reference point of a sweep needs no exits, whatever its other points use.
    assert policy_of(None, classifier="calm", threshold=(1.0,)).active_exits == ()
    assert policy_of(trained, threshold=(1.0, 1.0, 1.0)).exit_layers == EXITS


@pytest.mark.parametrize(
    ("exits", "args", "message"),
    [
        (None, {"confidence": "classifier"}, "needs exits that were trained for this backbone"),
        (None, {"classifier": "calm"}, "classifier needs confidence=classifier"),
        ({}, {"confidence": "softmax", "exits": "x"}, "exits='x' has no effect with confidence=softmax"),
        ({}, {"confidence": "softmax", "classifier": "calm"}, "classifier needs confidence=classifier"),
        ({"classifiers": ("ffn",)}, {"classifier": "calm"}, "not among the trained exits, which have ffn"),
        ({}, {"classifier": "calm", "classifier_warmup": 4}, "carries no state"),
        ({}, {"classifier_warmup": 4, "exit_scope": "all"}, "classifier_warmup has no effect with exit_scope=all"),
        ({}, {"exit_layers": (2, 5)}, r"exit_layers \[5\] have no trained classifier"),
        ({}, {"final_block": True}, "trained with final_block=false"),
        ({}, {"preset": "paper", "final_block": True}, "preset=paper sets final_block=true"),
        (None, {"final_block": True, "exit_layers": (5,)}, r"must lie in 1\.\.4 .* with final_block, got 5"),
    ],
)
def test_policies_that_do_not_fit_the_exits_are_refused(exits: Any, args: dict[str, Any], message: str) -> None:
    config = None if exits is None else exits_config(**exits)
    with pytest.raises(UserError, match=message):
        resolve_policy(DynamaxArgs("x", **args), LAYERS, config)


def test_learned_states_of_confidences_that_look_up_no_exits() -> None:
    args = DynamaxArgs(backbone="b", confidence="entropy", state_mode="learned")
    with pytest.raises(UserError, match=r"uses trained exits .* only where they are named; add exits=FOLDER"):
        resolve_policy(args, 6)


def test_a_sweep_names_the_exits_at_hand() -> None:
    args = DynamaxArgs(backbone="b", confidence="entropy", state_mode="learned")
    lm: Any = SimpleNamespace(exits=SimpleNamespace(path="some/exits"), use_policy=lambda args: resolve_policy(args, 6))
    options = SweepOptions("b", "t", "o")
    with pytest.raises(UserError, match=r"point p: .*; here: --model_args exits=some/exits"):
        _resolve(lm, [Point("p", "exits", "s", 0.5, args)], options)


def test_what_was_left_out_is_noted_and_decides_nothing() -> None:
    policy = policy_of(None, prune_layers=(3,))
    assert policy.notes == ("default exits [3] end with pruned blocks and are left out; exits are at [4, 5]",)
    plain = replace(policy, notes=())
    assert (plain, hash(plain), plain.describe()) == (policy, hash(policy), policy.describe())
    assert "notes" not in policy.describe()
    assert policy_of(None, prune_layers=(3,), threshold=(1.0,)).notes == ()
