"""A completion gets an answer: conversations of several turns, tools, and users' environments."""

from stateset_lightning.environments.adapters import Driver, Settings, as_environment
from stateset_lightning.environments.base import Environment, EnvironmentFailure, Opening, Reply
from stateset_lightning.environments.tools import Tools

__all__ = ["Driver", "Environment", "EnvironmentFailure", "Opening", "Reply", "Settings", "Tools", "as_environment"]
