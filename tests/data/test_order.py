"""Orders of epochs are complete, seeded and by weight; a curriculum's rates, weights and draws."""

import io
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from stateset_lightning.data.order import Curriculum, EpochOrder, SolveRates, largest_remainder
from stateset_lightning.errors import ConfigError
from stateset_lightning.seeding import permutation

NAN = math.nan
SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=4)


def pools(sizes):
    return [list(range(sum(sizes[:i]), sum(sizes[: i + 1]))) for i in range(len(sizes))]


def test_one_source_is_a_permutation_of_the_epoch():
    order = EpochOrder(pools([9]), None, 3, shuffle=True)
    assert order.epoch(2).tolist() == permutation(3, "order", 2, size=9).tolist()
    assert order.epoch(0).tolist() != order.epoch(1).tolist()
    assert EpochOrder(pools([9]), None, 3, shuffle=False).epoch(5).tolist() == list(range(9))


@settings(max_examples=50, deadline=None)
@given(SIZES, st.integers(0, 9), st.booleans())
def test_without_weights_every_row_comes_once(sizes, epoch, shuffle):
    assert sorted(EpochOrder(pools(sizes), None, 1, shuffle).epoch(epoch)) == list(range(sum(sizes)))


@settings(max_examples=50, deadline=None)
@given(SIZES, st.data(), st.booleans())
def test_with_weights_a_source_has_its_share_and_repeats_no_row_before_all_were_seen(sizes, data, shuffle):
    weights = data.draw(st.lists(st.sampled_from([0.5, 1, 2, 3]), min_size=len(sizes), max_size=len(sizes)))
    counts = largest_remainder(weights, sum(sizes))
    if 0 in counts:
        return
    order = EpochOrder(pools(sizes), weights, 1, shuffle)
    epochs = [order.epoch(e) for e in range(4)]
    for rows, count in zip(pools(sizes), counts, strict=True):
        assert [int(np.isin(epoch, rows).sum()) for epoch in epochs] == [count] * 4
        seen = Counter(row for epoch in epochs for row in epoch.tolist() if row in rows)
        times = [seen[row] for row in rows]
        assert max(times) - min(times) <= 1


def test_unshuffled_sources_are_spread_evenly():
    order = EpochOrder(pools([4, 2]), [2, 1], 0, shuffle=False)
    assert order.epoch(0).tolist() == [0, 4, 1, 2, 5, 3]


@pytest.mark.parametrize(
    ("weights", "total", "counts"),
    [([1, 1], 5, [3, 2]), ([2, 1], 9, [6, 3]), ([0.1, 0.2], 3, [1, 2]), ([1, 1, 1], 2, [1, 1, 0])],
)
def test_largest_remainder(weights, total, counts):
    assert largest_remainder(weights, total) == counts


def test_a_source_that_would_never_be_seen_is_an_error():
    with pytest.raises(ConfigError, match=r"the source tiny with weight 0.001 gets no position of an epoch"):
        EpochOrder(pools([3, 3]), [1, 0.001], 0, True, ["big", "tiny"])
    with pytest.raises(ConfigError, match="the source number 2 has no scenario left"):
        EpochOrder([[0], []], [1, 1], 0, True)


# Curriculum -----------------------------------------------------------------------------------------------------------


def make(prompts=4, **options):
    return SolveRates(Curriculum(**options), np.ones(prompts), seed=3)


def rewards(*groups):
    return torch.tensor(groups, dtype=torch.float64)


def test_weights_by_hand():
    rates = make(prompts=5, floor=0.1)
    rates.report(0, [0, 1, 2, 3], rewards([1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0]))
    # floor + 0.9 * 4 p (1 - p): p = 1, 0, 1/4, 1/2, and a prompt that was never scored.
    assert rates.weights(2).tolist() == pytest.approx([0.1, 0.1, 0.1 + 0.9 * 0.75, 1.0, 1.0])


def test_rates_run_on_and_the_first_report_counts_in_full():
    rates = make(prompts=1, decay=0.25, floor=1e-9)
    rates.report(0, [0], rewards([1, 0]))
    rates.report(1, [0], rewards([1, 1]))
    p = 0.25 * 0.5 + 0.75 * 1.0
    assert rates.weights(3).tolist() == pytest.approx([4 * p * (1 - p)])


def test_solved_means_a_total_of_solved_at_and_failures_do_not_count():
    rates = make(prompts=3, solved_at=0.3, floor=1e-9)
    rates.report(0, [0, 1, 2], rewards([sum([0.1] * 3), 0.29, NAN, NAN], [NAN] * 4, [0.3, 0.3, 0.2, NAN]))
    assert rates.weights(2).tolist() == pytest.approx([1.0, 1.0, 4 * 2 / 9])


def test_an_episode_depends_on_reports_of_two_episodes_before_however_early_it_is_drawn():
    early, late = make(), make()
    group = rewards([1.0, 1.0])
    drawn = []
    for episode in range(6):  # Lightning asks for the next episode before this one is reported ...
        drawn.append(early.draw(episode, 2).tolist())
        if episode:
            early.report(episode - 1, [drawn[episode - 1][0]], group)
    for episode in range(6):  # ... or afterwards
        assert late.draw(episode, 2).tolist() == drawn[episode]
        late.report(episode, [drawn[episode][0]], group)


def test_draws_follow_the_weights_and_hold_no_prompt_twice():
    rates = make(prompts=3, floor=0.25)
    rates.report(0, [0, 2], rewards([1, 1], [0, 0]))
    first = Counter(int(rates.draw(episode, 2)[0]) for episode in range(2, 3002))
    # The first of a draw comes in proportion to its weight: 1/4, 1 and 1/4 of 3/2. Three standard errors are 0.026.
    assert first[0] / 3000 == pytest.approx(1 / 6, abs=0.026)
    assert first[1] / 3000 == pytest.approx(4 / 6, abs=0.026)
    assert all(len(set(rates.draw(episode, 3).tolist())) == 3 for episode in range(20))
    again = rates.draw(5, 7).tolist()
    assert again[:3] == again[3:6]
    assert sorted(again[:3]) == [0, 1, 2]


def test_a_source_weighs_on_its_prompts():
    rates = SolveRates(Curriculum(), np.array([0.5, 2.0]), seed=0)
    assert rates.weights(0).tolist() == [0.5, 2.0]


def test_a_state_goes_on_exactly_and_holds_nothing_pickled():
    straight = make()
    for episode in range(3):
        straight.draw(episode, 2)
        straight.report(episode, [0, 1], rewards([1, 0], [1, 1]))
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    resumed = make()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for episode in range(2, 6):  # episode 2 was drawn already: a run resumed inside it draws it again
        assert resumed.draw(episode, 3).tolist() == straight.draw(episode, 3).tolist()
        assert resumed.weights(episode).tolist() == straight.weights(episode).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"floor": 0.0}, "data.curriculum.floor=0.0 must be above 0"),
        ({"decay": 1.0}, "data.curriculum.decay=1.0 must be below 1"),
        ({"solved_at": NAN}, "data.curriculum.solved_at=nan must be above -inf"),
    ],
)
def test_options_that_mean_nothing(options, message):
    with pytest.raises(ConfigError, match=message):
        Curriculum(**options)
