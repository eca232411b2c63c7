"""Foreign code in a fork: what it makes arrives, and nothing of it is left."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest

from stateset_lightning.errors import DataError
from stateset_lightning.workers import limited, limits


def refuses() -> Iterator[Any]:
    yield 1
    raise DataError("no")


def dies() -> Iterator[Any]:
    yield 1
    os.kill(os.getpid(), signal.SIGKILL)


def hangs() -> Iterator[Any]:
    yield 1
    while True:
        pass


def eats() -> Iterator[Any]:
    yield 1
    yield len(bytes(2**33))


def spends() -> Iterator[Any]:
    """So many items, each within its time, that together they take longer than one may."""
    for number in range(5):
        begin = time.process_time()
        while time.process_time() < begin + 0.1:
            pass
        yield number


@pytest.mark.parametrize(
    ("items", "made", "error"),
    [
        (iter(()), [], None),
        ((bytes(2**20) for _ in range(3)), [bytes(2**20)] * 3, None),
        (spends(), [0, 1, 2, 3, 4], None),
        (refuses(), [1], "^no$"),
        (dies(), [1], "^it was stopped: more than 0.3 s or 2 GiB; mend the template"),
        (hangs(), [1], "^it was stopped"),
        (eats(), [1], "^it was stopped"),
    ],
)
def test_what_is_made_arrives_until_a_limit_is_reached(
    items: Iterator[Any], made: list[Any], error: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.3)
    arrived = []
    if error is None:
        arrived += limited(items, "it")
    else:
        with pytest.raises(DataError, match=error):
            arrived.extend(limited(items, "it"))  # keeps what came before
    assert arrived == made


def test_no_fork_outlives_who_reads_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    forks, fork = [], os.fork
    monkeypatch.setattr(os, "fork", lambda: forks.append(fork()) or forks[-1])
    items = limited(count(), "it")
    assert [next(items), next(items)] == [0, 1]
    items.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(forks[0], 0)
