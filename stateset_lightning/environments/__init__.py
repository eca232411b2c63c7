"""A completion gets an answer: conversations of several turns, tools, and users' environments."""

from stateset_lightning.environments.adapters import Driver, Settings, as_environment
from stateset_lightning.environments.base import Environment, EnvironmentFailure, Opening, Reply
from stateset_lightning.environments.config import EnvironmentConfig
from stateset_lightning.environments.scripted_user import ScriptedUser
from stateset_lightning.environments.simulated_user import SimulatedUser
from stateset_lightning.environments.tools import Tools

__all__ = ["Driver", "Environment", "EnvironmentConfig", "EnvironmentFailure", "Opening", "Reply"]
__all__ += ["ScriptedUser", "Settings", "SimulatedUser", "Tools", "as_environment"]
