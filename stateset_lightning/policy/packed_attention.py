"""Attention that computes a prompt once for all its completions, in training and in sampling.

Registered with transformers' attention interface. A forward with a `Layout` (training) or with `SharedPrompts`
(sampling) gets the attention below; any other forward gets plain `sdpa`, so a model that carries this attention can be
used for anything else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

NAME = "stateset_prefix"
LAYOUT_ARGUMENT = "prefix_layout"
SHARED_PROMPTS_ARGUMENT = "shared_prompts"


def register() -> None:
    """Makes the attention known to transformers, with the masks of `sdpa` for forwards without a layout."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """With a layout: query [1, heads, S, d], key and value [1, key heads, S, d] -> output [1, S, heads, d].

    With shared prompts: see `SharedPrompts.attend`. With neither: `sdpa` of transformers.
    """
    layout: Layout | None = kwargs.pop(LAYOUT_ARGUMENT, None)
    prompts: SharedPrompts | None = kwargs.pop(SHARED_PROMPTS_ARGUMENT, None)
    if prompts is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return prompts.attend(module.layer_idx, query, key, value, scale), None  # type: ignore[arg-type]
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        options = {"scaling": scaling, "dropout": dropout, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    has_shared_keys = query.shape[1] != key.shape[1]
    attend = partial(F.scaled_dot_product_attention, scale=scaling, dropout_p=dropout, enable_gqa=has_shared_keys)
    packed = [x[0].transpose(0, 1) for x in (query, key, value)]  # [S, heads, d] each
    outputs = []
    for bucket in layout.buckets:
        outputs.append(_flat(attend(*(_take(x, bucket.prompts_PL) for x in packed), is_causal=True)))
        if not len(bucket.queries_RM):
            continue
        if torch.is_grad_enabled() and bucket.prompts_PL.shape[1] * len(bucket.queries_RM) >= RECOMPUTE_FROM:
            # Kept for the backward pass, the repeated prompts of all layers would take more memory than the rest of
            # attention.
            options = {"use_reentrant": False, "preserve_rng_state": dropout > 0}
            outputs.append(checkpoint(_attend_completions, bucket, attend, *packed, **options))
        else:
            outputs.append(_attend_completions(bucket, attend, *packed))
    return torch.cat(outputs).index_select(0, layout.rows_S)[None], None


# Training: groups packed in one sequence, each prompt once, its completions behind it.
#
#     prompt 1 | completion 1.1 | completion 1.2 | ... | prompt 2 | completion 2.1 | ...
#
# A completion sees its prompt and its own past; a prompt sees its own past; groups do not see each other. Only
# attention needs to know, so every linear layer runs on the sequence without padding. Attention itself copies the
# groups into padded rows, some groups at a time (a bucket).
#
# Letters: S tokens of the sequence, P prompts and R completions of a bucket, L and M their longest lengths.

# Keys that the completions of a bucket see, padding included: small groups share a call, a larger one has its own.
BUCKET_TOKENS = 4096

# Repeated prompt tokens of a bucket from which on the attention of its completions is computed again in the backward
# pass.
RECOMPUTE_FROM = 512


@dataclass(frozen=True)
class Bucket:
    """Some groups as padded rows: places in the packed sequence; where a row is padded, any place."""

    prompts_PL: Tensor
    queries_RM: Tensor
    keys_RK: Tensor  # K = L + M: a completion's prompt, then itself
    mask: Tensor  # bool [1 or R, 1, M, K]: sees the prompt, and its own past


@dataclass(frozen=True)
class Layout:
    """The buckets, and for each token of the sequence its place among all rows of prompts and completions, in order."""

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
        prompts_PL, prompt_places = _rows(prompts)
        queries_RM, completion_places = _rows(completions)
        keys_RK = np.concatenate([prompts_PL[prompt_of_row], queries_RM], axis=1)
        lengths_R = np.array([prompts[i][1] for i in prompt_of_row])
        mask = _mask(lengths_R, prompts_PL.shape[1], queries_RM.shape[1])
        buckets.append(Bucket(*(torch.from_numpy(x).to(device) for x in (prompts_PL, queries_RM, keys_RK, mask))))
        places += [prompt_places, completion_places]
    # Row by row we have the places in the sequence; turned round, the row of each place. Padding (-1) is written to an
    # extra last place, which is cut off.
    place_of_row = np.concatenate(places)
    rows_S = np.empty(starts[-1] + 1, dtype=np.int64)
    rows_S[place_of_row] = np.arange(len(place_of_row))
    return Layout(buckets, torch.from_numpy(rows_S[:-1]).to(device))


def _attend_completions(
    bucket: Bucket, attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Each completion to its prompt, repeated for all of them, and to its own past: [R * M, heads, d]."""
    rows = _take(query, bucket.queries_RM), _take(key, bucket.keys_RK), _take(value, bucket.keys_RK)
    return _flat(attend(*rows, attn_mask=bucket.mask))


def _take(packed: Tensor, places: Tensor) -> Tensor:
    """[S, heads, d] -> [rows, heads, length, d]; an embedding, whose backward pass sums fast and in a fixed order."""
    return F.embedding(places, packed.flatten(1)).unflatten(-1, packed.shape[1:]).transpose(1, 2)


def _flat(rows: Tensor) -> Tensor:
    """[rows, heads, length, d] -> [rows * length, heads, d]."""
    return rows.transpose(1, 2).flatten(0, 1)


def _share_out(prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]]) -> list[list[int]]:
    """Groups of about one shape together, as many as `BUCKET_TOKENS` allows; at least one."""

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


def _rows(spans: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Places of spans (start, length), int64 [spans, longest]; beyond a span's end its last place again.

    And the same one row behind the other, -1 beyond a span's end.
    """
    starts, lengths = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    columns = np.arange(lengths.max(initial=0))
    rows = starts[:, None] + np.minimum(columns, (lengths - 1).clip(min=0)[:, None])
    return rows, np.where(columns < lengths[:, None], rows, -1).reshape(-1)


def _mask(prompt_lengths_R: np.ndarray, longest_prompt: int, longest: int) -> np.ndarray:
    """Bool [R, 1, M, L + M], or [1, 1, M, L + M] where all prompts are equally long."""
    if (prompt_lengths_R == longest_prompt).all():
        prompt_lengths_R = prompt_lengths_R[:1]
    sees_prompt = np.arange(longest_prompt) < prompt_lengths_R[:, None]
    shape = (len(sees_prompt), longest)
    prompt = np.broadcast_to(sees_prompt[:, None], (*shape, longest_prompt))
    past = np.broadcast_to(np.tri(longest, dtype=bool), (*shape, longest))
    return np.concatenate([prompt, past], axis=2)[:, None]


# Sampling: a decoding step of rows that share prompts. A prompt's keys and values are kept and read once for its whole
# group.
#
# Each row attends to its prompt, whose keys and values lie beside the cache, and to its own tokens, which are the
# cache. One softmax runs over both, so the result is that of plain attention over the two one behind the other. The
# stock kernel reads a repeated copy of the prompt for every row, and reading is what decoding on a CPU waits for.
#
# Letters: B rows, P prompts, L their longest length, R the most rows of a prompt, k key heads, r query heads per key
# head, C own tokens, d size of a head.


@dataclass(eq=False)
class SharedPrompts:
    """Prompts and the rows that go on from them.

    Args:
        keys: Of each layer, [P, k, L, d]; shorter prompts are padded on the left.
        values: Likewise.
        lengths_P: Tokens of each prompt.
        prompt_of_row_B: Which prompt a row goes on from.
        starts_B: First column of the cache that is a row's own.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    lengths_P: Tensor
    prompt_of_row_B: Tensor
    starts_B: Tensor

    def __post_init__(self) -> None:
        device, num_prompts, longest = self.lengths_P.device, len(self.lengths_P), self.keys[0].shape[2]
        self.most_rows = int(torch.bincount(self.prompt_of_row_B, minlength=num_prompts).max())
        # A row stands at [its prompt, its number among the prompt's rows] of [P, R].
        one_hot_BP = F.one_hot(self.prompt_of_row_B, num_prompts)
        number_B = (one_hot_BP.cumsum(0) * one_hot_BP).sum(1) - 1
        self.place_B = self.prompt_of_row_B * self.most_rows + number_B
        rows_B = torch.arange(len(self.prompt_of_row_B), device=device)
        self.row_of_place = torch.zeros(num_prompts * self.most_rows, dtype=torch.long, device=device)
        self.row_of_place[self.place_B] = rows_B
        # Whole groups in order, as before any row has finished: rows and places are the same.
        self.in_order = len(rows_B) == len(self.row_of_place) and bool((self.place_B == rows_B).all())
        padding_PL = torch.arange(longest, device=device) < (longest - self.lengths_P)[:, None]
        self.padding_PL = padding_PL if bool(padding_PL.any()) else None
        self.hides_columns = bool((self.starts_B > 0).any())

    def select(self, rows: Tensor) -> "SharedPrompts":
        """These rows only, and the prompts that they need."""
        needed, prompt_of_row_B = self.prompt_of_row_B[rows].unique(return_inverse=True)
        keys, values = self.keys, self.values
        if len(needed) < len(self.lengths_P):
            keys, values = ([x[needed] for x in layers] for layers in (keys, values))
        return SharedPrompts(keys, values, self.lengths_P[needed], prompt_of_row_B, self.starts_B[rows])

    def join(self, other: "SharedPrompts", first: int, column: int) -> "SharedPrompts":
        """Adds other prompts and their rows.

        Args:
            other: What is added.
            first: The cache's columns before this one have gone.
            column: Where the new rows start in the cache.
        """
        width = max(self.keys[0].shape[2], other.keys[0].shape[2])
        keys, values = (
            [torch.cat([F.pad(x, (0, 0, width - x.shape[2], 0)) for x in layer]) for layer in zip(*pair, strict=True)]
            for pair in ((self.keys, other.keys), (self.values, other.values))
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
        grouped_BkrD = (query * scaling).view(len(query), key_heads, -1, d)
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
        return output.reshape(len(query), 1, -1, d)

    def _to_prompts(self, values: Tensor) -> Tensor:
        """[B, k, r, x] -> [P, k, R r, x]: all rows of a prompt together, for one product with its keys or values."""
        values = values if self.in_order else values.index_select(0, self.row_of_place)
        return values.unflatten(0, (-1, self.most_rows)).transpose(1, 2).flatten(2, 3)

    def _to_rows(self, values: Tensor, per_key: int) -> Tensor:
        """[P, k, R r, x] -> [B, k, r, x]."""
        values = values.unflatten(2, (self.most_rows, per_key)).transpose(1, 2).flatten(0, 1)
        return values if self.in_order else values.index_select(0, self.place_B)
