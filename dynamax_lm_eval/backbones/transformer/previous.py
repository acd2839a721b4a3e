"""States of tokens that left, taken over from earlier tokens: ``state_mode=copy_previous``.

A block that a token skipped gets the K and V that it wrote last in the same row: those of the nearest earlier token
that ran it, with K turned from that token's position to this one's. A row's first token always runs every block. This
is what "copying states" is in public code of the paper's authors (docs/text_and_code.md).

Needs rotary embeddings of one kind for all blocks, as Llama has them: angles that rise linearly with the position, so
that K at a position is K at another one turned by the angles of their distance.

t tokens that left, H_kv K/V heads, P head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import BoolArray, IntArray, RowLayout, together_on_device
from dynamax_lm_eval.backbones.transformer.kv_cache import AttentionStates

#: Turns K (t, H_kv, P) by distances (t,) in tokens.
Turn = Callable[[Tensor, Tensor], Tensor]


class PreviousStates:
    """The tokens of one pass that leave such states, and which tokens of their rows they get them from."""

    def __init__(self, states: AttentionStates, layout: RowLayout, starts: IntArray, turn: Turn) -> None:
        """``starts``: (N,) the first cache slots of the tokens' rows."""
        self._states = states
        self._layout = layout
        self._starts = starts
        self._turn = turn
        #: Tokens whose later blocks have no states of theirs yet, because tokens before them may still run these.
        self._waiting: IntArray = np.empty(0, dtype=np.int64)

    @property
    def is_waiting(self) -> bool:
        """Whether blocks have to be asked for further tokens before the pass ends."""
        return len(self._waiting) > 0

    @cached_property
    def _is_alone(self) -> BoolArray:
        """Which rows (R,) have one token in this pass."""
        is_alone: BoolArray = np.bincount(self._layout.row_of, minlength=len(self._layout.slots)) == 1
        return is_alone

    def leave(self, tokens: IntArray, layer: int) -> None:
        """Notes that tokens (t,) of rows in this mode leave after ``layer`` blocks."""
        rows = self._layout.row_of[tokens]
        ours = np.asarray([mode == "copy_previous" for mode in self._layout.state_modes])[rows]
        tokens, rows = tokens[ours], rows[ours]
        if len(tokens) == 0:
            return
        self._states.ran_to[self._starts[tokens] + self._layout.positions[tokens]] = layer
        # All tokens before one that is alone have been through their passes.
        alone = self._is_alone[rows]
        for block in range(layer + 1, self._layout.runs_block.shape[1]):
            self._copy(block, tokens[alone])
        self._waiting = np.union1d(self._waiting, tokens[~alone])

    def give(self, block: int) -> None:
        """Gives a block, in which the tokens in flight have written, the states of those that left before it."""
        self._copy(block, self._waiting)

    def _copy(self, block: int, tokens: IntArray) -> None:
        tokens = tokens[self._layout.is_given_states(block, self._layout.row_of[tokens])]
        if len(tokens) == 0:
            return
        distances = self._distances(block, tokens)
        targets = self._starts[tokens] + self._layout.positions[tokens]
        keys, values = self._states.key_cache(block), self._states.value_cache(block)
        source, target, turned_by = together_on_device([targets - distances, targets, distances], keys.device)
        self._states.write(
            block,
            target,
            self._turn(keys.index_select(0, source), turned_by),
            values.index_select(0, source),
        )

    def _distances(self, block: int, tokens: IntArray) -> IntArray:
        """Returns how far before each of tokens (t,) the last token of its row stands that runs ``block``, (t,)."""
        rows, positions = self._layout.row_of[tokens], self._layout.positions[tokens]
        distances = np.empty_like(positions)
        for row in np.unique(rows):
            own = rows == row
            start, end = self._layout.slots[row], int(positions[own].max())
            runs = self._states.ran_to[start : start + end] >= block
            last = np.maximum.accumulate(np.where(runs, np.arange(end), -1))[positions[own] - 1]
            assert (last >= 0).all(), "a row's first token runs every block"
            distances[own] = positions[own] - last
        return distances


def turned(keys: Tensor, cos: Tensor, signed: Tensor) -> Tensor:
    """Returns K (t, H_kv, P) turned further.

    Args:
        keys: K that rotary embeddings have turned already.
        cos: (t, 1, P) of the angles.
        signed: (t, 1, P) their sine, negative in the first half, as halves of a head are turned together.
    """
    wide = keys.float()
    return (wide * cos + torch.roll(wide, wide.shape[-1] // 2, -1) * signed).to(keys.dtype)
