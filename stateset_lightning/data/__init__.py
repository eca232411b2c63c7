"""A row becomes a `PromptBatch`: reading, scenarios, sources, prompts, order, loader.

`stateset_lightning.datamodule` puts them together. What needs torch or transformers is imported from its own file:
files are looked at before these are imported.
"""

from stateset_lightning.data.shapes import RowOptions
from stateset_lightning.data.sources import Source, read_split

__all__ = ["RowOptions", "Source", "read_split"]
