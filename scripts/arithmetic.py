"""Arithmetic questions: the text that the bundled model is taught, and the scenarios of the demo.

    python scripts/arithmetic.py examples/arithmetic     # writes the demo's train.jsonl and validation.jsonl

Every question belongs to one of three splits for good: `pretrain` teaches the bundled model, `train` is what the demo
learns from by reward, `validation` is seen by neither.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from stateset_lightning.seeding import permutation

MAX_OPERAND = 99
Split = Literal["pretrain", "train", "validation"]
SPLIT_SIZES: dict[Split, int] = {"validation": 256, "train": 2048}

Question = tuple[int, str, int]


def all_questions() -> Iterator[Question]:
    """Every sum, and every difference that is not negative, of two numbers from 0 to 99."""
    for a in range(MAX_OPERAND + 1):
        for b in range(MAX_OPERAND + 1):
            yield a, "+", b
            if a >= b:
                yield a, "-", b


def split_questions(split: Split) -> list[Question]:
    """The questions of a split: a fixed shuffle of all, cut in three."""
    questions = list(all_questions())
    order = permutation(0, "arithmetic", size=len(questions))
    ends = np.cumsum([0, *SPLIT_SIZES.values(), len(questions)])
    index = [*SPLIT_SIZES, "pretrain"].index(split)
    return [questions[i] for i in order[ends[index] : ends[index + 1]]]


def prompt_and_answer(question: Question) -> tuple[str, str]:
    a, operator, b = question
    return f"What is {a} {operator} {b}?", str(a + b if operator == "+" else a - b)


def careless_answer(question: Question, keep_hundreds: bool = False) -> str:
    """The answer of somebody who never carries and always takes the smaller digit from the larger.

    It is right where neither matters. These are two of the most frequent mistakes of learners (Brown and Burton,
    "Diagnostic models for procedural bugs in basic mathematical skills", Cognitive Science 2, 1978). Unless
    `keep_hundreds`, nothing is carried into the hundreds either.
    """
    a, operator, b = question
    if operator == "-":
        return str((a // 10 - b // 10) * 10 + abs(a % 10 - b % 10))
    tens = a // 10 + b // 10
    return str((tens if keep_hundreds else tens % 10) * 10 + (a % 10 + b % 10) % 10)


def write_scenarios(folder: Path) -> None:
    """Writes `train.jsonl` and `validation.jsonl`, one scenario a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLIT_SIZES:
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for question in split_questions(split):
                prompt, target = prompt_and_answer(question)
                topic = "addition" if question[1] == "+" else "subtraction"
                file.write(json.dumps({"prompt": prompt, "target": target, "topic": topic}) + "\n")


if __name__ == "__main__":
    write_scenarios(Path(sys.argv[1]))
