"""Values and gradients of per-token losses by hand and by finite differences."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from stateset_lightning.algorithm.losses import (
    cispo_loss,
    clip_cov_loss,
    clipped_loss,
    dppo_loss,
    gamma_weighted_loss,
    geometric_mean_loss,
    importance_loss,
    kl_cov_loss,
    quadratic_loss,
    sapo_loss,
    sequence_clipped_loss,
    sequence_token_clipped_loss,
)
from stateset_lightning.types import TokenBatch

ADVANTAGES = torch.tensor([1.0, 1, 1, -1, -1, -1], dtype=torch.float64)


def batch(logprobs_T: Tensor, old_T: Tensor, advantages_N: Tensor, select_T: Tensor | None = None) -> TokenBatch:
    """Completions of one token each."""
    return TokenBatch(logprobs_T, old_T, advantages_N, torch.ones(len(logprobs_T), dtype=torch.long), select_T=select_T)


def clipped(
    ratio: float, advantage: float, low: float = 0.2, high: float = 0.2, delta: float | None = None
) -> tuple[float, float, dict[str, float]]:
    """Value, gradient with respect to the log-prob, and metrics of one token."""
    logprob = torch.tensor([math.log(ratio) - 1.5], dtype=torch.float64, requires_grad=True)
    old, advantages = torch.tensor([-1.5], dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    loss, metrics = clipped_loss(batch(logprob, old, advantages), epsilon_low=low, epsilon_high=high, delta=delta)
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
    _, metrics = clipped_loss(batch(ratios.log(), torch.zeros(5), advantages), epsilon_low=0.2, epsilon_high=0.2)
    assert {name: (float(total), float(count)) for name, (total, count) in metrics.items()} == {
        "policy/ratio_mean": (5.0, 5.0),
        "policy/clip_low": (2.0, 5.0),
        "policy/clip_high": (1.0, 5.0),
    }
    assert not any(isinstance(total, Tensor) and total.requires_grad for total, _ in metrics.values())


def test_on_policy_the_gradient_is_minus_the_advantage() -> None:
    logprobs = torch.tensor([-0.3, -2.0, -5.0], requires_grad=True)
    advantages = torch.tensor([1.5, -0.5, 0.0])
    loss, _ = clipped_loss(batch(logprobs, logprobs.detach(), advantages), epsilon_low=0.2, epsilon_high=0.2)
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
    "loss",
    [
        lambda tokens: clipped_loss(tokens, epsilon_low=0.2, epsilon_high=0.28),
        lambda tokens: clipped_loss(tokens, epsilon_low=0.2, epsilon_high=0.2, delta=1.5),
        lambda tokens: sapo_loss(tokens, tau_positive=1.0, tau_negative=1.05),
        importance_loss,
        lambda tokens: kl_cov_loss(tokens, coefficient=0.7),
    ],
)
def test_gradients_are_those_of_finite_differences(loss: Callable[[TokenBatch], tuple[Tensor, object]]) -> None:
    x = (-1.0 + torch.tensor([0.5, -0.5, 0.1, 0.5, -0.5, 0.1])).double().requires_grad_()
    old_T = torch.full((6,), -1.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: loss(batch(x, old_T, ADVANTAGES, ADVANTAGES <= 0))[0], (x,), eps=1e-6, atol=1e-8
    )


FORMULAS = {
    "importance": importance_loss,
    "clip": lambda tokens: clipped_loss(tokens, epsilon_low=0.2, epsilon_high=0.2),
    "dual clip": lambda tokens: clipped_loss(tokens, epsilon_low=0.2, epsilon_high=0.2, delta=3.0),
    "CISPO": lambda tokens: cispo_loss(tokens, epsilon_high=4.0),
    "SAPO": lambda tokens: sapo_loss(tokens, tau_positive=1.0, tau_negative=1.05),
    "DPPO": lambda tokens: dppo_loss(tokens, divergence="tv", delta_low=0.1, delta_high=0.1, maximum_ratio=20.0),
    "DPPO-KL": lambda tokens: dppo_loss(tokens, divergence="kl", delta_low=0.1, delta_high=0.1, maximum_ratio=20.0),
    "Clip-Cov": lambda tokens: clip_cov_loss(tokens, epsilon_low=0.2, epsilon_high=None),
    "KL-Cov": lambda tokens: kl_cov_loss(tokens, coefficient=0.7),
    "GSPO": lambda tokens: sequence_clipped_loss(tokens, epsilon_low=0.2, epsilon_high=0.2, delta=None),
    "GSPO-token": lambda tokens: sequence_token_clipped_loss(tokens, epsilon_low=0.2, epsilon_high=0.2),
    "GMPO": lambda tokens: geometric_mean_loss(tokens, log_epsilon_low=0.4, log_epsilon_high=0.4),
    "DRO": lambda tokens: quadratic_loss(tokens, tau=0.05),
    "VESPO": lambda tokens: gamma_weighted_loss(
        tokens, k_positive=2.0, lambda_positive=3.0, k_negative=3.0, lambda_negative=2.0
    ),
}


@pytest.mark.parametrize("nats", [90.0, 1000.0])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_policy_far_from_the_one_that_sampled_has_finite_losses_and_gradients(name: str, nats: float) -> None:
    """In float32 exp overflows at 88.7, and a token that a clip leaves out multiplies infinity by zero."""
    logprobs_T = torch.tensor([-1.0, -1.0, -1.0, -1.0 - nats, -1.0 - nats, -1.0], requires_grad=True)
    old_T = torch.tensor([-1.0 - nats, -1.0 - nats, -1.0, -1.0, -1.0, -1.0])
    tokens = batch(logprobs_T, old_T, torch.tensor([1.0, -1, 1, 1, -1, -1]), torch.tensor([True] * 5 + [False]))
    loss_T, metrics = FORMULAS[name](tokens)
    loss_T.sum().backward()
    assert logprobs_T.grad is not None
    assert loss_T.isfinite().all()
    assert logprobs_T.grad.isfinite().all()
    assert all(math.isfinite(float(total)) for total, _ in metrics.values())


def test_a_log_ratio_is_held_within_20_nats() -> None:
    logprobs_T = torch.tensor([-1.0, -41.0], requires_grad=True)
    loss_T, _ = importance_loss(batch(logprobs_T, torch.tensor([-31.0, -1.0]), torch.ones(2)))
    assert (-loss_T).tolist() == pytest.approx([math.exp(20), math.exp(-20)])


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
def test_the_gates_steepness_is_in_the_precision_of_the_log_probs(default: torch.dtype) -> None:
    # sigmoid(1.05 (e^-0.5 - 1)) x 4 / 1.05; in bfloat16 1.05 is 1.046875.
    torch.set_default_dtype(default)
    try:
        tokens = batch(torch.full((1,), -1.5).double(), torch.full((1,), -1.0).double(), torch.tensor([-1.0]))
        value = sapo_loss(tokens, tau_positive=1.0, tau_negative=1.05)[0].item()
    finally:
        torch.set_default_dtype(torch.float32)
    assert value == pytest.approx(4 / 1.05 / (1 + math.exp(-1.05 * (math.exp(-0.5) - 1))), rel=1e-12)


# Advantages of single tokens ------------------------------------------------------------------------------------------


def with_token_advantages(ratios: list[float], advantages: list[float]) -> TokenBatch:
    """One completion, whose own advantage of 9 must not be read."""
    logprobs_T = (torch.tensor(ratios, dtype=torch.float64).log() - 1).requires_grad_()
    return TokenBatch(
        logprobs_T,
        torch.full((len(ratios),), -1.0, dtype=torch.float64),
        torch.tensor([9.0]),
        torch.tensor([len(ratios)]),
        advantages_T=torch.tensor(advantages, dtype=torch.float64),
    )


def test_a_clip_bounds_each_token_by_its_own_advantage() -> None:
    # Ratio 1.5: bounded at 1.2 for A = 2, not bounded for A = -3.
    tokens = with_token_advantages([1.5, 1.5, 1.0], [2.0, -3.0, 0.0])
    loss_T, metrics = clipped_loss(tokens, epsilon_low=0.2, epsilon_high=0.2)
    loss_T.sum().backward()
    assert loss_T.tolist() == pytest.approx([-2.4, 4.5, 0.0])
    assert tokens.logprobs_T.grad is not None
    assert tokens.logprobs_T.grad.tolist() == pytest.approx([0.0, 4.5, 0.0])
    assert tuple(map(float, metrics["policy/clip_high"])) == (1.0, 3.0)


def test_gspo_token_gives_the_ratio_of_the_completion_to_each_tokens_advantage() -> None:
    # The ratio is sqrt(4 x 1) = 2, for both tokens and both gradients.
    tokens = with_token_advantages([4.0, 1.0], [2.0, -3.0])
    loss_T, _ = sequence_token_clipped_loss(tokens, epsilon_low=0.5, epsilon_high=2.0)
    loss_T.sum().backward()
    assert loss_T.tolist() == pytest.approx([-4.0, 6.0])
    assert tokens.logprobs_T.grad is not None
    assert tokens.logprobs_T.grad.tolist() == pytest.approx([-4.0, 6.0])


def test_dro_takes_them_in_its_policy_gradient() -> None:
    # -A log-prob, plus 0.1 / 2 x (log 2)^2 shared by two tokens.
    tokens = with_token_advantages([2.0, 1.0], [2.0, -3.0])
    square = 0.05 * math.log(2) ** 2 / 2
    expected = [-2 * (math.log(2) - 1) + square, 3 * -1 + square]
    assert quadratic_loss(tokens, tau=0.1)[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    "loss",
    [
        lambda tokens: sequence_clipped_loss(tokens, epsilon_low=0.2, epsilon_high=0.2, delta=None),
        lambda tokens: geometric_mean_loss(tokens, log_epsilon_low=0.4, log_epsilon_high=0.4),
    ],
)
def test_a_ratio_of_whole_completions_refuses_them(loss: Callable[[TokenBatch], object]) -> None:
    with pytest.raises(ValueError, match="takes no advantages of single tokens: use GSPOToken"):
        loss(with_token_advantages([1.0, 1.0], [1.0, -1.0]))
