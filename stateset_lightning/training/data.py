"""What training asks of the run's data module, in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch import Tensor

    from stateset_lightning.types import PromptBatch


class TrainingData(Protocol):
    """The side of a `ScenarioDataModule` that training sees; its docstrings say more."""

    batch_size: int
    num_iterations: int
    steps_per_episode: int
    curriculum: Any

    @property
    def micro_steps_per_epoch(self) -> int: ...

    @property
    def longest_prompt(self) -> int: ...

    @property
    def has_validation(self) -> bool: ...

    def named_rewards(self) -> Mapping[str, Sequence[str]]: ...

    def replacements(self, batch: PromptBatch, slots: Sequence[int], round_number: int) -> PromptBatch: ...

    def report_rewards(self, episode: int, rows: Sequence[int], totals_PG: Tensor) -> None: ...


def data_of(trainer: Trainer) -> TrainingData | None:
    """The run's data module; None where the Trainer got plain loaders of `PromptBatch`."""
    data = getattr(trainer, "datamodule", None)
    return data if hasattr(data, "replacements") else None
