"""Attention over packed groups and over shared prompts, against plain attention: a mask in full, a copy per row."""

import math
from contextlib import nullcontext

import pytest
import torch
from plain_kernels import plain_kernels
from torch import Tensor

from stateset_lightning.policy import packed_attention as packed_attention_file
from stateset_lightning.policy.packed_attention import ARGUMENT, Layout, packed_attention
from stateset_lightning.policy.shared_prompts import SharedPrompts

CPU = torch.device("cpu")
CASES = [
    ([3], [[2, 4, 1]]),
    ([1], [[1]]),
    ([4, 2, 5], [[3, 3], [1, 6, 2], [5]]),
    ([3, 4], [[], [2, 2]]),  # a prompt without completions
    ([2, 2], [[3, 1], [3, 2]]),  # groups that share a mask
]


def visible(prompts: list[int], completions: list[list[int]], window: int | None = None) -> Tensor:
    """Who sees whom, bool [S, S], from the rule: same group, the prompt or the same completion, not later.

    With a window, and not further away than that.
    """
    labels = []  # group, completion (-1 for the prompt), place
    for g, (prompt, lengths) in enumerate(zip(prompts, completions, strict=True)):
        labels += [(g, -1, i) for i in range(prompt)]
        for c, length in enumerate(lengths):
            labels += [(g, c, prompt + i) for i in range(length)]
    return torch.tensor(
        [
            [
                i >= j and a[0] == b[0] and b[1] in (-1, a[1]) and (window is None or a[2] - b[2] < window)
                for j, b in enumerate(labels)
            ]
            for i, a in enumerate(labels)
        ]
    )


def oracle(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    weights = (query @ key.transpose(-1, -2) * scaling).masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize(("prompts", "completions"), CASES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(("scaling", "recompute_from"), [(None, 10**9), (0.9, 0), (0.9, None)])
def test_output_and_gradients_are_those_under_the_whole_mask(
    prompts: list[int],
    completions: list[list[int]],
    kv_heads: int,
    scaling: float | None,
    recompute_from: int | None,
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In buckets, and by a GPU's kernels (None)."""
    monkeypatch.setattr(packed_attention_file, "RECOMPUTE_FROM", recompute_from)
    total = sum(prompts) + sum(map(sum, completions))
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, heads, total, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (4, kv_heads, kv_heads)
    ]
    weights = torch.randn(1, total, 4, 8, generator=generator, dtype=torch.float64)
    arguments = {ARGUMENT: Layout(prompts, completions, CPU)}
    with plain_kernels() if recompute_from is None else nullcontext():
        output, attention = packed_attention(
            torch.nn.Module(), *inputs, None, scaling=scaling, sliding_window=window, **arguments
        )
        got = torch.autograd.grad((output * weights).sum(), inputs)
    assert attention is None
    expected = oracle(*inputs, visible(prompts, completions, window), scaling or 1 / math.sqrt(8))
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)
    for ours, theirs in zip(got, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_without_a_layout_it_is_plain_sdpa() -> None:
    module = torch.nn.Module()
    module.is_causal = True  # type: ignore[assignment]
    query, key, value = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(1)).unbind(0)
    causal, _ = packed_attention(module, query, key, value, None)
    torch.testing.assert_close(
        causal,
        oracle(query, key, value, torch.ones(5, 5, dtype=torch.bool).tril(), 1 / math.sqrt(8)),
        atol=1e-6,
        rtol=0,
    )
    mask = torch.tensor([[True, False, True, False, True]]).expand(5, 5)
    masked, _ = packed_attention(module, query, key, value, mask[None, None])
    torch.testing.assert_close(masked, oracle(query, key, value, mask, 1 / math.sqrt(8)), atol=1e-6, rtol=0)


def test_a_layout_says_where_each_token_lies() -> None:
    layout = Layout([2, 1], [[2, 1], [1]], CPU)  # p p a a b | q c
    (bucket,) = layout.rows[0]
    assert bucket.prompts_PL.tolist() == [[5, 5], [0, 1]]  # shorter prompts first; a row is padded with its last place
    assert bucket.queries_RM.tolist() == [[6, 6], [2, 3], [4, 4]]
    assert bucket.keys_RK.tolist() == [[5, 5, 6, 6], [0, 1, 2, 3], [0, 1, 4, 4]]
    assert bucket.mask[0, 0].int().tolist() == [[1, 0, 1, 0], [1, 0, 1, 1]]
    assert bucket.mask[1, 0].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    flat = torch.cat([bucket.prompts_PL.flatten(), bucket.queries_RM.flatten()])
    assert flat[layout.rows[1]].tolist() == list(range(7))


def test_equally_long_prompts_share_one_mask() -> None:
    (bucket,) = Layout([2, 2], [[3, 1], [3]], CPU).rows[0]
    assert bucket.mask.shape == (1, 1, 3, 5)


def test_small_groups_share_a_bucket_and_large_ones_do_not() -> None:
    assert len(Layout([8] * 16, [[8] * 16] * 16, CPU).rows[0]) == 1  # 256 rows of 16 keys
    assert len(Layout([8] * 17, [[8] * 16] * 17, CPU).rows[0]) == 2
    assert len(Layout([4096, 4096], [[1], [1]], CPU).rows[0]) == 2
    lengths = [len(bucket.prompts_PL) for bucket in Layout([900, 3, 901, 4], [[4] * 2] * 4, CPU).rows[0]]
    assert lengths == [2, 2]  # like beside like: the long ones do not pad the short ones


def test_a_prompt_without_completions_has_no_rows() -> None:
    (bucket,) = Layout([3], [[]], CPU).rows[0]
    assert bucket.mask.numel() == 0
    assert bucket.queries_RM.shape == (0, 0)


# Shared prompts
# ----------------------------------------------------------------------------------------------------------------------

K, R, D = 2, 3, 4
"""Key heads, query heads per key head, size of a head."""


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_prompts(lengths: list[int], prompt_of_row: list[int], starts: list[int], seed: int = 0) -> SharedPrompts:
    keys, values = (numbers(len(lengths), K, max(lengths), D, seed=seed + i) for i in (0, 1))
    return SharedPrompts([keys], [values], torch.tensor(lengths), torch.tensor(prompt_of_row), torch.tensor(starts))


def copied(prompts: SharedPrompts, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
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
    torch.testing.assert_close(output, copied(prompts, query, key, value, 0.7), atol=1e-12, rtol=0)


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
    assert_exact(make_prompts(lengths, prompt_of_row, starts))


def test_a_hand_computed_step() -> None:
    # One head of size one. The prompt's two keys are 0; the row's own key is ln 2: weights 1/4, 1/4, 1/2.
    prompts = SharedPrompts(
        [torch.zeros(1, 1, 2, 1)], [torch.tensor([4.0, 8.0]).view(1, 1, 2, 1)], *map(torch.tensor, ([2], [0], [0]))
    )
    own_key, own_value = torch.full((1, 1, 1, 1), math.log(2)), torch.full((1, 1, 1, 1), 10.0)
    assert prompts.attend(0, torch.ones(1, 1, 1, 1), own_key, own_value, 1.0).item() == pytest.approx(8.0)


def test_prompts_without_rows_leave() -> None:
    selected = make_prompts([4, 1, 2], [0, 0, 1, 2, 2], [0, 0, 0, 1, 1]).select(torch.tensor([0, 4]))
    assert selected.lengths_P.tolist() == [4, 2]
    assert selected.keys[0].shape == (2, K, 4, D)
    assert selected.prompt_of_row_B.tolist() == [0, 1]
    assert selected.starts_B.tolist() == [0, 1]
    assert_exact(selected)


@pytest.mark.parametrize("newcomers", [[2], [6, 3]])
def test_prompts_join(newcomers: list[int]) -> None:
    first, other = (
        make_prompts([4, 3], [0, 1, 1], [2, 3, 2]),
        make_prompts(newcomers, [0, 0, len(newcomers) - 1], [0, 0, 0], seed=20),
    )
    joined = first.join(other, first=2, column=3)
    assert joined.lengths_P.tolist() == [4, 3, *newcomers]
    assert joined.starts_B.tolist() == [0, 1, 0, 3, 3, 3]
    assert_exact(joined)
