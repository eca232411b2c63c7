"""Scores -> loss: advantages, policy losses, KL, aggregation. Pure torch; no Lightning, no transformers."""

from stateset_lightning.algorithm.base import Algorithm
from stateset_lightning.algorithm.presets import BNPO, DAPO, GRPO, DrGRPO
from stateset_lightning.types import TokenBatch

__all__ = ["BNPO", "DAPO", "GRPO", "Algorithm", "DrGRPO", "TokenBatch"]
