"""A completion gets an answer: conversations of several turns, tools, and users' environments."""

from stateset_lightning.environments.base import Environment, EnvironmentFailure, Reply
from stateset_lightning.environments.scripted_user import ScriptedUser
from stateset_lightning.environments.simulated_user import SimulatedUser

__all__ = ["Environment", "EnvironmentFailure", "Reply", "ScriptedUser", "SimulatedUser"]
