"""KL estimates, adaptive coefficients, mismatch corrections and selections of tokens, by hand."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from stateset_lightning.algorithm import GRPO, ClipCov, KLCov, TokenBatch
from stateset_lightning.algorithm.terms import (
    KL,
    Mismatch,
    covariances,
    draw,
    k3,
    kl_estimate,
    largest,
    mismatch_metrics,
    mismatch_weights,
    on_policy,
    top_entropy_tokens,
)

# KL -------------------------------------------------------------------------------------------------------------------

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


def test_k3_and_its_gradient_are_bounded_where_the_reference_is_beyond_20_nats() -> None:
    logprobs = torch.zeros(3, requires_grad=True)
    for estimator in ("k3", "k3_unbiased"):
        values = kl_estimate(estimator, logprobs, torch.tensor([90.0, 20.5, -90.0]), torch.zeros(3))  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(values.sum(), logprobs)
        assert values.isfinite().all()
        assert gradient.isfinite().all()
        assert values[:2].tolist() == pytest.approx([math.exp(20) - 21] * 2)  # as of 20 nats


def test_k3_averages_to_the_kl_divergence() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    assert (p * k3(p.log(), q.log())).sum().item() == pytest.approx((p * (p / q).log()).sum().item())


@pytest.mark.parametrize(("kl", "expected"), [(0.2, 1.02), (0.11, 1.01), (0.1, 1.0), (0.09, 0.99), (-3.0, 0.98)])
def test_the_adaptive_coefficient_moves_by_a_bounded_share(kl: float, expected: float) -> None:
    assert KL(target=0.1, horizon=10).adapted(1.0, kl) == pytest.approx(expected)
    assert KL(target=0.1, horizon=20).adapted(2.0, kl) == pytest.approx(2 * (1 + (expected - 1) / 2))


# A sampler that differs from the trainer ------------------------------------------------------------------------------

# The trainer's probability over the sampler's: two completions of 3 and 2 tokens.
RATIOS = torch.tensor([1.0, 4.0, 0.25, 1.5, 3.0], dtype=torch.float64)
LENGTHS = torch.tensor([3, 2])
SAMPLING = torch.full((5,), -2.0, dtype=torch.float64)


def sampled_by(old_T: Tensor, sampling_T: Tensor, lengths_N: Tensor = LENGTHS) -> TokenBatch:
    return TokenBatch(old_T, old_T, torch.ones(len(lengths_N)), lengths_N, sampling_logprobs_T=sampling_T)


def weights(kind: Any, low: float | None = None, high: float | None = None) -> list[float]:
    return mismatch_weights(sampled_by(SAMPLING + RATIOS.log(), SAMPLING), Mismatch(kind, low, high)).tolist()


def test_token_truncation() -> None:
    assert weights("token_tis") == pytest.approx([1.0, 2.0, 0.25, 1.5, 2.0])
    assert weights("token_tis", low=0.5) == pytest.approx([1.0, 2.0, 0.5, 1.5, 2.0])
    assert weights("token_tis", high=3.5) == pytest.approx([1.0, 3.5, 0.25, 1.5, 3.0])


def test_sequence_truncation() -> None:
    # The products are 1 and 4.5.
    assert weights("sequence_tis") == pytest.approx([1.0, 1.0, 1.0, 2.0, 2.0])
    assert weights("sequence_tis", high=5.0) == pytest.approx([1.0, 1.0, 1.0, 4.5, 4.5])


def test_the_product_mask_drops_completions_by_the_product_which_is_their_weight() -> None:
    assert weights("product_mask") == pytest.approx([1.0, 1.0, 1.0, 0.0, 0.0])
    assert weights("product_mask", low=1.1, high=5.0) == pytest.approx([0.0, 0.0, 0.0, 4.5, 4.5])


def test_icepop_drops_tokens_on_both_sides() -> None:
    assert weights("icepop") == pytest.approx([1.0, 4.0, 0.0, 1.5, 3.0])
    assert weights("icepop", low=0.2, high=2.0) == pytest.approx([1.0, 0.0, 0.25, 1.5, 0.0])


def test_the_sequence_mask_drops_completions_by_their_geometric_mean() -> None:
    # 1 and sqrt(4.5) = 2.12.
    assert weights("sequence_mask") == pytest.approx([1.0, 4.0, 0.25, 0.0, 0.0])
    assert weights("sequence_mask", low=1.5, high=2.2) == pytest.approx([0.0, 0.0, 0.0, 1.5, 3.0])


def test_equal_samplers_change_nothing() -> None:
    for kind in ("token_tis", "sequence_tis", "icepop", "sequence_mask", "product_mask"):
        assert mismatch_weights(sampled_by(SAMPLING, SAMPLING), Mismatch(kind)).tolist() == [1.0] * 5  # type: ignore[arg-type]
    sums = mismatch_metrics(sampled_by(SAMPLING, SAMPLING))
    means = {name.partition("/")[2]: float(total) / float(count) for name, (total, count) in sums.items()}
    assert means == {"kl": 0.0, "weight": 1.0, "ess": 1.0, "unknown": 0.0}


def test_metrics_by_hand() -> None:
    # k3 of a ratio w is w - 1 - log w; the effective sample size is mean(w) x sum(w) / sum(w^2).
    metrics = mismatch_metrics(sampled_by(SAMPLING + RATIOS.log(), SAMPLING))
    kl = sum(w - 1 - math.log(w) for w in RATIOS.tolist())
    assert tuple(map(float, metrics["mismatch/kl"])) == pytest.approx((kl, 5))
    assert tuple(map(float, metrics["mismatch/weight"])) == pytest.approx((9.75, 5))
    assert tuple(map(float, metrics["mismatch/ess"])) == pytest.approx((9.75, 1 + 16 + 1 / 16 + 2.25 + 9))


@pytest.mark.parametrize("unknown", [-math.inf, math.nan])
@pytest.mark.parametrize("kind", ["token_tis", "sequence_tis", "icepop", "sequence_mask", "product_mask"])
def test_a_token_whose_sampler_names_no_probability_weighs_as_if_it_agreed(kind: Any, unknown: float) -> None:
    known_T, sampling_T = SAMPLING + 1e-4, SAMPLING.clone()
    agreed_T = sampling_T.clone()
    sampling_T[1], agreed_T[1] = unknown, known_T[1]
    got, expected = (sampled_by(known_T, values_T) for values_T in (sampling_T, agreed_T))
    assert mismatch_weights(got, Mismatch(kind)).tolist() == mismatch_weights(expected, Mismatch(kind)).tolist()
    metrics, others = mismatch_metrics(got), [0, 2, 3, 4]
    assert metrics.pop("mismatch/unknown") == (1, 5)
    known = mismatch_metrics(sampled_by(known_T[others], SAMPLING[others], torch.tensor([4])))
    assert metrics == {name: pair for name, pair in known.items() if name != "mismatch/unknown"}


@pytest.mark.parametrize("nats", [-1000.0, -90.0, 90.0, 1000.0])
@pytest.mark.parametrize("kind", ["token_tis", "sequence_tis", "icepop", "sequence_mask", "product_mask"])
def test_a_sampler_far_away_gives_finite_weights_and_metrics(kind: Any, nats: float) -> None:
    tokens = sampled_by(torch.zeros(3), torch.tensor([0.0, 0.0, -nats]), torch.tensor([2, 1]))
    weights_T = mismatch_weights(tokens, Mismatch(kind))
    assert weights_T[:2].tolist() == [1.0, 1.0]
    assert 0 <= weights_T[2] <= Mismatch(kind).bounds[1]
    assert all(math.isfinite(float(total)) for total, _ in mismatch_metrics(tokens).values())


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("token_tis", [1.0, 1.0, 0.25, 1.5, 1.0]),
        ("sequence_tis", [0.25, 0.25, 0.25, 1.5, 1.5]),
        ("icepop", [1.0, 1.0, 0.0, 1.5, 1.0]),
        ("sequence_mask", [0.0, 0.0, 0.0, 1.5, 1.0]),  # 0.25^(1/3) = 0.63, 1.5^(1/2) = 1.22
        ("none", [1.0] * 5),
    ],
)
def test_a_token_whose_sampling_logprob_is_not_known_has_ratio_1_and_does_not_count(
    kind: Any, expected: list[float]
) -> None:
    nan = math.nan
    tokens = TokenBatch(
        logprobs_T=SAMPLING + RATIOS.log(),
        old_logprobs_T=SAMPLING + RATIOS.log(),
        advantages_N=torch.tensor([-1.0, -1.0]),
        lengths_N=LENGTHS,
        sampling_logprobs_T=torch.where(torch.tensor([False, True, False, False, True]), nan, SAMPLING),
    )
    algorithm = GRPO(beta=0, mismatch=Mismatch(kind, **({"low": 0.7, "high": 1.3} if kind == "sequence_mask" else {})))
    loss_T, metrics = algorithm.per_token_loss(tokens)  # -ratio x advantage = 1 without a correction
    assert loss_T.tolist() == pytest.approx(expected)
    known = [1.0, 0.25, 1.5]
    kl = sum(w - 1 - math.log(w) for w in known)
    assert tuple(map(float, metrics["mismatch/kl"])) == pytest.approx((kl, 3))
    total, count = map(float, metrics["mismatch/ess"])
    assert total / count == pytest.approx(sum(known) / (1 + 1 / 16 + 2.25))
    assert on_policy(tokens, 0.0).tolist() == [False, True]  # drifts (0 - log 0.25) / 3 and -log 1.5 / 2


def test_weights_carry_no_gradient() -> None:
    old_T = (SAMPLING + RATIOS.log()).requires_grad_()
    assert not mismatch_weights(sampled_by(old_T, SAMPLING), Mismatch("token_tis")).requires_grad


def test_on_average_untruncated_weights_turn_the_samplers_mean_into_the_trainers() -> None:
    sampler, trainer = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    values = torch.tensor([1.0, 5.0, -2.0])
    tokens = sampled_by(trainer.log(), sampler.log(), torch.tensor([1, 1, 1]))
    weights_T = mismatch_weights(tokens, Mismatch("token_tis", high=100.0))
    torch.testing.assert_close((sampler * weights_T * values).sum(), (trainer * values).sum())


# Selections of tokens: how many, which, and that they draw from their own seed alone ----------------------------------


def test_the_tokens_above_the_quantile_are_kept() -> None:
    # Five tokens and a share of 0.4: the 0.6 quantile lies between the third and the fourth smallest.
    entropies_T = torch.tensor([0.5, 2.0, 0.1, 3.0, 1.0])
    assert top_entropy_tokens(entropies_T, 0.4).tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("count", range(1, 60))
@pytest.mark.parametrize("share", [0.05, 0.2, 0.29, 0.5, 0.9])
def test_the_number_kept_is_that_of_a_quantile(count: int, share: float) -> None:
    entropies_T = torch.rand(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    expected = int((entropies_T >= entropies_T.quantile(1 - share) - 1e-9).sum())
    assert int(top_entropy_tokens(entropies_T, share).sum()) == expected
    assert int(top_entropy_tokens(torch.ones(count), share).sum()) == expected  # also when all are equal


def test_nothing_is_selected_from_nothing() -> None:
    assert top_entropy_tokens(torch.zeros(0), 0.2).tolist() == []
    assert draw(torch.zeros(0, dtype=torch.bool), 3, seed=1).tolist() == []


def test_of_equal_values_the_first_are_taken() -> None:
    assert largest(torch.tensor([1.0, 2.0, 2.0, 2.0]), 2).tolist() == [False, True, True, False]


def batch() -> TokenBatch:
    logprobs_T = torch.tensor([-1.0, -3.0, -2.0, -6.0], dtype=torch.float64)
    return TokenBatch(logprobs_T, logprobs_T, torch.tensor([2.0, -2.0]), torch.tensor([2, 2]))


def test_covariances_by_hand() -> None:
    # Log-probs minus their mean -3: 2, 0, 1, -3. Advantages by token 2, 2, -2, -2, mean 0.
    assert covariances(batch()).tolist() == [4.0, 0.0, -2.0, 6.0]
    # Tokens with advantages of their own: 4, 0, 0, 0, mean 1.
    own = replace(batch(), advantages_T=torch.tensor([4.0, 0.0, 0.0, 0.0]))
    assert covariances(own).tolist() == [6.0, 0.0, -1.0, 3.0]


def test_kl_cov_holds_the_tokens_of_the_largest_covariance() -> None:
    assert KLCov(share=0.5).select(batch(), seed=0).tolist() == [False, True, True, False]
    assert KLCov(share=1e-6).select(batch(), seed=0).tolist() == [True, True, True, False]  # one at least


def test_clip_cov_draws_among_the_tokens_within_its_bounds() -> None:
    assert ClipCov(omega_low=1.0, omega_high=5.0).select(batch(), seed=0).tolist() == [False, True, True, True]
    assert ClipCov(omega_low=7.0, omega_high=9.0).select(batch(), seed=0).all()
    drawn = {tuple(ClipCov(omega_low=1.0, omega_high=9.0).select(batch(), seed=seed).tolist()) for seed in range(20)}
    assert drawn == {(False, True, True, True), (True, True, True, False)}


def test_draws_are_uniform_repeatable_and_leave_the_global_generator_alone() -> None:
    candidates_T = torch.tensor([True, False, True, True, False, True])
    state = torch.get_rng_state()
    counts = torch.stack([draw(candidates_T, 2, seed) for seed in range(400)]).sum(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert counts[~candidates_T].sum() == 0
    assert counts.sum() == 800
    assert counts[candidates_T].float().sub(200).abs().max() < 50  # five standard deviations of 10
    assert torch.equal(draw(candidates_T, 2, 5), draw(candidates_T, 2, 5))
    assert torch.equal(draw(candidates_T, 9, 5), candidates_T)
