"""What rows keep of their past: K and V in one arena per block, or Mamba states in one table per module.

A row owns one run of places in the arenas, so its K and V are a view, and nothing is ever padded; of a table
it owns a line.
Tokens of an arena: C; K/V heads: H_kv; head dim: P; lines of a table: R.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import BoolArray, IntArray, States
from dynamax_lm_eval.backbones.owed import OwedStates
from dynamax_lm_eval.backbones.ssm import MixerState


class Room:
    """First-fit reservation of runs of places in 0..capacity-1."""

    def __init__(self, capacity: int) -> None:
        self._free = [(0, capacity)] if capacity else []  # sorted (start, length), never adjacent

    def take(self, length: int) -> int | None:
        """Start of a free run of ``length`` places, now reserved; None where there is none."""
        for i, (start, free) in enumerate(self._free):
            if free >= length:
                self._free[i : i + 1] = [(start + length, free - length)] if free > length else []
                return start
        return None

    def give_back(self, start: int, length: int) -> None:
        """Frees a run and joins it with its free neighbours."""
        i = bisect.bisect_left(self._free, (start, length))
        if i < len(self._free) and start + length == self._free[i][0]:
            length += self._free.pop(i)[1]
        if i > 0 and sum(self._free[i - 1]) == start:
            i -= 1
            start, previous = self._free.pop(i)
            length += previous
        self._free.insert(i, (start, length))


class AttentionStates(States):
    """K and V of every block: tensors of shape (C, H_kv, P), made when a block first writes.

    ``layer_of`` says for each place how many blocks its token ran through (``num_layers`` unless it left
    early and left no state behind): a block attends to a place only if its token reached the block.
    """

    def __init__(self, num_layers: int, capacity: int, prefix_capacity: int = 0, spacing: int | None = None) -> None:
        """Rows have the first ``capacity`` places, ``spacing`` each; what is kept, ``prefix_capacity`` after them."""
        self.spacing = spacing
        self.num_layers = num_layers
        # Beginnings of one another are kept in the same places.
        self._kept_at = capacity
        self.capacity = capacity + prefix_capacity
        self.keys: list[Tensor | None] = [None] * (num_layers + 1)  # blocks are counted from 1
        self.values: list[Tensor | None] = [None] * (num_layers + 1)
        self.layer_of: IntArray = np.full(self.capacity, num_layers, dtype=np.int64)
        #: Places of such tokens that block L ran on all the same.
        self.runs_last: BoolArray = np.zeros(self.capacity, dtype=np.bool_)
        self.owed = OwedStates()
        self._room = Room(capacity)
        self._lengths: dict[int, int] = {}

    def open_row(self, capacity: int) -> int | None:
        if self.spacing is not None:
            assert capacity <= self.spacing
            capacity = self.spacing
        start = self._room.take(capacity)
        if start is not None:
            self._lengths[start] = capacity
            self.layer_of[start : start + capacity] = self.num_layers
            self.runs_last[start : start + capacity] = False
        return start

    def copy_row(self, source: int, slot: int, num_tokens: int) -> None:
        assert source not in self.owed.slots, "what is copied ran in an eager pass"
        theirs, ours = slice(source, source + num_tokens), slice(slot, slot + num_tokens)
        self.layer_of[ours] = self.layer_of[theirs]
        self.runs_last[ours] = self.runs_last[theirs]
        for arena in (*self.keys, *self.values):
            if arena is not None:
                with torch.inference_mode(arena.is_inference()):
                    arena[ours] = arena[theirs]

    def keep(self, slot: int, num_tokens: int) -> bool:
        if self._kept_at + num_tokens > self.capacity:
            return False
        self.copy_row(slot, self._kept_at, num_tokens)
        return True

    def give(self, num_tokens: int, slot: int) -> None:
        self.copy_row(self._kept_at, slot, num_tokens)

    def forget(self, num_tokens: int) -> None:
        pass  # what is kept next takes its places

    def hidden_from(self, block: int) -> IntArray:
        """Places whose tokens left nothing for ``block``, in rising order."""
        hidden = self.layer_of < block
        if block == self.num_layers:
            hidden &= ~self.runs_last
        return np.flatnonzero(hidden)

    def close_row(self, slot: int) -> None:
        self.owed.close_row(slot)
        self._room.give_back(slot, self._lengths.pop(slot))

    def write(self, block: int, places: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores K and V (T, H_kv, P) of one block at ``places`` (T,); returns its arenas (C, H_kv, P)."""
        self._make_arenas(block, like=(key, value))
        keys, values = self.key_arena(block), self.value_arena(block)
        return keys.index_copy_(0, places, key), values.index_copy_(0, places, value)

    def copy(self, source: int, block: int, places: Tensor) -> None:
        """Gives ``block`` the K and V that block ``source`` wrote at ``places`` (T,)."""
        self._make_arenas(block, like=(self.key_arena(source), self.value_arena(source)))
        self.key_arena(block)[places] = self.key_arena(source)[places]
        self.value_arena(block)[places] = self.value_arena(source)[places]

    def _make_arenas(self, block: int, like: tuple[Tensor, Tensor]) -> None:
        """Makes the arenas of a block where they do not exist yet."""
        if self.keys[block] is None:
            # Zeros, not empty memory: a masked place has weight 0, but 0 times a stray NaN is NaN.
            self.keys[block] = like[0].new_zeros(self.capacity, *like[0].shape[1:])
            self.values[block] = like[1].new_zeros(self.capacity, *like[1].shape[1:])

    def key_arena(self, block: int) -> Tensor:
        """(C, H_kv, P)"""
        arena = self.keys[block]
        assert arena is not None, f"block {block} has not written yet"
        return arena

    def value_arena(self, block: int) -> Tensor:
        """(C, H_kv, P)"""
        arena = self.values[block]
        assert arena is not None, f"block {block} has not written yet"
        return arena


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
