"""Drives the engine for scoring: texts run through the exits, each in one parallel pass."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dynamax_lm_eval.backbones.base import IntArray, on_device
from dynamax_lm_eval.compute.trace import Trace, if_any
from dynamax_lm_eval.engine.batch import FlatBatch, RowInput
from dynamax_lm_eval.engine.engine import Engine, RowStates
from dynamax_lm_eval.engine.generation import MAX_TOKENS_PER_PASS
from dynamax_lm_eval.engine.prefixes import PrefixPlan, PrefixRun, PrefixStore, find_prefixes
from dynamax_lm_eval.engine.requests import Scoring, ScoringRequest
from dynamax_lm_eval.errors import NotFiniteError, naming_request


def score(
    engine: Engine,
    requests: Sequence[ScoringRequest],
    max_rows: int,
    softmax_dtype: torch.dtype | None = None,
    share_prefixes: bool = True,
) -> Generator[tuple[int, Scoring], None, list[PrefixRun]]:
    """Scores all requests through the exits, each in one parallel pass.

    A token's exit depends only on earlier layers of earlier tokens, so the pass gives what feeding the
    tokens one by one would. ``softmax_dtype`` is that of the log-softmax (None: that of the logits).

    Yields and returns what :func:`generate` does, with scores in place of generations.
    """
    lengths = [len(request.ids) for request in requests]
    plan = find_prefixes([(r.ids, r.context_length, r.policy) for r in requests], lengths, share_prefixes)
    passes = _passes(plan, lengths, max_rows)
    capacity = max((sum(lengths[i] for i in members) for members in passes), default=1)
    states = engine.new_states(capacity, plan.room)
    prefixes = PrefixStore(engine, states, plan, MAX_TOKENS_PER_PASS)
    for members in passes:
        slots = [_allocate(states, lengths[i]) for i in members]
        shared_prefixes = prefixes.begin(members, slots)
        inputs = [
            RowInput(
                ids=requests[i].ids[shared_prefix.tokens :],
                first_position=shared_prefix.tokens,
                slot=slot,
                prompt_length=requests[i].context_length,
                max_steps=len(requests[i].targets),
                policy=requests[i].policy,
                vocabulary=requests[i].policy.row_vocabulary(requests[i].ids[: requests[i].context_length]),
            )
            for i, slot, shared_prefix in zip(members, slots, shared_prefixes, strict=True)
        ]
        batch = FlatBatch.build(inputs)
        targets, device = [requests[i].targets for i in members], engine.backbone.output_device
        collector = _TargetScores(batch, targets, device, softmax_dtype)
        with naming_request(members):
            ran = engine.forward(batch, states, collector)
        scored, layers, refused = collector.by_row(), batch.by_row(ran.layers), batch.by_row(ran.refused)
        for row, (i, slot, shared_prefix) in enumerate(zip(members, slots, shared_prefixes, strict=True)):
            scores = scored[row]
            states.free_row(slot)
            if any(math.isnan(value) for line in scores[0] for value in line):
                raise NotFiniteError(i)
            trace = Trace(
                prompt_tokens=requests[i].context_length,
                fed_tokens=len(requests[i].ids),
                num_output_tokens=len(requests[i].targets),
                exit_layers=(*shared_prefix.layers, *layers[row]),
                generated=False,
                refused=if_any((*shared_prefix.refused, *refused[row])),
            )
            yield i, Scoring(*scores, trace, shared_prefix.tokens)
    return prefixes.runs


def score_all(engine: Engine, requests: Sequence[ScoringRequest], max_rows: int) -> list[Scoring]:
    """Returns all results of :func:`score`, in order of the requests."""
    results = dict(score(engine, requests, max_rows))
    return [results[i] for i in range(len(requests))]


def _passes(plan: PrefixPlan, lengths: Sequence[int], max_rows: int) -> list[list[int]]:
    """Returns the requests of each pass, in the plan's order and bounded in rows and tokens."""
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


def _allocate(states: RowStates, length: int) -> int:
    slot = states.allocate_row(length)
    assert slot is not None, "the states were made for the largest pass"
    return slot


class _TargetScores:
    """A collector of the log-probabilities of the targets and the arg-max of each token that needs logits."""

    def __init__(
        self,
        batch: FlatBatch,
        targets: Sequence[Sequence[Sequence[int]]],
        device: torch.device,
        softmax_dtype: torch.dtype | None,
    ) -> None:
        self._targets = targets
        self._dtype = softmax_dtype
        self._needs_logits = np.flatnonzero(batch.needs_logits)
        flat = [token_targets for row in targets for token_targets in row]
        assert len(flat) == len(self._needs_logits)
        width = max(len(token_targets) for token_targets in flat)
        table = np.zeros((len(batch), width), dtype=np.int64)
        for token, token_targets in zip(self._needs_logits, flat, strict=True):
            table[token, : len(token_targets)] = token_targets
        self._table = on_device(table, device)
        # One table for log-probabilities and arg-maxes: float32 holds every token id below 2**24.
        self._scores = torch.empty(len(batch), width + 1, device=device)

    def reduce(self, tokens: IntArray, logits: Tensor) -> Tensor:
        targets = self._table[on_device(tokens, logits.device)]  # (T, width)
        # As the harness: in the dtype asked for, outside autocast.
        with torch.autocast(logits.device.type, enabled=False):
            log_probs = F.log_softmax(logits, dim=-1, dtype=self._dtype).gather(1, targets)
        return torch.cat([log_probs.float(), logits.argmax(dim=-1, keepdim=True).float()], dim=1)

    def store(self, tokens: IntArray, reduced: Tensor) -> None:
        self._scores[on_device(tokens, reduced.device)] = reduced

    def by_row(self) -> list[tuple[list[list[float]], list[int]]]:
        """Returns, for each row, log-probabilities in the shape of its targets, and the arg-max at each position."""
        table = self._scores[on_device(self._needs_logits, self._scores.device)].tolist()
        results, start = [], 0
        for row in self._targets:
            lines = table[start : start + len(row)]
            log_probs = [line[: len(token_targets)] for line, token_targets in zip(lines, row, strict=True)]
            results.append((log_probs, [int(line[-1]) for line in lines]))
            start += len(row)
        return results
