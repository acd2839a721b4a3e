"""The states that rows keep of their past in a Mamba module: conv windows and SSM states, one line of a table per row.

R lines of a table.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import IntArray, on_device
from dynamax_lm_eval.backbones.mamba.ssm import MixerState


class StateTable:
    """The conv windows and SSM states of a Mamba module, one line per row; it grows as rows are allocated."""

    def __init__(self, make: Callable[[int, torch.device], MixerState], device: torch.device) -> None:
        """``make`` returns the states of a number of rows that have seen nothing."""
        self._make = make
        self._device = device
        self._state: MixerState | None = None

    def clear(self, line: int) -> None:
        """Sets a line to the states of a row that has seen nothing."""
        if self._state is not None and line < len(self._state.conv):
            # Lines may be made in one mode of torch and cleared in another.
            with torch.inference_mode(self._state.conv.is_inference()):
                for part in self._state:
                    part[line] = 0

    def copy(self, source: int, line: int) -> None:
        """Gives a line what another holds, which is nothing where none has run."""
        if self._state is None or source >= len(self._state.conv):
            self.clear(line)
            return
        self.reserve(line + 1)
        with torch.inference_mode(self._state.conv.is_inference()):
            for part in self._state:
                part[line] = part[source]

    def reserve(self, num_lines: int) -> None:
        """Grows the table to at least ``num_lines`` lines."""
        current = 0 if self._state is None else len(self._state.conv)
        if current >= num_lines:
            return
        more = self._make(max(num_lines, 2 * current) - current, self._device)
        if self._state is not None:
            more = MixerState(*(torch.cat(pair) for pair in zip(self._state, more, strict=True)))
        self._state = more

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
            if isinstance(lines, Tensor):
                table.index_copy_(0, lines, new.to(table.dtype))
            elif new.data_ptr() != table[lines].data_ptr():  # else it was updated in place
                table[lines] = new


def lines_of(numbers: IntArray, device: torch.device) -> slice | Tensor:
    """Returns lines (R,) of a table as a slice where they are adjacent and in order, else as a tensor on ``device``."""
    if len(numbers) == 1 or bool((np.diff(numbers) == 1).all()):
        return slice(int(numbers[0]), int(numbers[0]) + len(numbers))
    return on_device(numbers, device)
