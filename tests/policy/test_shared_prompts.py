"""Attention over shared prompts against attention over a copy of the prompt for every row."""

import math

import pytest
import torch
from torch import Tensor

from stateset_lightning.policy.packed_attention import SharedPrompts

K, R, D = 2, 3, 4
"""Key heads, query heads per key head, size of a head."""


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(lengths: list[int], prompt_of_row: list[int], starts: list[int], seed: int = 0) -> SharedPrompts:
    keys, values = (numbers(len(lengths), K, max(lengths), D, seed=seed + i) for i in (0, 1))
    return SharedPrompts([keys], [values], torch.tensor(lengths), torch.tensor(prompt_of_row), torch.tensor(starts))


def oracle(prompts: SharedPrompts, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Row by row, over the prompt's real tokens and the row's own."""
    outputs = []
    for row, prompt in enumerate(prompts.prompt_of_row_B.tolist()):
        length, start = int(prompts.lengths_P[prompt]), int(prompts.starts_B[row])
        keys, values = (
            torch.cat(
                [layers[0][prompt, :, layers[0].shape[2] - length :], own[row, :, start:]], dim=1
            ).repeat_interleave(R, 0)
            for layers, own in ((prompts.keys, key), (prompts.values, value))
        )
        weights = (query[row] @ keys.transpose(-1, -2) * scaling).softmax(-1)
        outputs.append((weights @ values).transpose(0, 1))
    return torch.stack(outputs)


def assert_exact(prompts: SharedPrompts, columns: int = 5) -> None:
    rows = len(prompts.prompt_of_row_B)
    query, key, value = (
        numbers(rows, K * R, 1, D, seed=5),
        numbers(rows, K, columns, D, seed=6),
        numbers(rows, K, columns, D, seed=7),
    )
    output = prompts.attend(0, query, key, value, 0.7)
    assert output.shape == (rows, 1, K * R, D)
    torch.testing.assert_close(output, oracle(prompts, query, key, value, 0.7), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("lengths", "prompt_of_row", "starts"),
    [
        ([3], [0], [0]),
        ([3, 3], [0, 0, 1, 1], [0, 0, 0, 0]),
        ([4, 1, 2], [0, 0, 0, 1, 2, 2], [0, 0, 0, 0, 0, 0]),  # prompts and groups of unequal size
        ([2, 5], [1, 0, 1, 0], [0, 3, 0, 4]),  # rows in any order, and some that came later
    ],
)
def test_output_is_that_over_copies(lengths: list[int], prompt_of_row: list[int], starts: list[int]) -> None:
    assert_exact(make(lengths, prompt_of_row, starts))


def test_a_hand_computed_step() -> None:
    # One head of size one. The prompt's two keys are 0; the row's own key is ln 2: weights 1/4, 1/4, 1/2.
    prompts = SharedPrompts(
        [torch.zeros(1, 1, 2, 1)], [torch.tensor([4.0, 8.0]).view(1, 1, 2, 1)], *map(torch.tensor, ([2], [0], [0]))
    )
    own_key, own_value = torch.full((1, 1, 1, 1), math.log(2)), torch.full((1, 1, 1, 1), 10.0)
    assert prompts.attend(0, torch.ones(1, 1, 1, 1), own_key, own_value, 1.0).item() == pytest.approx(8.0)


def test_prompts_without_rows_leave() -> None:
    selected = make([4, 1, 2], [0, 0, 1, 2, 2], [0, 0, 0, 1, 1]).select(torch.tensor([0, 4]))
    assert selected.lengths_P.tolist() == [4, 2]
    assert selected.keys[0].shape == (2, K, 4, D)
    assert selected.prompt_of_row_B.tolist() == [0, 1]
    assert selected.starts_B.tolist() == [0, 1]
    assert_exact(selected)


@pytest.mark.parametrize("newcomers", [[2], [6, 3]])
def test_prompts_join(newcomers: list[int]) -> None:
    first, other = make([4, 3], [0, 1, 1], [2, 3, 2]), make(newcomers, [0, 0, len(newcomers) - 1], [0, 0, 0], seed=20)
    joined = first.join(other, first=2, column=3)
    assert joined.lengths_P.tolist() == [4, 3, *newcomers]
    assert joined.starts_B.tolist() == [0, 1, 0, 3, 3, 3]
    assert_exact(joined)
