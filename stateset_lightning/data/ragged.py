"""Token lists packed into one array, and reading without pauses: what a million rows need."""

import gc
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import overload

import numpy as np


class PackedTokens(Sequence[list[int]]):
    """Lists of tokens in one int32 array: 4 bytes a token, where a list of Python integers takes ten times as much.

    Args:
        flat: All tokens, one list behind the other.
        lengths: Tokens of each list.
    """

    __slots__ = ("_ends", "_flat", "lengths")

    def __init__(self, flat: np.ndarray, lengths: np.ndarray) -> None:
        self._flat = flat
        self.lengths = lengths
        self._ends = np.cumsum(lengths, dtype=np.int64)

    @classmethod
    def pack(cls, lists: Sequence[Sequence[int]]) -> "PackedTokens":
        lengths = np.fromiter(map(len, lists), dtype=np.int32, count=len(lists))
        flat = np.fromiter(chain.from_iterable(lists), dtype=np.int32, count=int(lengths.sum()))
        return cls(flat, lengths)

    @classmethod
    def concatenate(cls, parts: Sequence["PackedTokens"]) -> "PackedTokens":
        if not parts:
            return cls.pack([])
        return cls(np.concatenate([part._flat for part in parts]), np.concatenate([part.lengths for part in parts]))

    def digest(self) -> str:
        """Equal for equal lists of tokens, and for no others."""
        return hashlib.sha256(self.lengths.tobytes() + self._flat.tobytes()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...
    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        end = int(self._ends[index])
        tokens: list[int] = self._flat[end - int(self.lengths[index]) : end].tolist()
        return tokens

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(mine == theirs for mine, theirs in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]


@contextmanager
def garbage_left_alone() -> Iterator[None]:
    """No garbage collection in the block: it would walk through all rows again and again, which doubles the time they
    take to read.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
