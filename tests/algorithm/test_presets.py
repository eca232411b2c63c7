"""Each preset as its paper defines it: a loss and its gradient by hand, finite differences, defaults, options.

The case: one prompt with rewards (1, 0), completions of 1 and 3 tokens, a second prompt with rewards (1, 1) and 2
tokens each. Ratios are 1.5 for the first token, 1.25 for the last of the second completion, 1 elsewhere; old log-probs
are -2.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from stateset_lightning import algorithm as algorithms
from stateset_lightning.algorithm import (
    BNPO,
    CISPO,
    DAPO,
    DPPO,
    DRO,
    GDPO,
    GKD,
    GMPO,
    GRPO,
    GSPO,
    KL,
    LUSPO,
    OPO,
    RAFT,
    RLOO,
    SAPO,
    VESPO,
    Algorithm,
    ClipCov,
    Clipped,
    DrGRPO,
    GSPOToken,
    KLCov,
    MaxRL,
    Mismatch,
    OnPolicyDistillation,
    PassK,
    ReinforcePlusPlus,
    ReinforcePlusPlusBaseline,
    ReMax,
    Supervised,
    TokenBatch,
    TopEntropy,
)
from stateset_lightning.algorithm.aggregation import per_token
from stateset_lightning.errors import ConfigError

EXPORTED = list(vars(algorithms).values())
PRESETS = [
    found
    for found in EXPORTED
    if isinstance(found, type) and issubclass(found, Algorithm) and found not in (Algorithm, Clipped, Supervised)
]
"""But `Supervised`, which has options of its own: test_supervised.py."""

LENGTHS = torch.tensor([1, 3, 2, 2])
RATIOS = torch.tensor([1.5, 1.0, 1.0, 1.25, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
LOGPROBS = RATIOS.log() - 2
REWARDS = torch.tensor([[[1.0], [0.0]], [[1.0], [1.0]]])
SIGMA = math.sqrt(0.5) + 1e-4  # of (1, 0): deviations +-1/2, variance 1/4 + 1/4
A = 0.5 / SIGMA  # GRPO's advantages: A, -A, 0, 0


def loss_and_gradient(
    algorithm: Algorithm,
    reference_gap: float = 0.0,
    select: list[bool] | None = None,
    greedy: list[float] | None = None,
) -> tuple[float, list[float]]:
    """The loss of the case and its gradient with respect to the log-probs.

    The reference's log-probs are `reference_gap` above the policy's.
    """
    algorithm.setup(max_new_tokens=10)
    logprobs_T = LOGPROBS.clone().requires_grad_()
    baseline_PF = None if greedy is None else torch.tensor(greedy)[:, None]
    advantages_PG = algorithm.advantages(REWARDS, torch.ones(1), LENGTHS.reshape(2, 2), baseline_PF)
    weights_N = algorithm.token_weights(LENGTHS, torch.tensor([0, 0, 1, 1]))
    tokens = TokenBatch(
        logprobs_T,
        torch.full_like(logprobs_T, -2),
        advantages_PG.flatten(),
        LENGTHS,
        ref_logprobs_T=logprobs_T.detach() + reference_gap,
        select_T=None if select is None else torch.tensor(select),
    )
    loss = (per_token(weights_N, LENGTHS) * algorithm.per_token_loss(tokens)[0]).sum()
    loss.backward()
    assert logprobs_T.grad is not None
    return loss.item(), logprobs_T.grad.tolist()


def test_grpo() -> None:
    # Advantages +-1/2 over sigma; four completions, so a token weighs 1/4, 1/12, 1/8, 1/8.
    # The first token's ratio 1.5 is bounded at 1.2 (no gradient); the fourth's 1.25 is not, its advantage being
    # negative.
    a = 0.5 / SIGMA
    value = -1.2 * a / 4 + (1 + 1 + 1.25) * a / 12
    gradient = [0, a / 12, a / 12, 1.25 * a / 12, 0, 0, 0, 0]
    loss, slope = loss_and_gradient(GRPO(beta=0))
    assert loss == pytest.approx(value)
    assert slope == pytest.approx(gradient)


def test_grpo_with_the_papers_kl() -> None:
    # A reference log 2 above the policy: k3 = 2 - log 2 - 1 per token, gradient 1 - 2 = -1. The weights sum to 1 over
    # all tokens.
    loss, slope = loss_and_gradient(GRPO(), reference_gap=math.log(2))
    plain_loss, plain_slope = loss_and_gradient(GRPO(beta=0))
    assert loss == pytest.approx(plain_loss + 0.04 * (1 - math.log(2)))
    weights = [1 / 4] + [1 / 12] * 3 + [1 / 8] * 4
    assert slope == pytest.approx([g - 0.04 * w for g, w in zip(plain_slope, weights, strict=True)])


def test_dr_grpo() -> None:
    # Advantages +-1/2; four completions and ten tokens at most, so every token weighs 1/40.
    value = -1.2 * 0.5 / 40 + (1 + 1 + 1.25) * 0.5 / 40
    gradient = [0, 0.5 / 40, 0.5 / 40, 1.25 * 0.5 / 40, 0, 0, 0, 0]
    loss, slope = loss_and_gradient(DrGRPO())
    assert loss == pytest.approx(value)
    assert slope == pytest.approx(gradient)


def test_dapo() -> None:
    # GRPO's advantages; eight tokens, so every token weighs 1/8; the first ratio is bounded at 1.28.
    a = 0.5 / SIGMA
    value = -1.28 * a / 8 + (1 + 1 + 1.25) * a / 8
    gradient = [0, a / 8, a / 8, 1.25 * a / 8, 0, 0, 0, 0]
    loss, slope = loss_and_gradient(DAPO())
    assert loss == pytest.approx(value)
    assert slope == pytest.approx(gradient)


def test_bnpo() -> None:
    # Mean rewards 1/2 and 1: mean 3/4, variance 1/8; a + b = (3/16) / (1/8) - 1 = 1/2, a = 3/8, b = 1/8; alpha = 9/8,
    # beta = 25/24. Density at 1/2 by the definition of the Beta function; advantages +-1/2 over it; every token weighs
    # 1/8.
    density = math.gamma(9 / 8 + 25 / 24) / (math.gamma(9 / 8) * math.gamma(25 / 24)) * 0.5 ** (1 / 8 + 1 / 24)
    a = 0.5 / density
    value = -1.2 * a / 8 + (1 + 1 + 1.25) * a / 8
    gradient = [0, a / 8, a / 8, 1.25 * a / 8, 0, 0, 0, 0]
    loss, slope = loss_and_gradient(BNPO())
    assert loss == pytest.approx(value, rel=1e-6)
    assert slope == pytest.approx(gradient, rel=1e-6)


def check(algorithm: Algorithm, value: float, gradient: list[float], **case: Any) -> None:
    loss, slope = loss_and_gradient(algorithm, **case)
    assert loss == pytest.approx(value, rel=1e-6)
    assert slope == pytest.approx([*gradient, 0, 0, 0, 0] if len(gradient) == 4 else gradient, rel=1e-6)


# Of the four log-probs of the first prompt: that of its first completion, and the three of its second.
FIRST, SECOND = LOGPROBS[0].item(), LOGPROBS[1:4].tolist()


def test_reinforce_plus_plus() -> None:
    # Rewards 1, 0, 1, 1: mean 3/4, variance (3/16 + 9/16) / 3 = 1/4. So the constant group trains as well.
    std = 0.5 + 1e-4
    better, worse = 0.25 / std, 0.75 / std
    value = (-1.2 * better + 3.25 * worse - 4 * better) / 8
    check(ReinforcePlusPlus(), value, [0, worse / 8, worse / 8, 1.25 * worse / 8, *[-better / 8] * 4])


def test_top_entropy() -> None:
    # DAPO, and only the first and the fourth token train; the divisor is still 8.
    select = [True, False, False, True, False, False, False, False]
    check(TopEntropy(), (-1.28 * A + 1.25 * A) / 8, [0, 0, 0, 1.25 * A / 8], select=select)


def test_gdpo() -> None:
    # Standardised: +-A, 0, 0. Their variance is 2 A^2 / 3. Then as GRPO.
    a = A / (A * math.sqrt(2 / 3) + 1e-4)
    check(GDPO(), -1.2 * a / 4 + 3.25 * a / 12, [0, a / 12, a / 12, 1.25 * a / 12])


def test_pass_at_k() -> None:
    # The best of one is the reward itself: (r - 1/2) / (1/2) = +-1. Larger k: test_advantages.py.
    check(PassK(k=1), -1.2 / 4 + 3.25 / 12, [0, 1 / 12, 1 / 12, 1.25 / 12])


def test_reinforce_plus_plus_baseline() -> None:
    # Differences 1/2, -1/2, 0, 0: variance 1/6. Eight tokens.
    a = 0.5 / (math.sqrt(1 / 6) + 1e-4)
    check(ReinforcePlusPlusBaseline(), (-1.2 + 3.25) * a / 8, [0, a / 8, a / 8, 1.25 * a / 8])


def test_rloo() -> None:
    # Each against the other: 1 - 0, 0 - 1, 0, 0. Four completions, tokens added up.
    check(RLOO(), (-FIRST + sum(SECOND)) / 4, [-1 / 4, 1 / 4, 1 / 4, 1 / 4])


def test_opo() -> None:
    # Baseline (1 x 1 + 3 x 0) / 4 = 1/4: advantages 3/4 and -1/4.
    check(OPO(), (-0.75 * FIRST + 0.25 * sum(SECOND)) / 4, [-0.75 / 4, 0.25 / 4, 0.25 / 4, 0.25 / 4])


def test_remax() -> None:
    # The greedy completions have 1 and 0: advantages 0, -1, 1, 1. The other log-probs are -2.
    value = (sum(SECOND) - 4 * -2) / 4
    check(ReMax(), value, [0, 1 / 4, 1 / 4, 1 / 4, -1 / 4, -1 / 4, -1 / 4, -1 / 4], greedy=[1.0, 0.0])
    assert ReMax().needs_greedy_baseline


def test_remaxs_baseline_leaves_out_a_kl_that_only_the_samples_have() -> None:
    scores_PGF = torch.tensor([[[1.0, 3.0], [0.0, 1.0]]])  # the second is the KL, of weight -0.1
    got = ReMax(beta=0.1).advantages(scores_PGF, torch.tensor([1.0, -0.1]), None, torch.tensor([[1.0]]))
    assert got[0].tolist() == pytest.approx([-0.3, -1.1])


def test_max_rl() -> None:
    # (1 - 1/2) / (1/2) and (0 - 1/2) / (1/2).
    check(MaxRL(), (-FIRST + sum(SECOND)) / 4, [-1 / 4, 1 / 4, 1 / 4, 1 / 4])


def test_cispo() -> None:
    # Weights min(1.5, 1.3), 1, 1, 1.25: the bound takes no gradient away. Eight tokens.
    value = A * (-1.3 * FIRST + SECOND[0] + SECOND[1] + 1.25 * SECOND[2]) / 8
    check(CISPO(epsilon_high=0.3), value, [-1.3 * A / 8, A / 8, A / 8, 1.25 * A / 8])
    assert CISPO().epsilon_high == 4.0


def test_sapo() -> None:
    # The gate (4 / tau) sigmoid(tau (r - 1)); its slope by the log-prob is 4 s (1 - s) r. tau = 1 for the first, 1.05
    # for the rest.
    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    first, last = sigmoid(0.5), sigmoid(1.05 * 0.25)
    value = -A * 4 * first / 4 + A * 4 / 1.05 * (0.5 + 0.5 + last) / 12
    gradient = [-A * 4 * first * (1 - first) * 1.5 / 4, A / 12, A / 12, A * 4 * last * (1 - last) * 1.25 / 12]
    check(SAPO(), value, gradient)


def test_dppo() -> None:
    # Advantages +-1/2, every token weighs 1/40. The first probability rises from 0.1353 by 0.0677, less than 0.15:
    # weight 1.5.
    second = 0.5 * (SECOND[0] + SECOND[1] + 1.25 * SECOND[2])
    gradient = [0.5 / 40, 0.5 / 40, 0.625 / 40]
    check(DPPO(), (-0.5 * 1.5 * FIRST + second) / 40, [-0.75 / 40, *gradient])
    # More than 0.05: masked. The last token's has risen too, but its advantage is negative.
    check(DPPO(delta_high=0.05, delta_low=0.01), second / 40, [0, *gradient])
    check(
        DPPO(maximum_ratio=1.1),
        (-0.55 * FIRST + 0.5 * (SECOND[0] + SECOND[1] + 1.1 * SECOND[2])) / 40,
        [-0.55 / 40, 0.5 / 40, 0.5 / 40, 0.55 / 40],
    )


def test_dppo_by_the_kl() -> None:
    # Probabilities 0.1353 then and 0.2030 now: a KL of 0.0156 by the rise.
    p, q = math.exp(-2), 1.5 * math.exp(-2)
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert kl == pytest.approx(0.0156, abs=1e-4)
    plain = loss_and_gradient(DPPO())
    assert loss_and_gradient(DPPO(divergence="kl")) == plain
    assert loss_and_gradient(DPPO(divergence="kl", delta_high=kl + 1e-6, delta_low=1e-6)) == plain
    masked = loss_and_gradient(DPPO(divergence="kl", delta_high=kl - 1e-6))
    assert masked == loss_and_gradient(DPPO(delta_high=0.05))
    assert masked[1][0] == 0


def test_dppo_by_the_kl_bounds_a_fall_where_the_advantage_is_negative() -> None:
    # From 0.5 to 0.1 and back up, both far above 0.05; the third has fallen where A > 0, which is no step too far.
    old, new = torch.tensor([0.5, 0.1, 0.5]).log(), torch.tensor([0.1, 0.5, 0.1]).log()
    tokens = TokenBatch(new, old, torch.tensor([-1.0, 1.0, 1.0]), torch.tensor([1, 1, 1]))
    loss_T, metrics = DPPO(divergence="kl").per_token_loss(tokens)
    assert loss_T.tolist() == pytest.approx([0.0, 0.0, -0.2 * math.log(0.1)])
    assert [float(metrics[f"policy/clip_{side}"][0]) for side in ("low", "high")] == [1, 1]
    certain = replace(
        tokens, logprobs_T=torch.tensor([0.0, 0.0, -90.0]), old_logprobs_T=torch.tensor([-90.0, 0.0, 0.0])
    )
    assert DPPO(divergence="kl").per_token_loss(certain)[0].isfinite().all()


def test_dppo_compares_with_the_sampler() -> None:
    # The sampler gave the token e^-3 = 0.05, the trainer e^-2 = 0.14 then and e^-1 = 0.37 now: up by 0.32, masked at
    # 0.3 and not at 0.35.
    tokens = TokenBatch(
        torch.tensor([-1.0]),
        torch.tensor([-2.0]),
        torch.tensor([1.0]),
        torch.tensor([1]),
        sampling_logprobs_T=torch.tensor([-3.0]),
    )
    assert DPPO(delta_high=0.3).per_token_loss(tokens)[0].item() == 0.0
    assert DPPO(delta_high=0.35).per_token_loss(tokens)[0].item() == pytest.approx(math.exp(2))


def test_clip_cov() -> None:
    # -ratio A without any bound; the first token is the one drawn.
    select = [False] + [True] * 7
    check(ClipCov(), 3.25 * A / 8, [0, A / 8, A / 8, 1.25 * A / 8], select=select)
    check(ClipCov(), (3.25 - 1.5) * A / 8, [-1.5 * A / 8, A / 8, A / 8, 1.25 * A / 8], select=[True] * 8)


def test_clip_cov_with_the_bound_of_its_authors_code() -> None:
    # Each ratio is clipped as PPO's beside the selection: the first at 1.2; the fourth is on the other side.
    bounded = ClipCov(epsilon_low=0.2, epsilon_high=0.2)
    check(bounded, (3.25 - 1.2) * A / 8, [0, A / 8, A / 8, 1.25 * A / 8], select=[True] * 8)
    check(bounded, (2 - 1.2) * A / 8, [0, A / 8, A / 8, 0], select=[True] * 3 + [False] + [True] * 4)
    above = ClipCov(epsilon_high=0.2)
    check(above, (3.25 - 1.2) * A / 8, [0, A / 8, A / 8, 1.25 * A / 8], select=[True] * 8)


def test_kl_cov() -> None:
    # The fourth token is held: half of |log 1.25| is added, whose slope is 1/2.
    select = [True] * 3 + [False] + [True] * 4
    value = (-1.5 * A + 3.25 * A + 0.5 * math.log(1.25)) / 8
    check(KLCov(coefficient=0.5), value, [-1.5 * A / 8, A / 8, A / 8, (1.25 * A + 0.5) / 8], select=select)
    assert KLCov().trains_on_zero_advantage


def test_vespo() -> None:
    # The products of the ratios are 1.5 and 1.25: weights W^2 e^(3 - 3 W) and, where A is negative, W^3 e^(2 - 2 W).
    first, second = 1.5**2 * math.exp(-1.5), 1.25**3 * math.exp(-0.5)
    value = (-first * A * FIRST + second * A * sum(SECOND)) / 8
    check(VESPO(), value, [-first * A / 8, *[second * A / 8] * 3])
    loose = VESPO(k_positive=1.0, lambda_positive=1.0, k_negative=0.0, lambda_negative=0.5)
    first, second = 1.5 * math.exp(-0.5), math.exp(-0.125)
    check(loose, (-first * A * FIRST + second * A * sum(SECOND)) / 8, [-first * A / 8, *[second * A / 8] * 3])


def test_vespo_compares_with_the_sampler_and_forgets_what_is_far_away() -> None:
    # Two tokens of one completion, each e^0.5 above the trainer's then and e^-0.25 of the sampler: W = e^-0.5.
    old = torch.tensor([-2.0, -2.0])
    tokens = TokenBatch(old + 0.5, old, torch.tensor([1.0]), torch.tensor([2]), sampling_logprobs_T=old + 0.75)
    expected = math.exp(-2 * 0.5 + 3 * (1 - math.exp(-0.5)))
    assert VESPO().per_token_loss(tokens)[0].tolist() == pytest.approx([expected * 1.5] * 2)
    for nats in (-1000.0, 1000.0):
        far = replace(tokens, logprobs_T=(old + nats).requires_grad_())
        loss_T = VESPO().per_token_loss(far)[0]
        loss_T.sum().backward()
        assert far.logprobs_T.grad is not None
        assert far.logprobs_T.grad.abs().max() < 1e-12


S = 1.25 ** (1 / 3)  # the second completion's ratio: the geometric mean of 1, 1 and 1.25


@pytest.mark.parametrize("preset", [GSPO, GSPOToken])
def test_gspo(preset: type[Clipped]) -> None:
    # The first completion's 1.5 is cut at 1.05; the second's S is above, but its advantage is negative: S A, a third to
    # each token.
    check(preset(epsilon_low=0.05, epsilon_high=0.05), (-1.05 * A + S * A) / 4, [0, S * A / 12, S * A / 12, S * A / 12])


def test_gspo_token_can_leave_out_a_token_where_gspo_cannot() -> None:
    select = [True, True, False, True, True, True, True, True]
    bounds = {"epsilon_low": 0.05, "epsilon_high": 0.05}
    check(
        GSPOToken(**bounds, top_entropy=0.5),
        (-1.05 * A + S * A * 2 / 3) / 4,
        [0, S * A / 12, 0, S * A / 12],
        select=select,
    )
    with pytest.raises(TypeError, match="top_entropy"):
        GSPO(top_entropy=0.5)


def test_luspo() -> None:
    # GSPO times the lengths 1 and 3.
    check(LUSPO(epsilon_low=0.05, epsilon_high=0.05), (-1.05 * A + 3 * S * A) / 4, [0, S * A / 4, S * A / 4, S * A / 4])


def test_gmpo() -> None:
    # log 1.5 = 0.405 is cut at 0.4; the second completion has nothing to cut.
    check(GMPO(), (-math.exp(0.4) * A + S * A) / 4, [0, S * A / 12, S * A / 12, S * A / 12])
    # Cut before the mean: with a bound of 0.1 on a negative advantage's fall alone, the rise of 1.25 still counts
    # whole.
    check(
        GMPO(log_epsilon_low=0.1, log_epsilon_high=0.1),
        (-math.exp(0.1) * A + S * A) / 4,
        [0, S * A / 12, S * A / 12, S * A / 12],
    )


def test_dro() -> None:
    # Advantages +-1/2; tau / 2 = 0.05 times log^2 1.5 and log^2 1.25, whose slopes are 0.1 times the logarithms, for
    # every token.
    value = (-0.5 * FIRST + 0.05 * math.log(1.5) ** 2 + 0.5 * sum(SECOND) + 0.05 * math.log(1.25) ** 2) / 4
    first, second = (-0.5 + 0.1 * math.log(1.5)) / 4, (0.5 + 0.1 * math.log(1.25)) / 4
    check(DRO(tau=0.1), value, [first, second, second, second])


# Finite differences ---------------------------------------------------------------------------------------------------

STEADY = torch.tensor([1.1, 0.9, 1.05, 1.15, 0.7, 1.3, 1.02, 0.95], dtype=torch.float64).log() - 2  # no ratio at a kink
SELECT = torch.tensor([True, False, True, True, False, True, True, False])


def weighted_loss(algorithm: Algorithm, logprobs_T: Tensor) -> Tensor:
    """Sum over the tokens of weight x loss, with every term and advantages that are all different."""
    algorithm.setup(max_new_tokens=10)
    weights_N = algorithm.token_weights(LENGTHS, torch.tensor([0, 0, 1, 1]))
    old_T = torch.full_like(logprobs_T, -2)
    advantages_N = torch.tensor([1.3, -0.4, 0.7, -1.1], dtype=torch.float64)
    reference_T = torch.linspace(-2.5, -1.5, 8, dtype=torch.float64)
    tokens = TokenBatch(logprobs_T, old_T, advantages_N, LENGTHS, ref_logprobs_T=reference_T, select_T=SELECT)
    tokens = replace(tokens, teacher_logprobs_T=reference_T.flip(0), divergences_T=logprobs_T.square())
    return (per_token(weights_N, LENGTHS) * algorithm.per_token_loss(tokens)[0]).sum()


@pytest.mark.parametrize("estimator", ["k2", "k3", "k3_unbiased"])
@pytest.mark.parametrize(
    "preset", [preset for preset in PRESETS if preset not in (CISPO, DPPO, GSPOToken, VESPO)], ids=lambda p: p.__name__
)
def test_the_gradient_is_that_of_finite_differences(preset: type[Algorithm], estimator: Any) -> None:
    algorithm = preset(beta=0.3, kl=KL(estimator))  # type: ignore[call-arg]
    assert torch.autograd.gradcheck(
        lambda x: weighted_loss(algorithm, x), (STEADY.clone().requires_grad_(),), eps=1e-6, atol=1e-9
    )


@pytest.mark.parametrize(
    ("preset", "fixed"),
    [
        # What the paper holds fixed is computed once, at the point itself; the rest is differentiated numerically.
        (CISPO, lambda here, ratio_T: lambda x: -ratio_T.clamp(max=5) * x),
        (DPPO, lambda here, ratio_T: lambda x: -ratio_T.clamp(max=20) * x),
        (GSPOToken, lambda here, ratio_T: lambda x: -per_token(geometric_mean(ratio_T), LENGTHS) * (x - here).exp()),
        (VESPO, lambda here, ratio_T: lambda x: -gamma_weights(ratio_T) * x),
    ],
    ids=["CISPO", "DPPO", "GSPOToken", "VESPO"],
)
def test_with_stopped_parts_held_fixed_the_gradient_is_that_of_finite_differences(
    preset: type[Algorithm], fixed: Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]
) -> None:
    algorithm = preset(
        aggregation="token_mean", **({"epsilon_low": 0.9, "epsilon_high": 9.0} if preset is GSPOToken else {})
    )  # type: ignore[call-arg]
    here = STEADY.clone().requires_grad_()
    weighted_loss(algorithm, here).backward()
    advantages_T = per_token(torch.tensor([1.3, -0.4, 0.7, -1.1], dtype=torch.float64), LENGTHS)
    surrogate = fixed(STEADY, (STEADY + 2).exp())

    def loss(x: Tensor) -> float:
        return float((surrogate(x) * advantages_T).sum() / 8)

    steps = torch.eye(8, dtype=torch.float64) * 1e-6
    numerical = [(loss(STEADY + step) - loss(STEADY - step)) / 2e-6 for step in steps]
    assert here.grad is not None
    assert here.grad.tolist() == pytest.approx(numerical, abs=1e-9)


def geometric_mean(ratio_T: Tensor) -> Tensor:
    return torch.stack([part.log().mean().exp() for part in ratio_T.split(LENGTHS.tolist())])


def gamma_weights(ratio_T: Tensor) -> Tensor:
    """VESPO's of completions whose advantages are positive, negative, positive, negative."""
    w_N = torch.stack([part.prod() for part in ratio_T.split(LENGTHS.tolist())])
    k_N, lambda_N = torch.tensor([2.0, 3, 2, 3]).double(), torch.tensor([3.0, 2, 3, 2]).double()
    return per_token(w_N**k_N * (lambda_N * (1 - w_N)).exp(), LENGTHS)


# Defaults and options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "defaults"),
    [
        (
            GRPO(),
            {"epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.04, "scale": "group", "aggregation": "sequence_mean"},
        ),
        (
            DrGRPO(),
            {"epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0, "scale": "none", "aggregation": "constant_length"},
        ),
        (
            DAPO(),
            {"epsilon_low": 0.2, "epsilon_high": 0.28, "beta": 0.0, "scale": "group", "aggregation": "token_mean"},
        ),
        (TopEntropy(), {"epsilon_high": 0.28, "top_entropy": 0.2, "aggregation": "token_mean"}),
        (BNPO(), {"epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0, "aggregation": "token_mean"}),
        (GDPO(), {"epsilon_low": 0.2, "aggregation": "sequence_mean"}),
        (ReinforcePlusPlus(), {"kl": KL("k1", "reward"), "epsilon_high": 0.2, "aggregation": "token_mean"}),
        (ReinforcePlusPlusBaseline(), {"kl": KL("k2"), "aggregation": "token_mean"}),
        (RLOO(), {"kl": KL("k1", "reward"), "aggregation": "sequence_sum"}),
        (ReMax(), {"kl": KL("k1", "reward"), "aggregation": "sequence_sum"}),
        (OPO(), {"beta": 0.0, "aggregation": "sequence_sum"}),
        (MaxRL(), {"beta": 0.0, "aggregation": "sequence_sum"}),
        (GSPO(), {"epsilon_low": 3e-4, "epsilon_high": 4e-4, "beta": 0.0, "aggregation": "sequence_mean"}),
        (GSPOToken(), {"epsilon_low": 3e-4, "epsilon_high": 4e-4, "aggregation": "sequence_mean"}),
        (LUSPO(), {"epsilon_low": 2e-3, "epsilon_high": 2.5e-3, "aggregation": "sequence_sum"}),
        (GMPO(), {"log_epsilon_low": 0.4, "log_epsilon_high": 0.4, "scale": "group", "aggregation": "sequence_mean"}),
        (CISPO(), {"epsilon_high": 4.0, "scale": "group", "aggregation": "token_mean"}),
        (SAPO(), {"tau_positive": 1.0, "tau_negative": 1.05, "scale": "group", "aggregation": "sequence_mean"}),
        (
            DPPO(),
            {
                "delta_low": 0.15,
                "delta_high": 0.15,
                "maximum_ratio": 20.0,
                "scale": "none",
                "aggregation": "constant_length",
            },
        ),
        (DPPO(divergence="kl"), {"delta_low": 0.05, "delta_high": 0.05}),
        (
            ClipCov(),
            {"share": 2e-4, "omega_low": 1.0, "omega_high": 5.0, "epsilon_low": None, "aggregation": "token_mean"},
        ),
        (
            VESPO(),
            {
                "k_positive": 2.0,
                "lambda_positive": 3.0,
                "k_negative": 3.0,
                "lambda_negative": 2.0,
                "scale": "group",
                "aggregation": "token_mean",
            },
        ),
        (KLCov(), {"share": 2e-3, "coefficient": 1.0, "aggregation": "token_mean"}),
        (DRO(), {"tau": 0.05, "scale": "none", "aggregation": "sequence_sum"}),
        (PassK(), {"k": 2, "aggregation": "sequence_mean"}),
        (OnPolicyDistillation(), {"coefficient": 1.0, "reward_weight": 0.0, "aggregation": "token_mean"}),
        (GKD(), {"jsd_beta": 0.5, "coefficient": 1.0, "reward_weight": 0.0, "aggregation": "sequence_mean"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Algorithm) else "",
)
def test_the_defaults_are_the_papers(algorithm: Algorithm, defaults: dict[str, object]) -> None:
    assert {name: getattr(algorithm, name) for name in defaults} == defaults
    assert not algorithm.mask_truncated
    assert algorithm.needs_reference == isinstance(algorithm, GRPO)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
def test_a_preset_has_all_that_its_formulas_name(preset: type[Algorithm]) -> None:
    given = {"scores_PGF", "weights_F", "rewards_PG", "lengths_PG", "tokens"}
    given |= {"baseline_P"} if preset.needs_greedy_baseline else set()
    for formula in (preset.advantage_formula, preset.loss_formula):
        missing = {name for name in signature(formula).parameters if not hasattr(preset(), name)} - given
        assert not missing, formula


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
def test_the_docstring_cites_the_paper(preset: type[Algorithm]) -> None:
    assert "(arXiv:" in (preset.__doc__ or "") or ", arXiv:" in (preset.__doc__ or "")


COMMON = {
    "beta",
    "kl",
    "entropy_coefficient",
    "adaptive_entropy",
    "advantage_clip",
    "positive_coefficient",
    "mismatch",
    "off_policy_threshold",
    "aggregation",
    "constant_length",
    "mask_truncated",
}
CLIP = {"epsilon_low", "epsilon_high", "delta"}
OPTIONS = {
    **{preset: CLIP | {"scale", "top_entropy"} for preset in (GRPO, DrGRPO, DAPO, TopEntropy, GSPOToken)},
    **{preset: CLIP | {"top_entropy"} for preset in (BNPO, GDPO, ReinforcePlusPlus, ReinforcePlusPlusBaseline)},
    PassK: CLIP | {"top_entropy", "k"},
    **{preset: {"top_entropy"} for preset in (RLOO, OPO, ReMax, MaxRL)},
    **{preset: CLIP | {"scale"} for preset in (GSPO, LUSPO)},
    GMPO: {"log_epsilon_low", "log_epsilon_high", "scale"},
    CISPO: {"epsilon_high", "scale", "top_entropy"},
    SAPO: {"tau_positive", "tau_negative", "scale", "top_entropy"},
    DPPO: {"divergence", "delta_low", "delta_high", "maximum_ratio", "scale", "top_entropy"},
    ClipCov: {"share", "omega_low", "omega_high", "epsilon_low", "epsilon_high", "scale"},
    VESPO: {"k_positive", "lambda_positive", "k_negative", "lambda_negative", "scale", "top_entropy"},
    KLCov: {"share", "coefficient", "scale"},
    DRO: {"tau", "scale"},
    RAFT: {"minimum_reward", "top_entropy"},
    OnPolicyDistillation: {"coefficient", "reward_weight", "scale", "top_entropy"},
    GKD: {"jsd_beta", "coefficient", "reward_weight", "scale", "top_entropy"},
}


FIXED = {preset: {"mismatch"} for preset in (DPPO, VESPO)}
FIXED |= {preset: {"advantage_clip", "off_policy_threshold"} for preset in (GKD, OnPolicyDistillation)}
FIXED[RAFT] = {"advantage_clip", "off_policy_threshold", "mismatch", "positive_coefficient"}
"""Common options that these presets do not read, or that contradict their formulas."""


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--algorithm", type=Algorithm)
    return parser


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
def test_the_command_line_has_every_option_that_the_loss_reads_and_no_other(
    preset: type[Algorithm], parser: ArgumentParser
) -> None:
    path = f"stateset_lightning.algorithm.{preset.__name__}"
    arguments = [
        f"--algorithm={path}",
        "--algorithm.beta=0.5",
        "--algorithm.kl={estimator: k2, place: loss, target: 0.1}",
        "--algorithm.adaptive_entropy.target=0.3",
    ]
    config = parser.parse_args(arguments)
    assert set(vars(config.algorithm.init_args)) == (COMMON | OPTIONS[preset]) - FIXED.get(preset, set())
    algorithm = parser.instantiate(config).algorithm
    assert type(algorithm) is preset
    assert (algorithm.beta, algorithm.kl, algorithm.adaptive_entropy.target) == (0.5, KL("k2", target=0.1), 0.3)


BELOW_ITS_BOUND = {
    "beta": -1,
    "entropy_coefficient": -1,
    "advantage_clip": 0,
    "positive_coefficient": -1,
    "k_positive": -1,
    "lambda_positive": 0,
    "k_negative": -1,
    "lambda_negative": 0,
    "off_policy_threshold": 0,
    "constant_length": 0,
    "epsilon_low": 0,
    "epsilon_high": 0,
    "delta": 1,
    "top_entropy": 0,
    "k": 0,
    "log_epsilon_low": 0,
    "log_epsilon_high": 0,
    "tau_positive": 0,
    "tau_negative": 0,
    "delta_low": 0,
    "delta_high": 0,
    "maximum_ratio": 1,
    "share": 0,
    "coefficient": -1,
    "reward_weight": -1,
    "jsd_beta": -1,
    "tau": 0,
    "kl.target": 0,
    "kl.horizon": 0,
    "adaptive_entropy.delta": 0,
    "mismatch.high": 0,
}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
def test_the_command_line_holds_every_bound(preset: type[Algorithm], parser: ArgumentParser) -> None:
    options = (COMMON | OPTIONS[preset]) - FIXED.get(preset, set())
    for name, value in BELOW_ITS_BOUND.items():
        if name.split(".")[0] in options:
            with pytest.raises(Exception, match=r"should be greater than|greater_than"):
                parser.parse_args(
                    [f"--algorithm=stateset_lightning.algorithm.{preset.__name__}", f"--algorithm.{name}={value}"]
                )
        if name in OPTIONS[preset]:
            with pytest.raises(ConfigError, match=rf"algorithm\.{name}={value} must be (at least|above)"):
                preset(**{name: value})


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
def test_any_common_option_can_be_changed_by_itself(preset: type[Algorithm]) -> None:
    others = {} if "off_policy_threshold" in FIXED.get(preset, ()) else {"off_policy_threshold": 0.5}
    algorithm = preset(beta=0.2, kl=KL("k3"), aggregation="prompt_mean", mask_truncated=True, **others)  # type: ignore[call-arg]
    assert (algorithm.beta, algorithm.aggregation, algorithm.mask_truncated) == (0.2, "prompt_mean", True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GSPO(mismatch=Mismatch("token_tis")),
            r"kind='token_tis' weighs single tokens, and GSPO's ratio is of whole completions",
        ),
        (lambda: GMPO(mismatch=Mismatch("icepop")), r"kind='icepop' weighs single tokens, and GMPO's"),
        (lambda: DRO(mismatch=Mismatch("token_tis")), r"DRO's ratio is of whole completions"),
        (lambda: BNPO(beta=0.1, kl=KL("k1", "reward")), r"kl\.place='reward' does not go with BNPO"),
        (lambda: GDPO(beta=0.1, kl=KL("k1", "reward")), r"kl\.place='reward' does not go with GDPO"),
        (lambda: MaxRL(beta=0.1, kl=KL("k1", "reward")), r"kl\.place='reward' does not go with MaxRL"),
        (lambda: RAFT(beta=0.1, kl=KL("k1", "reward")), r"kl\.place='reward' does not go with RAFT"),
        (lambda: ClipCov(omega_low=5.0), r"omega_low=5\.0 must be below omega_high=5\.0"),
    ],
)
def test_contradictory_options_are_refused_and_say_why(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("preset", "option"),
    [
        (CISPO, "delta"),
        (CISPO, "epsilon_low"),
        (RLOO, "scale"),
        (GSPO, "top_entropy"),
        (DPPO, "mismatch"),
        (VESPO, "mismatch"),
        (OPO, "epsilon_low"),
        (GKD, "advantage_clip"),
        (RAFT, "advantage_clip"),
        (RAFT, "positive_coefficient"),
    ],
)
def test_an_option_that_a_loss_does_not_read_does_not_exist(preset: type[Algorithm], option: str) -> None:
    with pytest.raises(TypeError, match=option):
        preset(**{option: 0.5})


@pytest.mark.parametrize("kind", ["sequence_tis", "sequence_mask", "product_mask"])
def test_sequence_corrections_go_with_sequence_ratios(kind: Any) -> None:
    assert GSPO(mismatch=Mismatch(kind)).mismatch == Mismatch(kind)


def test_grpo_without_kl_needs_no_reference() -> None:
    assert not GRPO(beta=0).needs_reference


def test_bnpo_refuses_total_rewards_outside_zero_and_one() -> None:
    with pytest.raises(ValueError, match=r"got 0 to 2"):
        BNPO().advantages(torch.tensor([[[1.0], [0.0]]]), torch.tensor([2.0]))
