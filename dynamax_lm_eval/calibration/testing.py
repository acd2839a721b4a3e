"""Which threshold may be used: tests of the hypothesis that a threshold loses too much, on losses of documents.

Losses lie in [0, 1]. Documents are independent draws, or a random share of a fixed set of documents; the order in
which they come is free: what depends on an order draws one of its own. Candidates come in an order that was fixed
before any loss was seen, the most conservative first. Knows numbers only. C candidates, n documents.

- Angelopoulos, Bates, Candes, Jordan, Lei 2021, "Learn then Test" (arXiv 2110.01052): fixed-sequence testing, and the
  p-value of Hoeffding and Bentkus.
- Waudby-Smith, Ramdas 2020, "Estimating means of bounded random variables by betting" (arXiv 2010.09686).
- Maurer, Pontil 2009, "Empirical Bernstein bounds and sample variance penalization" (arXiv 0907.3740).
- Bardenet, Maillard 2015, "Concentration inequalities for sampling without replacement" (arXiv 1309.4029).
- Angelopoulos, Bates, Fisch, Lei, Schuster 2022, "Conformal risk control" (arXiv 2208.02814).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from dynamax_lm_eval.errors import UserError

Bound = Literal["betting", "hoeffding-bentkus", "empirical-bernstein"]
BOUNDS: tuple[Bound, ...] = get_args(Bound)

Floats = npt.NDArray[np.float64]

#: Tells the random order of bets from every other use of the same seed, such as the split of documents.
_ORDER_OF_BETS = 0x626574  # "bet"


@dataclass(frozen=True)
class Selection:
    """The candidates that a procedure certified.

    Attributes:
        certified: how many candidates passed before the first that did not. The guarantee holds for all of them.
        scores: p-value of each candidate that was looked at (learn then test), or the bound on its expected loss
            (risk control). Candidates behind the first failure were not looked at.
    """

    certified: int
    scores: tuple[float, ...]

    def best(self, reductions: Sequence[float]) -> int | None:
        """Returns the index of the certified candidate that saves the most, the most conservative of equals.

        None where no certified candidate saves anything: then the full model is the better choice.

        Args:
            reductions: expected compute_reduction of every candidate.
        """
        saving = [i for i in range(self.certified) if reductions[i] > 1]
        return max(saving, key=lambda i: reductions[i], default=None)


def learn_then_test(
    losses: Floats,
    tolerance: float,
    level: float,
    bound: Bound = "betting",
    *,
    seed: int,
    population: int | None = None,
) -> Selection:
    """Tests in a fixed sequence: with probability 1 - level no certified candidate's expected loss exceeds tolerance.

    Each candidate's hypothesis "the expected loss is more than tolerance" is tested at ``level`` until the first that
    cannot be rejected. No monotony is needed. The probability is that of any wrong candidate among the certified ones,
    so that one may choose among them after the fact, for example the one that saves the most.

    Args:
        losses: (C, n), in the order of testing; documents in any order.
        tolerance: in (0, 1).
        level: in (0, 1).
        bound: gives the p-values.
        seed: of the random order of bets; chosen before losses are seen.
        population: how many documents these were drawn from, see :func:`betting_p_values` and
            :func:`empirical_bernstein_p_values`.

    Raises:
        UserError: a number lies outside its range.
    """
    _check(losses, tolerance)
    if not 0 < level < 1:
        raise UserError(f"level must be in (0, 1), got {level:g}")
    if bound == "betting":
        scores = betting_p_values(losses, tolerance, level, seed=seed, population=population)
    elif bound == "hoeffding-bentkus":
        scores = hoeffding_bentkus_p_values(losses, tolerance)
    else:
        scores = empirical_bernstein_p_values(losses, tolerance, population=population)
    return _until_first_failure(scores, level)


def conformal_risk_control(losses: Floats, tolerance: float) -> Selection:
    """Certifies that a new document's expected loss is at most tolerance.

    The expectation is over the calibration documents and the new one.

    A candidate passes where (n R + 1) / (n + 1) <= tolerance, R its mean loss (equation 4 of the paper). This needs
    losses that only grow along the candidates; others are replaced by the largest so far of each document, which are
    at least as large. A certified candidate before the last therefore loses no more than the last one, and may be
    chosen instead.

    Args:
        losses: (C, n), in the order of testing.
        tolerance: in (0, 1).

    Raises:
        UserError: a number lies outside its range.
    """
    _check(losses, tolerance)
    n = losses.shape[1]
    risks = np.maximum.accumulate(losses, axis=0).mean(axis=1)
    return _until_first_failure((n * risks + 1) / (n + 1), tolerance)


def betting_p_values(
    losses: Floats, tolerance: float, level: float, *, seed: int, population: int | None = None
) -> Floats:
    """Returns (C,) p-values by betting: 1 / the largest capital of a gambler who bets against the hypothesis.

    One bet is made for each document. Capital after i documents is prod (1 - b_j (L_j - m_j)), a supermartingale under
    the hypothesis for any bets b_j in [0, 1] that depend on earlier documents only; its maximum obeys Ville's
    inequality. The bets are those of Waudby-Smith and Ramdas's predictable plug-in,
    min(1, sqrt(2 ln(1/level) / (n s_{j-1}^2))).

    This holds only where a document's expected loss, given the earlier ones, is at least m_j. In the order of a sorted
    task it is not: the gambler would have won on the easy documents before the hard ones come. So bets follow a random
    order, the same for all candidates. For independent draws m_j is the tolerance. Of N documents of which j - 1
    were drawn without replacement, the others' mean is (N tolerance - sum of earlier losses) / (N - j + 1) at the edge
    of the hypothesis; m_j is the smaller of both (at least 0), which keeps the capital a supermartingale either way.

    Args:
        losses: (C, n), documents in any order.
        tolerance: in (0, 1).
        level: at which the test will be made; bets are made for it, and the p-values hold at all levels.
        seed: of the order; it must not depend on the losses.
        population: N, if the documents are a random share of N documents and the hypothesis is on the mean over
            these N; None for independent draws. With N it holds for both.
    """
    n = losses.shape[1]
    if population is not None and population < n:
        raise ValueError(f"{n} documents cannot be drawn from {population}")
    losses = losses[:, np.random.default_rng([_ORDER_OF_BETS, seed]).permutation(n)]
    count = np.arange(1, n + 1)
    total = np.cumsum(losses, axis=1)
    mean = (0.5 + total) / (count + 1)
    variance = (0.25 + np.cumsum((losses - mean) ** 2, axis=1)) / (count + 1)
    before = np.concatenate([np.full((len(losses), 1), 0.25), variance[:, :-1]], axis=1)
    bets = np.minimum(1.0, np.sqrt(2 * math.log(1 / level) / (n * before)))
    expected = np.full_like(losses, tolerance)
    if population is not None:
        others = (population * tolerance - (total - losses)) / (population - count + 1)
        expected = np.clip(others, 0.0, tolerance)
    with np.errstate(divide="ignore"):  # everything may be lost, and the capital stays at 0
        capital = np.cumsum(np.log1p(-bets * (losses - expected)), axis=1)
    p_values: Floats = np.exp(-np.maximum(0.0, capital.max(axis=1)))
    return p_values


def hoeffding_bentkus_p_values(losses: Floats, tolerance: float) -> Floats:
    """Returns (C,) p-values of Hoeffding and Bentkus (proposition 3 of Learn then Test).

    They are min(exp(-n h(R, tolerance)), e P(Binomial(n, tolerance) <= ceil(n R))), R the mean loss, h the relative
    entropy of two coins.

    Both parts come from expectations of convex functions of a sum, which are no larger without replacement (Hoeffding
    1963, theorem 4); the order of documents does not enter.
    """
    from scipy.special import rel_entr
    from scipy.stats import binom

    n = losses.shape[1]
    mean = losses.mean(axis=1)
    low = np.minimum(mean, tolerance)
    hoeffding = np.exp(-n * (rel_entr(low, tolerance) + rel_entr(1 - low, 1 - tolerance)))
    # Sums of equal numbers land a little above the whole number that they are.
    bentkus = math.e * binom.cdf(np.ceil(n * mean - 1e-9), n, tolerance)
    p_values: Floats = np.minimum(1.0, np.minimum(hoeffding, bentkus))
    return p_values


def empirical_bernstein_p_values(losses: Floats, tolerance: float, *, population: int | None = None) -> Floats:
    """Returns (C,) p-values: the least probability at which an empirical Bernstein bound lies below the tolerance.

    Theorem 4 of Maurer and Pontil, for independent draws: with probability 1 - d the expectation is at most
    R + sqrt(2 V x / n) + 7 x / (3 (n - 1)), x = ln(2 / d), R the mean loss and V the sample variance.

    Its proof needs independence. For n of N documents that were drawn without replacement, theorem 4.3 of Bardenet and
    Maillard has R + sqrt(2 rho V x / n) + (7 / 3 + 3 / sqrt(2)) x / n, x = ln(5 / d), rho = 1 - (n - 1) / N up to half
    of the documents and (1 - n / N) (1 + 1 / n) beyond. (Their V divides by n; the larger one is taken here.)

    Both are quadratic in sqrt(x), so d is found in closed form. The order of documents does not enter.

    Args:
        losses: (C, n).
        tolerance: in (0, 1).
        population: N, if the hypothesis is on the mean over N documents of which these are a random share; None for
            independent draws. With N the larger of both p-values is returned, which holds for both.
    """
    n = losses.shape[1]
    if population is not None and population < n:
        raise ValueError(f"{n} documents cannot be drawn from {population}")
    if n < 2:
        return np.ones(len(losses))
    room = tolerance - losses.mean(axis=1)
    variance = losses.var(axis=1, ddof=1)
    p_values = _least_probability(room, 2 * variance / n, 7 / (3 * (n - 1)), 2)
    if population is None:
        return p_values
    rho = 1 - (n - 1) / population if 2 * n <= population else (1 - n / population) * (1 + 1 / n)
    without = _least_probability(room, 2 * rho * variance / n, (7 / 3 + 3 / math.sqrt(2)) / n, 5)
    return np.maximum(p_values, without)


def _least_probability(room: Floats, square: Floats, linear: float, events: int) -> Floats:
    """Returns the least d with sqrt(square x) + linear x <= room, x = ln(events / d), at most 1; (C,) like room."""
    room = np.maximum(room, 0.0)
    root = 2 * room / (np.sqrt(square) + np.sqrt(square + 4 * linear * room) + np.finfo(np.float64).tiny)
    p_values: Floats = np.minimum(1.0, events * np.exp(-(root**2)))
    return p_values


def fewest_documents(tolerance: float, level: float | None, bound: Bound = "betting") -> int:
    """Returns how many documents are needed for any candidate to pass, were nothing lost on any of them.

    ``level``: None for conformal risk control.
    """

    def passes(n: int) -> bool:
        nothing = np.zeros((1, n))
        selection = (
            conformal_risk_control(nothing, tolerance)
            if level is None
            # All orders are one, and how many documents there are besides changes nothing.
            else learn_then_test(nothing, tolerance, level, bound, seed=0, population=2 * n)
        )
        return selection.certified > 0

    most = 1
    while not passes(most):
        most *= 2
    least = most // 2
    while most - least > 1:
        middle = (most + least) // 2
        most, least = (middle, least) if passes(middle) else (most, middle)
    return most


def _until_first_failure(scores: Floats, most: float) -> Selection:
    """Certifies candidates until the first whose score is more than ``most``; no later one is looked at."""
    failed = np.flatnonzero(scores > most)
    certified = int(failed[0]) if len(failed) else len(scores)
    return Selection(certified, tuple(scores[: certified + 1].tolist()))


def _check(losses: Floats, tolerance: float) -> None:
    if not 0 < tolerance < 1:
        raise UserError(f"tolerance must be in (0, 1), got {tolerance:g}; 0 would allow the full model only")
    if losses.ndim != 2 or losses.shape[1] == 0:
        raise UserError("there are no documents to calibrate on")
    if not (np.isfinite(losses).all() and losses.min(initial=0.0) >= 0 and losses.max(initial=0.0) <= 1):
        raise UserError("losses must lie in [0, 1]")
