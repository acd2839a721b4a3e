"""Mamba models of transformers, run block by block over flat ragged batches.

A block keeps a conv window and an SSM state of constant size of each row and updates them token by token. Tokens that
left early update them from their exit hidden state (``recompute``) when a later token of their row gets to the block,
merged by position with the tokens in flight, or not at all (``skip``).

N tokens of a flat batch, n in flight, m that left, R rows, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynamax_lm_eval.backbones import families
from dynamax_lm_eval.backbones.base import IntArray, KeptInRows, RowLayout, States, on_device
from dynamax_lm_eval.backbones.decoder import DecoderBackbone
from dynamax_lm_eval.backbones.deferring import DeferredTokens, DeferringPass
from dynamax_lm_eval.backbones.learned import MappedProject, StateProjection
from dynamax_lm_eval.backbones.linear import is_changed, is_plain
from dynamax_lm_eval.backbones.mamba import kernels, norms
from dynamax_lm_eval.backbones.mamba.mixers import Mixer, make_mixer
from dynamax_lm_eval.backbones.mamba.plan import NOTHING_LEFT, LeftPlaces, RecurrentPlan, new_rows
from dynamax_lm_eval.backbones.mamba.rows import RaggedRows
from dynamax_lm_eval.backbones.mamba.segments import MOST_LEFT, Advance, MambaSegment, StepsOfRows
from dynamax_lm_eval.backbones.mamba.snapshots import Snapshots
from dynamax_lm_eval.backbones.mamba.ssm import MixerState
from dynamax_lm_eval.backbones.mamba.state_cache import StateTable, clear_line, copy_line
from dynamax_lm_eval.backbones.segments import StaticCall, StaticSegments
from dynamax_lm_eval.compute.cost import BackboneCost
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.models.loading import copy_is_impossible
from dynamax_lm_eval.types import MambaKernels, StateMode

#: Tokens up to which a product takes as long as its weights take to be read: the gate of those that left, which nobody
#: needs, then costs less than reading the other weights a second time.
_FEW = 64
#: The linear layers of a mixer, as far as it has them.
_PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")


@dataclass(frozen=True)
class _Block:
    norm: Any
    mixer: Mixer
    residual_in_fp32: bool

    def normed(self, hidden: Tensor) -> Tensor:
        """Returns the normalised hidden states (T, D), in the dtype that the mixer takes."""
        hidden = hidden.to(self.norm.weight.dtype)
        if hidden.is_cuda and self._rms_norm is not None:
            return self._rms_norm(hidden, self.norm.weight)
        normed: Tensor = self.norm(hidden)
        return normed

    @cached_property
    def _rms_norm(self) -> norms.RmsNorm | None:
        """The norm in one operation on a GPU, where it is one of root mean squares."""
        return norms.recognised(self.norm)

    def project(
        self, hidden: Tensor, left: Tensor | None, mapped: MappedProject | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """Returns what the mixer projects of tokens in flight (n, D) and of those that left (m, D).

        ``mapped``: what stands in place of the projection of those that left.

        Returns:
            the gate (n, I) of the tokens in flight, None where there are none; and what states are updated from, of
            the tokens in flight and then those that left (n + m, U).
        """
        mixer, num_tokens = self.mixer, len(hidden)
        if left is None or len(left) == 0:
            return mixer.project(self.normed(hidden))
        if mapped is not None:
            update = mapped(self.normed(left), mixer.project_update)
            if num_tokens == 0:
                return None, update
            gate, own = mixer.project(self.normed(hidden))
            return gate, torch.cat([own, update.to(own.dtype)])
        if num_tokens == 0:
            return None, mixer.project_update(self.normed(left))
        if num_tokens + len(left) <= _FEW:
            gate, update = mixer.project(self.normed(torch.cat([hidden, left.to(hidden.dtype)])))
            return gate[:num_tokens], update
        gate, update = mixer.project(self.normed(hidden))
        return gate, torch.cat([update, mixer.project_update(self.normed(left))])

    def residual(self, hidden: Tensor) -> Tensor:
        """Returns what the mixer's output is added to."""
        return hidden.float() if self.residual_in_fp32 else hidden

    def run(self, hidden: Tensor, left: Tensor | None, advance: Advance, mapped: MappedProject | None = None) -> Tensor:
        """Returns the block's output (1, n, D) for tokens in flight (1, n, D), while those that left (m, D) move on.

        ``mapped``: as for :meth:`project`.
        """
        gate, update = self.project(hidden[0], left, mapped)
        read = advance(self.mixer, update)
        return hidden if gate is None else self.residual(hidden) + self.mixer.output(read, gate)

    @property
    def is_plain(self) -> bool:
        """Whether nobody has hooked, adapted or quantised any part of the block."""
        module = self.mixer.module
        projections = [getattr(module, name) for name in _PROJECTIONS if hasattr(module, name)]
        hooked = any(is_changed(vars(part)) for part in (self.norm, *module.modules()))
        return not hooked and all(map(is_plain, projections))


class MambaBackbone(DecoderBackbone):
    """A Mamba-2, Mamba or Falcon-Mamba model."""

    rung = "mamba"
    resumes = True
    takes_back = True

    def __init__(self, model: Any, mamba_kernels: MambaKernels = "auto") -> None:
        """
        Args:
            model: a causal LM of transformers, in eval mode; may be wrapped by PEFT.
            mamba_kernels: ``auto`` runs mamba-ssm and causal-conv1d on a GPU where they are installed.

        Raises:
            UserError: the architecture is not one that can be run block by block.
        """
        super().__init__(model, ("norm_f",))
        self.mamba_kernels = mamba_kernels
        self._kernels = kernels.find(mamba_kernels, self.device, self.model.dtype)
        self.scans_by = kernels.packages(self._kernels)
        self.blocks = [self._describe(i, module) for i, module in enumerate(self._layers, start=1)]
        self.cost = BackboneCost(
            tuple(block.mixer.cost(self.name) for block in self.blocks), lm_head=self.hidden_size * self.vocab_size
        )

    def new_states(self, capacity: int, prefix_capacity: int = 0, row_stride: int | None = None) -> MambaStates:
        return MambaStates(self)

    def start_pass(self, states: States, layout: RowLayout, materialize_all: bool = False) -> MambaPass:
        assert isinstance(states, MambaStates)
        return MambaPass(self, states, layout, materialize_all)

    def readout(self, hidden: Tensor) -> Tensor:
        normed = self._final_norm(hidden)
        return self.by_head(normed.to(self._lm_head.weight.dtype)).float()

    def readout_of(self, hidden: Tensor, first: int, others: Tensor) -> Tensor:
        normed = self._final_norm(hidden)
        return self.by_head_rows(normed.to(self._lm_head.weight.dtype), first, others).float()

    def check_state_mode(self, mode: StateMode, exit_layers: tuple[int, ...]) -> None:
        if mode in ("copy", "copy_previous") and exit_layers:
            raise UserError(copy_is_impossible(self.name, mode))

    def train_forward(self, ids: Tensor, rows: RaggedRows) -> Tensor:
        """Returns the logits (T, V) of new rows side by side, ids (T,), at full depth and with gradients."""
        return self.readout(self.train_blocks(ids, rows)[-1])

    def train_blocks(self, ids: Tensor, rows: RaggedRows) -> list[Tensor]:
        """Returns the hidden states (T, D) after each block, of rows as for :meth:`train_forward`."""
        hidden = self.embed(ids)[0]
        after = []
        for block in self.blocks:
            gate, update = block.mixer.project(block.normed(hidden))
            read, _ = block.mixer.advance(update, rows, None)
            hidden = block.residual(hidden) + block.mixer.output(read, gate)
            after.append(hidden)
        return after

    def row_bytes(self, num_tokens: int) -> int:
        state = [block.mixer.new_state(1, torch.device("meta")) for block in self.blocks]
        return sum(part.numel() * part.element_size() for parts in state for part in parts)

    def _describe(self, number: int, module: nn.Module) -> _Block:
        where = f"block {number} of {self.name}"
        mixer = families.child(module, ("mixer",), f"mixer in {where}")
        norm = families.child(module, ("norm",), f"norm before the mixer in {where}")
        return _Block(norm, make_mixer(mixer, where, self._kernels), bool(getattr(module, "residual_in_fp32", False)))


class MambaStates(KeptInRows):
    """The conv windows and SSM states of all rows, one table per block, made when a block first runs."""

    def __init__(self, backbone: MambaBackbone) -> None:
        super().__init__()
        self.deferred = DeferredTokens()
        self._tables = [
            StateTable(block.mixer.new_state, place.device)
            for block, place in zip(backbone.blocks, backbone.places, strict=True)
        ]
        self._free: list[int] = []
        self._num_lines = 0
        self._snapshots = Snapshots()
        #: A line of no row, where there is one.
        self.scratch_line = -1

    def use_segments(self, segments: StaticSegments) -> None:
        super().use_segments(segments)
        self.scratch_line, self._num_lines = self._num_lines, self._num_lines + 1

    def allocate_row(self, capacity: int) -> int | None:
        """Returns a line, which is the same in every table; states do not grow with the row, so there always is one."""
        return self._new_line()

    def _new_line(self) -> int:
        line = self._free.pop() if self._free else self._num_lines
        self._num_lines = max(self._num_lines, line + 1)
        clear_line(self._tables, line)
        return line

    def free_row(self, slot: int) -> None:
        self.deferred.free_row(slot)
        self._free += [slot, *self._snapshots.pop(slot)]

    def settle(self, slot: int, kept: int | None) -> None:
        if kept is not None:
            copy_line(self._tables, self._snapshots.after(slot, kept), slot)

    def snapshot_lines(self, of_rows: IntArray, drafted: IntArray) -> IntArray:
        """Returns the lines in which states are kept before drafted tokens, as :meth:`Snapshots.lines` does."""
        return self._snapshots.lines(of_rows, drafted, self._new_line)

    def copy_row(self, source: int, slot: int, num_tokens: int) -> None:
        assert source not in self.deferred.slots, "what is copied ran in a pass that defers nothing"
        copy_line(self._tables, source, slot)

    def table(self, block: int) -> StateTable:
        """Returns the table of a block (1-based), with a line for every allocated row."""
        table = self._tables[block - 1]
        table.reserve(self._num_lines)
        return table

    def of(self, block: int) -> MixerState:
        """Returns the states of all lines of a block."""
        return self.table(block).all


class MambaPass(DeferringPass):
    """One pass of a flat batch."""

    _backbone: MambaBackbone

    def __init__(self, backbone: MambaBackbone, states: MambaStates, layout: RowLayout, materialize_all: bool) -> None:
        super().__init__(backbone, layout, states.deferred, states.segments, materialize_all)
        self._states = states
        self._plan: RecurrentPlan | None = None
        self._is_new = new_rows(layout)

    def exit_tokens(self, tokens: IntArray, hidden: Tensor, layer: int) -> None:
        self._defer(tokens, hidden, layer)

    def state_projection(self, block: int, hidden: Tensor) -> StateProjection:
        described = self._backbone.blocks[block - 1]
        return StateProjection(described.normed(hidden[0]), described.mixer.project_update)

    def _run_block(self, block: int, tokens: IntArray, hidden: Tensor) -> Tensor:
        left, left_hidden, mapped = NOTHING_LEFT, None, None
        if (taken := self._take_pending(block, tokens, hidden.device)) is not None:
            pending, chosen = taken
            assert pending.hidden is not None
            left, left_hidden = LeftPlaces(pending.rows, pending.positions), pending.hidden[0]
            origins = pending.origins
            if chosen is not None:
                origins = origins.select(chosen, hidden.device)
                left = LeftPlaces(left.rows[chosen], left.positions[chosen])
                left_hidden = left_hidden.index_select(0, on_device(chosen, hidden.device))
            mapped = origins.mapped(self.state_maps, block)
        if len(tokens) + len(left.rows) == 0:
            return hidden
        plan = self._plan = RecurrentPlan.of(
            *(tokens, left, self._layout, self._layout.slots, self._is_new, hidden.device, self._plan),
            snapshots=self._states.snapshot_lines,
        )
        table = self._states.table(block)

        def advance(mixer: Mixer, update: Tensor) -> Tensor:
            return plan.of_tokens_in_flight(plan.advance(mixer, table, update))

        return self._backbone.blocks[block - 1].run(hidden, left_hidden, advance, mapped)

    def _reason_against_blocks(self, blocks: tuple[int, ...]) -> str | None:
        if all(self._backbone.blocks[block - 1].is_plain for block in blocks):
            return None
        return "blocks that are hooked, adapted or quantised"

    def _static_call(
        self, blocks: tuple[int, ...], tokens: IntArray, left: IntArray, rows: IntArray, like: Tensor
    ) -> StaticCall | str:
        if self._layout.drafted is not None and self._layout.drafted[tokens].any():
            return "drafts, before which states are kept"
        in_flight = self._layout.row_of[tokens]
        columns, positions = np.searchsorted(in_flight, rows), self._deferred.positions[left]
        steps = StepsOfRows.of(self._slots[in_flight], left, columns, positions, self._states.scratch_line)
        if steps.most_left > MOST_LEFT:
            return f"rows of which more than {MOST_LEFT} tokens left"
        tables = [self._states.table(block) for block in blocks]
        described = [self._backbone.blocks[block - 1].run for block in blocks]
        return StaticCall(
            key=blocks,
            storage=tuple(table.num_lines for table in tables),
            num_tokens=steps.num_tokens,
            num_left=steps.num_left,
            numbers=steps.numbers,
            make=lambda places, mapped: MambaSegment(described, tables, [mapped(b) for b in blocks], places, steps),
        )
