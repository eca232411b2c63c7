"""The KL's score column by hand; selections see all ranks' tokens in order and come back to where they belong."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from module_runs import fit, make_data, make_module
from training.test_episode import make_rollout, make_scores, on_ranks

from stateset_lightning.algorithm import KL, Clipped, TokenBatch, TopEntropy
from stateset_lightning.ranks import Ranks
from stateset_lightning.rewards import ExactMatch
from stateset_lightning.rollout import RolloutConfig
from stateset_lightning.training.episode import Episode, Plan, make_episode
from stateset_lightning.training.loss import selected_tokens, trained_scores
from stateset_lightning.types import NOT_APPLICABLE, Scores

NAN = math.nan


def test_the_kl_is_one_more_score_and_a_completion_without_reward_stays_without() -> None:
    rollout = make_rollout([2, 1, 1], 1)  # log-probs 0, -0.001, -0.1, -0.2
    values_NF = torch.tensor([[1.0], [NAN], [NOT_APPLICABLE]], dtype=torch.float64)
    scores = Scores(("right",), values_NF, torch.tensor([1.0, NAN, NAN], dtype=torch.float64))
    algorithm = Clipped(beta=0.1, kl=KL(estimator="k1", place="reward"))
    policy, reference = (
        SimpleNamespace(score_without_gradient=lambda groups, temperature, known_T=known_T: (known_T, None))
        for known_T in (rollout.logprobs_T, torch.tensor([-0.5, -0.5, -1.0, -1.0]))
    )
    sampler = SimpleNamespace(scorer=SimpleNamespace(rewards=[ExactMatch(name="right")]), config=RolloutConfig())
    step: Any = SimpleNamespace(algorithm=algorithm, sampler=sampler, sampled_policy=policy, reference=reference)
    collection: Any = SimpleNamespace(sample=SimpleNamespace(scores=scores, rollout=rollout), baseline=None)
    scored = trained_scores(step, collection)
    assert (scored.scores.names, scored.weights) == (("right", "kl"), [1.0, -0.1])
    kl_N = scored.scores.values_NF[:, 1]
    assert kl_N[0].item() == pytest.approx((0.0 + 0.5) + (-0.001 + 0.5), abs=1e-4)  # rounded
    assert kl_N[1:].isnan().all()


class FirstOfAll(Clipped):
    """Keeps the first half of the tokens that it is shown, and remembers them."""

    selects_tokens = True  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[tuple[TokenBatch, int]] = []

    def select(self, tokens: TokenBatch, seed: int) -> torch.Tensor:
        self.shown.append((tokens, seed))
        return torch.arange(len(tokens.logprobs_T)) < len(tokens.logprobs_T) // 2


LENGTHS, REWARDS = [1, 2, 3, 1, 2, 2, 1, 1], [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, NAN, 0.0]
"""Four prompts of two: two mixed groups, a constant one, a dropped one."""


def episode_of(ranks: Ranks, steps: int) -> tuple[Episode, Plan]:
    lengths = [LENGTHS[n] for p in range(ranks.rank, 4, ranks.world) for n in (2 * p, 2 * p + 1)]
    rewards = [REWARDS[n] for p in range(ranks.rank, 4, ranks.world) for n in (2 * p, 2 * p + 1)]
    plan = Plan(4 // ranks.world, 2, steps, 1, ranks)
    return make_episode(3, make_rollout(lengths, 4 // ranks.world), make_scores(rewards), Clipped(), plan), plan


def select(ranks: Ranks, steps: int) -> tuple[list[Any], list[tuple[TokenBatch, int]]]:
    """Values of the tokens are 1, 2, 3, ... in global order; the selection comes back by global token."""
    starts = [sum(LENGTHS[:n]) for n in range(len(LENGTHS))]
    tokens = [
        starts[n] + t for p in range(ranks.rank, 4, ranks.world) for n in (2 * p, 2 * p + 1) for t in range(LENGTHS[n])
    ]
    values_T = torch.tensor(tokens, dtype=torch.float32) + 1
    episode, plan = episode_of(ranks, steps)
    algorithm = FirstOfAll()
    chosen_T = selected_tokens(episode, -values_T, values_T, algorithm, plan, seed=5)
    return list(zip(tokens, chosen_T.tolist(), strict=True)), algorithm.shown


def test_a_selection_sees_all_that_counts_in_order_once_per_optimizer_step() -> None:
    (whole, _), *others = select(Ranks(), steps=1)[1]
    assert not others
    # The constant group does not train, and counts all the same; the dropped one does not.
    assert whole.lengths_N.tolist() == [1, 2, 3, 1, 2, 2]
    assert whole.advantages_N.sign().tolist() == [1, -1, 1, -1, 0, 0]
    chosen, shown = select(Ranks(), steps=2)
    ((tokens, seed),) = shown  # the second step has nothing to train
    assert tokens.entropies_T is not None
    assert tokens.entropies_T.tolist() == pytest.approx([1, 2, 3, 4, 5, 6, 7])
    assert tokens.logprobs_T.tolist() == pytest.approx([-1, -2, -3, -4, -5, -6, -7])
    assert tokens.lengths_N.tolist() == [1, 2, 3, 1]
    assert tokens.advantages_N.sign().tolist() == [1, -1, 1, -1]
    assert [token for token, kept in chosen if kept] == [0, 1, 2]
    by_step = select(Ranks(), steps=4)
    assert [token for token, kept in by_step[0] if kept] == [0, 3, 4]  # of 3 tokens one, of 4 two
    assert len({seed, *(seed for _, seed in by_step[1])}) == 2  # step 0 has the same seed in both, step 1 another


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_selection_is_the_same_for_any_number_of_ranks(steps: int) -> None:
    alone, shown = select(Ranks(), steps)
    for world in (2, 4):
        results = on_ranks(world, lambda ranks: select(ranks, steps))
        assert sorted(pair for chosen, _ in results for pair in chosen) == alone
        for _, seen in results:
            assert [seed for _, seed in seen] == [seed for _, seed in shown]
            assert all(
                torch.equal(mine.logprobs_T, other.logprobs_T)
                for (mine, _), (other, _) in zip(seen, shown, strict=True)
            )


def test_a_run_selects_among_the_tokens_of_completions_without_advantage_as_well(tmp_path: Path) -> None:
    """As many, and the same ones, as where a term of the loss trains those completions too."""
    episodes = []
    for coefficient in (0.0, 1e-12):
        algorithm = TopEntropy(top_entropy=0.4, entropy_coefficient=coefficient)
        trainer = fit(tmp_path, make_module(algorithm=algorithm), make_data(batch_size=8), max_steps=1)
        episodes.append(trainer.lightning_module.episode)
    few, all_of_them = episodes
    assert 0 < few.active_N.sum() < all_of_them.active_N.sum() == len(few.active_N)
    assert int(few.select_T.sum()) == math.floor(0.4 * (len(few.select_T) - 1) + 1e-9) + 1
    assert torch.equal(few.select_T, all_of_them.select_T)


def test_float_noise_does_not_decide_between_equal_contexts() -> None:
    class Largest(FirstOfAll):
        def select(self, tokens: TokenBatch, seed: int) -> torch.Tensor:
            assert tokens.entropies_T is not None
            order = tokens.entropies_T.argsort(descending=True, stable=True)
            return torch.zeros(len(order), dtype=torch.bool).index_fill(0, order[:1], True)

    episode, plan = episode_of(Ranks(), 1)
    values_T = torch.full((13,), 0.5)
    noise_T = torch.linspace(0, 1e-6, 13)
    first, second = (
        selected_tokens(episode, values_T, values_T + noise, Largest(), plan, 0) for noise in (noise_T, -noise_T)
    )
    assert torch.equal(first, second)
    assert first.tolist() == [True] + [False] * 12
