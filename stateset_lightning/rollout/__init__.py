"""Prompts -> completions: the engine interface, the in-process engine, its KV cache, sampling."""

from stateset_lightning.rollout.config import RolloutConfig
from stateset_lightning.rollout.engine import OnFinished, RolloutEngine
from stateset_lightning.rollout.in_process import InProcessEngine
from stateset_lightning.types import FinishReason, Rollout

__all__ = ["FinishReason", "InProcessEngine", "OnFinished", "Rollout", "RolloutConfig", "RolloutEngine"]
