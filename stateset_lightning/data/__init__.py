"""Scenarios: reading and checking files, prompts, and the loaders that serve them. See
`stateset_lightning.datamodule`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stateset_lightning.data.loader import EpisodeLoader, EvaluationLoader
    from stateset_lightning.data.order import EpochOrder
    from stateset_lightning.data.prompts import EncodedPrompts, OverlongPolicy, PromptEncoder
    from stateset_lightning.data.sources import ScenarioSet, Source, hold_out, read_split

_HOMES = {
    "EncodedPrompts": "prompts",
    "EpisodeLoader": "loader",
    "EpochOrder": "order",
    "EvaluationLoader": "loader",
    "OverlongPolicy": "prompts",
    "PromptEncoder": "prompts",
    "ScenarioSet": "sources",
    "Source": "sources",
    "hold_out": "holdout",
    "read_split": "sources",
}

__all__ = [
    "EncodedPrompts",
    "EpisodeLoader",
    "EpochOrder",
    "EvaluationLoader",
    "OverlongPolicy",
    "PromptEncoder",
    "ScenarioSet",
    "Source",
    "hold_out",
    "read_split",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
