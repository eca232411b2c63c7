"""Files that are whole or absent: written under a temporary name, flushed to disk, then renamed; lines are appended
whole or not at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from stateset_lightning.errors import ConfigError, DiskError

PARTIAL = ".partial"
"""Ending of a file that is being written. One that no process is writing was left behind by a kill, and may go."""


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to. It takes the place of `path` when the block ends well; until then, and if it does not, `path`
    stays as it was.

    Raises:
        DiskError: If the disk is full or cannot be written.
    """
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name with the old disk blocks
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise disk_error(path, error) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, of flat or nested files. It becomes `path` when the block ends well, and vanishes if it does
    not.

    Args:
        path: The folder to be; an empty one may be there.
        overwrite: Whether it may take the place of one with files in it, which is deleted last.

    Raises:
        ConfigError: If `path` is there already.
        DiskError: If the disk is full or cannot be written.
    """
    path = path.absolute()
    partial, old = (path.with_name(f".{path.name}.{state}") for state in ("unfinished", "old"))
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
        for file in (file for file in partial.rglob("*") if file.is_file()):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        if path.exists():
            path.rename(old)
        partial.rename(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)


def append_lines(path: Path, text: str) -> None:
    """Appends whole lines, or nothing. A line that a kill tore at the file's end is cut off first.

    Raises:
        DiskError: If the disk is full or cannot be written.
    """
    assert not text or text.endswith("\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+", buffering=0) as file:
            end = _end_of_last_line(file)
            try:
                file.truncate(end)
                rest = memoryview(text.encode())
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        raise disk_error(path, error) from error


def remove_leftovers(folder: Path) -> list[Path]:
    """Removes what killed writes left in a folder, which must have no other writer; returns their paths."""
    leftovers = sorted(folder.glob(f".*{PARTIAL}")) if folder.is_dir() else []
    for path in leftovers:
        path.unlink(missing_ok=True)
    return leftovers


def disk_error(path: Path, error: OSError) -> DiskError:
    return DiskError(
        f"{path}: cannot be written ({error.strerror or error}); what was there before is untouched. Make room, or"
        " choose another folder; a run goes on from its last checkpoint"
    )


def _end_of_last_line(file: IO[bytes]) -> int:
    """Size of the file without a torn last line."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 65536)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _sync_folder(folder: Path) -> None:
    """The new name reaches the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
