"""Metrics of an episode and of an optimizer step: sums and counts that add up over micro-steps and ranks, divided
once.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from stateset_lightning.algorithm.advantages import is_constant
from stateset_lightning.ranks import Ranks
from stateset_lightning.rewards import failure_counts
from stateset_lightning.types import FinishReason, Metrics, Rollout, Scores


class SumCounts:
    """Adds up (sum, count) pairs by name."""

    def __init__(self) -> None:
        self._totals: dict[str, list[Tensor | float]] = {}

    def add(self, metrics: Metrics) -> None:
        for name, (total, count) in metrics.items():
            sums = self._totals.setdefault(name, [0.0, 0.0])
            # Tensors stay on their device until `means`: an addition does not wait for the device, `.item()` does.
            sums[0] = sums[0] + total
            sums[1] = sums[1] + count

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Sum over count, over all ranks; names without any count are left out. Starts anew afterwards."""
        mine = {name: (float(total), float(count)) for name, (total, count) in self._totals.items()}
        self._totals = {}
        everyone = ranks.gather(mine)
        names = sorted({name for totals in everyone for name in totals})
        totals = {
            name: [sum(pair) for pair in zip(*(t.get(name, (0.0, 0.0)) for t in everyone), strict=True)]
            for name in names
        }
        return {name: total / count for name, (total, count) in totals.items() if count}


class RunMetrics:
    """The newest value of every metric, and what each optimizer step has to log."""

    def __init__(self) -> None:
        self.step = SumCounts()
        self._of_episode: dict[str, float] = {}
        self._of_step: dict[str, float] = {}
        self._unlogged: dict[str, float] = {}

    @property
    def last(self) -> dict[str, float]:
        """Of the newest episode and the newest optimizer step; nothing that only an earlier one had."""
        return {**self._of_episode, **self._of_step}

    def add_episode(self, metrics: Metrics, rollout: Rollout, index: int, ranks: Ranks) -> None:
        """An episode's metrics: known now, logged with its first optimizer step."""
        sums = SumCounts()
        sums.add(metrics)
        means = sums.means(ranks)
        means["advantage/std"] = math.sqrt(means.get("advantage/std", 0.0))  # was averaged as a square
        ranges = ranks.gather((float(rollout.lengths_N.min()), float(rollout.lengths_N.max())))
        means["completion/min_tokens"] = min(low for low, _ in ranges)
        means["completion/max_tokens"] = max(high for _, high in ranges)
        self._of_episode = self._unlogged = {**means, "episode": float(index)}

    def end_step(self, ranks: Ranks) -> dict[str, float]:
        """One row for the loggers: the optimizer step's own metrics and, the first time, its episode's."""
        self._of_step = self.step.means(ranks)
        row = {**self._unlogged, **self._of_step}
        self._unlogged = {}
        return row

    def state_dict(self) -> dict[str, dict[str, float]]:
        return {"episode": self._of_episode, "step": self._of_step}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        self._of_episode, self._of_step = dict(state["episode"]), dict(state["step"])


def episode_metrics(
    rollout: Rollout, scores: Scores, advantages_N: Tensor, world: int = 1, sampled: Sequence[Scores] | None = None
) -> Metrics:
    """What can be said of this rank's completions before training on them. Failed rewards enter no mean.

    Failures are counted over all that was sampled for the episode, where that is more than it trains on.
    """
    lengths_N = rollout.lengths_N.double()
    count = len(lengths_N)
    truncated = sum(reason == FinishReason.LENGTH for reason in rollout.finish_reasons)
    totals_PG = scores.totals_N.reshape(-1, rollout.num_generations)
    scored_N = scores.totals_N.isfinite()
    trained_N = advantages_N.isfinite()
    metrics: Metrics = {
        "train/reward": (scores.totals_N[scored_N].sum(), int(scored_N.sum())),
        "completion/mean_tokens": (lengths_N.sum(), count),
        "completion/truncated": (truncated, count),
        "advantage/std": (advantages_N[trained_N].square().sum(), int(trained_N.sum())),
        **reward_metrics(scores),
        **group_metrics(totals_PG),
    }
    failures = sum((Counter(failure_counts(some)) for some in sampled or [scores]), Counter[str]())
    for key, number in failures.items():
        metrics[key] = (number, 1 / world)  # a sum over ranks, not a mean
    return metrics


def reward_metrics(scores: Scores, prefix: str = "reward/") -> Metrics:
    """Mean of each reward over the completions that it scored."""
    metrics: Metrics = {}
    for column, name in zip(scores.values_NF.T, scores.names, strict=True):
        scored = column[column.isfinite()]
        metrics[f"{prefix}{name}"] = (scored.sum(), len(scored))
    return metrics


def group_metrics(totals_PG: Tensor) -> Metrics:
    """Shares of groups: all right (constant, above zero), all wrong (constant, not above zero), mixed, dropped (under
    two survivors).
    """
    constant_P, dropped_P = constant_groups(totals_PG)
    highest_P = totals_PG.where(totals_PG.isfinite(), -torch.inf).amax(-1)
    std_P = torch.stack(
        [row[row.isfinite()].std() if ok else torch.tensor(0.0) for row, ok in zip(totals_PG, ~dropped_P, strict=True)]
    )
    count = len(totals_PG)
    return {
        "train/reward_std": (std_P.sum(), int((~dropped_P).sum())),
        "groups/all_right": ((constant_P & (highest_P > 0)).sum(), count),
        "groups/all_wrong": ((constant_P & (highest_P <= 0)).sum(), count),
        "groups/mixed": ((~constant_P & ~dropped_P).sum(), count),
        "groups/dropped": (dropped_P.sum(), count),
    }


def constant_groups(totals_PG: Tensor) -> tuple[Tensor, Tensor]:
    """Which groups have one and the same total reward, and which are dropped (under two survivors); bool [P] each."""
    dropped_P = totals_PG.isfinite().sum(-1) < 2
    return is_constant(totals_PG) & ~dropped_P, dropped_P


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MB: allocated on a CUDA device since the start, resident of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes on macOS, KiB on Linux
