"""Rows of a stream, which has no length and is read once from its start to its end, and then again.

A buffer of rows at a time is shuffled and served, as an epoch of its own. Every rank reads the whole stream and serves
its part of each episode.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import islice
from typing import Any

from stateset_lightning.errors import ConfigError, DataError

BUFFER = 2048  # rows that are shuffled together; two buffers are kept


class Stream(Sequence[Any]):
    """The rows of a stream, counted on where it begins again. `len` is that of a buffer.

    Args:
        stream: An iterable whose `state_dict` says how far it was read, such as `datasets.IterableDataset`.
        origin: What messages call it.

    Raises:
        ConfigError: If it has no `state_dict` and `load_state_dict`.
        DataError: If it has no rows.
    """

    def __init__(self, stream: Any, origin: str) -> None:
        if not (hasattr(stream, "state_dict") and hasattr(stream, "load_state_dict")):
            why = f"a {type(stream).__name__} has no state_dict and load_state_dict, so a run could not be resumed"
            raise ConfigError(f"{origin}: {why}: give a datasets.IterableDataset, a list or a file")
        try:
            self._stream = deepcopy(stream)  # the user's own stays where it is, for another run
        except TypeError:  # it holds an open file, say
            self._stream = stream
        self._origin = origin
        self._start = deepcopy(self._stream.state_dict())
        self._go_to(0, self._start)

    def __len__(self) -> int:
        return BUFFER

    def __getitem__(self, index: Any) -> Any:
        return self._buffer(index // BUFFER)[1][index % BUFFER]

    def state_dict(self, number: int) -> dict[str, Any]:
        """How far the stream was read where a buffer begins, which is in use or the next."""
        return {"buffer": number, "stream": self._buffer(number)[0]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._go_to(state["buffer"], state["stream"])

    def _go_to(self, number: int, state: Any) -> None:
        """Buffer `number` is the next; the stream is in this state there."""
        self._next, self._state = number, state
        self._buffers: dict[int, tuple[Any, list[Any]]] = {}
        self._rows = self._begin(state)

    def _begin(self, state: Any) -> Iterator[Any]:
        self._stream.load_state_dict(deepcopy(state))
        return iter(self._stream)

    def _buffer(self, number: int) -> tuple[Any, list[Any]]:
        """The state of the stream where it begins, and its rows."""
        if number < self._next and number not in self._buffers:
            self._go_to(0, self._start)
        while number not in self._buffers:
            rows = list(islice(self._rows, BUFFER))
            while len(rows) < BUFFER:
                self._rows = self._begin(self._start)
                again = list(islice(self._rows, BUFFER - len(rows)))
                if not again:
                    raise DataError(f"{self._origin} has no rows; give at least one scenario")
                rows += again
            self._buffers.pop(self._next - 2, None)
            self._buffers[self._next] = self._state, rows
            self._next, self._state = self._next + 1, deepcopy(self._stream.state_dict())
        return self._buffers[number]
