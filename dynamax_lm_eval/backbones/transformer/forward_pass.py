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
from dynamax_lm_eval.backbones.transformer.fused_llama import turned
from dynamax_lm_eval.backbones.transformer.kv_cache import AttentionStates

if TYPE_CHECKING:
    from dynamax_lm_eval.backbones.transformer.backbone import TransformerBackbone


class Angles(dict[str | None, tuple[Tensor, Tensor]]):
    """(cos, sin) of shape (1, n, P) by rotary key."""

    def __init__(self, angles: Mapping[str | None, tuple[Tensor, Tensor]]) -> None:
        super().__init__(angles)
        self._turned: dict[str | None, tuple[Tensor, Tensor]] = {}

    def turned(self, key: str | None) -> tuple[Tensor, Tensor]:
        """The angles as :class:`LeanBlock` wants them, made once for all blocks."""
        if key not in self._turned:
            self._turned[key] = turned(*self[key])
        return self._turned[key]


@dataclass(frozen=True)
class _Step:
    """One block has run on one row."""

    run: TransformerPass
    states: AttentionStates
    before: Tensor  # (1, T, D), what the block was given


class TransformerPass(ForwardPass):
    """One pass of a flat batch: positions, rotary angles and places are computed once for all blocks."""

    def __init__(self, backbone: TransformerBackbone, states: AttentionStates, layout: RowLayout, eager: bool) -> None:
        self._backbone = backbone
        self._states = states
        self._layout = layout
        self._starts = np.asarray(layout.slots, dtype=np.int64)[layout.row_of]  # (N,)
        self._places = self._starts + layout.positions  # (N,)
        self._positions = torch.from_numpy(layout.positions).to(backbone.device)
        self._rotary: Angles | None = None
        self._flight: _Flight | None = None
        self._eager = eager
        self._lean = [lean if lean is not None and lean.may_replace else None for lean in backbone.lean_blocks]
        self._slots = np.asarray(layout.slots, dtype=np.int64)
        self._due: _Due | None = None
        # Exits of rows in skip mode: behind each of them the blocks see fewer tokens.
        self._skip_layers = layout.exit_layers if "skip" in layout.state_modes else ()

    @cached_property
    def _last_given(self) -> IntArray:
        """(R,) the last block that is given states of a row's tokens that left; behind it none is owed anything."""
        given = self._layout.runs_block.copy()
        given[self._layout.final_block, -1] = False
        last: IntArray = given.shape[1] - 1 - given[:, ::-1].argmax(axis=1)
        return last

    @property
    def has_pending_states(self) -> bool:
        return self._eager and len(self._states.owed) > 0

    @property
    def last_window(self) -> int | None:
        """The sliding window that the last block's attention was called with."""
        return self._flight.plan.last_window if self._flight is not None else None

    def run_block(self, block: int, tokens: IntArray, hidden: Tensor) -> Tensor:
        self._pay(block, tokens)
        if len(tokens) == 0:
            return hidden
        flight = self._in_flight(block, tokens, hidden)
        scatter = _Scatter(self._states, block, flight.places)
        lean = self._lean[block - 1]
        if lean is None:
            return self._backbone.call_block(block, hidden, scatter, flight)
        angles = flight.rotary.turned(self._backbone.blocks[block - 1].rotary_key)
        return lean(hidden, *angles, scatter.write, flight.plan)

    def leave(self, tokens: IntArray, hidden: Tensor, layer: int) -> None:
        rows = self._layout.row_of[tokens]
        modes = np.asarray(self._layout.state_modes)[rows]
        owed = np.flatnonzero((modes == "recompute") & (self._last_given[rows] > layer))
        if len(owed):
            chosen = hidden[0] if len(owed) == len(tokens) else hidden[0].index_select(0, self._on_device(owed))
            self._states.owed.add(self._starts[tokens[owed]], self._layout.positions[tokens[owed]], chosen, layer)
        skipped = tokens[modes == "skip"]
        if len(skipped):
            self._states.layer_of[self._places[skipped]] = layer
            final = self._layout.final_block[self._layout.row_of[skipped]]
            self._states.runs_last[self._places[skipped]] = final
        copied = tokens[modes == "copy"]
        if len(copied):
            self._copy(copied, layer)

    def _pay(self, block: int, tokens: IntArray) -> None:
        """Gives the block the states that it is owed of the rows in flight."""
        owed = self._states.owed
        if len(owed) == 0:
            return
        due, passed = self._due, sum(layer < block for layer in self._layout.exit_layers)
        if due is None or due.flight is not tokens or (due.passed, due.version) != (passed, owed.version):
            due = self._due = self._find_due(block, tokens, passed)
        if due.hidden is None:
            return
        runs = self._layout.is_given_states(block, due.rows)
        if not runs.any():
            return
        key, value = self.project(block, due.hidden, due.rotary)
        places = due.places
        if not runs.all():
            chosen = self._on_device(np.flatnonzero(runs))
            key, value, places = key.index_select(0, chosen), value.index_select(0, chosen), places[chosen]
        self._states.write(block, places, key, value)
        paid_off = runs & (self._last_given[due.rows] == block)
        owed.done[due.tokens[runs]] = block
        if paid_off.any():
            owed.done[due.tokens[paid_off]] = self._backbone.num_layers
            owed.forget_paid(self._backbone.num_layers)

    def project(self, block: int, hidden: Tensor, rotary: Angles) -> tuple[Tensor, Tensor]:
        """K and V (m, H_kv, P) that ``block`` would write for hidden states (1, m, D) at these angles."""
        described, lean = self._backbone.blocks[block - 1], self._lean[block - 1]
        if lean is not None:
            return lean.states(hidden, *rotary.turned(described.rotary_key))
        key, value = described.project(described.norm(hidden), *rotary[described.rotary_key])
        return key[0].transpose(0, 1), value[0].transpose(0, 1)

    def _find_due(self, block: int, flight: IntArray, passed: int) -> _Due:
        """The owed tokens of the rows in flight (of all rows of an eager pass) that ``block`` has no states of."""
        owed = self._states.owed
        rows = np.arange(len(self._slots)) if self._eager else np.unique(self._layout.row_of[flight])
        row_at = {int(self._slots[row]): int(row) for row in rows}
        row_of = np.asarray([row_at.get(slot, -1) for slot in owed.slots.tolist()], dtype=np.int64)
        tokens = np.flatnonzero((row_of >= 0) & (owed.done < block))
        hidden, rotary = None, Angles({})
        if len(tokens) and owed.hidden is not None:
            hidden = owed.hidden.index_select(0, self._on_device(tokens)).unsqueeze(0)
            rotary = self._backbone.position_embeddings(self._on_device(owed.positions[tokens]).unsqueeze(0), hidden)
        return _Due(
            flight=flight,
            passed=passed,
            version=owed.version,
            tokens=tokens,
            rows=row_of[tokens],
            hidden=hidden,
            rotary=rotary,
            places=self._on_device(owed.slots[tokens] + owed.positions[tokens]),
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

    def _in_flight(self, block: int, tokens: IntArray, hidden: Tensor) -> _Flight:
        last = block == self._backbone.num_layers and bool(self._layout.final_block.any())
        epoch = sum(layer < block for layer in self._skip_layers) + last
        flight = self._flight
        if flight is not None and flight.tokens is tokens and flight.epoch == epoch:
            return flight
        if flight is None or flight.tokens is not tokens:
            chosen = torch.from_numpy(tokens).to(self._backbone.device)
            rotary = Angles(
                {
                    key: (cos.index_select(1, chosen), sin.index_select(1, chosen))
                    for key, (cos, sin) in self._angles(hidden).items()
                }
            )
            positions = self._positions.index_select(0, chosen).unsqueeze(0)
            places = self._device_places(tokens)
        else:
            rotary, positions, places = flight.rotary, flight.positions, flight.places
        hidden_places = self._states.hidden_from(block) if self._skip_layers else None
        plan = attention.AttentionPlan(
            self._starts[tokens],
            self._layout.positions[tokens],
            hidden_places,
            self._backbone.device,
            self._states.spacing,
        )
        self._flight = _Flight(tokens, epoch, places, positions, rotary, plan)
        return self._flight

    def _angles(self, like: Tensor) -> Angles:
        if self._rotary is None:
            self._rotary = self._backbone.position_embeddings(self._positions.unsqueeze(0), like)
        return self._rotary

    def _device_places(self, tokens: IntArray) -> Tensor:
        return self._on_device(self._places[tokens])

    def _on_device(self, values: IntArray) -> Tensor:
        return torch.from_numpy(values).to(self._backbone.device)


@dataclass(frozen=True)
class _Flight:
    """What the blocks need to know of the tokens in flight; valid while these are the same tokens."""

    tokens: IntArray
    epoch: int  # exits passed by rows in skip mode, and whether this is a final block
    places: Tensor  # (n,)
    positions: Tensor  # (1, n)
    rotary: Angles
    plan: attention.AttentionPlan


@dataclass(frozen=True)
class _Due:
    """Owed tokens whose states the blocks up to the next exit need.

    Valid while the same tokens are in flight, no further exit has been passed, and nothing more is owed.
    """

    flight: IntArray
    passed: int
    version: int
    tokens: IntArray  # (m,) among those owed
    rows: IntArray  # (m,) their rows in the pass
    hidden: Tensor | None  # (1, m, D); None: there are none
    rotary: Angles
    places: Tensor  # (m,)


class _Scatter:
    """Stands in for transformers' cache: writes K and V to the places of the tokens, returns the arenas."""

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
