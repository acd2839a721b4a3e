"""Drives the engine for generation, by continuous batching.

A row that finishes makes way for the next request at once, whose prompt is fed in the same pass in which the other rows
decode. Rows in flight never depend on one another. A prefix that several requests share is run once. With more rows in
flight than a batch has, those that go on after an exit wait there for a full batch (:mod:`engine.waiting`).
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import IntArray, on_device
from dynamax_lm_eval.compute.accounting import Trace
from dynamax_lm_eval.engine.batch import FlatBatch, RowInput
from dynamax_lm_eval.engine.engine import Engine, RowStates
from dynamax_lm_eval.engine.prefixes import PrefixRun, PrefixStore, SharedPrefix, find_prefixes
from dynamax_lm_eval.engine.requests import Generation, GenerationRequest
from dynamax_lm_eval.engine.sampling import RowToChoose, choose
from dynamax_lm_eval.engine.waiting import READ_OUT, WaitingRow, WaitingRows
from dynamax_lm_eval.errors import ChoiceError, NotFiniteError, naming_request
from dynamax_lm_eval.exits.vocabulary import RowVocabulary

#: Most tokens in one pass, unless a single row has more: bounds the memory of activations.
MAX_TOKENS_PER_PASS = 4096
#: Tokens of prompts for which a pass through all blocks is not much slower than for their weights alone. Where rows
#: wait at exits, fewer wait for others, because all that is in a pass with prompts goes to the end.
_ENOUGH_PROMPT_TOKENS = 256


@dataclass
class _Row:
    """A row whose generation is in flight."""

    index: int
    request: GenerationRequest
    slot: int
    shared_prefix: SharedPrefix
    began: float
    generated: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    first_token: float = 0.0

    @cached_property
    def vocabulary(self) -> RowVocabulary | None:
        """The tokens that its confidence looks at."""
        return self.request.policy.row_vocabulary(self.request.prompt)

    def next_input(self) -> RowInput:
        request, shared = self.request, self.shared_prefix.tokens
        first = len(request.prompt) + len(self.generated) - 1 if self.generated else shared
        return RowInput(
            ids=self.generated[-1:] or request.prompt[shared:],
            first_position=first,
            slot=self.slot,
            prompt_length=len(request.prompt),
            max_steps=request.max_new_tokens,
            policy=request.policy,
            vocabulary=self.vocabulary,
        )

    def result(self, now: float) -> Generation:
        """Returns its generation, whose last token is known now."""
        request = self.request
        trace = Trace(
            prompt_tokens=len(request.prompt),
            fed_tokens=len(request.prompt) + len(self.generated) - 1,
            num_output_tokens=len(self.generated),
            exit_layers=(*self.shared_prefix.layers, *self.layers),
            generated=True,
            hit_limit=len(self.generated) >= request.max_new_tokens and not request.is_finished(self.generated),
        )
        times = self.began, self.first_token, now
        return Generation(self.generated, trace, self.shared_prefix.tokens, times)


def generate(
    engine: Engine,
    requests: Sequence[GenerationRequest],
    max_rows: int,
    share_prefixes: bool = True,
    rows_in_flight: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Generator[tuple[int, Generation], None, list[PrefixRun]]:
    """Generates for all requests with up to ``max_rows`` of them in a batch.

    Args:
        engine: runs them.
        requests: what to generate.
        max_rows: most rows that decode in one batch.
        share_prefixes: run what several requests begin with once.
        rows_in_flight: most rows that have begun and not ended, at least ``max_rows``; None: ``max_rows``. Above, rows
            wait at exits for full batches, on backbones that can go on at any block. Results do not depend on it.
        clock: tells the time in seconds.

    Yields:
        a request's index and its generation as soon as it is done, so that nothing is lost when a run is interrupted.

    Returns:
        the runs of prefixes that requests share, which come on top of the requests' own traces.
    """
    in_flight = rows_in_flight if rows_in_flight is not None and engine.backbone.resumes else max_rows
    needs = [len(request.prompt) + request.max_new_tokens for request in requests]
    plan = find_prefixes([(r.prompt, len(r.prompt), r.policy) for r in requests], needs, share_prefixes)
    pending = deque(plan.order)
    longest = max(needs, default=1)
    states = engine.new_states(longest * min(in_flight, len(requests)), plan.room, row_stride=longest)
    prefixes = PrefixStore(engine, states, plan, MAX_TOKENS_PER_PASS)
    waiting: WaitingRows[_Row] = WaitingRows(max_rows)
    while pending or len(waiting):
        room = min(in_flight - len(waiting), len(pending))
        if in_flight > max_rows and waiting.has_batch and room < min(max_rows, len(pending)):
            fed = sum(len(requests[i].prompt) - plan.shared_tokens(i) for i in itertools.islice(pending, room))
            room = room if fed >= _ENOUGH_PROMPT_TOKENS else 0
        place, taken = waiting.take(room)
        if place == 0:
            admitted = _admit(requests, needs, pending, states, prefixes, len(taken), room, clock())
            taken += [WaitingRow(row) for row in admitted]
        taken.sort(key=lambda waited: waited.row.slot)  # neighbours in the states are neighbours in the batch
        for row, token in _run(engine, states, waiting, place, taken, in_flight > max_rows):
            row.generated.append(token)
            request, now = row.request, clock()
            if len(row.generated) == 1:
                row.first_token = now
            if len(row.generated) >= request.max_new_tokens or request.is_finished(row.generated):
                states.free_row(row.slot)
                yield row.index, row.result(now)
            else:
                waiting.add(0, [WaitingRow(row)])
    return prefixes.runs


def generate_all(
    engine: Engine, requests: Sequence[GenerationRequest], max_rows: int, rows_in_flight: int | None = None
) -> list[Generation]:
    """Returns all results of :func:`generate`, in order of the requests."""
    results = dict(generate(engine, requests, max_rows, rows_in_flight=rows_in_flight))
    return [results[i] for i in range(len(requests))]


def _admit(
    requests: Sequence[GenerationRequest],
    needs: Sequence[int],
    pending: deque[int],
    states: RowStates,
    prefixes: PrefixStore,
    decoding: int,
    room: int,
    now: float,
) -> list[_Row]:
    """Starts pending requests while there are rows, memory and tokens in the pass for them.

    ``decoding``: tokens of the pass that other rows feed; ``room``: most rows to start; ``now``: when they do.
    """
    admitted: list[tuple[int, int]] = []  # (request, slot)
    budget = MAX_TOKENS_PER_PASS - decoding
    while len(admitted) < room:
        index = pending[0]
        length = len(requests[index].prompt) - prefixes.plan.shared_tokens(index)
        if length > budget and (decoding or admitted):
            break
        slot = states.allocate_row(needs[index])
        if slot is None:
            break
        pending.popleft()
        budget -= length
        admitted.append((index, slot))
    shared_prefixes = prefixes.begin([index for index, _ in admitted], [slot for _, slot in admitted])
    return [
        _Row(index, requests[index], slot, shared_prefix, now)
        for (index, slot), shared_prefix in zip(admitted, shared_prefixes, strict=True)
    ]


def _run(
    engine: Engine,
    states: RowStates,
    waiting: WaitingRows[_Row],
    place: int,
    taken: Sequence[WaitingRow[_Row]],
    may_wait: bool,
) -> Iterator[tuple[_Row, int]]:
    """Takes rows on from where they waited, and yields those that have a next token, with it."""
    rows = [waited.row for waited in taken]
    hidden = [waited.hidden for waited in taken if waited.hidden is not None]
    if place == READ_OUT:
        yield from zip(rows, _choose(rows, engine.read_out(torch.cat(hidden, dim=1)).float()), strict=True)
        return
    batch = FlatBatch.build([row.next_input() for row in rows])
    collector = _LastLogits(batch.layout.row_of)
    start = (place, torch.cat(hidden, dim=1)) if place else None
    # With one token in each row, tokens are rows.
    holds = waiting.holds if may_wait and len(batch) == len(rows) else None
    with naming_request([row.index for row in rows]):
        result = engine.advance(batch, states, collector, start, holds)

    def wait(place: int, tokens: IntArray, hidden: Tensor) -> None:
        waiting.add(place, map(WaitingRow, [rows[i] for i in tokens.tolist()], hidden.split(1, dim=1)))

    for i, layers in enumerate(batch.by_row(result.layers)):
        if result.held is None or i not in result.held.tokens:
            rows[i].layers += layers
    if result.held is not None:
        wait(*result.held)
    if result.unread is not None:
        wait(READ_OUT, *result.unread)
    if len(collector.rows):
        done = [rows[i] for i in collector.rows.tolist()]
        yield from zip(done, _choose(done, collector.logits()), strict=True)


def _choose(rows: Sequence[_Row], logits: Tensor) -> list[int]:
    """Returns the next token of every row, from logits (R, V).

    Raises:
        NotFiniteError: the logits of a row are not numbers.
        ChoiceError: its sampler cannot choose.
    """
    choices = choose([RowToChoose(r.request.sampler, r.request.prompt, r.generated) for r in rows], logits)
    if choices.errors:
        i, error = min(choices.errors.items())
        if isinstance(error, NotFiniteError):
            raise NotFiniteError(rows[i].index)
        raise ChoiceError(rows[i].index, f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    return choices.tokens


class _LastLogits:
    """A collector of the logits of the one token of each row that is read out."""

    def __init__(self, row_of: IntArray) -> None:
        self._row_of = row_of
        self._parts: list[Tensor] = []
        self._rows: list[IntArray] = []

    def reduce(self, tokens: IntArray, logits: Tensor) -> Tensor:
        return logits

    def store(self, tokens: IntArray, reduced: Tensor) -> None:
        self._rows.append(self._row_of[tokens])
        self._parts.append(reduced)

    @property
    def rows(self) -> IntArray:
        """The rows (r,) that were read out, rising."""
        return np.sort(np.concatenate([np.empty(0, dtype=np.int64), *self._rows]))

    def logits(self) -> Tensor:
        """Returns the logits (r, V) of these rows in float32."""
        order = np.argsort(np.concatenate(self._rows))
        logits = (self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts)).float()
        return logits if (np.diff(order) > 0).all() else logits.index_select(0, on_device(order, logits.device))
