"""Exits that no training made: they leave at chance or on a schedule, and cost nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dynamax_lm_eval.backbones.base import Backbone
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.exits.classifiers import Classifier, ClassifierOptions, ExitClassifiers


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


def logits_of(log_odds: Tensor) -> Tensor:
    """What a classifier returns, (n, 2), for log-odds (n,) of leaving."""
    return torch.stack([torch.zeros_like(log_odds), log_odds], dim=1)


def forced(backbone: Backbone, exits: Mapping[int, Classifier], adapters: Any = None) -> Engine:
    """An engine with these exits, by layer, in place of its kind ``calm``; ``adapters`` correct its read-outs."""
    classifiers = ExitClassifiers((), tuple(exits), 1, "silu", ClassifierOptions())
    classifiers.by_kind["calm"] = nn.ModuleDict({str(layer): classifier for layer, classifier in exits.items()})
    if adapters is not None:
        classifiers.adapters = adapters
    return Engine(backbone, classifiers.eval())


def threshold_for(rate: float) -> float:
    """What a random confidence reaches at this rate."""
    return min(1 - rate, 0.999999)
