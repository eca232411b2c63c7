"""A row becomes a `PromptBatch`: reading, scenarios, sources, prompts, order, loader.

`stateset_lightning.datamodule` puts them together.
"""

# `X as X`: this is exported, to type checkers as well (PEP 484).
from stateset_lightning.data.loader import EpisodeLoader as EpisodeLoader
from stateset_lightning.data.loader import EvaluationLoader as EvaluationLoader
from stateset_lightning.data.order import Curriculum as Curriculum
from stateset_lightning.data.prompts import PromptEncoder as PromptEncoder
from stateset_lightning.data.prompts import special_tokens as special_tokens
from stateset_lightning.data.sources import Source as Source
from stateset_lightning.data.sources import read_split as read_split
