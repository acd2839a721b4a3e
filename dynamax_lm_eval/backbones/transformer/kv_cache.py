"""What rows keep of their past: K and V in one cache per block, or Mamba states in one table per module.

A row owns one run of places in the caches, so its K and V are a view, and nothing is ever padded; of a table
it owns a line.
Tokens of an cache: C; K/V heads: H_kv; head dim: P; lines of a table: R.
"""

from __future__ import annotations

import bisect

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import BoolArray, IntArray, States
from dynamax_lm_eval.backbones.transformer.deferred_kv import DeferredKV


class FreeList:
    """First-fit reservation of runs of places in 0..capacity-1."""

    def __init__(self, capacity: int) -> None:
        self._free = [(0, capacity)] if capacity else []  # sorted (start, length), never adjacent

    def allocate(self, length: int) -> int | None:
        """Start of a free run of ``length`` places, now reserved; None where there is none."""
        for i, (start, free) in enumerate(self._free):
            if free >= length:
                self._free[i : i + 1] = [(start + length, free - length)] if free > length else []
                return start
        return None

    def free(self, start: int, length: int) -> None:
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

    def __init__(self, num_layers: int, capacity: int, prefix_capacity: int = 0, row_stride: int | None = None) -> None:
        """Rows have the first ``capacity`` places, ``row_stride`` each; what is kept, ``prefix_capacity`` after them."""
        self.row_stride = row_stride
        self.num_layers = num_layers
        # Beginnings of one another are kept in the same places.
        self._kept_at = capacity
        self.capacity = capacity + prefix_capacity
        self.keys: list[Tensor | None] = [None] * (num_layers + 1)  # blocks are counted from 1
        self.values: list[Tensor | None] = [None] * (num_layers + 1)
        self.layer_of: IntArray = np.full(self.capacity, num_layers, dtype=np.int64)
        #: Places of such tokens that block L ran on all the same.
        self.runs_last: BoolArray = np.zeros(self.capacity, dtype=np.bool_)
        self.deferred = DeferredKV()
        self._room = FreeList(capacity)
        self._lengths: dict[int, int] = {}

    def allocate_row(self, capacity: int) -> int | None:
        if self.row_stride is not None:
            assert capacity <= self.row_stride
            capacity = self.row_stride
        start = self._room.allocate(capacity)
        if start is not None:
            self._lengths[start] = capacity
            self.layer_of[start : start + capacity] = self.num_layers
            self.runs_last[start : start + capacity] = False
        return start

    def copy_row(self, source: int, slot: int, num_tokens: int) -> None:
        assert source not in self.deferred.slots, "what is copied ran in an eager pass"
        theirs, ours = slice(source, source + num_tokens), slice(slot, slot + num_tokens)
        self.layer_of[ours] = self.layer_of[theirs]
        self.runs_last[ours] = self.runs_last[theirs]
        for cache in (*self.keys, *self.values):
            if cache is not None:
                with torch.inference_mode(cache.is_inference()):
                    cache[ours] = cache[theirs]

    def keep(self, slot: int, num_tokens: int) -> bool:
        if self._kept_at + num_tokens > self.capacity:
            return False
        self.copy_row(slot, self._kept_at, num_tokens)
        return True

    def give(self, num_tokens: int, slot: int) -> None:
        self.copy_row(self._kept_at, slot, num_tokens)

    def forget(self, num_tokens: int) -> None:
        pass  # what is kept next takes its places

    def masked_slots(self, block: int) -> IntArray:
        """Places whose tokens left nothing for ``block``, in rising order."""
        hidden = self.layer_of < block
        if block == self.num_layers:
            hidden &= ~self.runs_last
        return np.flatnonzero(hidden)

    def free_row(self, slot: int) -> None:
        self.deferred.free_row(slot)
        self._room.free(slot, self._lengths.pop(slot))

    def write(self, block: int, places: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores K and V (T, H_kv, P) of one block at ``places`` (T,); returns its caches (C, H_kv, P)."""
        self._make_caches(block, like=(key, value))
        keys, values = self.key_cache(block), self.value_cache(block)
        return keys.index_copy_(0, places, key), values.index_copy_(0, places, value)

    def copy(self, source: int, block: int, places: Tensor) -> None:
        """Gives ``block`` the K and V that block ``source`` wrote at ``places`` (T,)."""
        self._make_caches(block, like=(self.key_cache(source), self.value_cache(source)))
        self.key_cache(block)[places] = self.key_cache(source)[places]
        self.value_cache(block)[places] = self.value_cache(source)[places]

    def _make_caches(self, block: int, like: tuple[Tensor, Tensor]) -> None:
        """Makes the caches of a block where they do not exist yet."""
        if self.keys[block] is None:
            # Zeros, not empty memory: a masked place has weight 0, but 0 times a stray NaN is NaN.
            self.keys[block] = like[0].new_zeros(self.capacity, *like[0].shape[1:])
            self.values[block] = like[1].new_zeros(self.capacity, *like[1].shape[1:])

    def key_cache(self, block: int) -> Tensor:
        """(C, H_kv, P)"""
        cache = self.keys[block]
        assert cache is not None, f"block {block} has not written yet"
        return cache

    def value_cache(self, block: int) -> Tensor:
        """(C, H_kv, P)"""
        cache = self.values[block]
        assert cache is not None, f"block {block} has not written yet"
        return cache
