"""Sums and weights of tokens by hand, and that a loss is the same however an optimizer step is split."""

import inspect
from dataclasses import replace

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from stateset_lightning import algorithm as algorithms
from stateset_lightning.algorithm import GRPO, Algorithm, TokenBatch
from stateset_lightning.algorithm.aggregation import (
    per_token,
    sequence_means,
    sequence_sums,
    token_advantages,
    token_weights,
)

AGGREGATIONS = ("sequence_mean", "token_mean", "sequence_sum", "constant_length", "prompt_mean")
EXPORTED = list(vars(algorithms).values())
PRESETS = [found for found in EXPORTED if isinstance(found, type) and issubclass(found, Algorithm)]


# Completions and their tokens -----------------------------------------------------------------------------------------

PACKED = torch.tensor([2, 0, 3])


def test_a_value_per_completion_is_repeated_for_its_tokens() -> None:
    assert per_token(torch.tensor([1.5, -2.0, 7.0]), PACKED).tolist() == [1.5, 1.5, 7.0, 7.0, 7.0]


def test_sums_and_means_by_completion() -> None:
    values_T = torch.tensor([1.0, 2.0, 3.0, 4.0, 8.0])
    assert sequence_sums(values_T, PACKED).tolist() == [3.0, 0.0, 15.0]
    assert sequence_means(values_T, PACKED).tolist() == [1.5, 0.0, 5.0]


def test_a_token_has_its_own_advantage_where_there_is_one() -> None:
    tokens = TokenBatch(torch.zeros(3), torch.zeros(3), torch.tensor([2.0, -1.0]), torch.tensor([1, 2]))
    assert token_advantages(tokens).tolist() == [2.0, -1.0, -1.0]
    own_T = torch.tensor([0.5, 3.0, -4.0])
    assert token_advantages(replace(tokens, advantages_T=own_T)).tolist() == [0.5, 3.0, -4.0]


def test_a_mean_shares_its_gradient_among_the_tokens() -> None:
    values_T = torch.ones(5, dtype=torch.float64, requires_grad=True)
    (sequence_means(values_T, PACKED) * torch.tensor([1.0, 1.0, 6.0])).sum().backward()
    assert values_T.grad is not None
    assert values_T.grad.tolist() == [0.5, 0.5, 2.0, 2.0, 2.0]


def test_nothing_gives_nothing() -> None:
    assert sequence_sums(torch.zeros(0), torch.zeros(0, dtype=torch.long)).tolist() == []


# The weight of a token ------------------------------------------------------------------------------------------------


def weights(
    lengths: list[int],
    trains: list[bool],
    aggregation: str,
    groups: list[int] | None = None,
    constant: int | None = None,
) -> list[float]:
    groups = groups if groups is not None else [0] * len(lengths)
    return token_weights(
        torch.tensor(lengths),
        torch.tensor(groups, dtype=torch.long),
        torch.tensor(trains, dtype=torch.bool),
        aggregation,  # type: ignore[arg-type]
        constant,
    ).tolist()


# Three completions of 2, 4 and 6 tokens train; one of 8 does not. Of two prompts, the first has 2 + 4 tokens, the
# second 6.
LENGTHS, TRAINS, GROUPS = [2, 4, 8, 6], [True, True, False, True], [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("sequence_mean", [1 / (3 * 2), 1 / (3 * 4), 0, 1 / (3 * 6)]),
        ("token_mean", [1 / 12, 1 / 12, 0, 1 / 12]),
        ("sequence_sum", [1 / 3, 1 / 3, 0, 1 / 3]),
        ("constant_length", [1 / 30, 1 / 30, 0, 1 / 30]),
        ("prompt_mean", [1 / (2 * 6), 1 / (2 * 6), 0, 1 / (2 * 6)]),
    ],
)
def test_weights_by_hand(aggregation: str, expected: list[float]) -> None:
    assert weights(
        LENGTHS, TRAINS, aggregation, GROUPS, 10 if aggregation == "constant_length" else None
    ) == pytest.approx(expected)


def test_a_prompt_none_of_whose_completions_train_is_not_counted() -> None:
    # The second prompt has 3 tokens and the first 1; the third and its number do not count.
    assert weights([1, 3, 5, 5], [True, True, False, False], "prompt_mean", [7, 3, 9, 9]) == pytest.approx(
        [1 / 2, 1 / 6, 0, 0]
    )


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_an_empty_completion_weighs_nothing_and_is_not_counted(aggregation: str) -> None:
    constant = 10 if aggregation == "constant_length" else None
    first, last = weights([2, 4], [True, True], aggregation, [0, 2], constant)
    assert weights([2, 0, 4], [True, True, True], aggregation, [0, 1, 2], constant) == pytest.approx([first, 0.0, last])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_that_trains_gives_zeros(aggregation: str) -> None:
    constant = 10 if aggregation == "constant_length" else None
    assert weights([2, 4], [False, False], aggregation, constant=constant) == [0.0, 0.0]
    assert weights([], [], aggregation, constant=constant) == []


def test_a_constant_length_must_be_known() -> None:
    with pytest.raises(ValueError, match="needs `constant_length`"):
        weights([1], [True], "constant_length")


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "prompt_mean"])
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=12), data=st.data())
def test_a_mean_of_ones_is_one(aggregation: str, lengths: list[int], data: st.DataObject) -> None:
    trains = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    groups = data.draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    total = sum(w * length for w, length in zip(weights(lengths, trains, aggregation, groups), lengths, strict=True))
    assert total == pytest.approx(1.0 if any(trains) else 0.0)


def check_a_split(algorithm: Algorithm, number: int, generator: torch.Generator) -> None:
    lengths_N = torch.randint(1, 7, (number,), generator=generator)
    parts_N = torch.randint(0, 4, (number,), generator=generator)
    trains_N = torch.rand(number, generator=generator) < 0.8
    total = int(lengths_N.sum())
    logprobs_T = -torch.rand(total, generator=generator, dtype=torch.float64) * 3
    old_T, ref_T, sampling_T = (
        logprobs_T + torch.randn(total, generator=generator, dtype=torch.float64) * 0.3 for _ in range(3)
    )
    advantages_N = torch.randn(number, generator=generator, dtype=torch.float64)
    weights_N = algorithm.token_weights(lengths_N, torch.arange(number) // 2, trains_N)

    def batch(rows_N: Tensor, leaf_T: Tensor, select_T: Tensor | None) -> TokenBatch:
        rows_T = rows_N.repeat_interleave(lengths_N)
        return TokenBatch(
            leaf_T[rows_T],
            old_T[rows_T],
            advantages_N[rows_N],
            lengths_N[rows_N],
            ref_logprobs_T=ref_T[rows_T],
            sampling_logprobs_T=sampling_T[rows_T],
            entropies_T=leaf_T.square()[rows_T],
            select_T=None if select_T is None else select_T[rows_T],
            teacher_logprobs_T=ref_T[rows_T],
            divergences_T=leaf_T.square()[rows_T],
        )

    select_T = torch.ones(total, dtype=torch.bool)
    if algorithm.selects_tokens:
        select_T[trains_N.repeat_interleave(lengths_N)] = algorithm.select(batch(trains_N, logprobs_T, None), seed=3)

    def loss_and_gradient(rows_N: Tensor) -> tuple[Tensor, Tensor]:
        leaf_T = logprobs_T.clone().requires_grad_()
        loss_T, _ = algorithm.per_token_loss(batch(rows_N, leaf_T, select_T))
        loss = (per_token(weights_N[rows_N], lengths_N[rows_N]) * loss_T).sum()
        loss.backward()
        assert leaf_T.grad is not None
        return loss.detach(), leaf_T.grad

    whole = loss_and_gradient(trains_N)
    pieces = [loss_and_gradient(trains_N & (parts_N == part)) for part in range(4)]
    torch.testing.assert_close(torch.stack([loss for loss, _ in pieces]).sum(), whole[0], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(
        torch.stack([gradient for _, gradient in pieces]).sum(0), whole[1], atol=1e-12, rtol=1e-12
    )


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
def test_any_split_into_micro_steps_sums_to_the_whole(preset: type[Algorithm], aggregation: str) -> None:
    """Loss and gradient of an optimizer step are the sums over its micro-steps, with every term that exists."""
    has_threshold = "off_policy_threshold" in inspect.signature(preset).parameters
    terms = {"off_policy_threshold": 0.05} if has_threshold else {}
    algorithm = preset(aggregation=aggregation, beta=0.1, entropy_coefficient=0.01, **terms)  # type: ignore[call-arg]
    algorithm.setup(max_new_tokens=6)
    generator = torch.Generator().manual_seed(1)
    for number in (2, 5, 9):
        check_a_split(algorithm, number, generator)


def test_weights_are_float64() -> None:
    lengths_N = torch.tensor([3, 5])
    assert GRPO().token_weights(lengths_N, torch.tensor([0, 0])).dtype == torch.float64
