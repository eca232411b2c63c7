"""Files that are complete or absent, and lines that are appended completely or not at all.

A file is written under a temporary name of its writer's own, flushed to disk, then renamed.
"""

import csv
import fcntl
import mmap
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import IO, TypeVar
from uuid import uuid4

from safetensors import SafetensorError

from stateset_lightning.errors import ConfigError, DiskError, tell_once

# Ending of a file or folder while it is being written, and locked by its writer: `.NAME.HOST-NUMBER.partial`. One that
# is not locked is what a kill left.
PARTIAL = ".partial"

# What a disk that is full or cannot be written raises; safetensors, written in Rust, has an error of its own.
DISK_ERRORS = (OSError, SafetensorError)

# Endings of what is not locked yet, and of a folder that is being replaced.
NEW, OLD = ".new", ".old"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses inside the block is told as one line that names `path`.

    Raises:
        DiskError: If the disk is full or cannot be written.
    """
    try:
        yield
    except DISK_ERRORS as error:
        reason = getattr(error, "strerror", None) or error
        remedy = "Make room, or choose another folder; a run goes on from its last checkpoint"
        raise DiskError(f"{path}: cannot be written ({reason}); what was there is untouched. {remedy}") from error


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
    same = os.path.isfile(place) and any(os.path.exists(each) and os.path.samefile(each, place) for each in _inputs)
    if os.path.exists(place) and not (os.path.isfile(place) or os.path.isdir(place)):
        raise ConfigError(f"{path} is not written: it is a device, a pipe or a socket; give a file")
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
    with writing(path), _partial(path, Path.touch) as partial:
        with partial.open("r+b") as file:
            yield file
        _sync(partial)  # or a power cut could leave the new name with the old disk blocks
        os.replace(partial, path)


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
    with writing(path), _partial(path, Path.mkdir) as partial:
        for old in path.parent.glob(f".{escape(path.name)}.*-{'[0-9a-f]' * 16}{OLD}"):
            _put_back(old, path)  # the process was killed between two renames, or after the second one
        if path.exists() and any(path.iterdir()) and not overwrite:
            raise ConfigError(f"{path} has files in it; choose another folder, or say --overwrite")
        yield partial
        for file in filter(Path.is_file, partial.rglob("*")):
            _sync(file)
        check_output(path)  # by now it is known all that was read
        old = partial.with_suffix(OLD)
        try:
            if path.exists():
                path.rename(old)
            partial.rename(path)
        finally:
            _put_back(old, path)


@contextmanager
def _partial(path: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    """What is made beside `path` under a name that no other writer has, on whatever machine, and locked.

    It is removed at the end, if the block has not given it its place. Until it is locked it has another ending: with
    its own it would be taken for a leftover.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    partial = path.with_name(f".{path.name}.{socket.gethostname()}-{uuid4().hex[:16]}{PARTIAL}")
    make(new := partial.with_suffix(NEW))
    with _opened(new) as descriptor:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            new.rename(partial)
            yield partial
            _sync(path.parent)
        finally:
            _remove(partial)


def make_folder(path: Path) -> bool:
    """Makes a folder, and says whether it is new: of several processes, one alone is told so.

    Raises:
        DiskError: If it cannot be made.
    """
    with writing(path), suppress(FileExistsError):
        path.mkdir(parents=True)
        return True
    return False


def append_lines(path: Path, text: str) -> None:
    """Appends complete lines, or nothing. An incomplete last line, left by a kill, is cut off first.

    Raises:
        DiskError: If the disk is full or cannot be written.
    """
    assert not text or text.endswith("\n")
    check_output(path)
    with writing(path):
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
        tell_once(f"{path}, line {str(damaged[:20])[1:-1]}: damaged, left out ({len(damaged)} in all)")


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


def remove_leftovers(folder: Path) -> None:
    """Removes from a folder what killed writers of this machine left; living writers and other files keep theirs.

    The kernel releases the lock of a process that ends, however it ends. Where there are no locks, nothing is removed;
    nor is what another machine wrote, whose locks may not be seen here. Version 0.1 left `.NAME.ckpt.partial`.
    """
    name = re.compile(rf"\..+\.(ckpt|{re.escape(socket.gethostname())}-[0-9a-f]+){re.escape(PARTIAL)}", re.DOTALL)
    for path in folder.glob(f".*{PARTIAL}"):
        if name.fullmatch(path.name):
            with suppress(OSError), _opened(path) as descriptor:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # NFS locks no file that is only read
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Removes what was written in vain; where the disk does not let it, it stays: the error that led here is told."""
    with suppress(OSError):
        path.unlink() if path.is_file() else shutil.rmtree(path)


def _put_back(old: Path, path: Path) -> None:
    """The folder that was to be replaced, where nothing took its place; else it is removed."""
    with suppress(OSError):
        old.rename(path) if old.exists() and not path.exists() else shutil.rmtree(old)


def _end_of_last_line(file: IO[bytes]) -> int:
    """Size in bytes of the file without an incomplete last line."""
    if not file.seek(0, os.SEEK_END):
        return 0  # an empty file cannot be mapped
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.rfind(b"\n") + 1


def _sync(path: Path) -> None:
    """Flushes a file's content, or the names in a folder, to the disk."""
    with _opened(path) as descriptor:
        os.fsync(descriptor)
