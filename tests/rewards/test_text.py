"""What built-in rewards read from a conversation."""

import pytest

from stateset_lightning.errors import DataError
from stateset_lightning.rewards.text import completion, question, repeated_share, target_of, target_texts, words
from stateset_lightning.types import Turn


def test_completion_and_question_come_from_the_turns():
    turns = [
        Turn("system", "s"),
        Turn("user", "one"),
        Turn("assistant", "a"),
        Turn("user", "two"),
        Turn("assistant", "b"),
    ]
    assert (completion(turns), question(turns)) == ("b", "two")
    assert (completion([]), question([])) == ("", "")
    assert (
        question([{"role": "user", "content": "as a mapping"}, {"role": "assistant", "content": "x"}]) == "as a mapping"
    )


def test_words_keep_numbers_and_apostrophes_together():
    assert words("I’d pay 1,234.50 at 10:30, Émile!") == ["i'd", "pay", "1,234.50", "at", "10:30", "émile"]


def test_repeated_share_counts_ngrams_seen_before():
    assert repeated_share(["a", "b", "a", "b", "a"], 2) == 0.5  # ab ba ab ba
    assert repeated_share(["a"], 2) == 0.0


def test_a_missing_target_is_a_data_error():
    with pytest.raises(DataError, match="scenario 'q7' has no 'target', which reward 'exact_match' needs"):
        target_of({"id": "q7", "target": None}, "exact_match")
    with pytest.raises(DataError, match="'rewards' column"):
        target_of(None, "exact_match")


def test_targets_are_texts():
    assert target_texts({"target": 72}, "r") == ["72"]
    assert target_texts({"target": ("a", 1)}, "r") == ["a", "1"]
    with pytest.raises(DataError, match="empty"):
        target_texts({"target": []}, "r")
