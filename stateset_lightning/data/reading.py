"""Files -> raw rows, each with the place it came from.

JSONL, JSON, CSV and YAML in UTF-8 (a byte order mark is accepted), also packed as .gz or .zst; `tables` reads what is
no text. What a row means is not checked here. A row that cannot be read is a `Problem`, so that all bad rows of a split
are reported together; a file that cannot be read at all is a `DataError` at once. Nothing in a file is executed: no
pickle, and YAML is loaded safely.
"""

import csv
import io
import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from stateset_lightning.data.content import Content, check_file, lines, read_content, unpacked
from stateset_lightning.data.rows import BadRow, LineRows, Rows, are_rows, header_of, kind, listed, reason_of, rows_in
from stateset_lightning.errors import DataError
from stateset_lightning.files.yaml_text import load_yaml

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_SAMPLE = 2**16  # bytes of a CSV file from which its delimiter is told

TABLES = (".parquet", ".arrow", ".feather", ".xlsx")  # see `tables`

# The default of 131,072 characters a cell refuses long documents. It is the module's, and not one thread's to set.
csv.field_size_limit(2**31 - 1)

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
        raise DataError(f"{path}: unknown suffix '{path.suffix}'; known: {', '.join([*READERS, *TABLES])} (.gz, .zst)")
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
    if isinstance(content, bytes):
        _check_lines(path, _text(path, content))
    return LineRows(path, content, starts, numbers, _json_object)


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


def _read_csv(usual: str, path: Path, content: Content, split: str) -> Rows:
    """CSV, by whatever its cells are divided. Cells are text: a guess would make 7 of `007`."""
    sample = content[:_SAMPLE].decode("utf-8-sig", errors="replace")
    told = re.match(r"sep=(.)\r?\n", sample)  # Excel's
    delimiter = told[1] if told else _delimiter(sample, usual)
    starts, numbers = array("q"), array("q")

    def decoded() -> Iterator[str]:
        for start, text in lines(content):
            starts.append(start)
            yield text.decode(errors="replace")  # a row that is not UTF-8 is told when it is read

    header: list[str] = []
    line = skipped = int(told is not None)
    # Where a space follows the delimiters, it belongs to no cell, and a quote behind it is one.
    is_spaced = f"{delimiter} " in sample.splitlines()[skipped] or re.search(rf'{re.escape(delimiter)} "(?!")', sample)
    form: dict[str, Any] = {"delimiter": delimiter, "skipinitialspace": bool(is_spaced), "strict": True}
    reader = csv.reader(islice(decoded(), skipped, None), **form)
    try:
        for cells in reader:  # a quoted cell may span lines
            if cells and header:
                numbers.append(line + 1)
            elif cells:
                header = header_of(path, cells)
            line = skipped + reader.line_num
    except csv.Error as error:  # the reader cannot find the start of the next row
        raise DataError(f"{path}:{line + 1}: malformed CSV: {error}; no row after it was read") from error
    note = "" if delimiter == usual else f"{path}: its cells are divided by {_named(delimiter)}"
    return LineRows(path, content, starts, numbers, partial(_csv_row, header, form), note)


def _csv_row(header: Sequence[str], form: dict[str, Any], text: str) -> dict[str, Any]:
    cells = next(csv.reader(io.StringIO(text, newline=""), **form))
    if len(cells) != len(header):
        hint = f"; put cells that contain {_named(form['delimiter'])} in quotes" if len(cells) > len(header) else ""
        raise BadRow(f"{len(cells)} cells, but the header has {len(header)} ({listed(header)}){hint}")
    return dict(zip(header, cells, strict=True))


def _named(delimiter: str) -> str:
    return _DELIMITERS.get(delimiter, repr(delimiter))


def _delimiter(sample: str, usual: str) -> str:
    """What divides the cells: the usual one, if all rows of the start of a file then have as many cells.

    A character that seldom divides any is taken where no other one could, and each row then has as many cells.
    """
    tables = {}
    seldom = re.findall(r"[^\w\s\"'.-]", sample.partition("\n")[0])
    for delimiter in dict.fromkeys((usual, *_DELIMITERS, *seldom)):
        with suppress(csv.Error):
            rows = [*filter(None, csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter))]
            # The last row may be cut.
            tables[delimiter] = [len(row) for row in (rows[:-1] if len(sample) >= _SAMPLE // 4 else rows)[:20]]
    several = {delimiter: widths for delimiter, widths in tables.items() if widths and widths[0] > 1}
    even = [delimiter for delimiter, widths in several.items() if len(set(widths)) == 1]
    known = [delimiter for delimiter in [*even, *several] if delimiter == usual or delimiter in _DELIMITERS]
    return next(iter([*known, *even]), usual)


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
    return load_yaml(text, path, loader, len(text) if "<<" in text else None, DataError, rows="")


def _read_value(read: Callable[[Path, str], Any], path: Path, content: Content, split: str) -> Rows:
    return rows_in(read(path, _text(path, content)), str(path), split, len(content))


# How files are read, by suffix.
READERS: dict[str, Callable[[Path, Content, str], Rows]] = {".jsonl": _read_jsonl, ".ndjson": _read_jsonl}
READERS |= {".json": partial(_read_value, _read_json), ".csv": partial(_read_csv, ",")}
READERS |= {".tsv": partial(_read_csv, "\t"), **dict.fromkeys((".yaml", ".yml"), partial(_read_value, _read_yaml))}
