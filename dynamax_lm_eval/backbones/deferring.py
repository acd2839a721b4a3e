"""States of tokens that left, which wait until a later token of their row needs them.

A block needs the recomputed states of a token only when a later token of the same row gets there. Until then they
are deferred; those of several tokens are then made in one call, and those of a row that ends first are never made.

N tokens of a flat batch, m of them deferred, R rows, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import (
    ONE_BY_ONE,
    Backbone,
    BoolArray,
    ForwardPass,
    IntArray,
    RowLayout,
    on_device,
    together_on_device,
)
from dynamax_lm_eval.backbones.learned import MappedProject, Project, StateMaps
from dynamax_lm_eval.backbones.segments import MOST_PLACES, SegmentOutput, StaticCall, StaticSegments
from dynamax_lm_eval.models.placement import moved


class DeferredTokens:
    """The tokens of the rows in flight that left and whose states some block still lacks."""

    def __init__(self) -> None:
        self.version = 0
        self._empty()

    def _empty(self) -> None:
        self.slots: IntArray = np.empty(0, dtype=np.int64)  # (m,) of their rows
        self.positions: IntArray = np.empty(0, dtype=np.int64)  # (m,)
        #: (m,) the last block that has a state of theirs.
        self.done: IntArray = np.empty(0, dtype=np.int64)
        #: (m,) the exit at which they left, where their states are learned; 0: recomputed.
        self.learned_from: IntArray = np.empty(0, dtype=np.int64)
        self.ids: Tensor | None = None  # (m,) of their tokens; None: there are none
        self.hidden: Tensor | None = None  # (m, D) at their exits; None: there are none
        self.version += 1

    def __len__(self) -> int:
        return len(self.slots)

    def add(
        self, slots: IntArray, positions: IntArray, ids: Tensor, hidden: Tensor, layer: int, is_learned: BoolArray
    ) -> None:
        """Defers the states of tokens (t,) of rows (t,), hidden states (t, D), that left after ``layer`` blocks.

        ``is_learned``: (t,) whether they are learned; else they are recomputed.
        """
        self.slots = np.concatenate([self.slots, slots])
        self.positions = np.concatenate([self.positions, positions])
        self.done = np.concatenate([self.done, np.full(len(slots), layer, dtype=np.int64)])
        self.learned_from = np.concatenate([self.learned_from, np.where(is_learned, layer, 0)])
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
        self.learned_from = self.learned_from[indices]
        # Rows may be freed outside the mode of torch in which tokens ran.
        with torch.inference_mode(self.hidden.is_inference()):
            chosen = on_device(indices, self.hidden.device)
            self.ids = self.ids.index_select(0, moved(chosen, self.ids.device))
            self.hidden = self.hidden.index_select(0, chosen)
        self.version += 1


@dataclass(frozen=True)
class Origins:
    """The exits at which some tokens left whose states are learned."""

    #: (m,) exit layers; 0 where states are recomputed.
    layers: IntArray
    #: Each of them, with the indices of its tokens; None: all.
    groups: tuple[tuple[int, Tensor | None], ...]

    @classmethod
    def of(cls, layers: IntArray, device: torch.device) -> Origins:
        """Returns the origins of tokens that left after ``layers`` (m,), with indices on a device."""
        found = np.unique(layers).tolist()
        if len(found) <= 1:
            return cls(layers, tuple((layer, None) for layer in found))
        return cls(layers, tuple((layer, on_device(np.flatnonzero(layers == layer), device)) for layer in found))

    def select(self, indices: IntArray, device: torch.device) -> Origins:
        """Returns those of some of the tokens."""
        return Origins.of(self.layers[indices], device)

    def mapped(self, maps: StateMaps, block: int) -> MappedProject | None:
        """Returns how ``block`` projects these tokens; None where it does as ever."""
        assert maps or not self.layers.any(), "somebody has the maps of what is learned"
        if not any((layer, block) in maps for layer, _ in self.groups):
            return None

        def mapped(inputs: Tensor, project: Project) -> Tensor:
            flat = inputs.flatten(0, -2)
            output: Tensor | None = None
            for layer, indices in self.groups:
                part = flat if indices is None else flat.index_select(0, indices)
                state_map = maps.get((layer, block))
                made = project(part) if state_map is None else state_map(part, project)
                if indices is None:
                    output = made
                else:
                    output = made.new_empty(len(flat), made.shape[-1]) if output is None else output
                    output.index_copy_(0, indices, made)
            assert output is not None, "there are tokens"
            shaped: Tensor = output.unflatten(0, inputs.shape[:-1])
            return shaped

        return mapped


@dataclass(frozen=True)
class PendingTokens:
    """The deferred tokens whose states the blocks up to the next exit need.

    Valid while the same tokens are in flight, no further exit has been passed, and nothing more is deferred, for blocks
    on one device.
    """

    in_flight: IntArray
    passed: int  # exits
    version: int  # of the deferred tokens
    device: torch.device
    tokens: IntArray  # (m,) among those deferred
    rows: IntArray  # (m,) their rows in the pass
    positions: IntArray  # (m,)
    origins: Origins
    hidden: Tensor | None  # (1, m, D) at their exits; None: there are none
    places: Sequence[Tensor]  # those of ``DeferringPass._places_of``
    arguments: Any

    @property
    def kv_slots(self) -> Tensor:
        """The cache slots (m,) of a backbone that attends."""
        return self.places[1]


class DeferringPass(ForwardPass):
    """One pass of a flat batch, some of whose tokens leave their states for later."""

    def __init__(
        self,
        backbone: Backbone,
        layout: RowLayout,
        deferred: DeferredTokens,
        segments: StaticSegments | None,
        materialize_all: bool,
    ) -> None:
        self._backbone = backbone
        self._layout = layout
        self._deferred = deferred
        self._segments = segments
        self._materialize_all = materialize_all
        self._slots = np.asarray(layout.slots, dtype=np.int64)
        self._ids: Tensor | None = None
        self._pending: PendingTokens | None = None

    def embed(self, ids: Tensor) -> Tensor:
        self._ids = ids
        return self._backbone.embed(ids)

    @property
    def has_pending_states(self) -> bool:
        return self._materialize_all and len(self._deferred) > 0

    def _places_of(self, tokens: IntArray) -> Sequence[IntArray]:
        """Returns what else has to be on the device of those of the deferred tokens that are numbered (m,)."""
        return ()

    def _arguments_of_deferred(self, tokens: Tensor, places: Sequence[Tensor], like: Tensor) -> Any:
        """Returns what blocks are called with for those of the deferred tokens that are numbered ``tokens`` (m,).

        ``places``: those of :meth:`_places_of`.
        """
        return None

    @cached_property
    def _last_given(self) -> IntArray:
        """The last block (R,) that is given states of a row's tokens that left; for later ones nothing is deferred."""
        is_given = self._layout.runs_block.copy()
        is_given[self._layout.final_block, -1] = False
        last: IntArray = is_given.shape[1] - 1 - is_given[:, ::-1].argmax(axis=1)
        return last

    def _defer(self, tokens: IntArray, hidden: Tensor, layer: int) -> None:
        """Defers the states of those of tokens (t,), hidden states (1, t, D), whose rows recompute or learn them."""
        rows = self._layout.row_of[tokens]
        modes = np.asarray(self._layout.state_modes)[rows]
        is_learned = modes == "learned"
        deferred = np.flatnonzero(((modes == "recompute") | is_learned) & (self._last_given[rows] > layer))
        if len(deferred) == 0:
            return
        assert self._ids is not None, "tokens were embedded"
        own, exit_hidden = tokens[deferred], hidden[0]
        chosen, of_batch = together_on_device([deferred, own], hidden.device)
        if len(deferred) < len(tokens):
            exit_hidden = exit_hidden.index_select(0, chosen)
        ids = self._ids.index_select(0, moved(of_batch, self._ids.device))
        self._deferred.add(
            self._slots[rows[deferred]], self._layout.positions[own], ids, exit_hidden, layer, is_learned[deferred]
        )

    def _take_pending(
        self, block: int, in_flight: IntArray, device: torch.device
    ) -> tuple[PendingTokens, IntArray | None] | None:
        """Returns the deferred tokens of the rows in flight whose states a block is given now, None without any.

        With them come the indices of those that are meant; None for all. From now on their states count as given.
        """
        deferred = self._deferred
        if len(deferred) == 0:
            return None
        pending, passed = self._pending, sum(layer < block for layer in self._layout.exit_layers)
        if (
            pending is None
            or pending.in_flight is not in_flight
            or (pending.passed, pending.version, pending.device) != (passed, deferred.version, device)
        ):
            pending = self._pending = self._find_pending(block, in_flight, passed, device)
        if pending.hidden is None:
            return None
        given = self._layout.is_given_states(block, pending.rows)
        if not given.any():
            return None
        is_complete = given & (self._last_given[pending.rows] == block)
        deferred.done[pending.tokens[given]] = block
        if is_complete.any():
            deferred.done[pending.tokens[is_complete]] = self._backbone.num_layers
            deferred.drop_complete(self._backbone.num_layers)
        return pending, None if given.all() else np.flatnonzero(given)

    def run_segment(self, first: int, last: int, tokens: IntArray, hidden: Tensor) -> SegmentOutput | str:
        assert self._segments is not None and not self._materialize_all
        if len(tokens) == 0:
            return SegmentOutput(hidden, hidden)
        runs = self._layout.runs(tokens, slice(first, last + 1))
        if (runs != runs[0]).any():
            return "rows that prune different blocks"
        blocks = tuple((first + np.flatnonzero(runs[0])).tolist())
        if not blocks:
            return SegmentOutput(hidden, hidden)
        if (reason := self._segments.reason_against(blocks, self._reason_against)) is not None:
            return reason
        left, rows = self._lacking(blocks[0], tokens)
        given, still_given = (self._layout.is_given_states(block, rows) for block in (blocks[0], blocks[-1]))
        assert (given == still_given).all(), "a final block has a segment of its own"
        left, rows = left[given], rows[given]
        call = self._static_call(blocks, tokens, left, rows, hidden)
        if isinstance(call, str):
            return call
        if call.num_tokens + call.num_left > MOST_PLACES:
            return f"more than {MOST_PLACES} tokens"
        if self._deferred.learned_from[left].any():
            call = call.with_origins(self._deferred.learned_from)
        before, hidden_after = self._segments.run(call, hidden, self._deferred.hidden, self.state_maps)
        if len(left):
            is_complete = self._last_given[rows] <= blocks[-1]
            self._deferred.done[left] = np.where(is_complete, self._backbone.num_layers, blocks[-1])
            self._deferred.drop_complete(self._backbone.num_layers)
        # The last block may be one that all prune.
        return SegmentOutput(before if blocks[-1] == last else hidden_after, hidden_after)

    def _reason_against(self, blocks: tuple[int, ...]) -> str | None:
        """Returns why blocks cannot run in a segment, whatever the pass; None where they can."""
        places = [self._backbone.places[block - 1] for block in blocks]
        if len({place.device for place in self._backbone.places}) > 1 or any(place.is_offloaded for place in places):
            return "blocks on several devices, or whose weights are elsewhere"
        return self._reason_against_blocks(blocks)

    def _reason_against_blocks(self, blocks: tuple[int, ...]) -> str | None:
        """Returns what of the blocks themselves is against it, for :meth:`_reason_against`."""
        return ONE_BY_ONE

    def _static_call(
        self, blocks: tuple[int, ...], tokens: IntArray, left: IntArray, rows: IntArray, like: Tensor
    ) -> StaticCall | str:
        """Returns what a segment of ``blocks`` is run with, or why it cannot.

        Args:
            blocks: those that run.
            tokens: (n,) in flight, each alone in its row.
            left: (m,) the deferred tokens whose states the blocks are given.
            rows: (m,) of these in the pass.
            like: a tensor as the hidden states of the tokens in flight.
        """
        raise NotImplementedError

    def _lacking(self, block: int, in_flight: IntArray) -> tuple[IntArray, IntArray]:
        """Returns the deferred tokens (m,) that ``block`` has no states of, and their rows (m,) in the pass.

        Those of the rows in flight, or of all rows.
        """
        deferred = self._deferred
        rows = np.arange(len(self._slots)) if self._materialize_all else np.unique(self._layout.row_of[in_flight])
        row_at = {int(self._slots[row]): int(row) for row in rows}
        row_of = np.asarray([row_at.get(slot, -1) for slot in deferred.slots.tolist()], dtype=np.int64)
        tokens = np.flatnonzero((row_of >= 0) & (deferred.done < block))
        return tokens, row_of[tokens]

    def _find_pending(self, block: int, in_flight: IntArray, passed: int, device: torch.device) -> PendingTokens:
        """Returns the deferred tokens that ``block`` has no states of, as :meth:`_lacking` does."""
        deferred = self._deferred
        tokens, rows = self._lacking(block, in_flight)
        hidden, arguments, places = None, None, list[Tensor]()
        if len(tokens) and deferred.hidden is not None:
            chosen, *places = together_on_device([tokens, *self._places_of(tokens)], device)
            hidden = moved(deferred.hidden, device).index_select(0, chosen).unsqueeze(0)
            arguments = self._arguments_of_deferred(chosen, places, hidden)
        return PendingTokens(
            in_flight=in_flight,
            passed=passed,
            version=deferred.version,
            device=device,
            tokens=tokens,
            rows=rows,
            positions=deferred.positions[tokens],
            origins=Origins.of(deferred.learned_from[tokens], device),
            hidden=hidden,
            places=places,
            arguments=arguments,
        )
