"""The loop over optimiser steps that trainings share: where one goes on, its bar, log lines and saved states."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from dynamax_lm_eval.progress import Bar
from dynamax_lm_eval.training import state
from dynamax_lm_eval.training.batches import MicroBatches, Position
from dynamax_lm_eval.training.options import RunOptions, TrainingOptions
from dynamax_lm_eval.training.trainer import Throughput

logger = logging.getLogger(__name__)


class Report(Protocol):
    """What one optimiser step did."""

    @property
    def step(self) -> int:
        """Its number, from 1."""


AnyReport = TypeVar("AnyReport", bound=Report)


@dataclass
class Loop:
    """The steps of one training.

    Attributes:
        name: of what is trained.
        steps: how many there are in all.
        options, run: of the training.
        states: the folder of its saved states.
        identity: what its weights depend on.
        module, optimizer: what a state holds.
        main: whether this process shows and writes.
        saves_last: save a state after the last step, too.
    """

    name: str
    steps: int
    options: TrainingOptions
    run: RunOptions
    states: Path
    identity: Mapping[str, Any]
    module: nn.Module
    optimizer: torch.optim.Optimizer
    main: bool
    saves_last: bool = False
    #: Steps that were done before, the seconds that they took, and where the text stands after them.
    first: int = 0
    earlier: float = 0.0
    position: Position = field(default_factory=Position)

    def resume(self, found: tuple[Path, state.Progress] | None) -> None:
        """Puts everything to where a saved state left it; does nothing without one.

        Raises:
            UserError: that training began with another identity.
        """
        if found is None:
            return
        path, progress = found
        state.check_same(progress.options, self.identity)
        state.load(path, self.module, self.optimizer)
        self.first, self.earlier, self.position = progress.step, progress.seconds, Position(**progress.data)
        logger.info("Going on after step %d of %d of %s", self.first, self.steps, self.name)

    def save(self, step: int, position: Position, seconds: float) -> None:
        """Writes the state after ``step`` steps."""
        progress = state.Progress(step, position.to_json(), dict(self.identity), seconds)
        state.save(self.states, progress, self.module, self.optimizer)

    def go(
        self,
        step: Callable[[int, MicroBatches], AnyReport],
        batches: MicroBatches,
        tell: Callable[[AnyReport, float], str],
    ) -> float:
        """Runs all steps that are left; returns the seconds of training, those before a resume included.

        Args:
            step: runs the optimiser step of a number, from 0, on the next micro-batches.
            batches: the text from ``position`` on.
            tell: writes a line of the log, given a report and the tokens per second; returns what the bar shows.
        """
        run, tokens, clock = self.run, self.options.batch_tokens, Throughput()
        with Bar(
            self.steps * tokens,
            f"training {self.name}",
            unit="tok",
            unit_scale=True,
            initial=self.first * tokens,
            disable=not self.main,
        ) as bar:
            for number in range(self.first, self.steps):
                report = step(number, batches)
                speed = clock.add(tokens)
                bar.update(tokens)
                last = report.step == self.steps
                if self.main and (report.step % run.log_steps == 0 or last):
                    bar.show(tell(report, speed))
                if self.main and (report.step % run.save_steps == 0 or (last and self.saves_last)):
                    self.save(report.step, batches.position, self.earlier + clock.seconds)
        return self.earlier + clock.seconds
