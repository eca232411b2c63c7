"""LengthPenalty, OverlongPenalty, RepetitionPenalty."""

import pytest

from stateset_lightning.errors import ConfigError, DataError
from stateset_lightning.rewards import LengthPenalty, OverlongPenalty, RepetitionPenalty
from stateset_lightning.rewards.penalties import repeated_share, words
from stateset_lightning.types import Turn


def score(reward, text, **context):
    return reward.compute_reward([Turn("user", "q"), Turn("assistant", text)], context)


def test_length_penalty_grows_beyond_the_limit_and_is_bounded():
    penalty = LengthPenalty(3, per_unit=0.25, max_penalty=0.6)
    assert [score(penalty, "w " * n) for n in (0, 3, 4, 5, 6, 100)] == [0, 0, -0.25, -0.5, -0.6, -0.6]
    assert score(LengthPenalty(3, unit="characters", per_unit=0.5), "abcd") == -0.5


def test_overlong_penalty_is_dapos_equation_13():
    reward = OverlongPenalty(max_tokens=20, buffer=5)
    scores = {n: score(reward, "", completion_tokens=n) for n in (0, 15, 16, 18, 20, 21, 1000)}
    assert scores == pytest.approx({0: 0, 15: 0, 16: -0.2, 18: -0.6, 20: -1, 21: -1, 1000: -1})


def test_overlong_penalty_needs_the_number_of_tokens():
    with pytest.raises(DataError, match=r"context\['completion_tokens'\]"):
        score(OverlongPenalty(20, 5), "text")


def test_repetition_penalty_is_the_share_of_repeated_ngrams():
    assert score(RepetitionPenalty(ngram=2), "The cat the cat") == pytest.approx(-1 / 3)  # the-cat, cat-the, the-cat
    assert score(RepetitionPenalty(), "all words differ here") == 0
    assert score(RepetitionPenalty(), "one two") == 0
    assert -1 < score(RepetitionPenalty(), "spam " * 100) < -0.98


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LengthPenalty(-1), "length_penalty.max_length=-1 must be at least 0"),
        (lambda: LengthPenalty(1, per_unit=-0.1), "per_unit=-0.1"),
        (lambda: LengthPenalty(1, unit="tokens"), "unit='tokens' must be one of words, characters"),
        (lambda: OverlongPenalty(10, 0), "buffer=0 must be at least 1 and at most max_tokens=10"),
        (lambda: OverlongPenalty(10, 11), "buffer=11"),
        (lambda: RepetitionPenalty(ngram=0), "ngram=0 must be at least 1"),
    ],
)
def test_bad_options_are_rejected(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_words_keep_numbers_and_apostrophes_together():
    assert words("I’d pay 1,234.50 at 10:30, Émile!") == ["i'd", "pay", "1,234.50", "at", "10:30", "émile"]


def test_repeated_share_counts_ngrams_seen_before():
    assert repeated_share(["a", "b", "a", "b", "a"], 2) == 0.5  # ab ba ab ba
    assert repeated_share(["a"], 2) == 0.0
