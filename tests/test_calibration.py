"""The procedures of calibration keep their promises, on losses with known expectations."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dynamax_lm_eval.calibration.command import split_documents
from dynamax_lm_eval.calibration.testing import (
    BOUNDS,
    Selection,
    betting_p_values,
    conformal_risk_control,
    empirical_bernstein_p_values,
    fewest_documents,
    hoeffding_bentkus_p_values,
    learn_then_test,
)
from dynamax_lm_eval.errors import UserError

Floats = npt.NDArray[np.float64]
DRAWS = 2000
# The procedures, on losses with known expectations.

#: Expected loss of each candidate, the most careful first: rising, and not.
CURVES = {
    "monotone": np.array([0.01, 0.03, 0.06, 0.09, 0.12, 0.2]),
    "not monotone": np.array([0.02, 0.11, 0.05, 0.15, 0.08, 0.02]),
    "at the edge": np.array([0.101, 0.101, 0.101]),
}


def drawn(curve: Floats, n: int, seed: int, kind: str) -> Floats:
    """(C, n) losses with these expectations: the same documents are hard for all candidates."""
    generator = np.random.default_rng(seed)
    hard = generator.random(n)
    if kind == "coins":
        return (hard < curve[:, None]).astype(np.float64)
    return np.where(hard < 2 * curve[:, None], generator.random((len(curve), n)), 0.0)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("kind", ["coins", "uniform"])
@pytest.mark.parametrize("name", CURVES)
def test_learn_then_test_is_wrong_at_most_as_often_as_its_level(name: str, kind: str, bound: Any) -> None:
    curve, tolerance, level, n = CURVES[name], 0.1, 0.1, 150
    wrong = 0
    for seed in range(DRAWS):
        certified = learn_then_test(drawn(curve, n, seed, kind), tolerance, level, bound, seed=seed).certified
        wrong += bool((curve[:certified] > tolerance).any())
    assert wrong / DRAWS <= level + 3 * math.sqrt(level * (1 - level) / DRAWS)


@pytest.mark.parametrize("kind", ["coins", "uniform"])
@pytest.mark.parametrize("name", CURVES)
def test_risk_control_keeps_the_mean(name: str, kind: str) -> None:
    curve, tolerance, n = CURVES[name], 0.1, 60
    lost = []
    for seed in range(DRAWS):
        losses = drawn(curve, n + 1, seed, kind)  # the last document is the new one
        certified = conformal_risk_control(losses[:, :-1], tolerance).certified
        lost.append(losses[certified - 1, -1] if certified else 0.0)
    assert np.mean(lost) <= tolerance + 3 * np.std(lost) / math.sqrt(DRAWS)


#: Expected losses of the parts of a task whose documents are sorted; their means are above 0.1.
SORTED = {"halves": (0.02, 0.22), "thirds": (0.0, 0.18, 0.18), "quarters": (0.05, 0.1, 0.13, 0.17)}
SPLITS = 1000


def at_most(level: float) -> float:
    """The largest share in SPLITS that still agrees with a probability of ``level``: three standard errors above."""
    return level + 3 * math.sqrt(level * (1 - level) / SPLITS)


def sorted_population(name: str, mean: float | None, seed: int = 0) -> Floats:
    """Losses (1200,) that are 0 or 1 times a factor, part by part, with the parts' exact means; ``mean``: scaled to."""
    size = 1200 // len(SORTED[name])
    parts = [np.arange(size) < round(size * loss) for loss in SORTED[name]]
    losses = np.concatenate([np.random.default_rng([seed, 1]).permutation(part) for part in parts]).astype(np.float64)
    return losses if mean is None else losses * (mean / losses.mean())


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("mean", [None, 0.1 + 1e-9])
@pytest.mark.parametrize("name", SORTED)
def test_sorted_documents_are_wrongly_certified_at_most_as_often_as_the_level(
    name: str, mean: float | None, bound: Any
) -> None:
    """Regression: bets that followed the task's order certified these in 32 to 100 % of splits."""
    level, population = 0.05, sorted_population(name, mean)
    documents = [str(i) for i in range(len(population))]
    assert population.mean() > 0.1
    p_values = []
    for seed in range(SPLITS):
        split = split_documents(documents, 0.25, seed)
        assert split.calibration == sorted(split.calibration), "in the task's order, as a sweep's results are"
        losses = population[None, split.calibration]
        found = learn_then_test(losses, 0.1, level, bound, seed=seed, population=split.population)
        assert found.certified == (found.scores[0] <= level)
        p_values.append(found.scores[0])
    for probability in (0.01, level, 0.1, 0.3):
        assert np.mean(np.asarray(p_values) <= probability) <= at_most(probability)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("name", SORTED)
def test_independent_draws_that_come_sorted_are_certified_as_rarely(name: str, bound: Any) -> None:
    """The same where a new document is none of a fixed set."""
    parts, level = np.asarray(SORTED[name]) * 0.1 / np.mean(SORTED[name]), 0.05
    wrong = 0
    for seed in range(SPLITS):
        generator = np.random.default_rng([seed, 2])
        chances = np.sort(parts[generator.integers(len(parts), size=300)])
        losses = (generator.random(300) < chances).astype(np.float64)[None]
        wrong += learn_then_test(losses, 0.1, level, bound, seed=seed).certified
        wrong += learn_then_test(losses, 0.1, level, bound, seed=seed, population=600).certified
    assert wrong / 2 / SPLITS <= at_most(level)


@pytest.mark.parametrize("name", SORTED)
def test_risk_control_keeps_the_mean_of_the_other_documents_of_a_sorted_task(name: str) -> None:
    hard = np.random.default_rng(3).random(1200)
    expected = np.repeat(SORTED[name], 1200 // len(SORTED[name]))
    curve = np.array([[0.3], [0.6], [0.8], [0.9], [1.0], [1.3]])
    losses = (hard < curve * expected).astype(np.float64)
    documents = [str(i) for i in range(1200)]
    lost = []
    for seed in range(SPLITS):
        split = split_documents(documents, 0.25, seed)
        best = conformal_risk_control(losses[:, split.calibration], 0.1).best(range(2, 8))
        lost.append(0.0 if best is None else losses[best, split.test].mean())
    assert 0.05 < np.mean(lost) <= 0.1 + 3 * np.std(lost) / math.sqrt(SPLITS)


def test_all_candidates_are_bet_on_in_one_order_which_the_seed_decides() -> None:
    losses = np.sort(np.random.default_rng(0).random(200) * 0.15)
    first, second = betting_p_values(np.stack([losses, losses]), 0.1, 0.05, seed=0)
    assert first == second
    assert betting_p_values(losses[None], 0.1, 0.05, seed=0) == first
    assert betting_p_values(losses[None], 0.1, 0.05, seed=1) != first
    assert hoeffding_bentkus_p_values(losses[None], 0.1) == pytest.approx(
        hoeffding_bentkus_p_values(losses[None, ::-1], 0.1)
    )
    with pytest.raises(ValueError, match="200 documents cannot be drawn from 199"):
        betting_p_values(losses[None], 0.1, 0.05, seed=0, population=199)


@pytest.mark.parametrize("population", [None, 5])
def test_betting_by_hand(population: int | None) -> None:
    tolerance, level, n = 0.5, 0.9, 3

    def by_hand(losses: tuple[float, ...]) -> float:
        capital = most = 1.0
        seen: list[float] = []
        spread = 0.25
        for loss in losses:
            bet = min(1, math.sqrt(2 * math.log(1 / level) / (n * spread / (len(seen) + 1))))
            expected = tolerance
            if population is not None:  # what the other documents have on average where the hypothesis begins
                expected = min(tolerance, (population * tolerance - sum(seen)) / (population - len(seen)))
            capital *= 1 - bet * (loss - expected)
            most = max(most, capital)
            seen.append(loss)
            spread += (loss - (0.5 + sum(seen)) / (len(seen) + 1)) ** 2
        return 1 / most

    losses = (0.05, 0.3, 0.95)
    found = [
        betting_p_values(np.array([losses]), tolerance, level, seed=seed, population=population)[0]
        for seed in range(60)
    ]
    orders = {by_hand(order) for order in permutations(losses)}
    assert sorted(set(np.round(found, 12))) == pytest.approx(sorted(set(np.round(list(orders), 12))))


def test_the_certified_candidate_that_saves_the_most_is_the_best() -> None:
    assert Selection(3, ()).best([1.02, 1.06, 1.01, 1.5]) == 1, "the last is not certified"
    assert Selection(3, ()).best([1.02, 1.06, 1.06, 1.5]) == 1, "of equals the most careful"
    assert Selection(3, ()).best([0.9, 0.99, 1.0, 1.5]) is None, "nothing is saved"
    assert Selection(0, ()).best([1.2]) is None


def test_something_is_chosen_where_there_is_something_to_choose() -> None:
    curve = CURVES["monotone"]
    ltt = [learn_then_test(drawn(curve, 600, i, "uniform"), 0.1, 0.05, seed=i).certified for i in range(100)]
    assert np.mean([certified >= 3 for certified in ltt]) > 0.9
    crc = [conformal_risk_control(drawn(curve, 600, seed, "coins"), 0.1).certified for seed in range(100)]
    assert np.mean([certified >= 4 for certified in crc]) > 0.7


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("tolerance", [0.05, 0.3])
def test_p_values_are_valid_at_the_edge_of_the_hypothesis(bound: Any, tolerance: float) -> None:
    generator = np.random.default_rng(0)
    found = []
    for seed in range(DRAWS):
        losses = (generator.random((1, 80)) < tolerance).astype(np.float64)
        found.append(learn_then_test(losses, tolerance, 0.1, bound, seed=seed).scores[0])
    for level in (0.01, 0.05, 0.1, 0.3):
        assert np.mean(np.asarray(found) <= level) <= level + 3 * math.sqrt(level * (1 - level) / DRAWS)


def test_bentkus_by_hand() -> None:
    losses = np.zeros((1, 10))
    losses[0, 0] = 1.0
    at_most_one = 0.5**10 * (1 + 10)
    entropy = 0.1 * math.log(0.1 / 0.5) + 0.9 * math.log(0.9 / 0.5)
    p_value = min(math.exp(-10 * entropy), math.e * at_most_one)
    assert hoeffding_bentkus_p_values(losses, 0.5) == pytest.approx([p_value])


@pytest.mark.parametrize("population", [None, 50, 400])
def test_empirical_bernstein_by_hand(population: int | None) -> None:
    """At the probability that is returned the bound is the tolerance, in the papers' own terms."""
    losses = np.random.default_rng(5).random(40) * 0.1
    (found,) = empirical_bernstein_p_values(losses[None], 0.6, population=population)
    assert 0 < found < 1
    n, mean, variance = 40, losses.mean(), losses.var(ddof=1)
    x = math.log(2 / found)
    bounds = [mean + math.sqrt(2 * variance * x / n) + 7 * x / (3 * (n - 1))]
    if population is not None:
        rho = {50: (1 - 40 / 50) * (1 + 1 / 40), 400: 1 - 39 / 400}[population]
        x = math.log(5 / found)
        bounds.append(mean + math.sqrt(2 * rho * variance * x / n) + (7 / 3 + 3 / math.sqrt(2)) * x / n)
    assert max(bounds) == pytest.approx(0.6), "the weaker of both decides"


def test_empirical_bernstein_at_the_ends() -> None:
    assert empirical_bernstein_p_values(np.zeros((1, 1)), 0.5).tolist() == [1.0], "one document has no variance"
    assert empirical_bernstein_p_values(np.full((1, 50), 0.3), 0.3).tolist() == [1.0]
    assert empirical_bernstein_p_values(np.full((1, 50), 0.9), 0.3).tolist() == [1.0]
    with pytest.raises(ValueError, match="50 documents cannot be drawn from 49"):
        empirical_bernstein_p_values(np.zeros((1, 50)), 0.3, population=49)


def test_empirical_bernstein_is_the_stronger_one_where_losses_hardly_vary() -> None:
    """Many documents that each lose nearly the same, close to the tolerance."""
    losses = np.random.default_rng(0).normal(0.09, 0.005, (1, 2000)).clip(0, 1)
    assert empirical_bernstein_p_values(losses, 0.1)[0] < 0.001 < hoeffding_bentkus_p_values(losses, 0.1)[0]


def test_the_first_candidate_that_fails_is_never_certified() -> None:
    """Regression: the candidate before it is."""
    good, bad = np.zeros(200), np.ones(200)
    losses = np.stack([good, good, bad, good])
    for found in (learn_then_test(losses, 0.1, 0.05, seed=0), conformal_risk_control(losses, 0.1)):
        assert found.certified == 2, "what lies behind the first failure is not looked at"
        assert len(found.scores) == 3
    for found in (learn_then_test(losses[2:], 0.1, 0.05, seed=0), conformal_risk_control(losses[2:], 0.1)):
        assert found.certified == 0
    for found in (learn_then_test(losses[:2], 0.1, 0.05, seed=0), conformal_risk_control(losses[:2], 0.1)):
        assert found.certified == 2


def test_fewest_documents() -> None:
    for level in (0.05, None):
        n = fewest_documents(0.05, level)
        for count, passes in ((n, True), (n - 1, False)):
            nothing = np.zeros((1, count))
            found = (
                conformal_risk_control(nothing, 0.05)
                if level is None
                else learn_then_test(nothing, 0.05, level, seed=1, population=2 * count)
            )
            assert (found.certified > 0) == passes
    for bound in BOUNDS:
        n = fewest_documents(0.05, 0.05, bound)
        passes = [
            learn_then_test(np.zeros((1, m)), 0.05, 0.05, bound, seed=0, population=9 * m).certified for m in (n - 1, n)
        ]
        assert passes == [0, 1]
    assert fewest_documents(0.05, None) == 19, "(n 0 + 1) / (n + 1) <= 0.05"


def test_numbers_out_of_range() -> None:
    for tolerance in (0.0, 1.0, -0.1):
        with pytest.raises(UserError, match="tolerance"):
            learn_then_test(np.zeros((1, 5)), tolerance, 0.1, seed=0)
    with pytest.raises(UserError, match="level"):
        learn_then_test(np.zeros((1, 5)), 0.1, 0.0, seed=0)
    with pytest.raises(UserError, match="losses"):
        learn_then_test(np.full((1, 5), 1.5), 0.1, 0.1, seed=0)
    with pytest.raises(UserError, match="no documents"):
        conformal_risk_control(np.zeros((1, 0)), 0.1)


def test_equal_documents_stay_together() -> None:
    hashes = [str(i % 7) for i in range(20)]
    split = split_documents(hashes, 0.5, seed=1)
    assert sorted(split.calibration + split.test) == list(range(20))
    assert not {hashes[i] for i in split.calibration} & {hashes[i] for i in split.test}
    assert split == split_documents(hashes, 0.5, seed=1)
    assert any(split != split_documents(hashes, 0.5, seed=seed) for seed in range(2, 6))
    assert [hashes[split.calibration[i]] for i in split.first] == list(
        dict.fromkeys(hashes[i] for i in split.calibration)
    )
    assert split.population == 7
    with pytest.raises(UserError, match="none"):
        split_documents(["a", "a"], 0.5, 0)


def test_documents_that_exits_were_trained_on_are_not_drawn() -> None:
    documents = [str(i) for i in range(20)]
    without = {"3", "4", "19"}
    split = split_documents(documents, 0.5, 0, without=without)
    drawn = {documents[i] for i in split.calibration + split.test}
    assert drawn == set(documents) - without
    assert split.population == 17


def test_a_limit_draws_from_the_whole_task() -> None:
    """Regression: it took the first documents, which in a sorted task are of one kind."""
    documents = [str(i) for i in range(1000)]
    split = split_documents(documents, 0.5, 0, limit=100)
    assert len(split.calibration) == len(split.test) == 50 and split.population == 1000
    for part in (split.calibration, split.test):
        assert min(np.histogram(part, bins=4, range=(0, 1000))[0]) >= 5, "of all quarters"
