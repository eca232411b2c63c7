"""This process among the data-parallel ranks, and what it can ask of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Every rank must make the same calls in the same order, or all wait for ever."""

    rank: int = 0
    world: int = 1

    def gather(self, value: T) -> list[T]:
        """The value of each rank, in order. For small things (an episode's scores, metrics), not for weights."""
        if self.world == 1:
            return [value]
        values: list[T | None] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def by_position(self, values: Tensor) -> Tensor:
        """Values of this rank's prompts [P, ...] -> those of all ranks in order of global position, [P * world, ...].

        Rank r holds the positions r, r + world, r + 2 world, ...
        """
        return torch.stack(self.gather(values), dim=1).flatten(0, 1)
