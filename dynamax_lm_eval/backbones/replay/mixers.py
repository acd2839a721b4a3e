"""Modules inside blocks that keep a state of their own, run on the tokens of several rows.

A block runs on a flat batch as its family wrote it; where it comes to such a module, what runs instead is one of
these. ``MambaMixer`` is ours, over ragged rows. ``RowMixer`` is the family's module, called row by row with a cache of
the row's own, or, where every row has one token and the states do not grow, once for all rows.

N tokens of a flat batch, n in flight, m that left, R rows, D hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynamax_lm_eval.backbones.base import on_device
from dynamax_lm_eval.backbones.forwards import replaced_forwards
from dynamax_lm_eval.backbones.mamba.mixers import Mixer
from dynamax_lm_eval.backbones.mamba.plan import RecurrentPlan
from dynamax_lm_eval.backbones.mamba.state_cache import StateTable
from dynamax_lm_eval.backbones.replay.arguments import Call, CallAxes
from dynamax_lm_eval.backbones.replay.model import ReplayModel, parts_of
from dynamax_lm_eval.backbones.replay.row_states import RowTable, StackedTable
from dynamax_lm_eval.backbones.transformer.masks import MaskRule


class FlatMixer(ABC):
    """A module with states, run on a flat batch."""

    #: Whether its states have a constant size, so that those of several rows make a batch.
    is_recurrent = True

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @abstractmethod
    def new_table(self) -> Any:
        """Returns an empty table of its states, one line per row."""

    @abstractmethod
    def collected(self, call: Call) -> Any:
        """Returns what is needed of tokens that left, which it is called with, to move the states on."""

    @abstractmethod
    def run(self, call: Call | None, left: Any, plan: RecurrentPlan, table: Any) -> Tensor | None:
        """Moves the states on and returns the output (1, n, D) of the tokens in flight.

        Args:
            call: of the tokens in flight; None: there are none.
            left: what was collected of those that left; None: there are none.
            plan: in what order.
            table: the states.
        """


class MambaMixer(FlatMixer):
    """A Mamba or Mamba-2 mixer, by our own scans."""

    def __init__(self, mixer: Mixer, device: torch.device) -> None:
        super().__init__(mixer.module)
        self.mixer = mixer
        self._device = device

    def new_table(self) -> StateTable:
        return StateTable(self.mixer.new_state, self._device)

    def collected(self, call: Call) -> Tensor:
        return self.mixer.project_update(call.hidden[0])

    def run(self, call: Call | None, left: Tensor | None, plan: RecurrentPlan, table: StateTable) -> Tensor | None:
        gate, update = None, left
        if call is not None:
            gate, update = self.mixer.project(call.hidden[0])
            update = update if left is None else torch.cat([update, left])
        assert update is not None
        read = plan.advance(self.mixer, table, update)
        if gate is None:
            return None
        return self.mixer.output(plan.of_tokens_in_flight(read), gate).unsqueeze(0)


class RowMixer(FlatMixer):
    """A module of transformers that keeps its states in a cache."""

    def __init__(self, module: nn.Module, model: ReplayModel, axes: CallAxes, cache_layers: tuple[int, ...]) -> None:
        """
        Args:
            module: keeps states.
            model: it is part of.
            axes: where tokens stand in its arguments.
            cache_layers: of the cache, that it uses.
        """
        super().__init__(module)
        self._model = model
        self._axes = axes
        self._layers = cache_layers
        #: Elements of its recurrent states for one row.
        self.state_size = 0
        #: Whether it takes several tokens of a row at once that has a past.
        self.continues = True

    def new_table(self) -> StackedTable | RowTable:
        config = self._model.model.config
        return StackedTable(config, self._layers) if self.is_recurrent else RowTable(config, self._layers)

    def collected(self, call: Call) -> Call:
        return call

    def run(
        self, call: Call | None, left: Call | None, plan: RecurrentPlan, table: StackedTable | RowTable
    ) -> Tensor | None:
        both = left if call is None else call if left is None else self._axes.joined(call, left)
        assert both is not None
        if plan.order is not None:
            both = self._axes.select(both, plan.order)
        ends = np.cumsum(plan.rows.lengths)
        starts = ends - plan.rows.lengths
        together = np.zeros(len(ends), dtype=np.bool_)
        if isinstance(table, StackedTable):
            together = ~plan.is_new & (plan.rows.lengths == 1)
            if together.sum() < 2:
                together[:] = False
        outputs: list[Tensor] = []
        order: list[int] = []
        if together.any() and isinstance(table, StackedTable):
            tokens = starts[together]
            outputs.append(self._step(both, tokens, plan, plan.numbers[together], table))
            order += tokens.tolist()
        for row in np.flatnonzero(~together).tolist():
            outputs.append(self._row(both, int(starts[row]), int(ends[row]), row, plan, table))
            order += range(int(starts[row]), int(ends[row]))
        if call is None:
            return None
        output = torch.cat(outputs, dim=1)
        if order != list(range(len(order))):
            output = output.index_select(1, on_device(np.argsort(np.asarray(order)), output.device))
        return output if plan.in_flight is None else output.index_select(1, plan.in_flight)

    def _step(self, call: Call, tokens: Any, plan: RecurrentPlan, numbers: Any, table: StackedTable) -> Tensor:
        """Returns the outputs (1, r, D) of one token in each of r rows, which run as a batch."""
        if len(tokens) < len(plan.positions):
            call = self._axes.select(call, on_device(tokens, call.hidden.device))
        if plan.kept_in is not None:
            for number, kept_in in zip(numbers.tolist(), plan.kept_in[tokens].tolist(), strict=True):
                _keep(table, number, kept_in)
        with table.opened(numbers, past=1) as cache:
            output = self.called(self._axes.by_row(call), cache)
        return output.transpose(0, 1)

    def _row(
        self, call: Call, start: int, end: int, row: int, plan: RecurrentPlan, table: StackedTable | RowTable
    ) -> Tensor:
        """Returns the outputs (1, t, D) of the tokens of one row."""
        is_new = bool(plan.is_new[row])
        kept_in = None if plan.kept_in is None else plan.kept_in[start:end].tolist()
        keeps = kept_in is not None and max(kept_in) >= 0
        at_once = end - start if is_new or (self.continues and not keeps) else 1
        outputs = []
        for first in range(start, end, at_once):
            last = min(end, first + at_once)
            part = call
            if (first, last) != (0, len(plan.positions)):
                part = self._axes.map(call, lambda tensor, axis, a=first, b=last: tensor.narrow(axis, a, b - a))
            numbers, positions = plan.numbers[row : row + 1], plan.positions[first:last]
            past = 0 if is_new and first == start else int(positions[0])
            if keeps and kept_in is not None:
                _keep(table, int(numbers[0]), kept_in[first - start])
            with table.opened(numbers, past) as cache:
                if isinstance(table, RowTable):
                    part = self._with_masks(part, positions, table.seen(int(numbers[0]), positions))
                outputs.append(self.called(part, cache))
        return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]

    def _with_masks(self, call: Call, queries: Any, keys: Any) -> Call:
        """Returns the call with its mask, which is a rule, as a tensor."""

        def made(value: Any) -> Any:
            return value.tensor(queries, keys, call.hidden) if isinstance(value, MaskRule) else value

        return Call(tuple(made(v) for v in call.args), {name: made(v) for name, v in call.kwargs.items()})

    def called(self, call: Call, cache: Any) -> Tensor:
        """Returns the output (R, t, D) of the family's module with its states in ``cache``."""
        kwargs = {name: cache if name in self._model.cache_names else value for name, value in call.kwargs.items()}
        args = tuple(cache if self._model.is_cache(value) else value for value in call.args)
        eager = nullcontext() if self.is_recurrent else self._model.attention("eager")
        with eager, replaced_forwards([(self.module, self._model.own_forward(self.module))]):
            output: Tensor = parts_of(self.module(*args, **kwargs))[0]
        return output


def _keep(table: StackedTable | RowTable, line: int, kept_in: int) -> None:
    """Keeps what a line holds in another, unless that is -1."""
    if kept_in >= 0:
        table.copy(line, kept_in)
