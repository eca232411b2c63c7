"""Scores become a loss: advantages, policy losses, KL, aggregation. Pure torch; no Lightning, no transformers."""

from stateset_lightning.algorithm.algorithm import Algorithm, fixed
from stateset_lightning.algorithm.distillation import GKD, OnPolicyDistillation
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
    ReinforcePlusPlus,
    ReinforcePlusPlusBaseline,
    ReMax,
    TopEntropy,
)
from stateset_lightning.algorithm.sequence_presets import DRO, GMPO, GSPO, LUSPO, VESPO, GSPOToken
from stateset_lightning.algorithm.supervised import RAFT, Supervised
from stateset_lightning.algorithm.terms import KL, AdaptiveEntropy, Mismatch
from stateset_lightning.types import TokenBatch

__all__ = ["BNPO", "CISPO", "DAPO", "DPPO", "DRO", "AdaptiveEntropy", "Algorithm", "ClipCov", "Clipped", "DrGRPO"]
__all__ += ["GDPO", "GKD", "GMPO", "GRPO", "GSPO", "KL", "LUSPO", "OPO", "GSPOToken", "KLCov", "MaxRL", "Mismatch"]
__all__ += ["RAFT", "RLOO", "SAPO", "VESPO", "OnPolicyDistillation", "PassK", "ReMax", "ReinforcePlusPlus"]
__all__ += ["ReinforcePlusPlusBaseline", "Supervised", "TokenBatch", "TopEntropy", "fixed"]
