"""Thresholds per exit, chosen together from one recorded pass: the best agreement at every amount of compute.

A token leaves at the first exit whose confidence reaches that exit's threshold. What it would have been worth at every
exit is recorded (does the exit's token agree with the full model's?), and so is what leaving there costs; so any
thresholds can be tried without running the model. What is not seen: the states that early tokens leave behind.
Knows numbers and the file that holds the result. E exits, N tokens; index E stands for no exit.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.files import JsonFormat

Floats = npt.NDArray[np.float64]

FORMAT = JsonFormat(
    name="dynamax-exit-thresholds",
    version=1,
    what="a file of dynamax-lm-eval exit-thresholds",
    remedy="make it: dynamax-lm-eval exit-thresholds --backbone ...",
    by_hand=True,
)
#: Thresholds are multiples of 1 / STEPS.
STEPS = 200
_MOST_ROUNDS = 20


@dataclass(frozen=True)
class Recorded:
    """What tokens that may leave showed at the exits by one kind of confidence, and what leaving costs.

    Attributes:
        confidence: (E, N); below 0 where no threshold lets a token leave.
        agrees: (E + 1, N) in {0, 1}; the last row is 1.
        cost: (E + 1,) fraction of the full model's compute for a token that leaves there, without evaluations.
        evaluation: (E,) what an evaluation adds at each exit, for every token that reaches it where some may leave.
        document: (N,) the document that each token belongs to.
        refused: (E, N) what a read that refuses to confirm adds for a token that reaches an exit and stays; None:
            nothing is confirmed.
    """

    confidence: Floats
    agrees: Floats
    cost: Floats
    evaluation: Floats
    document: npt.NDArray[np.int64]
    refused: Floats | None = None

    def of_documents(self, documents: npt.NDArray[np.bool_]) -> Recorded:
        """Returns the tokens of some documents only."""
        tokens = documents[self.document]
        return replace(
            self,
            confidence=self.confidence[:, tokens],
            agrees=self.agrees[:, tokens],
            document=self.document[tokens],
            refused=None if self.refused is None else self.refused[:, tokens],
        )

    def costs(self, thresholds: Floats) -> Floats:
        """Returns the fraction of compute (E + 1,) of a token that leaves at each exit.

        It is (E + 1, N) where it differs between tokens, because thresholds do or because some reads refuse. Nothing
        is evaluated where the threshold is 1.
        """
        shape = (-1, *(1,) * (thresholds.ndim - 1))
        evaluated = np.cumsum((thresholds < 1) * self.evaluation.reshape(shape), axis=0)
        spent: Floats = self.cost.reshape(shape) + np.concatenate([evaluated, evaluated[-1:]])
        if self.refused is not None:
            # The read at the exit where a token leaves gives its token.
            reads = np.cumsum((thresholds < 1).reshape(len(evaluated), -1) * self.refused, axis=0)
            spent = spent.reshape(len(spent), -1) + np.concatenate([np.zeros_like(reads[:1]), reads])
        return spent

    def cost_of(self, left: npt.NDArray[np.int64], thresholds: Floats) -> Floats:
        """Returns the fraction of compute (N,) of each token, which leaves at the exit ``left``."""
        costs = self.costs(thresholds)
        spent: Floats = costs[left] if costs.ndim == 1 else costs[left, np.arange(len(left))]
        return spent


def exits_at(recorded: Recorded, thresholds: Floats) -> npt.NDArray[np.int64]:
    """Returns the index (N,) of the exit at which each token leaves; ``thresholds`` are (E,), or (E, N) per token."""
    bounds = thresholds[:, None] if thresholds.ndim == 1 else thresholds
    passes = np.vstack([(recorded.confidence >= bounds) & (bounds < 1), np.ones((1, recorded.confidence.shape[1]))])
    left: npt.NDArray[np.int64] = passes.argmax(axis=0)
    return left


def outcome(recorded: Recorded, thresholds: Floats) -> tuple[float, float]:
    """Returns (agreement, fraction of compute), means over tokens."""
    left = exits_at(recorded, thresholds)
    agreement = recorded.agrees[left, np.arange(len(left))].mean()
    return float(agreement), float(recorded.cost_of(left, thresholds).mean())


def improved(recorded: Recorded, price: float, thresholds: Floats) -> Floats:
    """Returns thresholds (E,) that no change of a single one makes better in agreement - price * fraction.

    Given the others, the best threshold of one exit is found exactly: tokens that reach it gain by leaving there
    instead of later, and the sum of gains above a threshold is largest at one of the multiples of 1 / STEPS. A
    threshold below 1 costs an evaluation of every token that reaches the exit, and a read of those that it refuses.
    """
    exits = len(recorded.confidence)
    # Bin 0 is of tokens that no threshold lets leave.
    bins = np.clip(np.floor(recorded.confidence * STEPS).astype(np.int64), -1, STEPS - 1) + 1
    best: Floats = thresholds.copy()
    for _ in range(_MOST_ROUNDS):
        before = best.copy()
        for e in reversed(range(exits)):
            others = best.copy()
            others[e] = 1.0  # nobody leaves here
            later = exits_at(recorded, others)
            reach = later > e
            value = recorded.agrees - price * recorded.costs(others).reshape(exits + 1, -1)  # (E + 1, N)
            gain = value[e, reach] - value[later[reach], np.flatnonzero(reach)]
            asked = recorded.evaluation[e] * reach.sum()
            if recorded.refused is not None:
                reads = recorded.refused[e, reach]  # who leaves spares it
                gain, asked = gain + price * reads, asked + reads.sum()
            by_bin = np.bincount(bins[e, reach], weights=gain, minlength=STEPS + 1)[1:]
            above = np.cumsum(by_bin[::-1])[::-1] - price * asked
            above = np.append(above, 0.0)  # gains of threshold k / STEPS; the last: never
            best[e] = (STEPS - np.argmax(above[::-1])) / STEPS  # the highest of equals
        if np.array_equal(best, before):
            break
    return best


def best_path(recorded: Recorded, prices: Floats) -> list[tuple[float, ...]]:
    """Returns thresholds for rising prices of compute, by rising savings; equal ones once."""
    fractions: dict[tuple[float, ...], float] = {}
    thresholds = np.ones(len(recorded.confidence))
    for price in np.sort(prices):
        thresholds = improved(recorded, float(price), thresholds)
        if thresholds.min() < 1:
            fractions[tuple(thresholds.round(6).tolist())] = outcome(recorded, thresholds)[1]
    return sorted(fractions, key=lambda path_point: -fractions[path_point])


def agreement_at(curve: list[tuple[float, float]], fraction: float) -> float:
    """Returns the agreement at a fraction of a curve of (agreement, fraction); NaN beyond the curve.

    The curve begins at the full model, whose point (1, 1) is added to it.
    """
    points = sorted([*((cost, right) for right, cost in curve), (1.0, 1.0)])
    x, y = (np.asarray(column) for column in zip(*points, strict=True))
    return float(np.interp(fraction, x, y, left=np.nan, right=np.nan))


@dataclass(frozen=True)
class ThresholdPath:
    """Thresholds per exit from the most careful to the most saving, and how they do on held-out text.

    Attributes:
        backbone: as the user named it.
        scorer: kind of classifier.
        exit_layers: the exits.
        path: a dict for each: ``thresholds``, ``agreement`` and ``compute_reduction`` on documents that
            were not searched.
        shared: the same for one threshold at all exits.
        gains: agreement of both at some reductions, their difference and its standard error over documents.
        tokens: of the texts, searched and not.
        dataset: where they are from.
        documents: how many they are; None in files of releases that did not count them.
        propose: of a cascade, the classifier's confidence from which on a token is read out; None: it is none.
        proposals: of a cascade, agreement at some reductions by the values of ``propose`` that were tried.
        confirm: of a cascade, what confirmed; None: it is none.
        exits: the fingerprint of the exits; None in files of releases that did not say.
    """

    backbone: str
    fingerprint: str
    scorer: str
    state_mode: str
    exit_layers: list[int]
    path: list[dict[str, Any]]
    shared: list[dict[str, Any]]
    gains: list[dict[str, float]]
    tokens: int
    dataset: str
    documents: int | None = None
    propose: float | None = None
    proposals: list[dict[str, float]] = field(default_factory=list)
    confirm: str | None = None
    exits: str | None = None

    @property
    def thresholds(self) -> list[tuple[float, ...]]:
        """The thresholds of the whole path, the most careful first."""
        return [tuple(point["thresholds"]) for point in self.path]

    def save(self, path: Path) -> None:
        FORMAT.write(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> ThresholdPath:
        """Returns the path of a file; raises UserError where the file is missing or holds something else."""
        try:
            return cls(**FORMAT.read(path, f"--per_exit {path}"))
        except TypeError as error:
            raise UserError(f"--per_exit {path} is damaged ({error}); {FORMAT.remedy}") from error
