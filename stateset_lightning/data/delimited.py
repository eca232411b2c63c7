"""CSV, by whatever its cells are divided. Cells are text: a guess would make 7 of `007`."""

import csv
import io
import re
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from stateset_lightning.data.content import Content, lines
from stateset_lightning.data.rows import BadRow, LineRows, Rows, header_of, listed
from stateset_lightning.errors import DataError

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_SAMPLE = 2**16  # bytes of a CSV file from which its delimiter is told


def read_csv(path: Path, content: Content, usual: str = ",") -> Rows:
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
    reader = csv.reader(islice(decoded(), skipped, None), delimiter=delimiter, strict=True)
    try:
        with _long_cells(len(content)):
            for cells in reader:  # a quoted cell may span lines
                if cells and header:
                    numbers.append(line + 1)
                elif cells:
                    header = header_of(path, cells)
                line = skipped + reader.line_num
    except csv.Error as error:  # the reader cannot find the start of the next row
        raise DataError(f"{path}:{line + 1}: malformed CSV: {error}; no row after it was read") from error
    note = "" if delimiter == usual else f"{path}: its cells are divided by {_named(delimiter)}"
    return LineRows(path, content, starts, numbers, partial(_csv_row, header, delimiter), note)


def _csv_row(header: Sequence[str], delimiter: str, text: str) -> dict[str, Any]:
    with _long_cells(len(text)):
        cells = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    if len(cells) != len(header):
        hint = f"; put cells that contain {_named(delimiter)} in quotes" if len(cells) > len(header) else ""
        raise BadRow(f"{len(cells)} cells, but the header has {len(header)} ({listed(header)}){hint}")
    return dict(zip(header, cells, strict=True))


def _named(delimiter: str) -> str:
    return _DELIMITERS.get(delimiter, repr(delimiter))


@contextmanager
def _long_cells(size: int) -> Iterator[None]:
    """The default limit of 131,072 characters a cell refuses long documents. It is global, hence put back."""
    limit = csv.field_size_limit(max(size + 1, csv.field_size_limit()))
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _delimiter(sample: str, usual: str) -> str:
    """What divides the cells: the usual one, if all rows of the start of a file then have as many cells."""
    tables = {}
    for delimiter in (usual, *_DELIMITERS):
        try:
            rows = [*filter(None, csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter))]
        except csv.Error:
            continue
        # The last row may be cut.
        tables[delimiter] = [len(row) for row in (rows[:-1] if len(sample) >= _SAMPLE // 4 else rows)[:20]]
    several = {delimiter: widths for delimiter, widths in tables.items() if widths and widths[0] > 1}
    even = [delimiter for delimiter, widths in several.items() if len(set(widths)) == 1]
    return next(iter([*even, *several]), usual)
