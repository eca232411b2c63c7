"""Tables -> raw rows: Parquet, Arrow and Feather files, Excel sheets, and what Python has read already.

Arrow reads them without a cache: what is replaced is read anew. Rows are made when they are asked for.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

from stateset_lightning.data import content
from stateset_lightning.data.rows import ListRows, header_of, is_stream, is_table, rows_in, split_in, unwrapped
from stateset_lightning.data.stream import Stream
from stateset_lightning.errors import ConfigError, DataError, UserError, imported, told_as
from stateset_lightning.types import of_numpy

if TYPE_CHECKING:  # it takes a tenth of a second, and most files are texts
    import pyarrow

_BATCH = 1000  # rows
_OF_SPLITS, _STATE = "dataset_dict.json", "state.json"  # files that `datasets` writes


class ArrowRows(Sequence[dict[str, Any]]):
    """The rows of an Arrow table as mappings; missing cells are None, integers stay integers beside them.

    Args:
        table: In memory, or mapped from files.
        origin: What messages call it.
        files: These; they must not change meanwhile.
    """

    def __init__(self, table: "pyarrow.Table", origin: str, files: Sequence[content.LargeFile] = ()) -> None:
        self._table, self._origin, self._files = table, origin, files
        self.num_bytes = int(table.nbytes)
        types = {field.name: getattr(field.type, "value_type", field.type) for field in table.schema}
        # Of floats, and of lists of them, that are too short for what Python makes of them.
        self._short = {n: kind.to_pandas_dtype() for n, kind in types.items() if str(kind) in ("float", "halffloat")}

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: Any) -> Any:
        for file in self._files:
            file.check()
        return self._mappings(self._table.slice(index, 1))[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._table.to_batches(_BATCH):
            yield from self._mappings(batch)

    def _mappings(self, part: Any) -> list[dict[str, Any]]:
        # Errors are of Arrow, and of text that is no UTF-8, of which it makes none itself.
        with told_as(
            DataError, f"{self._origin}: a cell cannot be read (", ValueError, after="); write the table again"
        ):
            part.validate(full=True)  # offsets of a damaged file point anywhere: reading them would end the process
            rows: list[dict[str, Any]] = part.to_pylist()
            for row, (name, kind) in product(rows, self._short.items()):
                row[name] = None if row[name] is None else of_numpy(np.array(row[name], kind))
        return rows


def read_table(path: Path, split: str = "train") -> ListRows:
    """The rows of a file of these kinds, or of a folder that is one (`is_saved`).

    Raises:
        ConfigError: If it is an Excel sheet, and `openpyxl` is not installed.
        DataError: If it is no file, none of its kind, damaged, or has no rows for this split.
    """
    import pyarrow

    what, read = _READERS.get(path.suffix.lower(), ("Arrow", _arrow))
    if not is_saved(path):
        content.check_file(path)
    try:
        rows = _saved(path, split) if is_saved(path) else read(path)
    except (OSError, ValueError, KeyError, TypeError, BadZipFile, pyarrow.ArrowException) as error:
        if isinstance(error, UserError):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{path}: cannot be read as {what}: {reason}; write it again, or as .jsonl") from error
    return ListRows(rows, str(path), getattr(rows, "num_bytes", 0))


def _parquet(path: Path) -> ArrowRows:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        sizes = (file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
        if sum(sizes) <= content.LARGE_BYTES:
            return ArrowRows(file.read(), str(path))
        # A row of a group cannot be read alone. The file has no name, and is gone with this process.
        unpacked = TemporaryFile()  # noqa: SIM115
        with pyarrow.ipc.new_file(unpacked, file.schema_arrow) as writer:
            for batch in file.iter_batches(_BATCH):
                writer.write_batch(batch)
    unpacked.flush()
    return ArrowRows(pyarrow.ipc.open_file(pyarrow.memory_map(f"/dev/fd/{unpacked.fileno()}")).read_all(), str(path))


def _arrow(*paths: Path) -> ArrowRows:
    """IPC files, or streams (as `datasets` writes); mapped into memory if they are not packed."""
    import pyarrow

    files = [content.LargeFile(path.open("rb"), path) for path in paths]
    readers = [pyarrow.ipc.open_file if file[:6] == b"ARROW1" else pyarrow.ipc.open_stream for file in files]
    tables = [read(pyarrow.memory_map(str(path))).read_all() for read, path in zip(readers, paths, strict=True)]
    return ArrowRows(pyarrow.concat_tables(tables), str(paths[0]), files)


def _sheet(path: Path) -> list[dict[str, Any]]:
    book = imported("openpyxl", "xlsx", f"{path}: an Excel sheet").load_workbook(path, read_only=True, data_only=True)
    header, *rows = [row for row in book.worksheets[0].iter_rows(values_only=True) if any(c is not None for c in row)]
    names = header_of(path, header)
    return [dict(zip(names, row, strict=True)) for row in rows]


_READERS: dict[str, Any] = {".parquet": ("Parquet", _parquet), ".xlsx": ("an Excel sheet", _sheet)}


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of the library `datasets` wrote a folder."""
    return any((folder / name).is_file() for name in (_OF_SPLITS, _STATE))


def _saved(folder: Path, split: str) -> ArrowRows:
    if (folder / _OF_SPLITS).is_file():
        names = json.loads((folder / _OF_SPLITS).read_text())["splits"]
        folder = folder / Path(split_in(names, str(folder), split)).name
    files = json.loads((folder / _STATE).read_text())["_data_files"]
    return _arrow(*(folder / Path(each["filename"]).name for each in files))


def rows_of(value: Any, origin: str, split: str) -> ListRows:
    """The rows of a list, an Arrow table, a data frame, a data set, or a mapping of columns or of splits to these.

    Raises:
        DataError: If it holds no rows, or none of this split.
    """
    found = unwrapped(value, origin, split)
    if is_stream(found):
        if split != "train":
            raise ConfigError(f"{origin} is a stream, which has no end: give a list of its rows, or a file")
        stream = Stream(found, origin)
        note = f"a stream: of {len(stream):,} rows at a time the order is shuffled; that counts as an epoch"
        return ListRows(stream, origin, sys.maxsize, note)  # it is read as a large file
    if hasattr(found, "iloc") and hasattr(found, "columns"):  # else a column alone
        import pyarrow

        try:
            found = pyarrow.Table.from_pandas(found, preserve_index=False)
        except pyarrow.ArrowException as error:
            raise DataError(f"{origin}: {' '.join(error.args)}; give the column one type, text for example") from error
    if hasattr(found, "to_batches"):
        return ListRows(ArrowRows(found, origin), origin, found.nbytes)
    if is_table(found) and not isinstance(found, Mapping) and hasattr(found, "data"):
        size = found.data.nbytes * len(found) // max(found.data.num_rows, 1)  # it may be a selection
        return ListRows(found if found.format["type"] == "custom" else found.with_format(None), origin, size)
    return rows_in(value, origin, split)
