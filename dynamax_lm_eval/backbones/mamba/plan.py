"""Which tokens move recurrent states on, and in what order: those in flight and those that left, by position.

N tokens of a flat batch, n in flight, m that left, R rows, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import BoolArray, IntArray, RowLayout, on_device
from dynamax_lm_eval.backbones.mamba.groups import KernelRows
from dynamax_lm_eval.backbones.mamba.mixers import Mixer
from dynamax_lm_eval.backbones.mamba.rows import RaggedRows
from dynamax_lm_eval.backbones.mamba.state_cache import StateTable, lines_of
from dynamax_lm_eval.models.placement import moved

#: Of tokens' rows (n,), by line, and numbers of drafts (n,): the lines (n,) that keep the states before them, or -1.
SnapshotLines = Callable[[IntArray, IntArray], IntArray]


def new_rows(layout: RowLayout) -> BoolArray:
    """Returns the rows (R,) whose first token is fed in this pass, so that they have no states yet."""
    firsts = np.unique(layout.row_of, return_index=True)[1]
    is_new: BoolArray = layout.positions[firsts] == 0
    return is_new


@dataclass(frozen=True)
class LeftTokens:
    """The tokens that left and whose states later blocks recompute."""

    tokens: IntArray  # (m,)
    hidden: Tensor | None  # (1, m, D); None: there are none

    @classmethod
    def none(cls) -> LeftTokens:
        return cls(np.empty(0, dtype=np.int64), None)

    def joined(self, tokens: IntArray, hidden: Tensor, layout: RowLayout) -> LeftTokens:
        """Returns these and those of the tokens (t,), hidden states (1, t, D), whose rows recompute states."""
        modes = np.asarray(layout.state_modes)[layout.row_of[tokens]]
        more = LeftTokens(tokens, hidden).where(modes == "recompute")
        if self.hidden is None or more.hidden is None:
            return more if self.hidden is None else self
        hidden = torch.cat([moved(self.hidden, more.hidden.device), more.hidden], dim=1)
        return LeftTokens(np.concatenate([self.tokens, more.tokens]), hidden)

    def on(self, device: torch.device) -> LeftTokens:
        """Returns these with their hidden states on a device."""
        if self.hidden is None or self.hidden.device == device:
            return self
        return LeftTokens(self.tokens, moved(self.hidden, device))

    def at(self, block: int, layout: RowLayout) -> LeftTokens:
        """Returns those that a block (1-based) is given states of: none where it is pruned or runs as a final block."""
        if self.hidden is None:
            return self
        return self.where(layout.is_given_states(block, layout.row_of[self.tokens]))

    def where(self, mask: Any) -> LeftTokens:
        """Returns those for which ``mask`` (m,) is true."""
        if mask.all():
            return self
        indices = np.flatnonzero(mask)
        if self.hidden is None or len(indices) == 0:
            return LeftTokens.none()
        hidden = self.hidden.index_select(1, on_device(indices, self.hidden.device))
        return LeftTokens(self.tokens[indices], hidden)


class LeftPlaces(NamedTuple):
    """Where tokens stand that left, in this pass or in an earlier one."""

    rows: IntArray  # (m,) in the pass
    positions: IntArray  # (m,)

    @classmethod
    def of(cls, tokens: IntArray, layout: RowLayout) -> LeftPlaces:
        """Returns those of tokens (m,) of the batch."""
        return cls(layout.row_of[tokens], layout.positions[tokens])

    def equals(self, other: LeftPlaces) -> bool:
        return all(np.array_equal(a, b) for a, b in zip(self, other, strict=True))


NOTHING_LEFT = LeftPlaces(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))


@dataclass(frozen=True)
class RecurrentPlan:
    """The rows of the tokens that a block updates its states from; valid while these are the same tokens."""

    tokens: IntArray
    left: LeftPlaces
    rows: RaggedRows
    numbers: IntArray  # (R,) lines of the rows in the tables
    lines: slice | Tensor  # the same
    is_new: BoolArray  # (R,) rows that have no state yet
    positions: IntArray  # (n + m,) in order
    order: Tensor | None  # (n + m,) in flight, then left, to the order of the rows; None: they are in order
    in_flight: Tensor | None  # (n,) indices of the tokens in flight in that order; None: they are all, in order
    #: (n + m,) lines in which the states before each token are kept, in order; -1: they are not. None: of no token.
    kept_in: IntArray | None = None

    @classmethod
    def of(
        cls,
        tokens: IntArray,
        left: LeftPlaces,
        layout: RowLayout,
        lines: Sequence[int],
        is_new: BoolArray,
        device: torch.device,
        last: RecurrentPlan | None,
        snapshots: SnapshotLines | None = None,
    ) -> RecurrentPlan:
        """Returns the plan for tokens in flight (n,) and m tokens that left.

        Args:
            tokens: in flight.
            left: where those stand that left.
            layout: of the batch.
            lines: (R,) of its rows in the tables.
            is_new: as of :func:`new_rows`.
            device: where the states are.
            last: the plan before, which is returned if it is for the same tokens.
            snapshots: gives the lines in which states are kept before drafted tokens, of which none left.
        """
        is_same = last is not None and last.tokens is tokens and last.rows.device == device
        if last is not None and is_same and last.left.equals(left):
            return last
        row_of = np.concatenate([layout.row_of[tokens], left.rows])
        positions = np.concatenate([layout.positions[tokens], left.positions])
        order = np.lexsort((positions, row_of)) if len(left.rows) else np.arange(len(row_of))
        rows, lengths = np.unique(row_of, return_counts=True)
        # One token per row: rows may stand in any order, and in the order of their lines the table is one view.
        numbers = np.asarray(lines, dtype=np.int64)[rows]
        if len(row_of) == len(rows):
            by_line = np.argsort(numbers)
            order, numbers, rows = order[by_line], numbers[by_line], rows[by_line]
        kept_in = None
        if layout.drafted is not None and (drafted := layout.drafted[tokens]).any():
            assert snapshots is not None, "backbones that take rows back have them"
            kept_in = snapshots(np.asarray(lines, dtype=np.int64)[layout.row_of[tokens]], drafted)
            kept_in = np.append(kept_in, np.full(len(left.rows), -1))[order]
        is_reordered = not np.array_equal(order, np.arange(len(order)))
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order))
        return cls(
            tokens=tokens,
            left=left,
            rows=RaggedRows(lengths.tolist(), device),
            numbers=numbers,
            lines=lines_of(numbers, device),
            is_new=is_new[rows],
            positions=positions[order],
            order=on_device(order, device) if is_reordered else None,
            in_flight=on_device(rank[: len(tokens)], device) if is_reordered or len(left.rows) else None,
            kept_in=kept_in,
        )

    @property
    def all_new(self) -> bool:
        """Whether none of the rows has a state yet."""
        return bool(self.is_new.all())

    @cached_property
    def kernel_rows(self) -> KernelRows:
        """The rows as kernels take them."""
        return KernelRows(self.rows, self.numbers, self.lines, self.is_new)

    def advance(self, mixer: Mixer, table: StateTable, update: Tensor) -> Tensor:
        """Moves the rows' states on and returns the read-outs (n + m, I) in the order of the rows.

        ``update``: what the mixer projected of the tokens in flight, and after them of those that left.
        """
        if self.order is not None:
            update = update.index_select(0, self.order)
        if self.kept_in is None:
            return self._advance(mixer, table, update)
        read: Tensor | None = None
        for step in self.steps:
            if len(step.kept):
                table.copy_lines(step.kept, step.kept_in)
            part = step.plan._advance(mixer, table, update if step.tokens is None else update[step.tokens])
            if step.tokens is None:
                return part
            read = part.new_empty(len(update), *part.shape[1:]) if read is None else read
            read[step.tokens] = part
        assert read is not None, "there are tokens"
        return read

    @cached_property
    def steps(self) -> list[KeepingStep]:
        """The plan in steps before each of which states are kept: of rows with several drafted tokens one at a time."""
        assert self.kept_in is not None
        row_of = np.repeat(np.arange(len(self.numbers)), self.rows.lengths)
        keeps = np.flatnonzero(self.kept_in >= 0)
        if (self.rows.lengths[row_of[keeps]] == 1).all():
            return [KeepingStep(self, None, self.numbers[row_of[keeps]], self.kept_in[keeps])]
        is_drafting = np.zeros(len(self.numbers), dtype=np.bool_)
        is_drafting[row_of[keeps]] = True
        rank = np.arange(len(row_of)) - np.repeat(np.cumsum(self.rows.lengths) - self.rows.lengths, self.rows.lengths)
        step_of = np.where(is_drafting[row_of], rank, -1)  # rows without drafts before all others, at once
        return [self._step(np.flatnonzero(step_of == number), row_of) for number in np.unique(step_of)]

    def _step(self, tokens: IntArray, row_of: IntArray) -> KeepingStep:
        """Returns the part of the plan for some of its tokens (t,), all of which are of rows (n + m,)."""
        assert self.kept_in is not None
        rows, lengths = np.unique(row_of[tokens], return_counts=True)
        numbers, device = self.numbers[rows], self.rows.device
        part = replace(
            self,
            rows=RaggedRows(lengths.tolist(), device),
            numbers=numbers,
            lines=lines_of(numbers, device),
            # A row that is in an earlier step has a state now, and one with drafts has had one before.
            is_new=self.is_new[rows],
            positions=self.positions[tokens],
            order=None,
            in_flight=None,
            kept_in=None,
        )
        keeps = tokens[self.kept_in[tokens] >= 0]
        return KeepingStep(part, on_device(tokens, device), self.numbers[row_of[keeps]], self.kept_in[keeps])

    def _advance(self, mixer: Mixer, table: StateTable, update: Tensor) -> Tensor:
        """Does what :meth:`advance` does, for updates in the order of the rows."""
        if mixer.runs_on_kernels(update):
            return mixer.advance_in_place(update, self.kernel_rows, table.all)
        if mixer.moves_lines_on(update, self.rows):
            read, windows = mixer.advance_lines(
                update, self.rows, table.windows(self.lines), table.all.ssm, self.numbers
            )
            table.write_windows(self.lines, windows)
            return read
        read, after = mixer.advance(update, self.rows, None if self.all_new else table.read(self.lines))
        assert after is not None
        table.write(self.lines, after)
        return read

    def of_tokens_in_flight(self, values: Tensor) -> Tensor:
        """Returns the values (n, ...) of the tokens in flight, of all (n + m, ...) in the order of the rows."""
        return values if self.in_flight is None else values.index_select(0, self.in_flight)


class KeepingStep(NamedTuple):
    """A part of a plan, and what is kept before it runs."""

    plan: RecurrentPlan
    tokens: Tensor | None  # (t,) of the whole plan, in order; None: all
    kept: IntArray  # lines that are kept
    kept_in: IntArray  # and where
