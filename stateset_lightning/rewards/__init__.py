"""Completions -> scores: the reward interface, built-in rewards, the scorer."""

from typing import Any

from stateset_lightning.rewards.base import BatchReward as BatchReward
from stateset_lightning.rewards.base import FunctionReward as FunctionReward
from stateset_lightning.rewards.base import RewardFunction as RewardFunction
from stateset_lightning.rewards.base import RewardResult as RewardResult
from stateset_lightning.rewards.helpfulness import HelpfulnessReward as HelpfulnessReward
from stateset_lightning.rewards.judge import ModelJudge as ModelJudge
from stateset_lightning.rewards.match import Contains as Contains
from stateset_lightning.rewards.match import ExactMatch as ExactMatch
from stateset_lightning.rewards.match import FormatReward as FormatReward
from stateset_lightning.rewards.match import JsonValid as JsonValid
from stateset_lightning.rewards.match import RegexMatch as RegexMatch
from stateset_lightning.rewards.maths import MathEquivalence as MathEquivalence
from stateset_lightning.rewards.models import EmbeddingSimilarity as EmbeddingSimilarity
from stateset_lightning.rewards.models import RewardModel as RewardModel
from stateset_lightning.rewards.numeric import NumericAnswer as NumericAnswer
from stateset_lightning.rewards.penalties import LengthPenalty as LengthPenalty
from stateset_lightning.rewards.penalties import OverlongPenalty as OverlongPenalty
from stateset_lightning.rewards.penalties import RepetitionPenalty as RepetitionPenalty
from stateset_lightning.rewards.reasoning_gym import ReasoningGymReward as ReasoningGymReward
from stateset_lightning.rewards.reward_list import Reward as Reward
from stateset_lightning.rewards.reward_list import as_rewards as as_rewards
from stateset_lightning.rewards.scorer import Scorer as Scorer
from stateset_lightning.rewards.scorer import ScoringSession as ScoringSession
from stateset_lightning.rewards.scorer import check_failures as check_failures
from stateset_lightning.rewards.scorer import failure_counts as failure_counts
from stateset_lightning.rewards.trl import TRLReward as TRLReward


def __getattr__(name: str) -> Any:
    if name == "Retry":  # as ImportError, the only one whose text `from ... import` shows
        raise ImportError(
            "stateset_lightning.rewards.Retry is gone: ModelJudge retries by itself (max_retries); in a reward of your"
            " own, wrap the call, with the library tenacity for example"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
