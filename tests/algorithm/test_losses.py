"""Values and gradients of per-token losses by hand and by finite differences."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stateset_lightning.algorithm.losses import clipped_loss, covariance_penalised_loss, importance_loss, sapo_loss

OLD = torch.full((6,), -1.0, dtype=torch.float64)
ADVANTAGES = torch.tensor([1.0, 1, 1, -1, -1, -1], dtype=torch.float64)


def clipped(
    ratio: float, advantage: float, low: float = 0.2, high: float = 0.2, delta: float | None = None
) -> tuple[float, float, dict[str, float]]:
    """Value, gradient with respect to the log-prob, and metrics of one token."""
    logprob = torch.tensor([math.log(ratio) - 1.5], dtype=torch.float64, requires_grad=True)
    old, advantages = torch.tensor([-1.5], dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    loss, metrics = clipped_loss(logprob, old, advantages, epsilon_low=low, epsilon_high=high, delta=delta)
    loss.sum().backward()
    assert logprob.grad is not None
    return (
        loss.item(),
        logprob.grad.item(),
        {name: float(total) / float(count) for name, (total, count) in metrics.items()},
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "gradient", "clip_low", "clip_high"),
    [
        # Inside the bounds: -ratio A, gradient -ratio A.
        (1.0, 2.0, -2.0, -2.0, 0, 0),
        (1.1, 2.0, -2.2, -2.2, 0, 0),
        (0.9, -2.0, 1.8, 1.8, 0, 0),
        # Above, advantage positive: bounded at 1.2 and no gradient.
        (1.5, 2.0, -2.4, 0.0, 0, 1),
        # Above, advantage negative: the ratio is on the wrong side, and is pulled back.
        (1.5, -2.0, 3.0, 3.0, 0, 0),
        # Below, advantage negative: bounded at 0.8 and no gradient.
        (0.5, -2.0, 1.6, 0.0, 1, 0),
        # Below, advantage positive: pulled up.
        (0.5, 2.0, -1.0, -1.0, 0, 0),
    ],
)
def test_the_clipped_loss_by_hand(
    ratio: float, advantage: float, value: float, gradient: float, clip_low: int, clip_high: int
) -> None:
    loss, slope, metrics = clipped(ratio, advantage)
    assert loss == pytest.approx(value)
    assert slope == pytest.approx(gradient)
    assert metrics == pytest.approx(
        {"policy/ratio_mean": ratio, "policy/clip_low": clip_low, "policy/clip_high": clip_high}
    )


def test_the_bounds_are_separate() -> None:
    assert clipped(1.25, 1.0, low=0.2, high=0.28)[:2] == pytest.approx((-1.25, -1.25))
    assert clipped(1.3, 1.0, low=0.2, high=0.28)[:2] == pytest.approx((-1.28, 0.0))
    assert clipped(0.75, -1.0, low=0.3, high=0.28)[:2] == pytest.approx((0.75, 0.75))
    assert clipped(0.65, -1.0, low=0.3, high=0.28)[:2] == pytest.approx((0.7, 0.0))


def test_a_zero_advantage_gives_zero_loss_and_is_never_counted_as_clipped() -> None:
    loss, slope, metrics = clipped(3.0, 0.0)
    assert (loss, slope) == (0.0, 0.0)
    assert metrics["policy/clip_high"] == metrics["policy/clip_low"] == 0


def test_metrics_are_sums_and_counts_over_tokens() -> None:
    ratios = torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5])
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0])
    _, metrics = clipped_loss(ratios.log(), torch.zeros(5), advantages, epsilon_low=0.2, epsilon_high=0.2)
    assert {name: (float(total), float(count)) for name, (total, count) in metrics.items()} == {
        "policy/ratio_mean": (5.0, 5.0),
        "policy/clip_low": (2.0, 5.0),
        "policy/clip_high": (1.0, 5.0),
    }
    assert not any(isinstance(total, Tensor) and total.requires_grad for total, _ in metrics.values())


def test_on_policy_the_gradient_is_minus_the_advantage() -> None:
    logprobs = torch.tensor([-0.3, -2.0, -5.0], requires_grad=True)
    advantages = torch.tensor([1.5, -0.5, 0.0])
    loss, _ = clipped_loss(logprobs, logprobs.detach(), advantages, epsilon_low=0.2, epsilon_high=0.2)
    loss.sum().backward()
    assert torch.equal(loss, -advantages)
    assert logprobs.grad is not None
    assert torch.equal(logprobs.grad, -advantages)


def test_delta_bounds_the_ratio_where_the_advantage_is_negative() -> None:
    # A ratio of 5 with A = -2: 10 unbounded, -delta A = 6 with delta 3, and no gradient.
    assert clipped(5.0, -2.0)[:2] == pytest.approx((10.0, 10.0))
    assert clipped(5.0, -2.0, delta=3.0)[:2] == pytest.approx((6.0, 0.0))
    assert clipped(5.0, 2.0, delta=3.0)[:2] == pytest.approx((-2.4, 0.0))
    assert clipped(2.0, -2.0, delta=3.0)[:2] == pytest.approx((4.0, 4.0))


@given(log_ratio=st.floats(-3, 3), advantage=st.floats(-3, 3), c=st.floats(1.5, 6))
def test_dual_clip_and_the_two_sided_bound_are_one(log_ratio: float, advantage: float, c: float) -> None:
    ratio = math.exp(log_ratio)
    pessimistic = min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage)
    dual_clip = max(pessimistic, c * advantage) if advantage < 0 else pessimistic  # arXiv:1912.09729, equation 5
    assert clipped(ratio, advantage, high=0.28, delta=c)[0] == pytest.approx(-dual_clip, abs=1e-12)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: clipped_loss(
            x,
            torch.full((6,), -1.0).double(),
            torch.tensor([1.0, 1, 1, -1, -1, -1]).double(),
            epsilon_low=0.2,
            epsilon_high=0.28,
        )[0],
        lambda x: clipped_loss(x, OLD, ADVANTAGES, epsilon_low=0.2, epsilon_high=0.2, delta=1.5)[0],
        lambda x: sapo_loss(x, OLD, ADVANTAGES, tau_positive=1.0, tau_negative=1.05)[0],
        lambda x: importance_loss(x, OLD, ADVANTAGES)[0],
        lambda x: covariance_penalised_loss(x, OLD, ADVANTAGES, ADVANTAGES > 0, 0.7)[0],
    ],
)
def test_gradients_are_those_of_finite_differences(function: Callable[[Tensor], Tensor]) -> None:
    x = (-1.0 + torch.tensor([0.5, -0.5, 0.1, 0.5, -0.5, 0.1])).double().requires_grad_()
    assert torch.autograd.gradcheck(function, (x,), eps=1e-6, atol=1e-8)
