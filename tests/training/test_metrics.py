"""Metrics by hand, and that sums and counts add up over parts and ranks."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from stateset_lightning.algorithm import TokenBatch
from stateset_lightning.algorithm.terms import mismatch_metrics
from stateset_lightning.ranks import Ranks
from stateset_lightning.training.metrics import (
    RunMetrics,
    SumCounts,
    group_metrics,
    peak_memory_mb,
    reward_metrics,
    sample_metrics,
)
from stateset_lightning.training.resample import Sample
from stateset_lightning.types import NOT_APPLICABLE, FinishReason, Metrics, PromptBatch, RewardFailure, Rollout, Scores

NAN = math.nan
NO_BATCH = PromptBatch([], [], [], [], 0)  # nothing here looks at the prompts


@dataclass(frozen=True)
class WithOthers(Ranks):
    """A rank beside others whose values are known."""

    others: tuple[Any, ...] = ()

    def gather(self, value: Any) -> list[Any]:
        return [value, *self.others]


def plain(metrics: Metrics) -> dict[str, tuple[float, float]]:
    return {name: (float(total), float(count)) for name, (total, count) in metrics.items()}


def test_means_are_sums_over_counts_and_not_means_of_means() -> None:
    sums = SumCounts()
    sums.add({"a": (1.0, 1), "b": (torch.tensor(3.0), 2)})
    sums.add({"a": (torch.tensor(0.0), torch.tensor(3)), "c": (5.0, 0)})
    assert sums.means(Ranks()) == {"a": 0.25, "b": 1.5}


@pytest.mark.parametrize("scale", [0.3, 1.0, 7.0])
def test_the_effective_sample_size_is_a_share_whatever_the_weights_mean(scale: float) -> None:
    """1 / mean((w / mean w)^2) over all micro-steps; 1 / mean(w^2) would be 11 for equal weights of 0.3."""
    metrics, weights_T = RunMetrics(), torch.tensor([1.0, 4.0, 0.25, 1.5, 3.0, 1.0, 1.0]) * scale
    for part in (weights_T, torch.full((5,), scale)):
        logprobs_T, lengths_N = part.log(), torch.tensor([len(part)])
        sampling_T = torch.zeros(len(part))
        tokens = TokenBatch(logprobs_T, logprobs_T, torch.ones(1), lengths_N, sampling_logprobs_T=sampling_T)
        metrics.step.add(mismatch_metrics(tokens))
    of_all = torch.cat([weights_T, torch.full((5,), scale)]).double()
    expected = 1 / (of_all / of_all.mean()).square().mean().item()
    row = metrics.end_step(Ranks())
    assert row["mismatch/ess"] == pytest.approx(expected)
    assert row["mismatch/weight"] == pytest.approx(of_all.mean().item())


def test_reading_starts_anew() -> None:
    sums = SumCounts()
    sums.add({"a": (1.0, 1)})
    sums.means(Ranks())
    assert sums.means(Ranks()) == {}
    sums.add({"a": (4.0, 2)})
    assert sums.means(Ranks()) == {"a": 2.0}


def test_ranks_add_up_whatever_names_they_have() -> None:
    sums = SumCounts()
    sums.add({"a": (1.0, 1), "mine": (2.0, 1)})
    ranks = WithOthers(0, 3, others=({"a": (5.0, 2), "theirs": (3.0, 2)}, {}))
    assert sums.means(ranks) == {"a": 2.0, "mine": 2.0, "theirs": 1.5}


def test_reward_means_leave_out_failures_and_what_does_not_apply() -> None:
    values = torch.tensor([[1.0, NAN], [0.0, 0.5], [NOT_APPLICABLE, NAN]], dtype=torch.float64)
    scores = Scores(("right", "short"), values, values[:, 0])
    assert plain(reward_metrics(scores)) == {"reward/right": (1.0, 2.0), "reward/short": (0.5, 1.0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_by_kind(dtype: torch.dtype) -> None:
    totals_PG = torch.tensor(
        [
            [1.0, 1.0, 1.0],  # all right
            [0.0, 0.0, NAN],  # all wrong
            [-1.0, -1.0, -1.0],  # all wrong
            [1.0, 0.0, 0.5],  # mixed: standard deviation 1/2
            [1.0, 0.0, NAN],  # mixed: standard deviation of (1, 0)
            [1.0, NAN, NAN],  # dropped
            [NAN, NAN, NAN],  # dropped
        ],
        dtype=dtype,
    )
    metrics = plain(group_metrics(totals_PG))
    assert metrics == {
        "train/reward_std": (pytest.approx(0.5 + math.sqrt(0.5)), 5.0),
        "groups/all_right": (1.0, 7.0),
        "groups/all_wrong": (2.0, 7.0),
        "groups/mixed": (2.0, 7.0),
        "groups/dropped": (2.0, 7.0),
    }


def test_an_episodes_metrics_by_hand() -> None:
    totals_N = torch.tensor([1.0, 0.0, NAN, 1.0], dtype=torch.float64)
    failures = [
        RewardFailure(2, "right", "KeyError", "x"),
        RewardFailure(2, "right", "KeyError", "y"),
        RewardFailure(1, "tone", "TimeoutError", ""),
    ]
    scores = Scores(("right",), totals_N[:, None], totals_N, failures=failures)
    rollout = Rollout(
        [[1], [2]],
        torch.zeros(10, dtype=torch.long),
        torch.tensor([1, 2, 3, 4]),
        torch.zeros(10),
        torch.ones(10, dtype=torch.bool),
        [FinishReason.STOP, FinishReason.LENGTH, FinishReason.LENGTH, FinishReason.LENGTH],
        [""] * 4,
    )
    metrics = plain(sample_metrics(Sample(NO_BATCH, rollout, scores), torch.tensor([3.0, -1.0, NAN, NAN])))
    assert metrics == {
        "train/reward": (2.0, 3.0),
        "completion/mean_tokens": (10.0, 4.0),
        "completion/truncated": (3.0, 4.0),
        "advantage/std": (10.0, 2.0),
        "reward/right": (2.0, 3.0),
        "train/reward_std": (pytest.approx(math.sqrt(0.5)), 1.0),
        "groups/all_right": (0.0, 2.0),
        "groups/all_wrong": (0.0, 2.0),
        "groups/mixed": (1.0, 2.0),
        "groups/dropped": (1.0, 2.0),
    }


def test_an_episode_whose_rewards_all_failed_has_no_reward() -> None:
    totals_N = torch.full((2,), NAN, dtype=torch.float64)
    rollout = Rollout(
        [[1]],
        torch.zeros(2, dtype=torch.long),
        torch.tensor([1, 1]),
        torch.zeros(2),
        torch.ones(2, dtype=torch.bool),
        [FinishReason.STOP] * 2,
        [""] * 2,
    )
    sums = SumCounts()
    sums.add(sample_metrics(Sample(NO_BATCH, rollout, Scores(("right",), totals_N[:, None], totals_N)), totals_N))
    means = sums.means(Ranks())
    assert not {"train/reward", "reward/right", "train/reward_std", "advantage/std"} & set(means)
    assert means["groups/dropped"] == 1.0


def test_peak_memory_is_in_megabytes() -> None:
    assert 50 < peak_memory_mb(torch.device("cpu")) < 100_000  # torch alone takes more than the one
