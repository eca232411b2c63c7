"""Each preset as its paper defines it: defaults, and a loss with its gradient worked out by hand.

The case: one prompt with rewards (1, 0), completions of 1 and 3 tokens, a second prompt with rewards (1, 1) and 2 tokens each. Ratios
are 1.5 for the first token, 1.25 for the last of the second completion, 1 elsewhere.
"""

import math

import pytest
import torch

from stateset_lightning.algorithm import BNPO, DAPO, GRPO, Algorithm, DrGRPO, TokenBatch
from stateset_lightning.algorithm.losses import per_token

LENGTHS = torch.tensor([1, 3, 2, 2])
RATIOS = torch.tensor([1.5, 1.0, 1.0, 1.25, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
REWARDS = torch.tensor([[[1.0], [0.0]], [[1.0], [1.0]]])
SIGMA = math.sqrt(0.5) + 1e-4  # of (1, 0): deviations +-1/2, variance 1/4 + 1/4


def loss_and_gradient(algorithm: Algorithm, reference_gap: float = 0.0) -> tuple[float, list[float]]:
    """The loss of the case and its gradient with respect to the log-probs; the reference's are `reference_gap` above the policy's."""
    algorithm.setup(max_new_tokens=10)
    logprobs_T = (RATIOS.log() - 2).requires_grad_()
    advantages_PG = algorithm.advantages(REWARDS, torch.ones(1))
    weights_N = algorithm.token_weights(LENGTHS, torch.tensor([0, 0, 1, 1]))
    tokens = TokenBatch(
        logprobs_T,
        torch.full_like(logprobs_T, -2),
        advantages_PG.flatten(),
        LENGTHS,
        ref_logprobs_T=logprobs_T.detach() + reference_gap,
    )
    loss = (per_token(weights_N, LENGTHS) * algorithm.per_token_loss(tokens)[0]).sum()
    loss.backward()
    assert logprobs_T.grad is not None
    return loss.item(), logprobs_T.grad.tolist()


def test_grpo() -> None:
    # Advantages +-1/2 over sigma; four completions, so a token weighs 1/4, 1/12, 1/8, 1/8.
    # The first token's ratio 1.5 is bounded at 1.2 (no gradient); the fourth's 1.25 is not, its advantage being negative.
    a = 0.5 / SIGMA
    value = -1.2 * a / 4 + (1 + 1 + 1.25) * a / 12
    gradient = [0, a / 12, a / 12, 1.25 * a / 12, 0, 0, 0, 0]
    loss, slope = loss_and_gradient(GRPO(beta=0))
    assert loss == pytest.approx(value)
    assert slope == pytest.approx(gradient)


def test_grpo_with_the_papers_kl() -> None:
    # A reference log 2 above the policy: k3 = 2 - log 2 - 1 per token, gradient 1 - 2 = -1. The weights sum to 1 over all tokens.
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
    # Mean rewards 1/2 and 1: mean 3/4, variance 1/16; a + b = (3/16) / (1/16) - 1 = 2, a = 3/2, b = 1/2; alpha = 3/2, beta = 7/6.
    # Density at 1/2 by the definition of the Beta function; advantages +-1/2 over it; every token weighs 1/8.
    density = math.gamma(3 / 2 + 7 / 6) / (math.gamma(3 / 2) * math.gamma(7 / 6)) * 0.5 ** (1 / 2) * 0.5 ** (1 / 6)
    a = 0.5 / density
    value = -1.2 * a / 8 + (1 + 1 + 1.25) * a / 8
    gradient = [0, a / 8, a / 8, 1.25 * a / 8, 0, 0, 0, 0]
    loss, slope = loss_and_gradient(BNPO())
    assert loss == pytest.approx(value, rel=1e-6)
    assert slope == pytest.approx(gradient, rel=1e-6)


@pytest.mark.parametrize(
    ("preset", "defaults"),
    [
        (GRPO, (0.2, 0.2, 0.04, "group", "sequence_mean")),
        (DrGRPO, (0.2, 0.2, 0.0, "none", "constant_length")),
        (DAPO, (0.2, 0.28, 0.0, "group", "token_mean")),
        (BNPO, (0.2, 0.2, 0.0, "none", "token_mean")),
    ],
)
def test_the_defaults_are_the_papers(preset: type[Algorithm], defaults: tuple[object, ...]) -> None:
    algorithm = preset()
    assert (algorithm.epsilon_low, algorithm.epsilon_high, algorithm.beta, algorithm.scale, algorithm.aggregation) == defaults
    assert not algorithm.mask_truncated
    assert algorithm.needs_reference == (preset is GRPO)


@pytest.mark.parametrize(("preset", "paper"), [(GRPO, "2402.03300"), (DrGRPO, "2503.20783"), (DAPO, "2503.14476"), (BNPO, "2506.02864")])
def test_the_docstring_cites_the_paper(preset: type[Algorithm], paper: str) -> None:
    assert f"arXiv:{paper}" in (preset.__doc__ or "")


@pytest.mark.parametrize("preset", [GRPO, DrGRPO, DAPO, BNPO])
def test_any_field_can_be_changed_by_itself(preset: type[Algorithm]) -> None:
    algorithm = preset(epsilon_low=0.1, epsilon_high=0.5, beta=0.2, aggregation="sequence_sum", mask_truncated=True)
    assert (algorithm.epsilon_low, algorithm.epsilon_high, algorithm.beta) == (0.1, 0.5, 0.2)
    assert algorithm.aggregation == "sequence_sum"
    assert algorithm.mask_truncated


def test_grpo_without_kl_needs_no_reference() -> None:
    assert not GRPO(beta=0).needs_reference


def test_bnpo_refuses_total_rewards_outside_zero_and_one() -> None:
    with pytest.raises(ValueError, match=r"got 0 to 2"):
        BNPO().advantages(torch.tensor([[[1.0], [0.0]]]), torch.tensor([2.0]))
