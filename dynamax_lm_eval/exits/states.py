"""The states of recurrent classifiers for the rows in flight: conv windows and SSM states, per exit layer.

Only tokens that reach a classifier touch its state. Knows rows by the slot that the backbone's states gave
them; knows no policies.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import IntArray
from dynamax_lm_eval.backbones.mamba.rows import RaggedRows
from dynamax_lm_eval.backbones.mamba.ssm import MixerState
from dynamax_lm_eval.backbones.mamba.state_cache import StateTable, lines_of
from dynamax_lm_eval.exits.classifiers import ExitClassifiers


class ClassifierStates:
    """A table of states for each classifier that has run, with one line per allocated row."""

    def __init__(self, classifiers: ExitClassifiers | None) -> None:
        self._classifiers = classifiers
        self._line_of: dict[int, int] = {}  # slot -> line
        self._kept: dict[int, int] = {}  # tokens of a kept prefix -> line
        self._free: list[int] = []
        self._num_lines = 0
        self._tables: dict[tuple[str, int], StateTable] = {}
        # The exits of a pass mostly see the same rows.
        self._last: tuple[IntArray, slice | Tensor, RaggedRows] | None = None

    def allocate_row(self, slot: int) -> None:
        """Allocates a line for a new row, whose states are those of a row that has seen nothing."""
        self._last = None
        self._line_of[slot] = self._allocate_line()

    def _allocate_line(self) -> int:
        line = self._free.pop() if self._free else self._num_lines
        self._num_lines = max(self._num_lines, line + 1)
        for table in self._tables.values():
            table.clear(line)
        return line

    def copy_row(self, source: int, slot: int) -> None:
        """Gives a new row the states of another."""
        self._copy_line(self._line_of[source], self._line_of[slot])

    def _copy_line(self, source: int, line: int) -> None:
        for table in self._tables.values():
            table.copy(source, line)

    def free_row(self, slot: int) -> None:
        """Frees the line of a row that has ended."""
        self._free.append(self._line_of.pop(slot))

    def keep(self, slot: int, num_tokens: int) -> None:
        """Keeps the states of a row, which has seen ``num_tokens`` tokens, for later rows that begin with them."""
        self._kept[num_tokens] = self._allocate_line()
        self._copy_line(self._line_of[slot], self._kept[num_tokens])

    def give(self, num_tokens: int, slot: int) -> None:
        """Gives a new row the states that are kept of a prefix of ``num_tokens`` tokens."""
        self._copy_line(self._kept[num_tokens], self._line_of[slot])

    def forget(self, num_tokens: int) -> None:
        """Drops the states that are kept of a prefix of ``num_tokens`` tokens."""
        self._free.append(self._kept.pop(num_tokens))

    @torch.inference_mode()
    def run(self, kind: str, layer: int, hidden: Tensor, slots: IntArray) -> Tensor:
        """Returns logits (T, 2) of a classifier for hidden states (T, D); recurrent ones use their rows' states.

        Args:
            kind: the classifier's kind.
            layer: the exit layer.
            hidden: (T, D) tokens of the rows, side by side.
            slots: (T,) the slot of each token's row.
        """
        assert self._classifiers is not None
        classifier = self._classifiers.at(kind, layer)
        # The classifiers are in float32 as trained; autocast of the backbone does not reach them.
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.float()
            logits: Tensor
            if not classifier.recurrent:
                logits, _ = classifier(hidden)
                return logits
            lines, rows = self._lines_and_rows(slots, hidden.device)
            table = self._table(kind, layer, hidden.device)
            logits, after = classifier(hidden, rows, table.read(lines))
            assert after is not None
            table.write(lines, after)
            return logits

    def _lines_and_rows(self, slots: IntArray, device: torch.device) -> tuple[slice | Tensor, RaggedRows]:
        """Returns the lines of the rows whose tokens these are, and where the rows begin and end, on ``device``."""
        if self._last is None or self._last[2].device != device or not np.array_equal(self._last[0], slots):
            starts = np.flatnonzero(np.diff(slots, prepend=-1))
            numbers = np.asarray([self._line_of[slot] for slot in slots[starts].tolist()], dtype=np.int64)
            lengths = np.diff(starts, append=len(slots))
            self._last = slots, lines_of(numbers, device), RaggedRows(lengths.tolist(), device)
        return self._last[1:]

    def _table(self, kind: str, layer: int, device: torch.device) -> StateTable:
        """Returns the table of a classifier, which is on ``device``, with a line for every allocated row."""
        assert self._classifiers is not None
        if (kind, layer) not in self._tables:
            classifier = self._classifiers.at(kind, layer)

            def make(num_rows: int, device: torch.device) -> MixerState:
                state = classifier.new_state(num_rows, device)
                assert state is not None, "only recurrent classifiers have tables"
                return state

            self._tables[kind, layer] = StateTable(make, device)
        table = self._tables[kind, layer]
        table.reserve(self._num_lines)
        return table
