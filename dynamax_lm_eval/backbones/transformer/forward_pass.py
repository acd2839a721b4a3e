"""One pass of a flat batch through the blocks of a Transformer.

N tokens of a flat batch, n in flight, m that left, D hidden, H_kv K/V heads, P head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import ForwardPass, IntArray, RowLayout, on_device
from dynamax_lm_eval.backbones.transformer import attention
from dynamax_lm_eval.backbones.transformer.fused_llama import signed_rotary
from dynamax_lm_eval.backbones.transformer.kv_cache import AttentionStates

if TYPE_CHECKING:
    from dynamax_lm_eval.backbones.transformer.backbone import TransformerBackbone


class RotaryEmbeddings(dict[str | None, tuple[Tensor, Tensor]]):
    """The rotary embeddings (cos, sin) of some tokens, each of shape (1, n, P), by rotary key."""

    def __init__(self, angles: Mapping[str | None, tuple[Tensor, Tensor]]) -> None:
        super().__init__(angles)
        self._signed: dict[str | None, tuple[Tensor, Tensor]] = {}

    def signed(self, key: str | None) -> tuple[Tensor, Tensor]:
        """Returns cos and sin as :class:`FusedLlamaBlock` takes them, made once for all blocks."""
        if key not in self._signed:
            self._signed[key] = signed_rotary(*self[key])
        return self._signed[key]


@dataclass(frozen=True)
class _Step:
    """The pass and its states after one block has run on one row."""

    run: TransformerPass
    states: AttentionStates
    before: Tensor  # (1, T, D), what the block was given


class TransformerPass(ForwardPass):
    """One pass of a flat batch: positions, rotary embeddings and cache slots are computed once for all blocks."""

    def __init__(
        self, backbone: TransformerBackbone, states: AttentionStates, layout: RowLayout, materialize_all: bool
    ) -> None:
        self._backbone = backbone
        self._states = states
        self._layout = layout
        self._starts = np.asarray(layout.slots, dtype=np.int64)[layout.row_of]  # (N,)
        self._kv_slots = self._starts + layout.positions  # (N,)
        self._positions = torch.from_numpy(layout.positions).to(backbone.device)
        self._rotary: RotaryEmbeddings | None = None
        self._active: ActiveTokens | None = None
        self._materialize_all = materialize_all
        self._fused = [fused if fused is not None and fused.may_replace else None for fused in backbone.fused_blocks]
        self._slots = np.asarray(layout.slots, dtype=np.int64)
        self._pending: _Pending | None = None
        # Exits of rows in skip mode: behind each of them the blocks see fewer tokens.
        self._skip_layers = layout.exit_layers if "skip" in layout.state_modes else ()

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

    @property
    def last_window(self) -> int | None:
        """The sliding window that the last block's attention was called with."""
        return self._active.plan.last_window if self._active is not None else None

    def run_block(self, block: int, tokens: IntArray, hidden: Tensor) -> Tensor:
        self._materialize(block, tokens)
        if len(tokens) == 0:
            return hidden
        active = self._active_tokens(block, tokens, hidden)
        scatter = _Scatter(self._states, block, active.kv_slots)
        fused = self._fused[block - 1]
        if fused is None:
            return self._backbone.call_block(block, hidden, scatter, active)
        angles = active.rotary.signed(self._backbone.blocks[block - 1].rotary_key)
        return fused(hidden, *angles, scatter.write, active.plan)

    def exit_tokens(self, tokens: IntArray, hidden: Tensor, layer: int) -> None:
        rows = self._layout.row_of[tokens]
        modes = np.asarray(self._layout.state_modes)[rows]
        deferred = np.flatnonzero((modes == "recompute") & (self._last_given[rows] > layer))
        if len(deferred):
            exit_hidden = hidden[0]
            if len(deferred) < len(tokens):
                exit_hidden = exit_hidden.index_select(0, on_device(deferred, self._backbone.device))
            self._states.deferred.add(
                self._starts[tokens[deferred]], self._layout.positions[tokens[deferred]], exit_hidden, layer
            )
        skipped = tokens[modes == "skip"]
        if len(skipped):
            self._states.layer_of[self._kv_slots[skipped]] = layer
            final = self._layout.final_block[self._layout.row_of[skipped]]
            self._states.runs_last[self._kv_slots[skipped]] = final
        copied = tokens[modes == "copy"]
        if len(copied):
            self._copy(copied, layer)

    def _materialize(self, block: int, tokens: IntArray) -> None:
        """Gives a block the states that were deferred of the rows in flight."""
        deferred = self._states.deferred
        if len(deferred) == 0:
            return
        pending, passed = self._pending, sum(layer < block for layer in self._layout.exit_layers)
        if (
            pending is None
            or pending.in_flight is not tokens
            or (pending.passed, pending.version) != (passed, deferred.version)
        ):
            pending = self._pending = self._find_pending(block, tokens, passed)
        if pending.hidden is None:
            return
        runs = self._layout.is_given_states(block, pending.rows)
        if not runs.any():
            return
        key, value = self.project(block, pending.hidden, pending.rotary)
        kv_slots = pending.kv_slots
        if not runs.all():
            indices = on_device(np.flatnonzero(runs), self._backbone.device)
            key, value, kv_slots = key.index_select(0, indices), value.index_select(0, indices), kv_slots[indices]
        self._states.write(block, kv_slots, key, value)
        is_complete = runs & (self._last_given[pending.rows] == block)
        deferred.done[pending.tokens[runs]] = block
        if is_complete.any():
            deferred.done[pending.tokens[is_complete]] = self._backbone.num_layers
            deferred.drop_complete(self._backbone.num_layers)

    def project(self, block: int, hidden: Tensor, rotary: RotaryEmbeddings) -> tuple[Tensor, Tensor]:
        """Returns K and V (m, H_kv, P) that ``block`` would write for hidden states (1, m, D) at these angles."""
        described, fused = self._backbone.blocks[block - 1], self._fused[block - 1]
        if fused is not None:
            return fused.states(hidden, *rotary.signed(described.rotary_key))
        key, value = described.project(described.norm(hidden), *rotary[described.rotary_key])
        return key[0].transpose(0, 1), value[0].transpose(0, 1)

    def _find_pending(self, block: int, in_flight: IntArray, passed: int) -> _Pending:
        """Returns the deferred tokens that ``block`` has no states of: those of the rows in flight, or of all rows."""
        deferred = self._states.deferred
        rows = np.arange(len(self._slots)) if self._materialize_all else np.unique(self._layout.row_of[in_flight])
        row_at = {int(self._slots[row]): int(row) for row in rows}
        row_of = np.asarray([row_at.get(slot, -1) for slot in deferred.slots.tolist()], dtype=np.int64)
        tokens = np.flatnonzero((row_of >= 0) & (deferred.done < block))
        device = self._backbone.device
        hidden, rotary = None, RotaryEmbeddings({})
        if len(tokens) and deferred.hidden is not None:
            hidden = deferred.hidden.index_select(0, on_device(tokens, device)).unsqueeze(0)
            positions = on_device(deferred.positions[tokens], device).unsqueeze(0)
            rotary = self._backbone.position_embeddings(positions, hidden)
        return _Pending(
            in_flight=in_flight,
            passed=passed,
            version=deferred.version,
            tokens=tokens,
            rows=row_of[tokens],
            hidden=hidden,
            rotary=rotary,
            kv_slots=on_device(deferred.slots[tokens] + deferred.positions[tokens], device),
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

    def _active_tokens(self, block: int, tokens: IntArray, hidden: Tensor) -> ActiveTokens:
        """Returns what ``block`` needs to know of the tokens in flight, as it was for the block before where it can."""
        last = block == self._backbone.num_layers and bool(self._layout.final_block.any())
        epoch = sum(layer < block for layer in self._skip_layers) + last
        active = self._active
        if active is not None and active.tokens is tokens and active.epoch == epoch:
            return active
        if active is None or active.tokens is not tokens:
            indices = on_device(tokens, self._backbone.device)
            rotary = RotaryEmbeddings(
                {
                    key: (cos.index_select(1, indices), sin.index_select(1, indices))
                    for key, (cos, sin) in self._rotary_embeddings(hidden).items()
                }
            )
            positions = self._positions.index_select(0, indices).unsqueeze(0)
            kv_slots = on_device(self._kv_slots[tokens], self._backbone.device)
        else:
            rotary, positions, kv_slots = active.rotary, active.positions, active.kv_slots
        masked_kv_slots = self._states.masked_kv_slots(block) if self._skip_layers else None
        plan = attention.AttentionPlan(
            self._starts[tokens],
            self._layout.positions[tokens],
            masked_kv_slots,
            self._backbone.device,
            self._states.row_stride,
        )
        self._active = ActiveTokens(tokens, epoch, kv_slots, positions, rotary, plan)
        return self._active

    def _rotary_embeddings(self, like: Tensor) -> RotaryEmbeddings:
        """Returns the rotary embeddings of all N tokens, in the dtype of ``like``."""
        if self._rotary is None:
            self._rotary = self._backbone.position_embeddings(self._positions.unsqueeze(0), like)
        return self._rotary


@dataclass(frozen=True)
class ActiveTokens:
    """The tokens in flight as blocks need to know them; valid while these are the same tokens."""

    tokens: IntArray
    epoch: int  # exits passed by rows in skip mode, and whether this is a final block
    kv_slots: Tensor  # (n,)
    positions: Tensor  # (1, n)
    rotary: RotaryEmbeddings
    plan: attention.AttentionPlan


@dataclass(frozen=True)
class _Pending:
    """The deferred tokens whose states the blocks up to the next exit need.

    Valid while the same tokens are in flight, no further exit has been passed, and nothing more is deferred.
    """

    in_flight: IntArray
    passed: int  # exits
    version: int  # of the deferred tokens
    tokens: IntArray  # (m,) among those deferred
    rows: IntArray  # (m,) their rows in the pass
    hidden: Tensor | None  # (1, m, D); None: there are none
    rotary: RotaryEmbeddings
    kv_slots: Tensor  # (m,)


class _Scatter:
    """A stand-in for transformers' cache, which writes K and V to the cache slots of the tokens."""

    def __init__(self, states: AttentionStates, block: int, kv_slots: Tensor) -> None:
        self._states = states
        self._block = block
        self._kv_slots = kv_slots

    def write(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes K and V (n, H_kv, P)."""
        return self._states.write(self._block, self._kv_slots, key, value)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes K and V (1, H_kv, n, P), as blocks of transformers call it."""
        return self.write(key[0].transpose(0, 1), value[0].transpose(0, 1))
