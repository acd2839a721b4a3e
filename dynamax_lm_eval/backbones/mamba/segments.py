"""Runs of Mamba blocks on places that stay where they are: what one is called with, and the run itself.

Every row moves its states on by one token at a time: by those that left, the earliest first, and then by the one in
flight. Each such step has a place for every row; in the steps before its own first token a row moves a scratch line on.

n places of tokens in flight, s steps of tokens that left, m = s * n places of these, U what states are updated from,
I inner width.
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
from dynamax_lm_eval.backbones.mamba.groups import KernelRows
from dynamax_lm_eval.backbones.mamba.mixers import Mixer
from dynamax_lm_eval.backbones.mamba.rows import RaggedRows
from dynamax_lm_eval.backbones.mamba.state_cache import StateTable
from dynamax_lm_eval.backbones.segments import Places, Segment, SegmentOutput, as_words, bucket

#: Most tokens that left of a row: each goes over its states twice, where a scan by chunks goes over them ten times.
MOST_LEFT = 4

#: Moves states on by what a mixer projected (n + m, U) and returns what it reads of the tokens in flight (n, I).
Advance = Callable[[Mixer, Tensor], Tensor]


class StepsOfRows(NamedTuple):
    """Tokens in flight, each alone in its row, and tokens that left, as they take places.

    All numbers lie side by side: which tokens left (m), step after step; the lines of the rows for every step, that of
    the tokens in flight last (m + n); and the same in 32 bits.
    """

    num_tokens: int  # n
    num_left: int  # m
    numbers: Sequence[IntArray]
    most_left: int  # of one row

    @classmethod
    def of(
        cls, lines: IntArray, left: IntArray, columns: IntArray, positions: IntArray, scratch_line: int
    ) -> StepsOfRows:
        """Returns the places of tokens in flight and of those that left.

        Args:
            lines: of the rows of the tokens in flight.
            left: which of the deferred tokens they are that left.
            columns: which of the tokens in flight is in the row of each.
            positions: of these in their rows.
            scratch_line: of no row.
        """
        n, counts = bucket(len(lines)), np.bincount(columns, minlength=len(lines))
        most_left = int(counts.max())
        num_steps = bucket(most_left)
        order = np.lexsort((positions, columns))
        own = columns[order]
        steps = num_steps - (np.cumsum(counts)[own] - np.arange(len(own)))  # a row's last token is in the last step
        chosen, at = np.zeros((num_steps, n), dtype=np.int64), np.full((num_steps + 1, n), scratch_line)
        chosen[steps, own] = left[order]
        at[steps, own] = lines[own]
        at[-1, : len(lines)] = lines
        numbers = [chosen.reshape(-1), at.reshape(-1), as_words(at.reshape(-1).astype(np.int32))]
        return cls(n, num_steps * n, numbers, most_left)


class MambaSegment(Segment):
    """A run of Mamba blocks on places."""

    def __init__(
        self,
        blocks: Sequence[Callable[[Tensor, Tensor | None, Advance, MappedProject | None], Tensor]],
        tables: Sequence[StateTable],
        maps: Sequence[MappedProject | None],
        places: Places,
        steps: StepsOfRows,
    ) -> None:
        """
        Args:
            blocks: each takes tokens in flight (1, n, D), those that left (m, D), what moves states on, and its map.
            tables: of each.
            maps: what each projects of tokens that left with, where that is learned.
            places: of all tokens.
            steps: how numbers lie in ``places``.
        """
        self._blocks = list(zip(blocks, tables, maps, strict=True))
        self._places = places
        n, m = steps.num_tokens, steps.num_left
        all_lines = places.numbers[m : m + m + n]
        indices = places.numbers[m + m + n :].view(torch.int32)[: m + n]
        rows, is_new = RaggedRows([1] * n, places.numbers.device), np.zeros(n, dtype=np.bool_)
        #: What moves on, step after step, with where it stands in what mixers project.
        self._steps: list[tuple[slice, Tensor, KernelRows]] = []
        for start in range(0, m + n, n):
            own, lines = slice(n + start, 2 * n + start), all_lines[start : start + n]
            kernel_rows = KernelRows(rows, np.zeros(n, dtype=np.int64), lines, is_new, indices[start : start + n])
            self._steps.append((own if start < m else slice(0, n), lines, kernel_rows))

    def run(self) -> SegmentOutput:
        before = hidden = self._places.hidden
        left = None if self._places.left is None else self._places.left[0]
        for run, table, mapped in self._blocks:
            before = hidden
            hidden = run(hidden, left, partial(self._advance, table), mapped if left is not None else None)
        return SegmentOutput(before, hidden)

    def _advance(self, table: StateTable, mixer: Mixer, update: Tensor) -> Tensor:
        for own, lines, rows in self._steps:
            given = update[own]
            if mixer.runs_on_kernels(given):
                read = mixer.advance_in_place(given, rows, table.all)
            else:
                read, after = mixer.advance(given, rows.rows, table.read(lines))
                assert after is not None, "nobody trains here"
                table.write(lines, after)
        return read

    def save(self) -> Callable[[], None]:
        lines = self._steps[-1][1]
        saved = [(table, table.read(lines)) for _, table, _ in self._blocks]

        def restore() -> None:
            for table, state in saved:
                table.write(lines, state)

        return restore
