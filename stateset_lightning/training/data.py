"""The run's data module, as training asks it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from stateset_lightning.datamodule import ScenarioDataModule


def data_of(trainer: Trainer) -> ScenarioDataModule | None:
    """None where the Trainer got plain loaders of `PromptBatch`."""
    data = getattr(trainer, "datamodule", None)
    return data if hasattr(data, "replacements") else None
