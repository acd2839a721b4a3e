"""One pass of a flat batch through blocks of any kind, each called with the arguments that the model makes.

Blocks that only attend defer the states of tokens that left, as fused ones do. Where a state of some block depends on
more than the block's input, it takes tokens in order, and every block is given them as it comes.

N tokens of a flat batch, n in flight, m that left, D hidden, H_kv K/V heads, P head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import IntArray, RowLayout, on_device
from dynamax_lm_eval.backbones.deferring import PendingTokens
from dynamax_lm_eval.backbones.forwards import replaced_forwards
from dynamax_lm_eval.backbones.learned import JoinedModules, StateProjection, mapped_forwards
from dynamax_lm_eval.backbones.mamba.plan import NOTHING_LEFT, LeftPlaces, LeftTokens, RecurrentPlan, new_rows
from dynamax_lm_eval.backbones.replay.arguments import Call
from dynamax_lm_eval.backbones.replay.mixers import FlatMixer
from dynamax_lm_eval.backbones.replay.states import ReplayStates
from dynamax_lm_eval.backbones.transformer.attention import AttentionPlan, attending
from dynamax_lm_eval.backbones.transformer.forward_pass import ActiveTokens, AttentionPass
from dynamax_lm_eval.backbones.transformer.fused_pass import StatesWritten
from dynamax_lm_eval.models.placement import moved

if TYPE_CHECKING:
    from dynamax_lm_eval.backbones.replay.backbone import ReplayBackbone


class ReplayPass(AttentionPass):
    """One pass of a flat batch through blocks as their family wrote them."""

    _states: ReplayStates

    def __init__(
        self, backbone: ReplayBackbone, states: ReplayStates, layout: RowLayout, materialize_all: bool
    ) -> None:
        super().__init__(backbone, states, layout, materialize_all)
        self._blocks = backbone
        self._calls: list[Call] = []
        self._left = LeftTokens.none()
        self._lines = tuple(states.line_of[slot] for slot in layout.slots)
        self._is_new = new_rows(layout)
        self._plan: RecurrentPlan | None = None
        # Of the block that runs now: the tokens' slots, how many writes stop it, whether its mixers only take what they
        # are called with, and what that was.
        self._written_to: Tensor | None = None
        self._writes_left: int | None = None
        self._is_collecting = False
        self._collected: dict[FlatMixer, Any] = {}
        #: What stands for the output of a mixer while states alone are written; nothing should depend on it.
        self.placeholder = 0.0

    def embed(self, ids: Tensor) -> Tensor:
        self._ids = ids
        self._calls = self._blocks.replay.capture(ids, self._positions_on(ids.device), self._blocks.cache)
        return self._blocks.hidden_shape.flat(self._calls[0].hidden)

    @property
    def has_pending_states(self) -> bool:
        return self._left.hidden is not None if self._blocks.takes_tokens_in_order else super().has_pending_states

    def exit_tokens(self, tokens: IntArray, hidden: Tensor, layer: int) -> None:
        if not self._blocks.takes_tokens_in_order:
            super().exit_tokens(tokens, hidden, layer)
            return
        self._left = self._left.joined(tokens, hidden, self._layout)
        modes = np.asarray(self._layout.state_modes)[self._layout.row_of[tokens]]
        self._mark_skipped(tokens[modes == "skip"], layer)
        if len(copied := tokens[modes == "copy"]):
            self._copy(copied, layer)

    def _run_block(self, block: int, tokens: IntArray, hidden: Tensor) -> Tensor:
        if not self._blocks.takes_tokens_in_order:
            return super()._run_block(block, tokens, hidden)
        device = hidden.device
        left = self._left.at(block, self._layout).on(device)
        if len(tokens) + len(left.tokens) == 0:
            return hidden
        described = self._blocks.blocks[block - 1]
        if described.is_sequential and left.hidden is not None:
            return self._run_in_order(block, tokens, hidden, left)
        if described.mixers:
            self._plan = self._recurrent_plan(tokens, LeftPlaces.of(left.tokens, self._layout), device)
        if left.hidden is not None and described.num_writes:
            call = self._select(block, _Chosen(left.tokens, device))
            self._give(block, left.hidden, call, on_device(self._kv_slots[left.tokens], device), None)
        if len(tokens):
            hidden = self._call(block, hidden, self._active_tokens(block, tokens, hidden))
        else:
            for mixer in described.mixers:
                assert self._plan is not None
                mixer.run(None, self._collected.pop(mixer, None), self._plan, self._states.table(mixer))
        self._collected.clear()
        return hidden

    def write_only(self, block: int, hidden: Tensor) -> WrittenStates:
        """Gives a block the states of all tokens of the batch, as if they had left with ``hidden`` (1, N, D)."""
        place = self._backbone.places[block - 1]
        with place.weights():
            return self._write_only(block, hidden.to(place.device))

    def _write_only(self, block: int, hidden: Tensor) -> WrittenStates:
        tokens = np.arange(hidden.shape[1])
        active = self._active_tokens(block, tokens, hidden)
        attended = self._give(block, hidden, self._select(block, active.arguments), active.kv_slots, active.plan)
        caches = [cache for cache in (*self._states.keys, *self._states.values) if cache is not None]
        collected = [c.hidden if isinstance(c, Call) else c for c in self._collected.values()]
        return WrittenStates(attended, [*caches, *(value for value in collected if value is not None)])

    def mix(self, mixer: FlatMixer, call: Call) -> Any:
        """Runs a mixer in the place of the module that a block calls."""
        if self._is_collecting:
            self._collected[mixer] = mixer.collected(call)
            output: Tensor | None = torch.full_like(call.hidden, self.placeholder)
        else:
            assert self._plan is not None
            output = mixer.run(call, self._collected.pop(mixer, None), self._plan, self._states.table(mixer))
        assert output is not None
        self._note_write()
        return self._blocks.shaped(mixer, output)

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes K and V (1, H_kv, n, P) to a layer of the cache; returns the caches (1, H_kv, C, P)."""
        assert self._written_to is not None, "a block is running"
        keys, values = self._states.write(layer + 1, self._written_to, key[0].transpose(0, 1), value[0].transpose(0, 1))
        self._note_write()
        return keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)

    def _note_write(self) -> None:
        if self._writes_left is not None:
            self._writes_left -= 1
            if self._writes_left == 0:
                raise StatesWritten

    def _select(self, block: int, chosen: _Chosen | None) -> Call:
        """Returns what a block is called with for tokens of the batch; None: for all."""
        call = self._calls[block - 1]
        return call if chosen is None else self._blocks.blocks[block - 1].axes.map(call, chosen.of)

    def _arguments(self, tokens: IntArray, like: Tensor) -> _Chosen | None:
        are_all = len(tokens) == len(self._starts)
        if are_all and like.device == self._backbone.device:
            return None
        return _Chosen(None if are_all else tokens, like.device)

    def _arguments_of_deferred(self, tokens: Tensor, places: Sequence[Tensor], like: Tensor) -> list[Call]:
        ids = self._states.deferred.ids
        assert ids is not None
        chosen = ids.index_select(0, moved(tokens, ids.device))
        return self._blocks.replay.capture(chosen, moved(places[0], ids.device), self._blocks.cache)

    def _call(self, block: int, hidden: Tensor, active: ActiveTokens) -> Tensor:
        if self._blocks.blocks[block - 1].mixers:
            left = self._plan.left if self._plan is not None and self._collected else NOTHING_LEFT
            self._plan = self._recurrent_plan(active.tokens, left, hidden.device)
        call = self._select(block, active.arguments).replaced(self._blocks.hidden_shape.of_model(hidden))
        self._written_to = active.kv_slots
        with self._blocks.passing(self), attending(active.plan, self._blocks.visibility(block, call)):
            return self._blocks.hidden_shape.flat(self._blocks.replay.call(block, call))

    def state_projection(self, block: int, hidden: Tensor) -> StateProjection:
        projections = self._blocks.blocks[block - 1].projections
        seen: list[Tensor] = []

        def stop(inputs: Tensor, *_: Any, **__: Any) -> Tensor:
            seen.append(inputs)
            raise StatesWritten

        joined = JoinedModules(projections)
        with replaced_forwards([(module, stop) for module in projections]):
            self.write_only(block, hidden)
        return StateProjection(seen[0].reshape(hidden.shape[1], -1), joined.project)

    def _write_states(self, block: int, pending: PendingTokens, chosen: IntArray | None) -> None:
        described = self._blocks.blocks[block - 1]
        if not described.num_writes:
            return
        call, hidden, kv_slots = pending.arguments[block - 1], pending.hidden, pending.kv_slots
        assert hidden is not None
        if hidden.device != self._backbone.device:
            call = described.axes.map(call, lambda tensor, _: tensor.to(kv_slots.device))
        origins = pending.origins
        if chosen is not None:
            origins, indices = origins.select(chosen, pending.device), on_device(chosen, pending.device)
            call, hidden = described.axes.select(call, indices), hidden.index_select(1, indices)
            kv_slots = kv_slots[indices]
        mapped = origins.mapped(self.state_maps, block)
        with replaced_forwards(mapped_forwards(described.projections, mapped) if mapped else []):
            self._give(block, hidden, call, kv_slots, None)

    def _give(
        self,
        block: int,
        hidden: Tensor,
        call: Call,
        kv_slots: Tensor,
        plan: AttentionPlan | None,
        collect: bool = True,
    ) -> bool:
        """Runs a block on the exit states (1, m, D) of tokens that left, until it has written its states.

        Args:
            block: 1-based.
            hidden: the exit states.
            call: what it is called with for these tokens.
            kv_slots: of the tokens.
            plan: what they attend to, where the block attends.
            collect: its mixers only take what they are called with; else they move their states on.

        Returns:
            Whether it attended.
        """
        described = self._blocks.blocks[block - 1]
        call = call.replaced(self._blocks.hidden_shape.of_model(hidden))
        self._written_to, self._writes_left, self._is_collecting = kv_slots, described.num_writes, collect
        empty = np.empty(0, dtype=np.int64)
        plan = plan or AttentionPlan(empty, empty, None, hidden.device)
        try:
            with (
                self._blocks.passing(self),
                described.without_unneeded(),
                attending(plan, self._blocks.visibility(block, call)) as now,
            ):
                self._blocks.replay.call(block, call)
        except StatesWritten:
            pass
        finally:
            self._writes_left, self._is_collecting = None, False
        return now.called

    def _run_in_order(self, block: int, tokens: IntArray, hidden: Tensor, left: LeftTokens) -> Tensor:
        """Runs a block whose states depend on one another on all tokens at once; returns those in flight (1, n, D)."""
        assert left.hidden is not None
        both = np.concatenate([tokens, left.tokens])
        order = np.argsort(both)
        merged = torch.cat([hidden, left.hidden], dim=1).index_select(1, on_device(order, left.hidden.device))
        active = self._active_tokens(block, both[order], merged)
        if len(tokens):
            output = self._call(block, merged, active)
            return output.index_select(1, on_device(np.argsort(order)[: len(tokens)], hidden.device))
        if self._blocks.blocks[block - 1].mixers:
            self._plan = self._recurrent_plan(active.tokens, NOTHING_LEFT, hidden.device)
        self._give(block, merged, self._select(block, active.arguments), active.kv_slots, active.plan, collect=False)
        return hidden

    def _recurrent_plan(self, tokens: IntArray, left: LeftPlaces, device: torch.device) -> RecurrentPlan:
        found = self._layout, self._lines, self._is_new, device, self._plan
        return RecurrentPlan.of(tokens, left, *found, snapshots=self._states.snapshot_lines)


@dataclass(frozen=True)
class WrittenStates:
    """What a block wrote for tokens that left."""

    attended: bool  # before it had written everything
    values: list[Tensor]

    def equals(self, other: WrittenStates) -> bool:
        """Returns whether the same was written."""
        return all(torch.equal(a, b) for a, b in zip(self.values, other.values, strict=True))


class _Chosen:
    """Some tokens of a batch, and their parts of arguments, which many blocks share, on a device."""

    def __init__(self, tokens: IntArray | None, device: torch.device) -> None:
        """``tokens``: (n,); None: all."""
        self._tokens = tokens
        self._device = device
        self._indices: dict[torch.device, Tensor] = {}
        self._parts: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def of(self, tensor: Tensor, axis: int) -> Tensor:
        """Returns the part of an argument."""
        key = (id(tensor), axis)
        if key not in self._parts:
            part = tensor if self._tokens is None else tensor.index_select(axis, self._on(tensor.device))
            self._parts[key] = (moved(part, self._device), tensor)  # kept, so that its id stays its own
        return self._parts[key][0]

    def _on(self, device: torch.device) -> Tensor:
        """Returns the tokens on the device of an argument."""
        assert self._tokens is not None
        if device not in self._indices:
            self._indices[device] = on_device(self._tokens, device)
        return self._indices[device]
