"""The K and V that rows of a Transformer keep of their past, in one cache per block.

A row owns a run of consecutive cache slots (``kv_slots``), one per token, so its K and V are a view and nothing is ever
padded. What identifies a row (its ``slot``) is the first of them.

C slots of a cache, T tokens, H_kv K/V heads, P head dim.
"""

from __future__ import annotations

import bisect

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import BoolArray, IntArray, States
from dynamax_lm_eval.backbones.deferring import DeferredTokens
from dynamax_lm_eval.backbones.segments import StaticSegments
from dynamax_lm_eval.models.placement import moved


class FreeList:
    """The free cache slots of 0..capacity-1, of which runs are allocated first-fit."""

    def __init__(self, capacity: int) -> None:
        self._free = [(0, capacity)] if capacity else []  # sorted (start, length), never adjacent

    def allocate(self, length: int) -> int | None:
        """Allocates a run of ``length`` slots and returns its start; None where there is no free run of that length."""
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


def stored(caches: tuple[Tensor, Tensor], kv_slots: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Stores K and V (T, H_kv, P) in caches (C, H_kv, P) at ``kv_slots`` (T,), and returns the caches."""
    return caches[0].index_copy_(0, kv_slots, key), caches[1].index_copy_(0, kv_slots, value)


class AttentionStates(States):
    """The K and V of every block: tensors of shape (C, H_kv, P), made when a block first writes.

    ``layer_of`` says for each cache slot how many blocks its token ran through (``num_layers`` unless it left
    early and left no state behind): a block attends to a slot only if its token reached the block.
    """

    def __init__(self, num_layers: int, capacity: int, prefix_capacity: int = 0, row_stride: int | None = None) -> None:
        """
        Args:
            num_layers: L.
            capacity: cache slots of the rows.
            prefix_capacity: cache slots of the kept prefixes, after those of the rows.
            row_stride: cache slots of every row; None: as many as it needs.
        """
        self.row_stride = row_stride
        self.num_layers = num_layers
        # Prefixes of one another are kept in the same slots.
        self._prefix_slot = capacity
        self.capacity = capacity + prefix_capacity
        self.keys: list[Tensor | None] = [None] * (num_layers + 1)  # blocks are counted from 1
        self.values: list[Tensor | None] = [None] * (num_layers + 1)
        self.layer_of: IntArray = np.full(self.capacity, num_layers, dtype=np.int64)
        #: How many blocks its token ran, where it takes states over from earlier tokens; else ``num_layers``.
        self.ran_to: IntArray = np.full(self.capacity, num_layers, dtype=np.int64)
        #: Slots of tokens that left nothing, but that block L ran on all the same.
        self.runs_last: BoolArray = np.zeros(self.capacity, dtype=np.bool_)
        self.deferred = DeferredTokens()
        #: A cache slot of no row, where there is one.
        self.scratch_slot = self.capacity
        self._num_scratch = 0
        self._free_list = FreeList(capacity)
        self._lengths: dict[int, int] = {}  # slot of a row -> its cache slots

    def use_segments(self, segments: StaticSegments) -> None:
        super().use_segments(segments)
        self._num_scratch = 1

    def allocate_row(self, capacity: int) -> int | None:
        if self.row_stride is not None:
            assert capacity <= self.row_stride
            capacity = self.row_stride
        start = self._free_list.allocate(capacity)
        if start is not None:
            self._lengths[start] = capacity
            self.layer_of[start : start + capacity] = self.num_layers
            self.ran_to[start : start + capacity] = self.num_layers
            self.runs_last[start : start + capacity] = False
        return start

    def copy_row(self, source: int, slot: int, num_tokens: int) -> None:
        assert source not in self.deferred.slots, "what is copied ran in a pass that defers nothing"
        from_slots, to_slots = slice(source, source + num_tokens), slice(slot, slot + num_tokens)
        self.layer_of[to_slots] = self.layer_of[from_slots]
        self.ran_to[to_slots] = self.ran_to[from_slots]
        self.runs_last[to_slots] = self.runs_last[from_slots]
        for cache in (*self.keys, *self.values):
            if cache is not None:
                with torch.inference_mode(cache.is_inference()):
                    cache[to_slots] = cache[from_slots]

    def keep(self, slot: int, num_tokens: int) -> bool:
        if self._prefix_slot + num_tokens > self.capacity:
            return False
        self.copy_row(slot, self._prefix_slot, num_tokens)
        return True

    def give(self, num_tokens: int, slot: int) -> None:
        self.copy_row(self._prefix_slot, slot, num_tokens)

    def forget(self, num_tokens: int) -> None:
        pass  # what is kept next overwrites it

    def masked_kv_slots(self, block: int) -> IntArray:
        """Returns the cache slots whose tokens left nothing for ``block``, in rising order."""
        masked = self.layer_of < block
        if block == self.num_layers:
            masked &= ~self.runs_last
        return np.flatnonzero(masked)

    def free_row(self, slot: int) -> None:
        self.deferred.free_row(slot)
        self._free_list.free(slot, self._lengths.pop(slot))

    def write(self, block: int, kv_slots: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores K and V (T, H_kv, P) of one block at ``kv_slots`` (T,) and returns its caches (C, H_kv, P)."""
        return stored(self.caches(block, like=(key, value)), kv_slots, key, value)

    def copy(self, source: int, block: int, kv_slots: Tensor) -> None:
        """Gives ``block`` the K and V that block ``source`` wrote at ``kv_slots`` (T,), which are on its device."""
        keys, values = self.key_cache(source), self.value_cache(source)
        given, device = moved(kv_slots, keys.device), kv_slots.device
        self.write(block, kv_slots, moved(keys[given], device), moved(values[given], device))

    def caches(self, block: int, like: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the caches of a block, made for K and V as ``like`` where they do not exist yet."""
        if self.keys[block] is None:
            # Zeros, not empty memory: a masked slot has weight 0, but 0 times a stray NaN is NaN.
            slots = self.capacity + self._num_scratch
            self.keys[block], self.values[block] = (part.new_zeros(slots, *part.shape[1:]) for part in like)
        return self.key_cache(block), self.value_cache(block)

    def key_cache(self, block: int) -> Tensor:
        """Returns the K of a block (1-based), (C, H_kv, P)."""
        cache = self.keys[block]
        assert cache is not None, f"block {block} has not written yet"
        return cache

    def value_cache(self, block: int) -> Tensor:
        """Returns the V of a block (1-based), (C, H_kv, P)."""
        cache = self.values[block]
        assert cache is not None, f"block {block} has not written yet"
        return cache
