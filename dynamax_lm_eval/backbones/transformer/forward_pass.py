"""One pass of a flat batch through blocks that attend: what tokens in flight see, and what those that left leave.

What a block is called with, and how, is the business of the backbone's own pass (:class:`AttentionPass` is abstract).

N tokens of a flat batch, n in flight, m that left, D hidden, H_kv K/V heads, P head dim.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import Backbone, ForwardPass, IntArray, RowLayout, on_device
from dynamax_lm_eval.backbones.transformer import attention
from dynamax_lm_eval.backbones.transformer.kv_cache import AttentionStates
from dynamax_lm_eval.models.placement import moved


class AttentionPass(ForwardPass):
    """One pass of a flat batch: positions, arguments and cache slots are computed once for all blocks."""

    def __init__(self, backbone: Backbone, states: AttentionStates, layout: RowLayout, materialize_all: bool) -> None:
        self._backbone = backbone
        self._states = states
        self._layout = layout
        self._starts = np.asarray(layout.slots, dtype=np.int64)[layout.row_of]  # (N,)
        self._kv_slots = self._starts + layout.positions  # (N,)
        self._positions: dict[torch.device, Tensor] = {}
        self._ids: Tensor | None = None
        self._active: ActiveTokens | None = None
        self._materialize_all = materialize_all
        self._slots = np.asarray(layout.slots, dtype=np.int64)
        self._pending: PendingTokens | None = None
        # Exits of rows in skip mode: behind each of them the blocks see fewer tokens.
        self._skip_layers = layout.exit_layers if "skip" in layout.state_modes else ()

    def embed(self, ids: Tensor) -> Tensor:
        self._ids = ids
        return self._backbone.embed(ids)

    def _positions_on(self, device: torch.device) -> Tensor:
        """Returns the positions (N,) on a device."""
        if device not in self._positions:
            self._positions[device] = on_device(self._layout.positions, device)
        return self._positions[device]

    @abstractmethod
    def _arguments(self, tokens: IntArray, like: Tensor) -> Any:
        """Returns what blocks are called with for ``tokens`` (n,) of the batch besides hidden states as ``like``."""

    @abstractmethod
    def _arguments_of_deferred(self, tokens: IntArray, like: Tensor) -> Any:
        """Returns the same for those of the deferred tokens that are numbered ``tokens`` (m,)."""

    @abstractmethod
    def _call(self, block: int, hidden: Tensor, active: ActiveTokens) -> Tensor:
        """Returns what a block makes of the tokens in flight, (1, n, D)."""

    @abstractmethod
    def _write_states(self, block: int, pending: PendingTokens, chosen: Tensor | None) -> None:
        """Gives a block the states of pending tokens; ``chosen``: indices of some of them, None for all."""

    @cached_property
    def _last_given(self) -> IntArray:
        """The last block (R,) that is given states of a row's tokens that left; for later ones nothing is deferred."""
        is_given = self._layout.runs_block.copy()
        is_given[self._layout.final_block, -1] = False
        last: IntArray = is_given.shape[1] - 1 - is_given[:, ::-1].argmax(axis=1)
        return last

    @property
    def has_pending_states(self) -> bool:
        return self._materialize_all and len(self._states.deferred) > 0

    def _run_block(self, block: int, tokens: IntArray, hidden: Tensor) -> Tensor:
        self._materialize(block, tokens, hidden.device)
        if len(tokens) == 0:
            return hidden
        return self._call(block, hidden, self._active_tokens(block, tokens, hidden))

    def exit_tokens(self, tokens: IntArray, hidden: Tensor, layer: int) -> None:
        rows = self._layout.row_of[tokens]
        modes = np.asarray(self._layout.state_modes)[rows]
        deferred = np.flatnonzero((modes == "recompute") & (self._last_given[rows] > layer))
        if len(deferred):
            exit_hidden = hidden[0]
            if len(deferred) < len(tokens):
                exit_hidden = exit_hidden.index_select(0, on_device(deferred, hidden.device))
            assert self._ids is not None, "tokens were embedded"
            ids = self._ids.index_select(0, on_device(tokens[deferred], self._ids.device))
            self._states.deferred.add(
                self._starts[tokens[deferred]], self._layout.positions[tokens[deferred]], ids, exit_hidden, layer
            )
        self._mark_skipped(tokens[modes == "skip"], layer)
        copied = tokens[modes == "copy"]
        if len(copied):
            self._copy(copied, layer)

    def _mark_skipped(self, tokens: IntArray, layer: int) -> None:
        """Masks out of the later blocks the slots of tokens (t,) that leave nothing behind."""
        if len(tokens):
            self._states.layer_of[self._kv_slots[tokens]] = layer
            self._states.runs_last[self._kv_slots[tokens]] = self._layout.final_block[self._layout.row_of[tokens]]

    def _materialize(self, block: int, tokens: IntArray, device: torch.device) -> None:
        """Gives a block, which is on ``device``, the states that were deferred of the rows in flight."""
        deferred = self._states.deferred
        if len(deferred) == 0:
            return
        pending, passed = self._pending, sum(layer < block for layer in self._layout.exit_layers)
        if (
            pending is None
            or pending.in_flight is not tokens
            or (pending.passed, pending.version) != (passed, deferred.version)
            or pending.kv_slots.device != device
        ):
            pending = self._pending = self._find_pending(block, tokens, passed, device)
        if pending.hidden is None:
            return
        runs = self._layout.is_given_states(block, pending.rows)
        if not runs.any():
            return
        chosen = None if runs.all() else on_device(np.flatnonzero(runs), device)
        self._write_states(block, pending, chosen)
        is_complete = runs & (self._last_given[pending.rows] == block)
        deferred.done[pending.tokens[runs]] = block
        if is_complete.any():
            deferred.done[pending.tokens[is_complete]] = self._backbone.num_layers
            deferred.drop_complete(self._backbone.num_layers)

    def _find_pending(self, block: int, in_flight: IntArray, passed: int, device: torch.device) -> PendingTokens:
        """Returns the deferred tokens that ``block`` has no states of: those of the rows in flight, or of all rows."""
        deferred = self._states.deferred
        rows = np.arange(len(self._slots)) if self._materialize_all else np.unique(self._layout.row_of[in_flight])
        row_at = {int(self._slots[row]): int(row) for row in rows}
        row_of = np.asarray([row_at.get(slot, -1) for slot in deferred.slots.tolist()], dtype=np.int64)
        tokens = np.flatnonzero((row_of >= 0) & (deferred.done < block))
        hidden, arguments = None, None
        if len(tokens) and deferred.hidden is not None:
            chosen = deferred.hidden.index_select(0, on_device(tokens, deferred.hidden.device))
            hidden = moved(chosen, device).unsqueeze(0)
            arguments = self._arguments_of_deferred(tokens, hidden)
        return PendingTokens(
            in_flight=in_flight,
            passed=passed,
            version=deferred.version,
            tokens=tokens,
            rows=row_of[tokens],
            hidden=hidden,
            arguments=arguments,
            kv_slots=on_device(deferred.slots[tokens] + deferred.positions[tokens], device),
        )

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
            positions = self._positions_on(device).index_select(0, on_device(tokens, device)).unsqueeze(0)
            kv_slots = on_device(self._kv_slots[tokens], device)
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


@dataclass(frozen=True)
class PendingTokens:
    """The deferred tokens whose states the blocks up to the next exit need.

    Valid while the same tokens are in flight, no further exit has been passed, and nothing more is deferred.
    """

    in_flight: IntArray
    passed: int  # exits
    version: int  # of the deferred tokens
    tokens: IntArray  # (m,) among those deferred
    rows: IntArray  # (m,) their rows in the pass
    hidden: Tensor | None  # (1, m, D); None: there are none
    arguments: Any
    kv_slots: Tensor  # (m,)
