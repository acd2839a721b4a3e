"""Drives the engine: continuous batching for generation, and parallel scoring.

A row that finishes gives its place to the next request at once: its prompt is fed in the same pass in which
the other rows decode. Rows in flight never depend on one another. What several requests begin with is run once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dynamax_lm_eval.backbones.base import IntArray
from dynamax_lm_eval.compute.ledger import Trace
from dynamax_lm_eval.engine.batch import FlatBatch, RowInput
from dynamax_lm_eval.engine.engine import Engine, RowStates
from dynamax_lm_eval.engine.errors import ChoiceError, NotFiniteError, naming_request
from dynamax_lm_eval.engine.prefixes import Beginning, PrefixPlan, PrefixRun, PrefixStore, find_prefixes
from dynamax_lm_eval.engine.sampling import Sampler
from dynamax_lm_eval.exits.policy import ExitPolicy

#: Most tokens in one pass, unless a single row has more: bounds the memory of activations.
MAX_TOKENS_PER_PASS = 4096


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt and what to do with it.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: at least 1.
        policy: when its tokens exit.
        sampler: chooses its tokens.
        is_finished: called with the generated ids after each token; True ends the generation.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    policy: ExitPolicy
    sampler: Sampler
    is_finished: Callable[[list[int]], bool]


@dataclass(frozen=True)
class Generation:
    """Generated ids (the token that ended it included) and what that takes, were the request alone.

    ``shared_tokens``: so many tokens at the beginning were taken from a prefix that ran before.
    """

    tokens: list[int]
    trace: Trace
    shared_tokens: int = 0


@dataclass(frozen=True)
class ScoringRequest:
    """A text to score.

    Attributes:
        ids: the tokens that are fed: context and continuation without its last token.
        context_length: how many of them are context, at least one.
        targets: for each position from context_length - 1 on, the tokens whose probability is asked: one,
            and at the last position one per continuation that differs only there.
        policy: when its tokens exit.
    """

    ids: Sequence[int]
    context_length: int
    targets: Sequence[Sequence[int]]
    policy: ExitPolicy


@dataclass(frozen=True)
class Scoring:
    """Log-probabilities and arg-maxes at the positions asked for; the rest as in :class:`Generation`."""

    log_probs: list[list[float]]  # as targets
    greedy_tokens: list[int]
    trace: Trace
    shared_tokens: int = 0


@dataclass
class _Row:
    """A generation in flight."""

    index: int
    request: GenerationRequest
    slot: int
    beginning: Beginning
    generated: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)

    def next_input(self) -> RowInput:
        request, shared = self.request, self.beginning.tokens
        first = len(request.prompt) + len(self.generated) - 1 if self.generated else shared
        return RowInput(
            ids=self.generated[-1:] or request.prompt[shared:],
            first_position=first,
            slot=self.slot,
            prompt_length=len(request.prompt),
            max_steps=request.max_new_tokens,
            policy=request.policy,
        )

    def result(self) -> Generation:
        request = self.request
        trace = Trace(
            prompt_tokens=len(request.prompt),
            fed_tokens=len(request.prompt) + len(self.generated) - 1,
            tokens_given=len(self.generated),
            exit_layers=(*self.beginning.layers, *self.layers),
            generated=True,
            hit_limit=len(self.generated) >= request.max_new_tokens and not request.is_finished(self.generated),
        )
        return Generation(self.generated, trace, self.beginning.tokens)


def generate(
    engine: Engine,
    requests: Sequence[GenerationRequest],
    max_rows: int,
    on_finished: Callable[[int, Generation], None],
    share_prefixes: bool = True,
) -> list[PrefixRun]:
    """Generates for all requests with up to ``max_rows`` of them in flight.

    ``on_finished`` is called with a request's index as soon as it is done, so that nothing is lost when a
    run is interrupted.

    Returns:
        what was run for prefixes that requests share, beside what the requests' own generations tell.
    """
    needs = [len(request.prompt) + request.max_new_tokens for request in requests]
    plan = find_prefixes([(r.prompt, len(r.prompt), r.policy) for r in requests], needs, share_prefixes)
    pending = deque(plan.order)
    longest = max(needs, default=1)
    capacity = longest * min(max_rows, len(requests))
    states = engine.new_states(capacity, plan.room, spacing=longest)
    prefixes = PrefixStore(engine, states, plan, MAX_TOKENS_PER_PASS)
    rows: list[_Row] = []
    while pending or rows:
        rows += _admit(requests, needs, pending, states, prefixes, len(rows), max_rows)
        rows.sort(key=lambda row: row.slot)  # neighbours in the states are neighbours in the batch
        inputs = [row.next_input() for row in rows]
        batch = FlatBatch.build(inputs)
        sink = _LastLogits(len(rows), batch.layout.row_of)
        with naming_request([row.index for row in rows]):
            layers = engine.forward(batch, states, sink)
        for row, chosen in zip(rows, batch.by_row(layers), strict=True):
            row.layers += chosen
        for row, token in zip(rows, _choose(rows, sink.logits()), strict=True):
            row.generated.append(token)
        running = []
        for row in rows:
            request = row.request
            if len(row.generated) >= request.max_new_tokens or request.is_finished(row.generated):
                states.close_row(row.slot)
                on_finished(row.index, row.result())
            else:
                running.append(row)
        rows = running
    return prefixes.runs


def score(
    engine: Engine,
    requests: Sequence[ScoringRequest],
    max_rows: int,
    on_finished: Callable[[int, Scoring], None],
    softmax_dtype: torch.dtype | None = None,
    share_prefixes: bool = True,
) -> list[PrefixRun]:
    """Scores all requests through the exits, each in one parallel pass.

    A token's exit depends only on earlier layers of earlier tokens, so the pass gives what feeding the
    tokens one by one would. ``softmax_dtype`` is that of the log-softmax (None: that of the logits).

    Returns:
        as :func:`generate`.
    """
    lengths = [len(request.ids) for request in requests]
    plan = find_prefixes([(r.ids, r.context_length, r.policy) for r in requests], lengths, share_prefixes)
    passes = _passes(plan, lengths, max_rows)
    capacity = max((sum(lengths[i] for i in members) for members in passes), default=1)
    states = engine.new_states(capacity, plan.room)
    prefixes = PrefixStore(engine, states, plan, MAX_TOKENS_PER_PASS)
    for members in passes:
        slots = [_open(states, lengths[i]) for i in members]
        beginnings = prefixes.begin(members, slots)
        inputs = [
            RowInput(
                ids=requests[i].ids[beginning.tokens :],
                first_position=beginning.tokens,
                slot=slot,
                prompt_length=requests[i].context_length,
                max_steps=len(requests[i].targets),
                policy=requests[i].policy,
            )
            for i, slot, beginning in zip(members, slots, beginnings, strict=True)
        ]
        batch = FlatBatch.build(inputs)
        sink = _TargetScores(batch, [requests[i].targets for i in members], engine.backbone.device, softmax_dtype)
        with naming_request(members):
            layers = engine.forward(batch, states, sink)
        answers = zip(members, slots, beginnings, sink.by_row(), batch.by_row(layers), strict=True)
        for i, slot, beginning, scores, chosen in answers:
            states.close_row(slot)
            if any(math.isnan(value) for line in scores[0] for value in line):
                raise NotFiniteError(i)
            trace = Trace(
                prompt_tokens=requests[i].context_length,
                fed_tokens=len(requests[i].ids),
                tokens_given=len(requests[i].targets),
                exit_layers=(*beginning.layers, *chosen),
                generated=False,
            )
            on_finished(i, Scoring(*scores, trace, beginning.tokens))
    return prefixes.runs


def generate_all(engine: Engine, requests: Sequence[GenerationRequest], max_rows: int) -> list[Generation]:
    """As :func:`generate`: all results, in order of the requests."""
    found: dict[int, Generation] = {}
    generate(engine, requests, max_rows, found.__setitem__)
    return [found[i] for i in range(len(requests))]


def score_all(engine: Engine, requests: Sequence[ScoringRequest], max_rows: int) -> list[Scoring]:
    """As :func:`score`: all results, in order of the requests."""
    found: dict[int, Scoring] = {}
    score(engine, requests, max_rows, found.__setitem__)
    return [found[i] for i in range(len(requests))]


def _admit(
    requests: Sequence[GenerationRequest],
    needs: Sequence[int],
    pending: deque[int],
    states: RowStates,
    prefixes: PrefixStore,
    in_flight: int,
    max_rows: int,
) -> list[_Row]:
    """Starts waiting requests while there are rows, room and tokens in the pass for them."""
    opened: list[tuple[int, int]] = []  # (request, slot)
    budget = MAX_TOKENS_PER_PASS - in_flight
    while pending and in_flight + len(opened) < max_rows:
        index = pending[0]
        length = len(requests[index].prompt) - prefixes.plan.shared_tokens(index)
        if length > budget and (in_flight or opened):
            break
        slot = states.open_row(needs[index])
        if slot is None:
            break
        pending.popleft()
        budget -= length
        opened.append((index, slot))
    beginnings = prefixes.begin([index for index, _ in opened], [slot for _, slot in opened])
    return [
        _Row(index, requests[index], slot, beginning)
        for (index, slot), beginning in zip(opened, beginnings, strict=True)
    ]


def _passes(plan: PrefixPlan, lengths: Sequence[int], max_rows: int) -> list[list[int]]:
    """Requests for each scoring pass: in the plan's order, bounded in rows and tokens."""
    passes: list[list[int]] = []
    tokens = 0
    for i in plan.order:
        fed = lengths[i] - plan.shared_tokens(i)
        if not passes or len(passes[-1]) >= max_rows or tokens + fed > MAX_TOKENS_PER_PASS:
            passes.append([])
            tokens = 0
        passes[-1].append(i)
        tokens += fed
    return passes


def _open(states: RowStates, length: int) -> int:
    slot = states.open_row(length)
    assert slot is not None, "the states were made for the largest pass"
    return slot


def _choose(rows: Sequence[_Row], logits: Tensor) -> list[int]:
    """The next token of every row, from logits (R, V).

    Raises:
        NotFiniteError: the logits of a row are not numbers.
        ChoiceError: its sampler cannot choose.
    """
    best = logits.max(dim=-1)
    greedy = best.indices.tolist()
    tokens: list[int] = []
    for i, (row, value) in enumerate(zip(rows, best.values.tolist(), strict=True)):
        if not math.isfinite(value):  # the maximum of a row with a NaN is NaN
            raise NotFiniteError(row.index)
        sampler = row.request.sampler
        if sampler.is_plain_greedy:
            tokens.append(greedy[i])
        else:
            try:
                tokens.append(sampler.next_token([*row.request.prompt, *row.generated], logits[i]))
            except (IndexError, RuntimeError, TypeError, ValueError) as error:
                raise ChoiceError(row.index, f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    return tokens


class _LastLogits:
    """Keeps the logits of each row's only wanted token."""

    def __init__(self, num_rows: int, row_of: IntArray) -> None:
        self._row_of = row_of
        self._parts: list[Tensor] = []
        self._rows: list[IntArray] = []
        self._num_rows = num_rows

    def reduce(self, tokens: IntArray, logits: Tensor) -> Tensor:
        return logits

    def commit(self, tokens: IntArray, reduced: Tensor) -> None:
        self._rows.append(self._row_of[tokens])
        self._parts.append(reduced)

    def logits(self) -> Tensor:
        """(R, V) float32, in order of the rows."""
        rows = np.concatenate(self._rows)
        assert sorted(rows.tolist()) == list(range(self._num_rows)), "every row is read out once"
        order = torch.from_numpy(np.argsort(rows))
        joined = torch.cat(self._parts).float()
        return joined[order.to(joined.device)]


class _TargetScores:
    """Keeps, for each wanted token, the log-probabilities of its targets and the arg-max."""

    def __init__(
        self,
        batch: FlatBatch,
        targets: Sequence[Sequence[Sequence[int]]],
        device: torch.device,
        softmax_dtype: torch.dtype | None,
    ) -> None:
        self._targets = targets
        self._dtype = softmax_dtype
        self._row_of = batch.layout.row_of
        self._wanted = np.flatnonzero(batch.wanted)
        flat = [asked for row in targets for asked in row]
        assert len(flat) == len(self._wanted)
        width = max(len(asked) for asked in flat)
        table = np.zeros((len(batch), width), dtype=np.int64)
        for token, asked in zip(self._wanted, flat, strict=True):
            table[token, : len(asked)] = asked
        self._table = torch.from_numpy(table).to(device)
        # One table for log-probabilities and arg-maxes: float32 holds every token id below 2**24.
        self._scores = torch.empty(len(batch), width + 1, device=device)

    def reduce(self, tokens: IntArray, logits: Tensor) -> Tensor:
        asked = self._table[torch.from_numpy(tokens).to(logits.device)]  # (T, width)
        # As the harness: in the dtype asked for, outside autocast.
        with torch.autocast(logits.device.type, enabled=False):
            log_probs = F.log_softmax(logits, dim=-1, dtype=self._dtype).gather(1, asked)
        return torch.cat([log_probs.float(), logits.argmax(dim=-1, keepdim=True).float()], dim=1)

    def commit(self, tokens: IntArray, reduced: Tensor) -> None:
        self._scores[torch.from_numpy(tokens).to(reduced.device)] = reduced

    def by_row(self) -> list[tuple[list[list[float]], list[int]]]:
        """For each row: log-probabilities as its targets, and the arg-max at each position."""
        table = self._scores[torch.from_numpy(self._wanted).to(self._scores.device)].tolist()
        results, start = [], 0
        for row in self._targets:
            lines = table[start : start + len(row)]
            log_probs = [line[: len(asked)] for line, asked in zip(lines, row, strict=True)]
            results.append((log_probs, [int(line[-1]) for line in lines]))
            start += len(row)
        return results
