"""Files -> raw rows, each with the place it came from.

JSONL, JSON lists, CSV and YAML lists, in UTF-8 (a byte order mark is accepted). What a row means is not checked here.
A row that cannot be read is a `Problem`, so that all bad rows of a split are reported together; a file that cannot be
read at all is a `DataError` at once. Nothing in a file is executed: no pickle, and YAML is loaded safely.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from stateset_lightning.errors import DataError
from stateset_lightning.files.yaml_text import load_yaml

MAX_PROBLEMS_SHOWN = 20


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row before it is checked. `place` says where it stands, `number` counts the file's rows from 1."""

    columns: dict[str, Any]
    place: str
    number: int


@dataclass(frozen=True, slots=True)
class Problem:
    """Why the row at `place` cannot be used."""

    place: str
    reason: str


Readings = Iterator[RawRow | Problem]


def read_file(path: Path) -> tuple[list[RawRow], list[Problem]]:
    """All rows of a file whose suffix is a key of `READERS`, and the problems of those that cannot be read.

    Raises:
        DataError: If the file as a whole cannot be read: missing, not UTF-8, empty, without rows, malformed beyond one
            row, or of an unknown kind.
    """
    check_file(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: unknown suffix '{path.suffix}'; scenarios are read from {', '.join([*READERS, '.parquet'])}"
        )
    rows, problems = separate(reader(path, _read_text(path)))
    if not rows and not problems:
        raise DataError(f"{path}: the file has no rows; give at least one scenario")
    return rows, problems


def check_file(path: Path) -> None:
    """What a path names is a file, which ends.

    Raises:
        DataError: If it is a directory, or a device, a pipe or a socket.
    """
    if path.is_dir():
        raise DataError(f"{path} is a directory; give a file, or a glob such as '{path}/*.jsonl'")
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is a device, a pipe or a socket, which may never end; give a file")


def separate(readings: Iterable[RawRow | Problem]) -> tuple[list[RawRow], list[Problem]]:
    """The rows, and the problems of those that cannot be read."""
    readings = list(readings)
    return [r for r in readings if isinstance(r, RawRow)], [r for r in readings if isinstance(r, Problem)]


def raise_problems(key: str, problems: Sequence[Problem]) -> None:
    """Raises a `DataError` that lists the problems of the split `key` (the first 20, and how many more), if any."""
    if not problems:
        return
    shown = [f"  {problem.place}: {problem.reason}" for problem in problems[:MAX_PROBLEMS_SHOWN]]
    if len(problems) > MAX_PROBLEMS_SHOWN:
        shown.append(f"  ... and {len(problems) - MAX_PROBLEMS_SHOWN} more")
    count = f"{len(problems)} row{'s' if len(problems) > 1 else ''}"
    raise DataError("\n".join([f"{key}: {count} cannot be used; correct or remove:", *shown]))


def rows_of(items: Sequence[Any], prefix: str) -> Readings:
    """Raw rows of a list of mappings; `prefix` names the list."""
    for number, item in enumerate(items, start=1):
        place = f"{prefix} item {number}"
        if not isinstance(item, dict):
            yield Problem(place, f"a row must be a mapping of columns, not {kind(item)}")
        elif unnamed := [name for name in item if not isinstance(name, str)]:
            yield Problem(place, f"column names must be strings, not {unnamed[0]!r}; put it in quotes")
        else:
            yield RawRow(item, place, number)


def kind(value: object) -> str:
    """What a value read from a file is, in words that need no Python."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number"
    names = {dict: "a mapping", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def listed(names: Iterable[str]) -> str:
    """The names of columns, of which a file may have thousands."""
    first = list(islice(names, MAX_PROBLEMS_SHOWN + 1))
    return ", ".join([*first[:MAX_PROBLEMS_SHOWN], *(["..."] if len(first) > MAX_PROBLEMS_SHOWN else [])]) or "none"


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: not valid UTF-8 (byte 0x{error.object[error.start]:02x}); save the file as UTF-8"
        ) from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty; give at least one scenario")
    return text


def _read_jsonl(path: Path, text: str) -> Readings:
    number = 0
    # Not splitlines(): it also splits at U+2028 and other characters that may stand inside a JSON string.
    for line_number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        number += 1
        place = f"{path}:{line_number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Problem(place, _json_reason(error))
            continue
        if isinstance(row, dict):
            yield RawRow(row, place, number)
        else:
            yield Problem(place, f"a row must be a JSON object, not {kind(row)}")


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"malformed JSON at column {error.colno}: {error.msg}"
    # An integer of thousands of digits, or lists nested thousands deep.
    return f"malformed JSON: {str(error).partition(';')[0]}"


def _read_json(path: Path, text: str) -> Readings:
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        place = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else path
        hint = "; for one JSON object per line, name the file .jsonl" if "Extra data" in str(error) else ""
        raise DataError(f"{place}: {_json_reason(error)}{hint}") from error
    return _rows_of_list(path, items)


def _read_yaml(path: Path, text: str) -> Readings:
    # The C loader is ten times as fast and as safe, but not in every build of PyYAML.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    # Merging (<<) writes aliases out. Others are looked at row by row.
    most = len(text) if "<<" in text else None
    return _rows_of_list(path, load_yaml(text, path, loader, most, DataError, rows=""))


def _rows_of_list(path: Path, items: object) -> Readings:
    if not isinstance(items, list):
        keys = f" with the keys {', '.join(map(str, list(items)[:5]))}" if isinstance(items, dict) else ""
        raise DataError(f"{path}: must hold a list of rows, not {kind(items)}{keys}")
    return rows_of(items, str(path))


def _read_csv(path: Path, text: str) -> Readings:
    # The default limit of 131,072 characters a cell refuses long documents. It is global, hence put back.
    limit = csv.field_size_limit(max(len(text) + 1, csv.field_size_limit()))
    try:
        # All at once: a generator could be left half-way with the limit still changed.
        return iter(list(_csv_rows(path, text)))
    finally:
        csv.field_size_limit(limit)


def _csv_rows(path: Path, text: str) -> Readings:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    number = last_line = 0
    try:
        header = next(filter(None, reader))  # a file is not blank
        name, times = Counter(header).most_common(1)[0]
        if times > 1:
            raise DataError(f"{path}: the header names the column '{name}' twice; rename one of them")
        last_line = reader.line_num
        for cells in reader:
            # A quoted cell may span lines: the row starts after the last one's end, and the reader is at its end.
            place, last_line = f"{path}:{last_line + 1}", reader.line_num
            if not cells:  # a blank line
                continue
            number += 1
            if len(cells) == len(header):
                yield RawRow(dict(zip(header, cells, strict=True)), place, number)
            else:
                hint = "; put cells that contain commas in quotes" if len(cells) > len(header) else ""
                yield Problem(place, f"{len(cells)} cells, but the header has {len(header)} ({listed(header)}){hint}")
    except csv.Error as error:  # the reader cannot find the start of the next row
        yield Problem(f"{path}:{last_line + 1}", f"malformed CSV: {error}; no row after it was read")


# How files are read, by suffix.
READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".yaml": _read_yaml, ".yml": _read_yaml}
