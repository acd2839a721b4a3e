"""The choice of the next token from logits, with transformers' logits processors and one random stream per request.

What the processors compute is theirs alone. Rows that ask for the same of the usual ones are processed together; others
row by row. R rows, g of them together, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dynamax_lm_eval.backbones.base import IntArray, on_device
from dynamax_lm_eval.errors import NotFiniteError

#: Processors that treat every row by itself and look at nothing but its scores.
_BY_SCORES = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)

#: What processors raise where they cannot choose.
_ERRORS = (IndexError, RuntimeError, TypeError, ValueError)

#: What stands for a token where there is none.
_NOT_FINITE, _NONE_LEFT = -1, -2


@dataclass
class Sampler:
    """The choice of one request's tokens.

    Attributes:
        processors: transformers' processors and warpers for the request, in their order.
        do_sample: draw from the distribution; otherwise take its arg-max.
        seed: seed of the request's own random stream, so that what else is in the batch cannot matter.
    """

    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    do_sample: bool = False
    seed: int = 0
    _generator: torch.Generator | None = None
    _seen: SeenTokens | None = None

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the token is simply the arg-max of the raw logits."""
        return not self.do_sample and not self.processors

    @cached_property
    def settings(self) -> Hashable | None:
        """What rows must have in common to be processed together; None for processors that take one row at a time."""
        if not all(type(processor) in _BY_SCORES or _is_plain_penalty(processor) for processor in self.processors):
            return None
        parts = [(type(processor), tuple(sorted(vars(processor).items()))) for processor in self.processors]
        return self.do_sample, tuple(parts)

    def next_token(self, ids: list[int], logits: Tensor, draw: float | None = None) -> int:
        """Returns the next token after ``ids`` (prompt and generated), given logits (V,) in float32.

        ``draw``: the number of the random stream that decides; None: its next.

        Raises:
            ValueError: no token can be drawn. Processors raise errors of their own.
        """
        scores = logits.unsqueeze(0)
        if self.processors:
            context: Any = on_device(np.asarray([ids]), logits.device)
            scores = self.processors(context, scores)
        if not self.do_sample:
            return int(scores.argmax(dim=-1))
        # On the CPU, with a uniform number drawn there: the same stream on every device.
        token = int(
            _inverse_transform(scores.cpu(), torch.tensor([self.draw() if draw is None else draw], dtype=torch.float64))
        )
        if token == _NONE_LEFT:
            raise _none_left()
        return token

    def draw(self) -> float:
        """Returns the next number of the request's random stream, uniform in [0, 1)."""
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(self.seed)
        return torch.rand((), generator=self._generator, dtype=torch.float64).item()

    def seen(self, prompt: Sequence[int], generated: Sequence[int]) -> IntArray:
        """Returns the different tokens of a prompt and of what was generated so far, which grows from call to call."""
        if self._seen is None or len(generated) < self._seen.generated:
            self._seen = SeenTokens(prompt)
        return self._seen.with_new(generated)


class SeenTokens:
    """The different tokens of a row."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.generated = 0  # tokens that are known of what was generated
        self._ids = np.unique(np.asarray(prompt, dtype=np.int64))
        self._count = len(self._ids)
        self._known = set(self._ids.tolist())

    def with_new(self, generated: Sequence[int]) -> IntArray:
        """Returns them with those that were generated."""
        for token in generated[self.generated :]:
            if token not in self._known:
                self._known.add(token)
                if self._count == len(self._ids):
                    self._ids = np.concatenate([self._ids, np.empty(self._count + 1, dtype=np.int64)])
                self._ids[self._count] = token
                self._count += 1
        self.generated = len(generated)
        return self._ids[: self._count]


@dataclass(frozen=True)
class RowToChoose:
    """A row that needs its next token."""

    sampler: Sampler
    prompt: Sequence[int]
    generated: Sequence[int]
    #: The number of its random stream that decides; None: the next.
    draw: float | None = None
    #: Whether what was generated has grown since the choice before, and nothing of it was taken back.
    has_grown: bool = True

    @property
    def seen(self) -> IntArray:
        """The different tokens of prompt and text."""
        if self.has_grown:
            return self.sampler.seen(self.prompt, self.generated)
        return np.unique(np.asarray([*self.prompt, *self.generated], dtype=np.int64))


@dataclass(frozen=True)
class Choices:
    """The next tokens of rows, and why some have none."""

    tokens: list[int]  # R
    errors: dict[int, Exception]  # row -> NotFiniteError, or what its sampler raised


def choose(rows: Sequence[RowToChoose], logits: Tensor) -> Choices:
    """Returns the next token of every row, from logits (R, V) in float32; reads once what the device has chosen."""
    best = logits.max(dim=-1)
    errors: dict[int, Exception] = {}
    chosen: list[Tensor] = []
    alone: list[int] = []
    groups: dict[Hashable, list[int]] = {}
    for i, row in enumerate(rows):
        if row.sampler.settings is None:
            alone.append(i)
        elif not row.sampler.is_plain_greedy:
            groups.setdefault(row.sampler.settings, []).append(i)
    order: list[int] = []
    for members in groups.values():
        try:
            chosen.append(_choose_together([rows[i] for i in members], _rows_of(logits, members)))
            order += members
        except _ERRORS:
            alone += members  # one of them has no choice: each says so for itself
    # One table for logits and tokens: float32 holds every token id below 2**24.
    result = torch.cat([best.values, *(part.float() for part in (best.indices, *chosen))]).tolist()
    values, greedy = result[: len(rows)], result[len(rows) : 2 * len(rows)]
    # The maximum of a row with a NaN is NaN.
    tokens = [int(token) if math.isfinite(value) else _NOT_FINITE for value, token in zip(values, greedy, strict=True)]
    for i, token in zip(order, result[2 * len(rows) :], strict=True):
        if tokens[i] != _NOT_FINITE:
            tokens[i] = int(token)
    for i in alone:
        if tokens[i] != _NOT_FINITE:
            try:
                ids = [*rows[i].prompt, *rows[i].generated]
                tokens[i] = rows[i].sampler.next_token(ids, logits[i], rows[i].draw)
            except _ERRORS as error:
                errors[i] = error
    errors |= {i: NotFiniteError(i) for i, token in enumerate(tokens) if token == _NOT_FINITE}
    errors |= {i: _none_left() for i, token in enumerate(tokens) if token == _NONE_LEFT}
    return Choices(tokens, errors)


def _rows_of(logits: Tensor, members: Sequence[int]) -> Tensor:
    return logits if len(members) == len(logits) else logits[on_device(np.asarray(members), logits.device)]


def _choose_together(rows: Sequence[RowToChoose], scores: Tensor) -> Tensor:
    """Returns the tokens (g,) of rows whose samplers ask for the same, from logits (g, V)."""
    first = rows[0].sampler
    if first.processors:
        context: Any = _context(rows, first, scores.device)
        scores = first.processors(context, scores)
    if not first.do_sample:
        return scores.argmax(dim=-1)
    draws = np.asarray([row.sampler.draw() if row.draw is None else row.draw for row in rows])
    return _inverse_transform(scores, on_device(draws, scores.device))


def _context(rows: Sequence[RowToChoose], sampler: Sampler, device: torch.device) -> Tensor:
    """Returns the tokens of rows as processors take them, (g, anything): what is repeated counts once for them."""
    if all(type(processor) in _BY_SCORES for processor in sampler.processors):
        return torch.empty(len(rows), 0, dtype=torch.int64, device=device)
    seen = [row.seen for row in rows]
    table = np.empty((len(rows), max(len(ids) for ids in seen)), dtype=np.int64)
    for line, ids in zip(table, seen, strict=True):
        line[: len(ids)], line[len(ids) :] = ids, ids[-1]
    return on_device(table, device)


def _inverse_transform(scores: Tensor, draws: Tensor) -> Tensor:
    """Returns the tokens (g,) at numbers (g,) of [0, 1) in the distributions of scores (g, V)."""
    cumulative = torch.softmax(scores.double(), dim=-1).cumsum(-1)
    total = cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, draws.unsqueeze(1) * total, right=True)
    # `right` steps over tokens of probability 0; the last one that has any is the upper end.
    last = (cumulative < total).sum(-1, keepdim=True)
    # The total is NaN where every token is ruled out.
    return torch.where(total > 0, torch.minimum(tokens, last), _NONE_LEFT)[:, 0]


def _is_plain_penalty(processor: Any) -> bool:
    if type(processor) is not RepetitionPenaltyLogitsProcessor:
        return False
    return all(value is None for name, value in vars(processor).items() if name != "penalty")


def _none_left() -> ValueError:
    return ValueError("they rule out every token")


def request_seed(base: int, key: str, repeat: int) -> int:
    """Returns a seed made of the run's seed, the request's content and the number of its repetition.

    It does not depend on batch, order or rank, so a document gets the same sample in every split of work.
    """
    digest = hashlib.sha256(f"{base}|{repeat}|{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
