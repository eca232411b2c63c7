"""The bytes of a file: in memory, or read where they are asked for if the file is large. Unpacks .gz and .zst."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from stateset_lightning.errors import DataError

# Of a split, in bytes and in rows: what is larger is read, checked and encoded when it is served; see `sources`.
LARGE_BYTES = 256 * 2**20
LARGE_ROWS = 200_000
SAMPLE = 1000  # rows of each of its files that are looked at, at the start

BOM = "\ufeff".encode()  # which some programs put before a text
BLOCK = 16 * 2**20  # bytes that are looked at together
PACKED = {".gz": "gzip", ".zst": "zstd"}  # suffix -> what Arrow calls it


class LargeFile:
    """A file that is read piece by piece, and must not change meanwhile: an offset would mean another row."""

    def __init__(self, file: BinaryIO, name: Path) -> None:
        self._file, self._name = file, name
        self._state = os.fstat(file.fileno())

    def __len__(self) -> int:
        return self._state.st_size

    def check(self) -> None:
        """The file is as it was.

        Raises:
            DataError: If not.
        """
        now, then = os.fstat(self._file.fileno()), self._state
        if (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
            raise DataError(f"{self._name}: the file has changed since this run first read it; start anew")

    def __getitem__(self, part: slice) -> bytes:
        self.check()
        return os.pread(self._file.fileno(), part.stop - (part.start or 0), part.start or 0)


Content = bytes | LargeFile


def read_content(path: Path) -> Content:
    """The content of a file, unpacked.

    Raises:
        DataError: If it cannot be read or unpacked.
    """
    packing = PACKED.get(path.suffix.lower())
    try:
        if packing:
            import pyarrow  # it takes a tenth of a second, and most files are not packed

            with path.open("rb") as file, pyarrow.input_stream(file, compression=packing) as stream:
                content: bytes = stream.read(LARGE_BYTES + 1)
            if len(content) > LARGE_BYTES:
                raise DataError(f"{path}: unpacks to more than {LARGE_BYTES >> 20:,} MiB; give the unpacked file")
            return content
        return path.read_bytes() if path.stat().st_size <= LARGE_BYTES else LargeFile(path.open("rb"), path)
    except OSError as error:
        why = error.strerror or f"it is no whole file of {packing}: {error}"
        raise DataError(f"{path}: cannot be read ({why}); check the path and its permissions") from error


def _blocks(content: Content, first: int = 0) -> Iterator[bytes]:
    """The content in pieces, from a byte on."""
    for start in range(first, len(content), BLOCK):
        yield content[start : min(start + BLOCK, len(content))]


def lines(content: Content) -> Iterator[tuple[int, bytes]]:
    """Where each line begins, and the line with its end: LF, CR LF or CR. A byte order mark belongs to none."""
    start, rest = len(BOM) * (content[: len(BOM)] == BOM), b""
    for block in _blocks(content, start):
        *whole, rest = (rest + block).splitlines(keepends=True)  # of bytes: at these ends alone
        for line in whole:
            yield start, line
            start += len(line)
    if rest:
        yield start, rest


def digest(content: Content) -> str:
    """A hash of the content."""
    hashed = hashlib.sha256()
    for block in _blocks(content):
        hashed.update(block)
    return hashed.hexdigest()[:16]


def unpacked(path: Path) -> Path:
    """The name without the suffix of a packed file."""
    return path.with_suffix("") if path.suffix.lower() in PACKED else path


def check_file(path: Path) -> None:
    """What a path names is a file, which ends.

    Raises:
        DataError: If it is a directory, or a device, a pipe or a socket.
    """
    if path.is_dir():
        raise DataError(f"{path} is a directory; give a file, or a glob such as '{path}/*.jsonl'")
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is a device, a pipe or a socket, which may never end; give a file")
