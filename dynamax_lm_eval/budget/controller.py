"""Thresholds that hold a compute budget: which threshold to use next, from what was spent so far.

Compute is a fraction: MACs spent on eligible tokens over those of the whole backbone, 1 / compute_reduction. Knows
numbers only; who runs documents in blocks, and in which order, is the model's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

#: Documents whose thresholds are decided at once.
BLOCK = 32
#: Blocks over which too much or too little compute is evened out, at most.
_HORIZON = 3
#: Documents and thresholds that a first pass tries.
SAMPLE_DOCUMENTS = 64
SAMPLE_THRESHOLDS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)


@dataclass(frozen=True)
class Measurement:
    """The compute that some documents needed at one threshold."""

    threshold: float
    full: float
    spent: float


@dataclass
class Curve:
    """The fraction of compute as a function of the threshold, from what was measured.

    It never falls with the threshold, and ends at the full model's 1. Between measurements it is linear.
    """

    cheapest: float  # fraction at threshold 0, where every token leaves at the first exit
    measurements: list[Measurement] = field(default_factory=list)

    def threshold_for(self, fraction: float) -> float:
        """Returns the threshold whose fraction this is, in [0, 1]."""
        thresholds, fractions = self._points()
        return float(np.interp(fraction, fractions, thresholds))

    def _points(self) -> tuple[Any, Any]:
        from sklearn.isotonic import IsotonicRegression

        full = sum(item.full for item in self.measurements) or 1.0
        # Both ends are known: they weigh more than anything that was measured.
        ends = [(0.0, self.cheapest, 1e3 * full), (1.0, 1.0, 1e3 * full)]
        points = sorted([*ends, *((item.threshold, item.spent / item.full, item.full) for item in self.measurements)])
        x, y, weights = (np.asarray(column, dtype=np.float64) for column in zip(*points, strict=True))
        fitted = IsotonicRegression(y_min=self.cheapest).fit(x, y, sample_weight=weights)
        thresholds = np.unique(x)
        fractions = fitted.predict(thresholds)
        # np.interp wants rising fractions; on flat parts the higher threshold, the more conservative one, wins.
        rising = np.append(np.diff(fractions) > 1e-12, True)
        return thresholds[rising], fractions[rising]


@dataclass
class ThresholdController:
    """Decides the threshold of every block of documents of one task.

    Attributes:
        target: fraction of compute that all documents together should need.
        curve: what was measured of thresholds.
        documents: how many the task has.
        trajectory: first document, number of documents, threshold and compute reduction of every block.
    """

    target: float
    curve: Curve
    documents: int
    trajectory: list[dict[str, Any]] = field(default_factory=list)
    _full: float = 0.0
    _spent: float = 0.0

    def threshold(self) -> float:
        """Returns the threshold of the next block."""
        fraction = self._wanted_fraction()
        return self.curve.threshold_for(float(np.clip(fraction, self.curve.cheapest, 1.0)))

    def record(self, threshold: float, documents: int, full: float, spent: float) -> dict[str, Any]:
        """Takes note of a block that has run; returns its entry in the trajectory.

        Blocks without eligible tokens say nothing of the curve.
        """
        first = self._done
        self._full += full
        self._spent += spent
        if full > 0:
            self.curve.measurements.append(Measurement(threshold, full, spent))
        self.trajectory.append(
            {
                "first_document": first,
                "documents": documents,
                "threshold": threshold,
                "compute_reduction": full / spent if full > 0 and spent > 0 else None,
                "compute_reduction_so_far": self._full / self._spent if self._spent > 0 else None,
            }
        )
        return self.trajectory[-1]

    @property
    def _done(self) -> int:
        return sum(block["documents"] for block in self.trajectory)

    def _wanted_fraction(self) -> float:
        """Returns the fraction that the next block should take."""
        return _catch_up(self.target, self._full, self._spent, self._ahead(self._full)) if self._full else self.target

    def _ahead(self, quantity: float) -> float:
        """Returns how much of a quantity the next few blocks will have, where the documents so far had this much."""
        left = max(self.documents - self._done, 1)
        return quantity / self._done * min(left, _HORIZON * BLOCK)


@dataclass
class LatencyController(ThresholdController):
    """Decides thresholds to hold a latency: ``target`` is wall-clock seconds per generated token.

    Time is taken to be proportional to the fraction of compute; the factor is measured as blocks run. The first block
    runs at full depth to measure it.
    """

    _seconds: float = 0.0
    _tokens: int = 0
    _token_fractions: float = 0.0  # sum over generated tokens of the fraction that they needed

    def timed(self, seconds: float, tokens: int) -> None:
        """Takes note of how long the last block ran, and of how many tokens it generated."""
        block = self.trajectory[-1]
        self._seconds += seconds
        self._tokens += tokens
        self._token_fractions += tokens / (block["compute_reduction"] or 1.0)
        block["ms_per_token"] = 1e3 * seconds / tokens if tokens else None
        block["ms_per_token_so_far"] = 1e3 * self._seconds / self._tokens if self._tokens else None

    def _wanted_fraction(self) -> float:
        if not self._tokens:
            return 1.0
        seconds = _catch_up(self.target, self._tokens, self._seconds, self._ahead(self._tokens))
        return seconds / (self._seconds / self._token_fractions)


def _catch_up(target: float, quantity: float, spent: float, ahead: float) -> float:
    """Returns what each unit ahead may cost for all units together to come to ``target``."""
    return (target * (quantity + ahead) - spent) / ahead


def blocks_of(documents: Sequence[Any]) -> list[list[int]]:
    """Returns indices of requests in blocks of ``BLOCK`` documents, in order.

    ``documents``: of each request.
    """
    blocks: list[list[int]] = []
    numbers: dict[Any, int] = {}
    for index, document in enumerate(documents):
        block = numbers.setdefault(document, len(numbers)) // BLOCK
        if block == len(blocks):
            blocks.append([])
        blocks[block].append(index)
    return blocks
