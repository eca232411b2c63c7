"""Orders of epochs: complete, seeded, and by weight."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stateset_lightning.data.order import EpochOrder, largest_remainder
from stateset_lightning.errors import ConfigError
from stateset_lightning.seeding import permutation

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
    with pytest.raises(ConfigError, match=r"the source tiny with weight 0.001 gets none of the 6 positions"):
        EpochOrder(pools([3, 3]), [1, 0.001], 0, True, ["big", "tiny"])
    with pytest.raises(ConfigError, match="no scenario of the source number 2 is left"):
        EpochOrder([[0], []], [1, 1], 0, True)
