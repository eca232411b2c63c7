"""Token lists in one array give back what went in."""

import numpy as np
import pytest

from stateset_lightning.data.ragged import RaggedTokens

LISTS = [[3, 1], [], [7], [2, 2, 2]]


def test_lists_come_back_in_order_with_their_lengths():
    tokens = RaggedTokens.from_lists(LISTS)
    assert list(tokens) == LISTS
    assert (len(tokens), tokens.lengths.tolist()) == (4, [2, 0, 1, 3])
    assert (tokens[0], tokens[1], tokens[-1]) == ([3, 1], [], [2, 2, 2])
    assert type(tokens[0][0]) is int
    with pytest.raises(IndexError):
        tokens[4]


def test_parts_are_joined_in_order():
    parts = [RaggedTokens.from_lists(part) for part in (LISTS[:1], [], LISTS[1:])]
    assert list(RaggedTokens.concatenate(parts)) == LISTS
    assert list(RaggedTokens.concatenate([])) == []
    assert RaggedTokens.concatenate(parts)._flat.dtype == np.int32


def test_a_digest_tells_lists_apart_also_those_of_equal_tokens():
    digests = {RaggedTokens.from_lists(lists).digest() for lists in (LISTS, [[3], [1], [7], [2, 2, 2]], [[3, 1]], [])}
    assert len(digests) == 4
    assert RaggedTokens.from_lists(LISTS).digest() in digests
