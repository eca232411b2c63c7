"""Measures of a policy on held-out scenarios, as torchmetrics."""

from stateset_lightning.evaluation.config import EvaluationConfig
from stateset_lightning.evaluation.estimators import majority, pass_at_k, pass_hat_k, wilson_interval
from stateset_lightning.evaluation.evaluation import Evaluation
from stateset_lightning.evaluation.means import PromptMeans, RewardMeans

__all__ = [
    "Evaluation",
    "EvaluationConfig",
    "PromptMeans",
    "RewardMeans",
    "majority",
    "pass_at_k",
    "pass_hat_k",
    "wilson_interval",
]
