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

from dynamax_lm_eval.backbones.base import ForwardPass, IntArray, RowLayout
from dynamax_lm_eval.backbones.transformer import attention
from dynamax_lm_eval.backbones.transformer.fused_llama import signed_rotary
from dynamax_lm_eval.backbones.transformer.kv_cache import AttentionStates

if TYPE_CHECKING:
    from dynamax_lm_eval.backbones.transformer.backbone import TransformerBackbone


class RotaryEmbeddings(dict[str | None, tuple[Tensor, Tensor]]):
    """(cos, sin) of shape (1, n, P) by rotary key."""

    def __init__(self, angles: Mapping[str | None, tuple[Tensor, Tensor]]) -> None:
        super().__init__(angles)
        self._signed: dict[str | None, tuple[Tensor, Tensor]] = {}

    def signed(self, key: str | None) -> tuple[Tensor, Tensor]:
        """The angles as :class:`FusedLlamaBlock` wants them, made once for all blocks."""
        if key not in self._signed:
            self._signed[key] = signed_rotary(*self[key])
        return self._signed[key]


@dataclass(frozen=True)
class _Step:
    """One block has run on one row."""

    run: TransformerPass
    states: AttentionStates
    before: Tensor  # (1, T, D), what the block was given


class TransformerPass(ForwardPass):
    """One pass of a flat batch: positions, rotary angles and places are computed once for all blocks."""

    def __init__(
        self, backbone: TransformerBackbone, states: AttentionStates, layout: RowLayout, materialize_all: bool
    ) -> None:
        self._backbone = backbone
        self._states = states
        self._layout = layout
        self._starts = np.asarray(layout.slots, dtype=np.int64)[layout.row_of]  # (N,)
        self._places = self._starts + layout.positions  # (N,)
        self._positions = torch.from_numpy(layout.positions).to(backbone.device)
        self._rotary: RotaryEmbeddings | None = None
        self._flight: ActiveTokens | None = None
        self._materialize_all = materialize_all
        self._fused = [fused if fused is not None and fused.may_replace else None for fused in backbone.fused_blocks]
        self._slots = np.asarray(layout.slots, dtype=np.int64)
        self._pending: _Pending | None = None
        # Exits of rows in skip mode: behind each of them the blocks see fewer tokens.
        self._skip_layers = layout.exit_layers if "skip" in layout.state_modes else ()

    @cached_property
    def _last_given(self) -> IntArray:
        """(R,) the last block that is given states of a row's tokens that left; behind it none is deferred anything."""
        given = self._layout.runs_block.copy()
        given[self._layout.final_block, -1] = False
        last: IntArray = given.shape[1] - 1 - given[:, ::-1].argmax(axis=1)
        return last

    @property
    def has_pending_states(self) -> bool:
        return self._materialize_all and len(self._states.deferred) > 0

    @property
    def last_window(self) -> int | None:
        """The sliding window that the last block's attention was called with."""
        return self._flight.plan.last_window if self._flight is not None else None

    def run_block(self, block: int, tokens: IntArray, hidden: Tensor) -> Tensor:
        self._materialize(block, tokens)
        if len(tokens) == 0:
            return hidden
        flight = self._in_flight(block, tokens, hidden)
        scatter = _Scatter(self._states, block, flight.places)
        fused = self._fused[block - 1]
        if fused is None:
            return self._backbone.call_block(block, hidden, scatter, flight)
        angles = flight.rotary.signed(self._backbone.blocks[block - 1].rotary_key)
        return fused(hidden, *angles, scatter.write, flight.plan)

    def exit_tokens(self, tokens: IntArray, hidden: Tensor, layer: int) -> None:
        rows = self._layout.row_of[tokens]
        modes = np.asarray(self._layout.state_modes)[rows]
        deferred = np.flatnonzero((modes == "recompute") & (self._last_given[rows] > layer))
        if len(deferred):
            chosen = hidden[0] if len(deferred) == len(tokens) else hidden[0].index_select(0, self._on_device(deferred))
            self._states.deferred.add(
                self._starts[tokens[deferred]], self._layout.positions[tokens[deferred]], chosen, layer
            )
        skipped = tokens[modes == "skip"]
        if len(skipped):
            self._states.layer_of[self._places[skipped]] = layer
            final = self._layout.final_block[self._layout.row_of[skipped]]
            self._states.runs_last[self._places[skipped]] = final
        copied = tokens[modes == "copy"]
        if len(copied):
            self._copy(copied, layer)

    def _materialize(self, block: int, tokens: IntArray) -> None:
        """Gives the block the states that it is deferred of the rows in flight."""
        deferred = self._states.deferred
        if len(deferred) == 0:
            return
        pending, passed = self._pending, sum(layer < block for layer in self._layout.exit_layers)
        if (
            pending is None
            or pending.flight is not tokens
            or (pending.passed, pending.version) != (passed, deferred.version)
        ):
            pending = self._pending = self._find_pending(block, tokens, passed)
        if pending.hidden is None:
            return
        runs = self._layout.is_given_states(block, pending.rows)
        if not runs.any():
            return
        key, value = self.project(block, pending.hidden, pending.rotary)
        places = pending.places
        if not runs.all():
            chosen = self._on_device(np.flatnonzero(runs))
            key, value, places = key.index_select(0, chosen), value.index_select(0, chosen), places[chosen]
        self._states.write(block, places, key, value)
        paid_off = runs & (self._last_given[pending.rows] == block)
        deferred.done[pending.tokens[runs]] = block
        if paid_off.any():
            deferred.done[pending.tokens[paid_off]] = self._backbone.num_layers
            deferred.drop_complete(self._backbone.num_layers)

    def project(self, block: int, hidden: Tensor, rotary: RotaryEmbeddings) -> tuple[Tensor, Tensor]:
        """K and V (m, H_kv, P) that ``block`` would write for hidden states (1, m, D) at these angles."""
        described, fused = self._backbone.blocks[block - 1], self._fused[block - 1]
        if fused is not None:
            return fused.states(hidden, *rotary.signed(described.rotary_key))
        key, value = described.project(described.norm(hidden), *rotary[described.rotary_key])
        return key[0].transpose(0, 1), value[0].transpose(0, 1)

    def _find_pending(self, block: int, flight: IntArray, passed: int) -> _Pending:
        """The deferred tokens of the rows in flight (of all rows of an eager pass) that ``block`` has no states of."""
        deferred = self._states.deferred
        rows = np.arange(len(self._slots)) if self._materialize_all else np.unique(self._layout.row_of[flight])
        row_at = {int(self._slots[row]): int(row) for row in rows}
        row_of = np.asarray([row_at.get(slot, -1) for slot in deferred.slots.tolist()], dtype=np.int64)
        tokens = np.flatnonzero((row_of >= 0) & (deferred.done < block))
        hidden, rotary = None, RotaryEmbeddings({})
        if len(tokens) and deferred.hidden is not None:
            hidden = deferred.hidden.index_select(0, self._on_device(tokens)).unsqueeze(0)
            rotary = self._backbone.position_embeddings(
                self._on_device(deferred.positions[tokens]).unsqueeze(0), hidden
            )
        return _Pending(
            flight=flight,
            passed=passed,
            version=deferred.version,
            tokens=tokens,
            rows=row_of[tokens],
            hidden=hidden,
            rotary=rotary,
            places=self._on_device(deferred.slots[tokens] + deferred.positions[tokens]),
        )

    def _copy(self, tokens: IntArray, layer: int) -> None:
        rows = self._layout.row_of[tokens]
        for row in np.unique(rows):
            runs = self._layout.runs_block[row]
            places = self._device_places(tokens[rows == row])
            source = int(np.flatnonzero(runs[: layer + 1])[-1])  # the last block that ran
            end = len(runs) - 1 if self._layout.final_block[row] else len(runs)
            for block in (np.flatnonzero(runs[layer + 1 : end]) + layer + 1).tolist():
                self._states.copy(source, block, places)

    def _in_flight(self, block: int, tokens: IntArray, hidden: Tensor) -> ActiveTokens:
        last = block == self._backbone.num_layers and bool(self._layout.final_block.any())
        epoch = sum(layer < block for layer in self._skip_layers) + last
        flight = self._flight
        if flight is not None and flight.tokens is tokens and flight.epoch == epoch:
            return flight
        if flight is None or flight.tokens is not tokens:
            chosen = torch.from_numpy(tokens).to(self._backbone.device)
            rotary = RotaryEmbeddings(
                {
                    key: (cos.index_select(1, chosen), sin.index_select(1, chosen))
                    for key, (cos, sin) in self._angles(hidden).items()
                }
            )
            positions = self._positions.index_select(0, chosen).unsqueeze(0)
            places = self._device_places(tokens)
        else:
            rotary, positions, places = flight.rotary, flight.positions, flight.places
        masked_slots = self._states.masked_slots(block) if self._skip_layers else None
        plan = attention.AttentionPlan(
            self._starts[tokens],
            self._layout.positions[tokens],
            masked_slots,
            self._backbone.device,
            self._states.row_stride,
        )
        self._flight = ActiveTokens(tokens, epoch, places, positions, rotary, plan)
        return self._flight

    def _angles(self, like: Tensor) -> RotaryEmbeddings:
        if self._rotary is None:
            self._rotary = self._backbone.position_embeddings(self._positions.unsqueeze(0), like)
        return self._rotary

    def _device_places(self, tokens: IntArray) -> Tensor:
        return self._on_device(self._places[tokens])

    def _on_device(self, values: IntArray) -> Tensor:
        return torch.from_numpy(values).to(self._backbone.device)


@dataclass(frozen=True)
class ActiveTokens:
    """What the blocks need to know of the tokens in flight; valid while these are the same tokens."""

    tokens: IntArray
    epoch: int  # exits passed by rows in skip mode, and whether this is a final block
    places: Tensor  # (n,)
    positions: Tensor  # (1, n)
    rotary: RotaryEmbeddings
    plan: attention.AttentionPlan


@dataclass(frozen=True)
class _Pending:
    """Owed tokens whose states the blocks up to the next exit need.

    Valid while the same tokens are in flight, no further exit has been passed, and nothing more is deferred.
    """

    flight: IntArray
    passed: int
    version: int
    tokens: IntArray  # (m,) among those deferred
    rows: IntArray  # (m,) their rows in the pass
    hidden: Tensor | None  # (1, m, D); None: there are none
    rotary: RotaryEmbeddings
    places: Tensor  # (m,)


class _Scatter:
    """Stands in for transformers' cache: writes K and V to the places of the tokens, returns the caches."""

    def __init__(self, states: AttentionStates, block: int, places: Tensor) -> None:
        self._states = states
        self._block = block
        self._places = places

    def write(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """For K and V (n, H_kv, P)."""
        return self._states.write(self._block, self._places, key, value)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """For K and V (1, H_kv, n, P), as blocks of transformers call it."""
        return self.write(key[0].transpose(0, 1), value[0].transpose(0, 1))
