"""Conv windows and SSM states of the rows in flight: one table per module, one line per row.

Lines of a table: R.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import IntArray
from dynamax_lm_eval.backbones.mamba.ssm import MixerState


class StateTable:
    """Conv windows and SSM states of a Mamba module, one line per row; grows as rows are opened."""

    def __init__(self, make: Callable[[int, torch.device], MixerState], device: torch.device) -> None:
        """``make`` gives the states of so many rows that have seen nothing."""
        self._make = make
        self._device = device
        self._state: MixerState | None = None

    def clear(self, line: int) -> None:
        """The line's row starts anew."""
        if self._state is not None and line < len(self._state.conv):
            # Lines may be made in one mode of torch and cleared in another.
            with torch.inference_mode(self._state.conv.is_inference()):
                for part in self._state:
                    part[line] = 0

    def copy(self, source: int, line: int) -> None:
        """A line gets what another holds, which is nothing where none has run."""
        if self._state is None or source >= len(self._state.conv):
            self.clear(line)
            return
        self.reserve(line + 1)
        with torch.inference_mode(self._state.conv.is_inference()):
            for part in self._state:
                part[line] = part[source]

    def reserve(self, num_lines: int) -> None:
        """Makes room for so many lines."""
        have = 0 if self._state is None else len(self._state.conv)
        if have >= num_lines:
            return
        more = self._make(max(num_lines, 2 * have) - have, self._device)
        if self._state is not None:
            more = MixerState(*(torch.cat(pair) for pair in zip(self._state, more, strict=True)))
        self._state = more

    @property
    def all(self) -> MixerState:
        """All lines."""
        assert self._state is not None, "lines were reserved"
        return self._state

    def read(self, lines: slice | Tensor) -> MixerState:
        """The states of some lines, as :func:`lines_of` gives them; a view where they are a slice."""
        conv, ssm = self.all
        return MixerState(conv[lines], ssm[lines])

    def write(self, lines: slice | Tensor, state: MixerState) -> None:
        """Replaces the states of some lines."""
        for table, new in zip(self.all, state, strict=True):
            if isinstance(lines, Tensor):
                table.index_copy_(0, lines, new.to(table.dtype))
            elif new.data_ptr() != table[lines].data_ptr():  # else it was moved on in place
                table[lines] = new


def lines_of(numbers: IntArray, device: torch.device) -> slice | Tensor:
    """Lines (R,) of a table as a slice where they stand side by side in order, else as a tensor on ``device``."""
    if len(numbers) == 1 or bool((np.diff(numbers) == 1).all()):
        return slice(int(numbers[0]), int(numbers[0]) + len(numbers))
    return torch.from_numpy(numbers).to(device)
