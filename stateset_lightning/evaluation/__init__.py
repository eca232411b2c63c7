"""Held-out completions become numbers: means over prompts, estimates from several samples, and their intervals."""

from stateset_lightning.evaluation.config import EvaluationConfig
from stateset_lightning.evaluation.evaluation import Evaluation

__all__ = ["Evaluation", "EvaluationConfig"]
