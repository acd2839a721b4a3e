"""Shared prefixes of requests: found before anything runs, run once, and copied into every row that has them.

A few-shot preamble, a system prompt, or the context that a document's choices share is a prefix; prefixes nest.
Rows stay independent of one another: each has its own copy of its prefix.

A prefix runs in the row of the first request that begins with it, and the others of the batch copy it from there, so
states are kept beside the rows only where later requests need them. Those are always prefixes of the next request,
which take no more memory than the longest of them, however deep prefixes nest.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dynamax_lm_eval.compute.trace import Trace, if_any
from dynamax_lm_eval.engine.batch import FlatBatch, RowInput
from dynamax_lm_eval.engine.decisions import NoLogits
from dynamax_lm_eval.engine.engine import Engine, RowStates
from dynamax_lm_eval.errors import naming_request
from dynamax_lm_eval.exits.policy import ExitPolicy

#: A prefix is run on its own where that saves at least so many tokens; below, another pass costs more.
MIN_SAVED_TOKENS = 64
#: States that are kept for later rows take at most this share of the memory of two rows or more, and of one row all.
ROOM_SHARE = 0.5


@dataclass(eq=False)
class Prefix:
    """A prefix that several requests share.

    Attributes:
        source: a prompt that begins with it.
        length: number of its tokens, those of ``parent`` included.
        policy: what decides the states of its tokens.
        parent: the longest shorter prefix that it begins with.
        depth: number of shorter prefixes that it begins with.
        end: one more than the index, in the plan's order, of the last request that begins with it.
    """

    source: Sequence[int]
    length: int
    policy: ExitPolicy
    parent: Prefix | None = field(repr=False)
    depth: int
    end: int = 0

    @property
    def ids(self) -> Sequence[int]:
        """The token ids, those of ``parent`` included."""
        return self.source[: self.length]


@dataclass(frozen=True)
class SharedPrefix:
    """The prefix that a row has a copy of: its length, and how its tokens ran that may exit, as traces have it."""

    tokens: int = 0
    layers: tuple[int, ...] = ()
    refused: tuple[int, ...] = ()


@dataclass(frozen=True)
class PrefixRun:
    """A prefix that ran, with the trace of all of it, and how many rows and longer prefixes copied it."""

    policy: ExitPolicy
    trace: Trace
    uses: int


@dataclass
class PrefixPlan:
    """The shared prefixes of some requests, and the order in which to run these.

    Attributes:
        prefix_of: each request's longest prefix, or None.
        order: the requests, those with a common prefix side by side, else the longest first.
        all: the prefixes, parents first.
    """

    prefix_of: list[Prefix | None]
    order: list[int]
    all: list[Prefix] = field(default_factory=list)

    def shared_tokens(self, request: int) -> int:
        """Returns how many of a request's tokens run in a shared prefix."""
        prefix = self.prefix_of[request]
        return 0 if prefix is None else prefix.length

    @property
    def room(self) -> int:
        """The number of tokens whose states may have to be kept beside the rows."""
        return max((prefix.length for prefix in self.all), default=0)


def find_prefixes(
    prompts: Sequence[tuple[Sequence[int], int, ExitPolicy]], needs: Sequence[int], share: bool = True
) -> PrefixPlan:
    """Finds the prefixes that requests share.

    Args:
        prompts: each request's token ids, how many of them are its prompt, and its policy.
        needs: the most tokens that each may have in all; the order puts the longest first.
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

    enclosing: list[tuple[int, Prefix]] = []  # (last rank, prefix), outer ones first
    for first, last, length in _intervals(common):
        while enclosing and enclosing[-1][0] < first:
            enclosing.pop()
        parent = enclosing[-1][1] if enclosing else None
        if (last - first) * (length - (parent.length if parent is not None else 0)) < MIN_SAVED_TOKENS:
            continue
        ids, _, policy = prompts[ranked[first]]
        prefix = Prefix(ids, length, policy.for_prefixes(), parent, 0 if parent is None else parent.depth + 1)
        enclosing.append((last, prefix))
        plan.all.append(prefix)
        for i in ranked[first : last + 1]:
            plan.prefix_of[i] = prefix  # inner ones come later
    plan.order = _order(plan, needs)
    return plan


def _order(plan: PrefixPlan, needs: Sequence[int]) -> list[int]:
    """Returns the requests, the longest first and those of a prefix side by side; sets ``end`` of the prefixes.

    Of the items inside a prefix, that with the most requests comes last, when the prefix itself is needed no longer: so
    no more than log2(requests) + 1 prefixes are needed later at a time.
    """
    inside: dict[Prefix | None, list[int | Prefix]] = {None: [], **{prefix: [] for prefix in plan.all}}
    for prefix in plan.all:
        inside[prefix.parent].append(prefix)
    for i in plan.order:
        inside[plan.prefix_of[i]].append(i)
    longest: dict[int | Prefix, int] = dict(enumerate(needs))
    requests: dict[int | Prefix, int] = dict.fromkeys(plan.order, 1)
    for prefix in reversed(plan.all):
        longest[prefix] = max(longest[item] for item in inside[prefix])
        requests[prefix] = sum(requests[item] for item in inside[prefix])

    def arranged(outer: Prefix | None) -> list[int | Prefix]:
        items = sorted(inside[outer], key=lambda item: -longest[item])
        if outer is not None:
            last = max(reversed(items), key=requests.__getitem__)
            items.remove(last)
            items.append(last)
        return items

    order: list[int] = []
    stack = arranged(None)[::-1]
    while stack:
        item = stack.pop()
        if isinstance(item, Prefix):
            item.end = len(order) + requests[item]
            stack += arranged(item)[::-1]
        else:
            order.append(item)
    return order


def _common(a: tuple[int, bytes], b: tuple[int, bytes]) -> int:
    """Returns how many tokens two keys have in common from the beginning."""
    if a[0] != b[0]:
        return 0
    length = min(len(a[1]), len(b[1]))
    x, y = (np.frombuffer(key[1], dtype=np.uint32, count=length // 4) for key in (a, b))
    differ = np.flatnonzero(x != y)
    return int(differ[0]) if len(differ) else length // 4


def _intervals(common: Sequence[int]) -> list[tuple[int, int, int]]:
    """Returns all maximal runs of sorted keys that have tokens in common, outer ones first.

    A run is (first, last, length), with ``length`` > 0 tokens in common. ``common[i]`` is what keys
    i - 1 and i have in common. The runs are the inner nodes of the keys' trie, found with a stack
    (Abouelhoda, Kurtz and Ohlebusch 2004, algorithm 4.1).
    """
    intervals: list[tuple[int, int, int]] = []
    stack: list[tuple[int, int]] = []  # (length, first)
    for i, length in enumerate([*common[1:], 0], start=1):
        first = i - 1
        while stack and stack[-1][0] > length:
            inner, first = stack.pop()
            intervals.append((first, i - 1, inner))
        if length and (not stack or stack[-1][0] < length):
            stack.append((length, first))
    return sorted(intervals, key=lambda run: (run[0], -run[1], run[2]))


@dataclass(eq=False)
class _Ran:
    """A prefix that ran, and how deep its tokens went."""

    prefix: Prefix
    layers: tuple[int, ...]  # of those of its tokens that may exit
    refused: tuple[int, ...]  # of the same
    uses: int = 0


class PrefixStore:
    """A store that runs prefixes when they are first needed, and keeps them while later requests begin with them."""

    def __init__(self, engine: Engine, states: RowStates, plan: PrefixPlan, tokens_per_pass: int) -> None:
        self._engine = engine
        self._states = states
        self.plan = plan
        self._tokens_per_pass = tokens_per_pass
        self._all: list[_Ran] = []
        self._kept: dict[Prefix, _Ran] = {}  # each begins with those before it
        self._num_started = 0  # requests so far

    @property
    def runs(self) -> list[PrefixRun]:
        """The prefixes that have run so far, in order."""
        return [
            PrefixRun(
                ran.prefix.policy,
                Trace(
                    prompt_tokens=ran.prefix.length + 1,
                    fed_tokens=ran.prefix.length,
                    num_output_tokens=0,
                    exit_layers=ran.layers,
                    generated=False,
                    refused=if_any(ran.refused),
                ),
                ran.uses,
            )
            for ran in self._all
        ]

    def begin(self, requests: Sequence[int], slots: Sequence[int]) -> list[SharedPrefix]:
        """Gives new rows the states of their requests' prefixes, after running those that have not run yet.

        Requests come in the plan's order; ``slots`` are those of their rows.
        """
        self._num_started += len(requests)
        longest = [self.plan.prefix_of[i] for i in requests]
        rows_of: dict[Prefix, list[int]] = {}  # of prefixes that have to run, in the first of these rows
        for row, prefix in enumerate(longest):
            while prefix is not None and prefix not in self._kept:
                rows_of.setdefault(prefix, []).append(row)
                prefix = prefix.parent
        # These copies come before anything else is kept in the same memory.
        for prefix, slot in zip(longest, slots, strict=True):
            self._give(prefix, slot)
        for prefix, rows in rows_of.items():
            self._give(prefix.parent, slots[rows[0]])

        ran = dict(self._kept)
        still_needed = self._needed_later([*self._kept, *rows_of])
        for prefix in [prefix for prefix in self._kept if prefix not in still_needed]:
            del self._kept[prefix]
            self._states.forget(prefix.length)
        by_depth: dict[int, list[Prefix]] = {}
        for prefix in rows_of:
            by_depth.setdefault(prefix.depth, []).append(prefix)
        for depth in sorted(by_depth):
            level = by_depth[depth]
            # A row that holds a prefix may continue it to a longer one in this level.
            for prefix in level:
                if prefix.parent in rows_of:
                    self._copy(ran[prefix.parent], slots[rows_of[prefix.parent][0]], slots[rows_of[prefix][0]])
            with naming_request([requests[rows_of[prefix][0]] for prefix in level]):
                ran |= self._run([(prefix, slots[rows_of[prefix][0]]) for prefix in level], ran)
            for prefix in level:
                source = slots[rows_of[prefix][0]]
                for row in rows_of[prefix]:
                    if longest[row] is prefix:
                        self._copy(ran[prefix], source, slots[row])
                if prefix in still_needed and self._states.keep(source, prefix.length):
                    self._kept[prefix] = ran[prefix]
        return [
            SharedPrefix(prefix.length, ran[prefix].layers, ran[prefix].refused)
            if prefix is not None
            else SharedPrefix()
            for prefix in longest
        ]

    def _needed_later(self, prefixes: Sequence[Prefix]) -> set[Prefix]:
        """Returns those of these prefixes that are the longest with which some later request begins."""
        needed: set[Prefix] = set()
        end = self._num_started
        # All that are needed later are prefixes of the next request, so their requests nest.
        for prefix in sorted(prefixes, key=lambda prefix: -prefix.depth):
            if prefix.end > end:
                needed.add(prefix)
                end = prefix.end
        return needed

    def _give(self, prefix: Prefix | None, slot: int) -> None:
        """Copies a prefix into a new row if it is kept."""
        if prefix in self._kept:
            self._kept[prefix].uses += 1
            self._states.give(prefix.length, slot)

    def _copy(self, ran: _Ran, source: int, slot: int) -> None:
        """Copies a prefix from the row in which it ran, unless that row is the one that needs it."""
        ran.uses += 1
        if slot != source:
            self._states.copy_row(source, slot, ran.prefix.length)

    def _run(self, prefixes: Sequence[tuple[Prefix, int]], before: dict[Prefix, _Ran]) -> dict[Prefix, _Ran]:
        """Runs prefixes in rows that have their parents' states, in as few passes as possible."""
        passes: list[list[RowInput]] = []
        tokens = 0
        for prefix, slot in prefixes:
            start = 0 if prefix.parent is None else prefix.parent.length
            tokens += prefix.length - start
            if not passes or tokens > self._tokens_per_pass:
                passes.append([])
                tokens = prefix.length - start
            passes[-1].append(
                RowInput(
                    ids=prefix.source[start : prefix.length],
                    first_position=start,
                    slot=slot,
                    prompt_length=prefix.length + 1,
                    max_steps=1,
                    policy=prefix.policy,
                )
            )
        own: list[tuple[list[int], list[int]]] = []
        for inputs in passes:
            batch = FlatBatch.build(inputs)
            with naming_request(range(len(own), len(own) + len(inputs))):
                result = self._engine.forward(batch, self._states, NoLogits(), materialize_all=True)
            own += zip(batch.by_row(result.layers), batch.by_row(result.refused), strict=True)
        ran: dict[Prefix, _Ran] = {}
        for (prefix, _), (layers, refused) in zip(prefixes, own, strict=True):
            parent = before[prefix.parent] if prefix.parent is not None else _Ran(prefix, (), ())
            ran[prefix] = _Ran(prefix, (*parent.layers, *layers), (*parent.refused, *refused))
        self._all += ran.values()
        return ran
