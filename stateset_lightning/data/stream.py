"""Rows of a stream, which has no length and is read once from its start to its end, and then again.

A buffer of rows at a time is shuffled and served, as an epoch of its own. Every rank reads the whole stream and serves
its part of each episode.
"""

import sys
from collections.abc import Iterator
from copy import deepcopy
from itertools import islice
from typing import Any

from stateset_lightning.data.rows import ListRows, Problem, RawRow
from stateset_lightning.errors import ConfigError, DataError

BUFFER = 2048  # rows that are shuffled together; two buffers are kept


class StreamRows:
    """The rows of a stream, counted on where it begins again. `len` is that of a buffer.

    Args:
        stream: An iterable whose `state_dict` says how far it was read, such as `datasets.IterableDataset`.
        origin: What messages call it.

    Raises:
        ConfigError: If it has no `state_dict` and `load_state_dict`.
        DataError: If it has no rows.
    """

    num_bytes = sys.maxsize  # it is read as a large file
    note = f"a stream: of {BUFFER:,} rows at a time the order is shuffled; that counts as an epoch"
    end = None

    def __init__(self, stream: Any, origin: str) -> None:
        if not (hasattr(stream, "state_dict") and hasattr(stream, "load_state_dict")):
            raise ConfigError(
                f"{origin}: a {type(stream).__name__} has no state_dict and load_state_dict, and a run on it could"
                " not be resumed: give a datasets.IterableDataset, a list or a file"
            )
        try:
            self._stream = deepcopy(stream)  # the user's own stays where it is, for another run
        except TypeError:  # it holds an open file, say
            self._stream = stream
        self.origin = origin
        self._start = deepcopy(self._stream.state_dict())
        self._go_to(0, self._start)
        self._digest = ListRows(self._buffer(0), origin).digest()

    def __len__(self) -> int:
        return BUFFER

    def __getitem__(self, index: int) -> RawRow | Problem:
        return ListRows([], self.origin).row(index + 1, self._buffer(index // BUFFER)[index % BUFFER])

    def __iter__(self) -> Iterator[RawRow | Problem]:
        return map(self.__getitem__, range(BUFFER))

    def digest(self) -> str:
        """A hash of the first buffer."""
        return self._digest

    def state_dict(self, number: int) -> dict[str, Any]:
        """How far the stream was read where a buffer begins, which is in use or the next."""
        self._buffer(number)
        return {"buffer": number, "stream": self._states[number]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._go_to(state["buffer"], state["stream"])

    def _go_to(self, number: int, state: Any) -> None:
        """Buffer `number` is the next; the stream is in this state there."""
        self._next, self._states = number, {number: state}
        self._buffers: dict[int, list[Any]] = {}
        self._rows = self._begin(state)

    def _begin(self, state: Any) -> Iterator[Any]:
        self._stream.load_state_dict(deepcopy(state))
        return iter(self._stream)

    def _buffer(self, number: int) -> list[Any]:
        if number < self._next and number not in self._buffers:
            self._go_to(0, self._start)
        while number not in self._buffers:
            rows = list(islice(self._rows, BUFFER))
            while len(rows) < BUFFER:
                self._rows = self._begin(self._start)
                again = list(islice(self._rows, BUFFER - len(rows)))
                if not again:
                    raise DataError(f"{self.origin} has no rows; give at least one scenario")
                rows += again
            self._buffers = {self._next: rows, **{n: b for n, b in self._buffers.items() if n == self._next - 1}}
            self._next += 1
            self._states[self._next] = deepcopy(self._stream.state_dict())
            self._states.pop(self._next - 3, None)
        return self._buffers[number]
