"""Attention over packed groups against attention with the whole mask written out."""

import math

import pytest
import torch
from torch import Tensor

import stateset_lightning.policy.prefix_attention as prefix_attention_file
from stateset_lightning.policy.prefix_attention import LAYOUT_ARGUMENT, make_layout, prefix_attention

CPU = torch.device("cpu")
CASES = [
    ([3], [[2, 4, 1]]),
    ([1], [[1]]),
    ([4, 2, 5], [[3, 3], [1, 6, 2], [5]]),
    ([3, 4], [[], [2, 2]]),  # a prompt without completions
    ([2, 2], [[3, 1], [3, 2]]),  # groups that share a mask
]


def visible(prompts: list[int], completions: list[list[int]]) -> Tensor:
    """Who sees whom, bool [S, S], from the rule: same group, the prompt or the same completion, not later."""
    labels = []
    for g, (prompt, lengths) in enumerate(zip(prompts, completions, strict=True)):
        labels += [(g, -1)] * prompt
        for c, length in enumerate(lengths):
            labels += [(g, c)] * length
    return torch.tensor([[i >= j and a[0] == b[0] and b[1] in (-1, a[1]) for j, b in enumerate(labels)] for i, a in enumerate(labels)])


def oracle(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    weights = (query @ key.transpose(-1, -2) * scaling).masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize(("prompts", "completions"), CASES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("scaling", "recompute_from"), [(None, 10**9), (0.9, 0)])
def test_output_and_gradients_are_those_under_the_whole_mask(
    prompts: list[int],
    completions: list[list[int]],
    kv_heads: int,
    scaling: float | None,
    recompute_from: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefix_attention_file, "RECOMPUTE_FROM", recompute_from)
    total = sum(prompts) + sum(map(sum, completions))
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, heads, total, 8, generator=generator, dtype=torch.float64).requires_grad_() for heads in (4, kv_heads, kv_heads)
    ]
    weights = torch.randn(1, total, 4, 8, generator=generator, dtype=torch.float64)
    arguments = {LAYOUT_ARGUMENT: make_layout(prompts, completions, CPU)}
    output, attention = prefix_attention(torch.nn.Module(), *inputs, None, scaling=scaling, **arguments)
    assert attention is None
    expected = oracle(*inputs, visible(prompts, completions), scaling or 1 / math.sqrt(8))
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)
    got = torch.autograd.grad((output * weights).sum(), inputs)
    for ours, theirs in zip(got, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_without_a_layout_it_is_plain_sdpa() -> None:
    module = torch.nn.Module()
    module.is_causal = True  # type: ignore[assignment]
    query, key, value = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(1)).unbind(0)
    causal, _ = prefix_attention(module, query, key, value, None)
    torch.testing.assert_close(
        causal, oracle(query, key, value, torch.ones(5, 5, dtype=torch.bool).tril(), 1 / math.sqrt(8)), atol=1e-6, rtol=0
    )
    mask = torch.tensor([[True, False, True, False, True]]).expand(5, 5)
    masked, _ = prefix_attention(module, query, key, value, mask[None, None])
    torch.testing.assert_close(masked, oracle(query, key, value, mask, 1 / math.sqrt(8)), atol=1e-6, rtol=0)


def test_a_layout_says_where_each_group_lies() -> None:
    first, second, third = make_layout([4, 2, 3], [[3, 1], [], [2]], CPU)
    assert (first.prompt, first.completions) == (slice(0, 4), slice(4, 8))
    assert (second.prompt, second.completions) == (slice(8, 10), slice(10, 10))
    assert (third.prompt, third.completions) == (slice(10, 13), slice(13, 15))
    assert second.mask is None
    assert first.mask is not None
    assert first.mask.shape == (1, 1, 3, 7)
    assert first.mask[0, 0].tolist() == [[True] * 5 + [False] * 2, [True] * 6 + [False], [True] * 7]


def test_groups_of_one_shape_share_their_mask() -> None:
    layout = make_layout([2, 2, 3], [[3, 1], [3, 2], [3]], CPU)
    assert layout[0].mask is layout[1].mask
    assert layout[0].mask is not layout[2].mask
