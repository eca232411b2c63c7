"""The reward that an environment gives."""

from typing import Any

from stateset_lightning.errors import RewardError
from stateset_lightning.rewards.base import Context, RewardFunction, Turns


class EnvironmentReward(RewardFunction):
    """What the environment of a conversation gives: its `get_reward`, or what became of its turns' rewards.

    It does not apply where the environment gives none. A conversation that its limits cut off before the environment
    gave any has 0: it was the model that did not come to an end.

    Args:
        **common: `weight`, `name` and `timeout` of every reward.

    Raises:
        RewardError: If no environment answers completions (`model.environment`).
    """

    def compute_reward(self, turns: Turns, context: Context = None) -> Any:
        if context is None or "environment_reward" not in context:
            raise RewardError("there is no environment whose reward this could be: set model.environment")
        reward = context["environment_reward"]
        return 0.0 if reward is None and context["ended_by"] in ("length", "tokens") else reward
