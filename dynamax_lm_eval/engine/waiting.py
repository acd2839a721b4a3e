"""Rows that wait for a batch that is as full as can be: at the exit that their token has passed, or to be read out.

A block takes hardly longer for a full batch than for a few tokens, and so does the LM head. Where some rows of a batch
leave, the others wait for more rows at the same depth, while a fuller batch runs elsewhere (rebatching). It needs more
rows in flight than a batch has.

D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

Row = TypeVar("Row")

#: Where rows wait whose token is done and has not been read out: behind all blocks.
READ_OUT = 1 << 30

#: The part of the fullest batch that could run instead from which on rows go on without waiting for more.
_FULL_ENOUGH = 0.85


@dataclass(frozen=True)
class WaitingRow(Generic[Row]):
    """A row and the hidden state (1, 1, D) of its token where it waits; None before the first block."""

    row: Row
    hidden: Tensor | None = None


class WaitingRows(Generic[Row]):
    """The rows in flight, by the number of blocks that their token has run through; 0 before a token is fed."""

    def __init__(self, batch_size: int) -> None:
        """``batch_size``: most rows of a batch."""
        self._batch_size = batch_size
        self._at: dict[int, list[WaitingRow[Row]]] = {0: [], READ_OUT: []}
        #: Rows of the batch that runs now, and how many more could be started.
        self._running = 0
        self._room = 0

    def __len__(self) -> int:
        return sum(map(len, self._at.values()))

    @property
    def has_batch(self) -> bool:
        """Whether enough rows wait somewhere to run without those that could be started."""
        return max(map(len, self._at.values())) >= _FULL_ENOUGH * self._batch_size

    def add(self, place: int, rows: Iterable[WaitingRow[Row]]) -> None:
        """Lets rows wait after so many blocks, or at ``READ_OUT``."""
        self._at.setdefault(place, []).extend(rows)

    def take(self, room: int) -> tuple[int, list[WaitingRow[Row]]]:
        """Returns where the fullest batch waits, and its rows, those that have waited longest first.

        ``room``: how many rows could be started beside those that wait, in the batch of those before the first block.
        """
        self._room = room
        place = max(self._at, key=lambda place: (self._fullness(place), place))
        rows = self._at[place]
        self._at[place] = rows[self._batch_size :]
        self._running = len(rows[: self._batch_size])
        return place, rows[: self._batch_size]

    def holds(self, layer: int, survivors: int) -> bool:
        """Returns whether rows of the batch that runs, so many of which go on after ``layer`` blocks, wait there."""
        left = {READ_OUT: self._running - survivors, layer: survivors}
        fullest = max(self._fullness(place, left.get(place, 0)) for place in {*self._at, layer})
        return min(survivors, self._batch_size) < _FULL_ENOUGH * fullest

    def _fullness(self, place: int, more: int = 0) -> int:
        """Returns how many rows a batch would have that runs from a place on, if so many more waited there."""
        return min(len(self._at.get(place, ())) + more + (self._room if place == 0 else 0), self._batch_size)
