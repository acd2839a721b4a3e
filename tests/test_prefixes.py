"""Shared beginnings: found, run once, and without effect on any result."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import LAYERS, random_ids, tiny_model
from helpers_engine import (
    FULL,
    classifier_policy,
    drained,
    engine_for,
    exits_config,
    separated_policy,
    varied_classifiers,
    with_modes,
)
from reference import reference_generate

from dynamax_lm_eval.backbones import make_backbone
from dynamax_lm_eval.compute.accounting import ExecutedCompute, account
from dynamax_lm_eval.engine import prefixes
from dynamax_lm_eval.engine.engine import Engine, RowStates
from dynamax_lm_eval.engine.generation import generate
from dynamax_lm_eval.engine.prefixes import ROOM_SHARE, PrefixPlan, PrefixRun, find_prefixes
from dynamax_lm_eval.engine.requests import Generation, GenerationRequest, Scoring, ScoringRequest
from dynamax_lm_eval.engine.sampling import Sampler
from dynamax_lm_eval.engine.scoring import score
from dynamax_lm_eval.exits.policy import ExitPolicy

PREAMBLE = random_ids(20, 1)
CONTEXTS = [PREAMBLE + random_ids(9, 2), PREAMBLE + random_ids(12, 3), random_ids(15, 4)]
#: Two documents after one preamble with three endings each, a third document on its own, and two equal ones.
PROMPTS = [context + random_ids(n + 1, 10 * i + n) for i, context in enumerate(CONTEXTS) for n in range(3)]
PROMPTS += [[*PREAMBLE, 5], [*PREAMBLE, 5], random_ids(3, 99)]
SCOPES = ("generated", "all")


@pytest.fixture(autouse=True)
def short_prefixes_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "MIN_SAVED_TOKENS", 1)


def plan_of(prompts: Sequence[Sequence[int]], policy: ExitPolicy = FULL) -> PrefixPlan:
    return find_prefixes([(prompt, len(prompt), policy) for prompt in prompts], list(map(len, prompts)))


def run_generations(
    engine: Engine, policy: ExitPolicy, max_rows: int, share: bool = True
) -> tuple[list[Generation], list[PrefixRun]]:
    requests = [GenerationRequest(prompt, 6, policy, Sampler(), lambda _: False) for prompt in PROMPTS]
    return drained(generate(engine, requests, max_rows, share), len(PROMPTS))


def run_scorings(
    engine: Engine, policy: ExitPolicy, max_rows: int, share: bool = True
) -> tuple[list[Scoring], list[PrefixRun]]:
    requests = [
        ScoringRequest([*prompt, *(ending := random_ids(4, i))[:-1]], len(prompt), [[t] for t in ending], policy)
        for i, prompt in enumerate(PROMPTS)
    ]
    return drained(score(engine, requests, max_rows, None, share), len(PROMPTS))


def assert_same(shared: Sequence[Any], apart: Sequence[Any]) -> None:
    for mine, theirs in zip(shared, apart, strict=True):
        assert mine.trace == theirs.trace
        assert theirs.shared_tokens == 0
        if isinstance(mine, Generation):
            assert mine.tokens == theirs.tokens
        else:
            assert mine.greedy_tokens == theirs.greedy_tokens
            flat = [value for line in theirs.log_probs for value in line]
            assert [value for line in mine.log_probs for value in line] == pytest.approx(flat, abs=1e-4)


class TestFinding:
    def test_prefixes_nest(self) -> None:
        plan = plan_of(PROMPTS)
        lengths = sorted(len(prefix.ids) for prefix in plan.all)
        assert lengths == [15, 20, 29, 32]
        outer = next(prefix for prefix in plan.all if len(prefix.ids) == 20)
        assert outer.ids == PREAMBLE
        assert [prefix.parent for prefix in plan.all if len(prefix.ids) in (29, 32)] == [outer, outer]
        assert plan.prefix_of[-1] is None

    def test_what_is_found_is_what_the_prompts_begin_with(self) -> None:
        """Against every pair of random prompts over a small vocabulary."""
        prompts = [[token % 3 for token in random_ids(n % 9 + 1, n)] for n in range(60)]
        plan = plan_of(prompts)
        assert sorted(plan.order) == list(range(60))
        for prompt, prefix in zip(prompts, plan.prefix_of, strict=True):
            others = [other for other in prompts if other is not prompt]
            lengths = [
                next((i for i, (a, b) in enumerate(zip(prompt[:-1], other[:-1], strict=False)) if a != b), None)
                for other in others
            ]
            shared = max(
                min(len(prompt), len(other)) - 1 if length is None else length
                for length, other in zip(lengths, others, strict=True)
            )
            assert (len(prefix.ids) if prefix is not None else 0) == shared
            while prefix is not None:
                assert prompt[: len(prefix.ids)] == prefix.ids
                prefix = prefix.parent
        for prefix in plan.all:
            inside = {i for i, prompt in enumerate(prompts) if prompt[:-1][: prefix.length] == prefix.ids}
            assert set(plan.order[prefix.end - len(inside) : prefix.end]) == inside
            assert prefix.depth == (0 if prefix.parent is None else prefix.parent.depth + 1)

    def test_requests_with_a_common_prefix_stand_side_by_side(self) -> None:
        plan = plan_of(PROMPTS)
        groups = [plan.prefix_of[i] for i in plan.order]
        assert len(list(itertools.groupby(groups, id))) == len(set(map(id, groups)))

    def test_small_savings_are_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(prefixes, "MIN_SAVED_TOKENS", 40)
        assert [len(prefix.ids) for prefix in plan_of(PROMPTS).all] == [20]

    def test_the_last_prompt_token_is_never_shared(self) -> None:
        """Its logits give the first token."""
        (prefix,) = plan_of([[1, 2, 3], [1, 2, 3]]).all
        assert prefix.ids == [1, 2]

    @pytest.mark.parametrize(
        ("changes", "tokens"),
        [
            ({}, 19),
            ({"classifier": "mamba", "classifier_warmup": 4}, 16),
            ({"classifier": "hybrid", "classifier_warmup": 4}, 16),
            ({"classifier": "mamba", "classifier_warmup": 99}, 0),
            ({"classifier": "mamba", "classifier_warmup": 4, "exit_scope": "all"}, 19),
            ({"classifier": "ffn", "exit_scope": "all", "threshold_decay": 4.0}, 0),
            ({"classifier": "ffn", "threshold_decay": 4.0}, 19),
        ],
    )
    def test_only_what_all_would_have_is_shared(self, changes: dict[str, Any], tokens: int) -> None:
        policy = replace(ExitPolicy(LAYERS, (2, 4), (0.5, 0.5), confidence="classifier", classifier="calm"), **changes)
        assert policy.shareable_tokens(20) == tokens

    def test_policies_share_where_prompts_cannot_exit(self) -> None:
        early = ExitPolicy(LAYERS, (2,), (0.5,))
        prompts: Any = [(PREAMBLE, 20, early), (PREAMBLE, 20, FULL), (PREAMBLE, 20, replace(early, state_mode="skip"))]
        assert len(find_prefixes(prompts, [20] * 3).all) == 1
        other: Any = [(ids, n, replace(policy, pruned_blocks=frozenset({4}))) for ids, n, policy in prompts[:1]]
        assert len(find_prefixes(prompts[1:2] + other, [20] * 2).all) == 0
        everywhere: Any = [(ids, n, replace(policy, exit_scope="all")) for ids, n, policy in prompts]
        assert len(find_prefixes(everywhere, [20] * 3).all) == 0


@pytest.mark.parametrize("run", [run_generations, run_scorings])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("family", "mode"),
    [("llama", "recompute"), ("llama", "copy"), ("mistral", "skip"), ("mamba2", "recompute"), ("mamba", "skip")],
)
def test_sharing_changes_no_result(family: str, mode: Any, scope: Any, run: Any) -> None:
    policy = ExitPolicy(LAYERS, (2, 3, 5), (0.5,) * 3, state_mode=mode, exit_scope=scope)
    policy = separated_policy(tiny_model(family), policy, PROMPTS[0])
    engine = engine_for(family, torch.float64)  # no decision hangs on rounding
    apart, none = run(engine, policy, 3, False)
    assert none == []
    assert min(layer for result in apart for layer in result.trace.exit_layers) < LAYERS
    for max_rows in (1, 4, 12):
        shared, runs = run(engine, policy, max_rows)
        assert_same(shared, apart)
        assert len(runs) == 4
        assert [result.shared_tokens for result in shared[:3]] == [29] * 3


@pytest.mark.parametrize("run", [run_generations, run_scorings])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_recurrent_classifiers_go_on_from_shared_states(family: str, scope: Any, run: Any) -> None:
    model = tiny_model(family, torch.float64)
    classifiers = varied_classifiers(exits_config(model))
    policy = classifier_policy("mamba", exit_scope=scope, classifier_warmup=4)
    policy = separated_policy(tiny_model(family), policy, PROMPTS[0], classifiers=classifiers)
    engine = Engine(make_backbone(model, max_length=256), classifiers)
    apart, _ = run(engine, policy, 3, False)
    shared, runs = run(engine, policy, 4)
    assert_same(shared, apart)
    assert runs


@pytest.mark.parametrize("pruned", [(), (4,)])
@pytest.mark.parametrize("run", [run_generations, run_scorings])
def test_prefixes_whose_tokens_leave_and_come_back_for_the_last_block(run: Any, pruned: tuple[int, ...]) -> None:
    policy = ExitPolicy(LAYERS, (2, 3), (0.5,) * 2, exit_scope="all", final_block=True, pruned_blocks=frozenset(pruned))
    policy = separated_policy(tiny_model("llama"), policy, PROMPTS[0])
    engine = engine_for("llama", torch.float64)
    apart, _ = run(engine, policy, 3, False)
    shared, runs = run(engine, policy, 4)
    assert_same(shared, apart)
    assert runs


@pytest.mark.parametrize(
    ("pruned", "final_block"),
    [
        pytest.param((6,), False, marks=pytest.mark.slow),
        ((6,), True),
        pytest.param((1,), False, marks=pytest.mark.slow),
        ((3, 4, 6), False),
    ],
)
@with_modes("llama", "phi3", "mamba2")
def test_prefixes_whose_tokens_leave_before_pruned_blocks(
    family: str, mode: Any, pruned: tuple[int, ...], final_block: bool
) -> None:
    """Alone, in one batch, and by the reference, with blocks pruned that states of a shared beginning are owed to."""
    changes: dict[str, Any] = {"state_mode": mode, "final_block": final_block, "pruned_blocks": frozenset(pruned)}
    policy = ExitPolicy(LAYERS, (2,), (0.5,), exit_scope="all", **changes)
    policy = separated_policy(tiny_model(family), policy, PROMPTS[0], 0.2)
    engine = engine_for(family, torch.float64)
    for run in (run_generations, run_scorings):
        apart, _ = run(engine, policy, 1, False)
        shared, runs = run(engine, policy, 4)
        assert_same(shared, apart)
        assert min(layer for ran in runs for layer in ran.trace.exit_layers) < LAYERS, "a shared token left"
    found = run_generations(engine, policy, 4)[0][0]
    tokens, row = reference_generate(tiny_model(family, torch.float64), policy, PROMPTS[0], 6)
    assert (found.tokens, list(found.trace.exit_layers)) == (tokens, row.layers[1:])


@pytest.mark.parametrize("max_rows", [1, 3])
@pytest.mark.parametrize("run", [run_generations, run_scorings])
def test_prefixes_without_room_run_again(monkeypatch: pytest.MonkeyPatch, run: Any, max_rows: int) -> None:
    engine = engine_for("llama")
    apart, _ = run(engine, FULL, max_rows, False)
    times = []
    for room in (32, 29, 20, 0):
        monkeypatch.setattr(PrefixPlan, "room", room)
        shared, runs = run(engine, FULL, max_rows)
        assert_same(shared, apart)
        times.append(len(runs))
    assert times[0] == 4
    assert times == sorted(times)
    assert times[-1] > 4


def growing(count: int, step: int) -> list[list[int]]:
    """Prompts that each extend the one before, as the turns of a conversation do."""
    text = random_ids(7 + step * count, 5)
    return [text[: 7 + step * n] for n in range(1, count + 1)]


def branching(depth: int) -> list[list[int]]:
    """A chain of preambles; with each of them go two short questions, as well as the longer preambles."""
    chain = growing(depth, 3)
    return [[*preamble, *random_ids(2, 7 * n + k)] for n, preamble in enumerate(chain) for k in range(2)]


TREES: dict[str, list[list[int]]] = {
    "chain-20": growing(20, 3),
    "chain-300": growing(300, 1),
    "branching-20": branching(20),
    "flat": [[*PREAMBLE, *random_ids(n % 5 + 1, 200 + n)] for n in range(30)],
    "bushy": [PREAMBLE[:8] + random_ids(4, n) + random_ids(5, n + k) for n in range(9) for k in (20, 30, 40)],
}


class TestMemory:
    """What is kept for later rows takes at most a share of the room of the rows, however deep prefixes nest."""

    @pytest.fixture
    def most(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
        """FreeList that was reserved, and how many prefixes were kept at a time."""
        seen = {"rows": 0, "kept": 0, "at a time": 0}
        make, keep = Engine.new_states, RowStates.keep
        open_now: set[int] = set()

        def new_states(engine: Engine, capacity: int, prefix_capacity: int = 0, row_stride: int | None = None) -> Any:
            seen.update({"rows": capacity, "kept": prefix_capacity})
            open_now.clear()
            return make(engine, capacity, prefix_capacity, row_stride)

        def kept(states: RowStates, slot: int, num_tokens: int) -> bool:
            open_now.add(num_tokens)
            seen["at a time"] = max(seen["at a time"], len(open_now))
            return keep(states, slot, num_tokens)

        forget = RowStates.forget
        monkeypatch.setattr(Engine, "new_states", new_states)
        monkeypatch.setattr(RowStates, "keep", kept)
        monkeypatch.setattr(
            RowStates,
            "forget",
            lambda states, n: (open_now.remove(n), forget(states, n)),  # type: ignore[func-returns-value]
        )
        return seen

    @pytest.mark.parametrize("family", ["llama", "mamba2"])
    @pytest.mark.parametrize("tree", [*TREES, pytest.param("chain-2000", marks=pytest.mark.slow)])
    def test_is_bounded(self, most: dict[str, int], tree: str, family: str) -> None:
        prompts = TREES[tree] if tree in TREES else growing(2000, 1)
        is_long = len(prompts) > 100
        if is_long and family != "llama":
            pytest.skip("slow, and shows nothing more")
        engine = engine_for(family, torch.float64)
        for max_rows in (4,) if is_long else (1, 4):
            requests = [GenerationRequest(prompt, 2, FULL, Sampler(), lambda _: False) for prompt in prompts]
            results, runs = drained(generate(engine, requests, max_rows), len(prompts))
            assert most["kept"] <= (ROOM_SHARE if max_rows > 1 else 1) * most["rows"]
            assert most["at a time"] <= math.log2(len(prompts)) + 1
            checked = requests[:: len(requests) // 20]
            apart, _ = drained(generate(engine, checked, 32, False), len(checked))
            assert_same(results[:: len(requests) // 20], apart)
            # Every token of the trie's inner nodes ran once.
            assert sum(ran.trace.fed_tokens for ran in runs) == sum(len(p.ids) for p in plan_of(prompts).all)

    def test_of_very_long_chains_needs_no_recursion(self) -> None:
        plan = plan_of(growing(2000, 1))
        assert len(plan.all) == 1999
        assert plan.room == 7 + 1998
        assert plan.all[-1].depth == 1998
        assert plan.order == [*range(1998), 1999, 1998]


@pytest.mark.parametrize("run", [run_generations, run_scorings])
@pytest.mark.parametrize("scope", SCOPES)
def test_what_ran_is_counted_apart(scope: Any, run: Any) -> None:
    """Tokens against those that reached the first block, MACs against the sum of what each request takes alone."""
    model = tiny_model("llama")
    policy = ExitPolicy(LAYERS, (2, 3, 5), (0.5,) * 3, exit_scope=scope)
    policy = separated_policy(model, policy, PROMPTS[0])
    engine = engine_for("llama")
    cost = engine.backbone.cost
    fed: list[int] = []
    hook = model.model.layers[0].mlp.register_forward_hook(lambda _, args, __: fed.append(args[0].shape[-2]))
    try:
        results, runs = run(engine, policy, 4)
    finally:
        hook.remove()
    physical, alone, saved = ExecutedCompute(), 0, 0
    for result in results:
        record = account(result.trace, policy.cost_terms(result.trace.prompt_tokens), cost)
        physical.add_row(record)
        alone += record.total_macs
    assert physical.macs == alone
    for ran in runs:
        physical.add_prefix(account(ran.trace, ran.policy.cost_terms(ran.trace.prompt_tokens), cost), ran.uses)
        saved += (ran.uses - 1) * ran.trace.fed_tokens
    assert physical.fed_tokens == sum(fed) == sum(result.trace.fed_tokens for result in results) - saved
    assert saved > 0
    assert physical.macs < alone
