"""Files -> raw rows, each with the place it came from.

JSONL, JSON, CSV and YAML in UTF-8 (a byte order mark is accepted), also packed as .gz or .zst; `tables` reads what is
no text. What a row means is not checked here. A row that cannot be read is a `Problem`, so that all bad rows of a split
are reported together; a file that cannot be read at all is a `DataError` at once. Nothing in a file is executed: no
pickle, and YAML is loaded safely.
"""

import json
from array import array
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from stateset_lightning.data.content import Content, check_file, lines, read_content, unpacked
from stateset_lightning.data.delimited import read_csv
from stateset_lightning.data.rows import BadRow, LineRows, ListRows, Problem, Rows, are_rows, kind, reason_of, rows_in
from stateset_lightning.errors import DataError
from stateset_lightning.files.yaml_text import load_yaml

TABLES = (".parquet", ".arrow", ".feather", ".xlsx")  # see `tables`

_ONE_LINE = "an object has several lines; write each on one, for example with jq -c . FILE > rows.jsonl"


def read_file(path: Path, split: str = "train") -> Rows:
    """The rows of a file whose suffix is a key of `READERS`, perhaps with one of `PACKED` behind it.

    Args:
        path: The file.
        split: Which rows, where the file has those of several splits.

    Raises:
        DataError: If the file as a whole cannot be read: missing, not UTF-8, empty, malformed beyond one row, or of an
            unknown kind.
    """
    check_file(path)
    suffix = unpacked(path).suffix.lower()
    if suffix not in READERS:
        known = ", ".join([*READERS, *TABLES])
        raise DataError(
            f"{path}: unknown suffix '{path.suffix}'; scenarios are read from {known} (texts also .gz, .zst)"
        )
    content = read_content(path)
    # In a large file, rows that are not UTF-8 are refused when they are read.
    if isinstance(content, bytes) and not _text(path, content).strip():
        raise DataError(f"{path}: the file is empty; give at least one scenario")
    return READERS[suffix](path, content, split)


def _text(path: Path, content: Content) -> str:
    whole = content[: len(content)]
    try:
        return whole.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place, byte = whole[: error.start].count(b"\n") + 1, whole[error.start]
        raise DataError(f"{path}:{place}: not valid UTF-8 (byte 0x{byte:02x}); save the file as UTF-8") from error


def _read_jsonl(path: Path, content: Content, split: str) -> Rows:
    starts, numbers = array("q"), array("q")
    for number, (start, line) in enumerate(lines(content), start=1):
        starts.append(start)
        if line.decode(errors="replace").strip():
            numbers.append(number)
    rows = LineRows(path, content, starts, numbers, _json_object)
    if isinstance(content, bytes) and (len(rows) == 1 or isinstance(rows[0], Problem)):
        _check_lines(path, _text(path, content))
    return rows


def _json_object(text: str) -> dict[str, Any]:
    row = json.loads(text.partition("\n")[0], object_pairs_hook=_without_repeats)  # without blank lines behind it
    if not isinstance(row, dict):
        raise BadRow(f"a row must be a JSON object, not {kind(row)}")
    return row


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise BadRow(f"the key {name!r:.40} stands twice in {found!r:.60}; leave one of them out")
    return found


def _check_lines(path: Path, text: str) -> None:
    """The text is no JSON list, or object of several lines, that should have another name or form."""
    text = text.lstrip()
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return  # reported with the rows
    if are_rows(value) and not text[end:].strip():
        raise DataError(f"{path}: holds one JSON value, {kind(value)}, not an object on each line; name the file .json")
    if "\n" in text[:end]:
        raise DataError(f"{path}: {_ONE_LINE}")


def _read_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        place, hint = str(path), ""
        if isinstance(error, json.JSONDecodeError):
            place = f"{path}:{error.lineno}"
            if error.msg == "Extra data":
                is_long = "\n" in text[: error.pos].strip()
                hint = f"; {_ONE_LINE if is_long else 'for one JSON object per line, name the file .jsonl'}"
        raise DataError(f"{place}: {reason_of(error)}{hint}") from error


def _read_yaml(path: Path, text: str) -> Any:
    # The C loader is ten times as fast and as safe, but not in every build of PyYAML.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    # Merging (<<) writes aliases out. Others are looked at row by row.
    most = len(text) if "<<" in text else None
    return load_yaml(text, path, loader, most, DataError, rows="")


def _read_value(read: Callable[[Path, str], Any], path: Path, content: Content, split: str) -> Rows:
    return ListRows(rows_in(read(path, _text(path, content)), str(path), split), str(path), len(content))


# How files are read, by suffix.
READERS: dict[str, Callable[[Path, Content, str], Rows]] = {
    **dict.fromkeys((".jsonl", ".ndjson"), _read_jsonl),
    ".json": partial(_read_value, _read_json),
    ".csv": lambda path, content, split: read_csv(path, content),
    ".tsv": lambda path, content, split: read_csv(path, content, "\t"),
    **dict.fromkeys((".yaml", ".yml"), partial(_read_value, _read_yaml)),
}
