"""The shapes that people's rows have: what becomes prompt, target and system turn, from the file to the tokens."""

import csv
import json
import logging
import math
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from module_runs import fit, make_module

from stateset_lightning import RewardFunction, RolloutConfig, ScenarioDataModule
from stateset_lightning.cli.main import main
from stateset_lightning.data import RowOptions, read_split
from stateset_lightning.errors import ConfigError, DataError, UserError
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
