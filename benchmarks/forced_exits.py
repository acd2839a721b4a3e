"""Exits that no training made: they leave at chance or on a schedule, and cost nothing or what a real one costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dynamax_lm_eval.backbones.base import Backbone
from dynamax_lm_eval.compute.cost import EvaluationCost
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.exits.classifiers import Classifier, ClassifierOptions, ExitClassifiers
from dynamax_lm_eval.types import ClassifierKind


class RandomExit(Classifier):
    """A confidence drawn from [0, 1], whatever the hidden state."""

    def __init__(self, seed: int) -> None:
        super().__init__(1)
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def macs(self) -> int:
        return 0

    def forward(self, hidden: Any, rows: Any = None, state: Any = None) -> Any:
        drawn = torch.rand(len(hidden), generator=self._generator).clamp(1e-6, 1 - 1e-6).to(hidden.device)
        return logits_of(drawn.logit()), None


class DrawnExit(Classifier):
    """The work of another classifier, and a confidence drawn from [0, 1] in place of its own."""

    def __init__(self, worker: Classifier, seed: int) -> None:
        super().__init__(1)
        self.worker = worker
        self.recurrent = worker.recurrent  # type: ignore[misc]
        self._seed = seed
        self._generator: torch.Generator | None = None

    @property
    def macs(self) -> int:
        return self.worker.macs

    @property
    def cost(self) -> EvaluationCost:
        return self.worker.cost

    def new_state(self, num_rows: int, device: torch.device) -> Any:
        return self.worker.new_state(num_rows, device)

    def forward(self, hidden: Any, rows: Any = None, state: Any = None) -> Any:
        _, after = self.worker(hidden, rows, state)
        if self._generator is None:  # on the device, so that nothing is waited for
            self._generator = torch.Generator(hidden.device).manual_seed(self._seed)
        drawn = torch.rand(len(hidden), generator=self._generator, device=hidden.device)
        return logits_of(drawn.clamp(1e-6, 1 - 1e-6).logit()), after


def logits_of(log_odds: Tensor) -> Tensor:
    """What a classifier returns, (n, 2), for log-odds (n,) of leaving."""
    return torch.stack([torch.zeros_like(log_odds), log_odds], dim=1)


def forced(
    backbone: Backbone,
    exits: Mapping[int, Classifier],
    like: ExitClassifiers | None = None,
    kind: ClassifierKind = "calm",
) -> Engine:
    """An engine with these exits, by layer, in place of those of a kind; all else is that of other exits."""
    classifiers = ExitClassifiers((), tuple(exits), 1, "silu", ClassifierOptions())
    classifiers.by_kind[kind] = nn.ModuleDict({str(layer): classifier for layer, classifier in exits.items()})
    if like is not None:
        classifiers.adapters, classifiers.state_maps, classifiers.states = like.adapters, like.state_maps, like.states
    return Engine(backbone, classifiers.eval())


def threshold_for(rate: float) -> float:
    """What a random confidence reaches at this rate."""
    return min(1 - rate, 0.999999)
