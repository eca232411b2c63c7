"""A row becomes a `PromptBatch`: reading, scenarios, sources, prompts, order, loader.

`stateset_lightning.datamodule` puts them together. Names are imported when they are first used: files are looked at
before torch and transformers are imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stateset_lightning.data.loader import EpisodeLoader, EvaluationLoader
    from stateset_lightning.data.order import Curriculum
    from stateset_lightning.data.prompts import PromptEncoder, first_row, special_tokens
    from stateset_lightning.data.shapes import RowOptions
    from stateset_lightning.data.sources import Source, read_split

__all__ = ["Curriculum", "EpisodeLoader", "EvaluationLoader", "PromptEncoder", "RowOptions", "Source", "read_split"]
__all__ += ["first_row", "special_tokens"]

_HOMES = {"Curriculum": "order", "EpisodeLoader": "loader", "EvaluationLoader": "loader", "PromptEncoder": "prompts"}
_HOMES |= {"Source": "sources", "read_split": "sources", "special_tokens": "prompts"}
_HOMES |= {"RowOptions": "shapes", "first_row": "prompts"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
