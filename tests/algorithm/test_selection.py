"""Selections of tokens: how many, which, and that they draw from their own seed alone."""

import pytest
import torch

from stateset_lightning.algorithm import ClipCov, KLCov, TokenBatch
from stateset_lightning.algorithm.selection import covariances, draw, largest, top_entropy_tokens


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
