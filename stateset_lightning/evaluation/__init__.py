"""Held-out completions become numbers: means over prompts, estimates from several samples, and their intervals."""

from stateset_lightning.evaluation.config import EvaluationConfig
from stateset_lightning.evaluation.estimators import majority, pass_at_k, pass_hat_k, wilson_interval
from stateset_lightning.evaluation.evaluation import Evaluation
from stateset_lightning.evaluation.means import PromptMeans

__all__ = [
    "Evaluation",
    "EvaluationConfig",
    "PromptMeans",
    "majority",
    "pass_at_k",
    "pass_hat_k",
    "wilson_interval",
]
