"""Advantages of turns: by hand, as those of conversations where there is one turn, and in runs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from module_runs import DigitReward, GradientRecorder, fit, make_data, make_module, weights
from torch import Tensor
from training.test_episode import make_rollout, on_ranks

from stateset_lightning import RolloutConfig, algorithm
from stateset_lightning.algorithm import DAPO, GRPO, Algorithm, DrGRPO, KLCov, OnPolicyDistillation, TokenBatch
from stateset_lightning.environments import EnvironmentConfig, as_environment
from stateset_lightning.environments.conversation import Conversation
from stateset_lightning.errors import ConfigError
from stateset_lightning.ranks import Ranks
from stateset_lightning.rewards import EnvironmentReward, LengthPenalty
from stateset_lightning.training.episode import Plan, make_episode
from stateset_lightning.training.loss import selected_tokens
from stateset_lightning.training.reward_checks import check_environment
from stateset_lightning.training.turns import TrainedScores, score_by_turns, turn_scores
from stateset_lightning.types import NOT_APPLICABLE, Scenario, Scores

NAN = math.nan
Turns = list[list[tuple[int, float]]]
REWARDS = [EnvironmentReward(), DigitReward(weight=0.5)]
WEIGHTS_F = [1.0, 0.5]


class Asks:
    """Asks twice more, and gives 1 for each answer that has an even digit."""

    def reset(self, scenario: Mapping[str, Any], seed: int) -> None:
        self.left = 2

    def step(self, text: str) -> tuple[str, float, bool]:
        self.left -= 1
        return "What is 5 + 9?", float(any(c in "02468" for c in text)), self.left < 0


class Judges(Asks):
    def get_reward(self) -> float:
        return 4.0


@pytest.mark.parametrize(
    ("environment", "rewards", "discount", "returns"),
    [
        (Asks(), [1.0, None, 2.0], 0.5, [1.5, 1.0, 2.0]),
        (Asks(), [1.0, None, 2.0], 1.0, [3.0, 2.0, 2.0]),
        (Asks(), [1.0, None, 2.0], 0.0, [1.0, 0.0, 2.0]),
        (Asks(), [1.0, 3.0], 0.5, [2.5, 3.0, 0.0]),  # the last turn was cut off
        (Judges(), [1.0, 1.0, 1.0], 0.5, [1.0, 2.0, 4.0]),
    ],
)
def test_a_return_is_what_follows_a_turn(
    environment: Any, rewards: list[float | None], discount: float, returns: list[float]
) -> None:
    conversation = Conversation([], [], Scenario(id="a", prompt="?"), as_environment(environment), rewards=rewards)
    for tokens in ([1, 2], [3], [4, 5, 6]):
        conversation.add(tokens, [0.0] * len(tokens))
        conversation.add([7])
    assert conversation.credits(4.0, discount) == list(zip([2, 1, 3], returns, strict=True))


def episode_of(
    turns: Turns, rewards: list[list[float]], how: Algorithm, ranks: Ranks | None = None, size: int = 0
) -> Any:
    """Of groups of `size` conversations, all by default; there is one token of an environment before each turn."""
    ranks, size = ranks or Ranks(), size or len(turns)
    mine = [n for n in range(len(turns)) if n // size % ranks.world == ranks.rank]
    turns, values_NF = [turns[n] for n in mine], torch.tensor([rewards[n] for n in mine], dtype=torch.float64)
    totals_N = values_NF @ torch.tensor(WEIGHTS_F, dtype=torch.float64)
    scores = Scores(("environment", "digit"), values_NF, totals_N)
    rollout = make_rollout([sum(1 + tokens for tokens, _ in of_one) for of_one in turns], len(turns) // size)
    sampled = [i > 0 for of_one in turns for tokens, _ in of_one for i in range(1 + tokens)]
    rollout.sampled_T.copy_(torch.tensor(sampled))
    plan = Plan(len(turns) // size, size, 1, 1, ranks)
    of_turns = turn_scores(scores, turns, REWARDS, ranks)
    return make_episode(0, rollout, TrainedScores(scores, WEIGHTS_F, turns=of_turns), how, plan)


def by_turn(episode: Any, turns: Turns) -> list[list[float]]:
    """The advantage of each turn, which all its tokens have."""
    values = iter(episode.advantages_T[episode.sampled_T].tolist())
    found = []
    for of_one in turns:
        of_turns = [{next(values) for _ in range(tokens)} for tokens, _ in of_one]
        assert all(len(same) == 1 or all(map(math.isnan, same)) for same in of_turns)
        found.append([of_turn.pop() for of_turn in of_turns])
    return found


TWO: Turns = [[(2, 1.0), (1, 0.0)], [(3, 3.0), (2, 2.0)], [(1, 2.0)], [(1, 0.0), (1, 1.0), (2, 5.0)]]
"""Four conversations of a group, of two turns, two, one and three: (sampled tokens, return) of each."""


def test_turns_are_compared_with_the_same_turn_of_the_others_by_hand() -> None:
    rewards = [
        [1.0, 0.0],
        [3.0, 2.0],
        [2.0, 0.0],
        [0.0, 2.0],
    ]
    episode = episode_of(TWO, rewards, DrGRPO(constant_length=4))
    # The second reward, of weight 0.5, is the conversation's. First turns: 1, 4, 2, 1 with a mean of 2.
    # Second turns: 0, 3 and 2 with a mean of 5/3. The third has no other.
    expected = [[-1, -5 / 3], [2, 4 / 3], [0], [-1, 1 / 3, 0]]
    for found, wanted in zip(by_turn(episode, TWO), expected, strict=True):
        assert found == pytest.approx(wanted)
    assert episode.active_N.tolist() == [True, True, False, True]
    assert not episode.advantages_T[~episode.sampled_T].any()

    scaled = by_turn(episode_of(TWO, rewards, GRPO(beta=0)), TWO)
    deviations = [math.sqrt(6 / 3), math.sqrt(14 / 3 / 2)]
    for found, wanted in zip(scaled, expected, strict=True):
        assert found[:2] == pytest.approx([a / (d + 1e-4) for a, d in zip(wanted, deviations, strict=False)])
        assert found[2:] == wanted[2:]


def test_failed_conversations_are_nan_in_each_turn_and_count_in_no_baseline() -> None:
    rewards = [[NAN, 0.0], [3.0, 0.0], [2.0, 0.0], [0.0, NAN]]
    episode = episode_of(TWO, rewards, DrGRPO(constant_length=4))
    first, second, third, last = by_turn(episode, TWO)
    assert all(map(math.isnan, first + last))
    assert (second, third) == ([0.5, 0.0], [-0.5])  # the second turn has nothing left to compare with
    assert episode.active_N.tolist() == [False, True, True, False]
    none_left = episode_of(TWO, [[NAN, 0.0], [3.0, 0.0], [NAN, 0.0], [NAN, 0.0]], DrGRPO(constant_length=4))
    assert none_left.advantages_T[none_left.sampled_T].isnan().all()  # as the group is dropped


def test_where_the_environment_gives_nothing_the_other_rewards_stay() -> None:
    turns: Turns = [[(1, 0.0), (1, 0.0)], [(1, 0.0), (1, 0.0)]]
    episode = episode_of(turns, [[NOT_APPLICABLE, 2.0], [NOT_APPLICABLE, 0.0]], DrGRPO(constant_length=4))
    assert by_turn(episode, turns) == [[0.5, 0.5], [-0.5, -0.5]]


PRESETS = [one for one in vars(algorithm).values() if isinstance(one, type) and issubclass(one, Algorithm)]


def takes_turns(how: Algorithm) -> bool:
    try:
        check_environment(EnvironmentConfig(Asks, turn_rewards="discounted"), REWARDS, how)
    except ConfigError:
        return False
    return True


def test_algorithms_of_whole_completions_are_refused() -> None:
    refused = {preset.__name__ for preset in PRESETS if not takes_turns(preset())}
    of_completions = {"GSPO", "LUSPO", "GMPO", "DRO", "ReMax"}
    assert refused == of_completions | {"Supervised", "RAFT", "MaximumLikelihood"} & refused | {
        "OnPolicyDistillation",
        "GKD",
    }
    assert {"Supervised", "RAFT"} <= refused
    assert takes_turns(OnPolicyDistillation(reward_weight=1.0))


@pytest.mark.parametrize("preset", [one for one in PRESETS if takes_turns(one())], ids=lambda one: one.__name__)
def test_of_one_turn_each_it_is_the_advantage_of_the_conversation(preset: type[Algorithm]) -> None:
    rewards = [[0.125, 0.5], [1.0, 0.25], [0.5, 0.0], [NAN, 1.0], [0.0, 0.0], [1.0, 0.0], [0.25, 0.25], [0.75, 0.0]]
    rewards = [[environment / 2, digit] for environment, digit in rewards]
    turns: Turns = [[(1 + n % 3, environment)] for n, (environment, _) in enumerate(rewards)]
    options = {"constant_length": 4} if preset.aggregation == "constant_length" else {}
    episode = episode_of(turns, rewards, preset(**options), size=4)
    lengths = torch.tensor([tokens for ((tokens, _),) in turns])
    expected_T = episode.advantages_N.repeat_interleave(lengths)
    assert torch.equal(episode.advantages_T[episode.sampled_T].nan_to_num(9), expected_T.nan_to_num(9))
    trains_N = episode.advantages_N.isfinite()
    assert torch.equal(episode.active_N, trains_N & ((episode.advantages_N != 0) | preset().trains_on_zero_advantage))


def test_ranks_see_the_turns_of_all() -> None:
    turns = [*TWO, *[[(1, 2.0)], [(2, 1.0)], [(1, 0.0)], [(1, 0.0)]]]  # a rank whose conversations are shorter
    rewards = [[float(n % 3), 0.0] for n in range(8)]
    how = GRPO(beta=0, scale="batch")
    alone = by_turn(episode_of(turns, rewards, how, size=4), turns)
    shared = on_ranks(2, lambda ranks: episode_of(turns, rewards, how, ranks, size=4))
    assert [*by_turn(shared[0], TWO), *by_turn(shared[1], turns[4:])] == alone


class Kept(KLCov):
    shown: Any = None

    def select(self, tokens: TokenBatch, seed: int) -> Tensor:
        self.shown = tokens
        return torch.ones_like(tokens.logprobs_T, dtype=torch.bool)


def test_selections_and_micro_batches_have_the_advantages_of_turns() -> None:
    how = Kept(scale="none")
    episode = episode_of(TWO, [[1.0, 0.0], [3.0, 0.0], [2.0, 0.0], [0.0, 0.0]], how)
    own_T = episode.advantages_T[episode.sampled_T]
    zeros_T = torch.zeros(len(episode.sampled_T))
    selected_tokens(episode, zeros_T, zeros_T, how, Plan(1, 4, 1, 1), seed=1)
    assert torch.equal(how.shown.advantages_T, own_T)
    assert torch.equal(episode.active_batch().advantages_T, own_T)
    rows_N = torch.tensor([False, True, False, True])
    assert torch.equal(episode.batch_of(rows_N).advantages_T, torch.cat([own_T[3:8], own_T[9:13]]))


def test_scores_by_the_number_of_turns_by_hand() -> None:
    totals_N = torch.tensor([1.0, 0.5, NAN, 3.0], dtype=torch.float64)  # the only conversation of one turn has failed
    assert score_by_turns(totals_N, TWO) == {
        "conversation/score_by_turns/2": (1.5, 2),
        "conversation/score_by_turns/3": (3.0, 1),
    }
    assert score_by_turns(totals_N, []) == {}


def test_runs_log_scores_by_the_number_of_turns(tmp_path: Path) -> None:
    module = module_of()
    trainer = fit(tmp_path, module, max_steps=1, limit_val_batches=1, val_check_interval=1)
    sample, last = module.state.collection.sample, module.metrics.last
    assert last["conversation/turns"] == sum(map(len, sample.turns)) / len(sample.turns)
    for n in {len(of_one) for of_one in sample.turns}:
        totals = [
            t for t, of_one in zip(sample.scores.totals_N.tolist(), sample.turns, strict=True) if len(of_one) == n
        ]
        assert last[f"conversation/score_by_turns/{n}"] == pytest.approx(sum(totals) / len(totals))
    shown = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/score_by")}
    assert shown
    assert 1 <= trainer.callback_metrics["val/turns"] <= 3
    alone = fit(tmp_path, make_module(), max_steps=1, limit_val_batches=1, val_check_interval=1)
    assert not [name for name in alone.callback_metrics if "turns" in name]


def module_of(**options: Any) -> Any:
    environment = EnvironmentConfig(Asks, turn_rewards="discounted", turn_discount=0.5)
    rollout = RolloutConfig(num_generations=3, max_new_tokens=4)
    given = {"environment": environment, "rollout": rollout, "reward": [EnvironmentReward(), LengthPenalty(1)]}
    return make_module(**{**given, "algorithm": DAPO(), **options})


def test_the_gradient_does_not_depend_on_micro_steps_and_differs_from_that_of_sums(tmp_path: Path) -> None:
    def gradient(steps: int, **options: Any) -> dict[str, Tensor]:
        recorder = GradientRecorder()
        data = make_data(validation=None, steps_per_episode=steps)
        fit(tmp_path, module_of(**options), data, max_steps=1, callbacks=[recorder], accumulate_grad_batches=steps)
        return recorder.steps[0]

    whole, split, summed = gradient(1), gradient(4), gradient(1, environment=EnvironmentConfig(Asks))
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, rtol=2e-4, atol=1e-7)
    assert any(not torch.allclose(summed[name], value, rtol=0.01) for name, value in whole.items())


def test_a_run_resumed_inside_an_episode_ends_bit_by_bit_as_if_not(tmp_path: Path) -> None:
    def run(name: str, ckpt_path: Path | None = None) -> dict[str, Tensor]:
        keep_all = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        options = {"callbacks": [keep_all], "enable_checkpointing": True, "max_steps": 3}
        data = make_data(validation=None, num_iterations=2)
        return weights(fit(tmp_path, module_of(), data, ckpt_path=ckpt_path, **options))

    straight = run("straight")
    resumed = run("resumed", tmp_path / "straight" / "step=1.ckpt")
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": DigitReward()}, "turn_rewards=discounted: needs the environment's reward: add EnvironmentReward"),
        ({"reward": [DigitReward(), EnvironmentReward(weight=0)]}, "add EnvironmentReward to model.reward"),
        ({"algorithm": algorithm.GSPO()}, "GSPO has one advantage for a whole completion: .* such as GSPOToken"),
        ({"algorithm": algorithm.RAFT()}, "RAFT weighs nothing by rewards"),
    ],
)
def test_what_cannot_be_honoured_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, module_of(**options))


def test_a_discount_without_its_rule_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"turn_discount=0\.9 has no effect with turn_rewards=sum"):
        EnvironmentConfig(Asks, turn_discount=0.9)
    assert inspect.signature(EnvironmentConfig).parameters["turn_rewards"].default == "sum"
