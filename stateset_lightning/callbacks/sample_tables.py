"""Completions in loggers that can show them: a table in W&B, text in TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

COLUMNS = (
    "step",
    "episode",
    "id",
    "prompt",
    "target",
    "completion",
    "reward",
    "advantage",
    "finish_reason",
    "num_tokens",
)


def log_samples(trainer: Trainer, split: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Shows rows of `samples.jsonl` as `samples/<split>`; in W&B as a table of its own for each call, which nothing
    keeps in memory.
    """
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if isinstance(logger, WandbLogger):
            columns, data = sample_table(rows)
            logger.log_table(f"samples/{split}", columns=columns, data=data, step=trainer.global_step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(f"samples/{split}", sample_text(rows), trainer.global_step)


def sample_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and data: those of `COLUMNS` that any row has, then each reward."""
    columns = [name for name in COLUMNS if any(name in row for row in rows)]
    rewards = list(dict.fromkeys(name for row in rows for name in row["rewards"]))
    # As text, since the targets of a data set need not be of one type, and a column must be.
    cells = [{**row, "target": None if row.get("target") is None else str(row["target"])} for row in rows]
    data = [[row.get(name) for name in columns] + [row["rewards"].get(name) for name in rewards] for row in cells]
    return columns + [f"reward/{name}" for name in rewards], data


def sample_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, in which prompts and completions are code: a model's own links and images stay text."""
    parts: list[str] = []
    prompt = None
    for row in rows:
        if row["prompt"] != prompt:
            prompt = row["prompt"]
            parts += ["**prompt**", _code(prompt)]
        numbers = {"reward": row["reward"], **row["rewards"], "advantage": row.get("advantage")}
        said = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items() if value is not None)
        parts += [f"{said or 'failed'}, {row['num_tokens']} tokens, {row['finish_reason']}", _code(row["completion"])]
    return "\n\n".join(parts)


def _code(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])
