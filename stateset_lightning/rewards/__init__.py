"""Completions -> scores: the reward interface, built-in rewards, the scorer."""

from typing import Any

from stateset_lightning.rewards.base import BatchReward, FunctionReward, RewardFunction, RewardResult
from stateset_lightning.rewards.code import CodeReward
from stateset_lightning.rewards.helpfulness import HelpfulnessReward
from stateset_lightning.rewards.judge import ModelJudge
from stateset_lightning.rewards.match import Contains, ExactMatch, FormatReward, JsonValid, RegexMatch
from stateset_lightning.rewards.maths import MathEquivalence
from stateset_lightning.rewards.models import EmbeddingSimilarity, RewardModel
from stateset_lightning.rewards.numeric import NumericAnswer
from stateset_lightning.rewards.penalties import LengthPenalty, OverlongPenalty, RepetitionPenalty
from stateset_lightning.rewards.reasoning_gym import ReasoningGymReward
from stateset_lightning.rewards.reward_list import Reward, as_rewards
from stateset_lightning.rewards.scorer import Scorer, ScoringSession, check_failures, failure_counts
from stateset_lightning.rewards.trl import TRLReward

__all__ = ["BatchReward", "CodeReward", "Contains", "EmbeddingSimilarity", "ExactMatch", "FormatReward"]
__all__ += ["FunctionReward", "HelpfulnessReward", "JsonValid", "LengthPenalty", "MathEquivalence", "ModelJudge"]
__all__ += ["NumericAnswer", "OverlongPenalty", "ReasoningGymReward", "RegexMatch", "RepetitionPenalty", "Reward"]
__all__ += ["RewardFunction", "RewardModel", "RewardResult", "Scorer", "ScoringSession", "TRLReward", "as_rewards"]
__all__ += ["check_failures", "failure_counts"]


def __getattr__(name: str) -> Any:
    if name == "Retry":  # as ImportError, the only one whose text `from ... import` shows
        raise ImportError(
            "stateset_lightning.rewards.Retry is gone: ModelJudge retries by itself (max_retries); in a reward of your"
            " own, wrap the call, with the library tenacity for example"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
