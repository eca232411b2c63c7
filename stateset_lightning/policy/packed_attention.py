"""Attention of a decoding step whose rows share prompts: a prompt's keys and values are kept and read once for its
whole group.

Each row attends to its prompt, which lies beside the cache, and to its own tokens, which are the cache. One softmax
runs over both, so the result is that of plain attention over the two in a row. The stock kernel reads a repeated copy
of the prompt for every row, and reading is what decoding on a CPU waits for.

Letters: B rows, P prompts, L their longest length, R rows of a prompt at most, k key heads, r query heads per key head,
    C own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SHARED_PROMPTS_ARGUMENT = "shared_prompts"


class SharedPrompts:
    """Prompts and the rows that go on from them.

    Args:
        keys: Of each layer, [P, k, L, d]; shorter prompts are padded on the left.
        values: Likewise.
        lengths_P: Tokens of each prompt.
        prompt_of_row_B: Which prompt a row goes on from.
        starts_B: First column of the cache that is a row's own.
    """

    def __init__(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        lengths_P: Tensor,
        prompt_of_row_B: Tensor,
        starts_B: Tensor,
    ) -> None:
        self.keys = keys
        self.values = values
        self.lengths_P = lengths_P
        self.prompt_of_row_B = prompt_of_row_B
        self.starts_B = starts_B
        rows_of_prompt_P = torch.bincount(prompt_of_row_B, minlength=len(lengths_P))
        self.most_rows = int(rows_of_prompt_P.max())
        # A row stands at [its prompt, its number among the prompt's rows] of [P, R].
        one_hot_BP = F.one_hot(prompt_of_row_B, len(lengths_P))
        number_B = (one_hot_BP.cumsum(0) * one_hot_BP).sum(1) - 1
        self.place_B = prompt_of_row_B * self.most_rows + number_B
        rows_B = torch.arange(len(prompt_of_row_B), device=lengths_P.device)
        self.row_of_place = torch.zeros(len(lengths_P) * self.most_rows, dtype=torch.long, device=lengths_P.device)
        self.row_of_place[self.place_B] = rows_B
        # Whole groups in order, as before any row has finished: rows and places are the same.
        self.in_order = len(rows_B) == len(self.row_of_place) and bool((self.place_B == rows_B).all())
        longest = keys[0].shape[2]
        padding_PL = torch.arange(longest, device=lengths_P.device) < (longest - lengths_P)[:, None]
        self.padding_PL = padding_PL if bool(padding_PL.any()) else None
        self.hides_columns = bool((starts_B > 0).any())

    def select(self, rows: Tensor) -> SharedPrompts:
        """These rows alone, and the prompts that they need."""
        needed, prompt_of_row_B = self.prompt_of_row_B[rows].unique(return_inverse=True)
        if len(needed) == len(self.lengths_P):
            return SharedPrompts(self.keys, self.values, self.lengths_P, prompt_of_row_B, self.starts_B[rows])
        keys, values = ([x[needed] for x in layers] for layers in (self.keys, self.values))
        return SharedPrompts(keys, values, self.lengths_P[needed], prompt_of_row_B, self.starts_B[rows])

    def join(self, other: SharedPrompts, first: int, column: int) -> SharedPrompts:
        """Adds other prompts and their rows. The cache's columns before `first` have gone; new rows start at
        `column`.
        """
        width = max(self.keys[0].shape[2], other.keys[0].shape[2])
        keys, values = (
            [torch.cat([_padded(x, width), _padded(y, width)]) for x, y in zip(mine, theirs, strict=True)]
            for mine, theirs in ((self.keys, other.keys), (self.values, other.values))
        )
        return SharedPrompts(
            keys,
            values,
            torch.cat([self.lengths_P, other.lengths_P]),
            torch.cat([self.prompt_of_row_B, other.prompt_of_row_B + len(self.lengths_P)]),
            torch.cat([self.starts_B - first, torch.full_like(other.starts_B, column)]),
        )

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Query [B, k r, 1, d], own keys and values [B, k, C, d] -> output [B, 1, k r, d]."""
        prompt_keys, prompt_values = self.keys[layer], self.values[layer]
        _, key_heads, longest, d = prompt_keys.shape
        rows = len(query)
        grouped_BkrD = (query * scaling).view(rows, key_heads, -1, d)
        per_key = grouped_BkrD.shape[2]
        scores = self._to_prompts(grouped_BkrD) @ prompt_keys.transpose(-1, -2)
        if self.padding_PL is not None:
            scores = scores.masked_fill(self.padding_PL[:, None, None], -torch.inf)
        prompt_scores = self._to_rows(scores, per_key)
        own_scores = grouped_BkrD @ key.transpose(-1, -2)
        if self.hides_columns:
            hidden_BC = torch.arange(key.shape[2], device=key.device) < self.starts_B[:, None]
            own_scores = own_scores.masked_fill(hidden_BC[:, None, None], -torch.inf)
        weights = torch.cat([prompt_scores, own_scores], dim=-1).softmax(-1)
        prompt_weights, own_weights = weights[..., :longest], weights[..., longest:]
        output = self._to_rows(self._to_prompts(prompt_weights) @ prompt_values, per_key) + own_weights @ value
        return output.reshape(rows, 1, -1, d)

    def _to_prompts(self, values: Tensor) -> Tensor:
        """[B, k, r, x] -> [P, k, R r, x]: all rows of a prompt together, for one product with its keys or values."""
        values = values if self.in_order else values.index_select(0, self.row_of_place)
        return values.unflatten(0, (-1, self.most_rows)).transpose(1, 2).flatten(2, 3)

    def _to_rows(self, values: Tensor, per_key: int) -> Tensor:
        """[P, k, R r, x] -> [B, k, r, x]."""
        values = values.unflatten(2, (self.most_rows, per_key)).transpose(1, 2).flatten(0, 1)
        return values if self.in_order else values.index_select(0, self.place_B)


def _padded(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, 0, width - x.shape[2], 0))


# MERGED: Attention for groups packed in one sequence: each prompt once, its completions behind it.
#
#     prompt 1 | completion 1.1 | completion 1.2 | ... | prompt 2 | completion 2.1 | ...
#
# A completion sees its prompt and its own past; a prompt sees its own past; groups do not see each other. Nothing but
# attention needs to know, so every linear layer runs on the sequence without padding. Attention itself gathers the groups
# into padded rows, some groups at a time. Registered with transformers' attention interface; a forward without a layout
# is plain `sdpa`, so a model that carries this attention can be used for anything else.
#
# Letters: S tokens of the sequence, P prompts and R completions of a bucket, L and M their longest lengths.
#

NAME = "stateset_prefix"
LAYOUT_ARGUMENT = "prefix_layout"
BUCKET_TOKENS = 4096
"""Keys that the completions of a bucket see, padding included: small groups share a call, a larger one has its own."""
RECOMPUTE_FROM = 512
"""Repeated prompt tokens of a bucket from which the attention of its completions is computed again in the backward
pass.
"""


@dataclass(frozen=True)
class Bucket:
    """Some groups as padded rows: places in the packed sequence, any place where a row is padded."""

    prompts_PL: Tensor
    queries_RM: Tensor
    keys_RK: Tensor  # K = L + M: a completion's prompt, then itself
    mask: Tensor | None  # bool [1 or R, 1, M, K]: sees the prompt, and its own past; None without completions

    @property
    def repeated_tokens(self) -> int:
        return len(self.queries_RM) * self.prompts_PL.shape[1]


@dataclass(frozen=True)
class Layout:
    """The buckets, and where each token of the sequence lies among the rows of all prompts and completions, in
    order.
    """

    buckets: list[Bucket]
    rows_S: Tensor


def make_layout(
    prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]], device: torch.device
) -> Layout:
    """The layout of several groups, one behind the other in the sequence."""
    sizes = [prompt + sum(lengths) for prompt, lengths in zip(prompt_lengths, completion_lengths, strict=True)]
    starts = np.cumsum([0, *sizes])
    buckets, places = [], []
    for groups in _share_out(prompt_lengths, completion_lengths):
        prompts = [(starts[g], prompt_lengths[g]) for g in groups]
        completions: list[tuple[int, int]] = []
        prompt_of_row: list[int] = []
        for i, g in enumerate(groups):
            ends = starts[g] + prompt_lengths[g] + np.cumsum(completion_lengths[g], dtype=np.int64)
            completions += [(end - length, length) for end, length in zip(ends, completion_lengths[g], strict=True)]
            prompt_of_row += [i] * len(completion_lengths[g])
        prompts_PL, queries_RM = _rows(prompts), _rows(completions)
        keys_RK = np.concatenate([prompts_PL[prompt_of_row], queries_RM], axis=1)
        lengths_R = np.array([prompts[i][1] for i in prompt_of_row])
        mask = _mask(lengths_R, prompts_PL.shape[1], queries_RM.shape[1]) if len(queries_RM) else None
        prompts_on_device, queries, keys = (torch.from_numpy(x).to(device) for x in (prompts_PL, queries_RM, keys_RK))
        buckets.append(
            Bucket(prompts_on_device, queries, keys, None if mask is None else torch.from_numpy(mask).to(device))
        )
        places += [_filled(prompts, prompts_PL), _filled(completions, queries_RM)]
    # Row by row, the places of the sequence and -1 for padding; turned round, the row of each place.
    place_of_row = np.concatenate(places)
    rows_S = np.empty(int(starts[-1]), dtype=np.int64)
    filled = np.flatnonzero(place_of_row >= 0)
    rows_S[place_of_row[filled]] = filled
    return Layout(buckets, torch.from_numpy(rows_S).to(device))


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
    """Query [1, heads, S, d], key and value [1, kv heads, S, d] -> output [1, S, heads, d]. See the module's
    docstring.
    """
    layout: Layout | None = kwargs.pop(LAYOUT_ARGUMENT, None)
    prompts: SharedPrompts | None = kwargs.pop(SHARED_PROMPTS_ARGUMENT, None)
    if prompts is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return prompts.attend(module.layer_idx, query, key, value, scale), None  # type: ignore[arg-type]
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )

    attend = partial(
        F.scaled_dot_product_attention, scale=scaling, dropout_p=dropout, enable_gqa=query.shape[1] != key.shape[1]
    )
    packed = [x[0].transpose(0, 1) for x in (query, key, value)]  # [S, heads, d] each
    outputs = []
    for bucket in layout.buckets:
        outputs.append(_flat(attend(*(_gather(x, bucket.prompts_PL) for x in packed), is_causal=True)))
        if bucket.mask is None:
            continue

        if torch.is_grad_enabled() and bucket.repeated_tokens >= RECOMPUTE_FROM:
            # Kept for the backward pass, the repeated prompts of all layers would take more memory than the rest of
            # attention.
            options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": dropout > 0}
            outputs.append(checkpoint(_attend_completions, bucket, attend, *packed, **options))
        else:
            outputs.append(_attend_completions(bucket, attend, *packed))
    return torch.cat(outputs).index_select(0, layout.rows_S)[None], None


def _attend_completions(
    bucket: Bucket, attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Each completion to its prompt, repeated for all of them, and to its own past: [R * M, heads, d]."""
    rows = _gather(query, bucket.queries_RM), _gather(key, bucket.keys_RK), _gather(value, bucket.keys_RK)
    return _flat(attend(*rows, attn_mask=bucket.mask))


def _gather(packed: Tensor, places: Tensor) -> Tensor:
    """[S, heads, d] -> [rows, heads, length, d]. As an embedding, whose backward pass adds up fast and in a fixed
    order.
    """
    return F.embedding(places, packed.flatten(1)).unflatten(-1, packed.shape[1:]).transpose(1, 2)


def _flat(rows: Tensor) -> Tensor:
    """[rows, heads, length, d] -> [rows * length, heads, d]."""
    return rows.transpose(1, 2).flatten(0, 1)


def _share_out(prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]]) -> list[list[int]]:
    """Groups of about one shape together, as many as `BUCKET_TOKENS` allows; one at least."""

    def shape(g: int) -> tuple[int, int]:
        return prompt_lengths[g], max(completion_lengths[g], default=0)

    buckets: list[list[int]] = []
    rows = longest_prompt = longest_completion = 0
    for g in sorted(range(len(prompt_lengths)), key=shape):
        rows += len(completion_lengths[g])
        longest_prompt, longest_completion = max(longest_prompt, shape(g)[0]), max(longest_completion, shape(g)[1])
        if not buckets or rows * (longest_prompt + longest_completion) > BUCKET_TOKENS:
            buckets.append([])
            rows, (longest_prompt, longest_completion) = len(completion_lengths[g]), shape(g)
        buckets[-1].append(g)
    return buckets


def _rows(spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Places of spans (start, length), int64 [spans, longest]; beyond a span's end its last place again."""
    starts, lengths = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    columns = np.arange(lengths.max(initial=0))
    return starts[:, None] + np.minimum(columns, (lengths - 1).clip(min=0)[:, None])


def _filled(spans: Sequence[tuple[int, int]], rows: np.ndarray) -> np.ndarray:
    """The places of rows one behind the other, -1 beyond a span's end."""
    lengths = np.array([length for _, length in spans], dtype=np.int64)
    flat: np.ndarray = np.where(np.arange(rows.shape[1]) < lengths[:, None], rows, -1).reshape(-1)
    return flat


def _mask(prompt_lengths_R: np.ndarray, longest_prompt: int, longest: int) -> np.ndarray:
    """Bool [R, 1, M, L + M], or [1, 1, M, L + M] where all prompts are equally long."""
    if (prompt_lengths_R == longest_prompt).all():
        prompt_lengths_R = prompt_lengths_R[:1]
    prompt = np.arange(longest_prompt) < prompt_lengths_R[:, None]
    shape = (len(prompt), longest)
    past = np.broadcast_to(np.tri(longest, dtype=bool), (*shape, longest))
    mask: np.ndarray = np.concatenate([np.broadcast_to(prompt[:, None], (*shape, longest_prompt)), past], axis=2)[
        :, None
    ]
    return mask


def register() -> None:
    """Makes the attention known to transformers, with the masks of `sdpa` for forwards without a layout."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, prefix_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
