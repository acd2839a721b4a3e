"""Rows that wait: for a batch that is as full as can be, at the exit that their token has passed.

A block takes hardly longer for a full batch than for a few tokens. Where some rows of a batch leave, the others wait
for more rows at the same depth, while a fuller batch runs elsewhere. It needs more rows in flight than a batch has.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

Row = TypeVar("Row")

#: The part of the fullest batch that may run now from which on rows go on without waiting for more.
_FULL_ENOUGH = 0.75


@dataclass(frozen=True)
class WaitingRow(Generic[Row]):
    """A row whose token has run through some blocks, with its hidden state there, (1, 1, D); None before the first."""

    row: Row
    hidden: Tensor | None


class WaitingRows(Generic[Row]):
    """The rows in flight, by the number of blocks that their token has run through; 0 before a token is fed."""

    def __init__(self, batch_size: int) -> None:
        """``batch_size``: most rows of a batch."""
        self._batch_size = batch_size
        self._at: dict[int, list[WaitingRow[Row]]] = {0: []}
        #: Rows of the batch that runs now, and how many more could be started.
        self._running = 0
        self._room = 0

    def __len__(self) -> int:
        return sum(map(len, self._at.values()))

    def add(self, layer: int, rows: Iterable[WaitingRow[Row]]) -> None:
        """Lets rows wait after ``layer`` blocks."""
        self._at.setdefault(layer, []).extend(rows)

    def take(self, room: int) -> tuple[int, list[WaitingRow[Row]]]:
        """Returns the rows that run next, those that have waited longest first, and how many blocks they have run.

        ``room``: how many rows could be started beside those that wait, with the batch of those before the first block.
        """
        self._room = room
        sizes = {layer: self._size(len(rows) + (room if layer == 0 else 0)) for layer, rows in self._at.items()}
        layer = max(sizes, key=lambda layer: (sizes[layer], layer))
        rows = self._at[layer]
        self._at[layer] = rows[self._batch_size :]
        self._running = len(rows[: self._batch_size])
        return layer, rows[: self._batch_size]

    def holds(self, layer: int, survivors: int) -> bool:
        """Returns whether rows of the batch that runs, so many of which go on after ``layer`` blocks, wait there."""
        here = len(self._at.get(layer, ()))
        ready = self._running - survivors + self._room  # those that leave are fed their next token, or make room
        others = max(
            self._size(len(rows) + (ready if other == 0 else 0)) for other, rows in self._at.items() if other != layer
        )
        now, later = self._size(survivors), max(others, self._size(survivors + here))
        return now < _FULL_ENOUGH * later

    def _size(self, rows: int) -> int:
        return min(rows, self._batch_size)
