"""What a run ran on: versions and hardware, for a file beside its config."""

import platform
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from lightning.pytorch import Trainer

PACKAGES = "stateset-lightning lightning torch transformers tokenizers safetensors torchmetrics numpy peft vllm"


def environment(trainer: Trainer) -> dict[str, Any]:
    """Plain values by name. Nothing names the machine or its user."""
    device = trainer.strategy.root_device
    found = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "devices": trainer.world_size,
        "strategy": type(trainer.strategy).__name__,
        "precision": str(trainer.precision),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for name in PACKAGES.split():
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
