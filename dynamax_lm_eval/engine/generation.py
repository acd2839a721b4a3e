"""Drives the engine for generation, by continuous batching.

A row that finishes makes way for the next request at once, whose prompt is fed in the same pass in which the other rows
decode. Rows in flight never depend on one another. A prefix that several requests share is run once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

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
from dynamax_lm_eval.errors import ChoiceError, NotFiniteError, naming_request

#: Most tokens in one pass, unless a single row has more: bounds the memory of activations.
MAX_TOKENS_PER_PASS = 4096


@dataclass
class _Row:
    """A row whose generation is in flight."""

    index: int
    request: GenerationRequest
    slot: int
    shared_prefix: SharedPrefix
    generated: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)

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
        )

    def result(self) -> Generation:
        request = self.request
        trace = Trace(
            prompt_tokens=len(request.prompt),
            fed_tokens=len(request.prompt) + len(self.generated) - 1,
            num_output_tokens=len(self.generated),
            exit_layers=(*self.shared_prefix.layers, *self.layers),
            generated=True,
            hit_limit=len(self.generated) >= request.max_new_tokens and not request.is_finished(self.generated),
        )
        return Generation(self.generated, trace, self.shared_prefix.tokens)


def generate(
    engine: Engine,
    requests: Sequence[GenerationRequest],
    max_rows: int,
    share_prefixes: bool = True,
) -> Generator[tuple[int, Generation], None, list[PrefixRun]]:
    """Generates for all requests with up to ``max_rows`` of them in flight.

    Yields:
        a request's index and its generation as soon as it is done, so that nothing is lost when a run is interrupted.

    Returns:
        the runs of prefixes that requests share, which come on top of the requests' own traces.
    """
    needs = [len(request.prompt) + request.max_new_tokens for request in requests]
    plan = find_prefixes([(r.prompt, len(r.prompt), r.policy) for r in requests], needs, share_prefixes)
    pending = deque(plan.order)
    longest = max(needs, default=1)
    capacity = longest * min(max_rows, len(requests))
    states = engine.new_states(capacity, plan.room, row_stride=longest)
    prefixes = PrefixStore(engine, states, plan, MAX_TOKENS_PER_PASS)
    rows: list[_Row] = []
    while pending or rows:
        rows += _admit(requests, needs, pending, states, prefixes, len(rows), max_rows)
        rows.sort(key=lambda row: row.slot)  # neighbours in the states are neighbours in the batch
        inputs = [row.next_input() for row in rows]
        batch = FlatBatch.build(inputs)
        collector = _LastLogits(len(rows), batch.layout.row_of)
        with naming_request([row.index for row in rows]):
            layers = engine.forward(batch, states, collector)
        for row, row_layers in zip(rows, batch.by_row(layers), strict=True):
            row.layers += row_layers
        for row, token in zip(rows, _choose(rows, collector.logits()), strict=True):
            row.generated.append(token)
        running = []
        for row in rows:
            request = row.request
            if len(row.generated) >= request.max_new_tokens or request.is_finished(row.generated):
                states.free_row(row.slot)
                yield row.index, row.result()
            else:
                running.append(row)
        rows = running
    return prefixes.runs


def generate_all(engine: Engine, requests: Sequence[GenerationRequest], max_rows: int) -> list[Generation]:
    """Returns all results of :func:`generate`, in order of the requests."""
    results = dict(generate(engine, requests, max_rows))
    return [results[i] for i in range(len(requests))]


def _admit(
    requests: Sequence[GenerationRequest],
    needs: Sequence[int],
    pending: deque[int],
    states: RowStates,
    prefixes: PrefixStore,
    in_flight: int,
    max_rows: int,
) -> list[_Row]:
    """Starts pending requests while there are rows, memory and tokens in the pass for them."""
    admitted: list[tuple[int, int]] = []  # (request, slot)
    budget = MAX_TOKENS_PER_PASS - in_flight
    while pending and in_flight + len(admitted) < max_rows:
        index = pending[0]
        length = len(requests[index].prompt) - prefixes.plan.shared_tokens(index)
        if length > budget and (in_flight or admitted):
            break
        slot = states.allocate_row(needs[index])
        if slot is None:
            break
        pending.popleft()
        budget -= length
        admitted.append((index, slot))
    shared_prefixes = prefixes.begin([index for index, _ in admitted], [slot for _, slot in admitted])
    return [
        _Row(index, requests[index], slot, shared_prefix)
        for (index, slot), shared_prefix in zip(admitted, shared_prefixes, strict=True)
    ]


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
    """A collector of the logits of the one token of each row that needs them."""

    def __init__(self, num_rows: int, row_of: IntArray) -> None:
        self._row_of = row_of
        self._parts: list[Tensor] = []
        self._rows: list[IntArray] = []
        self._num_rows = num_rows

    def reduce(self, tokens: IntArray, logits: Tensor) -> Tensor:
        return logits

    def store(self, tokens: IntArray, reduced: Tensor) -> None:
        self._rows.append(self._row_of[tokens])
        self._parts.append(reduced)

    def logits(self) -> Tensor:
        """Returns the logits (R, V) in float32, in order of the rows."""
        rows = np.concatenate(self._rows)
        assert sorted(rows.tolist()) == list(range(self._num_rows)), "every row is read out once"
        order = np.argsort(rows)
        logits = (self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts)).float()
        return logits if (np.diff(order) > 0).all() else logits.index_select(0, on_device(order, logits.device))
