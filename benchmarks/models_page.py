"""The page docs/models.md, from the results of `check_models.py`."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HEAD = """# Models

What of each class of causal language model works, by building the smallest model of it and comparing it with
transformers' own forward and `generate`. This page is written by `make check-models`; last on {date}, with {versions}.

- **scoring**: how log-probs are computed: *packed*, each prompt once per group; *padded*, a row per completion; or
  *one-by-one*, a forward per completion, as the model's rows depend on each other or on what pads them.
- **sampling by**: *batch*, the fast engine; *generate*, transformers' own decoding, a prompt at a time; or *no cache*,
  a forward of the whole text per token, as the model's own cache gives other log-probs than its forward.
- **log-probs**: those of scoring equal the model's own forward within 1e-5 nats (float32; up to twice the model's own
  float error), with prompts of {lengths} tokens: beyond windows (made {window} tokens long), long tables of rotary
  frequencies (from {long} tokens) and the length from which a group shares its prompt while sampling (256).
- **tokens**: greedy tokens equal those of `generate`, and their log-probs the model's own, at the same lengths.
- **training**: two steps of `Trainer.fit`. **resume**: the second again from the first one's checkpoint, bit by bit.
- **bf16**: two steps in bfloat16 (`bf16-true`); the number is the difference between sampling and scoring as a share of
  the most that the run allows.
- **LoRA**: an adapter gets gradients, and sampling with it merged agrees with scoring.
- **TRL**: whether its `GRPOTrainer` makes two steps of the same model; nothing compares its log-probs with the model's.

`stateset-lightning doctor` shows the row of the model in a config. A model that is not listed, or one with code of its
own, is probed when it is loaded, like every other.

"""
COLUMNS = {"scoring": "log-probs", "greedy": "tokens", "train": "training", "resume": "resume", "half": "bf16"}
COLUMNS |= {"lora": "LoRA", "trl": "TRL"}
SHORT = {"": "not tried", "-": "-", "ok": "yes"}


def write_page(file: Path, rows: dict[str, dict[str, Any]], lengths: list[int], window: int, long: int) -> None:
    """Writes the page anew.

    Args:
        file: Where.
        rows: Results by model.
        lengths: Of the prompts of a check.
        window: Tokens of the small models' sliding windows.
        long: Tokens from which they take other rotary frequencies.
    """
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch", "trl"))
    named = f"{', '.join(map(str, lengths[:-1]))} and {lengths[-1]}"
    head = HEAD.format(date=datetime.now(UTC).date(), versions=versions, lengths=named, window=window, long=long)
    lines = [head.rstrip("\n"), "", *_tables(rows)]
    file.write_text("\n".join(lines) + "\n")


def _tables(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    built = {name: row for name, row in sorted(rows.items()) if row["states"].get("build") == "ok"}
    right = {name: row for name, row in built.items() if not _reasons(row)}
    yield f"## Right: {len(right)}"
    yield ""
    yield "| model type | class | layers | scoring | sampling by | bf16 | TRL |"
    yield "|---|---|---|---|---|---|---|"
    for name, row in right.items():
        cells = [
            name,
            row["class"],
            _layers(row),
            *_paths(row),
            row.get("bf16", "-"),
            _short(row["states"].get("trl", "")),
        ]
        yield f"| {' | '.join(cells)} |"
    others = {name: row for name, row in built.items() if name not in right}
    yield ""
    yield f"## Refused or wrong: {len(others)}"
    yield ""
    yield f"| model type | layers | scoring | sampling by | {' | '.join(COLUMNS.values())} | why |"
    yield f"|---|---|---|---|{'---|' * len(COLUMNS)}---|"
    for name, row in others.items():
        cells = [name, _layers(row), *_paths(row), *(_short(row["states"].get(check, "")) for check in COLUMNS)]
        yield f"| {' | '.join(cells)} | {_reasons(row)[0]} |"
    yield ""
    exceptions = [name for name, row in built.items() if only_trl_trains(row)]
    yield f"TRL trains, we do not: {', '.join(exceptions) or 'none'}."
    yield ""
    yield from _list("Not built", "What their classes need is missing, or not known to the script:", "not built", rows)
    yield ""
    yield from _list("Not tried yet", "By the run that wrote this page:", None, rows)


def _list(title: str, words: str, state: str | None, rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The models whose building ended in this state; None: that have not been tried."""
    told = {name: row["states"].get("build") for name, row in sorted(rows.items())}
    names = [name for name, said in told.items() if (said and said.split(":")[0]) == state]
    yield f"## {title}: {len(names)}"
    if names:
        yield ""
        yield words
        yield ""
    for name in names:
        yield f"- {name}: {_escaped(told[name] or 'not tried', 120)}"


def only_trl_trains(row: dict[str, Any]) -> bool:
    """Whether TRL makes two steps of a model that we do not train."""
    return row["states"].get("trl") == "ok" and row["states"].get("train") != "ok"


def _paths(row: dict[str, Any]) -> list[str]:
    """How log-probs and how tokens are computed."""
    return [row.get("scoring", "-"), row.get("sampling", "-")]


def _short(state: str) -> str:
    return SHORT.get(state, f"**{state.split(':')[0]}**")


def _layers(row: dict[str, Any]) -> str:
    return ", ".join(kind.replace("_attention", "") for kind in row["layers"]) or "full"


def _reasons(row: dict[str, Any]) -> list[str]:
    """What the checks of a model say, the first cause first; TRL's aside."""
    states = [state for check, state in row["states"].items() if check != "trl"]
    return [_escaped(state, 55) for state in states if state not in SHORT]


def _escaped(text: str, most: int) -> str:
    """Inside a table, on one line."""
    cut = text if len(text) <= most else text[: most - 3] + "..."
    return cut.replace("|", "/").replace("`", "'").replace("<", "(").replace(">", ")").replace("](", "] (")
