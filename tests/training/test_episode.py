"""How an episode is cut into micro-steps and optimizer steps, and what a micro-step trains."""

import io
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from stateset_lightning.algorithm import GRPO, GSPO, LUSPO, Clipped, DrGRPO
from stateset_lightning.ranks import Ranks
from stateset_lightning.training.episode import Episode, GroupShare, Plan, balance, load, make_episode, tokens_over
from stateset_lightning.training.turns import TrainedScores
from stateset_lightning.types import FinishReason, Rollout, Scores

NAN = math.nan


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """Ranks that are threads of one process."""

    mailbox: list[Any] = field(default_factory=list)
    barrier: threading.Barrier | None = None

    def gather(self, value: Any) -> list[Any]:
        assert self.barrier is not None
        self.mailbox[self.rank] = value
        self.barrier.wait(60)
        values = list(self.mailbox)
        self.barrier.wait(60)
        return values


def on_ranks(world: int, function: Callable[[Ranks], Any]) -> list[Any]:
    """What `function` returns on each of `world` ranks."""
    if world == 1:
        return [function(Ranks())]
    mailbox, barrier, results = [None] * world, threading.Barrier(world), [None] * world

    def run(rank: int) -> None:
        results[rank] = function(ThreadRanks(rank, world, mailbox, barrier))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


def make_rollout(lengths: list[int], num_prompts: int, truncated: tuple[int, ...] = (), first: int = 0) -> Rollout:
    """Prompt p is [first + p]; the tokens of completion n are 100 n, 100 n + 1, ...; its log-probs are minus those over
    1000.
    """
    tokens = [100 * n + t for n, length in enumerate(lengths) for t in range(length)]
    return Rollout(
        prompt_tokens=[[first + p] for p in range(num_prompts)],
        completion_tokens_T=torch.tensor(tokens, dtype=torch.long),
        lengths_N=torch.tensor(lengths),
        logprobs_T=-torch.tensor(tokens, dtype=torch.float32) / 1000,
        sampled_T=torch.ones(len(tokens), dtype=torch.bool),
        finish_reasons=[FinishReason.LENGTH if n in truncated else FinishReason.STOP for n in range(len(lengths))],
        texts=[""] * len(lengths),
    )


def make_scores(values: list[float]) -> TrainedScores:
    values_N = torch.tensor(values, dtype=torch.float64)
    return TrainedScores(Scores(("right",), values_N[:, None], values_N), [1.0])


# The plan
# ---------------------------------------------------------------------------------------------------------------------

PLANS = st.tuples(st.integers(1, 6), st.integers(2, 4), st.integers(1, 4), st.integers(1, 3))


def micro_steps(plan: Plan, lengths: list[int] | None = None, active: list[bool] | None = None) -> list[int]:
    """The micro-step of each completion; prompts of one token, completions of one, all of them active unless told
    otherwise.
    """
    count = plan.num_prompts * plan.num_generations
    micro_N, _ = plan.micro_steps(
        [[0]] * plan.num_prompts,
        torch.tensor(lengths or [1] * count),
        torch.tensor([True] * count if active is None else active),
    )
    return micro_N.tolist()


@given(PLANS, st.sampled_from([1, 2, 4]), st.data())
def test_every_completion_has_a_micro_step_of_the_optimizer_step_of_its_prompt(
    plan: tuple[int, int, int, int], world: int, data: st.DataObject
) -> None:
    prompts, generations, steps, accumulate = plan
    count = prompts * generations
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=count, max_size=count))
    active = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    budget = data.draw(st.none() | st.integers(1, 100))
    for rank in range(world):
        cut = Plan(prompts, generations, steps * accumulate, accumulate, Ranks(rank, world), budget)
        micro_N = np.array(micro_steps(cut, lengths, active))
        assert ((micro_N >= 0) & (micro_N < steps * accumulate)).all()
        positions = torch.arange(prompts) * world + rank
        assert (micro_N // accumulate == np.repeat(cut.step_of_position(positions), generations)).all()


@given(PLANS)
def test_optimizer_steps_are_contiguous_ranges_equal_for_any_number_of_ranks(plan: tuple[int, int, int, int]) -> None:
    prompts, generations, steps, accumulate = plan
    for world in (1, 2, 4):
        total = prompts * 4
        cut = Plan(total // world, generations, steps * accumulate, accumulate, Ranks(0, world))
        step_of = cut.step_of_position(torch.arange(total))
        assert (np.diff(step_of) >= 0).all()
        assert step_of[0] == 0
        assert step_of[-1] < steps
        counts = np.bincount(step_of, minlength=steps)
        assert counts.max() - counts.min() <= 1
        assert (
            step_of == Plan(total, generations, steps * accumulate, accumulate).step_of_position(torch.arange(total))
        ).all()


@given(PLANS)
def test_equal_groups_are_shared_out_whole_and_evenly(plan: tuple[int, int, int, int]) -> None:
    prompts, generations, steps, accumulate = plan
    cut = Plan(prompts * steps * accumulate, generations, steps * accumulate, accumulate)
    micro_PG = torch.tensor(micro_steps(cut)).reshape(-1, generations)
    assert (micro_PG == micro_PG[:, :1]).all()
    assert torch.bincount(micro_PG.flatten()).tolist() == [prompts * generations] * (steps * accumulate)


def test_plans_by_hand() -> None:
    assert micro_steps(Plan(4, 2, 1, 1)) == [0] * 8
    assert micro_steps(Plan(4, 2, 2, 1)) == [0, 0, 0, 0, 1, 1, 1, 1]  # two optimizer steps
    assert micro_steps(Plan(4, 2, 4, 2)) == [0, 0, 1, 1, 2, 2, 3, 3]  # two, of two micro-steps each
    assert micro_steps(Plan(1, 4, 2, 2)) == [0, 0, 1, 1]  # one prompt for two micro-steps: its group is shared out
    assert micro_steps(Plan(3, 2, 2, 1)) == [0, 0, 0, 0, 1, 1]
    # Rank 1 of 2 holds the positions 1, 3, 5, 7 of 8: half of each optimizer step.
    assert micro_steps(Plan(4, 2, 2, 1, Ranks(1, 2))) == [0, 0, 0, 0, 1, 1, 1, 1]
    # Groups of 1 + 18, 1 + 4, 1 + 4 and 1 + 8 tokens: the long one by itself, the others together.
    assert micro_steps(Plan(4, 2, 2, 2), [9, 9, 2, 2, 2, 2, 4, 4]) == [0, 0, 1, 1, 1, 1, 1, 1]
    # The second prompt trains nothing, so its tokens are no work.
    assert micro_steps(Plan(3, 2, 2, 2), [3, 3, 99, 99, 3, 3], [True, True, False, False, True, True]) == [
        0,
        0,
        0,
        0,
        1,
        1,
    ]


def test_a_budget_splits_a_group_and_counts_what_does_not_fit() -> None:
    lengths, active = torch.tensor([6, 6, 2, 2]), torch.tensor([True] * 4)
    prompts = [[0] * 3, [0] * 3]

    def plan(budget: int | None) -> tuple[list[int], int | None]:
        micro_N, over = Plan(2, 2, 2, 2, max_tokens_per_step=budget).micro_steps(prompts, lengths, active)
        return micro_N.tolist(), over

    assert plan(None) == ([0, 0, 1, 1], None)  # 15 and 7 tokens
    assert plan(15) == ([0, 0, 1, 1], 0)
    assert plan(14) == ([0, 1, 0, 1], 0)  # both groups split: 3 + 6 and 3 + 2 in each
    assert plan(13) == ([0, 1, 0, 1], 2)  # no completion is divided
    assert plan(10) == ([0, 0, 1, 1], 5)  # 22 do not fit into two times 10: left whole


# Making an episode
# ------------------------------------------------------------------------------------------------------------

LENGTHS, REWARDS = [1, 2, 3, 4, 2, 2], [1.0, 0.0, 1.0, 1.0, NAN, 1.0]
"""Three groups of two: a mixed one, a constant one, one with a single survivor."""


def small_episode(algorithm: Any = None, truncated: tuple[int, ...] = (), plan: Plan | None = None) -> Episode:
    algorithm = algorithm or GRPO(beta=0)
    return make_episode(
        5, make_rollout(LENGTHS, 3, truncated), make_scores(REWARDS), algorithm, plan or Plan(3, 2, 1, 1)
    )


def test_an_episode_by_hand() -> None:
    episode = small_episode()
    a = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert episode.index == 5
    torch.testing.assert_close(episode.advantages_N, torch.tensor([a, -a, 0, 0, NAN, NAN]), equal_nan=True)
    # Four completions train, the constant group among them; of the dropped group neither does.
    assert episode.weights_N.tolist() == pytest.approx([1 / 4, 1 / 8, 1 / 12, 1 / 16, 0, 0])
    assert episode.active_N.tolist() == [True, True, False, False, False, False]
    assert episode.active_by_step == [3]  # tokens
    assert episode.num_generations == 2


def test_a_kl_term_trains_completions_without_advantage() -> None:
    episode = small_episode(GRPO())
    assert episode.active_N.tolist() == [True, True, True, True, False, False]
    assert episode.weights_N.tolist() == small_episode().weights_N.tolist()


def test_masked_truncations_leave_loss_and_normaliser_but_not_the_baseline() -> None:
    episode = small_episode(GRPO(beta=0, mask_truncated=True), truncated=(0, 2))
    assert episode.weights_N.tolist() == pytest.approx([0, 1 / 4, 0, 1 / 8, 0, 0])
    assert episode.active_N.tolist() == [False, True, False, False, False, False]
    assert episode.advantages_N[1] == small_episode().advantages_N[1]
    assert small_episode(truncated=(0, 2)).active_N.tolist() == small_episode().active_N.tolist()


def test_weights_are_those_of_the_optimizer_step() -> None:
    episode = small_episode(plan=Plan(3, 2, 3, 1))
    assert episode.weights_N.tolist() == pytest.approx([1 / 2, 1 / 4, 1 / 6, 1 / 8, 0, 0])
    assert episode.active_by_step == [3, 0, 0]
    assert episode.micro_step_N.tolist() == [0, 0, 1, 1, 2, 2]


def test_right_completions_have_a_mean_of_their_own_in_each_optimizer_step() -> None:
    algorithm = GRPO(beta=0, positive_coefficient=0.1, aggregation="token_mean")
    episode = small_episode(algorithm)
    assert episode.right_N is not None
    # Of the 10 tokens that count 8 are right ones; the last completion is right and has nothing to compare with.
    assert episode.right_N.tolist() == pytest.approx([10 / 8, 0, 10 / 8, 10 / 8, 0, 0])
    assert episode.active_N.tolist() == [True, True, True, True, False, False]
    by_step = small_episode(algorithm, plan=Plan(3, 2, 3, 1)).right_N
    assert by_step is not None
    assert by_step.tolist() == pytest.approx([3, 0, 1, 1, 0, 0])
    batch = episode.micro_batch(0)
    assert batch.right_N is not None
    assert (batch.right_N * batch.weights_N * batch.lengths_N).sum().item() == pytest.approx(1.0)
    assert small_episode().right_N is None


def test_reward_weights_reach_the_advantages() -> None:
    values_NF = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    scored = TrainedScores(Scores(("a", "b"), values_NF, values_NF.sum(-1)), [3.0, 1.0])
    episode = make_episode(0, make_rollout([1, 1], 1), scored, DrGRPO(constant_length=4), Plan(1, 2, 1, 1))
    assert episode.advantages_N.tolist() == [1.0, -1.0]


def test_an_empty_completion_is_not_active() -> None:
    episode = make_episode(0, make_rollout([0, 2], 1), make_scores([1.0, 0.0]), GRPO(beta=0), Plan(1, 2, 1, 1))
    assert episode.active_N.tolist() == [False, True]
    assert episode.weights_N.tolist() == [0.0, 0.5]


def test_advantages_and_weights_are_the_same_for_any_number_of_ranks() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths_PG = torch.randint(1, 6, (8, 3), generator=generator)
    rewards_PG = torch.randint(0, 3, (8, 3), generator=generator).double()
    rewards_PG[2, 0] = NAN
    rewards_PG[5, :2] = NAN

    def by_position(world: int, name: str, steps: int) -> Tensor:
        def make(ranks: Ranks) -> Episode:
            mine = slice(ranks.rank, None, world)
            rollout = make_rollout(lengths_PG[mine].flatten().tolist(), 8 // world)
            plan = Plan(8 // world, 3, steps, 1, ranks)
            return make_episode(
                0, rollout, make_scores(rewards_PG[mine].flatten().tolist()), GRPO(beta=0, scale="batch"), plan
            )

        episodes = on_ranks(world, make)
        assert len({tuple(episode.active_by_step) for episode in episodes}) == 1
        values = torch.empty(8, 3, dtype=getattr(episodes[0], name).dtype)
        for rank, episode in enumerate(episodes):
            values[rank::world] = getattr(episode, name).reshape(-1, 3)
        return values

    for steps in (1, 2, 4):
        for name in ("advantages_N", "weights_N", "active_N", "micro_step_N"):
            alone = by_position(1, name, steps)
            for world in (2, 4):
                torch.testing.assert_close(by_position(world, name, steps), alone, rtol=0, atol=0, equal_nan=True)


# Parts
# ----------------------------------------------------------------------------------------------------------------------


def test_a_part_holds_the_active_completions_of_its_micro_step() -> None:
    episode = make_episode(
        0, make_rollout([1, 2, 3, 2, 1, 2], 2), make_scores([1, 0, NAN, 1, 0, 1]), GRPO(beta=0), Plan(2, 3, 2, 1)
    )
    first, second = episode.micro_batch(0), episode.micro_batch(1)
    assert [(group.prompt, group.completions) for group in first.groups] == [([0], [[0], [100, 101]])]
    assert [(group.prompt, group.completions) for group in second.groups] == [([1], [[300, 301], [400], [500, 501]])]
    assert second.lengths_N.tolist() == [2, 1, 2]
    assert second.weights_N.tolist() == pytest.approx([1 / 6, 1 / 3, 1 / 6])
    torch.testing.assert_close(second.sampling_logprobs_T, -torch.tensor([300.0, 301, 400, 500, 501]) / 1000)
    assert first.advantages_N.sum() == 0
    assert first.old_logprobs_T is None
    assert first.ref_logprobs_T is None
    everything = episode.active_batch()
    assert [group.prompt for group in everything.groups] == [[0], [1]]
    assert everything.lengths_N.tolist() == [1, 2, 2, 1, 2]


def test_parts_make_up_the_active_part() -> None:
    episode = make_episode(
        0, make_rollout([2] * 12, 3), make_scores([float(n) for n in range(12)]), GRPO(beta=0), Plan(3, 4, 4, 4)
    )
    parts = [episode.micro_batch(step) for step in range(4)]
    tokens = sorted(c[0] for part in parts for group in part.groups for c in group.completions)
    assert tokens == sorted(c[0] for group in episode.active_batch().groups for c in group.completions)
    assert len(tokens) == 12


def test_a_micro_step_without_active_completions_is_empty() -> None:
    part = small_episode(plan=Plan(3, 2, 3, 1)).micro_batch(1)
    assert part.groups == []
    assert len(part.advantages_N) == len(part.sampling_logprobs_T) == 0


def test_scatter_puts_values_back_at_the_active_tokens() -> None:
    episode = make_episode(0, make_rollout([1, 2, 3], 1), make_scores([1, NAN, 0]), GRPO(beta=0), Plan(1, 3, 1, 1))
    episode.old_logprobs_T = episode.scatter(torch.tensor([-1.0, -2.0, -3.0, -4.0]))
    assert episode.old_logprobs_T.tolist() == [-1.0, 0, 0, -2.0, -3.0, -4.0]
    episode.ref_logprobs_T = episode.scatter(torch.tensor([-5.0, -6.0, -7.0, -8.0]))
    part = episode.micro_batch(0)
    assert part.old_logprobs_T is not None
    assert part.ref_logprobs_T is not None
    assert part.old_logprobs_T.tolist() == [-1.0, -2.0, -3.0, -4.0]
    assert part.ref_logprobs_T.tolist() == [-5.0, -6.0, -7.0, -8.0]


def test_an_episode_survives_a_checkpoint_without_pickled_objects() -> None:
    episode = small_episode()
    episode.old_logprobs_T = episode.scatter(torch.tensor([-1.0, -2.0, -3.0]))
    file = io.BytesIO()
    torch.save(episode.state_dict(), file)
    file.seek(0)
    restored = Episode(**torch.load(file, weights_only=True))
    for name, value in episode.state_dict().items():
        other = getattr(restored, name)
        if isinstance(value, Tensor):
            assert other.dtype == value.dtype
            torch.testing.assert_close(other, value, rtol=0, atol=0, equal_nan=True)
        else:
            assert other == value
    before, after = episode.micro_batch(0), restored.micro_batch(0)
    assert before.groups == after.groups
    assert torch.equal(before.weights_N, after.weights_N)


# Even work per micro-step ---------------------------------------------------------------------------------------------

GROUPS = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(1, 30), min_size=1, max_size=6)).map(
        lambda group: GroupShare(group[0], tuple(enumerate(group[1])))
    ),
    max_size=8,
)


def numbers(piece: GroupShare) -> list[int]:
    return [n for n, _ in piece.completions]


def test_halves_have_about_as_many_tokens() -> None:
    first, second = GroupShare(5, ((0, 8), (1, 1), (2, 1), (3, 6))).halves()
    assert (numbers(first), first.tokens) == ([0], 13)
    assert (numbers(second), second.tokens) == ([1, 2, 3], 13)
    assert [numbers(half) for half in GroupShare(1, ((0, 1), (1, 99))).halves()] == [[0], [1]]


@given(GROUPS, st.integers(1, 4), st.none() | st.integers(1, 200))
def test_every_completion_is_trained_once(groups: list[GroupShare], micro_steps: int, max_tokens: int | None) -> None:
    steps = balance(groups, micro_steps, max_tokens)
    assert len(steps) == micro_steps
    given_out = sorted(
        (piece.prompt_tokens, *completion) for pieces in steps for piece in pieces for completion in piece.completions
    )
    assert given_out == sorted(
        (group.prompt_tokens, *completion) for group in groups for completion in group.completions
    )


@given(GROUPS, st.integers(1, 4))
def test_without_a_budget_work_is_even_up_to_one_piece(groups: list[GroupShare], micro_steps: int) -> None:
    steps = balance(groups, micro_steps)
    largest = max((piece.tokens for pieces in steps for piece in pieces), default=0)
    assert max(map(load, steps)) - min(map(load, steps)) <= largest
    if len(groups) >= micro_steps:
        assert sum(map(load, steps)) == load(groups)  # nothing was taken apart


def test_a_budget_is_kept_where_it_can_be() -> None:
    groups = [GroupShare(2, ((0, 10), (1, 10), (2, 10), (3, 10))), GroupShare(2, ((4, 3), (5, 3)))]
    whole = balance(groups, 2)
    assert [load(pieces) for pieces in whole] == [42, 8]
    assert tokens_over(whole, 30) == 12
    halved = balance(groups, 2, max_tokens=30)
    assert [load(pieces) for pieces in halved] == [30, 22]
    assert tokens_over(halved, 30) == 0


def test_a_group_is_left_whole_where_a_budget_cannot_be_kept() -> None:
    groups = [GroupShare(2, ((0, 10), (1, 10)))]
    steps = balance(groups, 1, max_tokens=15)
    assert steps == [groups]
    assert tokens_over(steps, 15) == 7


def test_tokens_that_were_not_sampled_are_read_but_not_trained() -> None:
    """An environment's tokens stand in the middle of the first completion."""
    rollout = make_rollout([3, 2], 1)
    rollout = replace(rollout, sampled_T=torch.tensor([True, False, True, True, True]))
    episode = make_episode(0, rollout, make_scores([1.0, 0.0]), GRPO(beta=0), Plan(1, 2, 1, 1))
    assert episode.weights_N.tolist() == pytest.approx([1 / 4, 1 / 4])  # two sampled tokens each, of two completions
    batch = episode.micro_batch(0)
    assert batch.lengths_N.tolist() == [2, 2]
    assert [list(map(len, group.completions)) for group in batch.groups] == [[3, 2]]
    assert batch.groups[0].sampled == [[True, False, True], [True, True]]
    assert torch.equal(batch.sampling_logprobs_T, rollout.logprobs_T[rollout.sampled_T])
    assert episode.scatter(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [1, 0, 2, 3, 4]
    again = Episode(**{k: v for k, v in episode.state_dict().items() if k != "sampled_T"})
    assert again.micro_batch(0).lengths_N.tolist() == [
        3,
        2,
    ]  # version 0.1 knew sampled tokens alone


LOSSES: list[Clipped] = [GRPO(beta=0), GRPO(beta=0, mask_truncated=True), GSPO(), LUSPO()]
LOSSES += [Clipped(aggregation=how) for how in ("token_mean", "sequence_sum", "constant_length", "prompt_mean")]


@given(st.data(), st.sampled_from(LOSSES), st.sampled_from([1, 2]))
def test_an_environments_tokens_count_nowhere(data: st.DataObject, algorithm: Clipped, steps: int) -> None:
    """Advantages, weights, lengths and values are those of an episode without them."""
    masks = data.draw(st.lists(st.lists(st.booleans(), max_size=4), min_size=4, max_size=4))
    masks = [[True, *mask] for mask in masks]
    sampled_T = torch.tensor([token for mask in masks for token in mask])
    rollout = replace(make_rollout([len(mask) for mask in masks], 2, (1,)), sampled_T=sampled_T)
    alone = replace(
        rollout,
        completion_tokens_T=rollout.completion_tokens_T[sampled_T],
        logprobs_T=rollout.logprobs_T[sampled_T],
        lengths_N=torch.tensor([sum(mask) for mask in masks]),
        sampled_T=sampled_T[sampled_T],
    )
    algorithm.setup(8)
    scores = make_scores(data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=4, max_size=4)))
    mine, other = (make_episode(0, each, scores, algorithm, Plan(2, 2, steps, 1)) for each in (rollout, alone))
    assert mine.active_by_step == other.active_by_step
    for name in ("advantages_N", "weights_N", "active_N"):
        assert torch.equal(getattr(mine, name), getattr(other, name)), name
    for name in ("lengths_N", "sampling_logprobs_T", "weights_N"):
        assert torch.equal(getattr(mine.active_batch(), name), getattr(other.active_batch(), name)), name
