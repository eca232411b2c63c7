"""Means over a split by hand, across batches of different size and Lightning's inference mode."""

import math
import pickle

import pytest
import torch

from stateset_lightning.evaluation import RewardMeans
from stateset_lightning.types import NOT_APPLICABLE

NAN = math.nan


def update(metric: RewardMeans, values: list[list[float]], totals: list[float], lengths: list[int]) -> None:
    metric.update(
        torch.tensor(values, dtype=torch.float64), torch.tensor(totals, dtype=torch.float64), torch.tensor(lengths)
    )


def test_means_are_over_completions_and_not_over_batches() -> None:
    metric = RewardMeans(["right"])
    update(metric, [[1.0], [0.0], [0.0]], [1.0, 0.0, 0.0], [1, 2, 3])
    update(metric, [[1.0]], [1.0], [6])
    assert metric.compute() == {
        "num_completions": 4,
        "mean_tokens": 3.0,
        "reward_failures": 0.0,
        "reward": 0.5,
        "reward/right": 0.5,
    }


def test_failures_are_counted_and_enter_no_mean() -> None:
    metric = RewardMeans(["right", "tone"])
    update(metric, [[1.0, 0.5], [NAN, 0.25], [0.0, NOT_APPLICABLE], [NAN, NAN]], [1.5, NAN, 0.0, NAN], [1, 1, 1, 1])
    values = metric.compute()
    assert values["reward"] == 0.75
    assert values["reward/right"] == 0.5
    assert values["reward/tone"] == 0.375
    assert values["reward_failures"] == 0.5
    assert values["num_completions"] == 4


def test_what_was_never_scored_has_no_mean() -> None:
    metric = RewardMeans(["right", "tone"])
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert metric.compute() == {"num_completions": 0}
    metric = RewardMeans(["right", "tone"])
    update(metric, [[NAN, 1.0]], [NAN], [2])
    assert metric.compute() == {"num_completions": 1, "mean_tokens": 2.0, "reward_failures": 1.0, "reward/tone": 1.0}


def test_a_reset_under_inference_mode_can_be_followed_by_updates_outside() -> None:
    metric = RewardMeans(["right"])
    with torch.inference_mode():
        update(metric, [[1.0]], [1.0], [9])
        metric.reset()
    update(metric, [[0.5]], [0.5], [1])
    update(metric, [[0.0]], [0.0], [1])
    assert metric.compute()["reward"] == 0.25
    with torch.inference_mode():
        update(metric, [[0.25]], [0.25], [1])
    assert metric.compute()["reward"] == pytest.approx(0.25)
    assert metric.compute()["num_completions"] == 3


def test_two_parts_merge_into_the_whole() -> None:
    whole, first, second = (RewardMeans(["right"]) for _ in range(3))
    for metric in (whole, first):
        update(metric, [[1.0], [NAN]], [1.0, NAN], [3, 4])
    for metric in (whole, second):
        update(metric, [[0.0]], [0.0], [5])
    first.merge_state(second)
    assert first.compute() == whole.compute()


def test_sums_keep_their_precision_over_many_completions() -> None:
    metric = RewardMeans(["right"])
    metric.update(torch.full((1, 1), 2.0**24), torch.full((1,), 2.0**24), torch.ones(1, dtype=torch.long))
    for _ in range(8):
        metric.update(torch.ones(1, 1), torch.ones(1), torch.ones(1, dtype=torch.long))
    assert metric.compute()["reward"] * 9 == pytest.approx(2.0**24 + 8, abs=1e-3)  # float32 would have lost the ones


def test_a_metric_can_be_pickled_for_another_process() -> None:
    metric = RewardMeans(["right"])
    update(metric, [[1.0]], [1.0], [2])
    assert pickle.loads(pickle.dumps(metric)).compute() == metric.compute()
