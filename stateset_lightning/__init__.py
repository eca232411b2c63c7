"""stateset-lightning: GRPO for language tasks as a PyTorch Lightning kit.

Public names are imported when they are first used, so that `--help` and reward workers need not wait for torch.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from stateset_lightning.moved import OldNames

if TYPE_CHECKING:  # `X as X`: this is exported, to type checkers as well (PEP 484)
    from stateset_lightning.callbacks import EpisodeCallback as EpisodeCallback
    from stateset_lightning.datamodule import ScenarioDataModule as ScenarioDataModule
    from stateset_lightning.evaluation import EvaluationConfig as EvaluationConfig
    from stateset_lightning.module import GRPOLightningModule as GRPOLightningModule
    from stateset_lightning.policy import PolicyConfig as PolicyConfig
    from stateset_lightning.rewards import RewardFunction as RewardFunction, RewardResult as RewardResult
    from stateset_lightning.rollout import RolloutConfig as RolloutConfig
    from stateset_lightning.types import PromptBatch as PromptBatch, Scenario as Scenario, Turn as Turn

sys.meta_path.append(OldNames())

__version__ = "0.1.0"

_HOMES = {
    **dict.fromkeys(("PromptBatch", "Scenario", "Turn"), "types"),
    **dict.fromkeys(("RewardFunction", "RewardResult"), "rewards"),
    "EpisodeCallback": "callbacks",
    "EvaluationConfig": "evaluation",
    "GRPOLightningModule": "module",
    "PolicyConfig": "policy",
    "RolloutConfig": "rollout",
    "ScenarioDataModule": "datamodule",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
