"""Rows -> scenarios: the three forms of a question, `fields`, and a reason for every row that is none."""

import re

import pytest

from stateset_lightning.data.rows import RawRow
from stateset_lightning.data.scenarios import Part
from stateset_lightning.data.shapes import RowOptions, recognise
from stateset_lightning.data.sources import read_split
from stateset_lightning.errors import DataError
from stateset_lightning.types import Turn


def converted(row, rewards=None, **options):
    rows = [RawRow(row, "here", 4)]
    return Part(rows, recognise(rows, RowOptions(**options), "file"), "file", rewards).scenarios(rows)


def scenarios(row, fields=None, rewards=None, **options):
    found, problems = converted(row, rewards, fields=fields, **options)
    assert problems == []
    return [scenario for scenario, _ in found]


def reason(row, **options):
    found, problems = converted(row, **options)
    assert found == []
    assert problems[0].place == "here"
    return problems[0].reason


def test_a_prompt_with_further_columns():
    (scenario,) = scenarios({"prompt": "1+1?", "target": 2, "level": "easy"})
    assert (scenario.id, scenario.prompt, scenario.target) == ("file:4", "1+1?", 2)
    assert scenario.columns()["level"] == "easy"


def test_messages_become_turns():
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": ""},
        Turn("user", "b"),
    ]
    (scenario,) = scenarios({"messages": messages})
    assert scenario.messages == (Turn("system", "s"), Turn("user", "a"), Turn("assistant", ""), Turn("user", "b"))


def test_a_prompt_that_is_a_list_of_messages_is_a_conversation():
    (scenario,) = scenarios({"prompt": [{"role": "user", "content": "a"}], "target": "b"})
    assert (scenario.prompt, scenario.messages) == (None, (Turn("user", "a"),))


def test_each_user_response_is_a_scenario_under_the_context():
    row = {
        "id": "qa1",
        "topic": "question_answering",
        "context": "Answer accurately",
        "user_responses": ["What is Python?", "Explain"],
    }
    first, second = scenarios(row)
    assert (first.id, first.prompt, first.context, first.topic) == (
        "qa1/0",
        "What is Python?",
        "Answer accurately",
        "question_answering",
    )
    assert (second.id, second.prompt) == ("qa1/1", "Explain")
    assert "user_responses" not in first.columns()
    assert first.turns()[0] == Turn("system", "Answer accurately")


def test_fields_rename_and_the_original_column_stays():
    (scenario,) = scenarios({"question": "q", "answer": "a"}, {"prompt": "question", "target": "answer"})
    assert (scenario.prompt, scenario.target) == ("q", "a")
    assert scenario.columns()["question"] == "q"
    (swapped,) = scenarios({"prompt": "a", "target": "b"}, {"prompt": "target", "target": "prompt"})
    assert (swapped.prompt, swapped.target) == ("b", "a")


@pytest.mark.parametrize(
    ("given", "expected"), [(12, "12"), ("x", "x"), (None, "file:4"), ("", "file:4"), (1.5, "1.5")]
)
def test_ids_become_text(given, expected):
    assert scenarios({"prompt": "a", "id": given})[0].id == expected


def test_rewards_of_the_row_win_over_those_of_the_source():
    assert scenarios({"prompt": "a"}, rewards=["exact"])[0].rewards == ("exact",)
    assert scenarios({"prompt": "a", "rewards": ["length"]}, rewards=["exact"])[0].rewards == ("length",)


@pytest.mark.parametrize("name", ["model_config", "copy", "turns", "columns", "", "self", "__class__", "model_fields"])
def test_any_column_name_is_kept(name):
    assert scenarios({"prompt": "a", name: "kept"})[0].columns()[name] == "kept"


NUMBERED = "data.fields.id=null numbers the rows"
ROLES = (
    "the roles are system, developer, user, human, prompter, assistant, gpt, bot, model, chatgpt, tool, function,"
    " observation"
)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": " \n"}, "the prompt is empty"),
        (
            {"prompt": "a\ud83d"},
            "the prompt holds \\ud83d, half of a character (a surrogate without a pair); replace it",
        ),
        ({"prompt": 7}, "the prompt must be text, not a number (7); put it in quotes"),
        ({"prompt": True}, "the prompt must be text, not true/false (True); put it in quotes"),
        ({"prompt": None}, "needs exactly one of 'prompt', 'messages' and 'user_responses', but has none of them"),
        (
            {"prompt": "a", "messages": [{"role": "user", "content": "a"}]},
            "needs exactly one of 'prompt', 'messages' and 'user_responses', but has 'prompt' and 'messages';"
            " choose one: data.format=prompt or data.fields.prompt=null",
        ),
        ({"messages": "hi"}, "'messages' must be a list of {role, content}, not text"),
        ({"messages": []}, "'messages' is an empty list"),
        (
            {"messages": ["hi"]},
            "message 1 must have 'role' and 'content' (or 'from' and 'value'), but is text",
        ),
        (
            {"messages": [{"role": "user", "text": "x"}]},
            "message 1 must have 'role' and 'content' (or 'from' and 'value'), but is a mapping with role, text",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]},
            "message 1 holds 'tool_calls', which would be lost: only the text model is trained: take the row out",
        ),
        ({"messages": [{"role": "narrator", "content": "a"}]}, f"message 1 has the role 'narrator'; {ROLES}"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, f"message 1 has the role ['user']; {ROLES}"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "url": "b"}]}]},
            "message 1 holds 'image': only the text model is trained: take the row out",
        ),
        ({"messages": [{"role": "user", "content": [1]}]}, "the content of message 1 must be text, not a list"),
        (
            {"messages": [{"role": "user", "content": [{"type": None}]}]},
            "the content of message 1 must be text, not a list",
        ),
        (
            {"prompt": "What is this?", "images": [{"bytes": b"x", "path": None}]},
            "'images' holds what no model sees: only the text model is trained: take the row out, or"
            " data.fields.images=null to train without",
        ),
        (
            {"prompt": "What is this?", "image": "https://example.org/a8f3"},
            "'image' holds what no model sees: only the text model is trained: take the row out, or"
            " data.fields.image=null to train without",
        ),
        (
            {"prompt": "<image>\nWhat is this?"},
            "the prompt has the mark <image> of what no model sees: only the text model is trained: take the row out",
        ),
        (
            {"messages": [{"role": "assistant", "content": "b"}]},
            "the last message must be the user's, not the assistant's; the model answers it",
        ),
        ({"messages": [{"role": "user", "content": " "}]}, "the last message is empty"),
        ({"user_responses": "a"}, "'user_responses' must be a list of texts, not text"),
        ({"user_responses": []}, "'user_responses' is an empty list"),
        ({"user_responses": ["a", 3]}, "item 2 of 'user_responses' must be text, not a number (3); put it in quotes"),
        ({"user_responses": [""]}, "item 1 of 'user_responses' is empty"),
        (
            {"prompt": "a", "id": True},
            "the id must be text or a number, not true/false; data.fields.id=null numbers the rows",
        ),
        (
            {"prompt": "a", "id": [1]},
            "the id must be text or a number, not a list; data.fields.id=null numbers the rows",
        ),
        ({"prompt": "a", "rewards": "exact"}, "'rewards' must be a list of texts, not text"),
    ],
)
def test_a_bad_row_says_why(row, expected):
    assert reason(row) == expected


def test_a_row_without_a_named_column_says_which_it_has():
    rows = [RawRow({"question": "q"}, "f:1", 1), RawRow({"text": "a"}, "f:2", 2)]
    found, problems = Part(rows, recognise(rows, RowOptions(fields={"prompt": "question"}), "f"), "f").scenarios(rows)
    assert len(found) == 1
    assert [problem.reason for problem in problems] == ["no column 'question' (data.fields.prompt); the row has: text"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"prompt": "[{'role': 'user', 'content': 'a'}\n {'role': 'assistant', 'content': 'b'}]"},
            "the conversation was",
        ),
        ({"prompt": "a", "target": "['b' 'c']"}, "the target was printed by pandas with its arrays"),
        (
            {"prompt": "a", "reward_model": {"ground_truth": {"numbers": [1], "goal": 3}}},
            "target=null none; a function gets it whole .*data.fields.ground_truth=reward_model.ground_truth",
        ),
        (
            {"prompt": "a", "reward_model": {"ground_truth": {"numbers": [1], "target": 3}}},
            r"data.fields.target=reward_model.ground_truth.target takes a part",
        ),
    ],
)
def test_what_is_no_target_is_not_taken_for_one(row, said):
    with pytest.raises(DataError, match=said):
        read_split([row], "train")


@pytest.mark.parametrize(
    ("target", "is_told"),
    [("4.0", True), ("['4', '5']", True), ("4.5", False), ("[0, 1]", False), ('[{"sep": " "}]', False)],
)
def test_a_target_as_pandas_writes_it_is_told(target, is_told):
    found = read_split([{"prompt": "a", "target": target}], "train")
    assert found.scenarios[0].target == target
    assert bool(re.search(r"pandas' .to_csv writes so \(1 rows\)", " ".join(found.notes))) == is_told


def test_good_rows_beside_bad_ones_are_kept_apart():
    rows = [RawRow({"prompt": p}, f"f:{i}", i) for i, p in enumerate(["a", "", "c", ""], 1)]
    found, problems = Part(rows, recognise(rows, RowOptions(), "f"), "f").scenarios(rows)
    assert [(scenario.id, place) for scenario, place in found] == [("f:1", "f:1"), ("f:3", "f:3")]
    assert [problem.place for problem in problems] == ["f:2", "f:4"]


def test_a_missing_column_of_a_whole_file_is_one_error_that_proposes_fields():
    rows = [RawRow({"text": "q", "category": "a"}, "f:1", 1)]
    with pytest.raises(
        DataError, match=r"f: there is no column 'prompt'.*it has: text, category.*data.fields.prompt=text"
    ):
        recognise(rows, RowOptions(), "f")
    with pytest.raises(
        DataError,
        match=r"f: data.fields.target names the column 'solution', which is not there; it has: text, category",
    ):
        recognise(rows, RowOptions(fields={"prompt": "text", "target": "solution"}), "f")
    recognise(rows, RowOptions(fields={"prompt": "text"}), "f")
