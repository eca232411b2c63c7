"""A prompt becomes completions: what an engine is, one in this process, one on vLLM servers, and a teacher on such."""

from stateset_lightning.rollout.engine import OnFinished, RemoteEngine, RolloutConfig, RolloutEngine
from stateset_lightning.rollout.in_process import InProcessEngine
from stateset_lightning.rollout.targets import Targets
from stateset_lightning.rollout.vllm import VLLMEngine
from stateset_lightning.rollout.vllm_teacher import VLLMTeacher
from stateset_lightning.types import FinishReason, Rollout

__all__ = ["FinishReason", "InProcessEngine", "OnFinished", "RemoteEngine", "Rollout", "RolloutConfig"]
__all__ += ["RolloutEngine", "Targets", "VLLMEngine", "VLLMTeacher"]
