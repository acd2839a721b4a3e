"""The attention of a ragged batch: each row's tokens over that row's own K and V, by position.

It is registered with transformers as an attention function, so that blocks run exactly as their family wrote
them. The layout of the batch is the plan of the context that blocks run in (:func:`attending`), or travels with the
call as the keyword argument ``plan``.

n tokens in flight, H heads, H_kv K/V heads, P head dim, C slots of the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dynamax_lm_eval.backbones.base import IntArray, on_device, together_on_device
from dynamax_lm_eval.backbones.transformer import masks, varlen
from dynamax_lm_eval.backbones.transformer.masks import MaskRule, Visibility

NAME = "dynamax_ragged"

#: Arguments of some families' attention that change its result and are not computed here.
_UNSUPPORTED = ("head_mask", "position_bias", "indices", "block_indices")

#: Queries that share one explicit mask; bounds the size of masks for windows and gaps.
_QUERY_CHUNK = 512

#: Rows that decode together are one batch while that attends to no more than so many times their keys.
_MOST_PADDING = 2
#: Positions up to which K and V of rows that lie apart are copied side by side, rather than read row by row.
_MOST_COPIED = 4096


@dataclass(frozen=True)
class AttentionSegment:
    """Some queries of one row and the cache slots they attend to."""

    queries: slice
    places: slice  # the cache slots
    mask: Tensor | None  # (queries, places) bool, True where attended; None: see causal
    causal: bool  # queries and places start at position 0 together


@dataclass(frozen=True)
class DecodeBatch:
    """The m tokens that are alone in their rows, as one batch; their rows lie at equal distances in the cache.

    The batch has S rows: those between the first and the last, of which lines without a token are not read, or copies
    of the m rows. All attend to the same K positions; the mask leaves out what is not theirs.
    """

    rows: slice  # of the cache: all slots between the first row and the last
    row_stride: int
    copied: Tensor | None  # (m,) which of these rows are copied; None: the batch is a view of all of them
    keys: slice  # of a row: the K positions
    tokens: Tensor | None  # (m,) the tokens; None: all in flight
    lines: Tensor | None  # (m,) their lines in the batch; None: they are all lines, in order
    mask: Tensor  # (S, 1, 1, K) bool, True where attended


class AttentionPlan:
    """What each token in flight attends to; made once for a set of tokens and used by many blocks."""

    def __init__(
        self,
        starts: IntArray,
        positions: IntArray,
        masked_kv_slots: IntArray | None,
        device: torch.device,
        row_stride: int | None = None,
    ) -> None:
        """
        Args:
            starts: (n,) first cache slot of each token's row.
            positions: (n,) position of each token in its row.
            masked_kv_slots: cache slots that no query may attend to, rising, or None.
            device: where masks are needed.
            row_stride: cache slots from one row to the next, where that is the same for all.
        """
        self._row_stride = row_stride
        self._starts = starts
        self._positions = positions
        self._masked = masked_kv_slots
        self._device = device
        self._segments: dict[Visibility, list[AttentionSegment]] = {}
        self._decodings: dict[Visibility, DecodeBatch | None] = {}
        alone = np.diff(starts, prepend=-1) != 0
        alone &= np.diff(starts, append=-1) != 0
        self._alone = np.flatnonzero(alone)
        self._additive: dict[tuple[Visibility, torch.dtype], Tensor] = {}
        self._runs: dict[int | None, varlen.QueryRuns] = {}

    def runs(self, window: Visibility) -> varlen.QueryRuns | None:
        """Returns all tokens for the kernel of ragged rows; None where they see what it cannot express."""
        if isinstance(window, MaskRule) or len(self._starts) == 0 or self._has_gaps:
            return None
        if window not in self._runs:
            args = self._starts, self._positions, window, self._device, self._row_stride
            self._runs[window] = varlen.QueryRuns.of(*args)
        return self._runs[window]

    @cached_property
    def _has_gaps(self) -> bool:
        """Whether some query may not attend to a slot before its own."""
        if self._masked is None:
            return False
        ends = self._starts + self._positions + 1
        return bool((np.searchsorted(self._masked, self._starts) < np.searchsorted(self._masked, ends)).any())

    def segments(self, window: Visibility) -> list[AttentionSegment]:
        """Returns the segments for what is visible, without the tokens of :meth:`decoding`."""
        if window not in self._segments:
            self._segments[window] = self._cut(window)
        return self._segments[window]

    def decoding(self, window: Visibility) -> DecodeBatch | None:
        """Returns the tokens that are alone in their rows, where they make a batch that wastes little."""
        if window not in self._decodings:
            self._decodings[window] = self._as_batch(window)
        return self._decodings[window]

    def additive_mask(self, decoding: DecodeBatch, window: Visibility, dtype: torch.dtype) -> Tensor:
        """Returns the mask as scores to add, (S, 1, 1, K), made once for all blocks."""
        key = (window, dtype)
        if key not in self._additive:
            zeros = torch.zeros(decoding.mask.shape, dtype=dtype, device=decoding.mask.device)
            self._additive[key] = zeros.masked_fill_(~decoding.mask, -math.inf)
        return self._additive[key]

    def _as_batch(self, window: Visibility) -> DecodeBatch | None:
        row_stride, tokens = self._row_stride, self._alone
        if row_stride is None or len(tokens) < 2:
            return None
        numbers, positions = self._starts[tokens] // row_stride, self._positions[tokens]
        first, last = int(numbers.min()), int(numbers.max())
        lows = np.maximum(0, positions - window + 1) if isinstance(window, int) else np.zeros_like(positions)
        low, end = int(lows.min()), int(positions.max()) + 1
        lines, num_lines = numbers - first, last - first + 1
        most = _MOST_PADDING * int((positions + 1 - lows).sum())
        lie_apart = num_lines * (end - low) > most
        if lie_apart:
            lines, num_lines = np.arange(len(tokens)), len(tokens)
            if num_lines * (end - low) > min(most, _MOST_COPIED):
                return None
        keys = np.arange(low, end)
        attended = np.ones((num_lines, end - low), dtype=np.bool_)
        attended[lines] = (keys <= positions[:, None]) & (keys >= lows[:, None])
        if isinstance(window, MaskRule):
            attended[lines] &= window.attended(positions, keys)
        if self._masked is not None:
            masked = self._masked_between(first * row_stride, (last + 1) * row_stride)
            row, key = np.divmod(masked - first * row_stride, row_stride)
            line_of = np.full(last - first + 1, -1, dtype=np.int64)
            line_of[numbers - first] = lines
            within = (key >= low) & (key < end) & (line_of[row] >= 0)
            attended[line_of[row[within]], key[within] - low] = False
        several = len(tokens) < len(self._starts), not np.array_equal(lines, np.arange(len(attended)))
        tokens_there, lines_there = together_on_device([tokens, lines], self._device) if any(several) else (None, None)
        return DecodeBatch(
            rows=slice(first * row_stride, (last + 1) * row_stride),
            row_stride=row_stride,
            copied=on_device(numbers - first, self._device) if lie_apart else None,
            keys=slice(low, end),
            tokens=tokens_there if several[0] else None,
            lines=lines_there if several[1] else None,
            mask=on_device(attended, self._device)[:, None, None],
        )

    def _cut(self, window: Visibility) -> list[AttentionSegment]:
        segments: list[AttentionSegment] = []
        batched = self.decoding(window) is not None
        bounds = np.flatnonzero(np.diff(self._starts, prepend=-1, append=-1))
        for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            if batched and last - first == 1:
                continue
            start = int(self._starts[first])
            positions = self._positions[first:last]
            end = int(positions[-1]) + 1
            whole = window is None or (isinstance(window, int) and end <= window)
            masked = self._masked_between(start, start + end)
            if whole and len(masked) == 0 and len(positions) == end and end > 1:
                segments.append(AttentionSegment(slice(first, last), slice(start, start + end), None, causal=True))
            else:
                segments += self._cut_row(first, start, positions, window)
        return segments

    def _cut_row(self, first: int, start: int, positions: IntArray, window: Visibility) -> list[AttentionSegment]:
        segments: list[AttentionSegment] = []
        for i in range(0, len(positions), _QUERY_CHUNK):
            queries = positions[i : i + _QUERY_CHUNK]
            low = max(0, int(queries[0]) - window + 1) if isinstance(window, int) else 0
            end = int(queries[-1]) + 1
            masked = self._masked_between(start + low, start + end) - (start + low)
            mask = None
            if len(queries) > 1 or len(masked) or isinstance(window, MaskRule):
                keys = np.arange(low, end)
                attended = keys <= queries[:, None]
                if isinstance(window, MaskRule):
                    attended &= window.attended(queries, keys)
                elif window is not None:
                    attended &= queries[:, None] - keys < window
                attended[:, masked] = False
                mask = on_device(attended, self._device)
            kv_slots = slice(start + low, start + end)
            segments.append(AttentionSegment(slice(first + i, first + i + len(queries)), kv_slots, mask, causal=False))
        return segments

    def _masked_between(self, low: int, high: int) -> IntArray:
        if self._masked is None:
            return np.empty(0, dtype=np.int64)
        return self._masked[np.searchsorted(self._masked, low) : np.searchsorted(self._masked, high)]


@dataclass
class Attending:
    """What the attention of the block that runs now is computed by."""

    plan: AttentionPlan
    visibility: Visibility
    #: Whether attention has been called.
    called: bool = False


_NOW: ContextVar[Attending | None] = ContextVar("attending", default=None)


@contextmanager
def attending(plan: AttentionPlan, visibility: Visibility) -> Iterator[Attending]:
    """Runs blocks whose attention sees what ``plan`` says of a batch, under one mask."""
    now = Attending(plan, visibility)
    token = _NOW.set(now)
    try:
        yield now
    finally:
        _NOW.reset(token)


def ragged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    plan: AttentionPlan | varlen.SingleQueries | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes attention over caches, behind transformers' attention interface.

    Args:
        query: (1, H, n, P)
        key: (C, H_kv, P) or (1, H_kv, C, P), the cache that the cache object returned, or what was made of it.
        value: as ``key``.
        attention_mask: None, or a :class:`MaskRule`; the plan says what is attended to.
        scaling: factor of the scores; None: P ** -0.5.
        sliding_window: the block's window in tokens, where ``plan`` is given.
        plan: the layout of the batch; None: that of :func:`attending`.
        softcap: scores s become softcap * tanh(s / softcap).
        s_aux, sinks: (H,) scores that take part in the softmax and stand for no key.

    Returns:
        (1, n, H, P), and no attention weights.

    Raises:
        TypeError: the family uses an attention that is not computed here, or the block was not run by the engine.
    """
    visibility: Visibility = sliding_window
    if plan is None:
        if (now := _NOW.get()) is None:
            raise TypeError(f"{type(module).__name__} attends outside a pass")
        plan, visibility, now.called = now.plan, now.visibility, True
    if attention_mask is not None and not isinstance(attention_mask, MaskRule):
        raise TypeError(f"{type(module).__name__} makes its attention mask by itself")
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise TypeError(f"{type(module).__name__} attends with {name}, which is not computed here")
    if key.ndim == 4:
        key, value = key[0].transpose(0, 1), value[0].transpose(0, 1)
    if isinstance(plan, varlen.SingleQueries):
        return plan.attend(visibility, query, key, value, scaling), None
    scores = Scores(scaling, softcap, s_aux if s_aux is not None else sinks)
    if scores.are_plain and varlen.can_run(query, key, value) and (runs := plan.runs(visibility)) is not None:
        return runs.attend(query[0].transpose(0, 1), key, value, scaling).unsqueeze(0), None
    _, heads, n, head_dim = query.shape
    groups = heads // key.shape[1]
    if (decoding := plan.decoding(visibility)) is not None:
        mask = plan.additive_mask(decoding, visibility, query.dtype)
        decoded = _decode(decoding, mask, query, key, value, scores)
        if decoding.tokens is None:
            return decoded, None
        output = query.new_empty(1, n, heads, value.shape[-1]).index_copy_(1, decoding.tokens, decoded)
    else:
        output = query.new_empty(1, n, heads, value.shape[-1])
    for segment in plan.segments(visibility):
        k = key[segment.places].transpose(0, 1).unsqueeze(0)  # (1, H_kv, places, P)
        v = value[segment.places].transpose(0, 1).unsqueeze(0)
        q = query[:, :, segment.queries]  # (1, H, queries, P)
        if not scores.are_plain:
            out = scores.attend(q, k, v, segment.mask, segment.causal)
            output[:, segment.queries] = out.transpose(1, 2)
        elif q.shape[2] == 1:
            # The heads that share K and V become the queries of one head: no copies of K and V.
            q = q.reshape(1, key.shape[1], groups, head_dim)
            expanded = None if segment.mask is None else segment.mask.expand(groups, -1)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=expanded, scale=scaling)
            output[:, segment.queries] = out.reshape(1, 1, heads, -1)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, segment.mask, is_causal=segment.causal, scale=scaling, enable_gqa=groups > 1
            )
            output[:, segment.queries] = out.transpose(1, 2)
    return output, None


@dataclass(frozen=True)
class Scores:
    """How scores become weights."""

    scaling: float | None
    softcap: float | None = None
    sinks: Tensor | None = None  # (H,)

    @property
    def are_plain(self) -> bool:
        """Whether torch's own attention computes them."""
        return self.softcap is None and self.sinks is None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        """Returns (B, H, Q, P) for queries (B, H, Q, P) and K, V (B, H_kv, K, P).

        ``mask``: bool, or scores to add, that broadcasts against (B, 1, Q, K).
        """
        grouped = query.unflatten(1, (key.shape[1], -1))  # (B, H_kv, G, Q, P)
        scaling = query.shape[-1] ** -0.5 if self.scaling is None else self.scaling
        scores = (grouped @ key.unsqueeze(2).transpose(-1, -2)).flatten(1, 2) * scaling  # (B, H, Q, K)
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        scores = scores.float()
        if self.sinks is not None:
            sinks = self.sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        weights = weights.to(value.dtype).unflatten(1, (key.shape[1], -1))
        attended: Tensor = weights @ value.unsqueeze(2)
        return attended.flatten(1, 2)


def _decode(decoding: DecodeBatch, mask: Tensor, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """Returns (1, m, H, P) for the tokens of a batch of rows."""
    heads, head_dim, kv_heads = query.shape[1], query.shape[3], key.shape[1]
    q = query[0].transpose(0, 1)  # (n, H, P)
    if decoding.tokens is not None:
        q = q.index_select(0, decoding.tokens)
    if decoding.lines is not None:
        q = q.new_zeros(len(mask), heads, head_dim).index_copy_(0, decoding.lines, q)
    k, v = (_of_rows(cache, decoding) for cache in (key, value))
    out: Tensor
    if scores.are_plain:
        # The heads that share K and V become the queries of one head.
        q = q.reshape(len(mask), kv_heads, heads // kv_heads, head_dim)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scores.scaling)
        out = out.reshape(len(mask), heads, -1)
    else:
        out = scores.attend(q.unsqueeze(2), k, v, mask)[:, :, 0]
    if decoding.lines is not None:
        out = out.index_select(0, decoding.lines)
    return out.unsqueeze(0)


def _of_rows(cache: Tensor, decoding: DecodeBatch) -> Tensor:
    """Returns what a cache (C, H_kv, P) holds of the rows of a batch, (S, H_kv, K, P)."""
    rows: Tensor = cache[decoding.rows].unflatten(0, (-1, decoding.row_stride))[:, decoding.keys]
    if decoding.copied is not None:
        rows = rows.index_select(0, decoding.copied)
    return rows.transpose(1, 2)


ALL_ATTENTION_FUNCTIONS.register(NAME, ragged_attention)
masks.register(NAME)
