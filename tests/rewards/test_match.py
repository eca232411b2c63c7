"""ExactMatch, Contains, RegexMatch, FormatReward, JsonValid."""

import pickle
import sys
from decimal import Decimal

import numpy as np
import pytest

from stateset_lightning.data.sources import read_split
from stateset_lightning.errors import ConfigError, DataError
from stateset_lightning.rewards import Contains, ExactMatch, FormatReward, JsonValid, RegexMatch
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


def test_contains_takes_a_character_for_itself_however_it_is_written():
    assert score(Contains(), "Le café est ouvert", "cafe\u0301") == 1.0
    assert score(Contains(strings=["café"]), "Le cafe\u0301 est ouvert") == 1.0


@pytest.mark.parametrize("target", [None, "", " ", [], ["a", ""]])
def test_exact_match_without_an_answer_fails(target):
    with pytest.raises(DataError, match="s1"):
        score(ExactMatch(), "x", target)
    with pytest.raises(DataError):
        score(ExactMatch(ignore_punctuation=True), "x", "?!")


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (np.float32(0.1), "0.1"),
        (np.array([0.3, 0.1], np.float32), "0.1"),
        (np.float16(0.1), "0.1"),
        (1e-05, "0.00001"),
        ([1e20, -2.5e-7], "-0.00000025"),
        (1e20, "100000000000000000000"),
        (Decimal("0.12345678901234567890"), "0.12345678901234567890"),
        (Decimal("12345678901234567890"), "12345678901234567890"),
        (Decimal("5.00"), "5"),
    ],
)
def test_a_numbers_text_is_the_shortest_and_has_no_exponent(target, text):
    frame = pytest.importorskip("pandas").DataFrame({"prompt": ["a"], "target": [target]})
    if isinstance(target, np.float32):
        frame = frame.astype({"target": "float32"})
    for rows in ([{"prompt": "a", "target": target}], frame):
        found = read_split(rows, "train").scenarios[0].target
        assert score(ExactMatch(), text, found) == 1.0


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
        ({}, "It was the Denver Broncos", ["Denver Broncos", "The Broncos"], 1.0),
        ({}, "Rome", ["Lyon", "Paris"], 0.0),
        ({"require": "all"}, "Paris", ["Lyon", "Paris"], 0.0),
    ],
)
def test_contains(options, text, target, expected):
    assert score(Contains(**options), text, target) == expected


def test_contains_rejects_what_every_text_contains():
    with pytest.raises(DataError, match="target='' of scenario 's1' is empty"):
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a\nb</think>\n<answer>c</answer>", 1.0),
        ("Well. <think>a</think> So: <answer>c</answer> Done.", 1.0),
        ("<answer>c</answer><think>a</think>", 0.0),
        ("<think>a<answer>c</answer></think>", 0.0),
        ("<think>a<answer>b</think>c</answer>", 0.0),
        ("<think>a</think><think>b</think><answer>c</answer>", 0.0),
        ("<think>a</think><answer>c", 0.0),
        ("</think>a<think><answer>c</answer>", 0.0),
        ("<think> </think><answer>c</answer>", 0.0),
        ("<think>a</think>", 0.0),
        ("", 0.0),
    ],
)
def test_tags_occur_once_in_order_and_unnested(text, expected):
    assert score(FormatReward(tags=["think", "answer"]), text) == expected


def test_text_outside_tags_can_be_forbidden():
    reward = FormatReward(tags=["think", "answer"], only_tags=True)
    assert score(reward, " <think>a</think>\n<answer>c</answer>\n") == 1.0
    for text in (
        "x<think>a</think><answer>c</answer>",
        "<think>a</think>x<answer>c</answer>",
        "<think>a</think><answer>c</answer>x",
    ):
        assert score(reward, text) == 0.0


def test_a_pattern_matches_the_whole_completion():
    reward = FormatReward(pattern=r"Answer: .+")
    assert [score(reward, text) for text in ("\nAnswer: 1\n2\n", "The Answer: 1")] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of tags=None and pattern=None"),
        ({"tags": ["a"], "pattern": "b"}, "exactly one of"),
        ({"tags": []}, "list of different names"),
        ({"tags": ["a", "a"]}, "list of different names"),
        ({"tags": "think"}, "list of different names"),
        ({"tags": ["<think>"]}, "give bare names"),
        ({"pattern": "("}, "no regular expression"),
        ({"pattern": "a", "only_tags": True}, "only_tags=True goes with tags"),
    ],
)
def test_bad_formats_are_rejected(options, message):
    with pytest.raises(ConfigError, match=message):
        FormatReward(**options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": [1, null]}', 1.0),
        (" 3 ", 1.0),
        ("NaN", 0.0),
        ('{"a": Infinity}', 0.0),
        ("{'a': 1}", 0.0),
        ('{"a": 1} done', 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),
        ('```json\n{"a": 1}\n```', 0.0),
    ],
)
def test_json_is_valid_or_not(text, expected):
    assert score(JsonValid(), text) == expected


def test_a_fence_may_be_allowed():
    reward = JsonValid(allow_fence=True)
    texts = [
        '```json\n{"a": 1}\n```',
        '```\n{"a": 1}\n```',
        '{"a": 1}',
        'Here:\n```json\n{"a": 1}\n```',
        "```json\nno\n```",
    ]
    assert [score(reward, text) for text in texts] == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_json_satisfies_a_schema():
    reward = JsonValid(schema={"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}})
    assert [score(reward, text) for text in ('{"name": "x"}', '{"name": 1}', "{}", "[]")] == [1.0, 0.0, 0.0, 0.0]


def test_a_bad_schema_and_a_missing_package_are_config_errors(monkeypatch):
    with pytest.raises(ConfigError, match="is no JSON Schema: 'objekt' is not valid"):
        JsonValid(schema={"type": "objekt"})
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(ConfigError, match=r'pip install "stateset-lightning\[json\]"'):
        JsonValid(schema={"type": "object"})


def test_a_remote_reference_fails_instead_of_using_the_network():
    reward = JsonValid(schema={"$ref": "http://127.0.0.1:9/schema.json"})
    with pytest.raises(Exception, match=r"schema\.json"):
        score(reward, "{}")
