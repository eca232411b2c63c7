"""Sampling masks: taken apart, put together, and what scoring makes of them against an oracle with all logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from plain_kernels import plain_kernels
from torch import Tensor

from stateset_lightning.policy import Group, Policy, PolicyConfig, SamplingMask
from stateset_lightning.policy.head import HeadOptions, token_logprobs

LISTS = [[3], [0, 4, 10], list(range(11)), [3, 9], [2, 7], [0, 1], [3, 4, 5, 6]]


def mask_of(lists: list[list[int]]) -> SamplingMask:
    ids = torch.tensor([token for kept in lists for token in kept], dtype=torch.int32)
    return SamplingMask(ids, torch.tensor([len(kept) for kept in lists], dtype=torch.int32))


def lists_of(mask: SamplingMask) -> list[list[int]]:
    return [part.tolist() for part in mask.ids_K.split(mask.counts_T.tolist())]


@pytest.mark.parametrize(
    ("tokens", "rows"),
    [
        (slice(2, 5), [2, 3, 4]),
        (slice(0, 0), []),
        (torch.tensor([True, False, False, True, False, False, True]), [0, 3, 6]),
        (torch.tensor([6, 0, 2, 2]), [6, 0, 2, 2]),
    ],
)
def test_some_tokens_in_any_order_keep_their_own_lists(tokens: Any, rows: list[int]) -> None:
    assert lists_of(mask_of(LISTS)[tokens]) == [LISTS[row] for row in rows]


def test_parts_are_put_together_again() -> None:
    parts = mask_of(LISTS).split([2, 0, 4, 1])
    assert [lists_of(part) for part in parts] == [LISTS[:2], [], LISTS[2:6], LISTS[6:]]
    assert lists_of(SamplingMask.cat(parts[2:])) == LISTS[2:]


T, H, V = 7, 5, 11
TARGETS = torch.tensor([3, 0, 10, 3, 7, 1, 3])


def oracle(logits: Tensor, targets: Tensor, mask: SamplingMask) -> tuple[Tensor, Tensor]:
    """By autograd, of logits with minus infinity where a token was excluded."""
    kept = torch.zeros_like(logits, dtype=torch.bool)
    for row, ids in enumerate(lists_of(mask)):
        kept[row, ids] = True
    logp = logits.masked_fill(~kept, -torch.inf).log_softmax(-1)
    entropies = -(logp.exp() * logp.masked_fill(~kept, 0.0)).sum(-1)
    return logp.gather(-1, targets[:, None])[:, 0], entropies


def gradients(scores: tuple[Tensor, Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1.0, 2.0, len(scores[0])).to(scores[0])
    return torch.autograd.grad((scores[0] * weights - scores[1] * weights.flip(0)).sum(), leaves)


@pytest.mark.parametrize("columns", [None, 1, 4, V])  # on a CPU, and in parts of the vocabulary as on a GPU
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("chunk", [1, 3, None])
def test_values_and_gradients_are_those_of_logits_of_minus_infinity(
    columns: int | None, softcap: float | None, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator) for shape in ((T, H), (V, H), (V,))]
    exact = [leaf.double().requires_grad_() for leaf in leaves]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    mask, options = mask_of(LISTS), HeadOptions(0.7, softcap, chunk, None, mask_of(LISTS))
    if columns is None:
        got = token_logprobs(*leaves, TARGETS, options)  # type: ignore[call-arg]
        grads = gradients(got, leaves)
    else:
        monkeypatch.setattr(HeadOptions, "chunk", lambda options, *_: (options.chunk_tokens or T, columns))
        with plain_kernels():
            got = token_logprobs(*leaves, TARGETS, options)  # type: ignore[call-arg]
            grads = gradients(got, leaves)
    logits = torch.nn.functional.linear(*exact)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected = oracle(logits / 0.7, TARGETS, mask)
    for ours, theirs in zip((*got, *grads), (*expected, *gradients(expected, exact)), strict=True):
        torch.testing.assert_close(ours, theirs.float(), atol=1e-5, rtol=1e-5)


def test_in_float64_an_excluded_logit_is_as_one_of_minus_infinity() -> None:
    """What the head multiplies and sums is float32; the exclusion itself loses nothing."""
    leaf = (torch.randn(T, V, generator=torch.Generator().manual_seed(0)).double() * 3).requires_grad_()
    logp = mask_of(LISTS).exclude(leaf * 1.0).log_softmax(-1)
    got = logp.gather(-1, TARGETS[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    expected = oracle(leaf, TARGETS, mask_of(LISTS))
    for ours, theirs in zip((*got, *gradients(got, [leaf])), (*expected, *gradients(expected, [leaf])), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=0)
    assert (logp.detach() < -1e14).sum() == T * V - sum(map(len, LISTS))


GROUPS = [Group([20, 31, 42, 53], [[86, 97, 108], [152]]), Group([185], [[196, 207, 218]])]


@pytest.mark.parametrize("scoring", ["packed", "padded", "own head"])
@pytest.mark.parametrize("some_were_sampled", [False, True])
def test_every_way_to_score_sees_the_mask(
    make_model: Callable[..., Any], scoring: str, some_were_sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sampled = make_model("llama"), [[[True, False, True], [True]], [[False, True, True]]]
    if scoring == "own head":
        monkeypatch.setattr(Policy, "_probe_head", lambda policy: False)
    policy = Policy(model, PolicyConfig("random", scoring="padded" if scoring == "own head" else scoring))
    assert (policy.scoring, policy.uses_chunked_head) == (
        "padded" if scoring == "own head" else scoring,
        scoring != "own head",
    )
    tokens = [
        (g, c, i) for g, group in enumerate(GROUPS) for c, row in enumerate(group.completions) for i in range(len(row))
    ]
    tokens = [(g, c, i) for g, c, i in tokens if sampled[g][c][i] or not some_were_sampled]
    targets = torch.tensor([GROUPS[g].completions[c][i] for g, c, i in tokens])
    mask = mask_of([sorted({int(target), 5, 9 + row, 300}) for row, target in enumerate(targets)])
    parts = mask.split([sum(g == group for g, _, _ in tokens) for group in range(len(GROUPS))])
    masks = sampled if some_were_sampled else [None, None]
    groups = [replace(group, sampled=marks, mask=part) for group, marks, part in zip(GROUPS, masks, parts, strict=True)]
    got = policy.score(groups, 0.8)
    grads = gradients(got, list(model.parameters()))
    without, _ = policy.score_without_gradient(groups, 0.8)
    torch.testing.assert_close(without, got[0].detach(), atol=1e-6, rtol=0)

    rows = [[*GROUPS[g].prompt, *GROUPS[g].completions[c][:i]] for g, c, i in tokens]
    logits = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in rows])
    expected = oracle(logits / 0.8, targets, mask)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    for ours, theirs in zip(grads, gradients(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
