"""Mean rewards over a split: exact over batches and ranks of any size. Letters: N completions, F rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class RewardMeans(Metric):
    """Means over all completions seen, not means of batch means.

    `compute` gives `reward` (mean total over completions without a failure), `reward/<name>` (mean over the completions
    that this reward scored), `reward_failures` (share of completions that failed), `mean_tokens` and `num_completions`.

    Example:
        >>> metric = RewardMeans(["right"])
        >>> metric.update(torch.tensor([[1.0], [0.0]]), torch.tensor([1.0, 0.0]), torch.tensor([3, 5]))
        >>> metric.update(torch.tensor([[1.0]]), torch.tensor([1.0]), torch.tensor([1]))
        >>> round(metric.compute()["reward"], 3)
        0.667
    """

    full_state_update = False
    sums_F: Tensor
    counts_F: Tensor
    totals: Tensor  # sum of total rewards, completions without failure, tokens, completions

    def __init__(self, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = tuple(names)
        self.add_state("sums_F", torch.zeros(len(names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts_F", torch.zeros(len(names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("totals", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")

    @staticmethod
    def logged_names(names: Sequence[str]) -> list[str]:
        """Names of all that `compute` may give for rewards of these names."""
        return ["reward", *(f"reward/{name}" for name in names), "reward_failures", "mean_tokens", "num_completions"]

    def update(self, values_NF: Tensor, totals_N: Tensor, lengths_N: Tensor) -> None:
        """Adds completions: scores by reward, weighted totals (NaN for a failed completion), lengths in tokens."""
        scored_NF = values_NF.isfinite()
        # Not in place: a state that was reset under `validate`'s inference mode cannot be written to in `fit`.
        self.sums_F = self.sums_F + values_NF.where(scored_NF, 0.0).sum(0)
        self.counts_F = self.counts_F + scored_NF.sum(0)
        whole_N = totals_N.isfinite()
        counts = [totals_N[whole_N].sum(), whole_N.sum(), lengths_N.sum(), totals_N.new_tensor(len(totals_N))]
        self.totals = self.totals + torch.stack([count.double() for count in counts])

    def compute(self) -> dict[str, float]:
        total, scored, tokens, count = self.totals.tolist()
        values = {"num_completions": count}
        if count:
            values |= {"mean_tokens": tokens / count, "reward_failures": 1 - scored / count}
        if scored:
            values["reward"] = total / scored
        for name, sum_, number in zip(self.names, self.sums_F.tolist(), self.counts_F.tolist(), strict=True):
            if number:
                values[f"reward/{name}"] = sum_ / number
        return values
