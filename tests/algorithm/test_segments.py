"""Completions and their tokens."""

import torch

from stateset_lightning.algorithm.segments import per_token, sequence_means, sequence_sums

LENGTHS = torch.tensor([2, 0, 3])


def test_a_value_per_completion_is_repeated_for_its_tokens() -> None:
    assert per_token(torch.tensor([1.5, -2.0, 7.0]), LENGTHS).tolist() == [1.5, 1.5, 7.0, 7.0, 7.0]


def test_sums_and_means_by_completion() -> None:
    values_T = torch.tensor([1.0, 2.0, 3.0, 4.0, 8.0])
    assert sequence_sums(values_T, LENGTHS).tolist() == [3.0, 0.0, 15.0]
    assert sequence_means(values_T, LENGTHS).tolist() == [1.5, 0.0, 5.0]


def test_a_mean_shares_its_gradient_among_the_tokens() -> None:
    values_T = torch.ones(5, dtype=torch.float64, requires_grad=True)
    (sequence_means(values_T, LENGTHS) * torch.tensor([1.0, 1.0, 6.0])).sum().backward()
    assert values_T.grad is not None
    assert values_T.grad.tolist() == [0.5, 0.5, 2.0, 2.0, 2.0]


def test_nothing_gives_nothing() -> None:
    assert sequence_sums(torch.zeros(0), torch.zeros(0, dtype=torch.long)).tolist() == []
