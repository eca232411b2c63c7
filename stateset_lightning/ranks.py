"""This process among the data-parallel ranks, and what it can ask of the others."""

import re
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

T = TypeVar("T")

# What the backends say when the other end of a connection has gone, or does not answer in time.
_LOST = re.compile("Connection (closed|reset) by peer|gloo/transport|NCCL|Watchdog caught collective operation timeout")


@dataclass(frozen=True)
class Ranks:
    """Every rank must make the same calls in the same order, or all wait for ever."""

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> "Ranks":
        """Those of torch.distributed, or this process alone."""
        distributed = torch.distributed
        is_distributed = distributed.is_available() and distributed.is_initialized()
        return cls(distributed.get_rank(), distributed.get_world_size()) if is_distributed else cls()

    def gather(self, value: T) -> list[T]:
        """The value of each rank, in order. For small things (an episode's scores, metrics), not for weights."""
        if self.world == 1:
            return [value]
        values: list[T | None] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def from_first(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        values = [value]
        if self.world > 1:
            torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def by_position(self, values: Tensor) -> Tensor:
        """Values of this rank's prompts [P, ...] -> those of all ranks in order of global position, [P * world, ...].

        Rank r holds the positions r, r + world, r + 2 world, ...
        """
        return torch.stack(self.gather(values), dim=1).flatten(0, 1)


def unsharded(tensor: Tensor) -> Tensor:
    """All of a tensor of which each rank has a part; all ranks call it together. Any other tensor is returned as is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def explain_lost_rank(error: BaseException) -> None:
    """Adds to an error of a collective what it means; a traceback ends with that. Does nothing to other errors."""
    if isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and _LOST.search(str(error))):
        why = "another rank has ended, by an error of its own or killed (out of memory, perhaps)"
        error.add_note(f"{why}: see the other ranks' output, then resume from the last checkpoint (--ckpt_path last)")
