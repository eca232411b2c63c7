"""What a run ran on: versions and hardware, for a file beside its config."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from lightning.pytorch import Trainer

PACKAGES = (
    "stateset-lightning",
    "lightning",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "torchmetrics",
    "numpy",
    "peft",
    "vllm",
)
ENVIRONMENT_FILE = "environment.json"


def environment(trainer: Trainer) -> dict[str, Any]:
    """Plain values by name. Nothing names the machine or its user."""
    device = trainer.strategy.root_device
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "devices": trainer.world_size,
        "strategy": type(trainer.strategy).__name__,
        "precision": str(trainer.precision),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: found for name in PACKAGES if (found := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
