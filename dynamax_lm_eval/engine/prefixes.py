"""Common beginnings of requests: found before anything runs, run once, and copied into every row that has them.

A few-shot preamble, a system prompt, or the context that a document's choices share is a prefix; prefixes nest.
Rows stay independent of one another: what they begin with is their own copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dynamax_lm_eval.compute.ledger import Trace
from dynamax_lm_eval.engine.batch import FlatBatch, RowInput
from dynamax_lm_eval.engine.engine import Engine, NoLogits, RowStates
from dynamax_lm_eval.engine.errors import naming_request
from dynamax_lm_eval.exits.policy import ExitPolicy

#: A prefix is run on its own where that saves at least so many tokens; below, another pass costs more.
MIN_SAVED_TOKENS = 64
#: Room that is reserved for prefixes beside their longest chain, as a share of the rows': enough for the prefixes of a
#: batch whose rows share theirs in pairs.
ROOM_SHARE = 0.5


@dataclass(eq=False)
class Prefix:
    """A beginning that several requests share.

    Attributes:
        ids: all of its tokens, those of ``parent`` included.
        policy: what decides the states of its tokens.
        parent: the longest shorter prefix that it begins with.
        users: requests and longer prefixes that have not yet taken their copy.
        uses: how many took one.
        slot: its row in the states, once it has run.
        layers: of its tokens that may exit, the number of blocks that ran, once it has run.
        given_up: there was no room for it; its users begin with ``parent``.
    """

    ids: Sequence[int]
    policy: ExitPolicy
    parent: Prefix | None
    users: int = 0
    uses: int = 0
    slot: int | None = None
    layers: tuple[int, ...] = ()
    given_up: bool = False

    @property
    def depth(self) -> int:
        """How many prefixes it begins with."""
        return 0 if self.parent is None else self.parent.depth + 1


@dataclass(frozen=True)
class Beginning:
    """What a row begins with: so many tokens have run, and those of them that may exit ran so many blocks."""

    tokens: int = 0
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class PrefixRun:
    """A prefix that ran, accounted as a whole, and how many rows and longer prefixes took a copy of it."""

    policy: ExitPolicy
    trace: Trace
    uses: int


@dataclass
class PrefixPlan:
    """The prefixes of some requests.

    Attributes:
        prefix_of: each request's longest prefix, or None.
        order: the requests, those with a common prefix side by side, the longest first.
    """

    prefix_of: list[Prefix | None]
    order: list[int]
    all: list[Prefix] = field(default_factory=list)

    def shared_tokens(self, request: int) -> int:
        """How many of a request's tokens a prefix runs for it."""
        prefix = _not_given_up(self.prefix_of[request])
        return 0 if prefix is None else len(prefix.ids)

    def room(self, rows: int) -> int:
        """Tokens to reserve for prefixes beside ``rows`` tokens for rows. Prefixes that find no room are given up."""
        chains: dict[int, int] = {}
        for prefix in self.all:  # parents come first
            before = chains[id(prefix.parent)] if prefix.parent is not None else 0
            chains[id(prefix)] = before + len(prefix.ids)
        everything = sum(len(prefix.ids) for prefix in self.all)
        return min(everything, int(ROOM_SHARE * rows) + max(chains.values(), default=0))


def find_prefixes(
    prompts: Sequence[tuple[Sequence[int], int, ExitPolicy]], needs: Sequence[int], share: bool = True
) -> PrefixPlan:
    """Finds what requests begin with in common.

    Args:
        prompts: each request's token ids, how many of them are its prompt, and its policy.
        needs: tokens that each may have in all; the order puts the longest first.
        share: False finds nothing.
    """
    longest_first = sorted(range(len(prompts)), key=lambda i: (-needs[i], i))
    plan = PrefixPlan([None] * len(prompts), longest_first)
    if not share or len(prompts) < 2:
        return plan
    policies: dict[ExitPolicy, int] = {}
    keys: list[tuple[int, bytes]] = []
    for ids, prompt_length, policy in prompts:
        shareable = ids[: policy.shareable_tokens(prompt_length)]
        number = policies.setdefault(policy.for_prefixes(), len(policies))
        # Big-endian words compare as the lists would, at the speed of memcmp.
        keys.append((number, np.asarray(shareable, dtype=">u4").tobytes()))
    ranked = sorted(range(len(keys)), key=keys.__getitem__)
    common = [0, *(_common(keys[a], keys[b]) for a, b in itertools.pairwise(ranked))]

    # Where each request stands among those that share its prefixes: outer prefixes decide first.
    place: list[tuple[tuple[int, int], ...]] = [() for _ in prompts]
    kept: list[tuple[int, int, Prefix]] = []  # (first rank, last rank, prefix), all around the present one
    for first, last, length in _intervals(common):
        while kept and kept[-1][1] < first:
            kept.pop()
        parent = kept[-1][2] if kept else None
        if (last - first) * (length - (len(parent.ids) if parent is not None else 0)) < MIN_SAVED_TOKENS:
            continue
        members = ranked[first : last + 1]
        ids, _, policy = prompts[members[0]]
        prefix = Prefix(ids[:length], policy.for_prefixes(), parent)
        if parent is not None:
            parent.users += 1
        kept.append((first, last, prefix))
        plan.all.append(prefix)
        rank = (-max(needs[i] for i in members), first)
        for i in members:
            plan.prefix_of[i] = prefix
            place[i] += (rank,)
    for found in plan.prefix_of:
        if found is not None:
            found.users += 1
    plan.order.sort(key=lambda i: (*place[i], (-needs[i], i)))
    return plan


def _common(a: tuple[int, bytes], b: tuple[int, bytes]) -> int:
    """Tokens that two keys have in common from the beginning."""
    if a[0] != b[0]:
        return 0
    length = min(len(a[1]), len(b[1]))
    x, y = (np.frombuffer(key[1], dtype=np.uint32, count=length // 4) for key in (a, b))
    differ = np.flatnonzero(x != y)
    return int(differ[0]) if len(differ) else length // 4


def _intervals(common: Sequence[int]) -> list[tuple[int, int, int]]:
    """All maximal runs (first, last, length) of sorted keys with ``length`` > 0 tokens in common, outer ones first.

    ``common[i]`` is what keys i - 1 and i have in common. The runs are the inner nodes of the keys' trie, found
    with a stack (Abouelhoda, Kurtz and Ohlebusch 2004, algorithm 4.1).
    """
    found: list[tuple[int, int, int]] = []
    stack: list[tuple[int, int]] = []  # (length, first)
    for i, length in enumerate([*common[1:], 0], start=1):
        first = i - 1
        while stack and stack[-1][0] > length:
            inner, first = stack.pop()
            found.append((first, i - 1, inner))
        if length and (not stack or stack[-1][0] < length):
            stack.append((length, first))
    return sorted(found, key=lambda run: (run[0], -run[1], run[2]))


class PrefixStore:
    """Runs prefixes when they are first needed, and closes them after their last use."""

    def __init__(self, engine: Engine, states: RowStates, plan: PrefixPlan, tokens_per_pass: int) -> None:
        self._engine = engine
        self._states = states
        self.plan = plan
        self._tokens_per_pass = tokens_per_pass
        self._ran: list[Prefix] = []

    @property
    def runs(self) -> list[PrefixRun]:
        """What has run so far, in order."""
        return [
            PrefixRun(
                prefix.policy,
                Trace(
                    prompt_tokens=len(prefix.ids) + 1,
                    fed_tokens=len(prefix.ids),
                    tokens_given=0,
                    exit_layers=prefix.layers,
                    generated=False,
                ),
                prefix.uses,
            )
            for prefix in self._ran
        ]

    def prepare(self, requests: Sequence[int]) -> None:
        """Runs the prefixes of these requests that have not run yet, parents before those that begin with them."""
        needed: list[Prefix] = []
        for i in requests:
            prefix = self.plan.prefix_of[i]
            while prefix is not None and prefix.slot is None and not prefix.given_up:
                if prefix not in needed:
                    needed.append(prefix)
                prefix = prefix.parent
        for depth in sorted({prefix.depth for prefix in needed}):
            batch: list[Prefix] = []
            for prefix in needed:
                if prefix.depth == depth:
                    if batch and sum(len(p.ids) for p in (*batch, prefix)) > self._tokens_per_pass:
                        self._run(batch, requests)
                        batch = []
                    batch.append(prefix)
            self._run(batch, requests)

    def begin(self, request: int, slot: int) -> Beginning:
        """Copies what the request begins with into its row; its prefix has one user less."""
        return self._copy(self.plan.prefix_of[request], slot)

    def _copy(self, prefix: Prefix | None, slot: int) -> Beginning:
        prefix = _not_given_up(prefix)
        if prefix is None:
            return Beginning()
        assert prefix.slot is not None
        beginning = Beginning(len(prefix.ids), prefix.layers)
        self._states.copy_row(prefix.slot, slot, len(prefix.ids))
        prefix.users -= 1
        prefix.uses += 1
        if prefix.users == 0:
            self._states.close_row(prefix.slot)
        return beginning

    def _run(self, prefixes: Sequence[Prefix], requests: Sequence[int]) -> None:
        """Runs prefixes that ``requests`` begin with."""
        opened: list[tuple[Prefix, int, Beginning]] = []
        for prefix in prefixes:
            slot = self._states.open_prefix(len(prefix.ids))
            if slot is None:
                self._give_up(prefix)
            else:
                opened.append((prefix, slot, self._copy(prefix.parent, slot)))
                prefix.slot = slot
        if not opened:
            return
        rows = [
            RowInput(
                ids=prefix.ids[beginning.tokens :],
                first_position=beginning.tokens,
                slot=slot,
                prompt_length=len(prefix.ids) + 1,
                max_steps=1,
                policy=prefix.policy,
            )
            for prefix, slot, beginning in opened
        ]
        batch = FlatBatch.build(rows)
        with naming_request([self._first_of(prefix, requests) for prefix, _, _ in opened]):
            layers = self._engine.forward(batch, self._states, NoLogits(), eager=True)
        for (prefix, _, beginning), chosen in zip(opened, batch.by_row(layers), strict=True):
            prefix.layers = (*beginning.layers, *chosen)
            self._ran.append(prefix)

    def _first_of(self, prefix: Prefix, requests: Sequence[int]) -> int:
        """The first of ``requests`` that begins with a prefix."""
        for i in requests:
            own = self.plan.prefix_of[i]
            while own is not None:
                if own is prefix:
                    return i
                own = own.parent
        raise AssertionError("a prefix runs for one that begins with it")

    def _give_up(self, prefix: Prefix) -> None:
        """Its users become its parent's, which loses one."""
        prefix.given_up = True
        if (parent := _not_given_up(prefix.parent)) is not None:
            parent.users += prefix.users - 1


def _not_given_up(prefix: Prefix | None) -> Prefix | None:
    while prefix is not None and prefix.given_up:
        prefix = prefix.parent
    return prefix
