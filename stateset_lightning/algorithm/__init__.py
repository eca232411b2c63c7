"""Scores become a loss: advantages, policy losses, KL, aggregation. Pure torch; no Lightning, no transformers."""

from stateset_lightning.algorithm.algorithm import Algorithm, fixed
from stateset_lightning.algorithm.distillation import GKD, Distillation, OnPolicyDistillation
from stateset_lightning.algorithm.presets import (
    BNPO,
    CISPO,
    DAPO,
    DPPO,
    GDPO,
    GRPO,
    OPO,
    RLOO,
    SAPO,
    ClipCov,
    Clipped,
    DrGRPO,
    KLCov,
    MaxRL,
    PassK,
    ReinforcePlusPlusBaseline,
    ReMax,
    TopEntropy,
)
from stateset_lightning.algorithm.sequence_presets import DRO, GMPO, GSPO, LUSPO, GSPOToken
from stateset_lightning.algorithm.terms import KL, AdaptiveEntropy, Mismatch
from stateset_lightning.types import TokenBatch

__all__ = ["BNPO", "CISPO", "DAPO", "DPPO", "DRO", "AdaptiveEntropy", "Algorithm", "ClipCov", "Clipped", "DrGRPO"]
__all__ += ["GDPO", "GMPO", "GRPO", "GSPO", "KL", "LUSPO", "OPO", "GSPOToken", "KLCov", "MaxRL", "Mismatch", "PassK"]
__all__ += ["GKD", "Distillation", "OnPolicyDistillation"]
__all__ += ["RLOO", "SAPO", "ReMax", "ReinforcePlusPlusBaseline", "TokenBatch", "TopEntropy", "fixed"]
