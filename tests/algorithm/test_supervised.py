"""Maximum likelihood: of targets, and of the best completion of a group, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from stateset_lightning.algorithm import KL, RAFT, Supervised, TokenBatch
from stateset_lightning.algorithm.aggregation import per_token
from stateset_lightning.errors import ConfigError, tell_once

NAN = math.nan
LENGTHS_PG = torch.tensor([[1, 3], [2, 2]])
LOGPROBS_T = torch.tensor([-0.5, -1.0, -2.0, -3.0, -0.25, -0.75, -4.0, -5.0], dtype=torch.float64)


def loss_of(algorithm: Any, rewards: list[list[float]]) -> float:
    """The mean loss of two groups of two completions, as training forms it."""
    algorithm.setup(max_new_tokens=10)
    advantages_N = algorithm.advantages(torch.tensor(rewards)[..., None], torch.ones(1)).flatten()
    lengths_N, groups_N = LENGTHS_PG.flatten(), torch.tensor([0, 0, 1, 1])
    trains_N = advantages_N.isfinite()
    weights_N = algorithm.token_weights(lengths_N, groups_N, trains_N)
    tokens = TokenBatch(LOGPROBS_T, LOGPROBS_T - 1, advantages_N.nan_to_num(), lengths_N)  # old ones do not count
    return float((per_token(weights_N, lengths_N) * algorithm.per_token_loss(tokens)[0]).sum())


@pytest.mark.parametrize("rewards", [[[1, 0], [0, 0]], [[NAN, NAN], [-3, math.inf]]], ids=["scored", "failed"])
def test_supervised_is_the_mean_over_all_tokens_whatever_their_reward(rewards: Any) -> None:
    assert loss_of(Supervised(), rewards) == pytest.approx(16.5 / 8)


@pytest.mark.parametrize(
    ("rewards", "options", "chosen"),
    [
        ([[1, 0], [0, 1]], {}, [0, 3]),
        ([[1, 1], [0, 0]], {}, [0, 2]),  # of several best ones the first, also where all are alike
        ([[NAN, -2], [NAN, NAN]], {}, [1]),  # one survivor is the best; failed ones never
        ([[0.4, 0.5], [0.5, 0.49]], {"minimum_reward": 0.5}, [1, 2]),
        ([[0, 0], [0, 1]], {"minimum_reward": 1}, [3]),
        ([[math.inf, 0], [-1, -math.inf]], {}, [1, 2]),
    ],
    ids=["best", "ties", "failed", "at the minimum", "below it", "infinite"],
)
def test_raft_trains_the_best_of_each_group(rewards: Any, options: Any, chosen: list[int]) -> None:
    advantages_N = RAFT(**options).advantages(torch.tensor(rewards)[..., None], torch.ones(1)).flatten()
    assert advantages_N.isfinite().nonzero().flatten().tolist() == chosen
    assert (advantages_N[chosen] == 1).all()
    parts = [LOGPROBS_T.split([1, 3, 2, 2])[n] for n in chosen]
    # The mean over the tokens of the chosen alone: a group that trains nothing is no part of it.
    assert loss_of(RAFT(**options), rewards) == pytest.approx(-float(torch.cat(parts).mean()))


def test_a_minimum_that_no_reward_reaches_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    algorithm, weights_F = RAFT(minimum_reward=2), torch.tensor([0.5])
    tell_once.cache_clear()
    for rewards in ([[2.0, NAN], [4.0, 1.0]], [[NAN, NAN], [NAN, NAN]], [[1.0, 3.0], [2.0, NAN]], [[1.0, 1.0]]):
        algorithm.advantages(torch.tensor(rewards)[..., None], weights_F)
    (told,) = caplog.messages  # of the first of two; the one before reaches it, the one between has failed
    assert told.startswith("model.algorithm.minimum_reward=2: no reward of an episode reaches it; lower it")


def test_a_step_of_which_nothing_is_chosen_has_no_loss() -> None:
    assert loss_of(RAFT(minimum_reward=2), [[1, 0], [0, 0]]) == 0


@pytest.mark.parametrize(
    "option",
    ["mismatch", "off_policy_threshold", "mask_truncated", "scale", "advantage_clip", "positive_coefficient"],
)
def test_supervised_has_no_option_that_only_samples_could_honour(option: str) -> None:
    with pytest.raises(TypeError, match=option):
        Supervised(**{option: 0.5})


def test_a_kl_in_the_reward_of_a_target_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"kl\.place='reward' does not go with Supervised: what it learns is not weighed by rewards"
    ):
        Supervised(beta=0.1, kl=KL("k1", "reward"))


@pytest.mark.parametrize("preset", [Supervised, RAFT])
def test_servers_bring_no_correction_along(preset: type[Supervised | RAFT]) -> None:
    algorithm = preset()
    algorithm.setup(8, samples_elsewhere=True)
    assert algorithm.mismatch is not None
    assert algorithm.mismatch.kind == "none"
