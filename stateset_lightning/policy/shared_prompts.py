"""Attention of a decoding step whose rows share prompts: a prompt's keys and values are kept and read once for its
whole group.

Each row attends to its prompt, which lies beside the cache, and to its own tokens, which are the cache. One softmax
runs over both, so the result is that of plain attention over the two in a row. The stock kernel reads a repeated copy
of the prompt for every row, and reading is what decoding on a CPU waits for.

Letters: B rows, P prompts, L their longest length, R rows of a prompt at most, k key heads, r query heads per key head,
    C own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ARGUMENT = "shared_prompts"


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
