"""Means over prompts by hand: NaN left out, topics, intervals, and two ranks of different size."""

import math

import pytest
import torch

from stateset_lightning.evaluation.means import PromptMeans

NAN = math.nan


def make(**options):
    return PromptMeans(["reward", "solved"], intervals=["reward"], shares=["solved"], **options)


def test_means_intervals_and_topics_by_hand():
    metric = make()
    metric.update(torch.tensor([[0.5, 1.0], [NAN, NAN]]), ["sums", "sums"])
    metric.update(torch.tensor([[1.5, 0.0], [1.0, 1.0]]), ["dates/iso", None])
    values = metric.compute()
    assert values.pop("reward_ci95") == pytest.approx(1.959964 * 0.5 / math.sqrt(3))
    low, high = values.pop("solved_low"), values.pop("solved_high")
    assert (low, high) == pytest.approx((0.2077, 0.9385), abs=1e-4)
    assert values == {
        "reward": 1.0,
        "solved": pytest.approx(2 / 3),
        "topic/sums/reward": 0.5,
        "topic/dates/iso/reward": 1.5,
        "topic/sums/solved": 1.0,
        "topic/dates/iso/solved": 0.0,
        "num_completions": 4,
    }
    assert set(metric.logged_names()) == {
        "reward",
        "solved",
        "reward_ci95",
        "solved_low",
        "solved_high",
        "topic/<topic>/reward",
        "topic/<topic>/solved",
        "num_completions",
    }


def test_nothing_known_gives_nothing():
    metric = make()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert metric.compute() == {"num_completions": 0}
    metric.update(torch.tensor([[NAN, NAN]]), ["sums"])
    assert metric.compute() == {"num_completions": 1}
    metric.reset()
    metric.update(torch.tensor([[2.0, 1.0]]), [None])
    # no spread can be told from one prompt
    assert set(metric.compute()) == {"reward", "solved", "solved_low", "solved_high", "num_completions"}


def test_long_topics_stay_apart():
    metric = make()
    metric.update(torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), ["é" * 60 + "a", "é" * 60 + "b", "x" * 64])
    topics = {name: value for name, value in metric.compute().items() if name.endswith("/solved")}
    assert sorted(topics.values()) == [0.0, 1.0, 1.0]
    assert f"topic/{'x' * 64}/solved" in topics


def test_ranks_of_different_size_and_with_different_topics_give_the_whole():
    rows, topics = torch.tensor([[0.5, 1.0], [0.25, 0.0], [1.0, 1.0]]), ["a", "b", "c"]
    whole = make()
    whole.update(rows, topics)
    parts = [(rows[:2], topics[:2]), (rows[2:], topics[2:])]
    ranks = [PromptMeans(["reward", "solved"]) for _ in parts]
    for rank, part in zip(ranks, parts, strict=True):
        rank.update(*part)

    def gather(mine, group=None):
        name = "values_PM" if mine.dtype == torch.float64 else "topics_PB"
        return [getattr(rank, name)[0] for rank in ranks]

    metric = make(dist_sync_fn=gather, distributed_available_fn=lambda: True)
    metric.update(*parts[0])
    assert metric.compute() == whole.compute()
