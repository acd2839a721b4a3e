"""Drives the engine for generation, by continuous batching.

A row that finishes makes way for the next request at once, whose prompt is fed in the same pass in which the other rows
decode. Rows in flight never depend on one another. A prefix that several requests share is run once. With more rows in
flight than a batch has, those that go on after an exit wait there for a full batch (:mod:`engine.waiting`).
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import IntArray, on_device
from dynamax_lm_eval.engine.batch import FlatBatch
from dynamax_lm_eval.engine.decisions import Confidences
from dynamax_lm_eval.engine.engine import Engine, RowStates
from dynamax_lm_eval.engine.prefixes import PrefixRun, PrefixStore, find_prefixes
from dynamax_lm_eval.engine.requests import Generation, GenerationRequest
from dynamax_lm_eval.engine.rows import Row, VerifiedRow, new_row
from dynamax_lm_eval.engine.sampling import choose
from dynamax_lm_eval.engine.waiting import READ_OUT, WaitingRow, WaitingRows
from dynamax_lm_eval.errors import ChoiceError, NotFiniteError, naming_request

#: Most tokens in one pass, unless a single row has more: bounds the memory of activations.
MAX_TOKENS_PER_PASS = 4096
#: Tokens of prompts for which a pass through all blocks is not much slower than for their weights alone. Where rows
#: wait at exits, fewer wait for others, because all that is in a pass with prompts goes to the end.
_ENOUGH_PROMPT_TOKENS = 256


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
    if any(request.policy.drafts for request in requests):
        in_flight = max_rows  # a row's drafts go on with the row, wherever others are
    needs = [len(request.prompt) + request.max_new_tokens for request in requests]
    plan = find_prefixes([(r.prompt, len(r.prompt), r.policy) for r in requests], needs, share_prefixes)
    pending = deque(plan.order)
    longest = max(needs, default=1)
    states = engine.new_states(longest * min(in_flight, len(requests)), plan.room, row_stride=longest)
    prefixes = PrefixStore(engine, states, plan, MAX_TOKENS_PER_PASS)
    waiting: WaitingRows[Row] = WaitingRows(max_rows)
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
        for row, tokens in _run(engine, states, waiting, place, taken, in_flight > max_rows):
            now = clock()
            if not row.generated:
                row.first_token = now
            row.generated += tokens
            if tokens and row.is_over:
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
) -> list[Row]:
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
        new_row(index, requests[index], slot, shared_prefix, now)
        for (index, slot), shared_prefix in zip(admitted, shared_prefixes, strict=True)
    ]


def _run(
    engine: Engine,
    states: RowStates,
    waiting: WaitingRows[Row],
    place: int,
    taken: Sequence[WaitingRow[Row]],
    may_wait: bool,
) -> Iterator[tuple[Row, list[int]]]:
    """Takes rows on from where they waited, and yields those that are through, with the tokens that they have now."""
    rows = [waited.row for waited in taken]
    hidden = [waited.hidden for waited in taken if waited.hidden is not None]
    if place == READ_OUT:
        last = [(row, 0) for row in rows]
        yield from _chosen(states, last, engine.read_out(torch.cat(hidden, dim=1)).float())
        return
    batch = FlatBatch.build([row.next_input() for row in rows])
    collector = _ReadLogits()
    start = (place, torch.cat(hidden, dim=1)) if place else None
    # With one token in each row, tokens are rows.
    holds = waiting.holds if may_wait and len(batch) == len(rows) else None
    resumed = [state for row in rows for state in row.resumed]
    with naming_request([row.index for row in rows]):
        result = engine.advance(batch, states, collector, start, holds, resumed=resumed)

    def wait(place: int, tokens: IntArray, hidden: Tensor) -> None:
        waiting.add(place, map(WaitingRow, [rows[i] for i in tokens.tolist()], hidden.split(1, dim=1)))

    number_of = batch.number_in_row
    stopped: dict[int, dict[int, tuple[int, Tensor]]] = defaultdict(dict)
    for layer, tokens, states_there in result.stopped:
        for token, state in zip(tokens.tolist(), states_there.split(1, dim=1), strict=True):
            stopped[int(batch.layout.row_of[token])][int(number_of[token])] = layer, state
    said = _said(result.confidences)
    by_row = zip(batch.by_row(result.layers), batch.by_row(result.refused), batch.answering_by_row(), strict=True)
    for i, (layers, refused, answering) in enumerate(by_row):
        if batch.drafts[i]:
            rows[i].stop(stopped[i], refused)
        elif result.held is not None and i in result.held.tokens:
            # A prompt of one token cannot leave.
            rows[i].wait(refused[-1] if refused else 0, said[answering[-1]] if answering else {})
        else:
            rows[i].note(layers, refused, [said[token] for token in answering])
    if result.held is not None:
        wait(*result.held)
    if result.unread is not None:
        wait(READ_OUT, *result.unread)
    if len(collector.tokens):
        read = [(rows[batch.layout.row_of[token]], int(number_of[token])) for token in collector.tokens.tolist()]
        yield from _chosen(states, read, collector.logits())


def _said(confidences: Iterable[Confidences]) -> defaultdict[int, dict[int, float]]:
    """Returns by token what was said of it, by exit layer."""
    said: defaultdict[int, dict[int, float]] = defaultdict(dict)
    for block, tokens, scores in confidences:
        for token, score in zip(tokens.tolist(), scores.tolist(), strict=True):
            said[token][block] = score
    return said


def _chosen(states: RowStates, read: Sequence[tuple[Row, int]], logits: Tensor) -> Iterator[tuple[Row, list[int]]]:
    """Yields rows with the tokens that they have now, of what was read (T, V): a row, and a token of its input."""
    by_row: dict[int, dict[int, int]] = defaultdict(dict)
    rows = {row.index: row for row, _ in read}
    for (row, number), token in zip(read, _choose(read, logits), strict=True):
        by_row[row.index][number] = token
    for index, chosen in by_row.items():
        row = rows[index]
        tokens, kept = row.take(chosen)
        if tokens and isinstance(row, VerifiedRow):
            states.settle(row.slot, kept)
        yield row, tokens


def _choose(read: Sequence[tuple[Row, int]], logits: Tensor) -> list[int]:
    """Returns what comes behind each of the tokens that were read, from logits (T, V).

    Raises:
        NotFiniteError: the logits of a row are not numbers.
        ChoiceError: its sampler cannot choose.
    """
    choices = choose([row.to_choose(number) for row, number in read], logits)
    if choices.errors:
        i, error = min(choices.errors.items())
        index = read[i][0].index
        if isinstance(error, NotFiniteError):
            raise NotFiniteError(index)
        raise ChoiceError(index, f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    return choices.tokens


class _ReadLogits:
    """A collector of the logits of the tokens that are read out."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._tokens: list[IntArray] = []

    def reduce(self, tokens: IntArray, logits: Tensor) -> Tensor:
        return logits

    def store(self, tokens: IntArray, reduced: Tensor) -> None:
        self._tokens.append(tokens)
        self._parts.append(reduced)

    @property
    def tokens(self) -> IntArray:
        """The tokens (t,) that were read out, rising."""
        return np.sort(np.concatenate([np.empty(0, dtype=np.int64), *self._tokens]))

    def logits(self) -> Tensor:
        """Returns the logits (t, V) of these tokens in float32."""
        order = np.argsort(np.concatenate(self._tokens))
        logits = (self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts)).float()
        return logits if (np.diff(order) > 0).all() else logits.index_select(0, on_device(order, logits.device))
