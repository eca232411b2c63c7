"""Rows of a run's files, as JSON lines and as CSV: appended, cut back, and read, also while the run writes them.

A damaged line costs that line. No torch is imported: a report can do without.
"""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from stateset_lightning.files import append_lines, atomic_write

T = TypeVar("T")
Row = Mapping[str, Any]

SPLITS = ("train", "validation", "test")
_TOLD = 10  # numbers of damaged lines that a message lists

_log = logging.getLogger("stateset_lightning")


def append_rows(path: Path, rows: Iterable[Row]) -> int:
    """Appends rows as JSON lines, all or none, making the folder if need be; returns their size in bytes."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    append_lines(path, text)
    return len(text.encode())


def keep_rows(path: Path, fits: Callable[[Row], bool], keep: Callable[[Row], bool]) -> None:
    """Rewrites a file with some of its rows, which stay as they are; `fits` as in `read_rows`."""
    with atomic_write(path) as file:
        file.writelines(line for line, row in read_rows(path, fits) if keep(row))


def read_rows(path: Path, fits: Callable[[Row], bool]) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines of a file of JSON lines and what they hold; one that does not hold what `fits` asks for is damaged."""

    def parse(text: str) -> dict[str, Any]:
        row = json.loads(text, parse_constant=lambda _: None)  # NaN and infinity, which the page's script cannot read
        if not isinstance(row, dict) or not fits(row):
            raise ValueError("another file's row")
        return row

    return ((line, row) for _, line, row in _read_lines(path, parse))


def is_sample(row: Row) -> bool:
    """Whether it is a row of `samples.jsonl`: of the right types, where they matter to who reads it."""
    needed = {"step": int, "id": str, "completion": str, **({"episode": int} if row.get("split") == "train" else {})}
    optional = {"prompt": str, "rewards": dict, "tokens": list, "logprobs": list, "logprobs_after": list}
    return (
        row.get("split") in SPLITS
        and all(isinstance(row.get(name), kind) for name, kind in needed.items())
        and all(isinstance(row.get(name, kind()), kind) for name, kind in optional.items())
    )


def is_bad_step(row: Row) -> bool:
    """Whether it is a row of `bad_steps.jsonl`."""
    return isinstance(row.get("step"), int)


def read_metrics(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a `metrics.csv`, each with its place behind the header, from 1; none where there is no file yet.

    A row is damaged if it has not a cell for each column, or its step is no number. Cells hold no line breaks.
    """
    names: list[str] = []

    def parse(text: str) -> dict[str, str]:
        nonlocal names
        cells = next(csv.reader([text], strict=True))
        if not names:
            names = cells
        row = dict(zip(names, cells, strict=True))
        if "step" not in row or (cells is not names and not math.isfinite(float(row["step"]))):
            raise ValueError("no step")
        return row

    lines = _read_lines(path, parse) if path.exists() else iter(())
    return ((number - 1, row) for number, _, row in lines if number > 1)


def _read_lines(path: Path, parse: Callable[[str], T]) -> Iterator[tuple[int, bytes, T]]:
    """Number, bytes and meaning of each line; damaged ones, at which `parse` raises, are left out and told once.

    Lines end in "\\n" alone: other separators of Unicode may stand inside a text. A last line without it is being
    written, or was torn by a kill.
    """
    damaged = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                row = parse(line.decode())
            except (ValueError, RecursionError, csv.Error):
                damaged.append(number)
                continue
            yield number, line, row
    if damaged:
        _tell_once(f"{path}, line {', '.join(map(str, damaged[:_TOLD]))}: damaged, left out", len(damaged))


@cache
def _tell_once(told: str, count: int) -> None:
    """A file may be read several times."""
    _log.warning("%s%s", told, f" ({count} in all)" if count > _TOLD else "")
