"""A completion gets an answer: conversations of several turns, tools, and users' environments."""

from stateset_lightning.environments.base import Environment, EnvironmentFailure, Reply

__all__ = ["Environment", "EnvironmentFailure", "Reply"]
