"""Advantages by hand: a group's mean, its deviations, and what failed or constant groups do."""

import math
from itertools import combinations
from statistics import mean, stdev

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from stateset_lightning.algorithm import GRPO, RLOO, PassK
from stateset_lightning.algorithm.advantages import (
    batch_advantages,
    beta_normalised_advantages,
    decoupled_advantages,
    greedy_advantages,
    group_advantages,
    leave_one_out_advantages,
    length_weighted_advantages,
    mean_normalised_advantages,
    pass_at_k_advantages,
    total_scores,
    whitened_advantages,
)
from stateset_lightning.errors import ConfigError
from stateset_lightning.types import NOT_APPLICABLE

NAN = math.nan


def rows(*groups: tuple[float, ...]) -> Tensor:
    return torch.tensor(groups, dtype=torch.float64)


def assert_rows(got: Tensor, *expected: tuple[float, ...], tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, rows(*expected), atol=tolerance, rtol=tolerance, equal_nan=True)


# Totals ---------------------------------------------------------------------------------------------------------------


def test_totals_are_weighted_sums() -> None:
    scores = torch.tensor([[[1.0, 2.0], [0.5, -1.0]]])
    assert_rows(total_scores(scores, torch.tensor([1.0, 0.25])), (1.5, 0.25))


def test_a_failed_reward_fails_the_completion_and_one_that_does_not_apply_is_left_out() -> None:
    scores = torch.tensor(
        [
            [
                [1.0, NAN],
                [1.0, NOT_APPLICABLE],
                [NOT_APPLICABLE, 3.0],
                [NOT_APPLICABLE, NOT_APPLICABLE],
                [NAN, NOT_APPLICABLE],
            ]
        ]
    )
    assert_rows(total_scores(scores, torch.tensor([2.0, 1.0])), (NAN, 2.0, 3.0, NAN, NAN))


def test_a_weight_of_zero_neither_hides_a_failure_nor_trips_over_what_does_not_apply() -> None:
    scores = torch.tensor([[[1.0, NAN], [1.0, NOT_APPLICABLE], [1.0, 7.0]]])
    assert_rows(total_scores(scores, torch.tensor([1.0, 0.0])), (NAN, 1.0, 1.0))


# Group-relative -------------------------------------------------------------------------------------------------------


def test_one_right_of_four() -> None:
    # Mean 1/4; squared deviations 9/16 + 3/16 = 3/4, over 3 is 1/4: standard deviation 1/2, plus 1e-4.
    right, wrong = 0.75 / 0.5001, -0.25 / 0.5001
    assert right == pytest.approx(1.4997, abs=1e-4)
    assert wrong == pytest.approx(-0.4999, abs=1e-4)
    assert_rows(group_advantages(rows((1, 0, 0, 0))), (right, wrong, wrong, wrong))


def test_a_group_of_two_is_plus_and_minus_half_a_root() -> None:
    # Deviations +-d/2, standard deviation d / sqrt(2).
    assert_rows(group_advantages(rows((3, 1))), (1 / (math.sqrt(2) + 1e-4), -1 / (math.sqrt(2) + 1e-4)))


def test_without_scaling_the_mean_alone_is_taken_off() -> None:
    assert_rows(group_advantages(rows((1, 0, 0, 0), (4, 2, 0, 2)), "none"), (0.75, -0.25, -0.25, -0.25), (2, 0, -2, 0))


def test_batch_scaling_divides_by_the_deviation_of_all_rewards() -> None:
    # Rewards 1, 0, 3, 0: mean 1, squared deviations 0 + 1 + 4 + 1 = 6, over 3 is 2.
    std = math.sqrt(2) + 1e-4
    assert_rows(group_advantages(rows((1, 0), (3, 0)), "batch"), (0.5 / std, -0.5 / std), (1.5 / std, -1.5 / std))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.1 + 0.2, 1 / 3, -1e-17, 1e17 / 3, 0.0, float(torch.tensor(0.1)), -7.3])
def test_a_constant_group_is_exactly_zero(scale: str, value: float) -> None:
    for size in (2, 3, 5, 6, 7, 16):
        constant = torch.full((1, size), value, dtype=torch.float64)
        assert (group_advantages(constant, scale) == 0).all()  # type: ignore[arg-type]
        assert (group_advantages(constant.float(), scale) == 0).all()  # type: ignore[arg-type]
        beside_others = torch.cat([constant, torch.arange(size)[None].double()])
        assert (group_advantages(beside_others, scale)[0] == 0).all()  # type: ignore[arg-type]


def test_a_constant_group_of_weighted_float32_scores_is_exactly_zero() -> None:
    scores = torch.tensor([0.1, 0.7, 0.3]).expand(1, 6, 3)
    weights = torch.tensor([0.3, 1.1, 1 / 3], dtype=torch.float64)
    assert (group_advantages(total_scores(scores, weights)) == 0).all()


def test_float_noise_within_a_group_is_not_blown_up() -> None:
    assert group_advantages(rows((0.1 + 0.2, 0.3, 0.3, 0.3))).abs().max() < 1e-11


def test_a_constant_group_with_a_failure_is_zero_beside_nan() -> None:
    assert_rows(group_advantages(rows((0.3, NAN, 0.3, 0.3))), (0.0, NAN, 0.0, 0.0), tolerance=0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_failed_completions_leave_the_baseline(scale: str) -> None:
    with_failures = group_advantages(rows((1, NAN, 0, 0, NAN, 0)), scale)  # type: ignore[arg-type]
    without = group_advantages(rows((1, 0, 0, 0)), scale)  # type: ignore[arg-type]
    assert with_failures[0].isnan().tolist() == [False, True, False, False, True, False]
    torch.testing.assert_close(with_failures[0, [0, 2, 3, 5]], without[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_with_fewer_than_two_survivors_is_dropped(scale: str) -> None:
    advantages = group_advantages(rows((1, NAN, NAN), (NAN, NAN, NAN), (NAN, 5, 3)), scale)  # type: ignore[arg-type]
    assert advantages.isnan().tolist() == [[True] * 3, [True] * 3, [True, False, False]]
    alone = group_advantages(rows((5, 3)), scale)  # type: ignore[arg-type]
    torch.testing.assert_close(advantages[2, 1:], alone[0], atol=1e-12, rtol=0)


def test_infinite_rewards_count_as_failed() -> None:
    advantages = group_advantages(rows((math.inf, 1, 0), (-math.inf, 1, 0)), "none")
    assert_rows(advantages, (NAN, 0.5, -0.5), (NAN, 0.5, -0.5))


@pytest.mark.parametrize("factor", [1e-3, 1e3, 1e30, -1e30])
def test_large_and_negative_rewards_scale_away(factor: float) -> None:
    # Deviations are 3/4 and -1/4 of the factor, the standard deviation half of its size.
    std = 0.5 * abs(factor) + 1e-4
    assert_rows(group_advantages(rows((factor, 0, 0, 0))), (0.75 * factor / std, *[-0.25 * factor / std] * 3))


def test_a_common_offset_changes_nothing() -> None:
    assert_rows(
        group_advantages(rows((1e6 + 1, 1e6, 1e6, 1e6))), *group_advantages(rows((1, 0, 0, 0))).tolist(), tolerance=1e-8
    )


def test_groups_are_independent_unless_the_batch_scales() -> None:
    groups = rows((1, 0, 2), (5, 5, 9), (-1, 0, 0))
    for scale in ("group", "none"):
        together = group_advantages(groups, scale)  # type: ignore[arg-type]
        for i in range(3):
            assert torch.equal(together[i], group_advantages(groups[i : i + 1], scale)[0])  # type: ignore[arg-type]


@given(st.lists(st.one_of(st.floats(-100, 100, width=32), st.just(NAN)), min_size=2, max_size=9))
def test_survivors_advantages_sum_to_zero_and_keep_the_order_of_rewards(rewards: list[float]) -> None:
    advantages = group_advantages(rows(tuple(rewards)))[0].tolist()
    survivors = [(r, a) for r, a in zip(rewards, advantages, strict=True) if not math.isnan(r)]
    if len(survivors) < 2:
        assert all(map(math.isnan, advantages))
        return
    assert sum(a for _, a in survivors) == pytest.approx(0, abs=1e-6)
    for r1, a1 in survivors:
        for r2, a2 in survivors:
            assert r1 <= r2 or a1 >= a2


# REINFORCE++, and scale "leave_one_out" -------------------------------------------------------------------------------


def test_the_batch_as_a_group() -> None:
    # Of (1, 0, 1, 0) the mean is 1/2 and the variance 4 x 1/4 / 3.
    std = math.sqrt(1 / 3) + 1e-4
    assert_rows(
        batch_advantages(rows((1, 0, NAN), (1, 0, NAN), (1, NAN, NAN))),
        (0.5 / std, -0.5 / std, NAN),
        (0.5 / std, -0.5 / std, NAN),
        (NAN, NAN, NAN),
    )
    assert_rows(batch_advantages(rows((1, 1), (0, 0))), (0.5 / std, 0.5 / std), (-0.5 / std, -0.5 / std))
    assert (batch_advantages(rows((0.3, 0.3), (0.3, 0.3))) == 0).all()


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, 0.3]), min_size=4, max_size=4), min_size=1, max_size=5))
def test_leave_one_out_takes_mean_and_deviation_of_the_others(groups: list[list[float]]) -> None:
    expected = []
    for group in groups:
        others = [group[:i] + group[i + 1 :] for i in range(len(group))]
        spread = [stdev(other) + 1e-4 if len({*other}) > 1 else 1.0 for other in others]
        expected.append(tuple((r - mean(o)) / s for r, o, s in zip(group, others, spread, strict=True)))
    assert_rows(group_advantages(rows(*map(tuple, groups)), "leave_one_out"), *expected, tolerance=1e-9)


def test_leave_one_out_leaves_failures_out() -> None:
    full = group_advantages(rows((1, 0, 0.5, 0)), "leave_one_out")
    holes = group_advantages(rows((1, NAN, 0, 0.5, 0), (NAN, 1, 0, NAN, NAN), (1, NAN, NAN, NAN, NAN)), "leave_one_out")
    torch.testing.assert_close(holes[0, [0, 2, 3, 4]], full[0])
    assert_rows(holes[1:], (NAN, 1.0, -1.0, NAN, NAN), (NAN,) * 5)  # nothing to divide by


# BNPO -----------------------------------------------------------------------------------------------------------------


def beta_density(x: float, alpha: float, beta: float) -> float:
    return math.gamma(alpha + beta) / (math.gamma(alpha) * math.gamma(beta)) * x ** (alpha - 1) * (1 - x) ** (beta - 1)


def test_bnpo_divides_by_the_density_of_the_fitted_beta() -> None:
    # Mean rewards p: 1/4, 1/2, 3/4. Their mean is 1/2, their variance (1/16 + 0 + 1/16) / 2 = 1/16.
    # Method of moments: a + b = (1/4) / (1/16) - 1 = 3, so a = b = 3/2; alpha = beta = 1 + 1/2 = 3/2.
    groups = rows((1, 0, 0, 0), (1, 1, 0, 0), (1, 1, 1, 0))
    f = [beta_density(p, 3 / 2, 3 / 2) for p in (0.25, 0.5, 0.75)]
    assert f[0] == pytest.approx(f[2])
    assert_rows(
        beta_normalised_advantages(groups),
        (0.75 / f[0], *[-0.25 / f[0]] * 3),
        (0.5 / f[1], 0.5 / f[1], -0.5 / f[1], -0.5 / f[1]),
        (0.25 / f[2], 0.25 / f[2], 0.25 / f[2], -0.75 / f[2]),
        tolerance=1e-9,
    )


def test_bnpo_with_an_uneven_batch() -> None:
    # p: 0.2 and 0.4. Mean 0.3, variance 0.02: a + b = 0.21 / 0.02 - 1 = 9.5, a = 2.85, b = 6.65.
    groups = rows((1, 0, 0, 0, 0), (1, 1, 0, 0, 0))
    low, high = (beta_density(p, 1 + 2.85 / 3, 1 + 6.65 / 3) for p in (0.2, 0.4))
    assert_rows(
        beta_normalised_advantages(groups),
        (0.8 / low, *[-0.2 / low] * 4),
        (0.6 / high, 0.6 / high, *[-0.4 / high] * 3),
        tolerance=1e-9,
    )


@pytest.mark.parametrize(
    "groups",
    [
        ((1.0, 0.0, 0.0, 0.0),),  # one group
        ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0)),  # no variance among the groups
        ((1.0, 1.0, 1.0, 1.0), (0.0, 0.0, 0.0, 0.0)),  # as much variance as a Bernoulli
    ],
)
def test_bnpo_is_the_difference_alone_where_no_beta_fits(groups: tuple[tuple[float, ...], ...]) -> None:
    assert_rows(
        beta_normalised_advantages(rows(*groups)), *group_advantages(rows(*groups), "none").tolist(), tolerance=1e-9
    )


def test_bnpo_gives_constant_groups_exactly_zero_and_stays_finite_beside_them() -> None:
    advantages = beta_normalised_advantages(rows((0, 0, 0), (1, 1, 1), (0.3, 0.3, 0.3), (1, 0, 0)))
    assert (advantages[:3] == 0).all()
    assert advantages[3].isfinite().all()
    assert advantages[3, 0] > 0 > advantages[3, 1]


def test_bnpo_leaves_failures_out_of_mean_and_fit() -> None:
    full = beta_normalised_advantages(rows((1, 0, 0, 0), (1, 1, 1, 0)))
    holes = beta_normalised_advantages(rows((1, NAN, 0, 0, 0), (1, 1, NAN, 1, 0), (NAN, NAN, NAN, NAN, 1)))
    assert holes.isnan().tolist() == [
        [False, True, False, False, False],
        [False, False, True, False, False],
        [True] * 5,
    ]
    torch.testing.assert_close(holes[0, [0, 2, 3, 4]], full[0], atol=1e-9, rtol=0)
    torch.testing.assert_close(holes[1, [0, 1, 3, 4]], full[1], atol=1e-9, rtol=0)


@pytest.mark.parametrize(("groups", "size"), [(64, 16), (256, 64)])
def test_bnpo_is_finite_beside_an_outlier_as_the_authors_code_is(groups: int, size: int) -> None:
    # All but one group are right half of the time, the last once: far out in the tail of the fitted density.
    rewards = torch.zeros(groups, size, dtype=torch.float64)
    rewards[:-1, : size // 2] = 1
    rewards[-1, 0] = 1
    advantages = beta_normalised_advantages(rewards)
    p = 1 / size
    assert advantages[-1, 0].item() == pytest.approx((1 - p) * 1e6)
    assert advantages[-1, 1].item() == pytest.approx(-p * 1e6)
    assert advantages.float().isfinite().all()


@pytest.mark.parametrize("outside", [-0.1, 1.5])
def test_bnpo_refuses_rewards_outside_zero_and_one(outside: float) -> None:
    with pytest.raises(
        ValueError, match=r"BNPO needs total rewards in \[0, 1\], got .*: rescale the rewards or their weights"
    ):
        beta_normalised_advantages(rows((outside, 0.5, 0.5)))


# Other baselines ------------------------------------------------------------------------------------------------------


def test_leave_one_out_by_hand() -> None:
    # The others of 6 average (3 + 0) / 2; of 3, 6 / 2; of 0, 9 / 2. A failed completion is no other.
    expected = (6 - 1.5, 3 - 3.0, 0 - 4.5)
    assert_rows(leave_one_out_advantages(rows((6, 3, 0))), expected)
    assert_rows(leave_one_out_advantages(rows((6, NAN, 3, 0))), (expected[0], NAN, *expected[1:]))


def test_the_length_weighted_baseline_by_hand() -> None:
    # (1 x 1 + 0 x 3) / 4 = 1/4; the failed completion's length does not count.
    assert_rows(length_weighted_advantages(rows((1, 0)), torch.tensor([[1, 3]])), (0.75, -0.25))
    assert_rows(length_weighted_advantages(rows((1, NAN, 0)), torch.tensor([[1, 50, 3]])), (0.75, NAN, -0.25))


def test_the_greedy_baseline_by_hand() -> None:
    got = greedy_advantages(rows((1, 0, 1), (0, 0, 0), (1, 0, 1), (1, NAN, NAN)), torch.tensor([0.0, 1.0, NAN, 0.0]))
    assert_rows(got, (1, 0, 1), (-1, -1, -1), (NAN, NAN, NAN), (NAN, NAN, NAN))


def test_the_mean_normalised_by_hand() -> None:
    # Mean 1/4: (1 - 1/4) / (1/4) = 3, (0 - 1/4) / (1/4) = -1. Nothing solved, or all: 0.
    got = mean_normalised_advantages(rows((1, 0, 0, 0), (0, 0, 0, 0), (1, 1, 1, 1), (1, NAN, 0, NAN)))
    assert_rows(got, (3, -1, -1, -1), (0, 0, 0, 0), (0, 0, 0, 0), (1, NAN, -1, NAN))
    with pytest.raises(ConfigError, match="total rewards of at least 0, got -1"):
        mean_normalised_advantages(rows((1, -1)))


def test_whitening_by_hand() -> None:
    # Differences 1, -1 and 3, -3: mean 0, squares 2 + 18 = 20 over 3. Means that differ between groups do not count.
    std = math.sqrt(20 / 3) + 1e-4
    assert_rows(whitened_advantages(rows((2, 0), (103, 97))), (1 / std, -1 / std), (3 / std, -3 / std))


def test_decoupled_advantages_by_hand() -> None:
    # Rewards of (1, 0) and (0, 10), weights 1 and 2: standardised to +-a in each group of two, whatever their spread.
    a, b = 0.5 / (math.sqrt(0.5) + 1e-4), 5 / (math.sqrt(50) + 1e-4)
    combined = (a - 2 * b, -a + 2 * b)
    std = math.sqrt(2 * combined[0] ** 2) + 1e-4  # both deviations squared, over 2 - 1
    scores = torch.tensor([[[1.0, 0.0], [0.0, 10.0]]])
    assert_rows(decoupled_advantages(scores, torch.tensor([1.0, 2.0])), (combined[0] / std, combined[1] / std))


def test_decoupled_advantages_leave_out_failures_and_what_does_not_apply() -> None:
    weights = torch.tensor([1.0, 1.0])
    # The failed completion leaves the baseline of the reward that did not fail, too.
    failed = torch.tensor([[[1.0, 0.0], [100.0, NAN], [0.0, 0.0]]])
    without = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    got = decoupled_advantages(failed, weights)
    assert got[0, 1].isnan()
    torch.testing.assert_close(got[0, [0, 2]], decoupled_advantages(without, weights)[0])
    # The second reward applies to one completion alone: nothing to compare with, so it adds nothing.
    alone = torch.tensor([[[1.0, NOT_APPLICABLE], [0.0, 5.0]]])
    torch.testing.assert_close(decoupled_advantages(alone, weights), decoupled_advantages(without, weights))
    # It applies to two of three: standardised over those two, nothing for the third.
    some = torch.tensor([[[0.0, NOT_APPLICABLE], [0.0, 3.0], [0.0, 1.0]]])
    assert decoupled_advantages(some, weights)[0].tolist() == pytest.approx([0.0, 1.0, -1.0], abs=1e-3)
    # A completion to which nothing applies has failed; a group with fewer than two left is dropped.
    none = torch.tensor([[[NOT_APPLICABLE, NOT_APPLICABLE], [1.0, 1.0]]])
    assert decoupled_advantages(none, weights).isnan().all()


def test_decoupled_advantages_have_mean_zero_and_a_spread_of_one() -> None:
    scores = torch.rand(6, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = decoupled_advantages(scores, torch.tensor([1.0, 0.2, 3.0]))
    assert got.mean().item() == pytest.approx(0.0, abs=1e-12)
    assert got.std().item() == pytest.approx(1.0, abs=1e-3)


def one_reward(function: str, rewards_PG: Tensor) -> Tensor:
    """Any of the advantages, from one reward."""
    return {
        "leave one out": lambda r: leave_one_out_advantages(r),
        "length weighted": lambda r: length_weighted_advantages(r, torch.arange(1, r.numel() + 1).reshape(r.shape)),
        "mean normalised": lambda r: mean_normalised_advantages(r),
        "whitened": lambda r: whitened_advantages(r),
        "decoupled": lambda r: decoupled_advantages(r[..., None], torch.ones(1)),
    }[function](rewards_PG)


FUNCTIONS = ["leave one out", "length weighted", "mean normalised", "whitened", "decoupled"]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("value", [0.1 + 0.2, 1 / 3, 1e30, 1e17 / 3, 0.0])
def test_constant_groups_are_exactly_zero_for_every_baseline(function: str, value: float) -> None:
    for size in (2, 3, 6, 7):
        beside = torch.stack([torch.full((size,), value, dtype=torch.float64), torch.arange(size).double()])
        got = one_reward(function, beside)
        assert (got[0] == 0).all()
        assert got.dtype == torch.float64


@pytest.mark.parametrize("function", FUNCTIONS)
def test_small_groups_are_dropped_and_failures_stay_apart_for_every_baseline(function: str) -> None:
    got = one_reward(function, rows((1, NAN, NAN), (NAN, NAN, NAN), (NAN, 5, 3)))
    assert got.isnan().tolist() == [[True] * 3, [True] * 3, [True, False, False]]
    assert got[2, 1] > 0 > got[2, 2]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_huge_rewards_stay_finite_for_every_baseline(function: str) -> None:
    assert one_reward(function, rows((1e30, 0, 0), (1, 0, 1))).isfinite().all()


@pytest.mark.parametrize("function", [name for name in FUNCTIONS if name != "mean normalised"])
def test_negative_rewards_count_like_any_other_for_every_baseline(function: str) -> None:
    torch.testing.assert_close(
        one_reward(function, rows((-4, -5, -6))), one_reward(function, rows((6, 5, 4))), atol=1e-9, rtol=0
    )


# Pass@k, against an enumeration of all subsets and the paper's closed forms ------------------------------------------


def by_enumeration(rewards: list[float], k: int) -> list[float]:
    """For each completion the mean over its subsets of (largest reward - mean) / standard deviation over all."""
    subsets = list(combinations(range(len(rewards)), k))
    best = {subset: max(rewards[i] for i in subset) for subset in subsets}
    mean = math.fsum(best.values()) / len(subsets)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in best.values()) / len(subsets))
    if max(best.values()) == min(best.values()):
        return [0.0] * len(rewards)
    own = [[value for subset, value in best.items() if i in subset] for i in range(len(rewards))]
    return [(math.fsum(values) / len(values) - mean) / std for values in own]


def best_of(rewards: list[float], k: int) -> list[float]:
    """Advantages of a group that has one more completion, which failed, so that k may be the number of survivors."""
    return pass_at_k_advantages(torch.tensor([[*rewards, NAN]], dtype=torch.float64), k)[0, :-1].tolist()


def test_the_best_of_two_by_hand() -> None:
    # Subsets of two: {right, a}, {right, b} have 1, {a, b} has 0: mean 2/3, standard deviation sqrt(2/9).
    # The right one is in the first two: (1 - 2/3) / std. A wrong one is in one of each: (1/2 - 2/3) / std.
    std = math.sqrt(2 / 9)
    assert best_of([1, 0, 0], 2) == pytest.approx([(1 / 3) / std, (-1 / 6) / std, (-1 / 6) / std])


@pytest.mark.parametrize("size", range(2, 9))
def test_every_binary_group_agrees_with_the_enumeration_and_the_papers_closed_forms(size: int) -> None:
    for right in range(size + 1):
        for k in range(1, size + 1):
            rewards = [1.0] * right + [0.0] * (size - right)
            got = best_of(rewards, k)
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
def test_the_best_of_k_of_any_rewards_agrees_with_the_enumeration(rewards: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(rewards)))
    assert best_of(rewards, k) == pytest.approx(by_enumeration(rewards, k), abs=1e-9)


def test_failures_leave_their_group_before_the_best_of_k_is_taken() -> None:
    got = best_of([math.nan, 1.0, 0.0, math.nan, 0.0], 2)
    assert [value for value in got if not math.isnan(value)] == pytest.approx(best_of([1.0, 0.0, 0.0], 2))
    assert math.isnan(got[0])
    assert math.isnan(got[3])


def test_a_group_with_fewer_than_k_survivors_is_dropped() -> None:
    assert all(map(math.isnan, best_of([1.0, 0.0, math.nan], 3)))
    assert all(map(math.isnan, best_of([1.0, math.nan, math.nan], 1)))


@pytest.mark.parametrize("rewards", [[0.1 + 0.2] * 6, [1 / 3] * 5, [1e30] * 4, [-7.3] * 7])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_constant_group_is_exactly_zero_for_the_best_of_k(rewards: list[float], k: int) -> None:
    assert best_of(rewards, k) == [0.0] * len(rewards)


def test_where_every_subset_holds_a_right_one_nothing_is_left_to_gain() -> None:
    assert best_of([1.0, 1.0, 1.0, 0.0], 2) == [0.0] * 4


def test_the_best_of_k_of_huge_rewards_and_large_groups_stays_finite() -> None:
    assert best_of([1e30, 0.0, 0.0], 2) == pytest.approx(best_of([1.0, 0.0, 0.0], 2))
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


def test_equal_sums_of_other_parts_are_equal():
    """0.1 + 0.2 is not 0.3 in binary; a standard deviation of such a group would make advantages of the rounding."""
    scores_PGF = torch.tensor([[[1.0, 1, 0], [0, 0, 1], [0, 0, 1], [0, 0, 1]]], dtype=torch.float64)
    weights_F = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    for algorithm in (PassK(), GRPO(), RLOO()):
        assert not algorithm.advantages(scores_PGF, weights_F).any()
