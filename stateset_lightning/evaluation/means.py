"""Means over the prompts of a split, with intervals, and by topic: exact over batches and ranks. Letters: P prompts, M
measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from stateset_lightning.evaluation.estimators import half_width, wilson_interval

TOPIC_BYTES = 64


class PromptMeans(Metric):
    """Means of some measures over all prompts. A value of NaN says nothing about its prompt and enters no mean.

    `compute` gives each measure by name; `<name>_ci95`, half of its 95% interval by the normal approximation, for those
    in `intervals`; `<name>_low` and `<name>_high`, Wilson's 95% interval, for those in `shares`, which are 0 or 1; and
    `topic/<topic>/<name>` for those in `by_topic`. Prompts are taken as independent of each other.

    Args:
        names: The M measures.
        intervals: Those with a normal interval.
        shares: Those with Wilson's.
        by_topic: Those shown for every topic.

    Example:
        >>> metric = PromptMeans(["solved"], by_topic=["solved"])
        >>> metric.update(torch.tensor([[1.0], [0.0], [1.0]]), ["sums", "sums", None])
        >>> {name: round(value, 3) for name, value in metric.compute().items()}
        {'solved': 0.667, 'topic/sums/solved': 0.5}
    """

    full_state_update = False
    values_PM: list[Tensor]
    topics_PB: list[Tensor]  # as bytes: ranks see different topics, and torchmetrics gathers tensors alone

    def __init__(
        self,
        names: Sequence[str],
        *,
        intervals: Sequence[str] = (),
        shares: Sequence[str] = (),
        by_topic: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.names, self.intervals, self.shares, self.by_topic = (
            tuple(names),
            tuple(intervals),
            tuple(shares),
            tuple(by_topic),
        )
        self.add_state("values_PM", [], dist_reduce_fx="cat")
        self.add_state("topics_PB", [], dist_reduce_fx="cat")

    def logged_names(self) -> list[str]:
        """Names of all that `compute` may give; `<topic>` stands for any."""
        names = [*self.names, *(f"{name}_ci95" for name in self.intervals)]
        names += [f"{name}_{end}" for name in self.shares for end in ("low", "high")]
        return names + [f"topic/<topic>/{name}" for name in self.by_topic]

    def update(self, values_PM: Tensor, topics: Sequence[str | None]) -> None:
        """Adds prompts: the measures of each, and its topic."""
        self.values_PM.append(values_PM.to(self.device).double())
        encoded = torch.tensor([list(_encode(topic)) for topic in topics], dtype=torch.uint8, device=self.device)
        self.topics_PB.append(encoded.reshape(-1, TOPIC_BYTES))

    def compute(self) -> dict[str, float]:
        if not len(self.values_PM):
            return {}
        values_PM = dim_zero_cat(self.values_PM).cpu()
        topics = [bytes(row).rstrip(b"\0").decode() for row in dim_zero_cat(self.topics_PB).tolist()]
        result: dict[str, float] = {}
        for name, values_P in zip(self.names, values_PM.T, strict=True):
            known = values_P[values_P.isfinite()].tolist()
            if not known:
                continue
            result[name] = sum(known) / len(known)
            if name in self.intervals and len(known) > 1:
                result[f"{name}_ci95"] = half_width(known)
            if name in self.shares:
                result[f"{name}_low"], result[f"{name}_high"] = wilson_interval(result[name], len(known))
        for topic in sorted(set(topics) - {""}):
            rows_PM = values_PM[torch.tensor([other == topic for other in topics])]
            for name in self.by_topic:
                known = [value for value in rows_PM[:, self.names.index(name)].tolist() if value == value]
                if known:
                    result[f"topic/{topic}/{name}"] = sum(known) / len(known)
        return result


def _encode(topic: str | None) -> bytes:
    """A topic as `TOPIC_BYTES` bytes; of a longer one the beginning and a digest, so that it stays apart from
    others.
    """
    text = (topic or "").encode()
    if len(text) > TOPIC_BYTES:
        digest = blake2b(text, digest_size=4).hexdigest()
        text = f"{text[: TOPIC_BYTES - 9].decode(errors='ignore')}-{digest}".encode()
    return text.ljust(TOPIC_BYTES, b"\0")


# MERGED: Mean rewards over a split: exact over batches and ranks of any size. Letters: N completions, F rewards.


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
