"""Estimates by hand, and against enumeration of all subsets."""

import itertools
import math

import pytest

from stateset_lightning.evaluation.estimators import half_width, majority, pass_at_k, pass_hat_k, wilson_interval


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_and_pass_hat_k_are_shares_of_all_subsets(n: int) -> None:
    for c in range(n + 1):
        right = [i < c for i in range(n)]
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(right, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(any(subset) for subset in subsets) / len(subsets), abs=1e-15)
            assert pass_hat_k(n, c, k) == pytest.approx(
                sum(all(subset) for subset in subsets) / len(subsets), abs=1e-15
            )


def test_by_hand() -> None:
    assert pass_at_k(8, 2, 4) == pytest.approx(1 - 15 / 70)  # C(6, 4) of C(8, 4) hold no right one
    assert pass_hat_k(8, 6, 4) == pytest.approx(15 / 70)
    assert pass_at_k(3000, 1, 1500) == pytest.approx(0.5)  # the binomial coefficients are beyond any float


def test_too_few_samples_say_nothing() -> None:
    assert math.isnan(pass_at_k(3, 3, 4))
    assert math.isnan(pass_hat_k(3, 0, 4))


def test_the_majority_is_that_of_random_tie_breaking() -> None:
    answers, solved = ["a", "b", "b", "a", "c", None], [True, False, False, True, True, True]
    assert majority(answers, solved) == 0.5  # a (right) and b (wrong) tie
    assert majority([*answers, "a"], [*solved, True]) == 1.0
    assert majority([*answers, "b"], [*solved, False]) == 0.0
    # one answer, scored by its format
    assert majority(["x", "x", "x", "y"], [True, False, False, True]) == pytest.approx(1 / 3)
    assert majority([None, None], [True, True]) == 0.0
    for order in itertools.permutations(range(6)):
        assert majority([answers[i] for i in order], [solved[i] for i in order]) == 0.5


def test_intervals_by_hand() -> None:
    assert wilson_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert half_width([0.0, 1.0, 1.0, 0.0]) == pytest.approx(1.959964 * math.sqrt(1 / 3 / 4))
    assert half_width([0.5, 0.5]) == 0.0
    assert math.isnan(half_width([0.5]))
