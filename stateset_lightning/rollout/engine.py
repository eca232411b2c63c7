"""The interface of a rollout engine: whatever turns prompts into groups of completions."""

# No `from __future__ import annotations`: jsonargparse holds an engine's methods against these signatures (4.53).
from collections.abc import Callable, Sequence
from typing import Protocol

from stateset_lightning.policy import Policy
from stateset_lightning.rollout.config import RolloutConfig
from stateset_lightning.types import Rollout

OnFinished = Callable[[int, str, int], None]
"""Called with (completion, text, tokens) as soon as a completion is finished, in no particular order."""


class RolloutEngine(Protocol):
    """Samples completions. Letters: P prompts, N = P * num_generations completions."""

    def generate(
        self,
        prompts: list[list[int]],
        num_generations: int,
        sampling: RolloutConfig,
        seeds_N: Sequence[int],
        greedy: bool = False,
        on_finished: OnFinished | None = None,
    ) -> Rollout:
        """Completions n of prompt n // num_generations; their noise follows from `seeds_N[n]` alone."""
        ...

    def sync(self, policy: Policy) -> None:
        """Makes `policy` the model that `generate` samples from, weights as they are now."""
        ...
