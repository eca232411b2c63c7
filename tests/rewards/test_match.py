"""ExactMatch, Contains, RegexMatch."""

import pickle

import pytest

from stateset_lightning.errors import ConfigError, DataError
from stateset_lightning.rewards import Contains, ExactMatch, RegexMatch
from stateset_lightning.types import Turn


def score(reward, text, target=None):
    result = reward.compute_reward([Turn("user", "q"), Turn("assistant", text)], {"id": "s1", "target": target})
    return getattr(result, "score", result)


@pytest.mark.parametrize(
    ("options", "text", "target", "expected"),
    [
        ({}, " Paris\n", "Paris", 1.0),
        ({}, "New   York", "New York", 1.0),
        ({}, "paris", "Paris", 0.0),
        ({}, "Paris.", "Paris", 0.0),
        ({}, "It is Paris", "Paris", 0.0),
        ({}, "", "Paris", 0.0),
        ({"ignore_case": True}, "pARIS", "Paris", 1.0),
        ({"ignore_case": True}, "STRASSE", "straße", 1.0),
        ({"ignore_punctuation": True}, "“Paris”!", "Paris", 1.0),
        ({"ignore_whitespace": False}, "Paris ", "Paris", 0.0),
        ({}, "72", 72, 1.0),
        ({}, "B", ["A", "B"], 1.0),
        ({}, "C", ["A", "B"], 0.0),
        ({}, "e\u0301", "é", 1.0),
    ],
)
def test_exact_match(options, text, target, expected):
    assert score(ExactMatch(**options), text, target) == expected


@pytest.mark.parametrize("target", [None, "", " ", [], ["a", ""]])
def test_exact_match_without_an_answer_fails(target):
    with pytest.raises(DataError, match="s1"):
        score(ExactMatch(), "x", target)
    with pytest.raises(DataError):
        score(ExactMatch(ignore_punctuation=True), "x", "?!")


@pytest.mark.parametrize(
    ("options", "text", "target", "expected"),
    [
        ({"strings": ["red", "blue"]}, "red and blue", None, 1.0),
        ({"strings": ["red", "blue"]}, "red", None, 0.0),
        ({"strings": ["red", "blue"], "require": "any"}, "red", None, 1.0),
        ({"strings": ["red"], "require": "any"}, "green", None, 0.0),
        ({"strings": ["Red"]}, "red", None, 0.0),
        ({"strings": ["Red"], "ignore_case": True}, "RED", None, 1.0),
        ({}, "the city of Paris.", "Paris", 1.0),
        ({"require": "any"}, "Paris", ["Lyon", "Paris"], 1.0),
        ({}, "Paris", ["Lyon", "Paris"], 0.0),
    ],
)
def test_contains(options, text, target, expected):
    assert score(Contains(**options), text, target) == expected


def test_contains_rejects_what_every_text_contains():
    with pytest.raises(DataError, match="every text contains it"):
        score(Contains(), "x", "")
    for strings in ([], [""], "red"):
        with pytest.raises(ConfigError, match="list of non-empty strings"):
            Contains(strings)
    with pytest.raises(ConfigError, match="require='some'"):
        Contains(["a"], require="some")


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ({"pattern": r"\d{3}"}, "call 112 now", 1.0),
        ({"pattern": r"\d{3}", "match": "fullmatch"}, "call 112 now", 0.0),
        ({"pattern": r"\d{3}", "match": "fullmatch"}, "112", 1.0),
        ({"pattern": "(?i)yes"}, "YES", 1.0),
        ({"pattern": "a.b"}, "a\nb", 0.0),
        ({"pattern": "(?s)a.b"}, "a\nb", 1.0),
    ],
)
def test_regex_match(options, text, expected):
    assert score(RegexMatch(**options), text) == expected


def test_regex_match_rejects_bad_options_and_pickles():
    with pytest.raises(ConfigError, match=r"pattern='\(a' is no regular expression: missing \)"):
        RegexMatch("(a")
    with pytest.raises(ConfigError, match="match='match'"):
        RegexMatch("a", match="match")
    assert score(pickle.loads(pickle.dumps(RegexMatch("a", timeout=1))), "cat") == 1.0
