"""Episodes: micro-steps, ranks, filling up, and exact resume from any point."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from stateset_lightning.data.loader import EpisodeLoader, EvaluationLoader, Prompts, _draw_other
from stateset_lightning.data.order import Curriculum, EpochOrder, SolveRates
from stateset_lightning.data.ragged import RaggedTokens
from stateset_lightning.errors import ConfigError
from stateset_lightning.ranks import Ranks
from stateset_lightning.types import Scenario, Turn

COUNTS = st.integers(1, 3)


def prompts(n):
    tokens = RaggedTokens.from_lists([[i, i] for i in range(n)])
    return Prompts([Scenario(id=str(i), prompt=f"p{i}") for i in range(n)], tokens)


def make(n, **options):
    options = {"batch_size": 2, **options}
    order = EpochOrder([list(range(n))], None, 7, options.pop("shuffle", True))
    return EpisodeLoader(prompts(n), order, **options)


def key(batch):
    assert [tokens[0] for tokens in batch.prompt_tokens] == [int(s.id) for s in batch.scenarios]
    assert batch.conversations == [s.turns() for s in batch.scenarios]
    return tuple(s.id for s in batch.scenarios), tuple(batch.positions), batch.episode_index, batch.micro_step


def take(loader, count):
    taken = []
    while len(taken) < count:
        for batch in loader:
            taken.append(key(batch))
            if len(taken) == count:
                break
    return taken


def test_an_episode_is_served_for_each_micro_step_and_the_epochs_end_is_filled_from_its_start():
    loader = make(3, num_iterations=2, steps_per_episode=2, shuffle=False)
    assert (len(loader), loader.episodes_per_epoch, loader.num_filled) == (8, 2, 1)
    first, second = ("0", "1"), ("2", "0")
    assert [key(batch) for batch in loader] == [
        *((first, (0, 1), 0, m) for m in range(4)),
        *((second, (0, 1), 1, m) for m in range(4)),
    ]
    assert [batch.num_micro_steps for batch in loader] == [4] * 8
    assert key(next(iter(loader)))[2:] == (4, 0)  # epochs advance, and episodes count on


def test_the_next_episode_is_shown_and_served_all_the_same():
    loader = make(6, num_iterations=2)
    batches = iter(loader)
    first = next(batches)
    following = key(loader.next_episode())
    assert following[2:] == (1, 0)
    assert [key(next(batches)) for _ in range(2)] == [(*key(first)[:3], 1), following]


def test_a_data_set_smaller_than_a_batch_repeats_its_prompts():
    (batch,) = make(2, batch_size=5, shuffle=False)
    assert key(batch) == (("0", "1", "0", "1", "0"), (0, 1, 2, 3, 4), 0, 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 4), COUNTS, st.integers(0, 3))
def test_ranks_share_the_global_batch_and_see_every_prompt(n, batch_size, world_size, epochs):
    whole = make(n, batch_size=batch_size * world_size)
    ranks = [make(n, batch_size=batch_size, ranks=Ranks(r, world_size)) for r in range(world_size)]
    for _ in range(epochs):
        seen = set()
        for batch, *parts in zip(whole, *ranks, strict=True):
            by_position = {p: s.id for part in parts for p, s in zip(part.positions, part.scenarios, strict=True)}
            assert [by_position[p] for p in range(len(batch))] == [s.id for s in batch.scenarios]
            assert {part.episode_index for part in parts} == {batch.episode_index}
            seen |= set(by_position.values())
        assert len(seen) == n


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 9), COUNTS, COUNTS, COUNTS, st.integers(0, 40), st.integers(0, 9))
def test_a_run_resumed_anywhere_goes_on_exactly(n, batch_size, num_iterations, steps, cut, spare_iterators):
    options = {"batch_size": batch_size, "num_iterations": num_iterations, "steps_per_episode": steps}
    straight = take(make(n, **options), cut + 12)
    stopped, resumed = make(n, **options), make(n, **options)
    take(stopped, cut)
    state = json.loads(json.dumps(stopped.state_dict()))  # plain values only
    for _ in range(spare_iterators):  # Lightning makes iterators that it does not use
        iter(resumed)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert take(resumed, 12) == straight[cut:]


def test_a_restored_loader_serves_the_rest_of_the_epoch():
    stopped, resumed = make(5, num_iterations=2), make(5, num_iterations=2)
    whole = [key(batch) for batch in make(5, num_iterations=2)]
    take(stopped, 3)
    assert stopped.state_dict()["completed"] == 3
    resumed.load_state_dict(stopped.state_dict())
    assert [key(batch) for batch in resumed] == whole[3:]
    assert (resumed.state_dict()["epoch"], resumed.state_dict()["completed"]) == (1, 0)


def test_a_limit_ends_an_iteration_early_and_the_next_goes_on_behind_it():
    loader, limited = make(6), make(6, limit=2)
    assert len(limited) == 3
    assert [len(list(limited)) for _ in range(3)] == [2, 2, 2]
    assert take(make(6, limit=2), 6) == take(loader, 6)


def test_repeating_serves_the_first_batches_again_with_new_episode_numbers():
    loader = make(9, limit=4, repeat=True, num_iterations=2)
    first, second = [key(batch) for batch in loader], [key(batch) for batch in loader]
    assert [batch[:2] for batch in first] == [batch[:2] for batch in second]
    assert [batch[2:] for batch in first + second] == [(e, m) for e in range(4) for m in range(2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 3}, "data.batch_size is 3, but 2 in the checkpoint"),
        ({"num_iterations": 2}, "data.num_iterations is 2, but 1 in the checkpoint"),
        (
            {"ranks": Ranks(0, 2)},
            r"the number of processes \(trainer.devices \* trainer.num_nodes\) is 2, but 1 in the checkpoint",
        ),
        ({"fingerprint": {"seed": 1}}, "data.seed is 1, but 0 in the checkpoint"),
        ({"n": 7}, "the number of scenarios in data.train is 7, but 6 in the checkpoint"),
    ],
)
def test_a_checkpoint_of_another_order_is_refused(options, message):
    state = make(6, fingerprint={"seed": 0}).state_dict()
    loader = make(**{"n": 6, "fingerprint": {"seed": 0}, **options})
    with pytest.raises(ConfigError, match=message):
        loader.load_state_dict(state)


def test_with_other_rows_that_were_accepted_the_epoch_goes_on_or_ends_where_lightning_counts_itself_to_be():
    long = make(12)
    list(zip(range(10), (batch for _ in range(2) for batch in long), strict=False))
    state = long.state_dict()
    assert (state["epoch"], state["completed"]) == (1, 4)
    del state["scenarios"]
    for n, left in [(12, 2), (10, 1), (8, 4), (4, 2)]:  # left of the epoch, or all of the next one
        loader = make(n)
        loader.load_state_dict(state)
        assert len(list(loader)) == left


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), COUNTS)
def test_evaluation_serves_every_row_once_without_filling(n, batch_size, world_size):
    positions = []
    for rank in range(world_size):
        loader = EvaluationLoader(prompts(n), "test", batch_size=batch_size, ranks=Ranks(rank, world_size))
        batches = list(loader)
        assert len(batches) == len(loader)
        for batch in batches:
            assert (batch.split, batch.episode_index, batch.micro_step) == ("test", 0, 0)
            assert [s.id for s in batch.scenarios] == [str(p) for p in batch.positions]
            assert batch.prompt_tokens == [[p, p] for p in batch.positions]
            assert batch.conversations == [[Turn("user", f"p{p}")] for p in batch.positions]
            positions += batch.positions
    assert sorted(positions) == list(range(n))


# Replacements for dynamic sampling ------------------------------------------------------------------------------------


def rows(batch):
    return [int(s.id) for s in batch.scenarios]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(1, 3), st.sampled_from([1, 2, 3]), st.integers(1, 3))
def test_replacements_are_the_same_for_any_number_of_ranks_and_are_other_prompts(
    n, batch_size, world_size, round_number
):
    whole = next(iter(loader := make(n, batch_size=batch_size * world_size)))
    other = loader.replacements(whole, range(len(whole)), round_number)
    assert all(new != old for new, old in zip(rows(other), rows(whole), strict=True))
    assert other.rows == rows(other)
    assert other.conversations == [[Turn("user", f"p{row}")] for row in other.rows]
    assert other.episode_index == whole.episode_index
    assert other.positions == [p + round_number * len(whole) for p in range(len(whole))]
    for rank in range(world_size):
        part_loader = make(n, batch_size=batch_size, ranks=Ranks(rank, world_size))
        part = next(iter(part_loader))
        mine = part_loader.replacements(part, range(len(part)), round_number)
        assert rows(mine) == rows(other)[rank::world_size]
        assert mine.positions == other.positions[rank::world_size]


def test_a_replacement_depends_on_its_round_and_not_on_what_else_is_replaced():
    loader = make(50, batch_size=8)
    batch = next(iter(loader))
    everything = rows(loader.replacements(batch, range(8), 1))
    assert rows(loader.replacements(batch, [5], 1)) == [everything[5]]
    assert rows(loader.replacements(batch, range(8), 2)) != everything


def test_replacements_follow_the_weights_of_the_sources():
    order = EpochOrder([list(range(10)), [10, 11]], [1.0, 3.0], 7, True)
    loader = EpisodeLoader(prompts(12), order, batch_size=100)
    batch = next(iter(loader))
    drawn = [row for number in range(1, 31) for row in rows(loader.replacements(batch, range(100), number))]
    # A quarter from the first source and three from the second, less the prompt in the slot: 10 and 11 hold three slots
    # of four, and leave 3/8 to the other of them against 2/8; the first source's leave 9/40 against 3/4.
    held = sum(row >= 10 for row in rows(batch)) / 100
    expected = held * (0.375 / 0.625) + (1 - held) * (0.75 / 0.975)
    assert sum(row >= 10 for row in drawn) / 3000 == pytest.approx(expected, abs=0.03)


def test_replacements_of_repeated_prompts_are_among_them():
    loader = make(20, batch_size=2, limit=2, repeat=True)
    served = {row for batch in loader for row in rows(batch)}
    batch = next(iter(loader))
    drawn = {row for number in range(1, 40) for row in rows(loader.replacements(batch, [0, 1], number))}
    assert drawn == served
    assert len(served) == 4


def test_a_draw_in_proportion_to_weights_leaves_one_out_by_hand():
    # 1 + 4 are left: the first has a fifth of the draws.
    draws = [_draw_other(np.array([1.0, 2.0, 4.0]), 1, u) for u in (0.01, 0.19, 0.21, 0.99)]
    assert draws == [0, 0, 2, 2]
    assert [_draw_other(np.array([1.0, 1.0]), excluded, 0.5) for excluded in (0, 1)] == [1, 0]
    assert _draw_other(np.array([0.0, 3.0]), 1, 0.5) == 1  # there is no other


def test_a_single_prompt_is_replaced_by_itself_with_other_noise():
    batch = next(iter(loader := make(1, batch_size=2)))
    other = loader.replacements(batch, [1], 1)
    assert (rows(other), other.positions) == ([0], [3])


# Curriculum -----------------------------------------------------------------------------------------------------------


def with_rates(n, **options):
    order = EpochOrder([list(range(n))], None, 7, True)
    solve_rates = SolveRates(Curriculum(floor=0.01), order.row_weights, 7)
    return EpisodeLoader(prompts(n), order, solve_rates=solve_rates, **options)


def test_a_curriculum_decides_the_prompts_of_an_episode_and_of_its_replacements():
    loader = with_rates(10, batch_size=4, num_iterations=2)
    assert loader.episodes_per_epoch == 3  # as without
    assert len(loader) == 6
    solved = torch.ones(8, 2)
    loader.solve_rates.report(0, list(range(8)), solved)  # all but 8 and 9
    batches = list(loader)
    assert rows(batches[0]) == rows(batches[1])
    assert {8, 9} <= set(rows(batches[4]))  # of episode 2, the first that knows; its chance is above 0.9
    drawn = [row for number in range(1, 20) for row in rows(loader.replacements(batches[4], range(4), number))]
    assert sum(row >= 8 for row in drawn) > 0.8 * len(drawn)


def test_ranks_share_what_a_curriculum_draws():
    whole = with_rates(9, batch_size=4)
    parts = [with_rates(9, batch_size=2, ranks=Ranks(rank, 2)) for rank in range(2)]
    for batch, *others in zip(whole, *parts, strict=True):
        assert [rows(other) for other in others] == [rows(batch)[0::2], rows(batch)[1::2]]
