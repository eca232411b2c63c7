"""Raw rows, what is wrong with them, and what holds them: lists, and texts with a row on each line.

A row that cannot be read is a `Problem`, so that all bad rows of a split are reported together.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from stateset_lightning.data.content import Content, digest
from stateset_lightning.errors import DataError

MAX_PROBLEMS_SHOWN = 20

# What the rows of a split are called where one file has those of several.
VALIDATION_NAMES = ["validation", "valid", "val", "dev"]
SPLIT_NAMES = {"train": ["train"], "validation": VALIDATION_NAMES, "test": ["test"], "predict": ["predict", "test"]}
_WRAPPERS = ("data", "rows", "examples", "instances", "records")


class BadRow(ValueError):
    """Why a row cannot be read, or be a scenario, in words for the user; becomes a `Problem` with the row's place."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row before it is checked. `place` says where it stands, `number` counts the file's rows from 1."""

    columns: Mapping[str, Any]
    place: str
    number: int


@dataclass(frozen=True, slots=True)
class Problem:
    """Why the row at `place` cannot be used."""

    place: str
    reason: str


@dataclass
class ListRows:
    """The rows of a sequence of mappings, which `origin` names; each can be read by itself, as those of `LineRows`.

    `num_bytes` is the size of what they are read from, as far as it is known; `note` as that of `LineRows`.
    """

    items: Sequence[Any]
    origin: str
    num_bytes: int = 0
    note: str = ""

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> RawRow | Problem:
        return self.row(index + 1, self.items[index])

    def __iter__(self) -> Iterator[RawRow | Problem]:
        return (self.row(number, item) for number, item in enumerate(self.items, start=1))

    def row(self, number: int, item: Any) -> RawRow | Problem:
        place = f"{self.origin} item {number}"
        if not isinstance(item, Mapping):
            return Problem(place, f"a row must be a mapping of columns, not {kind(item)}")
        if unnamed := [name for name in item if not isinstance(name, str)]:
            return Problem(place, f"column names must be strings, not {unnamed[0]!r}; put it in quotes")
        return RawRow(item, place, number)

    def digest(self) -> str:
        """Of the number of rows and a thousand of them, evenly spread: it is for lists that take long to read."""
        spread = np.linspace(0, len(self) - 1, min(len(self), 1000), dtype=np.int64).tolist()
        return sha256(repr([len(self), *(self.items[i] for i in spread)]).encode(errors="replace")).hexdigest()[:16]


@dataclass
class LineRows(Sequence[RawRow | Problem]):
    """The rows of a text of which each begins on a line of its own.

    Args:
        origin: The file.
        content: Its bytes.
        starts: Where each line begins.
        lines: The line that each row begins on, from 1.
        parse: Makes columns of a row's text; a ValueError says why it cannot.
        note: What the user should know about how the file is read.
    """

    origin: Path
    content: Content
    starts: Sequence[int]
    lines: Sequence[int]
    parse: Callable[[str], dict[str, Any]]
    note: str = ""

    @property
    def num_bytes(self) -> int:
        return len(self.content)

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: Any) -> Any:
        place = f"{self.origin}:{self.lines[index]}"
        end = self.starts[self.lines[index + 1] - 1] if index + 1 < len(self) else len(self.content)
        row = self.content[self.starts[self.lines[index] - 1] : end]
        try:
            return RawRow(self.parse(row.decode()), place, index + 1)
        except UnicodeDecodeError as error:
            return Problem(place, f"not valid UTF-8 (byte 0x{row[error.start]:02x}); save the file as UTF-8")
        except (ValueError, RecursionError) as error:
            return Problem(place, reason_of(error))

    def digest(self) -> str:
        return digest(self.content)


Rows = ListRows | LineRows


def reason_of(error: Exception) -> str:
    if isinstance(error, BadRow):
        return str(error)
    if isinstance(error, json.JSONDecodeError):
        return f"malformed JSON at column {error.colno}: {error.msg}"
    # An integer of thousands of digits, or lists nested thousands deep.
    return f"malformed JSON: {str(error).partition(';')[0]}"


def raise_problems(key: str, problems: Sequence[Problem]) -> None:
    """Raises a `DataError` that lists the problems of the split `key` (the first 20, and how many more), if any."""
    if not problems:
        return
    shown = [f"  {problem.place}: {problem.reason}" for problem in problems[:MAX_PROBLEMS_SHOWN]]
    if len(problems) > MAX_PROBLEMS_SHOWN:
        shown.append(f"  ... and {len(problems) - MAX_PROBLEMS_SHOWN} more")
    count = f"{len(problems)} row{'s' if len(problems) > 1 else ''}"
    raise DataError("\n".join([f"{key}: {count} cannot be used; correct or remove:", *shown]))


def kind(value: object) -> str:
    """What a value read from a file is, in words that need no Python."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number"
    names = {dict: "a mapping", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def header_of(path: Path, cells: Iterable[Any]) -> list[str]:
    """The names of columns, as the first row of a table says; one without a name is called by its number.

    Raises:
        DataError: If two have the same.
    """
    names = ["" if cell is None else str(cell).strip() for cell in cells]
    header = [name or f"column {number}" for number, name in enumerate(names, start=1)]
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise DataError(f"{path}: the header names the column '{twice[0]}' twice; rename one of them")
    return header


def listed(names: Iterable[str]) -> str:
    """The names of columns, of which a file may have thousands."""
    first = list(islice(names, MAX_PROBLEMS_SHOWN + 1))
    return ", ".join([*first[:MAX_PROBLEMS_SHOWN], *(["..."] if len(first) > MAX_PROBLEMS_SHOWN else [])]) or "none"


def rows_in(value: Any, origin: str, split: str, num_bytes: int = 0) -> ListRows:
    """The list of rows that a value is, or holds; it was read from so many bytes.

    Raises:
        DataError: If there is none, or none for this split.
    """
    found = unwrapped(value, origin, split)
    if isinstance(found, list):
        return ListRows(found, origin, num_bytes)
    keys = f" with the keys {', '.join(map(str, list(value)[:5]))}" if isinstance(value, Mapping) else ""
    raise DataError(f"{origin}: must hold a list of rows, not {kind(value)}{keys}; put the rows in a list")


def split_in(names: Collection[Any], origin: str, split: str) -> str:
    """What rows of several splits, of these names, call those of this split.

    Raises:
        DataError: If there are none.
    """
    if found := [name for name in SPLIT_NAMES[split] if name in names]:
        return found[0]
    raise DataError(f"{origin}: has the splits {listed(map(str, names))}, and none for data.{split}; give a file of it")


def is_table(value: Any) -> bool:
    """Whether a value is a data frame of pandas, an Arrow table, a data set of the library `datasets`, or a stream."""
    return hasattr(value, "iloc") or hasattr(value, "column_names") or is_stream(value)


def is_stream(value: Any) -> bool:
    return hasattr(value, "__iter__") and not hasattr(value, "__len__")


def is_split_map(value: Mapping[Any, Any]) -> bool:
    """Whether a mapping has lists of rows, and nothing else, under the names of splits."""
    splits = [_under_key(value[name]) for name in {*chain(*SPLIT_NAMES.values())} if name in value]
    return bool(splits) and all(_holds_rows(each) or is_table(each) for each in splits)


def _holds_rows(value: Any) -> bool:
    """Whether a value is a list of mappings, as far as its first item tells."""
    return isinstance(value, list) and all(isinstance(item, dict) for item in value[:1])


def _are_lists(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, list) for item in value)


def are_rows(value: Any) -> bool:
    """Whether a value is a list of rows, or a mapping around such, and no row itself."""
    return _holds_rows(_under_key(value)) or (isinstance(value, Mapping) and is_split_map(value))


def _under_key(value: Any) -> Any:
    """The list of rows under a usual key of a mapping that is no row itself; else the value."""
    if not isinstance(value, Mapping) or {"prompt", "messages"} & {*value}:
        return value
    return next((value[key] for key in _WRAPPERS if value.get(key) and _holds_rows(value[key])), value)


def unwrapped(value: Any, origin: str, split: str) -> Any:
    """The rows in a mapping: of a split, under a usual key, or as columns. What has none is returned as it is.

    Raises:
        DataError: If it has splits, and not this one.
    """
    if not isinstance(value, Mapping):
        return value
    if is_split_map(value):
        return _under_key(value[split_in(value, origin, split)])
    if (under := _under_key(value)) is not value:
        return under
    if isinstance(value.get("columns"), list) and _are_lists(rows := value.get("data")):  # pandas' orient="split"
        return [dict(zip(value["columns"], cells, strict=True)) for cells in rows]
    columns = list(value.values())
    if columns and all(isinstance(column, Mapping) and column for column in columns):  # "index" and "columns"
        if all(name.isdecimal() for name in map(str, value)):
            return columns
        if all(name.isdecimal() for column in columns for name in map(str, column)):
            columns = [list(column.values()) for column in columns]
    are_lists = all(isinstance(column, list) for column in columns) and not all(map(_holds_rows, columns))
    if are_lists and len({len(column) for column in columns}) == 1:
        return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    return value
