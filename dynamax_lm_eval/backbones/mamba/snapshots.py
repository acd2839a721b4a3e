"""States of rows as they were before tokens that may yet be taken back, in further lines of the same tables.

A row's drafted tokens are numbered from 0. The first is never taken back, so before number i the states after number
i - 1 are kept, for i from 1 on, and a row of constant-size states needs one line more per drafted token.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dynamax_lm_eval.backbones.base import IntArray


class Snapshots:
    """Which lines hold what rows were before their drafted tokens."""

    def __init__(self) -> None:
        self._lines: dict[int, list[int]] = {}  # line of a row -> those of its snapshots

    def lines(self, of_rows: IntArray, drafted: IntArray, new_line: Callable[[], int]) -> IntArray:
        """Returns the lines (n,) in which states are to be kept before tokens; -1 where none are.

        Args:
            of_rows: (n,) lines of the tokens' rows.
            drafted: (n,) their numbers.
            new_line: allocates a line, the same in every table.
        """
        found = np.full(len(drafted), -1, dtype=np.int64)
        for i in np.flatnonzero(drafted > 0).tolist():
            own = self._lines.setdefault(int(of_rows[i]), [])
            while len(own) < drafted[i]:
                own.append(new_line())
            found[i] = own[drafted[i] - 1]
        return found

    def after(self, line: int, kept: int) -> int:
        """Returns the line that holds what a row was after the first ``kept`` drafted tokens."""
        return self._lines[line][kept - 1]

    def pop(self, line: int) -> list[int]:
        """Returns the lines of a row that has ended, which are free now."""
        return self._lines.pop(line, [])
