"""Advantages of the best of k against an enumeration of all subsets, and against the paper's closed forms."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stateset_lightning.algorithm import PassK
from stateset_lightning.algorithm.advantages import pass_at_k_advantages
from stateset_lightning.errors import ConfigError


def by_enumeration(rewards: list[float], k: int) -> list[float]:
    """Mean over the subsets that hold a completion of (largest reward - mean over all subsets) / standard deviation
    over all.
    """
    subsets = list(combinations(range(len(rewards)), k))
    best = {subset: max(rewards[i] for i in subset) for subset in subsets}
    mean = math.fsum(best.values()) / len(subsets)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in best.values()) / len(subsets))
    if max(best.values()) == min(best.values()):
        return [0.0] * len(rewards)
    own = [[value for subset, value in best.items() if i in subset] for i in range(len(rewards))]
    return [(math.fsum(values) / len(values) - mean) / std for values in own]


def advantages(rewards: list[float], k: int) -> list[float]:
    return pass_at_k_advantages(torch.tensor([rewards], dtype=torch.float64), k)[0].tolist()


def test_one_right_of_three_and_pairs() -> None:
    # Subsets of two: {right, a}, {right, b} have 1, {a, b} has 0: mean 2/3, standard deviation sqrt(2/9).
    # The right one is in the first two: (1 - 2/3) / std. A wrong one is in one of each: (1/2 - 2/3) / std.
    std = math.sqrt(2 / 9)
    assert advantages([1, 0, 0], 2) == pytest.approx([(1 / 3) / std, (-1 / 6) / std, (-1 / 6) / std])


@pytest.mark.parametrize("size", range(2, 9))
def test_every_binary_group_agrees_with_the_enumeration_and_the_papers_closed_forms(size: int) -> None:
    for right in range(size + 1):
        for k in range(1, size + 1):
            rewards = [1.0] * right + [0.0] * (size - right)
            got = advantages(rewards, k)
            assert got == pytest.approx(by_enumeration(rewards, k), abs=1e-9)
            wrong = size - right
            mean = 1 - math.comb(wrong, k) / math.comb(size, k)
            if 0 < mean < 1:
                std = math.sqrt(mean * (1 - mean))
                assert got[:right] == pytest.approx([(1 - mean) / std] * right)
                alone = math.comb(wrong - 1, k - 1) / math.comb(size - 1, k - 1)
                assert got[right:] == pytest.approx([(1 - mean - alone) / std] * wrong)
            else:
                assert got == [0.0] * size


@given(rewards=st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.1, 0.3, 1.0, 7.0]), min_size=2, max_size=8), data=st.data())
def test_any_rewards_agree_with_the_enumeration(rewards: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(rewards)))
    assert advantages(rewards, k) == pytest.approx(by_enumeration(rewards, k), abs=1e-9)


def test_failures_leave_their_group() -> None:
    got = advantages([math.nan, 1.0, 0.0, math.nan, 0.0], 2)
    assert [value for value in got if not math.isnan(value)] == pytest.approx(advantages([1.0, 0.0, 0.0], 2))
    assert math.isnan(got[0])
    assert math.isnan(got[3])


def test_a_group_with_fewer_than_k_survivors_is_dropped() -> None:
    assert all(map(math.isnan, advantages([1.0, 0.0, math.nan], 3)))
    assert all(map(math.isnan, advantages([1.0, math.nan, math.nan], 1)))


@pytest.mark.parametrize("rewards", [[0.1 + 0.2] * 6, [1 / 3] * 5, [1e30] * 4, [-7.3] * 7])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_constant_group_is_exactly_zero(rewards: list[float], k: int) -> None:
    assert advantages(rewards, k) == [0.0] * len(rewards)


def test_where_every_subset_holds_a_right_one_nothing_is_left_to_gain() -> None:
    assert advantages([1.0, 1.0, 1.0, 0.0], 2) == [0.0] * 4


def test_huge_rewards_and_large_groups_stay_finite() -> None:
    assert advantages([1e30, 0.0, 0.0], 2) == pytest.approx(advantages([1.0, 0.0, 0.0], 2))
    large = torch.arange(512, dtype=torch.float64)[None]
    got = pass_at_k_advantages(large, 200)
    assert got.isfinite().all()
    assert got.mean().item() == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("k", [3, 4])
def test_k_without_several_subsets_is_refused(k: int) -> None:
    with pytest.raises(ConfigError, match=rf"algorithm\.k={k} must be below model\.rollout\.num_generations=3"):
        PassK(k=k).advantages(torch.zeros(1, 3, 1), torch.ones(1))
    with pytest.raises(ConfigError, match=r"algorithm\.k=0 must be at least 1"):
        PassK(k=0)
