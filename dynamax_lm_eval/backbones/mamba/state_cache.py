"""The states that rows keep of their past in a Mamba module: conv windows and SSM states, one line of a table per row.

R lines of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import BoolArray, IntArray, on_device
from dynamax_lm_eval.backbones.mamba.ssm import MixerState


class StateTable:
    """The conv windows and SSM states of a Mamba module, one line per row; it grows as rows are allocated."""

    def __init__(self, make: Callable[[int, torch.device], MixerState], device: torch.device) -> None:
        """``make`` returns the states of a number of rows that have seen nothing."""
        self._make = make
        self._device = device
        self._state: MixerState | None = None
        self.has_begun = np.zeros(0, dtype=np.bool_)

    def clear(self, line: int) -> None:
        """Sets a line to the states of a row that has seen nothing."""
        clear_line([self], line)

    def copy(self, source: int, line: int) -> None:
        """Gives a line what another holds, which is nothing where none has run."""
        copy_line([self], source, line)

    def copy_lines(self, sources: IntArray, lines: IntArray) -> None:
        """Gives lines (R,) what others (R,) hold; the table has all of them."""
        self.has_begun[lines] = self.has_begun[sources]
        for part in self.all:
            if len(lines) == 1:
                part[int(lines[0])] = part[int(sources[0])]
            else:
                part.index_copy_(0, on_device(lines, part.device), part[on_device(sources, part.device)])

    @property
    def num_lines(self) -> int:
        """How many lines the table has; it lies in other memory where that has changed."""
        return 0 if self._state is None else len(self._state.conv)

    def has(self, line: int) -> bool:
        """Returns whether the table has a line."""
        return line < self.num_lines

    def reserve(self, num_lines: int) -> None:
        """Grows the table to at least ``num_lines`` lines."""
        current = self.num_lines
        if current >= num_lines:
            return
        more = self._make(max(num_lines, 2 * current) - current, self._device)
        if self._state is not None:
            more = MixerState(*(torch.cat(pair) for pair in zip(self._state, more, strict=True)))
        self._state = more
        self.has_begun = np.append(self.has_begun, np.zeros(len(more.conv) - current, dtype=np.bool_))

    def begin(self, numbers: IntArray) -> BoolArray:
        """Returns which of these lines (R,) are of rows that have seen nothing so far, and will have now."""
        is_new: BoolArray = ~self.has_begun[numbers]
        self.has_begun[numbers] = True
        return is_new

    @property
    def all(self) -> MixerState:
        """The states of all lines."""
        assert self._state is not None, "lines were reserved"
        return self._state

    def read(self, lines: slice | Tensor) -> MixerState:
        """Returns the states of some lines, which are as :func:`lines_of` gives them; a view where they are a slice."""
        conv, ssm = self.all
        return MixerState(conv[lines], ssm[lines])

    def write(self, lines: slice | Tensor, state: MixerState) -> None:
        """Replaces the states of some lines."""
        for table, new in zip(self.all, state, strict=True):
            _write(table, lines, new)

    def windows(self, lines: slice | Tensor) -> Tensor:
        """Returns the conv windows of some lines, as :meth:`read` does."""
        return self.all.conv[lines]

    def write_windows(self, lines: slice | Tensor, windows: Tensor) -> None:
        """Replaces the conv windows of some lines."""
        _write(self.all.conv, lines, windows)


def _write(table: Tensor, lines: slice | Tensor, new: Tensor) -> None:
    if isinstance(lines, Tensor):
        table.index_copy_(0, lines, new.to(table.dtype))
    elif new.data_ptr() != table[lines].data_ptr():  # else it was updated in place
        table[lines] = new


def clear_line(tables: Iterable[StateTable], line: int) -> None:
    """Sets a line of all tables to the states of a row that has seen nothing."""
    tables = [table for table in tables if table.has(line)]
    # Lines may be made in one mode of torch and cleared in another.
    with torch.inference_mode():
        for parts in _parts_by_device(tables):
            torch._foreach_zero_([part[line] for part in parts])
    for table in tables:
        table.has_begun[line] = False


def copy_line(tables: Iterable[StateTable], source: int, line: int) -> None:
    """Gives a line of all tables what another holds, which is nothing where none has run."""
    known: list[StateTable] = []
    unknown: list[StateTable] = []
    for table in tables:
        (known if table.has(source) else unknown).append(table)
    clear_line(unknown, line)
    for table in known:
        table.reserve(line + 1)
        table.has_begun[line] = table.has_begun[source]
    with torch.inference_mode():
        for parts in _parts_by_device(known):
            torch._foreach_copy_([part[line] for part in parts], [part[source] for part in parts])


def _parts_by_device(tables: Iterable[StateTable]) -> Iterable[list[Tensor]]:
    """Returns the conv windows and SSM states of tables, those together that one operation can go through."""
    parts: dict[Any, list[Tensor]] = {}
    for table in tables:
        for part in table.all:
            parts.setdefault((part.device, part.dtype), []).append(part)
    return parts.values()


def lines_of(numbers: IntArray, device: torch.device) -> slice | Tensor:
    """Returns lines (R,) of a table as a slice where they are adjacent and in order, else as a tensor on ``device``."""
    if len(numbers) == 1 or bool((np.diff(numbers) == 1).all()):
        return slice(int(numbers[0]), int(numbers[0]) + len(numbers))
    return on_device(numbers, device)
