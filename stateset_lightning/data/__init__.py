"""A row becomes a `PromptBatch`: reading, scenarios, sources, prompts, order, loader.

`stateset_lightning.datamodule` puts them together.
"""

from stateset_lightning.data.loader import EpisodeLoader, EvaluationLoader
from stateset_lightning.data.order import Curriculum
from stateset_lightning.data.prompts import PromptEncoder, first_row, special_tokens
from stateset_lightning.data.shapes import RowOptions
from stateset_lightning.data.sources import Source, read_split

__all__ = ["Curriculum", "EpisodeLoader", "EvaluationLoader", "PromptEncoder", "RowOptions", "Source", "read_split"]
__all__ += ["first_row", "special_tokens"]
