"""Many token lists in one array: what a data set of a million rows needs."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import numpy as np


class RaggedTokens:
    """Token lists of different lengths in one int32 array: 4 bytes a token, a tenth of a list of Python integers.

    Args:
        flat: The tokens of all lists, one list after the other, int32.
        lengths: Number of tokens of each list, int32.
    """

    __slots__ = ("_ends", "_flat", "lengths")

    def __init__(self, flat: np.ndarray, lengths: np.ndarray) -> None:
        self._flat = flat
        self.lengths = lengths
        self._ends = np.cumsum(lengths, dtype=np.int64)

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[int]]) -> "RaggedTokens":
        lengths = np.fromiter(map(len, lists), dtype=np.int32, count=len(lists))
        return cls(np.fromiter(chain.from_iterable(lists), dtype=np.int32, count=int(lengths.sum())), lengths)

    @classmethod
    def concatenate(cls, parts: Iterable["RaggedTokens"]) -> "RaggedTokens":
        parts = [cls.from_lists([]), *parts]
        return cls(np.concatenate([part._flat for part in parts]), np.concatenate([part.lengths for part in parts]))

    def digest(self) -> str:
        """A hash of the tokens: the same for the same lists, another for others."""
        return hashlib.sha256(self.lengths.tobytes() + self._flat.tobytes()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> list[int]:
        end = int(self._ends[index])
        return self._flat[end - int(self.lengths[index]) : end].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.__getitem__, range(len(self)))
