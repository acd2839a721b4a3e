"""A pass that defers the states of tokens that left, until a later token of their row needs them.

N tokens of a flat batch, m of them deferred, R rows, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import BoolArray, ForwardPass, IntArray, RowLayout, on_device
from dynamax_lm_eval.backbones.transformer.deferred_kv import DeferredKV


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
    positions: IntArray  # (m,)
    hidden: Tensor | None  # (1, m, D) at their exits; None: there are none


class DeferringPass(ForwardPass):
    """One pass of a flat batch, some of whose tokens leave their states for later."""

    def __init__(
        self, layout: RowLayout, deferred: DeferredKV, num_layers: int, device: torch.device, materialize_all: bool
    ) -> None:
        self._layout = layout
        self._deferred = deferred
        self._num_layers = num_layers
        self._device = device
        self._materialize_all = materialize_all
        self._slots = np.asarray(layout.slots, dtype=np.int64)
        self._pending: PendingTokens | None = None

    @property
    def has_pending_states(self) -> bool:
        return self._materialize_all and len(self._deferred) > 0

    @cached_property
    def _last_given(self) -> IntArray:
        """The last block (R,) that is given states of a row's tokens that left; for later ones nothing is deferred."""
        is_given = self._layout.runs_block.copy()
        is_given[self._layout.final_block, -1] = False
        last: IntArray = is_given.shape[1] - 1 - is_given[:, ::-1].argmax(axis=1)
        return last

    def _defer(self, tokens: IntArray, ids: Tensor, hidden: Tensor, layer: int) -> None:
        """Defers the states of those of tokens (t,), ids (N,), hidden (1, t, D), whose rows recompute them."""
        rows = self._layout.row_of[tokens]
        modes = np.asarray(self._layout.state_modes)[rows]
        chosen = np.flatnonzero((modes == "recompute") & (self._last_given[rows] > layer))
        if len(chosen) == 0:
            return
        exit_hidden = hidden[0]
        if len(chosen) < len(tokens):
            exit_hidden = exit_hidden.index_select(0, on_device(chosen, self._device))
        own = tokens[chosen]
        self._deferred.add(
            self._slots[rows[chosen]],
            self._layout.positions[own],
            ids.index_select(0, on_device(own, self._device)),
            exit_hidden,
            layer,
        )

    def _pending_at(self, block: int, in_flight: IntArray) -> PendingTokens | None:
        """Returns the deferred tokens that ``block`` has no states of, of the rows in flight; None: there are none."""
        if len(self._deferred) == 0:
            return None
        pending, passed = self._pending, sum(layer < block for layer in self._layout.exit_layers)
        if (
            pending is None
            or pending.in_flight is not in_flight
            or (pending.passed, pending.version) != (passed, self._deferred.version)
        ):
            pending = self._pending = self._find_pending(block, in_flight, passed)
        return None if pending.hidden is None else pending

    def _note_given(self, block: int, pending: PendingTokens, given: BoolArray) -> None:
        """Notes that ``block`` now has the states of those of the pending tokens for which ``given`` (m,) is true."""
        is_complete = given & (self._last_given[pending.rows] == block)
        self._deferred.done[pending.tokens[given]] = block
        if is_complete.any():
            self._deferred.done[pending.tokens[is_complete]] = self._num_layers
            self._deferred.drop_complete(self._num_layers)

    def _find_pending(self, block: int, in_flight: IntArray, passed: int) -> PendingTokens:
        deferred = self._deferred
        rows = np.arange(len(self._slots)) if self._materialize_all else np.unique(self._layout.row_of[in_flight])
        row_at = {int(self._slots[row]): int(row) for row in rows}
        row_of = np.asarray([row_at.get(slot, -1) for slot in deferred.slots.tolist()], dtype=np.int64)
        tokens = np.flatnonzero((row_of >= 0) & (deferred.done < block))
        hidden = None
        if len(tokens) and deferred.hidden is not None:
            hidden = deferred.hidden.index_select(0, on_device(tokens, self._device)).unsqueeze(0)
        return PendingTokens(
            in_flight=in_flight,
            passed=passed,
            version=deferred.version,
            tokens=tokens,
            rows=row_of[tokens],
            positions=deferred.positions[tokens],
            hidden=hidden,
        )
