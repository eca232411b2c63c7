"""KL estimates: values and gradients by hand, and what they average to over a whole distribution."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stateset_lightning.algorithm.kl import KL, adapted_coefficient, k3, kl_estimate

P_LOGITS = torch.tensor([0.3, -0.2, 0.9, 0.0], dtype=torch.float64)
Q = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
OLD = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


def exact_kl(logits: Tensor) -> Tensor:
    p = logits.softmax(0)
    return (p * (p / Q).log()).sum()


def expected(estimator: Any, sampled_from: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of an estimate over all tokens, drawn from fixed probabilities, and its gradient with respect to the
    logits.
    """
    logits = P_LOGITS.clone().requires_grad_()
    value = (sampled_from * kl_estimate(estimator, logits.log_softmax(0), Q.log(), sampled_from.log())).sum()
    value.backward()
    assert logits.grad is not None
    return value.detach(), logits.grad


def test_each_estimate_by_hand() -> None:
    # Policy -1, reference -1 - log 2: the policy is twice as likely. k1 = log 2, k2 = log^2 2 / 2, k3 = 1/2 - 1 + log
    # 2.
    logprob, reference, old = (
        torch.tensor([x], dtype=torch.float64) for x in (-1.0, -1 - math.log(2), -1 - math.log(3))
    )
    assert kl_estimate("k1", logprob, reference).item() == pytest.approx(math.log(2))
    assert kl_estimate("k2", logprob, reference).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_estimate("k3", logprob, reference).item() == pytest.approx(math.log(2) - 0.5)
    assert kl_estimate("k3_unbiased", logprob, reference, old).item() == pytest.approx(3 * (math.log(2) - 0.5))


def test_the_gradient_of_the_unbiased_k3_by_hand() -> None:
    # On-policy: ratio 1. By the log-prob: k3 x 1 + (1 - e^d) = (e^d - d - 1) + 1 - e^d = -d = log 2.
    logprob = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    kl_estimate("k3_unbiased", logprob, logprob.detach() - math.log(2), logprob.detach()).sum().backward()
    assert logprob.grad is not None
    assert logprob.grad.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(("estimator", "unbiased"), [("k1", True), ("k2", False), ("k3", True), ("k3_unbiased", True)])
def test_which_values_average_to_the_kl(estimator: str, unbiased: bool) -> None:
    value, _ = expected(estimator, P_LOGITS.softmax(0))
    assert torch.isclose(value, exact_kl(P_LOGITS), atol=1e-12).item() == unbiased


@pytest.mark.parametrize(("estimator", "unbiased"), [("k1", False), ("k2", True), ("k3", False), ("k3_unbiased", True)])
def test_which_gradients_average_to_that_of_the_kl(estimator: str, unbiased: bool) -> None:
    _, gradient = expected(estimator, P_LOGITS.softmax(0))
    logits = P_LOGITS.clone().requires_grad_()
    exact_kl(logits).backward()
    assert logits.grad is not None
    assert torch.allclose(gradient, logits.grad, atol=1e-12) == unbiased
    if estimator == "k1":
        assert gradient.abs().max() < 1e-12  # why k1 in the loss is refused


def test_k3s_gradient_averages_to_that_of_the_other_kl() -> None:
    _, gradient = expected("k3", P_LOGITS.softmax(0))
    logits = P_LOGITS.clone().requires_grad_()
    (Q * (Q.log() - logits.log_softmax(0))).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(gradient, logits.grad)


def test_the_unbiased_k3_stays_so_off_policy() -> None:
    value, gradient = expected("k3_unbiased", OLD)
    logits = P_LOGITS.clone().requires_grad_()
    exact = exact_kl(logits)
    exact.backward()
    assert logits.grad is not None
    torch.testing.assert_close(value, exact.detach())
    torch.testing.assert_close(gradient, logits.grad)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3_unbiased"])
def test_gradients_are_those_of_finite_differences(estimator: Any) -> None:
    x = torch.linspace(-3, -0.5, 6, dtype=torch.float64).requires_grad_()
    reference, old = torch.linspace(-2, 0, 6, dtype=torch.float64), torch.linspace(-1, -2, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: kl_estimate(estimator, x, reference, old), (x,), eps=1e-6, atol=1e-8)


def test_k3_by_hand() -> None:
    # d = log 2: 2 - log 2 - 1, gradient with respect to the policy's log-prob 1 - 2 = -1. d = -log 2: 1/2 + log 2 - 1,
    # gradient 1/2.
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


@pytest.mark.parametrize(("kl", "expected"), [(0.2, 1.02), (0.11, 1.01), (0.1, 1.0), (0.09, 0.99), (-3.0, 0.98)])
def test_the_adaptive_coefficient_moves_by_a_bounded_share(kl: float, expected: float) -> None:
    assert adapted_coefficient(1.0, kl, KL(target=0.1, horizon=10)) == pytest.approx(expected)
    assert adapted_coefficient(2.0, kl, KL(target=0.1, horizon=20)) == pytest.approx(2 * (1 + (expected - 1) / 2))
