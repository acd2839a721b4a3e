"""Documents drawn with replacement: what their sums are in each draw, and the intervals that follow.

What is resampled is a row: a document, or the sums of all that belongs to one cluster. Columns of one call see the same
draws, so what is made of them is paired; and so do calls with the same number of rows, draws and seed.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import norm

from dynamax_lm_eval.sweep.results import Floats

LEVEL = 0.95
_TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
#: Weights that are held at once.
_AT_ONCE = 2**23

#: An interval where there is none.
NO_INTERVAL = (float("nan"), float("nan"))


def sums(columns: Floats, count: int, seed: int) -> Floats:
    """Returns (1 + count, K): the sums of columns (n, K), then those of each draw of n rows with replacement."""
    n = len(columns)
    generator = np.random.default_rng(seed)
    step = max(1, _AT_ONCE // n)
    parts = [columns.sum(axis=0)[None]]
    for start in range(0, count, step):
        weights = generator.multinomial(n, np.full(n, 1 / n), size=min(step, count - start))
        parts.append(weights.astype(np.float64) @ columns)
    return np.vstack(parts)


def ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Returns quotients; NaN where the denominator is 0."""
    quotient: Floats = np.divide(
        numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator != 0
    )
    return quotient


def percentile(values: Floats) -> tuple[float, float]:
    """Returns the 95 % percentile interval of values (1 + B,): the data's, then those of draws; NaN are left out."""
    drawn = values[1:][~np.isnan(values[1:])]
    if not len(drawn):
        return NO_INTERVAL
    low, high = np.quantile(drawn, _TAILS)
    return float(low), float(high)


def bca(values: Floats, without_each: Floats) -> tuple[float, float]:
    """Returns the 95 % bias-corrected and accelerated interval (Efron 1987, eq. 6.8 with the jackknife's skewness).

    Args:
        values: (1 + B,) the data's, then those of draws; NaN are left out.
        without_each: (n,) the number without each row.
    """
    drawn = values[1:][~np.isnan(values[1:])]
    without = without_each[~np.isnan(without_each)]
    if not len(drawn) or len(without) < 2 or np.isnan(values[0]):
        return NO_INTERVAL
    # Draws that differ from the data by rounding alone are equal to it; half of them count as below.
    near = np.abs(drawn - values[0]) <= 1e-12 * max(1.0, abs(values[0]))
    below = float(((drawn < values[0]) & ~near).mean() + near.mean() / 2)
    deviations = without.mean() - without
    spread = float((deviations**2).sum())
    if not 0 < below < 1 or spread <= 0:
        return percentile(values)
    bias, acceleration = norm.ppf(below), float((deviations**3).sum()) / (6 * spread**1.5)
    shifted = bias + norm.ppf(_TAILS)
    low, high = np.quantile(drawn, norm.cdf(bias + shifted / (1 - acceleration * shifted)))
    return float(low), float(high)


def interval_of_ratio(
    drawn_numerator: Floats, drawn_denominator: Floats, numerator: Floats, denominator: Floats
) -> tuple[float, float]:
    """Returns the interval of a ratio of sums, from its sums in draws (1 + B,) and its columns (n,)."""
    without = ratio(numerator.sum() - numerator, denominator.sum() - denominator)
    return bca(ratio(drawn_numerator, drawn_denominator), without)
