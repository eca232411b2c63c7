"""Measures of a policy on held-out scenarios, as torchmetrics."""

from stateset_lightning.evaluation.rewards import RewardMeans

__all__ = ["RewardMeans"]
