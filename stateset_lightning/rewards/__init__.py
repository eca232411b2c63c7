"""Completions -> scores: the reward interface, built-in rewards, the scorer."""

from stateset_lightning.rewards.base import BatchReward, RewardFunction, RewardResult
from stateset_lightning.rewards.code import CodeReward
from stateset_lightning.rewards.environment import EnvironmentReward
from stateset_lightning.rewards.functions import FunctionReward, TRLReward
from stateset_lightning.rewards.group import GroupReward, RelativeLength
from stateset_lightning.rewards.helpfulness import HelpfulnessReward
from stateset_lightning.rewards.judge import ModelJudge, RelativeJudge
from stateset_lightning.rewards.match import Contains, ExactMatch, FormatReward, JsonValid, RegexMatch
from stateset_lightning.rewards.maths import MathEquivalence
from stateset_lightning.rewards.models import EmbeddingSimilarity, RewardModel
from stateset_lightning.rewards.numeric import NumericAnswer
from stateset_lightning.rewards.penalties import LengthPenalty, OverlongPenalty, RepetitionPenalty
from stateset_lightning.rewards.reasoning_gym import ReasoningGymReward
from stateset_lightning.rewards.reward_list import Reward, as_rewards
from stateset_lightning.rewards.scorer import Scorer, ScoringSession, failure_counts

__all__ = ["BatchReward", "CodeReward", "Contains", "EmbeddingSimilarity", "EnvironmentReward", "ExactMatch"]
__all__ += ["FormatReward", "FunctionReward", "GroupReward", "HelpfulnessReward", "JsonValid", "LengthPenalty"]
__all__ += ["MathEquivalence", "ModelJudge", "NumericAnswer", "OverlongPenalty", "ReasoningGymReward"]
__all__ += ["RegexMatch", "RelativeJudge", "RelativeLength", "RepetitionPenalty", "Reward", "RewardFunction"]
__all__ += ["RewardModel", "RewardResult", "Scorer", "ScoringSession", "TRLReward", "as_rewards", "failure_counts"]
