"""Mamba models of transformers, run block by block over flat ragged batches.

A block keeps a conv window and an SSM state of constant size of each row and updates them token by token. Tokens that
left early update them from their exit hidden state (``recompute``), merged by position with the tokens in flight, or
not at all (``skip``).

N tokens of a flat batch, n in flight, m that left, R rows, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynamax_lm_eval.backbones import families
from dynamax_lm_eval.backbones.base import ForwardPass, IntArray, RowLayout, States, full_depth_layout, on_device
from dynamax_lm_eval.backbones.compare import is_close
from dynamax_lm_eval.backbones.decoder import DecoderBackbone
from dynamax_lm_eval.backbones.linear import linear
from dynamax_lm_eval.backbones.mamba import kernels
from dynamax_lm_eval.backbones.mamba.mixers import Mixer, make_mixer
from dynamax_lm_eval.backbones.mamba.ssm import MixerState, RaggedRows
from dynamax_lm_eval.backbones.mamba.state_cache import StateTable, lines_of
from dynamax_lm_eval.compute.cost import BackboneCost
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.models.loading import copy_is_impossible
from dynamax_lm_eval.types import MambaKernels, StateMode


@dataclass(frozen=True)
class _Block:
    norm: Any
    mixer: Mixer
    residual_in_fp32: bool

    def normed(self, hidden: Tensor) -> Tensor:
        """Returns the normalised hidden states (T, D), in the dtype that the mixer takes."""
        normed: Tensor = self.norm(hidden.to(self.norm.weight.dtype))
        return normed

    def residual(self, hidden: Tensor) -> Tensor:
        """Returns what the mixer's output is added to."""
        return hidden.float() if self.residual_in_fp32 else hidden


class MambaBackbone(DecoderBackbone):
    """A Mamba-2, Mamba or Falcon-Mamba model."""

    def __init__(self, model: Any, mamba_kernels: MambaKernels = "auto") -> None:
        """
        Args:
            model: a causal LM of transformers, in eval mode; may be wrapped by PEFT.
            mamba_kernels: ``auto`` runs the scans by mamba-ssm on a GPU where it is installed.

        Raises:
            UserError: the architecture is not one that can be run block by block.
        """
        super().__init__(model, ("norm_f",))
        self._kernels = kernels.find(mamba_kernels, self.device)
        self.blocks = [self._describe(i, module) for i, module in enumerate(self._layers, start=1)]
        self.cost = BackboneCost(
            tuple(block.mixer.cost(self.name) for block in self.blocks), lm_head=self.hidden_size * self.vocab_size
        )

    def new_states(self, capacity: int, prefix_capacity: int = 0, row_stride: int | None = None) -> MambaStates:
        return MambaStates(self)

    def start_pass(self, states: States, layout: RowLayout, materialize_all: bool = False) -> MambaPass:
        assert isinstance(states, MambaStates)
        return MambaPass(self, states, layout)

    def readout(self, hidden: Tensor) -> Tensor:
        normed = self._final_norm(hidden)
        logits = linear(self._lm_head, normed.to(self._lm_head.weight.dtype)).contiguous()
        return logits.float()

    def check_state_mode(self, mode: StateMode, exit_layers: tuple[int, ...]) -> None:
        if mode == "copy" and exit_layers:
            raise UserError(copy_is_impossible(self.name))

    def observe(self, ids: Tensor) -> None:
        pass  # a Mamba block costs the same at every position

    def train_forward(self, ids: Tensor, rows: RaggedRows) -> Tensor:
        """Returns the logits (T, V) of new rows side by side, ids (T,), at full depth and with gradients."""
        hidden = self.embed(ids)[0]
        for block in self.blocks:
            gate, update = block.mixer.project(block.normed(hidden))
            read, _ = block.mixer.advance(update, rows, None)
            hidden = block.residual(hidden) + block.mixer.output(read, gate)
        return self.readout(hidden)

    def row_bytes(self, num_tokens: int) -> int:
        state = [block.mixer.new_state(1, torch.device("meta")) for block in self.blocks]
        return sum(part.numel() * part.element_size() for parts in state for part in parts)

    @torch.no_grad()
    def verify_recompute(self, ids: Tensor) -> None:
        all_tokens, no_tokens = np.arange(len(ids)), np.arange(0)
        dtype = self.embed(ids[:1]).dtype
        layout = full_depth_layout([0], [len(ids)], self.num_layers)
        written, recomputed = MambaStates(self), MambaStates(self)
        for states in (written, recomputed):
            states.allocate_row(len(ids))
        run = self.start_pass(written, layout)
        hidden = self.embed(ids)
        for block in range(1, self.num_layers + 1):
            before, hidden = hidden, run.run_block(block, all_tokens, hidden)
            update = self.start_pass(recomputed, layout)
            update.exit_tokens(all_tokens, before, block - 1)
            update.run_block(block, no_tokens, before[:, :0])
            for name, theirs, ours in zip(("conv", "SSM"), written.of(block), recomputed.of(block), strict=True):
                if not is_close(ours, theirs, dtype):
                    raise UserError(
                        f"{self.name}: the {name} state that state recompute makes in block {block} differs from what "
                        "the block makes; use state_mode=skip"
                    )

    def _describe(self, number: int, module: nn.Module) -> _Block:
        where = f"block {number} of {self.name}"
        mixer = families.child(module, ("mixer",), f"mixer in {where}")
        norm = families.child(module, ("norm",), f"norm before the mixer in {where}")
        return _Block(norm, make_mixer(mixer, where, self._kernels), bool(getattr(module, "residual_in_fp32", False)))


class MambaStates(States):
    """The conv windows and SSM states of all rows, one table per block, made when a block first runs."""

    def __init__(self, backbone: MambaBackbone) -> None:
        self._tables = [StateTable(block.mixer.new_state, backbone.device) for block in backbone.blocks]
        self._free: list[int] = []
        self._num_lines = 0
        self._kept: dict[int, int] = {}  # tokens of a kept prefix -> line

    def allocate_row(self, capacity: int) -> int | None:
        """Returns a line, which is the same in every table; states do not grow with the row, so there always is one."""
        line = self._free.pop() if self._free else self._num_lines
        self._num_lines = max(self._num_lines, line + 1)
        for table in self._tables:
            table.clear(line)
        return line

    def free_row(self, slot: int) -> None:
        self._free.append(slot)

    def copy_row(self, source: int, slot: int, num_tokens: int) -> None:
        for table in self._tables:
            table.copy(source, slot)

    def keep(self, slot: int, num_tokens: int) -> bool:
        line = self.allocate_row(num_tokens)
        assert line is not None
        self.copy_row(slot, line, num_tokens)
        self._kept[num_tokens] = line
        return True

    def give(self, num_tokens: int, slot: int) -> None:
        self.copy_row(self._kept[num_tokens], slot, num_tokens)

    def forget(self, num_tokens: int) -> None:
        self.free_row(self._kept.pop(num_tokens))

    def table(self, block: int) -> StateTable:
        """Returns the table of a block (1-based), with a line for every allocated row."""
        table = self._tables[block - 1]
        table.reserve(self._num_lines)
        return table

    def of(self, block: int) -> MixerState:
        """Returns the states of all lines of a block."""
        return self.table(block).all


class MambaPass(ForwardPass):
    """One pass of a flat batch; it defers no states, because a recurrence takes the tokens in order."""

    def __init__(self, backbone: MambaBackbone, states: MambaStates, layout: RowLayout) -> None:
        self._backbone = backbone
        self._states = states
        self._layout = layout
        self._left = _LeftTokens.none()
        self._plan: _Plan | None = None
        # Rows whose first token is fed in this pass have no states yet.
        firsts = np.unique(layout.row_of, return_index=True)[1]
        self._is_new = layout.positions[firsts] == 0  # (R,)

    @property
    def has_pending_states(self) -> bool:
        return self._left.hidden is not None

    def exit_tokens(self, tokens: IntArray, hidden: Tensor, layer: int) -> None:
        self._left = self._left.joined(tokens, hidden, self._layout)

    def run_block(self, block: int, tokens: IntArray, hidden: Tensor) -> Tensor:
        left = self._left.at(block, self._layout)
        if len(tokens) + len(left.tokens) == 0:
            return hidden
        plan = self._planned(tokens, left.tokens)
        described = self._backbone.blocks[block - 1]
        mixer, table = described.mixer, self._states.table(block)
        gate, update = None, None
        if len(tokens):
            gate, update = mixer.project(described.normed(hidden[0]))
        if left.hidden is not None:
            left_update = mixer.project_update(described.normed(left.hidden[0]))
            update = left_update if update is None else torch.cat([update, left_update])
        assert update is not None
        if plan.order is not None:
            update = update.index_select(0, plan.order)
        read, after = mixer.advance(update, plan.rows, None if plan.all_new else table.read(plan.lines))
        assert after is not None
        table.write(plan.lines, after)
        if gate is None:
            return hidden
        if plan.in_flight is not None:
            read = read.index_select(0, plan.in_flight)
        return described.residual(hidden) + mixer.output(read, gate)

    def _planned(self, tokens: IntArray, left: IntArray) -> _Plan:
        plan = self._plan
        if plan is not None and plan.tokens is tokens and np.array_equal(plan.left, left):
            return plan
        updated = np.concatenate([tokens, left]) if len(left) else tokens
        order = np.argsort(updated) if len(left) else np.arange(len(updated))
        rows, lengths = np.unique(self._layout.row_of[updated[order]], return_counts=True)
        # One token per row: rows may stand in any order, and in the order of their lines the table is one view.
        lines = np.asarray(self._layout.slots, dtype=np.int64)[rows]
        if len(updated) == len(rows):
            by_line = np.argsort(lines)
            order, lines = order[by_line], lines[by_line]
        is_reordered = not np.array_equal(order, np.arange(len(order)))
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order))
        device = self._backbone.device
        self._plan = _Plan(
            tokens=tokens,
            left=left,
            rows=RaggedRows(lengths.tolist(), device),
            lines=lines_of(lines, device),
            all_new=bool(self._is_new[rows].all()),
            order=on_device(order, device) if is_reordered else None,
            in_flight=on_device(rank[: len(tokens)], device) if is_reordered or len(left) else None,
        )
        return self._plan


@dataclass(frozen=True)
class _LeftTokens:
    """The tokens that left and whose states later blocks recompute."""

    tokens: IntArray  # (m,)
    hidden: Tensor | None  # (1, m, D); None: there are none

    @classmethod
    def none(cls) -> _LeftTokens:
        return cls(np.empty(0, dtype=np.int64), None)

    def joined(self, tokens: IntArray, hidden: Tensor, layout: RowLayout) -> _LeftTokens:
        """Returns these and those of the tokens (t,), hidden states (1, t, D), whose rows recompute states."""
        modes = np.asarray(layout.state_modes)[layout.row_of[tokens]]
        more = _LeftTokens(tokens, hidden)._where(modes == "recompute")
        if self.hidden is None or more.hidden is None:
            return more if self.hidden is None else self
        return _LeftTokens(np.concatenate([self.tokens, more.tokens]), torch.cat([self.hidden, more.hidden], dim=1))

    def at(self, block: int, layout: RowLayout) -> _LeftTokens:
        """Returns those that a block (1-based) is given states of: none where it is pruned or runs as a final block."""
        if self.hidden is None:
            return self
        return self._where(layout.is_given_states(block, layout.row_of[self.tokens]))

    def _where(self, mask: Any) -> _LeftTokens:
        if mask.all():
            return self
        indices = np.flatnonzero(mask)
        if self.hidden is None or len(indices) == 0:
            return _LeftTokens.none()
        hidden = self.hidden.index_select(1, on_device(indices, self.hidden.device))
        return _LeftTokens(self.tokens[indices], hidden)


@dataclass(frozen=True)
class _Plan:
    """The rows of the tokens that a block updates its states from; valid while these are the same tokens."""

    tokens: IntArray
    left: IntArray
    rows: RaggedRows
    lines: slice | Tensor  # of the R rows in the tables
    all_new: bool  # none of the rows has a state yet
    order: Tensor | None  # (n + m,) in flight, then left, to the order of the rows; None: they are in order
    in_flight: Tensor | None  # (n,) indices of the tokens in flight in that order; None: they are all, in order
