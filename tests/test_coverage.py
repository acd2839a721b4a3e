"""Intervals hold the truth 95 times in 100, where it is known: simulations with fixed seeds, one a column."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dynamax_lm_eval.compute.accounting import ratio_stderr
from dynamax_lm_eval.reports.resampling import bca, interval_of_ratio, percentile, sums
from dynamax_lm_eval.reports.statistics import Draws, scores_at

Floats = npt.NDArray[np.float64]
TIMES, DRAWS, N = 1000, 1000, 400


def check(intervals: Sequence[tuple[float, float]], truth: float) -> None:
    """Holds the share of intervals with the truth in them against 0.95, within three standard deviations of chance."""
    inside = [low <= truth <= high for low, high in intervals]
    assert len(inside) > TIMES / 3
    assert abs(np.mean(inside) - 0.95) < 3 * np.sqrt(0.95 * 0.05 / len(inside)), np.mean(inside)


def of_ratios(numerators: Floats, denominators: Floats) -> list[tuple[float, float]]:
    """The intervals of ratios of sums of columns (n, TIMES)."""
    above, below = sums(numerators, DRAWS, 7), sums(denominators, DRAWS, 7)
    columns = zip(above.T, below.T, numerators.T, denominators.T, strict=True)
    return [interval_of_ratio(*column) for column in columns]


def test_a_ratio_of_runs_on_the_same_documents() -> None:
    rng = np.random.default_rng(0)
    full = rng.lognormal(0, 0.4, (N, TIMES))
    check(of_ratios(full, full / 1.1 * rng.lognormal(-0.02, 0.2, (N, TIMES))), 1.1)


def test_a_difference_of_scores() -> None:
    rng = np.random.default_rng(1)
    quality = rng.uniform(size=(N, TIMES))
    full, own = (rng.uniform(size=(N, TIMES)) < chance for chance in (quality, 0.9 * quality))
    difference = own.astype(float) - full
    drawn = sums(difference, DRAWS, 7) / N
    without = (difference.sum(axis=0) - difference) / (N - 1)
    check([bca(*pair) for pair in zip(drawn.T, without.T, strict=True)], -0.05)


def test_a_group_of_unlike_tasks() -> None:
    rng = np.random.default_rng(2)
    means, sizes = (1.05, 1.25), (40, 80)
    intervals = []
    for _ in range(TIMES):
        tasks = []
        for mean, n in zip(means, sizes, strict=True):
            spent = rng.uniform(0.8, 1.2, n)
            tasks.append(list(zip((spent * rng.normal(mean, 0.1, n)).tolist(), spent.tolist(), strict=True)))
        found = sum(a for task in tasks for a, _ in task) / sum(b for task in tasks for _, b in task)
        error = ratio_stderr(tasks)
        assert error is not None
        intervals.append((found - 1.96 * error, found + 1.96 * error))
    check(intervals, (40 * 1.05 + 80 * 1.25) / 120)


def test_tokens_of_the_same_document_are_no_separate_evidence() -> None:
    """Agreement of tokens in documents of unlike lengths and kinds: rows are the sums of a document."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(20, 200, (N, TIMES))
    right = rng.binomial(tokens, rng.beta(9, 1, (N, TIMES)))
    intervals = of_ratios(right.astype(float), tokens.astype(float))
    check(intervals, 0.9)
    share = right.sum(axis=0) / tokens.sum(axis=0)
    as_tokens = 1.96 * np.sqrt(share * (1 - share) / tokens.sum(axis=0))
    wrong = list(zip(share - as_tokens, share + as_tokens, strict=True))
    assert np.mean([low <= 0.9 <= high for low, high in wrong]) < 0.7


def test_a_line_that_ends_near_the_reduction_it_is_read_at() -> None:
    """No draw is left out where its line ends before 1.2: the true one ends at 1.2048."""
    rng = np.random.default_rng(4)
    fractions, reduction = np.asarray([1.0, 0.94, 0.88, 0.83]), 1.2
    size = rng.lognormal(0, 0.3, (N, 1, TIMES))
    spent = size * (fractions[:, None] + rng.normal(0, 0.2, (N, 4, TIMES)) * (fractions < 1)[:, None])
    score = 0.8 - 0.9 * (1 - fractions)[:, None] + rng.normal(0, 0.2, (N, 1, TIMES)) + rng.normal(0, 0.1, (N, 4, TIMES))
    drawn = [sums(part.reshape(N, -1), DRAWS, 7).reshape(DRAWS + 1, -1, TIMES) for part in (size, spent, score)]
    intervals, short = [], []
    for sizes, spents, scores in zip(*(np.moveaxis(part, 2, 0) for part in drawn), strict=True):
        line = Draws(scores.T / N, (sizes / spents).T)
        if line.reductions[:, 0].max() >= reduction:
            found = scores_at(line, reduction)
            assert not np.isnan(found).any()
            intervals.append(percentile(found))
            short.append((line.reductions.max(axis=0) < reduction).mean())
    truth = 0.8 - 0.9 * (1 - 1 / reduction)
    check(intervals, truth)
    assert np.mean(short) > 0.2, "many draws end before it"
