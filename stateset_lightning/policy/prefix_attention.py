"""Attention for groups packed in one sequence: each prompt once, its completions behind it.

    prompt 1 | completion 1.1 | completion 1.2 | ... | prompt 2 | completion 2.1 | ...

A completion sees its prompt and its own past; a prompt sees its own past; groups do not see each other. Nothing but attention
needs to know, so every linear layer runs on the sequence without padding. Registered with transformers' attention interface; a
forward without a layout is plain `sdpa`, so a model that carries this attention can be used for anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

NAME = "stateset_prefix"
LAYOUT_ARGUMENT = "prefix_layout"
RECOMPUTE_FROM = 512
"""Repeated prompt tokens of a group from which the attention of its completions is computed again in the backward pass."""


@dataclass(frozen=True)
class GroupLayout:
    """Where one group lies in the packed sequence. `rows` x `longest` is the padded form that attention runs in."""

    start: int
    prompt_length: int
    lengths: tuple[int, ...]
    mask: Tensor | None  # bool [1, 1, longest, prompt_length + longest]: sees the prompt, and its own past

    @property
    def completions(self) -> slice:
        first = self.start + self.prompt_length
        return slice(first, first + sum(self.lengths))

    @property
    def prompt(self) -> slice:
        return slice(self.start, self.start + self.prompt_length)


def make_layout(prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]], device: torch.device) -> list[GroupLayout]:
    """The layout of several groups, one behind the other."""
    masks: dict[tuple[int, int], Tensor] = {}
    layout, start = [], 0
    for prompt_length, lengths in zip(prompt_lengths, completion_lengths, strict=True):
        shape = (prompt_length, max(lengths, default=0))
        if shape not in masks and shape[1]:
            past = torch.ones(shape[1], shape[1], dtype=torch.bool, device=device).tril()
            masks[shape] = F.pad(past, (shape[0], 0), value=True)[None, None]
        layout.append(GroupLayout(start, prompt_length, tuple(lengths), masks.get(shape)))
        start += prompt_length + sum(lengths)
    return layout


def prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Query [1, heads, S, d], key and value [1, kv heads, S, d] -> output [1, S, heads, d]. See the module's docstring."""
    layout: list[GroupLayout] | None = kwargs.pop(LAYOUT_ARGUMENT, None)
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)

    attend = partial(F.scaled_dot_product_attention, scale=scaling, dropout_p=dropout, enable_gqa=query.shape[1] != key.shape[1])
    outputs = []
    for group in layout:
        prompt_q, prompt_k, prompt_v = (x[:, :, group.prompt] for x in (query, key, value))
        outputs.append(attend(prompt_q, prompt_k, prompt_v, is_causal=True))
        if not group.lengths:
            continue
        completions = [x[0, :, group.completions] for x in (query, key, value)]
        if torch.is_grad_enabled() and group.prompt_length * len(group.lengths) >= RECOMPUTE_FROM:
            # Kept for the backward pass, the repeated prompts of all layers would take more memory than the rest of attention.
            options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": dropout > 0}
            output = checkpoint(_attend_completions, group, attend, prompt_k, prompt_v, *completions, **options)
        else:
            output = _attend_completions(group, attend, prompt_k, prompt_v, *completions)
        outputs.append(output)
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _attend_completions(
    group: GroupLayout, attend: Callable[..., Tensor], prompt_k: Tensor, prompt_v: Tensor, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Each completion to its prompt, repeated for all of them, and to its own past; packed, [1, heads, sum of lengths, d]."""
    rows_q, rows_k, rows_v = (_to_rows(x, group.lengths) for x in (query, key, value))
    expand = (len(group.lengths), -1, -1, -1)
    keys = torch.cat([prompt_k.expand(expand), rows_k], dim=2)
    values = torch.cat([prompt_v.expand(expand), rows_v], dim=2)
    return _to_packed(attend(rows_q, keys, values, attn_mask=group.mask), group.lengths)[None]


def _to_rows(packed: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """[heads, sum of lengths, d] -> [rows, heads, longest, d], zero beyond a row's length."""
    longest = max(lengths)
    if min(lengths) == longest:
        return packed.unflatten(1, (len(lengths), longest)).transpose(0, 1)
    rows = torch.nn.utils.rnn.pad_sequence([row.transpose(0, 1) for row in packed.split(lengths, dim=1)], batch_first=True)
    return rows.transpose(1, 2)


def _to_packed(rows: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """[rows, heads, longest, d] -> [heads, sum of lengths, d]."""
    if min(lengths) == rows.shape[2]:
        return rows.transpose(0, 1).flatten(1, 2)
    return torch.cat([row[:, :length] for row, length in zip(rows, lengths, strict=True)], dim=1)


def register() -> None:
    """Makes the attention known to transformers, with the masks of `sdpa` for forwards without a layout."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, prefix_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
