"""The shapes that people's rows have: what becomes prompt, target and system turn, from the file to the tokens."""

import csv
import json
import logging
import math
import re
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import yaml
from module_runs import fit, make_module

from stateset_lightning import RewardFunction, RolloutConfig, ScenarioDataModule
from stateset_lightning.cli.main import main
from stateset_lightning.data import RowOptions, content, read_split
from stateset_lightning.errors import DataError, UserError
from stateset_lightning.rewards import Contains, ExactMatch
from stateset_lightning.types import ABSENT, Turn, as_target, at_path

USER, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
TURNS += [{"role": "assistant", "content": "Hello"}, USER]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
SHAREGPT += [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
IMAGE = {"bytes": b"x", "path": None}

ASKED = "<|user|>2 + 2?<|end|><|assistant|>"
AFTER_HELLO = "<|user|>Hi<|end|><|assistant|>Hello<|end|><|user|>2 + 2?<|end|><|assistant|>"
COUNTDOWN = "Using the numbers {{ nums }}, write an expression that equals {{ target }}."


def user(text):
    return f"<|user|>{text}<|end|><|assistant|>"


# Name: a row, the one flag that it needs, the first prompt as the model sees it, and its target.
SHAPES = {
    "prompt and target": ({"prompt": "2 + 2?", "target": "4"}, {}, ASKED, "4"),
    "TRL text": ({"prompt": "2 + 2?"}, {}, ASKED, None),
    "TRL conversational": ({"prompt": TURNS, "solution": "4"}, {}, "<|system|>Be brief.<|end|>" + AFTER_HELLO, "4"),
    "TRL prompt and completion": ({"prompt": "2 + 2?", "completion": "4"}, {}, ASKED, "4"),
    "TRL conversational prompt and completion": ({"prompt": [USER], "completion": [ANSWER]}, {}, ASKED, "4"),
    "preference": ({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, {}, ASKED, None),
    "preference, chosen": (
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]},
        {"fields": {"target": "chosen"}},
        ASKED,
        "4",
    ),
    "UltraFeedback": (
        {
            "prompt": "2 + 2?",
            "prompt_id": "x",
            "chosen": [USER, ANSWER],
            "rejected": [USER, ANSWER],
            "messages": [USER, ANSWER],
            "score_chosen": 8.5,
        },
        {},
        ASKED,
        None,
    ),
    "Alpaca": ({"instruction": "Add", "input": "2 2", "output": "4"}, {}, user("Add\n\n2 2"), "4"),
    "Alpaca without input": ({"instruction": "2 + 2?", "input": "", "output": "4", "text": "### ..."}, {}, ASKED, "4"),
    "Dolly": (
        {"instruction": "Who?", "context": "It was Ann.", "response": "Ann", "category": "closed_qa"},
        {},
        user("It was Ann.\n\nWho?"),
        "Ann",
    ),
    "ShareGPT": ({"id": "a", "conversations": SHAREGPT}, {}, AFTER_HELLO, "4"),
    "LMSYS": ({"conversation_id": "a", "model": "x", "conversation": [USER, ANSWER], "turn": 1}, {}, ASKED, "4"),
    "Orca": (
        {"id": "x", "system_prompt": "Be brief.", "question": "2 + 2?", "response": "4"},
        {},
        "<|system|>Be brief.<|end|>" + ASKED,
        "4",
    ),
    "ShareGPT with a system": (
        {"system": "Be brief.", "conversations": SHAREGPT},
        {},
        "<|system|>Be brief.<|end|>" + AFTER_HELLO,
        "4",
    ),
    "OpenAI": ({"messages": [*TURNS, ANSWER]}, {}, "<|system|>Be brief.<|end|>" + AFTER_HELLO, "4"),
    "OpenAI, developer and parts": (
        {
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "Be brief."}], "name": "x"},
                {"role": "user", "content": [{"type": "input_text", "text": "2 "}, {"type": "text", "text": "+ 2?"}]},
                {**ANSWER, "weight": 1},
            ]
        },
        {},
        "<|system|>Be brief.<|end|>" + ASKED,
        "4",
    ),
    "OpenAI, prefilled": (
        {"messages": [USER, {**ANSWER, "content": "It is "}], "target": "4"},
        {"final_assistant_turn": "prefill"},
        ASKED + "It is ",
        "4",
    ),
    "verl": (
        {
            "data_source": "gsm8k",
            "prompt": [USER],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "4"},
            "extra_info": {"index": 0, "split": "train"},
        },
        {},
        ASKED,
        "4",
    ),
    "SQuAD": (
        {
            "id": "5",
            "title": "T",
            "context": "It was Ann.",
            "question": "Who?",
            "answers": {"text": ["Ann", "Ann"], "answer_start": [7, 7]},
        },
        {},
        user("It was Ann.\n\nWho?"),
        ["Ann", "Ann"],
    ),
    "HotpotQA": (
        {
            "id": "5",
            "question": "Who?",
            "answer": "Ann",
            "level": "easy",
            "supporting_facts": {"title": ["A"], "sent_id": [0]},
            "context": {"title": ["A", "B"], "sentences": [["It was. ", "Ann."], ["No."]]},
        },
        {},
        user("A: It was. Ann.\n\nB: No.\n\nWho?"),
        "Ann",
    ),
    "NuminaMath": (
        {"source": "x", "problem": "2 + 2?", "solution": r"\boxed{4}", "messages": [USER, ANSWER]},
        {},
        ASKED,
        r"\boxed{4}",
    ),
    "DeepScaleR": ({"problem": "2 + 2?", "answer": "4", "solution": "Add: 4"}, {}, ASKED, "4"),
    "MATH": ({"problem": "2 + 2?", "level": "Level 1", "type": "A", "solution": r"\boxed{4}"}, {}, ASKED, r"\boxed{4}"),
    "GSM8K": ({"question": "2 + 2?", "answer": "Add.\n#### 4"}, {}, ASKED, "Add.\n#### 4"),
    "Countdown": (
        {"target": 98, "nums": [44, 19, 35]},
        {"prompt_template": COUNTDOWN},
        user("Using the numbers [44, 19, 35], write an expression that equals 98."),
        98,
    ),
    "ARC": (
        {"id": "5", "question": "2 + 2?", "choices": {"text": ["3", "4"], "label": ["A", "B"]}, "answerKey": "B"},
        {},
        user("2 + 2?\n\nA. 3\nB. 4"),
        "B",
    ),
    "MMLU": (
        {"question": "2 + 2?", "subject": "maths", "choices": ["3", "4"], "answer": 1},
        {},
        user("2 + 2?\n\nA. 3\nB. 4"),
        "B",
    ),
    "MMLU, as pandas makes it": (
        {"question": "2 + 2?", "choices": [{"label": "A", "text": "3"}, {"label": "B", "text": "4"}], "answer": 1.0},
        {},
        user("2 + 2?\n\nA. 3\nB. 4"),
        "B",
    ),
    "MedQA": (
        {"question": "2 + 2?", "options": {"A": "3", "B": "4"}, "answer_idx": "B", "answer": "4"},
        {},
        user("2 + 2?\n\nA. 3\nB. 4"),
        "4",
    ),
    "ReClor": (
        {"context": "C", "question": "Q?", "answers": ["3", "4"], "label": 1},
        {},
        user("C\n\nQ?\n\nA. 3\nB. 4"),
        "B",
    ),
    "LogiQA": (
        {"context": "C", "query": "Q?", "options": ["3", "4"], "correct_option": 1},
        {},
        user("C\n\nQ?\n\nA. 3\nB. 4"),
        "B",
    ),
    "QuAIL": (
        {"context": "C", "question": "Q?", "answers": ["3", "4"], "correct_answer_id": 0},
        {},
        user("C\n\nQ?\n\nA. 3\nB. 4"),
        "A",
    ),
    "answers beside one of them": ({"question": "2 + 2?", "answer": "4", "answers": ["4", "four"]}, {}, ASKED, "4"),
    "No Robots": (
        {"prompt": "2 + 2?", "prompt_id": "x", "messages": [TURNS[0], USER, ANSWER], "category": "c"},
        {},
        "<|system|>Be brief.<|end|>" + ASKED,
        "4",
    ),
    "TRL unpaired preference": ({"prompt": "2 + 2?", "completion": "5", "label": False}, {}, ASKED, None),
    "a prompt made of its question": ({"prompt": "Q: 2 + 2?", "question": "2 + 2?"}, {}, user("Q: 2 + 2?"), None),
    "several answers": ({"prompt": "2 + 2?", "answer": "no", "ground_truth": "4", "response": "x"}, {}, ASKED, "4"),
    "BoolQ": ({"question": "is it", "answer": True, "passage": "It is."}, {}, user("It is.\n\nis it"), True),
    "names in capitals, with space": ({"Question": "2 + 2?", " Answer ": "4"}, {}, ASKED, "4"),
}


def jsonl(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def set_up(train, tokenizer, **options):
    data = ScenarioDataModule(train, tokenizer=tokenizer, seed=1, batch_size=1, **options)
    data.setup("fit")
    return data


def seen(train, tokenizer, **options):
    """The first prompt as the model sees it, and its target."""
    scenarios, prompts = set_up(train, tokenizer, **options).served("train")
    return tokenizer.decode(prompts[0]), scenarios.scenarios[0].target


@pytest.mark.parametrize("name", SHAPES)
def test_each_shape_needs_one_flag_at_most(name, tmp_path, tiny_tokenizer):
    row, flag, prompt, target = SHAPES[name]
    assert len(flag) <= 1
    assert seen(str(jsonl(tmp_path, row)), tiny_tokenizer, **flag) == (prompt, target)


def test_the_table_of_shapes_in_the_docs_has_a_test_for_each_line():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    lines = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|", page.partition("| rows of |")[2], flags=re.MULTILINE)
    assert len(lines) > 15
    for name, _, flag in lines:
        options = SHAPES[name.strip()][1]
        assert all(key in flag for key in options), name
        assert bool(options) == flag.strip().startswith("`--data."), name


@pytest.mark.parametrize("name", SHAPES)
def test_each_shape_is_trained_on(name, tmp_path):
    class LooksAtAll(RewardFunction):
        def compute_reward(self, turns, context=None):
            heard.append((context["target"], "".join(f"<|{turn.role}|>{turn.content}" for turn in turns)))
            return float(len(heard) % 2)

    heard = []
    row, flag, prompt, target = SHAPES[name]
    module = make_module(reward=LooksAtAll(), rollout=RolloutConfig(num_generations=2, max_new_tokens=2))
    data = ScenarioDataModule(str(jsonl(tmp_path, row)), batch_size=1, **flag)
    trainer = fit(tmp_path, module, data, max_steps=1)
    assert trainer.global_step == 1
    assert len(heard) == 2
    assert all(wanted == target and text.startswith(prompt.replace("<|end|>", "")) for wanted, text in heard)


# Columns as people name and nest them ---------------------------------------------------------------------------------

NESTED = {
    "a": {"b": [{"c": 1}, {"c": 2}], "d.e": 3},
    "x.y": 4,
    "x": {"y": 5},
    "none": None,
    "text": "{'k': [6]}",
    "": 7,
}


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("a.b[0].c", 1),
        ("a.b[-1].c", 2),
        ("a.b.c", [1, 2]),
        ("a.d.e", 3),
        ("x.y", 4),
        ("none.anything[0]", None),
        ("text.k[0]", 6),
        ("", 7),
        ("a.b[2].c", ABSENT),
        ("a.c", ABSENT),
        ("x.y.z", ABSENT),
        ("a.b[one]", ABSENT),
    ],
)
def test_a_dotted_path_finds(path, found):
    assert at_path(NESTED, path) == found


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({"a": {"q": "2 + 2?"}, "b": [{"c": "4"}]}, {"fields": {"prompt": "a.q", "target": "b[0].c"}}, (ASKED, "4")),
        ({"x.y": "2 + 2?", "x": {"y": "no"}}, {"fields": {"prompt": "x.y"}}, (ASKED, None)),
        ({"problem": "2 + 2?", "messages": [USER], "prompt": "no"}, {"fields": {"prompt": "problem"}}, (ASKED, None)),
        ({"prompt": "2 + 2?", "messages": [USER, ANSWER]}, {"fields": {"messages": None}}, (ASKED, None)),
        ({"prompt": "2 + 2?", "messages": [USER, ANSWER]}, {"fields": {"messages": "null"}}, (ASKED, None)),
        ({"prompt": "no", "messages": [USER, ANSWER]}, {"format": "messages"}, (ASKED, "4")),
        ({"prompt": "2 + 2?", "messages": [USER, ANSWER]}, {"format": "prompt"}, (ASKED, None)),
        ({"prompt": "2 + 2?", "answer": "4"}, {"fields": {"target": None}}, (ASKED, None)),
        ({"prompt": "2 + 2?", "context": {"title": []}}, {"fields": {"context": None}}, (ASKED, None)),
        ({"prompt": "2 + 2?", "id": [1], "rewards": [0.5]}, {"fields": {"id": None, "rewards": None}}, (ASKED, None)),
        ({"prompt": "2 + 2?", "images": [IMAGE]}, {"fields": {"images": None}}, (ASKED, None)),
        ({"prompt": "2 + 2?", "images": [], "image": "docker.io/x"}, {}, (ASKED, None)),
        ({"prompt": "2 + 2?", "topic": 3, "meta": {"bytes": 1}, "role": 4.5}, {}, (ASKED, None)),
        ({"prompt": "2 + 2?", "topic": ["a", "b"]}, {}, (ASKED, None)),
        ({"choice": 1, "q": "2 + 2?"}, {"fields": {"prompt": "q", "target": "{{ 'ABC'[choice] }}"}}, (ASKED, "B")),
        (
            {"messages": [USER, ANSWER], "target": "5"},
            {"final_assistant_turn": "target"},
            (ASKED, "4"),
        ),
        ({"messages": [USER, ANSWER], "target": "5"}, {}, (ASKED, "5")),
        ({"messages": json.dumps([USER, ANSWER])}, {}, (ASKED, "4")),
        ({"prompt": str([USER])}, {}, (ASKED, None)),
        ({"conversations": str(SHAREGPT)}, {}, (AFTER_HELLO, "4")),
        ({"prompt": "[1, 2]"}, {}, (user("[1, 2]"), None)),
        ({"prompt": str([USER])}, {"prompt_template": "{{ prompt }}"}, (user(str([USER])), None)),
        ({"prompt": np.array([USER], dtype=object), "target": np.array(["4"])}, {}, (ASKED, ["4"])),
    ],
)
def test_columns_are_what_was_said_of_them(row, options, expected, tiny_tokenizer):
    assert seen([row], tiny_tokenizer, **options) == expected


def test_a_table_written_by_pandas_keeps_its_conversations(tmp_path, tiny_tokenizer, caplog):
    row = {"prompt": [USER], "reward_model": {"style": "rule", "ground_truth": "4"}}
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([row, row.values()])
    with caplog.at_level(logging.INFO, logger="stateset_lightning"):
        assert seen(str(tmp_path / "rows.csv"), tiny_tokenizer) == (ASKED, "4")
    assert "messages that were written as text are read as messages (1 rows)" in caplog.text


# What pandas makes of lists and mappings in a CSV: JSON or Python text, and numpy's, which nothing reads.
@pytest.mark.parametrize(
    ("row", "prompt", "target"),
    [
        ({"question": "Q?", "choices": ["r", "s"], "answer": 1}, "Q?\n\nA. r\nB. s", "B"),
        ({"question": "Q?", "choices": '["r", "s"]', "answer": "s"}, "Q?\n\nA. r\nB. s", "s"),
        ({"question": "Q?", "choices": {"text": ["r"], "label": ["A"]}, "answerKey": "A"}, "Q?\n\nA. r", "A"),
        ({"question": "Q?", "choices": "r or s", "answer": "1"}, "Q?\n\nr or s", "1"),
        ({"question": "Q?", "choices": "['r' 's']", "answer": 1}, None, "the choices are not a list of"),
        ({"question": "Q?", "answers": {"text": ["4"], "answer_start": [1]}}, "Q?", ["4"]),
        ({"question": "Q?", "answers": ["4", "four"]}, "Q?", ["4", "four"]),
        ({"question": "Q?", "answers": "{'text': array(['4'], dtype=object)}"}, None, "was printed by pandas with its"),
        ({"question": "Q?", "answer": "['4']"}, "Q?", "['4']"),
    ],
)
def test_a_table_of_texts_keeps_lists_and_mappings(row, prompt, target, tmp_path):
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([row, row.values()])
    if prompt is None:
        with pytest.raises(DataError, match=target):
            read_split(str(tmp_path / "rows.csv"), "train")
    else:
        scenario = read_split(str(tmp_path / "rows.csv"), "train").scenarios[0]
        assert (scenario.prompt, scenario.target) == (prompt, target)


def test_what_was_recognised_is_announced_with_the_first_row(tmp_path, tiny_tokenizer, caplog):
    rows = [{"instruction": "Add", "input": "2 2", "output": answer} for answer in ("4", None, "")]
    with caplog.at_level(logging.INFO, logger="stateset_lightning"):
        set_up(rows, tiny_tokenizer)
    assert [record.getMessage() for record in caplog.records][1:4] == [
        r"data.train: read as alpaca: prompt from '{{ instruction }}\n\n{{ input }}', target from 'output'",
        "data.train: 2 of 3 scenarios have no target",
        r"data.train: the first row is '<|user|>Add\n\n2 2<|end|><|assistant|>', target '4'",
    ]


@pytest.mark.parametrize(
    ("row", "proposed", "never"),
    [
        ({"id": "a", "turns": [1], "system": "Be brief."}, [], ["id", "turns", "system"]),
        ({"text": "a", "label": "b"}, ["--data.fields.prompt=text"], ["label"]),
        (
            {"sample_id": "a", "utterance": "b c", "labels": "c"},
            ["--data.fields.prompt=utterance"],
            ["sample_id", "labels"],
        ),
        (
            {"premise": "a b", "hypothesis": "b c", "label": 1},
            ["--data.prompt_template='{{ premise }} {{ hypothesis }}'"],
            ["label", "premise"],
        ),
        ({"target": 3, "nums": [1, 2]}, [f"--data.prompt_template='{COUNTDOWN}'"], ["target", "nums"]),
        ({"text;label": "a;b"}, [], ["text;label"]),
        ({"label": 1, "target": "x"}, [], ["label", "target"]),
        ({"chosen": "Human: a", "rejected": "Human: b"}, [], ["chosen", "rejected", "'{{ chosen"]),
        ({"review": "It is good.", "mood": "good"}, ["--data.fields.prompt=review"], ["mood"]),
        ({"inputs": "Q", "targets": "A"}, ["--data.fields.prompt=inputs"], ["targets"]),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, ["--data.fields.messages=chosen"], ["rejected"]),
        ({"input": [USER], "label": "4"}, ["--data.fields.messages=input"], ["label"]),
        ({"numbers": [1, 2], "target": 3}, [f"'{COUNTDOWN.replace('nums', 'numbers')}'"], ["target"]),
    ],
)
def test_a_remedy_is_likely_to_be_right_or_not_given(row, proposed, never, tiny_tokenizer):
    with pytest.raises(DataError, match=r"there is no column 'prompt'.* it has: ") as error:
        read_split([row], "train")
    assert all(remedy in str(error.value) for remedy in proposed)
    assert not any(f"prompt={name}" in str(error.value) for name in never)
    for remedy in proposed:  # works when followed
        remedy = remedy if "=" in remedy else f"--data.prompt_template={remedy}"
        key, value = remedy.removeprefix("--data.").split("=", 1)
        field = key.removeprefix("fields.")
        option = {"fields": {field: value}} if field != key else {key: value.strip("'")}
        assert seen([row], tiny_tokenizer, **option)[0].startswith("<|user|>")


@pytest.mark.parametrize(
    ("row", "joined", "alone"),
    [
        ({"instruction": "Answer.", "question": "2 + 2?"}, "Answer.\n\n2 + 2?", "Answer."),
        ({"prompt": "You help.", "question": "2 + 2?"}, "You help.\n\n2 + 2?", "You help."),
        ({"prompt": "To French:", "input": "Hello"}, "To French:\n\nHello", "To French:"),
        ({"prompt": "P", "context": None, "question": "2 + 2?"}, "P\n\n2 + 2?", "P"),
        ({"prompt": "P", "context": None, "choices": ["x", "y"]}, "P\n\nA. x\nB. y", "P"),
        ({"question": "Q?", "A": "x", "B": "y"}, "Q?\n\nA. x\n\nB. y", "Q?"),
        ({"question": "Q?", "opa": "x", "opb": "y"}, "Q?\n\nA. x\n\nB. y", "Q?"),
        ({"question": "Q?", "option_1": "x", "option_2": "y"}, "Q?\n\n1. x\n\n2. y", "Q?"),
        ({"question": "Q?", "distractor1": "x"}, None, "Q?"),
        ({"Question": "Q?", "Incorrect Answer 1": "x"}, None, "Q?"),
        ({"Body": "He has 2.", "Question": "Q?"}, "He has 2.\n\nQ?", "Q?"),
        ({"premise": "P", "choice1": "x", "choice2": "y", "question": "Q"}, "P\n\n1. x\n\n2. y\n\nQ", "Q"),
        ({"passages": ["a", "b"], "question": "Q?"}, "a\n\nb\n\nQ?", "Q?"),
        ({"paragraph": "P", "question": "Q?"}, "P\n\nQ?", "Q?"),
        ({"text": "P", "question": "Q?"}, "P\n\nQ?", "Q?"),
        ({"evidence": "P", "question": "Q?"}, "P\n\nQ?", "Q?"),
        ({"question": "Q?", "table": {"rows": [["x"]]}}, None, "Q?"),
        ({"question": "Q?", "answerA": "x", "answerB": "y"}, "Q?\n\nA. x\n\nB. y", "Q?"),
        ({"question": "Q?", "ans0": "x", "ans1": "y"}, "Q?\n\n0. x\n\n1. y", "Q?"),
        ({"question": "Q?", "alternatives": ["x", "y"]}, "Q?\n\nA. x\nB. y", "Q?"),
        ({"prompt": "Q?", "tools": [{"name": "f"}]}, None, "Q?"),
        ({"question": "Q?", "schema": "create table t"}, "Q?\n\ncreate table t", "Q?"),
        ({"instruction": "Add", "input": "2 2", "history": [["Hi", "Hello"]]}, None, "Add\n\n2 2"),
    ],
)
def test_nothing_that_belongs_to_the_question_is_left_out_silently(row, joined, alone):
    row |= {"answer": "x y z", "extra": "more"}
    with pytest.raises(DataError, match="the prompt would be without ") as error:
        read_split([row], "train")
    template = re.search(r"--data\.prompt_template='(.*)'", str(error.value))
    assert (template is None) == (joined is None)
    if template:
        found = read_split([row], "train", RowOptions(prompt_template=template[1])).scenarios[0]
        assert (found.prompt, found.target) == (joined, "x y z")
    name = re.search(r"--data\.format=(\w+)", str(error.value))[1]
    assert read_split([row], "train", RowOptions(format=name)).scenarios[0].prompt == alone


@pytest.mark.parametrize(
    ("choices", "answer", "said"),
    [
        (["r", "s"], 2, "the answer 2 to choices is no index of the 2"),
        (["r", "s"], -2, "the answer -2 to choices is no index"),
        (["r", "s"], True, "the answer True to choices is no index"),
        (["r", "s"], 0.5, "the answer 0.5 to choices is no index"),
        (["r", "s"], "7", "the answer 7 to choices is no index"),
        ([0, 1], 1, "the answer 1 to choices is both an index and one of them"),
        (["r", None], 0, "the choices are not a list"),
        ({"a": ["r"]}, 0, "the choices are not a list"),
        (["r"] * 27, 0, "the choices are not a list of at most 26"),
        (["r", "s"], -1, None),
        (["r", "s"], None, None),
        (["r", "s"], 1.0, "B"),
        (["r", "s"], "s", "s"),
        (["r", "s"], "B", "B"),
    ],
)
def test_an_index_is_that_of_a_choice(choices, answer, said):
    rows = [{"question": "Q?", "choices": ["x", "y"], "answer": 0}]
    rows += [{"question": "Q?", "choices": choices, "answer": answer}]
    for order in (1, -1):  # whichever kind comes first
        if isinstance(said, str) and len(said) > 1:
            with pytest.raises(DataError, match=f"item {'2' if order == 1 else '1'}: .*{said}"):
                read_split(rows[::order], "train")
        else:
            assert [s.target for s in read_split(rows[::order], "train").scenarios] == ["A", said][::order]


@pytest.mark.parametrize(
    ("row", "options", "target"),
    [
        ({"question": "Q?", "choices": ["r", "s"], "answer": 1}, {"fields": {"target": "answer"}}, "B"),
        ({"question": "Q?", "choices": ["r", "s"], "label": "1"}, {}, "B"),
        (
            {"question": "Q?", "choices": ["r", "s"], "correct_answer": 1, "answer": "s"},
            {"fields": {"target": "answer"}},
            "s",
        ),
        ({"question": "Q?", "choices": "['r', 's']", "label": "1"}, {"fields": {"target": "label"}}, "B"),
        ({"question": "Q?", "choices": ["r", "s"], "label": "-1"}, {}, None),
        ({"question": "Q?", "choices": np.array(["r", "s"]), "answer": np.int64(1)}, {}, "B"),
        ({"question": "Q?", "choices": "['4', '6']", "answer": "6"}, {}, "6"),  # no index of two
        ({"question": "Q?", "choices": "['4', '1']", "answer": "1"}, {}, "'1' to choices is both an index and one of"),
    ],
)
def test_the_letter_of_a_choice_is_the_target_however_its_index_is_written(row, options, target):
    rows = [{**row, **dict.fromkeys(row.keys() & {"answer", "label"}, "0")}, row]
    if len(target or "") > 1:
        with pytest.raises(DataError, match=target):
            read_split(rows[1:], "train", RowOptions(**options))
    else:
        assert read_split(rows, "train", RowOptions(**options)).scenarios[1].target == target


@pytest.mark.parametrize(("column", "value"), [("input", "2 2"), ("system", "Be brief."), ("output", "4")])
def test_a_column_that_comes_late_counts(column, value):
    rows = [{"instruction": "Add"}] * 1400 + [{"instruction": "Add", column: value}]
    last = read_split(rows, "train").scenarios[-1]
    found = {"input": last.prompt, "system": last.context, "output": last.target}
    assert value in found[column]


@pytest.mark.parametrize(
    "row",
    [
        {"goal": "To do it.", "sol1": "Use it.", "sol2": "Lose it.", "label": 0},
        {"sentence": "He has _.", "option1": "a b", "option2": "c d", "answer": "2"},
        {"ctx_a": "He is", "ctx_b": "she has", "ctx": "He is she has", "endings": ["a b"], "label": 1},
        {"code": "def f(): pass", "option1": "a b", "option_b": "b c", "chosen": "c d", "sol_2": "e f"},
    ],
)
def test_no_answer_is_proposed_as_a_prompt(row):
    with pytest.raises(DataError, match="Say which one holds the prompt") as error:
        read_split([row], "train")
    remedy = str(error.value).partition("holds the prompt: ")[2]
    proposed = remedy.replace("data.fields.prompt (a column)", "")
    assert not re.search("sol|ctx|endings|code|option|chosen|goal|sentence", proposed)


# Templates and row functions ------------------------------------------------------------------------------------------

ROW = {"a": "{{ 7 * 7 }}", "b": [1, 2], "c d": "x", "none": None, "nan": math.nan, "deep": {"er": "z"}}


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("{{ a }}", "{{ 7 * 7 }}"),  # what a row holds is text
        ("{{ a }}\n\n{{ deep.er }}", "{{ 7 * 7 }}\n\nz"),
        (r"{{ deep.er }}\n{{ b[0] }}: \nu", "z\n1: \\nu"),  # as a shell leaves it
        ("{{ row['c d'] }} {{ b | join('+') }}", "x 1+2"),
        ("[{{ none }}{{ nan }}]", "[]"),
        ("{{ b | lettered }}", "A. 1\nB. 2"),
    ],
)
def test_a_prompt_is_made_of_columns(template, prompt):
    assert read_split([ROW], "train", RowOptions(prompt_template=template)).scenarios[0].prompt == prompt


def test_a_passage_that_a_template_uses_is_no_system_turn_too(tiny_tokenizer):
    row = {"context": "It was Ann.", "question": "Who?", "answers": {"text": ["Ann"]}}
    template = "{{ question }} {{ context }}"
    assert seen([row], tiny_tokenizer, prompt_template=template) == (user("Who? It was Ann."), ["Ann"])
    assert seen([row], tiny_tokenizer, fields={"prompt": "question"})[0].startswith("<|system|>It was Ann.<|end|>")
    with pytest.raises(DataError, match=r"'context'.*data\.fields\.context=null.* must be text, not a mapping"):
        read_split([{"prompt": "a", "context": {"title": []}}], "train")


def test_a_system_turn_is_made_of_columns(tiny_tokenizer):
    row = {"prompt": "2 + 2?", "tone": "brief"}
    prompt = seen([row], tiny_tokenizer, system_template="Be {{ tone }}.", system_prompt="You add.")[0]
    assert prompt == "<|system|>You add.\n\nBe brief.<|end|>" + ASKED


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prompt_template": "{{ instrucion }}"},
            r"data\.prompt_template names the column 'instrucion'.*it has: a, b, c",
        ),
        ({"fields": {"target": "{{ x }}", "prompt": "a"}}, r"data\.fields\.target names the column 'x'"),
        ({"fields": {"prompt": "deep.err"}}, r"names the column 'deep\.err', which is not there; it has: .*deep\.er"),
        ({"prompt_template": "{{ deep.err }}"}, r"item 1: the template of the prompt: .*err.*the row has: a, b"),
        ({"prompt_template": "{{ a | shout }}"}, r"is no Jinja2 template: No filter named 'shout'"),
        ({"prompt_template": "{{ a"}, r"data\.prompt_template='{{ a' is no Jinja2 template"),
        ({"prompt_template": "{{ a.__class__.__mro__ }}"}, "item 1: the template of the prompt: access to attribute"),
        ({"prompt_template": "{{ none }}"}, "item 1: the prompt is empty"),
        ({"prompt_template": "{{ a }}", "fields": {"prompt": "a"}}, "are both given"),
        ({"prompt_template": 5}, "data.prompt_template names the column '5', which is not there"),
        ({"fields": {"prompt": ["a"]}}, r"data\.fields=.* must map our names to columns"),
        ({"format": "alpacca"}, "data.format='alpacca' must be one of auto, prompt, "),
        ({"format": "alpaca"}, "data.format=alpaca needs the columns instruction; it has: a, b"),
        ({"row": "no_such_module.f"}, r"data\.row='no_such_module\.f' cannot be imported: ModuleNotFoundError"),
        ({"row": "math.tau"}, r"data\.row='math\.tau' is a float, and no class or function; write it as my_module"),
        ({"row": lambda row: row["q"]}, "item 1: data.row raised KeyError: 'q'"),
        ({"row": lambda row: "text"}, "item 1: data.row returned 'text', which is neither a mapping"),
        ({"row": lambda row: None}, "data.row leaves out every row"),
    ],
)
def test_options_of_columns_that_cannot_be_honoured(options, message):
    with pytest.raises(UserError, match=message):
        read_split([ROW], "train", RowOptions(**options))


def test_a_row_function_makes_rows_and_leaves_some_out(tmp_path, monkeypatch, tiny_tokenizer, caplog):
    code = "def to_scenario(row):\n    return {'prompt': row['q'] + '?', 'answer': '4'} if row['q'] else None\n"
    (tmp_path / "my_rows.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"q": ""}, {"q": "2 + 2"}]
    with caplog.at_level(logging.INFO, logger="stateset_lightning"):
        assert seen(rows, tiny_tokenizer, row="my_rows.to_scenario") == (ASKED, "4")
    assert "left out by data.row (1 rows)" in caplog.text
    assert rows == [{"q": ""}, {"q": "2 + 2"}]


def test_a_row_function_gets_a_row_of_its_own_each_time():
    """It is called for the shape and for the scenario, and may take apart what it gets."""

    def last_is_target(row):
        row["messages"][-2]["content"] += "!"
        return {**row, "target": row["messages"].pop()["content"]}

    rows = [{"messages": [dict(USER), dict(ANSWER), dict(USER), dict(ANSWER)]}]
    (found,) = read_split(rows, "train", RowOptions(row=last_is_target)).scenarios
    assert [turn.content for turn in found.messages] == ["2 + 2?", "4", "2 + 2?!"]
    assert (found.target, len(rows[0]["messages"])) == ("4", 4)


def test_a_row_function_cannot_leave_out_rows_of_a_large_split(monkeypatch):
    monkeypatch.setattr(content, "LARGE_ROWS", 10)
    rows = [{"prompt": f"{n}"} for n in range(20)]
    for skipped in (3, 15):
        monkeypatch.setattr(content, "SAMPLE", 10)
        options = RowOptions(row=lambda row, n=skipped: row if row["prompt"] != f"{n}" else None)
        with pytest.raises(DataError, match=r"data\.row cannot leave out rows of a split this large: write"):
            list(read_split(rows, "train", options).scenarios)


def test_rows_of_pandas_are_read_as_those_of_a_file():
    """`to_dict("records")` of what was read from Parquet has arrays, and NA where a cell is missing."""
    pandas = pytest.importorskip("pandas")
    row = {"question": "Q?", "context": "C", "answers": {"text": np.array(["a", "b"])}, "nums": np.array([1, 2])}
    row |= {"level": pandas.NA, "seen": pandas.NaT}
    options = RowOptions(
        fields={"target": "answers.text[1]"}, prompt_template="{{ question }}{% if nums %}{{ nums }}{% endif %}"
    )
    (found,) = read_split([row], "train", options).scenarios
    assert (found.prompt, found.target) == ("Q?[1, 2]", "b")
    assert (found.columns()["level"], found.columns()["seen"]) == (None, None)


def test_a_source_has_options_of_its_own(tiny_tokenizer):
    sources = [
        {"rows": [{"nums": [1, 2], "target": 3}], "prompt_template": "Make {{ target }} of {{ nums }}."},
        {"rows": [{"q": "2 + 2?", "a": "4"}]},
    ]
    found = read_split(sources, "train", RowOptions(fields={"prompt": "q", "target": "a"})).scenarios
    assert [(s.prompt, s.target) for s in found] == [("Make 3 of [1, 2].", 3), ("2 + 2?", "4")]


# Conversations --------------------------------------------------------------------------------------------------------


def test_a_prefill_begins_the_answer_and_special_tokens_in_it_are_text(tiny_tokenizer):
    rows = [{"messages": [USER, {**ANSWER, "content": "It <|end|>"}]}, {"messages": [USER]}]
    data = set_up(rows, tiny_tokenizer, final_assistant_turn="prefill", shuffle=False)
    (prompt, plain), end = data.served("train")[1], tiny_tokenizer.convert_tokens_to_ids("<|end|>")
    assert tiny_tokenizer.decode(prompt) == ASKED + "It <|end|>"
    assert prompt.count(end) == plain.count(end)
    batches = iter(data.train_dataloader())
    assert next(batches).conversations == [[Turn("user", "2 + 2?"), Turn("assistant", "It <|end|>")]]
    assert next(batches).conversations == [[Turn("user", "2 + 2?")]]
    batch = data.served_prompts("train").batch([1, 0], [1, 0], "train", episode_index=0)
    assert [len(turns) for turns in batch.conversations] == [1, 2]
    plain_text = set_up(rows, tiny_tokenizer, final_assistant_turn="prefill", use_chat_template=False)
    assert tiny_tokenizer.decode(plain_text.served("train")[1][0]) == "2 + 2?\n\nIt <|end|>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "What is <image>?", "images": ["a"]}, "'images' holds what no model sees"),
        ({"prompt": "What?", "image": "pictures/1.PNG"}, "'image' holds what no model sees.*data.fields.image=null"),
        ({"prompt": "What?", "image_path": "1.jpg"}, "'image_path' holds"),
        ({"prompt": "What?", "video": "data:video/mp4;base64,x"}, "'video' holds"),
        ({"prompt": "What?", "picture_1": [IMAGE]}, "'picture_1' holds"),
        ({"prompt": "What?", "sound": {"array": [0.0], "sampling_rate": 1}}, "'sound' holds"),
        ({"messages": [{**USER, "images": ["a"]}]}, "message 1 holds 'images'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "holds 'image_url'"),
    ],
)
def test_a_row_with_an_image_is_not_trained_without_it(row, message):
    with pytest.raises(DataError, match=message):
        read_split([row], "train")


def test_what_is_written_in_a_cell_is_checked_as_if_it_were_a_row():
    with pytest.raises(DataError, match=r"item 1: the messages holds .ud83d, half of a character"):
        read_split([{"messages": r'[{"role": "user", "content": "\ud83d"}]'}], "train")
    bomb: list[object] = ["x"]
    for _ in range(30):
        bomb = [bomb, bomb]
    with pytest.raises(DataError, match="item 1: the b holds more than 200,000 values"):
        read_split([{"a": "x", "b": bomb}], "train", RowOptions(prompt_template="{{ a }} {{ b }}"))


def test_a_final_assistant_turn_can_be_refused():
    with pytest.raises(DataError, match=r"the last message must be the user's.*data\.final_assistant_turn=target or"):
        read_split([{"messages": [USER, ANSWER]}], "train", RowOptions(final_assistant_turn="error"))


# Targets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "target", "score"),
    [
        ("91", 91.0, 1),
        ("91", np.float64(91.0), 1),
        ("91", Decimal("91.00"), 1),
        ("9.5", 9.5, 1),
        ("true", True, 1),
        ("True", True, 1),
        ("FALSE", np.bool_(False), 1),
        ("false", True, 0),
        ("true", "True", 1),
        ("3", ["1", 3.0], 1),
        ("3", ("1", "3"), 1),
        ("3", {"1", "3"}, 1),
        ("3", np.array([1, 3]), 1),
        ("4", {"style": "rule", "ground_truth": "4"}, 1),
        ("4", {"style": "rule", "ground_truth": 4.0}, 1),
        ("3", {"text": ["3"], "answer_start": [1]}, 1),
        ("4", [USER, ANSWER], 1),
        ("1" + "0" * 300, 1e300, 1),
        ("nan", math.nan, None),
        ("nan", None, None),
        ("None", {"ground_truth": None}, None),
    ],
)
def test_a_target_means_what_it_says(answer, target, score):
    (scenario,) = read_split([{"prompt": "a", "target": target}], "train").scenarios
    for context in (scenario.columns(), {"target": target, "id": "x"}):  # also where nobody has read it before
        for reward in (ExactMatch(), Contains(require="any")):
            if score is None:
                with pytest.raises(DataError, match="is missing: add the column"):
                    reward.compute_reward([Turn("assistant", answer)], context)
            else:
                assert reward.compute_reward([Turn("assistant", answer)], context).score == score


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            {"value": "a", "aliases": []},
            r"is a mapping with value, aliases; .*data\.fields\.target=target\.value takes",
        ),
        ({}, "is a mapping with nothing"),
        (math.inf, "is inf, no finite number"),
        ([["a"]], "is a list that holds a list"),
        (["a", None], "is a list that holds a missing item"),
        (["a", math.nan], "is a list that holds a missing item"),
        (b"4", "is b'4', a bytes"),
        (1 + 2j, r"is \(1\+2j\), a complex"),
    ],
)
def test_a_target_that_cannot_be_meant_is_an_error(target, message):
    with pytest.raises(DataError, match=f"data.train item 2: the target {message}"):
        read_split([{"prompt": "a", "target": "1"}, {"prompt": "b", "target": target}], "train")
    with pytest.raises(ValueError, match=message.split(";")[0]):
        as_target(target)


def test_an_integer_column_with_a_missing_value_keeps_its_integers():
    rows = [{"prompt": "a", "target": 5.0, "id": 7.0}, {"prompt": "b", "target": math.nan, "id": math.nan}]
    found = read_split(rows, "train")
    assert [(s.id, s.target) for s in found.scenarios] == [("7", 5), ("train:2", None)]
    assert repr(found.scenarios[0].target) == "5"
    assert "1 of 2 scenarios have no target" in found.notes


def test_rows_without_labels_are_predicted_with_the_config_of_the_training(tiny_tokenizer):
    options = {"fields": {"prompt": "q", "target": "label.text"}}
    data = ScenarioDataModule(predict=[{"q": "2 + 2?"}], tokenizer=tiny_tokenizer, **options)
    data.setup("predict")
    assert data.served("predict")[0].scenarios[0].target is None
    with pytest.raises(DataError, match=r"data.fields.target names the column 'label\.text'"):
        set_up([{"q": "2 + 2?"}], tiny_tokenizer, **options)
    with pytest.raises(DataError, match=r"data.fields.prompt names the column 'q'"):
        read_split([{"p": "2 + 2?"}], "predict", RowOptions(**options))


# The command line -----------------------------------------------------------------------------------------------------

CONFIG = """
model: {policy: tiny, reward: [ExactMatch], rollout: {num_generations: 2, max_new_tokens: 2}}
trainer: {max_steps: 1, accelerator: cpu, logger: false, enable_checkpointing: false}
data: {train: rows.jsonl, batch_size: 1}
"""


@pytest.mark.parametrize(
    ("row", "flags", "told"),
    [
        (
            SHAPES["Alpaca"][0],
            [],
            r"read as alpaca: prompt from '{{ instruction }}\n\n{{ input }}', target from 'output'",
        ),
        (SHAPES["Countdown"][0], [f"--data.prompt_template={COUNTDOWN}"], "expression that equals 98."),
        (
            {"q": "2 + 2?"},
            ["--data.row=my_rows.to_scenario"],
            "first row: '<|user|>2 + 2?<|end|><|assistant|>', target 4",
        ),
    ],
)
@pytest.mark.slow
def test_doctor_shows_the_first_row_and_fit_trains_on_it(row, flags, told, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rows", raising=False)
    Path("my_rows.py").write_text("def to_scenario(row):\n    return {'prompt': row['q'], 'target': 4.0}\n")
    Path("config.yaml").write_text(CONFIG)
    jsonl(tmp_path, row)
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--config", "config.yaml", "--sample=false", *flags])
    said = capsys.readouterr().out
    assert stopped.value.code == 0, said
    assert told in said
    assert "first row: '<|user|>" in said
    assert main(["fit", "--config", "config.yaml", *flags]).trainer.global_step == 1


def test_a_config_with_shapes_is_written_and_read_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(CONFIG)
    flags = ["--data.fields.messages=null", "--data.system_template={{ a }}", "--data.row=my.f"]
    flags.append("--data.prompt_template={{ a }}\n{{ b }}")
    with pytest.raises(SystemExit):
        main(["fit", "--config", "config.yaml", *flags, "--data.format=verl", "--print_config"])
    printed = capsys.readouterr().out
    Path("printed.yaml").write_text(printed)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "printed.yaml", "--print_config"])
    again, data = (yaml.safe_load(text)["data"] for text in (capsys.readouterr().out, printed))
    assert again == data
    assert (data["fields"], data["row"], data["prompt_template"]) == ({"messages": "null"}, "my.f", "{{ a }}\n{{ b }}")
