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
from torch import Tensor

from dynamax_lm_eval.backbones.base import Backbone, ForwardPass, IntArray, RowLayout, on_device, together_on_device
from dynamax_lm_eval.backbones.transformer import attention
from dynamax_lm_eval.backbones.transformer.kv_cache import AttentionStates


class AttentionPass(ForwardPass):
    """One pass of a flat batch: positions, arguments and cache slots are computed once for all blocks."""

    def __init__(self, backbone: Backbone, states: AttentionStates, layout: RowLayout, materialize_all: bool) -> None:
        self._backbone = backbone
        self._states = states
        self._layout = layout
        self._starts = np.asarray(layout.slots, dtype=np.int64)[layout.row_of]  # (N,)
        self._kv_slots = self._starts + layout.positions  # (N,)
        # (2, N) positions and cache slots
        self._places = on_device(np.stack([layout.positions, self._kv_slots]), backbone.device)
        self._positions = self._places[0]
        self._indices: tuple[IntArray, Tensor] | None = None
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

    @abstractmethod
    def _arguments(self, tokens: IntArray, like: Tensor) -> Any:
        """Returns what blocks are called with for ``tokens`` (n,) of the batch besides their hidden states."""

    @abstractmethod
    def _arguments_of_deferred(self, tokens: Tensor, positions: Tensor, like: Tensor) -> Any:
        """Returns the same for those of the deferred tokens that are numbered ``tokens`` (m,), at these positions."""

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

    def run_block(self, block: int, tokens: IntArray, hidden: Tensor) -> Tensor:
        if (pending := self._take_pending(block, tokens)) is not None:
            self._write_states(block, *pending)
        if len(tokens) == 0:
            return hidden
        return self._call(block, hidden, self._active_tokens(block, tokens, hidden))

    def exit_tokens(self, tokens: IntArray, hidden: Tensor, layer: int) -> None:
        rows = self._layout.row_of[tokens]
        modes = np.asarray(self._layout.state_modes)[rows]
        deferred = np.flatnonzero((modes == "recompute") & (self._last_given[rows] > layer))
        if len(deferred):
            exit_hidden = hidden[0]
            chosen, of_batch = together_on_device([deferred, tokens[deferred]], self._backbone.device)
            if len(deferred) < len(tokens):
                exit_hidden = exit_hidden.index_select(0, chosen)
            assert self._ids is not None, "tokens were embedded"
            ids = self._ids.index_select(0, of_batch)
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

    def _take_pending(self, block: int, tokens: IntArray) -> tuple[PendingTokens, Tensor | None] | None:
        """Returns the deferred tokens of the rows in flight whose states a block is given now, None without any.

        With them come the indices of those that are meant; None for all. From now on their states count as given.
        """
        deferred = self._states.deferred
        if len(deferred) == 0:
            return None
        pending, passed = self._pending, sum(layer < block for layer in self._layout.exit_layers)
        if (
            pending is None
            or pending.in_flight is not tokens
            or (pending.passed, pending.version) != (passed, deferred.version)
        ):
            pending = self._pending = self._find_pending(block, tokens, passed)
        if pending.hidden is None:
            return None
        runs = self._layout.is_given_states(block, pending.rows)
        if not runs.any():
            return None
        chosen = None if runs.all() else on_device(np.flatnonzero(runs), self._backbone.device)
        is_complete = runs & (self._last_given[pending.rows] == block)
        deferred.done[pending.tokens[runs]] = block
        if is_complete.any():
            deferred.done[pending.tokens[is_complete]] = self._backbone.num_layers
            deferred.drop_complete(self._backbone.num_layers)
        return pending, chosen

    def _find_pending(self, block: int, in_flight: IntArray, passed: int) -> PendingTokens:
        """Returns the deferred tokens that ``block`` has no states of: those of the rows in flight, or of all rows."""
        deferred = self._states.deferred
        rows = np.arange(len(self._slots)) if self._materialize_all else np.unique(self._layout.row_of[in_flight])
        row_at = {int(self._slots[row]): int(row) for row in rows}
        row_of = np.asarray([row_at.get(slot, -1) for slot in deferred.slots.tolist()], dtype=np.int64)
        tokens = np.flatnonzero((row_of >= 0) & (deferred.done < block))
        slots, positions = deferred.slots[tokens], deferred.positions[tokens]
        chosen, places, kv_slots = together_on_device([tokens, positions, slots + positions], self._backbone.device)
        hidden, arguments = None, None
        if len(tokens) and deferred.hidden is not None:
            hidden = deferred.hidden.index_select(0, chosen).unsqueeze(0)
            arguments = self._arguments_of_deferred(chosen, places, hidden)
        return PendingTokens(
            in_flight=in_flight,
            passed=passed,
            version=deferred.version,
            tokens=tokens,
            rows=row_of[tokens],
            hidden=hidden,
            arguments=arguments,
            kv_slots=kv_slots,
        )

    def _copy(self, tokens: IntArray, layer: int) -> None:
        """Gives the later blocks the K and V that the last block which ran wrote for ``tokens`` (t,)."""
        rows = self._layout.row_of[tokens]
        for row in np.unique(rows):
            runs = self._layout.runs_block[row]
            kv_slots = on_device(self._kv_slots[tokens[rows == row]], self._backbone.device)
            source = int(np.flatnonzero(runs[: layer + 1])[-1])  # the last block that ran
            end = len(runs) - 1 if self._layout.final_block[row] else len(runs)
            for block in (np.flatnonzero(runs[layer + 1 : end]) + layer + 1).tolist():
                self._states.copy(source, block, kv_slots)

    def _indices_of(self, tokens: IntArray) -> Tensor:
        """Returns the indices of tokens in flight (n,) on the device; several parts of a pass ask for the same."""
        if self._indices is None or self._indices[0] is not tokens:
            self._indices = tokens, on_device(tokens, self._backbone.device)
        return self._indices[1]

    def _active_tokens(self, block: int, tokens: IntArray, hidden: Tensor) -> ActiveTokens:
        """Returns what ``block`` needs to know of the tokens in flight, as it was for the block before where it can."""
        last = block == self._backbone.num_layers and bool(self._layout.final_block.any())
        epoch = sum(layer < block for layer in self._skip_layers) + last
        active = self._active
        if active is not None and active.tokens is tokens and active.epoch == epoch:
            return active
        if active is None or active.tokens is not tokens:
            arguments = self._arguments(tokens, hidden)
            places = self._places
            if len(tokens) < len(self._starts):
                places = places.index_select(1, self._indices_of(tokens))
            positions, kv_slots = places[:1], places[1]
        else:
            arguments, positions, kv_slots = active.arguments, active.positions, active.kv_slots
        masked_kv_slots = self._states.masked_kv_slots(block) if self._skip_layers else None
        plan = attention.AttentionPlan(
            self._starts[tokens],
            self._layout.positions[tokens],
            masked_kv_slots,
            self._backbone.device,
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
