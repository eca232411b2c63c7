"""Cases of disks: full, read-only, failing and slow ones, from some byte or operation on."""

from __future__ import annotations

import builtins
import errno
import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases import Place, Plan

Fault = Callable[[str, int], None]
"""Called with an operation and the bytes that it would write; raises where it fails."""

CHANGES = ("replace", "rename", "unlink", "remove", "mkdir", "rmdir", "truncate", "ftruncate", "fsync", "symlink")


def faulty(folder: Path, fault: Fault) -> Callable[[], None]:
    """Has all that Python writes below a folder go by a fault."""

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            fault("write", len(data))
            return super().write(data)

    real_open, below = io.open, str(folder)

    def open_(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        is_path = isinstance(file, str | os.PathLike) and os.path.abspath(os.fspath(file)).startswith(below)
        if not is_path or not set(mode) & set("wax+"):
            return real_open(file, mode, buffering, *args, **kwargs)
        fault("open", 0)
        raw = File(file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **kwargs)

    def changing(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def changes(*args: Any, **kwargs: Any) -> Any:
            fault(name, 0)
            return real(*args, **kwargs)

        return changes

    def prepare() -> None:
        builtins.open = io.open = open_
        for name in CHANGES:
            setattr(os, name, changing(name))

    return prepare


def full(size: int, number: int) -> Fault:
    """No place beyond `size` bytes."""
    written = [0]

    def fault(operation: str, count: int) -> None:
        written[0] += count
        if count and written[0] > size:
            raise OSError(number, os.strerror(number))

    return fault


def read_only(operations: int) -> Fault:
    """Nothing can be changed after so many operations."""
    left = [operations]

    def fault(operation: str, count: int) -> None:
        left[0] -= 1
        if left[0] < 0 and operation != "write":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    return fault


def failing(names: tuple[str, ...], every: int, number: int) -> Fault:
    """Some operations fail now and then."""
    seen = [0]

    def fault(operation: str, count: int) -> None:
        if operation in names:
            seen[0] += 1
            if seen[0] % every == 0:
                raise OSError(number, os.strerror(number))

    return fault


def slow(seconds: float) -> Fault:
    def fault(operation: str, count: int) -> None:
        time.sleep(10 * seconds if operation == "fsync" else seconds)

    return fault


def plan(place: Place) -> Plan:
    rng = place.rng
    command = rng.choices(("fit", "resume", "export", "report", "predict", "convert"), weights=(5, 3, 2, 1, 1, 1))[0]
    place.resumable()
    words = {
        "resume": ["fit", "--config", "config.yaml", "--ckpt_path", "last", *place.flags()],
        "export": ["export", "last", "out"],
        "report": ["report", "runs/r/version_0"],
        "convert": ["convert", "guide.yaml", "-o", "out.yaml"],
    }.get(command, [command, "--config", "config.yaml", *place.flags()])
    (place.work / "guide.yaml").write_text("agent: {model_name: gpt2}\ntraining: {num_episodes: 3}\n")
    codes, outputs = (0, 2), ("runs", "out", "out.yaml")
    kind = rng.choice(("full", "full", "full", "limit", "limit", "read-only", "read-only", "failing", "slow"))
    size = int(10 ** rng.uniform(1.5, 7.3))
    if kind == "limit":
        return Plan(words, f"{command}: files of {size} bytes at most", codes=codes, outputs=outputs, file_limit=size)
    if kind == "full":
        number = rng.choice((errno.ENOSPC, errno.ENOSPC, errno.EDQUOT))
        fault, what = full(size, number), f"{errno.errorcode[number]} after {size} bytes"
    elif kind == "read-only":
        operations = rng.choice((0, 0, rng.randrange(60)))
        fault, what = read_only(operations), f"read-only after {operations} operations"
    elif kind == "failing":
        names = tuple(rng.sample(("open", "write", "replace", "unlink", "mkdir", "fsync"), 2))
        every, number = rng.randrange(1, 12), rng.choice((errno.EIO, errno.EACCES, errno.ENOSPC, errno.ESTALE))
        fault, what = failing(names, every, number), f"{errno.errorcode[number]} at every {every}. of {names}"
    else:
        seconds = rng.choice((0.001, 0.005))
        fault, what = slow(seconds), f"{seconds} s for each operation"
    inside = faulty(place.work, fault)
    patience = 15.0 if kind == "slow" else 0.0
    return Plan(words, f"{command}: {what}", codes=codes, outputs=outputs, inside=inside, patience=patience)
