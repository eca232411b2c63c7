"""Attention that computes a prompt once for all its completions, in training and in sampling.

Registered with transformers' attention interface. A forward with a `Layout` (training) or with `SharedPrompts`
(sampling) gets the attention below; any other forward gets plain `sdpa`, so a model that carries this attention can be
used for anything else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stateset_lightning.policy import varlen_attention
from stateset_lightning.policy.head import capped, on_gpu, uploaded
from stateset_lightning.policy.shared_prompts import SharedPrompts, softmax_with_sinks

NAME = "stateset_prefix"
ARGUMENT = "shared_prefixes"  # of a forward: its `Layout` or `SharedPrompts`


def register() -> None:
    """Makes the attention known to transformers, with the masks of `sdpa` for forwards without a layout."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def arguments(shared: "Layout | SharedPrompts", device: torch.device) -> dict[str, Any]:
    """What else a forward is given, beside ids and positions."""
    # Any mask of four dimensions keeps transformers from building one of S x S; nobody reads it.
    return {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device), ARGUMENT: shared}


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """With a layout: query [1, heads, S, d], key and value [1, key heads, S, d] -> output [1, S, heads, d].

    With shared prompts: see `SharedPrompts.attend`. With neither: `sdpa` of transformers, or what it cannot.

    Args:
        sliding_window: A token sees this many, itself included; without a layout or prompts the mask hides the others.
        softcap: Bound of the attention logits (`c tanh(logit / c)`, Gemma 2's).
        s_aux: Attention sinks [heads] (gpt-oss's): a logit per head that takes its share of weights, without a value.
    """
    layout: Layout | SharedPrompts | None = kwargs.pop(ARGUMENT, None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(layout, SharedPrompts):
        options = {"window": sliding_window, "softcap": softcap, "sinks": s_aux}
        return layout.attend(module.layer_idx, query, key, value, scale, **options), None  # type: ignore[arg-type]
    is_plain = softcap is None and s_aux is None

    def special(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool = False) -> Tensor:
        """As `scaled_dot_product_attention`, for bool masks, with what no stock kernel has: soft caps and sinks."""
        grouped = query.unflatten(1, (key.shape[1], -1))
        scores = capped((grouped @ key[:, :, None].transpose(-1, -2)).flatten(1, 2) * scale, softcap)
        if is_causal and query.shape[2] > 1:
            attn_mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            # Finite: the left padding of a prompt sees nothing, and others weigh what becomes of it with zero.
            scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
        weights = F.dropout(softmax_with_sinks(scores, None if s_aux is None else s_aux[:, None, None]), dropout)
        return (weights.unflatten(1, grouped.shape[1:3]) @ value[:, :, None]).flatten(1, 2)

    if layout is None and not is_plain:
        return special(query, key, value, attention_mask, attention_mask is None).transpose(1, 2), None
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        options = {"scaling": scaling, "dropout": dropout, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    if on_gpu(value) and is_plain and not dropout:
        operands = varlen_attention.operands(query, key, value)
        if operands is not None:
            return varlen_attention.Attention.apply(*operands, layout.calls(sliding_window), scale)[None], None
    has_shared_keys = query.shape[1] != key.shape[1]
    if has_shared_keys and is_plain and on_gpu(value):  # there, no kernel but the slowest takes them with a mask
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        has_shared_keys = False
    stock = partial(F.scaled_dot_product_attention, scale=scaling, dropout_p=dropout, enable_gqa=has_shared_keys)
    attend: Callable[..., Tensor] = stock if is_plain else special
    packed = [x[0].transpose(0, 1) for x in (query, key, value)]  # [S, heads, d] each
    outputs = []
    for bucket in layout.windowed(sliding_window):
        prompts_PL, mask = bucket.prompts_PL, bucket.prompt_mask
        outputs.append(_flat(attend(*(_take(x, prompts_PL) for x in packed), attn_mask=mask, is_causal=mask is None)))
        if not len(bucket.queries_RM):
            continue
        complete = partial(_attend_completions, bucket, attend)
        if torch.is_grad_enabled() and bucket.prompts_PL.shape[1] * len(bucket.queries_RM) >= RECOMPUTE_FROM:
            # Kept for the backward pass, the repeated prompts of all layers would take more memory than the rest of
            # attention.
            complete = partial(checkpoint, complete, use_reentrant=False, preserve_rng_state=dropout > 0)
        outputs.append(complete(*packed))
    return torch.cat(outputs).index_select(0, layout.rows[1])[None], None


# Training: groups packed in one sequence, each prompt once, its completions behind it.
#
#     prompt 1 | completion 1.1 | completion 1.2 | ... | prompt 2 | completion 2.1 | ...
#
# A completion sees its prompt and its own past; a prompt sees its own past; groups do not see each other. Only
# attention needs to know, so every linear layer runs on the sequence without padding. In half precision on a GPU
# attention does so, too (`varlen_attention`). Elsewhere it copies the groups into padded rows, some groups at a time
# (a bucket).
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
    lengths_R: np.ndarray  # of each completion's prompt
    prompt_mask: Tensor | None = None  # bool [L, L], where a prompt does not see all of its past

    def windowed(self, window: int) -> "Bucket":
        """The bucket where a token sees `window` tokens, itself included; keys that nobody sees any more leave."""
        longest, num_queries = self.prompts_PL.shape[1], self.queries_RM.shape[1]
        if longest + num_queries <= window:
            return self
        first = max(self.lengths_R.min(initial=longest) - window + 1, 0)
        mask = torch.from_numpy(_mask(self.lengths_R, longest, num_queries, window)[..., first:])
        prompt_mask = self.mask.new_ones(longest, longest).triu(1 - window).tril()
        return replace(self, keys_RK=self.keys_RK[:, first:], mask=mask.to(self.mask.device), prompt_mask=prompt_mask)


@dataclass(frozen=True)
class Layout:
    """Several groups, one behind the other in the sequence. What attention needs of them is made once for all layers.

    Args:
        prompt_lengths: Of each group.
        completion_lengths: Likewise.
        device: Of the sequence.
    """

    prompt_lengths: Sequence[int]
    completion_lengths: Sequence[Sequence[int]]
    device: torch.device
    _windowed: dict[int, list[Bucket]] = field(default_factory=dict)  # for all layers with that window
    _calls: dict[int | None, list[varlen_attention.Call]] = field(default_factory=dict)

    @cached_property
    def rows(self) -> tuple[list[Bucket], Tensor]:
        """Buckets, and of each token of the sequence its place among all their rows, of prompts, then completions."""
        return _make_rows(self.prompt_lengths, self.completion_lengths, self.device)

    def windowed(self, window: int | None) -> list[Bucket]:
        """The buckets of a layer with this sliding window; None: without one."""
        buckets, _ = self.rows
        if window is None:
            return buckets
        if window not in self._windowed:
            self._windowed[window] = [bucket.windowed(window) for bucket in buckets]
        return self._windowed[window]

    def calls(self, window: int | None) -> list[varlen_attention.Call]:
        """The calls of a layer with this sliding window; None: without one, or where it hides nothing."""
        lengths = zip(self.prompt_lengths, self.completion_lengths, strict=True)
        if window is not None and window >= max(prompt + max(own, default=0) for prompt, own in lengths):
            window = None
        if window not in self._calls:
            groups = self.prompt_lengths, self.completion_lengths
            self._calls[window] = varlen_attention.make_calls(*groups, window, self.device)
        return self._calls[window]


def _make_rows(
    prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]], device: torch.device
) -> tuple[list[Bucket], Tensor]:
    sizes = [prompt + sum(lengths) for prompt, lengths in zip(prompt_lengths, completion_lengths, strict=True)]
    starts = np.cumsum([0, *sizes])
    buckets, places = [], []
    for groups in _share_out(prompt_lengths, completion_lengths):
        prompts = [(starts[g], prompt_lengths[g]) for g in groups]
        completions, prompt_of_row = list[tuple[int, int]](), list[int]()
        for i, g in enumerate(groups):
            ends = starts[g] + prompt_lengths[g] + np.cumsum(completion_lengths[g], dtype=np.int64)
            completions += [(end - length, length) for end, length in zip(ends, completion_lengths[g], strict=True)]
            prompt_of_row += [i] * len(completion_lengths[g])
        prompts_PL, prompt_places = _rows(prompts)
        queries_RM, completion_places = _rows(completions)
        keys_RK = np.concatenate([prompts_PL[prompt_of_row], queries_RM], axis=1)
        lengths_R = np.array([prompts[i][1] for i in prompt_of_row])
        arrays = prompts_PL, queries_RM, keys_RK, _mask(lengths_R, prompts_PL.shape[1], queries_RM.shape[1])
        at_prompts, at_queries, at_keys, sees = (uploaded(torch.from_numpy(x), device) for x in arrays)
        buckets.append(Bucket(at_prompts, at_queries, at_keys, sees, lengths_R))
        places += [prompt_places, completion_places]
    # Row by row we have the places in the sequence; turned round, the row of each place. Padding (-1) is written to an
    # extra last place, which is cut off.
    place_of_row = np.concatenate(places)
    rows_S = np.empty(starts[-1] + 1, dtype=np.int64)
    rows_S[place_of_row] = np.arange(len(place_of_row))
    return buckets, uploaded(torch.from_numpy(rows_S[:-1]), device)


def _attend_completions(bucket: Bucket, attend: Callable[..., Tensor], *packed: Tensor) -> Tensor:
    """Each completion to its prompt, repeated for all of them, and to its own past: [R * M, heads, d]."""
    places = bucket.queries_RM, bucket.keys_RK, bucket.keys_RK  # of query, key and value
    return _flat(attend(*map(_take, packed, places), attn_mask=bucket.mask))


def _take(packed: Tensor, places: Tensor) -> Tensor:
    """[S, heads, d] -> [rows, heads, length, d]; an embedding, whose backward pass sums fast and in a fixed order."""
    return F.embedding(places, packed.flatten(1)).unflatten(-1, packed.shape[1:]).transpose(1, 2)


def _flat(rows: Tensor) -> Tensor:
    """[rows, heads, length, d] -> [rows * length, heads, d]."""
    return rows.transpose(1, 2).flatten(0, 1)


def _share_out(prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]]) -> list[list[int]]:
    """Groups of about one shape together, as many as `BUCKET_TOKENS` allows; at least one."""
    longest = [max(lengths, default=0) for lengths in completion_lengths]
    buckets: list[list[int]] = []
    for g in sorted(range(len(prompt_lengths)), key=lambda g: (prompt_lengths[g], longest[g])):
        together = [*buckets[-1], g] if buckets else [g]
        rows = sum(len(completion_lengths[i]) for i in together)
        if not buckets or rows * (prompt_lengths[g] + max(longest[i] for i in together)) > BUCKET_TOKENS:
            buckets.append([])
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


def _mask(prompt_lengths_R: np.ndarray, longest_prompt: int, longest: int, window: int | None = None) -> np.ndarray:
    """Bool [R, 1, M, L + M], or [1, 1, M, L + M] where all prompts are equally long.

    With a window, a token sees that many, itself included.
    """
    if (prompt_lengths_R == longest_prompt).all():
        prompt_lengths_R = prompt_lengths_R[:1]
    sees_prompt = np.arange(longest_prompt) < prompt_lengths_R[:, None]
    shape = (len(sees_prompt), longest)
    prompt = np.broadcast_to(sees_prompt[:, None], (*shape, longest_prompt))
    past = np.broadcast_to(np.tri(longest, dtype=bool), (*shape, longest))
    mask = np.concatenate([prompt, past], axis=2)
    if window is not None:
        # Places counted from the end of a row's prompt.
        prompt_places = np.arange(longest_prompt) - prompt_lengths_R[:, None]
        own_places = np.broadcast_to(np.arange(longest), shape)
        mask &= np.concatenate([prompt_places, own_places], axis=1)[:, None] > own_places[..., None] - window
    return mask[:, None]
