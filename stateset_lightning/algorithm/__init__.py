"""Scores become a loss: advantages, policy losses, KL, aggregation. Pure torch; no Lightning, no transformers."""

from stateset_lightning.algorithm import presets, sequence_presets
from stateset_lightning.algorithm.algorithm import Algorithm, fixed
from stateset_lightning.algorithm.presets import *  # noqa: F403 (the presets' names stand in the files' `__all__`)
from stateset_lightning.algorithm.sequence_presets import *  # noqa: F403
from stateset_lightning.algorithm.terms import KL, AdaptiveEntropy, Mismatch
from stateset_lightning.types import TokenBatch

__all__ = ["KL", "AdaptiveEntropy", "Algorithm", "Mismatch", "TokenBatch", "fixed"]
__all__ += presets.__all__
__all__ += sequence_presets.__all__
