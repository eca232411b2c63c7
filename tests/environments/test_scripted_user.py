"""ScriptedUser: which text comes when, when it ends, and which columns fail."""

import pytest

from stateset_lightning.environments import EnvironmentFailure, Reply, ScriptedUser
from stateset_lightning.environments.base import as_reply, as_turns, tool_methods
from stateset_lightning.errors import ConfigError
from stateset_lightning.types import Turn

ROW = {"id": "s1", "prompt": "What is Python?", "messages": None, "replies": ["Explain it.", "Thanks."]}
DONE = Reply(done=True)


def said(text):
    return Reply((Turn("user", text),))


def play(environment, row, turns=4):
    """Turns at the reset, and the replies up to the end."""
    opening, replies = as_turns(environment.reset(row, 0)), []
    while len(replies) < turns and DONE not in replies:
        replies.append(as_reply(environment.step("What the model says.")))
    return opening, replies


@pytest.mark.parametrize(
    ("options", "columns", "opening", "replies"),
    [
        ({}, {}, (), ["Explain it.", "Thanks."]),
        ({}, {"prompt": None}, (Turn("user", "Explain it."),), ["Thanks."]),
        ({}, {"prompt": None, "messages": (Turn("user", "a"),)}, (), ["Explain it.", "Thanks."]),
        (
            {},
            {"prompt": None, "messages": ({"role": "system", "content": "a"},)},
            (Turn("user", "Explain it."),),
            ["Thanks."],
        ),
        ({"column": "later"}, {"later": ("And then?",)}, (), ["And then?"]),
        ({"responses": ["Why?"]}, {"replies": None}, (), ["Why?"]),
        ({"responses": ["Why?"]}, {"prompt": None}, (Turn("user", "Why?"),), []),
    ],
    ids=["column", "opens", "messages", "system turn", "other column", "responses", "responses open"],
)
def test_texts_come_one_after_another_and_then_it_ends(options, columns, opening, replies):
    environment = ScriptedUser(**options)
    for _ in range(2):  # the second reset begins anew
        assert play(environment, {**ROW, **columns}) == (opening, [*map(said, replies), DONE])


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "'replies' must be a list of texts, not null"),
        ("Explain it.", "'replies' must be a list of texts, not text"),
        ({"a": 1}, "'replies' must be a list of texts, not a mapping"),
        ([], "'replies' is an empty list"),
        (["a", 3], "item 2 of 'replies' must be text, not a number"),
        (["a", " "], "item 2 of 'replies' is empty"),
    ],
)
def test_a_column_that_is_missing_or_no_list_of_texts_fails_the_conversation(value, problem):
    with pytest.raises(EnvironmentFailure, match=f"^scenario 's1': {problem}"):
        ScriptedUser().reset({**ROW, "replies": value}, 0)


def test_a_column_that_is_not_there_fails_the_conversation():
    with pytest.raises(EnvironmentFailure, match=r"^scenario 's1': 'later' must be a list of texts"):
        ScriptedUser(column="later").reset(ROW, 0)


@pytest.mark.parametrize("responses", [[], ["a", ""], "Why?", [True]])
def test_bad_responses_are_refused(responses):
    with pytest.raises(ConfigError, match=r"scripted_user\.responses="):
        ScriptedUser(responses)


def test_it_offers_no_tools():
    assert tool_methods(ScriptedUser()) == {}
