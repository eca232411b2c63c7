"""Values and gradients of per-token losses by hand and by finite differences."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stateset_lightning.algorithm.losses import clipped_loss, k3, per_token


def clipped(ratio: float, advantage: float, low: float = 0.2, high: float = 0.2) -> tuple[float, float, dict[str, float]]:
    """Value, gradient with respect to the log-prob, and metrics of one token."""
    logprob = torch.tensor([math.log(ratio) - 1.5], dtype=torch.float64, requires_grad=True)
    old, advantages = torch.tensor([-1.5], dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    loss, metrics = clipped_loss(logprob, old, advantages, epsilon_low=low, epsilon_high=high)
    loss.sum().backward()
    assert logprob.grad is not None
    return loss.item(), logprob.grad.item(), {name: float(total) / float(count) for name, (total, count) in metrics.items()}


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
def test_the_clipped_loss_by_hand(ratio: float, advantage: float, value: float, gradient: float, clip_low: int, clip_high: int) -> None:
    loss, slope, metrics = clipped(ratio, advantage)
    assert loss == pytest.approx(value)
    assert slope == pytest.approx(gradient)
    assert metrics == pytest.approx({"policy/ratio_mean": ratio, "policy/clip_low": clip_low, "policy/clip_high": clip_high})


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


def test_k3_by_hand() -> None:
    # d = log 2: 2 - log 2 - 1, gradient with respect to the policy's log-prob 1 - 2 = -1. d = -log 2: 1/2 + log 2 - 1, gradient 1/2.
    logprobs = torch.tensor([-3.0, -3.0, -3.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-3.0 + math.log(2), -3.0 - math.log(2), -3.0], dtype=torch.float64)
    values = k3(logprobs, reference)
    values.sum().backward()
    assert values.tolist() == pytest.approx([1 - math.log(2), math.log(2) - 0.5, 0.0])
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-1.0, 0.5, 0.0])


def test_k3_is_never_negative_and_keeps_small_differences() -> None:
    differences = torch.tensor([-20.0, -1e-4, -1e-6, 1e-6, 1e-4, 5.0])
    values = k3(torch.zeros(6), differences)
    assert (values >= 0).all()
    assert values[1].item() == pytest.approx(0.5e-8, rel=0.02)  # d^2 / 2, which exp(d) - d - 1 would lose in float32
    assert values[4].item() == pytest.approx(0.5e-8, rel=0.02)


def test_k3_averages_to_the_kl_divergence() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    assert (p * k3(p.log(), q.log())).sum().item() == pytest.approx((p * (p / q).log()).sum().item())


@pytest.mark.parametrize(
    "function",
    [
        lambda x: clipped_loss(
            x, torch.full((6,), -1.0).double(), torch.tensor([1.0, 1, 1, -1, -1, -1]).double(), epsilon_low=0.2, epsilon_high=0.28
        )[0],
        lambda x: k3(x, torch.linspace(-2, 0, 6).double()),
    ],
)
def test_gradients_are_those_of_finite_differences(function: Callable[[Tensor], Tensor]) -> None:
    x = (-1.0 + torch.tensor([0.5, -0.5, 0.1, 0.5, -0.5, 0.1])).double().requires_grad_()
    assert torch.autograd.gradcheck(function, (x,), eps=1e-6, atol=1e-8)


def test_a_value_per_completion_is_repeated_for_its_tokens() -> None:
    assert per_token(torch.tensor([1.5, -2.0, 7.0]), torch.tensor([2, 0, 3])).tolist() == [1.5, 1.5, 7.0, 7.0, 7.0]
