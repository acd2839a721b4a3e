"""Which threshold may be used: tests of the hypothesis that a threshold loses too much, on losses of documents.

Losses lie in [0, 1]; documents are taken to be exchangeable. Candidates come in an order that was fixed before any
loss was seen, the most careful first. Knows numbers only. C candidates, n documents.

- Angelopoulos, Bates, Candes, Jordan, Lei 2021, "Learn then Test" (arXiv 2110.01052): fixed-sequence testing, and the
  p-value of Hoeffding and Bentkus.
- Waudby-Smith, Ramdas 2020, "Estimating means of bounded random variables by betting" (arXiv 2010.09686).
- Angelopoulos, Bates, Fisch, Lei, Schuster 2022, "Conformal risk control" (arXiv 2208.02814).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from dynamax_lm_eval.config import UserError

Bound = Literal["betting", "hoeffding-bentkus"]
BOUNDS: tuple[Bound, ...] = get_args(Bound)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Selection:
    """What a procedure chose.

    Attributes:
        chosen: index of the last candidate that passed before the first that did not; None where the first failed.
        scores: p-value of each candidate that was looked at (learn then test), or the bound on its expected loss
            (risk control). Candidates behind the first failure were not looked at.
    """

    chosen: int | None
    scores: tuple[float, ...]


def learn_then_test(losses: Floats, tolerance: float, level: float, bound: Bound = "betting") -> Selection:
    """Fixed-sequence testing: with probability 1 - level the chosen candidate's expected loss is at most tolerance.

    Each candidate's hypothesis "the expected loss is more than tolerance" is tested at ``level`` until the first that
    cannot be rejected. No monotony is needed.

    Args:
        losses: (C, n), in the order of testing.
        tolerance: in (0, 1).
        level: in (0, 1).
        bound: gives the p-values.

    Raises:
        UserError: a number lies outside its range.
    """
    _check(losses, tolerance)
    if not 0 < level < 1:
        raise UserError(f"level must be in (0, 1), got {level:g}")
    found: list[float] = []
    for row in losses:
        found.append(p_value(row, tolerance, level, bound))
        if found[-1] > level:
            return Selection(_before(len(found) - 1), tuple(found))
    return Selection(_before(len(found)), tuple(found))


def conformal_risk_control(losses: Floats, tolerance: float) -> Selection:
    """The loss of a new document is at most tolerance in expectation, over calibration documents and that one.

    A candidate passes where (n R + 1) / (n + 1) <= tolerance, R its mean loss (equation 4 of the paper). This needs
    losses that only grow along the candidates; others are replaced by the largest so far of each document, which are
    at least as large.

    Args:
        losses: (C, n), in the order of testing.
        tolerance: in (0, 1).

    Raises:
        UserError: a number lies outside its range.
    """
    _check(losses, tolerance)
    n = losses.shape[1]
    risks = np.maximum.accumulate(losses, axis=0).mean(axis=1)
    found: list[float] = []
    for risk in risks:
        found.append(float((n * risk + 1) / (n + 1)))
        if found[-1] > tolerance:
            return Selection(_before(len(found) - 1), tuple(found))
    return Selection(_before(len(found)), tuple(found))


def p_value(losses: Floats, tolerance: float, level: float, bound: Bound) -> float:
    """Of the hypothesis that the expected loss is more than ``tolerance``, for losses (n,)."""
    if bound == "betting":
        return betting_p_value(losses, tolerance, level)
    return hoeffding_bentkus_p_value(losses, tolerance)


def betting_p_value(losses: Floats, tolerance: float, level: float) -> float:
    """1 / the largest capital of a gambler who bets against the hypothesis document by document.

    Capital after i documents is prod (1 - b_j (L_j - tolerance)), a supermartingale under the hypothesis for any bets
    b_j in [0, 1] that depend on earlier documents only; its maximum obeys Ville's inequality. The bets are those of
    Waudby-Smith and Ramdas's predictable plug-in, min(1, sqrt(2 ln(1/level) / (n s_{j-1}^2))).
    """
    n = len(losses)
    count = np.arange(1, n + 1)
    mean = (0.5 + np.cumsum(losses)) / (count + 1)
    variance = (0.25 + np.cumsum((losses - mean) ** 2)) / (count + 1)
    before = np.concatenate([[0.25], variance[:-1]])
    bets = np.minimum(1.0, np.sqrt(2 * math.log(1 / level) / (n * before)))
    capital = np.cumsum(np.log1p(-bets * (losses - tolerance)))
    return float(np.exp(-max(0.0, float(capital.max()))))


def hoeffding_bentkus_p_value(losses: Floats, tolerance: float) -> float:
    """min(exp(-n h(R, tolerance)), e P(Binomial(n, tolerance) <= ceil(n R))), R the mean loss, h the relative entropy
    of two coins; proposition 3 of Learn then Test."""
    from scipy.stats import binom

    n = len(losses)
    mean = float(losses.mean())
    low = min(mean, tolerance)
    entropy = (low * math.log(low / tolerance) if low > 0 else 0.0) + (1 - low) * math.log((1 - low) / (1 - tolerance))
    hoeffding = math.exp(-n * entropy)
    # Sums of equal numbers land a little above the whole number that they are.
    bentkus = math.e * float(binom.cdf(math.ceil(n * mean - 1e-9), n, tolerance))
    return min(1.0, hoeffding, bentkus)


def fewest_documents(tolerance: float, level: float | None, bound: Bound = "betting") -> int:
    """How many documents are needed for any candidate to pass, were nothing lost on any of them.

    ``level``: None for conformal risk control.
    """

    def passes(n: int) -> bool:
        nothing = np.zeros((1, n))
        found = (
            conformal_risk_control(nothing, tolerance)
            if level is None
            else learn_then_test(nothing, tolerance, level, bound)
        )
        return found.chosen is not None

    most = 1
    while not passes(most):
        most *= 2
    least = most // 2
    while most - least > 1:
        middle = (most + least) // 2
        most, least = (middle, least) if passes(middle) else (most, middle)
    return most


def _before(failed: int) -> int | None:
    """The candidate before the one that failed; never that one."""
    return failed - 1 if failed > 0 else None


def _check(losses: Floats, tolerance: float) -> None:
    if not 0 < tolerance < 1:
        raise UserError(f"tolerance must be in (0, 1), got {tolerance:g}; 0 would allow the full model only")
    if losses.ndim != 2 or losses.shape[1] == 0:
        raise UserError("there are no documents to calibrate on")
    if not (np.isfinite(losses).all() and losses.min(initial=0.0) >= 0 and losses.max(initial=0.0) <= 1):
        raise UserError("losses must lie in [0, 1]")
