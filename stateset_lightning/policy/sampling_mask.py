"""What top-k, top-p and min-p left of the vocabulary when a token was sampled, so that scoring leaves the same.

Letters: T sampled tokens, K kept tokens of all of them together, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingMask:
    """For each of T sampled tokens, the tokens of the vocabulary that it was drawn from; in the host's memory.

    Ids, since there are few as a rule (tens for a top-p of 0.95): a bit for every token of a vocabulary of 150,000
    would take 19 kB per sampled token.

    Args:
        ids_K: int32; the kept tokens, those of one sampled token behind those of the one before.
        counts_T: int32; how many of them each sampled token has.
    """

    ids_K: Tensor
    counts_T: Tensor

    @classmethod
    def cat(cls, masks: Sequence["SamplingMask"]) -> "SamplingMask":
        """As `torch.cat`."""
        return cls(torch.cat([mask.ids_K for mask in masks]), torch.cat([mask.counts_T for mask in masks]))

    def split(self, sizes: Sequence[int]) -> list["SamplingMask"]:
        """As `Tensor.split`, by numbers of sampled tokens."""
        counts = self.counts_T.split(list(sizes))
        ids = self.ids_K.split([int(some.sum()) for some in counts])
        return [SamplingMask(*pair) for pair in zip(ids, counts, strict=True)]

    def __getitem__(self, tokens: Tensor | slice) -> "SamplingMask":
        """Of some sampled tokens: a slice, a bool mask [T], or their places in the order that is wanted."""
        counts = self.counts_T[tokens]
        shifts = (self.counts_T.cumsum(0) - self.counts_T)[tokens] - (counts.cumsum(0) - counts)
        places_K = torch.arange(int(counts.sum()), device=counts.device) + shifts.repeat_interleave(counts)
        return SamplingMask(self.ids_K[places_K], counts)

    def exclude(self, logits: Tensor, first: int = 0) -> Tensor:
        """Logits [T, columns] of the vocabulary from `first` on, changed in place: what was excluded is impossible."""
        is_here_K = (self.ids_K >= first) & (self.ids_K < first + logits.shape[-1])
        rows_K = torch.arange(len(logits), device=self.ids_K.device).repeat_interleave(self.counts_T)
        excluded = torch.ones_like(logits, dtype=torch.bool)
        excluded[rows_K[is_here_K], self.ids_K[is_here_K].long() - first] = False
        # Nothing is left of its probability, and what is multiplied by that is zero, not the NaN that infinity would
        # give: the logit in the entropy, its square in the gradient of a soft cap.
        return logits.masked_fill_(excluded, -1e15)
