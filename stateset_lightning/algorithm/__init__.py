"""Scores -> loss: advantages, policy losses, KL, aggregation. Pure torch; no Lightning, no transformers."""

from stateset_lightning.algorithm.algorithm import Algorithm
from stateset_lightning.algorithm.clipped_presets import (
    BNPO,
    DAPO,
    GDPO,
    GRPO,
    Clipped,
    DrGRPO,
    PassK,
    ReinforcePlusPlusBaseline,
    TopEntropy,
)
from stateset_lightning.algorithm.ratio_presets import CISPO, DPPO, SAPO, ClipCov, KLCov
from stateset_lightning.algorithm.reinforce_presets import OPO, RLOO, MaxRL, ReMax
from stateset_lightning.algorithm.sequence_presets import DRO, GMPO, GSPO, LUSPO, GSPOToken
from stateset_lightning.algorithm.terms import KL, AdaptiveEntropy, Mismatch
from stateset_lightning.types import TokenBatch

__all__ = [
    "BNPO",
    "CISPO",
    "DAPO",
    "DPPO",
    "DRO",
    "GDPO",
    "GMPO",
    "GRPO",
    "GSPO",
    "KL",
    "LUSPO",
    "OPO",
    "RLOO",
    "SAPO",
    "AdaptiveEntropy",
    "Algorithm",
    "ClipCov",
    "Clipped",
    "DrGRPO",
    "GSPOToken",
    "KLCov",
    "MaxRL",
    "Mismatch",
    "PassK",
    "ReMax",
    "ReinforcePlusPlusBaseline",
    "TokenBatch",
    "TopEntropy",
]
