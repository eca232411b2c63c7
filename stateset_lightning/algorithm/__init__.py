"""Scores become a loss: advantages, policy losses, KL, aggregation. Pure torch; no Lightning, no transformers."""

# `X as X`: this is exported, to type checkers as well (PEP 484).
from stateset_lightning.algorithm.algorithm import Algorithm as Algorithm
from stateset_lightning.algorithm.algorithm import fixed as fixed
from stateset_lightning.algorithm.algorithm import preset as preset
from stateset_lightning.algorithm.presets import BNPO as BNPO
from stateset_lightning.algorithm.presets import CISPO as CISPO
from stateset_lightning.algorithm.presets import DAPO as DAPO
from stateset_lightning.algorithm.presets import DPPO as DPPO
from stateset_lightning.algorithm.presets import GDPO as GDPO
from stateset_lightning.algorithm.presets import GRPO as GRPO
from stateset_lightning.algorithm.presets import OPO as OPO
from stateset_lightning.algorithm.presets import RLOO as RLOO
from stateset_lightning.algorithm.presets import SAPO as SAPO
from stateset_lightning.algorithm.presets import ClipCov as ClipCov
from stateset_lightning.algorithm.presets import Clipped as Clipped
from stateset_lightning.algorithm.presets import DrGRPO as DrGRPO
from stateset_lightning.algorithm.presets import KLCov as KLCov
from stateset_lightning.algorithm.presets import MaxRL as MaxRL
from stateset_lightning.algorithm.presets import PassK as PassK
from stateset_lightning.algorithm.presets import ReinforcePlusPlusBaseline as ReinforcePlusPlusBaseline
from stateset_lightning.algorithm.presets import ReMax as ReMax
from stateset_lightning.algorithm.presets import TopEntropy as TopEntropy
from stateset_lightning.algorithm.sequence_presets import DRO as DRO
from stateset_lightning.algorithm.sequence_presets import GMPO as GMPO
from stateset_lightning.algorithm.sequence_presets import GSPO as GSPO
from stateset_lightning.algorithm.sequence_presets import LUSPO as LUSPO
from stateset_lightning.algorithm.sequence_presets import GSPOToken as GSPOToken
from stateset_lightning.algorithm.terms import KL as KL
from stateset_lightning.algorithm.terms import AdaptiveEntropy as AdaptiveEntropy
from stateset_lightning.algorithm.terms import Mismatch as Mismatch
from stateset_lightning.types import TokenBatch as TokenBatch
