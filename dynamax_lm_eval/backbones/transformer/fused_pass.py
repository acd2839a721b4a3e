"""One pass of a flat batch through fused blocks: they are called with rotary embeddings and nothing else.

N tokens of a flat batch, n in flight, m that left, D hidden, H_kv K/V heads, P head dim.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import IntArray, RowLayout, on_device
from dynamax_lm_eval.backbones.transformer.forward_pass import ActiveTokens, AttentionPass, PendingTokens
from dynamax_lm_eval.backbones.transformer.fused_llama import signed_rotary
from dynamax_lm_eval.backbones.transformer.kv_cache import AttentionStates

if TYPE_CHECKING:
    from dynamax_lm_eval.backbones.transformer.backbone import TransformerBackbone


class RotaryEmbeddings:
    """The rotary embeddings of some tokens."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        """``cos``, ``sin``: (1, n, P)."""
        self.angles = (cos, sin)
        self._signed: tuple[Tensor, Tensor] | None = None

    def select(self, indices: Tensor) -> RotaryEmbeddings:
        """Returns those of some of the tokens."""
        cos, sin = (part.index_select(1, indices) for part in self.angles)
        return RotaryEmbeddings(cos, sin)

    @property
    def signed(self) -> tuple[Tensor, Tensor]:
        """Cos and sin as :class:`FusedLlamaBlock` takes them, made once for all blocks."""
        if self._signed is None:
            self._signed = signed_rotary(*self.angles)
        return self._signed


class StatesWritten(Exception):  # noqa: N818 (a signal)
    """A block has written all its states, and what follows in it need not run."""


class FusedPass(AttentionPass):
    """One pass of a flat batch; a block that somebody has hooked runs as its family wrote it."""

    def __init__(
        self, backbone: TransformerBackbone, states: AttentionStates, layout: RowLayout, materialize_all: bool
    ) -> None:
        super().__init__(backbone, states, layout, materialize_all)
        self._blocks = backbone
        self._fused = [fused if fused.may_replace else None for fused in backbone.fused_blocks]
        self._rotary: dict[torch.device, RotaryEmbeddings] = {}

    def _arguments(self, tokens: IntArray, like: Tensor) -> RotaryEmbeddings:
        device = like.device
        if device not in self._rotary:
            self._rotary[device] = self._blocks.position_embeddings(self._positions_on(device).unsqueeze(0), like)
        return self._rotary[device].select(on_device(tokens, device))

    def _arguments_of_deferred(self, tokens: IntArray, like: Tensor) -> RotaryEmbeddings:
        positions = on_device(self._states.deferred.positions[tokens], like.device)
        return self._blocks.position_embeddings(positions.unsqueeze(0), like)

    def _call(self, block: int, hidden: Tensor, active: ActiveTokens) -> Tensor:
        scatter = _Scatter(self._states, block, active.kv_slots)
        fused = self._fused[block - 1]
        rotary: RotaryEmbeddings = active.arguments
        if fused is None:
            return self._blocks.call_block(block, hidden, scatter, rotary, active.positions, active.plan)
        cos, sin = rotary.signed
        return fused(hidden, cos, sin, scatter.write, active.plan)

    def _write_states(self, block: int, pending: PendingTokens, chosen: Tensor | None) -> None:
        assert pending.hidden is not None
        key, value = self.project(block, pending.hidden, pending.arguments)
        kv_slots = pending.kv_slots
        if chosen is not None:
            key, value, kv_slots = key.index_select(0, chosen), value.index_select(0, chosen), kv_slots[chosen]
        self._states.write(block, kv_slots, key, value)

    def project(self, block: int, hidden: Tensor, rotary: RotaryEmbeddings) -> tuple[Tensor, Tensor]:
        """Returns K and V (m, H_kv, P) that ``block`` would write for hidden states (1, m, D) at these angles."""
        fused = self._fused[block - 1]
        if fused is not None:
            return fused.states(hidden, *rotary.signed)
        taken = _Taken()
        with suppress(StatesWritten):
            self._blocks.call_block(block, hidden, taken, rotary, None, None)
        return taken.states


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


class _Taken:
    """A stand-in for transformers' cache, which keeps K and V of the tokens and stops the block."""

    states: tuple[Tensor, Tensor]

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes K and V (1, H_kv, m, P)."""
        self.states = key[0].transpose(0, 1), value[0].transpose(0, 1)
        raise StatesWritten
