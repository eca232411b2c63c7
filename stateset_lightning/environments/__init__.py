"""A completion gets an answer: conversations of several turns, tools, and users' environments."""

from stateset_lightning.environments.base import Environment, EnvironmentFailure, Reply
from stateset_lightning.environments.config import EnvironmentConfig
from stateset_lightning.environments.player import Player
from stateset_lightning.environments.scripted_user import ScriptedUser
from stateset_lightning.environments.simulated_user import SimulatedUser

__all__ = ["Environment", "EnvironmentConfig", "EnvironmentFailure", "Player", "Reply", "ScriptedUser", "SimulatedUser"]
