"""The states of rows whose blocks are of several kinds: K and V in caches, recurrent states in tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from dynamax_lm_eval.backbones.base import IntArray
from dynamax_lm_eval.backbones.mamba.snapshots import Snapshots
from dynamax_lm_eval.backbones.mamba.state_cache import StateTable
from dynamax_lm_eval.backbones.replay.mixers import FlatMixer
from dynamax_lm_eval.backbones.transformer.kv_cache import AttentionStates


class ReplayStates(AttentionStates):
    """K and V as of :class:`AttentionStates`, in a cache per layer of transformers' own; a table for every mixer.

    A row has a line, the same in every table.
    """

    def __init__(
        self,
        num_layers: int,
        kv_layers: Sequence[tuple[int, ...]],
        mixers: Iterable[FlatMixer],
        capacity: int,
        prefix_capacity: int,
        row_stride: int | None,
    ) -> None:
        """``kv_layers``: for each block the layers of transformers' cache that it writes."""
        super().__init__(num_layers, capacity, prefix_capacity, row_stride)
        self._kv_layers = kv_layers
        num_caches = 1 + max((layer + 1 for layers in kv_layers for layer in layers), default=0)
        self.keys: list[Tensor | None] = [None] * num_caches
        self.values: list[Tensor | None] = [None] * num_caches
        self._tables: dict[FlatMixer, Any] = {mixer: mixer.new_table() for mixer in mixers}
        self.line_of: dict[int, int] = {}
        self._free_lines: list[int] = []
        self._num_lines = 0
        self._snapshots = Snapshots()
        self._kept: dict[int, int] = {}  # tokens of a kept prefix -> line

    def table(self, mixer: FlatMixer) -> Any:
        """Returns the table of a mixer, with a line for every allocated row."""
        table = self._tables[mixer]
        if isinstance(table, StateTable):
            table.reserve(self._num_lines)
        return table

    def allocate_row(self, capacity: int) -> int | None:
        slot = super().allocate_row(capacity)
        if slot is not None:
            self.line_of[slot] = self._new_line()
        return slot

    def free_row(self, slot: int) -> None:
        super().free_row(slot)
        line = self.line_of.pop(slot)
        for own in (line, *self._snapshots.pop(line)):
            self._free_line(own)

    def settle(self, slot: int, kept: int | None) -> None:
        if kept is not None and self._tables:
            line = self.line_of[slot]
            self._copy_line(self._snapshots.after(line, kept), line)

    def snapshot_lines(self, of_rows: IntArray, drafted: IntArray) -> IntArray:
        """Returns the lines in which states are kept before drafted tokens, as :meth:`Snapshots.lines` does."""
        return self._snapshots.lines(of_rows, drafted, self._new_line)

    def copy_row(self, source: int, slot: int, num_tokens: int) -> None:
        super().copy_row(source, slot, num_tokens)
        if source in self.line_of and slot in self.line_of:
            self._copy_line(self.line_of[source], self.line_of[slot])

    def keep(self, slot: int, num_tokens: int) -> bool:
        kept = super().keep(slot, num_tokens)
        if kept:
            self._kept[num_tokens] = self._new_line()
            self._copy_line(self.line_of[slot], self._kept[num_tokens])
        return kept

    def give(self, num_tokens: int, slot: int) -> None:
        super().give(num_tokens, slot)
        self._copy_line(self._kept[num_tokens], self.line_of[slot])

    def forget(self, num_tokens: int) -> None:
        super().forget(num_tokens)
        self._free_line(self._kept.pop(num_tokens))

    def copy(self, source: int, block: int, kv_slots: Tensor) -> None:
        for given, taken in zip(self._kv_layers[source - 1], self._kv_layers[block - 1], strict=True):
            super().copy(given + 1, taken + 1, kv_slots)

    def _new_line(self) -> int:
        line = self._free_lines.pop() if self._free_lines else self._num_lines
        self._num_lines = max(self._num_lines, line + 1)
        for table in self._tables.values():
            table.clear(line)
        return line

    def _free_line(self, line: int) -> None:
        self._free_lines.append(line)
        for table in self._tables.values():
            table.clear(line)

    def _copy_line(self, source: int, line: int) -> None:
        for table in self._tables.values():
            table.copy(source, line)
