"""Deferred K and V: those that later blocks still have to be given of tokens that left a Transformer early.

A block needs the recomputed states of a token only when a later token of the same row gets there. Until then they
are deferred; those of several tokens are then materialised in one call, and those of a row that ends first are never
computed.

m tokens that left, D hidden.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import BoolArray, IntArray, on_device
from dynamax_lm_eval.models.placement import moved


class DeferredKV:
    """The tokens of the rows in flight that left and whose states some block still lacks."""

    def __init__(self) -> None:
        self.version = 0
        self._empty()

    def _empty(self) -> None:
        self.slots: IntArray = np.empty(0, dtype=np.int64)  # (m,) of their rows
        self.positions: IntArray = np.empty(0, dtype=np.int64)  # (m,)
        #: (m,) the last block that has a state of theirs.
        self.done: IntArray = np.empty(0, dtype=np.int64)
        self.ids: Tensor | None = None  # (m,) of their tokens; None: there are none
        self.hidden: Tensor | None = None  # (m, D) at their exits; None: there are none
        self.version += 1

    def __len__(self) -> int:
        return len(self.slots)

    def add(self, slots: IntArray, positions: IntArray, ids: Tensor, hidden: Tensor, layer: int) -> None:
        """Defers the states of tokens (t,) of rows (t,), hidden states (t, D), that left after ``layer`` blocks."""
        self.slots = np.concatenate([self.slots, slots])
        self.positions = np.concatenate([self.positions, positions])
        self.done = np.concatenate([self.done, np.full(len(slots), layer, dtype=np.int64)])
        self.ids = ids if self.ids is None else torch.cat([self.ids, ids])
        # Blocks on several devices: those of the last exit are the nearest to the blocks that will want them.
        self.hidden = hidden if self.hidden is None else torch.cat([moved(self.hidden, hidden.device), hidden])
        self.version += 1

    def free_row(self, slot: int) -> None:
        """Drops the tokens of a row that has ended."""
        self._keep(self.slots != slot)

    def drop_complete(self, num_layers: int) -> None:
        """Drops tokens whose states all blocks have."""
        self._keep(self.done < num_layers)

    def _keep(self, kept: BoolArray) -> None:
        if kept.all():
            return
        if not kept.any():
            self._empty()
            return
        assert self.hidden is not None and self.ids is not None
        indices = np.flatnonzero(kept)
        self.slots, self.positions, self.done = self.slots[indices], self.positions[indices], self.done[indices]
        # Rows may be freed outside the mode of torch in which tokens ran.
        with torch.inference_mode(self.hidden.is_inference()):
            chosen = on_device(indices, self.hidden.device)
            self.ids = self.ids.index_select(0, moved(chosen, self.ids.device))
            self.hidden = self.hidden.index_select(0, chosen)
        self.version += 1
