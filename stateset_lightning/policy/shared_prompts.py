"""Decoding of rows that share prompts, a token of each or several. A prompt's keys and values are kept and read once
for its whole group.

Each row attends to its prompt, whose keys and values lie beside the cache, and to its own tokens, which are the
cache. One softmax runs over both, so the result is that of plain attention over the two one behind the other. The
stock kernel reads a repeated copy of the prompt for every row, and reading is what decoding on a CPU waits for.

Letters: B rows, P prompts, L their longest length, R the most rows of a prompt, k key heads, r query heads per key
head, C own tokens, n of them new, d size of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stateset_lightning.policy.head import capped


def softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Weights of the last dimension; sinks, broadcast to it, take their share and leave."""
    if sinks is None:
        return scores.softmax(-1)
    return torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], dim=-1).softmax(-1)[..., :-1]


def _hide(scores: Tensor, hidden_BnC: Tensor) -> Tensor:
    """Scores [B, k, r n, C] of what each of the n queries does not see go to minus infinity."""
    of_queries = scores.unflatten(2, (-1, hidden_BnC.shape[1]))
    return of_queries.masked_fill(hidden_BnC[:, None, None], -torch.inf).flatten(2, 3)


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
        device, num_rows, num_prompts = self.lengths_P.device, len(self.prompt_of_row_B), len(self.lengths_P)
        # On the host and in one copy: a GPU would make it wait at every question below.
        numbers = torch.cat([self.prompt_of_row_B, self.starts_B, self.lengths_P]).cpu()
        prompts_B, starts_B, lengths_P = numbers.split([num_rows, num_rows, num_prompts])
        self.most_rows = int(torch.bincount(prompts_B, minlength=num_prompts).max())
        # A row stands at [its prompt, its number among the prompt's rows] of [P, R].
        one_hot_BP = F.one_hot(prompts_B, num_prompts)
        place_B = prompts_B * self.most_rows + (one_hot_BP.cumsum(0) * one_hot_BP).sum(1) - 1
        rows_B = torch.arange(num_rows)
        row_of_place = torch.zeros(num_prompts * self.most_rows, dtype=torch.long)
        row_of_place[place_B] = rows_B
        # Whole groups in order, as before any row has finished: rows and places are the same.
        self.in_order = num_rows == len(row_of_place) and bool((place_B == rows_B).all())
        self.place_B, self.row_of_place = place_B.to(device), row_of_place.to(device)
        longest = self.keys[0].shape[2]
        padding_PL = torch.arange(longest) < (longest - lengths_P)[:, None]
        self.padding_PL = padding_PL.to(device) if bool(padding_PL.any()) else None
        self.hides_columns = bool((starts_B > 0).any())
        self.last_start = int(starts_B.max())

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
        lengths_P = torch.cat([self.lengths_P, other.lengths_P])
        prompt_of_row_B = torch.cat([self.prompt_of_row_B, other.prompt_of_row_B + len(self.lengths_P)])
        starts_B = torch.cat([self.starts_B - first, torch.full_like(other.starts_B, column)])
        return SharedPrompts(keys, values, lengths_P, prompt_of_row_B, starts_B)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Query [B, k r, n, d], own keys and values [B, k, C, d] -> output [B, n, k r, d].

        The n queries are of the last columns; each sees the columns up to its own.
        """
        _, key_heads, longest, d = self.keys[layer].shape
        columns, count = key.shape[2], query.shape[2]
        earliest = columns - count + 1  # columns that the first query sees
        # Columns of prompts and of rows before these ones are outside of every row's window.
        first = 0 if window is None else min(max(longest + earliest - self.last_start - window, 0), longest)
        first_own = 0 if window is None else max(earliest - window, 0)
        key, value = key[:, :, first_own:], value[:, :, first_own:]
        prompt_keys, prompt_values = self.keys[layer][:, :, first:], self.values[layer][:, :, first:]
        # The queries of a key head's heads stand where its heads would: `per_key` is r n.
        grouped_BkrD = (query * scaling).reshape(len(query), key_heads, -1, d)
        per_key = grouped_BkrD.shape[2]
        scores = capped(self._to_prompts(grouped_BkrD) @ prompt_keys.transpose(-1, -2), softcap)
        if self.padding_PL is not None:
            scores = scores.masked_fill(self.padding_PL[:, None, None, first:], -torch.inf)
        prompt_scores = self._to_rows(scores, per_key)
        own_scores = capped(grouped_BkrD @ key.transpose(-1, -2), softcap)
        if self.hides_columns or count > 1:
            ends_n1 = torch.arange(earliest, columns + 1, device=key.device)[:, None]  # columns that each query sees
            starts_B11, places_C = self.starts_B[:, None, None], torch.arange(first_own, columns, device=key.device)
            hidden_BnC = places_C < starts_B11
            if count > 1:  # a single query sees all columns that are here
                hidden_BnC = hidden_BnC | (places_C >= ends_n1) | (places_C < ends_n1 - (window or columns))
            if window is not None:  # rows that came earlier have left more of their prompts behind
                starts_Bn1 = longest + ends_n1 - starts_B11 - window
                hidden_BnL = torch.arange(first, longest, device=key.device) < starts_Bn1
                prompt_scores = _hide(prompt_scores, hidden_BnL)
            own_scores = _hide(own_scores, hidden_BnC)
        scores = torch.cat([prompt_scores, own_scores], dim=-1)
        heads_krn1 = None if sinks is None else sinks.repeat_interleave(count).view(key_heads, per_key, 1)
        weights = softmax_with_sinks(scores, heads_krn1)
        prompt_weights, own_weights = weights[..., : longest - first], weights[..., longest - first :]
        output = self._to_rows(self._to_prompts(prompt_weights) @ prompt_values, per_key) + own_weights @ value
        return output.reshape(*query.shape).transpose(1, 2).contiguous()

    def _to_prompts(self, values: Tensor) -> Tensor:
        """[B, k, r, x] -> [P, k, R r, x]: all rows of a prompt together, for one product with its keys or values."""
        values = values if self.in_order else values.index_select(0, self.row_of_place)
        return values.unflatten(0, (-1, self.most_rows)).transpose(1, 2).flatten(2, 3)

    def _to_rows(self, values: Tensor, per_key: int) -> Tensor:
        """[P, k, R r, x] -> [B, k, r, x]."""
        values = values.unflatten(2, (self.most_rows, per_key)).transpose(1, 2).flatten(0, 1)
        return values if self.in_order else values.index_select(0, self.place_B)
