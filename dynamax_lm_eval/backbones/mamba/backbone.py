"""Mamba models of transformers, run block by block over flat ragged batches.

A block keeps a conv window and an SSM state of constant size of each row and updates them token by token. Tokens that
left early update them from their exit hidden state (``recompute``), merged by position with the tokens in flight, or
not at all (``skip``).

N tokens of a flat batch, n in flight, m that left, R rows, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dynamax_lm_eval.backbones import families
from dynamax_lm_eval.backbones.base import ForwardPass, IntArray, KeptInRows, RowLayout, States
from dynamax_lm_eval.backbones.decoder import DecoderBackbone
from dynamax_lm_eval.backbones.linear import linear
from dynamax_lm_eval.backbones.mamba import kernels, norms
from dynamax_lm_eval.backbones.mamba.mixers import Mixer, make_mixer
from dynamax_lm_eval.backbones.mamba.plan import LeftTokens, RecurrentPlan, new_rows
from dynamax_lm_eval.backbones.mamba.rows import RaggedRows
from dynamax_lm_eval.backbones.mamba.ssm import MixerState
from dynamax_lm_eval.backbones.mamba.state_cache import StateTable, clear_line, copy_line
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
        hidden = hidden.to(self.norm.weight.dtype)
        if hidden.is_cuda and self._rms_norm is not None:
            return self._rms_norm(hidden, self.norm.weight)
        normed: Tensor = self.norm(hidden)
        return normed

    @cached_property
    def _rms_norm(self) -> norms.RmsNorm | None:
        """The norm in one operation on a GPU, where it is one of root mean squares."""
        return norms.recognised(self.norm)

    def residual(self, hidden: Tensor) -> Tensor:
        """Returns what the mixer's output is added to."""
        return hidden.float() if self.residual_in_fp32 else hidden


class MambaBackbone(DecoderBackbone):
    """A Mamba-2, Mamba or Falcon-Mamba model."""

    rung = "mamba"

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

    def _describe(self, number: int, module: nn.Module) -> _Block:
        where = f"block {number} of {self.name}"
        mixer = families.child(module, ("mixer",), f"mixer in {where}")
        norm = families.child(module, ("norm",), f"norm before the mixer in {where}")
        return _Block(norm, make_mixer(mixer, where, self._kernels), bool(getattr(module, "residual_in_fp32", False)))


class MambaStates(KeptInRows):
    """The conv windows and SSM states of all rows, one table per block, made when a block first runs."""

    def __init__(self, backbone: MambaBackbone) -> None:
        super().__init__()
        self._tables = [StateTable(block.mixer.new_state, backbone.device) for block in backbone.blocks]
        self._free: list[int] = []
        self._num_lines = 0

    def allocate_row(self, capacity: int) -> int | None:
        """Returns a line, which is the same in every table; states do not grow with the row, so there always is one."""
        line = self._free.pop() if self._free else self._num_lines
        self._num_lines = max(self._num_lines, line + 1)
        clear_line(self._tables, line)
        return line

    def free_row(self, slot: int) -> None:
        self._free.append(slot)

    def copy_row(self, source: int, slot: int, num_tokens: int) -> None:
        copy_line(self._tables, source, slot)

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
        self._left = LeftTokens.none()
        self._plan: RecurrentPlan | None = None
        self._is_new = new_rows(layout)

    def embed(self, ids: Tensor) -> Tensor:
        return self._backbone.embed(ids)

    @property
    def has_pending_states(self) -> bool:
        return self._left.hidden is not None

    def exit_tokens(self, tokens: IntArray, hidden: Tensor, layer: int) -> None:
        self._left = self._left.joined(tokens, hidden, self._layout)

    def run_block(self, block: int, tokens: IntArray, hidden: Tensor) -> Tensor:
        left = self._left.at(block, self._layout)
        if len(tokens) + len(left.tokens) == 0:
            return hidden
        plan = self._plan = RecurrentPlan.of(
            tokens, left.tokens, self._layout, self._layout.slots, self._is_new, self._backbone.device, self._plan
        )
        described = self._backbone.blocks[block - 1]
        mixer, table = described.mixer, self._states.table(block)
        gate, update = None, None
        if len(tokens):
            gate, update = mixer.project(described.normed(hidden[0]))
        if left.hidden is not None:
            left_update = mixer.project_update(described.normed(left.hidden[0]))
            update = left_update if update is None else torch.cat([update, left_update])
        assert update is not None
        read = plan.advance(mixer, table, update)
        if gate is None:
            return hidden
        read = plan.of_tokens_in_flight(read)
        return described.residual(hidden) + mixer.output(read, gate)
