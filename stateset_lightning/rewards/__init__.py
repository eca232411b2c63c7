"""Completions -> scores: the reward interface, built-in rewards, the scorer."""

from stateset_lightning.rewards.base import (
    BatchReward,
    FunctionReward,
    Reward,
    RewardFunction,
    RewardResult,
    as_rewards,
)
from stateset_lightning.rewards.format import FormatReward, JsonValid
from stateset_lightning.rewards.helpfulness import HelpfulnessReward
from stateset_lightning.rewards.judge import ModelJudge
from stateset_lightning.rewards.match import Contains, ExactMatch, RegexMatch
from stateset_lightning.rewards.maths import MathEquivalence
from stateset_lightning.rewards.models import EmbeddingSimilarity, RewardModel
from stateset_lightning.rewards.numeric import NumericAnswer
from stateset_lightning.rewards.penalties import LengthPenalty, OverlongPenalty, RepetitionPenalty
from stateset_lightning.rewards.reasoning_gym import ReasoningGymReward
from stateset_lightning.rewards.scorer import Scorer, ScoringSession, check_failures, failure_counts
from stateset_lightning.rewards.trl import TRLReward

__all__ = [
    "BatchReward",
    "Contains",
    "EmbeddingSimilarity",
    "ExactMatch",
    "FormatReward",
    "FunctionReward",
    "HelpfulnessReward",
    "JsonValid",
    "LengthPenalty",
    "MathEquivalence",
    "ModelJudge",
    "NumericAnswer",
    "OverlongPenalty",
    "ReasoningGymReward",
    "RegexMatch",
    "RepetitionPenalty",
    "Reward",
    "RewardFunction",
    "RewardModel",
    "RewardResult",
    "Scorer",
    "ScoringSession",
    "TRLReward",
    "as_rewards",
    "check_failures",
    "failure_counts",
]
