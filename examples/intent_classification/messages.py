"""Customer messages and their intents: reading, and a split into labelled, checkable and held-out messages."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stateset_lightning.errors import DataError
from stateset_lightning.files import atomic_write
from stateset_lightning.seeding import permutation


@dataclass(frozen=True)
class Message:
    text: str
    intent: str


@dataclass(frozen=True)
class Split:
    """Three parts without a message in common, each with every intent in the proportions of the whole."""

    labelled: list[Message]
    """Few: their intents are known, and the warm start imitates them."""
    checkable: list[Message]
    """Many: an answer to them can only be found right or wrong. What GRPO learns from."""
    held_out: list[Message]
    """Seen by neither; accuracy is measured here."""


def read_messages(file: Path) -> list[Message]:
    """The rows of a CSV file with the columns `text` and `category`.

    Raises:
        DataError: If the file is missing, lacks a column, or has a row without text or intent.
    """
    if not file.is_file():
        raise DataError(f"{file} is not there; name Banking77's train.csv, or a file like it, with --data")
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    for number, row in enumerate(rows, start=1):
        if not (row.get("text") and row.get("category")):
            raise DataError(f"{file}, row {number}: {row!r} needs a `text` and a `category`")
    return [Message(row["text"].strip(), row["category"].strip()) for row in rows]


def split_messages(messages: Sequence[Message], *, labelled: float, held_out: float, seed: int = 0) -> Split:
    """Splits every intent by itself, in an order that depends on `seed` alone. `labelled` and `held_out` are shares of
    all messages.
    """
    by_intent = defaultdict(list)
    for message in messages:
        by_intent[message.intent].append(message)
    split = Split([], [], [])
    for intent, group in sorted(by_intent.items()):
        group = [group[i] for i in permutation(seed, f"intent {intent}", size=len(group))]
        first, second = round(len(group) * held_out), round(len(group) * (held_out + labelled))
        split.held_out.extend(group[:first])
        split.labelled.extend(group[first:second])
        split.checkable.extend(group[second:])
    return split


def write_scenarios(messages: Sequence[Message], file: Path) -> None:
    """Rows that `data.train` and `data.validation` of a config read."""
    # Two seeds may run at a time, and the second of one process writes what the first has read.
    with atomic_write(file, over_input=True) as opened:
        opened.writelines(
            json.dumps({"prompt": message.text, "target": message.intent}).encode() + b"\n" for message in messages
        )
