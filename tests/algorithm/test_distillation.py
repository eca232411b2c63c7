"""Distillation by hand: advantages of sampled tokens, divergences of distributions, and their gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from stateset_lightning.algorithm import GKD, KL, OnPolicyDistillation, TokenBatch
from stateset_lightning.errors import ConfigError

LENGTHS = torch.tensor([1, 2])
NAN = math.nan


def tokens(old: list[float], teacher: list[float], advantages: list[float], moved: float = 0.0) -> TokenBatch:
    """Three tokens whose log-probs have moved since they were sampled."""
    old_T = torch.tensor(old, dtype=torch.float64)
    logprobs_T = (old_T + moved).requires_grad_()
    teacher_T = torch.tensor(teacher, dtype=torch.float64)
    return TokenBatch(logprobs_T, old_T, torch.tensor(advantages), LENGTHS, teacher_logprobs_T=teacher_T)


@pytest.mark.parametrize("moved", [0.0, math.log(1.5)])
def test_the_advantage_of_a_token_is_what_the_teacher_would_rather_have_seen(moved: float) -> None:
    # Reward part 2 and -1 (the second completion has two tokens); the teacher's part half of +1, -1, 0.
    batch = tokens([-2.0, -1.0, -3.0], [-1.0, -2.0, -3.0], [2.0, -1.0], moved)
    loss_T, metrics = OnPolicyDistillation(coefficient=0.5, reward_weight=1.0).per_token_loss(batch)
    advantages, ratio = [2.5, -1.5, -1.0], math.exp(moved)
    assert loss_T.tolist() == pytest.approx([-ratio * a for a in advantages])
    loss_T.sum().backward()
    assert batch.logprobs_T.grad is not None
    assert batch.logprobs_T.grad.tolist() == pytest.approx(
        [-ratio * a for a in advantages]
    )  # teacher and old are fixed
    total, count = metrics["policy/teacher_kl"]
    assert (float(total), count) == (pytest.approx(-1 + 1 + 0), 3)


def test_a_teacher_that_is_the_student_says_nothing() -> None:
    batch = tokens([-2.0, -1.0, -3.0], [-2.0, -1.0, -3.0], [0.0, 0.0])
    assert OnPolicyDistillation().per_token_loss(batch)[0].tolist() == [0, 0, 0]


REWARDS = torch.tensor([[[1.0], [0.0]], [[1.0], [1.0]], [[NAN], [0.0]]])
"""A mixed group, a constant one, one with a reward that failed."""


def test_a_gap_is_bounded_at_20_nats_and_none_where_the_teacher_does_not_know() -> None:
    loss_T, metrics = OnPolicyDistillation().per_token_loss(tokens([-2.0, -1.0, -3.0], [-300.0, NAN, -4.0], [0.0, 0.0]))
    assert loss_T.tolist() == [20, 0, 1]
    assert metrics["policy/teacher_kl"] == (21, 2)
    assert metrics["policy/teacher_unknown"] == (1, 3)


@pytest.mark.parametrize("preset", [OnPolicyDistillation, GKD])
def test_the_reward_enters_by_weight(preset: Any) -> None:
    assert preset().advantages(REWARDS, torch.ones(1)).tolist() == [[0, 0]] * 3  # all are distilled, the failed one too
    mixed = preset(reward_weight=0.5, scale="none").advantages(REWARDS, torch.ones(1))
    assert mixed[:2].tolist() == [[0.25, -0.25], [0, 0]]
    assert mixed[2].isnan().all()
    assert preset().trains_on_zero_advantage
    with pytest.raises(ConfigError, match=r"kl\.place=.reward. does not go with"):
        preset(beta=0.1, kl=KL("k1", "reward"))


def test_divergences_by_hand() -> None:
    # The policy (1/2, 1/2), the teacher (1/4, 3/4).
    policy, teacher = torch.tensor([[0.5, 0.5]]).double(), torch.tensor([[0.25, 0.75]]).double()
    forward = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    reverse = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    m = 0.2 * 0.25 + 0.8 * 0.5, 0.2 * 0.75 + 0.8 * 0.5
    mixed = 0.2 * (0.25 * math.log(0.25 / m[0]) + 0.75 * math.log(0.75 / m[1]))
    mixed += 0.8 * (0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1]))
    for beta, value in ((0.0, forward), (1.0, reverse), (0.2, mixed)):
        got = GKD(jsd_beta=beta).divergence(policy.log(), teacher.log())[0]
        assert got.item() == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("beta", [0.0, 1e-3, 0.1, 0.5, 0.9, 1.0])
def test_the_gradient_is_that_of_autograd_and_zero_where_teacher_and_policy_agree(beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, theirs = (4 * torch.randn(5, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    teacher = theirs.log_softmax(-1)
    logits.requires_grad_()
    logps = logits.log_softmax(-1)
    values, gradient = GKD(jsd_beta=beta).divergence(logps, teacher)
    p, q = logps.exp(), teacher.exp()
    log_m = (beta * q + (1 - beta) * p).log()
    plain = beta * (q * (teacher - log_m)).sum(-1) + (1 - beta) * (p * (logps - log_m)).sum(-1)
    plain = {0.0: (q * (teacher - logps)).sum(-1), 1.0: (p * (logps - teacher)).sum(-1)}.get(beta, plain)
    torch.testing.assert_close(values, plain, atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain.sum(), logits)[0], atol=1e-12, rtol=0)
    same, none = GKD(jsd_beta=beta).divergence(teacher.float(), teacher.float())
    assert float(same.abs().max()) < 1e-7
    assert float(none.abs().max()) < 1e-7


def test_a_certain_teacher_and_a_policy_that_excludes_its_token_stay_finite() -> None:
    policy, teacher = torch.tensor([[0.0, -200.0]]).log_softmax(-1), torch.tensor([[-200.0, 0.0]]).log_softmax(-1)
    values, gradient = GKD(jsd_beta=0.5).divergence(policy, teacher)
    assert values.item() == pytest.approx(math.log(2), abs=1e-6)
    assert gradient.isfinite().all()


def test_a_divergence_is_added_to_the_rewards_loss() -> None:
    batch = tokens([-2.0, -1.0, -3.0], [0.0, 0.0, 0.0], [2.0, -1.0])
    batch = replace(batch, divergences_T=torch.ones(3))
    loss_T, metrics = GKD(coefficient=3.0).per_token_loss(batch)
    assert loss_T.tolist() == pytest.approx([3 - 2, 3 + 1, 3 + 1])
    assert [float(x) for x in metrics["policy/divergence"]] == [3, 3]
