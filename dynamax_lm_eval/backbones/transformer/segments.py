"""Runs of fused blocks on places that stay where they are: what one is called with, and the run itself.

n places of tokens in flight, m of tokens that left, H_kv K/V heads, P head dim, C slots of a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import IntArray
from dynamax_lm_eval.backbones.learned import MappedProject
from dynamax_lm_eval.backbones.segments import Places, Segment, SegmentOutput, as_words, bucket
from dynamax_lm_eval.backbones.transformer.fused_llama import FusedLlamaBlock
from dynamax_lm_eval.backbones.transformer.kv_cache import stored
from dynamax_lm_eval.backbones.transformer.varlen import QueryRuns, SingleQueries


class SingleTokens(NamedTuple):
    """Tokens in flight, each alone in its row, and tokens that left, as they take places.

    All numbers lie side by side: which tokens left (m); the cache slots of all places (n + m); their positions (n + m);
    and for each window where the keys of a place begin (n + 1) and how many there are (n), in 32 bits.
    """

    num_tokens: int  # n
    num_left: int  # m
    numbers: Sequence[IntArray]
    windows: tuple[int | None, ...]

    @classmethod
    def of(
        cls,
        starts: IntArray,
        positions: IntArray,
        left: IntArray,
        left_slots: IntArray,
        left_positions: IntArray,
        scratch_slot: int,
        windows: tuple[int | None, ...],
    ) -> SingleTokens:
        """Returns the places of tokens in flight and of those that left.

        Args:
            starts: first cache slots of the rows of tokens in flight.
            positions: of the tokens in their rows.
            left: which of the deferred tokens they are that left.
            left_slots: first cache slots of the rows of these.
            left_positions: of these in their rows.
            scratch_slot: a cache slot of no row.
            windows: keys that queries see in some block, their own among them; None: all up to their own.
        """
        count, n, m = len(starts), bucket(len(starts)), bucket(len(left))
        taken = np.append(np.arange(count), n + np.arange(len(left)))
        kv_slots, all_positions = np.full(n + m, scratch_slot), np.zeros(n + m, dtype=np.int64)
        all_positions[taken] = np.append(positions, left_positions)
        kv_slots[taken] = np.append(starts, left_slots) + all_positions[taken]
        numbers = [np.append(left, np.zeros(m - len(left), dtype=np.int64)), kv_slots, all_positions]
        for window in windows:
            low = np.zeros_like(positions) if window is None else np.maximum(0, positions + 1 - window)
            runs = np.full(2 * n + 1, scratch_slot, dtype=np.int32)
            runs[:count] = starts + low
            runs[n + 1 :] = 1
            runs[n + 1 : n + 1 + count] = positions + 1 - low
            numbers.append(as_words(runs))
        return cls(n, m, numbers, windows)

    def runs(self, numbers: Tensor, most_keys: int) -> dict[int | None, QueryRuns]:
        """Returns what queries see by window, as views of all ``numbers`` on the device."""
        n, start = self.num_tokens, sum(map(len, self.numbers[:3]))
        first_query = torch.arange(n + 1, dtype=torch.int32, device=numbers.device)
        found: dict[int | None, QueryRuns] = {}
        for window, words in zip(self.windows, self.numbers[3:], strict=True):
            runs = numbers[start : start + len(words)].view(torch.int32)
            found[window] = QueryRuns(first_query, runs[: n + 1], runs[n + 1 : 2 * n + 1], 1, most_keys, (-1, -1))
            start += len(words)
        return found


class FusedSegment(Segment):
    """A run of fused blocks on places."""

    def __init__(
        self,
        blocks: Sequence[FusedLlamaBlock],
        caches: Sequence[tuple[Tensor, Tensor]],
        maps: Sequence[MappedProject | None],
        places: Places,
        tokens: SingleTokens,
        rotary: Callable[[Tensor], tuple[Tensor, Tensor]],
        most_keys: int,
    ) -> None:
        """
        Args:
            blocks: in their order.
            caches: K and V (C, H_kv, P) of each.
            maps: what each projects of tokens that left with, where that is learned.
            places: of all tokens.
            tokens: how numbers lie in ``places``.
            rotary: gives cos and sine (1, n + m, 1, P) of positions (n + m,), as blocks take them.
            most_keys: no token sees more.
        """
        self._blocks = list(zip(blocks, caches, maps, strict=True))
        self._places = places
        self._num_tokens = tokens.num_tokens
        n, m = tokens.num_tokens, tokens.num_left
        _, self._kv_slots, self._positions = places.numbers[: m + 2 * (n + m)].split([m, n + m, n + m])
        self._plan = SingleQueries(tokens.runs(places.numbers, most_keys))
        self._rotary = rotary

    def run(self) -> SegmentOutput:
        cos, sin = self._rotary(self._positions)
        before = hidden = self._places.hidden
        for block, caches, mapped in self._blocks:
            left, n = self._places.left, len(self._kv_slots)
            if mapped is not None and left is not None:
                n = self._num_tokens
                key, value = block.states(left, cos[:, n:], sin[:, n:], mapped)
                stored(caches, self._kv_slots[n:], key, value)
                left = None
            write = partial(stored, caches, self._kv_slots[:n])
            before = hidden
            hidden = block(hidden, cos[:, :n], sin[:, :n], write, self._plan, left)
        return SegmentOutput(before, hidden)
