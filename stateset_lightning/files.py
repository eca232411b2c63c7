"""Files that are complete or absent, and lines that are appended completely or not at all, and read one by one.

A file is written under a temporary name, flushed to disk, then renamed.
"""

from __future__ import annotations

import csv
import fcntl
import logging
import mmap
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from glob import escape
from pathlib import Path
from typing import IO, TypeVar

from stateset_lightning.errors import ConfigError, DiskError

PARTIAL = ".partial"
"""Ending of a file while it is being written, and locked by its writer. One that is not locked is what a kill left."""


_inputs: set[str] = set()


def keep_inputs(*paths: str | Path | None) -> None:
    """Files and folders that the user gives to be read: nothing that is written below takes their places."""
    _inputs.update(os.path.realpath(path) for path in paths if path)


def forget_inputs() -> None:
    """Another command begins: what the last one read may be written again."""
    _inputs.clear()


def check_output(path: str | Path) -> None:
    """A file or folder that is to be written is on this machine, and nothing that this process reads lies there.

    Links of both kinds and relative paths are followed. Called by all that writes; what writes late calls it early.

    Raises:
        ConfigError: If not.
    """
    place = os.path.realpath(path)
    names = os.stat(place).st_nlink if os.path.isfile(place) else 1
    same = [each for each in _inputs if names > 1 and os.path.exists(each) and os.path.samefile(each, place)]
    if same or any(each == place or each.startswith(place + os.sep) for each in _inputs):
        raise ConfigError(f"{path} is not overwritten: it is read by this command, or holds what is; give another path")
    if re.match(r"\w[\w+.-]+:/", str(path)):  # `Path` has made one slash of two
        raise ConfigError(f"{path} is an address, and this goes to local files only; give a path")


@contextmanager
def atomic_write(path: Path, *, over_input: bool = False) -> Iterator[IO[bytes]]:
    """A file to write to, which takes the place of `path` when the block ends without an error.

    Until then, and after an error, `path` stays as it was.

    Args:
        path: The file.
        over_input: Whether it may be one that this process reads.

    Raises:
        ConfigError: See `check_output`.
        DiskError: If the disk is full or cannot be written.
    """
    if not over_input:
        check_output(path)
    # Two writers of one name do not meet: a thread's number is unique on its machine.
    partial = path.with_name(f".{path.name}.{socket.gethostname()}-{threading.get_native_id()}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, escape(path.name))
        with partial.open("wb") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name with the old disk blocks
            os.replace(partial, path)
        _sync(path.parent)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink()


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends without an error, and is removed otherwise.

    Args:
        path: The final folder; it must not exist, or be empty.
        overwrite: Whether it may replace a folder that has files in it. The old folder is deleted last.

    Raises:
        ConfigError: If `path` is there already.
        DiskError: If the disk is full or cannot be written.
    """
    check_output(path)
    path = path.absolute()
    partial, old = (path.with_name(f".{path.name}.{state}") for state in ("unfinished", "old"))
    for leftover in (partial, old):
        check_output(leftover)
    if old.exists() and not path.exists():
        old.rename(path)  # the process was killed between two renames
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file; give a folder that is yet to be made")
    if path.exists() and any(path.iterdir()) and not overwrite:
        raise ConfigError(f"{path} has files in it; choose another folder, or say --overwrite")
    try:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for file in filter(Path.is_file, partial.rglob("*")):
            _sync(file)
        check_output(path)  # by now it is known all that was read
        if path.exists():
            path.rename(old)
        partial.rename(path)
        _sync(path.parent)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)


def make_folder(path: Path) -> bool:
    """Makes a folder, and says whether it is new: of several processes, one alone is told so.

    Raises:
        DiskError: If it cannot be made.
    """
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise disk_error(path, error) from error
    return True


def append_lines(path: Path, text: str) -> None:
    """Appends complete lines, or nothing. An incomplete last line, left by a kill, is cut off first.

    Raises:
        DiskError: If the disk is full or cannot be written.
    """
    assert not text or text.endswith("\n")
    check_output(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+", buffering=0) as file:
            end = file.truncate(_end_of_last_line(file))
            try:
                rest = memoryview(text.encode())
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        raise disk_error(path, error) from error


T = TypeVar("T")


def read_lines(path: Path, parse: Callable[[str], T]) -> Iterator[tuple[int, bytes, T]]:
    """Number, bytes and meaning of each line; damaged ones, at which `parse` raises, are left out and told once.

    Lines end in "\n" alone: other separators of Unicode may stand inside a text. A last line without it is being
    written, or was torn by a kill.
    """
    damaged = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                try:
                    row = parse(line.decode())
                except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError, csv.Error):
                    damaged.append(number)
                else:
                    yield number, line, row
    if damaged:
        _tell_once(f"{path}, line {str(damaged[:20])[1:-1]}: damaged, left out ({len(damaged)} in all)")


@cache  # a file may be read several times
def _tell_once(told: str) -> None:
    logging.getLogger("stateset_lightning").warning(told)


def read_table(path: Path, number: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a CSV file with a line each, and their places behind the header, from 1.

    Args:
        path: The file.
        number: A column of numbers, by which a damaged row is known, beside one that has not a cell for each column.
    """
    names: list[str] = []

    def parse(text: str) -> dict[str, str]:
        cells = next(csv.reader([text], strict=True))
        if not names:
            names.extend(cells)
            return {}
        row = dict(zip(names, cells, strict=True))
        int(float(row[number]))
        return row

    return ((place - 1, row) for place, _, row in read_lines(path, parse) if row)


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Removes the temporary files of killed writers from a folder; writers that live keep theirs.

    The kernel releases the lock of a process that ends, however it ends. Where there are no locks, nothing is removed.
    """
    for path in folder.glob(f".{name}*{PARTIAL}"):
        with suppress(OSError), path.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def disk_error(path: Path, error: OSError) -> DiskError:
    return DiskError(
        f"{path}: cannot be written ({error.strerror or error}); what was there before is untouched. Make room, or"
        " choose another folder; a run goes on from its last checkpoint"
    )


def _end_of_last_line(file: IO[bytes]) -> int:
    """Size in bytes of the file without an incomplete last line."""
    if not file.seek(0, os.SEEK_END):
        return 0  # an empty file cannot be mapped
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.rfind(b"\n") + 1


def _sync(path: Path) -> None:
    """Flushes a file's content, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
