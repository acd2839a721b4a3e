"""One pass of a flat batch through fused blocks: they are called with rotary embeddings and nothing else.

N tokens of a flat batch, n in flight, m that left, D hidden, H_kv K/V heads, P head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import IntArray, RowLayout, on_device
from dynamax_lm_eval.backbones.deferring import PendingTokens
from dynamax_lm_eval.backbones.forwards import replaced_forwards
from dynamax_lm_eval.backbones.learned import MappedProject, StateProjection, mapped_forwards
from dynamax_lm_eval.backbones.segments import Places, StaticCall, StaticMaps, bucket
from dynamax_lm_eval.backbones.transformer import varlen
from dynamax_lm_eval.backbones.transformer.forward_pass import ActiveTokens, AttentionPass
from dynamax_lm_eval.backbones.transformer.fused_llama import signed_rotary
from dynamax_lm_eval.backbones.transformer.kv_cache import AttentionStates
from dynamax_lm_eval.backbones.transformer.previous import PreviousStates, turned
from dynamax_lm_eval.backbones.transformer.segments import FusedSegment, SingleTokens

if TYPE_CHECKING:
    from dynamax_lm_eval.backbones.transformer.backbone import TransformerBackbone


#: Tokens of which a GPU makes K and V in one product, those that left with those in flight: reading the weights takes
#: longer than multiplying so few.
_FEW = 256


class RotaryEmbeddings:
    """The rotary embeddings of some tokens."""

    def __init__(self, cos: Tensor, sin: Tensor, signed: tuple[Tensor, Tensor] | None = None) -> None:
        """``cos``, ``sin``: (1, n, P); ``signed``: what :attr:`signed` is, where that is known."""
        self.angles = (cos, sin)
        self._signed = signed

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


class RotaryTable:
    """The rotary embeddings of all positions, from which those of some tokens are taken in one operation."""

    def __init__(self, rotary: RotaryEmbeddings) -> None:
        """``rotary``: of the positions 0, 1, 2 and so on."""
        cos, sin = rotary.angles
        self._rows = torch.stack((cos[0], sin[0], rotary.signed[1][0, :, 0]), dim=1)  # (positions, 3, P)

    def __len__(self) -> int:
        return len(self._rows)

    def at(self, positions: Tensor) -> RotaryEmbeddings:
        """Returns those at positions (n,)."""
        cos, sin, signed = self._rows.index_select(0, positions).unsqueeze(0).unbind(2)
        return RotaryEmbeddings(cos, sin, (cos.unsqueeze(2), signed.unsqueeze(2)))


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
        self._merged: _MergedTokens | None = None
        self._previous: PreviousStates | None = None
        if "copy_previous" in layout.state_modes:
            self._previous = PreviousStates(states, layout, self._starts, self._turned)

    @property
    def has_pending_states(self) -> bool:
        return super().has_pending_states or (self._previous is not None and self._previous.is_waiting)

    def exit_tokens(self, tokens: IntArray, hidden: Tensor, layer: int) -> None:
        super().exit_tokens(tokens, hidden, layer)
        if self._previous is not None:
            self._previous.leave(tokens, layer)

    def _run_block(self, block: int, tokens: IntArray, hidden: Tensor) -> Tensor:
        if self._previous is not None and len(tokens) == 0:
            self._previous.give(block)
        taken, fused = self._take_pending(block, tokens, hidden.device), self._fused[block - 1]
        if taken is not None:
            pending, chosen = taken
            assert pending.hidden is not None
            few = 0 < len(tokens) <= _FEW - len(pending.tokens)
            few &= pending.origins.mapped(self.state_maps, block) is None
            if few and fused is not None and chosen is None and hidden.device.type == "cuda":
                active = self._active_tokens(block, tokens, hidden)
                merged = self._merge(active, pending)
                scatter = _Scatter(self._states, block, merged.kv_slots, self._previous)
                return fused(hidden, *merged.signed, scatter.write, active.plan, pending.hidden)
        return self._run_taken(block, tokens, hidden, taken)

    def _reason_against_blocks(self, blocks: tuple[int, ...]) -> str | None:
        assert self._segments is not None
        fused = [self._blocks.fused_blocks[block - 1] for block in blocks]
        if not all(block.is_plain for block in fused):
            return "blocks that are hooked, adapted or quantised"
        dtype = fused[0].empty_states()[0].dtype
        if not self._segments.use.everywhere and not varlen.takes(self._blocks.device, dtype, fused[0].head_dim):
            return "no kernel of ragged rows"
        return None

    def _static_call(
        self, blocks: tuple[int, ...], tokens: IntArray, left: IntArray, rows: IntArray, like: Tensor
    ) -> StaticCall | str:
        fused = [block for block in (self._fused[block - 1] for block in blocks) if block is not None]
        if len(fused) < len(blocks):
            return "blocks that are hooked, adapted or quantised"
        if self._skip_layers:
            return "state_mode=skip"
        starts, positions = self._starts[tokens], self._layout.positions[tokens]
        own = self._deferred.slots[left], self._deferred.positions[left]
        windows = tuple(dict.fromkeys(block.window for block in fused))
        singles = SingleTokens.of(starts, positions, left, *own, self._states.scratch_slot, windows)
        # Tokens that left stand before those of their rows in flight.
        longest, row_stride, backbone = int(positions.max()) + 1, self._states.row_stride, self._blocks
        has_kernel = varlen.takes(like.device, like.dtype, fused[0].head_dim)
        most_keys = row_stride if has_kernel and row_stride is not None else bucket(longest)
        table = backbone.rotary_table(longest, like)
        if table is None and like.device.type == "cuda":
            return "rotary embeddings that are hooked"

        def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
            found = backbone.position_embeddings(positions.unsqueeze(0), like) if table is None else table.at(positions)
            return found.signed

        def segment(places: Places, mapped: StaticMaps) -> FusedSegment:
            pairs = zip(blocks, fused, strict=True)
            caches = [self._states.caches(block, part.empty_states()) for block, part in pairs]
            maps = [mapped(block) for block in blocks]
            return FusedSegment(fused, caches, maps, places, singles, rotary, most_keys)

        return StaticCall(
            key=(blocks, most_keys),
            storage=table,
            num_tokens=singles.num_tokens,
            num_left=singles.num_left,
            numbers=singles.numbers,
            make=segment,
        )

    def _merge(self, active: ActiveTokens, pending: PendingTokens) -> _MergedTokens:
        """Returns what a block is called with for tokens in flight and those that left, made once for many blocks."""
        merged = self._merged
        if merged is None or merged.active is not active or merged.pending is not pending:
            pairs = zip(active.arguments.signed, pending.arguments.signed, strict=True)
            cos, sin = (torch.cat(pair, dim=1) for pair in pairs)
            kv_slots = torch.cat((active.kv_slots, pending.kv_slots))
            merged = self._merged = _MergedTokens(active, pending, (cos, sin), kv_slots)
        return merged

    def _arguments(self, tokens: IntArray, like: Tensor) -> RotaryEmbeddings:
        device, whole = like.device, len(tokens) == len(self._starts)
        positions = self._positions_on(device)
        if (table := self._blocks.rotary_table(int(self._layout.positions.max()) + 1, like)) is not None:
            return table.at(positions if whole else positions.index_select(0, self._indices_of(tokens, device)))
        if device not in self._rotary:
            self._rotary[device] = self._blocks.position_embeddings(positions.unsqueeze(0), like)
        rotary = self._rotary[device]
        return rotary if whole else rotary.select(self._indices_of(tokens, device))

    def _arguments_of_deferred(self, tokens: Tensor, places: Sequence[Tensor], like: Tensor) -> RotaryEmbeddings:
        positions, longest = places[0], int(self._deferred.positions.max()) + 1
        if (table := self._blocks.rotary_table(longest, like)) is not None:
            return table.at(positions)
        return self._blocks.position_embeddings(positions.unsqueeze(0), like)

    def _turned(self, keys: Tensor, distances: Tensor) -> Tensor:
        """Returns K (t, H_kv, P) turned by distances (t,), for :class:`PreviousStates`."""
        return turned(keys, *self._blocks.turning(distances, keys))

    def _call(self, block: int, hidden: Tensor, active: ActiveTokens) -> Tensor:
        scatter = _Scatter(self._states, block, active.kv_slots, self._previous)
        fused = self._fused[block - 1]
        rotary: RotaryEmbeddings = active.arguments
        if fused is None:
            return self._blocks.call_block(block, hidden, scatter, rotary, active.positions, active.plan)
        cos, sin = rotary.signed
        return fused(hidden, cos, sin, scatter.write, active.plan)

    def _write_states(self, block: int, pending: PendingTokens, chosen: IntArray | None) -> None:
        assert pending.hidden is not None
        mapped = pending.origins.mapped(self.state_maps, block)
        key, value = self.project(block, pending.hidden, pending.arguments, mapped)
        kv_slots = pending.kv_slots
        if chosen is not None:
            indices = on_device(chosen, pending.device)
            key, value, kv_slots = key.index_select(0, indices), value.index_select(0, indices), kv_slots[indices]
        self._states.write(block, kv_slots, key, value)

    def project(
        self, block: int, hidden: Tensor, rotary: RotaryEmbeddings, mapped: MappedProject | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns K and V (m, H_kv, P) that ``block`` would write for hidden states (1, m, D) at these angles.

        ``mapped``: what stands in place of its projections to them.
        """
        fused = self._fused[block - 1]
        if fused is not None:
            return fused.states(hidden, *rotary.signed, mapped)
        taken = _Taken()
        modules = self._blocks.fused_blocks[block - 1].kv_projections
        with suppress(StatesWritten), replaced_forwards(mapped_forwards(modules, mapped) if mapped else []):
            self._blocks.call_block(block, hidden, taken, rotary, None, None)
        return taken.states

    def state_projection(self, block: int, hidden: Tensor) -> StateProjection:
        fused = self._blocks.fused_blocks[block - 1]
        return StateProjection(fused.state_inputs(hidden)[0], fused.project_states)


class _MergedTokens(NamedTuple):
    """The n tokens in flight and, after them, m that left, as one call of a block makes K and V of both."""

    active: ActiveTokens
    pending: PendingTokens
    signed: tuple[Tensor, Tensor]  # (1, n + m, 1, P)
    kv_slots: Tensor  # (n + m,)


class _Scatter:
    """A stand-in for transformers' cache, which writes K and V to the cache slots of the tokens."""

    def __init__(
        self, states: AttentionStates, block: int, kv_slots: Tensor, previous: PreviousStates | None = None
    ) -> None:
        """``previous``: gives a block further states, once it has written these."""
        self._states = states
        self._block = block
        self._kv_slots = kv_slots
        self._previous = previous

    def write(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes K and V (n, H_kv, P)."""
        caches = self._states.write(self._block, self._kv_slots, key, value)
        if self._previous is not None:
            self._previous.give(self._block)
        return caches

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
