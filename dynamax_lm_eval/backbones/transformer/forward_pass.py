"""One pass of a flat batch through blocks that attend: what tokens in flight see, and what those that left leave.

What a block is called with, and how, is the business of the backbone's own pass (:class:`AttentionPass` is abstract).

N tokens of a flat batch, n in flight, m that left, D hidden, H_kv K/V heads, P head dim.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import Backbone, IntArray, RowLayout, on_device
from dynamax_lm_eval.backbones.deferring import DeferringPass, PendingTokens
from dynamax_lm_eval.backbones.transformer import attention
from dynamax_lm_eval.backbones.transformer.kv_cache import AttentionStates


class AttentionPass(DeferringPass):
    """One pass of a flat batch: positions, arguments and cache slots are computed once for all blocks."""

    def __init__(self, backbone: Backbone, states: AttentionStates, layout: RowLayout, materialize_all: bool) -> None:
        super().__init__(backbone, layout, states.deferred, states.segments, materialize_all)
        self._states = states
        self._starts = self._slots[layout.row_of]  # (N,)
        self._kv_slots = self._starts + layout.positions  # (N,)
        #: (2, N) positions and cache slots, on every device that has blocks.
        self._places: dict[torch.device, Tensor] = {}
        self._indices: tuple[IntArray, Tensor] | None = None
        self._active: ActiveTokens | None = None
        # Exits of rows in skip mode: behind each of them the blocks see fewer tokens.
        self._skip_layers = layout.exit_layers if "skip" in layout.state_modes else ()

    def _places_on(self, device: torch.device) -> Tensor:
        """Returns the positions and the cache slots of all tokens, (2, N), on a device."""
        if device not in self._places:
            self._places[device] = on_device(np.stack([self._layout.positions, self._kv_slots]), device)
        return self._places[device]

    def _positions_on(self, device: torch.device) -> Tensor:
        """Returns the positions (N,) on a device."""
        return self._places_on(device)[0]

    @abstractmethod
    def _arguments(self, tokens: IntArray, like: Tensor) -> Any:
        """Returns what blocks are called with for ``tokens`` (n,) of the batch besides hidden states as ``like``."""

    @abstractmethod
    def _call(self, block: int, hidden: Tensor, active: ActiveTokens) -> Tensor:
        """Returns what a block makes of the tokens in flight, (1, n, D)."""

    @abstractmethod
    def _write_states(self, block: int, pending: PendingTokens, chosen: IntArray | None) -> None:
        """Gives a block the states of pending tokens; ``chosen``: indices of some of them, None for all."""

    def _places_of(self, tokens: IntArray) -> Sequence[IntArray]:
        """Returns the positions and the cache slots of deferred tokens."""
        positions = self._deferred.positions[tokens]
        return positions, self._deferred.slots[tokens] + positions

    def _run_block(self, block: int, tokens: IntArray, hidden: Tensor) -> Tensor:
        return self._run_taken(block, tokens, hidden, self._take_pending(block, tokens, hidden.device))

    def _run_taken(
        self, block: int, tokens: IntArray, hidden: Tensor, taken: tuple[PendingTokens, IntArray | None] | None
    ) -> Tensor:
        """Gives a block the states of what :meth:`_take_pending` returned, and runs it on the tokens in flight."""
        if taken is not None:
            self._write_states(block, *taken)
        if len(tokens) == 0:
            return hidden
        return self._call(block, hidden, self._active_tokens(block, tokens, hidden))

    def exit_tokens(self, tokens: IntArray, hidden: Tensor, layer: int) -> None:
        self._defer(tokens, hidden, layer)
        modes = np.asarray(self._layout.state_modes)[self._layout.row_of[tokens]]
        self._mark_skipped(tokens[modes == "skip"], layer)
        copied = tokens[modes == "copy"]
        if len(copied):
            self._copy(copied, layer)

    def _mark_skipped(self, tokens: IntArray, layer: int) -> None:
        """Masks out of the later blocks the slots of tokens (t,) that leave nothing behind."""
        if len(tokens):
            self._states.layer_of[self._kv_slots[tokens]] = layer
            self._states.runs_last[self._kv_slots[tokens]] = self._layout.final_block[self._layout.row_of[tokens]]

    def _copy(self, tokens: IntArray, layer: int) -> None:
        """Gives the later blocks the K and V that the last block which ran wrote for ``tokens`` (t,)."""
        rows = self._layout.row_of[tokens]
        for row in np.unique(rows):
            runs = self._layout.runs_block[row]
            kv_slots: dict[torch.device, Tensor] = {}
            source = int(np.flatnonzero(runs[: layer + 1])[-1])  # the last block that ran
            end = len(runs) - 1 if self._layout.final_block[row] else len(runs)
            for block in (np.flatnonzero(runs[layer + 1 : end]) + layer + 1).tolist():
                device = self._backbone.places[block - 1].device
                if device not in kv_slots:
                    kv_slots[device] = on_device(self._kv_slots[tokens[rows == row]], device)
                self._states.copy(source, block, kv_slots[device])

    def _indices_of(self, tokens: IntArray, device: torch.device) -> Tensor:
        """Returns the indices of tokens in flight (n,) on a device; several parts of a pass ask for the same."""
        if self._indices is None or self._indices[0] is not tokens or self._indices[1].device != device:
            self._indices = tokens, on_device(tokens, device)
        return self._indices[1]

    def _active_tokens(self, block: int, tokens: IntArray, hidden: Tensor) -> ActiveTokens:
        """Returns what ``block`` needs to know of the tokens in flight, as it was for the block before where it can."""
        last = block == self._backbone.num_layers and bool(self._layout.final_block.any())
        epoch = sum(layer < block for layer in self._skip_layers) + last
        active, device = self._active, hidden.device
        if active is not None and (active.tokens is not tokens or active.kv_slots.device != device):
            active = None
        if active is not None and active.epoch == epoch:
            return active
        if active is None:
            arguments = self._arguments(tokens, hidden)
            places = self._places_on(device)
            if len(tokens) < len(self._starts):
                places = places.index_select(1, self._indices_of(tokens, device))
            positions, kv_slots = places[:1], places[1]
        else:
            arguments, positions, kv_slots = active.arguments, active.positions, active.kv_slots
        masked_kv_slots = self._states.masked_kv_slots(block) if self._skip_layers else None
        plan = attention.AttentionPlan(
            self._starts[tokens],
            self._layout.positions[tokens],
            masked_kv_slots,
            device,
            self._states.row_stride,
        )
        self._active = ActiveTokens(tokens, epoch, kv_slots, positions, arguments, plan)
        return self._active


@dataclass(frozen=True)
class ActiveTokens:
    """The tokens in flight as blocks need to know them; valid while these are the same tokens."""

    tokens: IntArray
    epoch: int  # exits passed by rows in skip mode, and whether this is a final block
    kv_slots: Tensor  # (n,)
    positions: Tensor  # (1, n)
    arguments: Any
    plan: attention.AttentionPlan
