"""Any causal language model at all, run without a cache: every block sees its inputs for the whole row again.

A block keeps what it was given for each token of a row, and runs on all of it whenever a token is added. What it
computes for earlier tokens is thrown away; by causality it is the same as before. That assumes nothing of a model but
that it is causal and calls its blocks one after the other, so it is what remains where nothing faster is right, and
what faster ways are compared with. A token costs as much as its whole row.

N tokens of a flat batch, n in flight, m that left, D hidden.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import ForwardPass, IntArray, KeptInRows, RowLayout, States, on_device
from dynamax_lm_eval.backbones.decoder import ModelBackbone
from dynamax_lm_eval.backbones.mamba.plan import LeftTokens
from dynamax_lm_eval.backbones.replay import costs
from dynamax_lm_eval.backbones.replay.arguments import Call
from dynamax_lm_eval.backbones.replay.model import HiddenShape, ReplayModel
from dynamax_lm_eval.backbones.replay.probing import LENGTHS
from dynamax_lm_eval.compute.cost import BackboneCost
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.models.placement import moved
from dynamax_lm_eval.types import StateMode


class WholeRowBackbone(ModelBackbone):
    """A causal LM of transformers whose blocks run on whole rows."""

    rung = "whole rows"

    def __init__(self, model: Any) -> None:
        """
        Args:
            model: a causal LM of transformers, in eval mode; may be wrapped by PEFT.

        Raises:
            UserError: its blocks cannot be found.
        """
        super().__init__(model)
        self.replay = ReplayModel(self.model, self._layers)
        with torch.no_grad():
            self.replay.watch_outputs()
            shorter, longer = (
                self.replay.capture(torch.arange(n, device=self.device), None, None)[0].hidden for n in LENGTHS
            )
        grows = [sizes == LENGTHS for sizes in zip(shorter.shape, longer.shape, strict=True)]
        if grows.count(True) != 1:
            raise UserError(f"{self.name} does not give its blocks one hidden state for each token")
        self.hidden_shape = HiddenShape(tuple(shorter.shape), grows.index(True))
        self.hidden_size = self.hidden_shape.size

    @cached_property
    def cost(self) -> BackboneCost:  # type: ignore[override]
        """What it costs; measured when somebody asks, since many make one only to compare with it."""
        return costs.measure_whole_rows(self.replay, self.hidden_size * self.vocab_size)

    def new_states(self, capacity: int, prefix_capacity: int = 0, row_stride: int | None = None) -> WholeRowStates:
        return WholeRowStates(self.num_layers)

    def start_pass(self, states: States, layout: RowLayout, materialize_all: bool = False) -> WholeRowPass:
        assert isinstance(states, WholeRowStates)
        return WholeRowPass(self, states, layout)

    def embed(self, ids: Tensor) -> Tensor:
        return self.hidden_shape.flat(self.replay.capture(ids, None, None)[0].hidden)

    def readout(self, hidden: Tensor) -> Tensor:
        logits = self.replay.readout(self.hidden_shape.of_model(hidden.unsqueeze(0)), len(hidden))
        return moved(logits.contiguous(), self.output_device)

    def check_state_mode(self, mode: StateMode, exit_layers: tuple[int, ...]) -> None:
        if mode != "recompute" and exit_layers:
            raise UserError(
                f"state_mode={mode} is not possible on {self.name}, whose blocks run on whole rows; use recompute"
            )

    def row_bytes(self, num_tokens: int) -> int:
        size = torch.finfo(self.model.dtype).bits // 8
        return self.num_layers * self.hidden_size * size * num_tokens


class WholeRowStates(KeptInRows):
    """For every row its token ids, and what each block was given for its tokens."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self._num_layers = num_layers
        self._next = 0
        self.ids: dict[int, Tensor] = {}  # slot -> (t,)
        self.inputs: dict[int, list[Tensor | None]] = {}  # slot -> for each block (1-based) (t, D)

    def allocate_row(self, capacity: int) -> int | None:
        self._next += 1
        self.inputs[self._next] = [None] * (self._num_layers + 1)
        return self._next

    def free_row(self, slot: int) -> None:
        self.inputs.pop(slot)
        self.ids.pop(slot, None)

    def copy_row(self, source: int, slot: int, num_tokens: int) -> None:
        self.ids[slot] = self.ids[source][:num_tokens]
        self.inputs[slot] = [None if part is None else part[:num_tokens] for part in self.inputs[source]]


class WholeRowPass(ForwardPass):
    """One pass of a flat batch, row by row."""

    _backbone: WholeRowBackbone

    def __init__(self, backbone: WholeRowBackbone, states: WholeRowStates, layout: RowLayout) -> None:
        self._backbone = backbone
        self._states = states
        self._layout = layout
        self._left = LeftTokens.none()
        self._calls: list[list[Call]] = []
        #: What the last block that ran on a row returned.
        self._outputs: dict[int, tuple[Any, ...]] = {}

    @property
    def has_pending_states(self) -> bool:
        return self._left.hidden is not None

    def embed(self, ids: Tensor) -> Tensor:
        layout, shape = self._layout, self._backbone.hidden_shape
        hidden = []
        for row, slot in enumerate(layout.slots):
            fed = ids.index_select(0, on_device(np.flatnonzero(layout.row_of == row), ids.device))
            before = self._states.ids.get(slot)
            self._states.ids[slot] = fed if before is None else torch.cat([before, fed])
            self._calls.append(self._backbone.replay.capture(self._states.ids[slot], None, None))
            hidden.append(shape.flat(self._calls[-1][0].hidden)[:, -len(fed) :])
        return torch.cat(hidden, dim=1)

    def exit_tokens(self, tokens: IntArray, hidden: Tensor, layer: int) -> None:
        self._left = self._left.joined(tokens, hidden, self._layout)

    def _run_block(self, block: int, tokens: IntArray, hidden: Tensor) -> Tensor:
        left, layout = self._left.at(block, self._layout).on(hidden.device), self._layout
        given = np.concatenate([tokens, left.tokens])
        values = hidden[0] if left.hidden is None else torch.cat([hidden[0], left.hidden[0]])
        outputs = []
        for row in np.unique(layout.row_of[given]).tolist():
            own = np.flatnonzero(layout.row_of[given] == row)
            own = own[np.argsort(given[own])]
            inputs = self._add(row, block, values.index_select(0, on_device(own, values.device)), given[own])
            in_flight = tokens[layout.row_of[tokens] == row]
            if len(in_flight):
                output = self._run(row, block, inputs)
                outputs.append(output.index_select(0, on_device(layout.positions[in_flight], output.device)))
        return torch.cat(outputs).unsqueeze(0) if outputs else hidden

    def _run(self, row: int, block: int, inputs: Tensor) -> Tensor:
        """Returns what a block makes of the inputs (T, D) of a whole row."""
        replay, shape = self._backbone.replay, self._backbone.hidden_shape
        call = self._calls[row][block - 1]
        if row in self._outputs and replay.handed_on[block - 1]:
            last = self._outputs[row]
            call = call.with_values({place: last[index] for place, index in replay.handed_on[block - 1].items()})
        self._outputs[row] = replay.outputs(block, call.replaced(shape.of_model(inputs.unsqueeze(0))))
        return shape.flat(self._outputs[row][0])[0]

    def _add(self, row: int, block: int, values: Tensor, tokens: IntArray) -> Tensor:
        """Notes what a block is given for tokens of a row (t,), and returns that of all its tokens, (T, D)."""
        inputs = self._states.inputs[self._layout.slots[row]]
        before = inputs[block]
        first = int(self._layout.positions[tokens[0]])
        held = 0 if before is None else len(before)
        assert held in (first, first + len(tokens)), "a row's tokens come in order"
        if before is None or first == 0:
            inputs[block] = values
        else:
            inputs[block] = torch.cat([before[:first], values])
        whole = inputs[block]
        assert whole is not None
        return whole
