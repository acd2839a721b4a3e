"""The states of recurrent classifiers for the rows in flight: conv windows and SSM states, per exit layer.

Only tokens that reach a classifier touch its state. Knows rows by the slot that the backbone's states gave
them; knows no policies.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import BoolArray, IntArray
from dynamax_lm_eval.backbones.mamba import kernels
from dynamax_lm_eval.backbones.mamba.groups import KernelRows
from dynamax_lm_eval.backbones.mamba.rows import RaggedRows
from dynamax_lm_eval.backbones.mamba.snapshots import Snapshots
from dynamax_lm_eval.backbones.mamba.ssm import MixerState
from dynamax_lm_eval.backbones.mamba.state_cache import StateTable, clear_line, copy_line, lines_of
from dynamax_lm_eval.exits.classifiers import ExitClassifiers
from dynamax_lm_eval.exits.classifiers.mamba import MixerClassifier
from dynamax_lm_eval.exits.confirmers import Confirmer
from dynamax_lm_eval.types import MambaKernels


@dataclass
class _Rows:
    """The rows that reach a classifier in a pass."""

    slots: IntArray  # (T,)
    rows: RaggedRows
    numbers: IntArray  # (R,) their lines
    lines: slice | Tensor  # the same
    for_kernels: tuple[BoolArray, KernelRows] | None = None

    def in_place(self, is_new: BoolArray) -> KernelRows:
        """Returns them as kernels take them; ``is_new`` (R,): which have seen nothing."""
        if self.for_kernels is None or not np.array_equal(self.for_kernels[0], is_new):
            self.for_kernels = is_new, KernelRows(self.rows, self.numbers, self.lines, is_new)
        return self.for_kernels[1]


class ClassifierStates:
    """A table of states for each classifier that has run, with one line per allocated row."""

    def __init__(self, classifiers: ExitClassifiers | None, mamba_kernels: MambaKernels = "auto") -> None:
        """``mamba_kernels``: ``auto`` runs Mamba mixers by mamba-ssm and causal-conv1d on a GPU where installed."""
        self._classifiers = classifiers
        self._choice: MambaKernels = mamba_kernels
        self._kernels: dict[torch.device, kernels.ScanKernels | None] = {}
        self._line_of: dict[int, int] = {}  # slot -> line
        self._kept: dict[int, int] = {}  # tokens of a kept prefix -> line
        self._free: list[int] = []
        self._num_lines = 0
        self._tables: dict[tuple[str, int], StateTable] = {}
        self._snapshots = Snapshots()
        #: Numbers of the drafted tokens that rows feed now, of those that may be taken back, by slot.
        self.drafted: Mapping[int, int] = {}
        # Which of a row's snapshots a table has: a token that left earlier never got to the classifiers behind.
        self._kept_before: dict[tuple[str, int], dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
        # The exits of a pass mostly see the same rows.
        self._last: _Rows | None = None

    def allocate_row(self, slot: int) -> None:
        """Allocates a line for a new row, whose states are those of a row that has seen nothing."""
        self._last = None
        self._line_of[slot] = self._allocate_line()

    def _allocate_line(self) -> int:
        line = self._free.pop() if self._free else self._num_lines
        self._num_lines = max(self._num_lines, line + 1)
        clear_line(self._tables.values(), line)
        return line

    def copy_row(self, source: int, slot: int) -> None:
        """Gives a new row the states of another."""
        self._copy_line(self._line_of[source], self._line_of[slot])

    def _copy_line(self, source: int, line: int) -> None:
        copy_line(self._tables.values(), source, line)

    def free_row(self, slot: int) -> None:
        """Frees the line of a row that has ended."""
        self.settle(slot, None)
        line = self._line_of.pop(slot)
        self._free += [line, *self._snapshots.pop(line)]

    def settle(self, slot: int, kept: int | None) -> None:
        """Takes a row back to after the first ``kept`` of its drafted tokens, or keeps all; none are drafts then."""
        line = self._line_of[slot]
        for key, tables in self._kept_before.items():
            numbers = sorted(tables.pop(line, ()))
            # What no later token has touched is as it was.
            first = next((number for number in numbers if kept is not None and number >= kept), None)
            if first is not None:
                copy_line([self._tables[key]], self._snapshots.after(line, first), line)

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

    def confirmer(self, kind: str, layer: int) -> Confirmer:
        """Returns what confirms the proposals of a classifier."""
        assert self._classifiers is not None
        return self._classifiers.confirmer(kind, layer)

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
            rows = self._rows(slots, hidden.device)
            if self.drafted:
                self._keep(kind, layer, rows, slots)
            table = self._table(kind, layer, hidden.device)
            if isinstance(classifier, MixerClassifier) and (scan := self._kernels_for(hidden)) is not None:
                in_place = rows.in_place(table.begin(rows.numbers))
                return classifier.forward_in_place(hidden, in_place, table.all, scan)
            logits, after = classifier(hidden, rows.rows, table.read(rows.lines))
            assert after is not None
            table.write(rows.lines, after)
            return logits

    def _keep(self, kind: str, layer: int, rows: _Rows, slots: IntArray) -> None:
        """Keeps the states of rows before their drafted tokens (T,), each of which is alone in its row."""
        drafted = np.asarray([self.drafted.get(slot, 0) for slot in slots.tolist()], dtype=np.int64)
        if not drafted.any():
            return
        lines = np.asarray([self._line_of[slot] for slot in slots.tolist()], dtype=np.int64)
        kept_in = self._snapshots.lines(lines, drafted, self._allocate_line)
        table, known = self._table(kind, layer, rows.rows.device), self._kept_before[kind, layer]
        keeps = kept_in >= 0
        table.copy_lines(lines[keeps], kept_in[keeps])
        for line, number in zip(lines[keeps].tolist(), drafted[keeps].tolist(), strict=True):
            known[line].add(number)

    def _kernels_for(self, hidden: Tensor) -> kernels.ScanKernels | None:
        """Returns the kernels that run on these hidden states, if there are any."""
        device = hidden.device
        if device not in self._kernels:
            self._kernels[device] = kernels.find(self._choice, device, torch.float32)
        found = self._kernels[device]
        return found if found is not None and found.can_run(hidden) else None

    def _rows(self, slots: IntArray, device: torch.device) -> _Rows:
        """Returns the rows whose tokens these are, for a classifier on ``device``."""
        if self._last is None or self._last.rows.device != device or not np.array_equal(self._last.slots, slots):
            starts = np.flatnonzero(np.diff(slots, prepend=-1))
            numbers = np.asarray([self._line_of[slot] for slot in slots[starts].tolist()], dtype=np.int64)
            lengths = np.diff(starts, append=len(slots))
            rows = RaggedRows(lengths.tolist(), device)
            self._last = _Rows(slots, rows, numbers, lines_of(numbers, device))
        return self._last

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
