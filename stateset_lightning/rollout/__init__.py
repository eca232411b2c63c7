"""A prompt becomes completions: what an engine is, the engine in this process, and the one on vLLM servers."""

# `X as X`: this is exported, to type checkers as well (PEP 484).
from stateset_lightning.rollout.engine import OnFinished as OnFinished
from stateset_lightning.rollout.engine import RemoteEngine as RemoteEngine
from stateset_lightning.rollout.engine import RolloutConfig as RolloutConfig
from stateset_lightning.rollout.engine import RolloutEngine as RolloutEngine
from stateset_lightning.rollout.in_process import InProcessEngine as InProcessEngine
from stateset_lightning.rollout.vllm import VLLMEngine as VLLMEngine
from stateset_lightning.types import FinishReason as FinishReason
from stateset_lightning.types import Rollout as Rollout
