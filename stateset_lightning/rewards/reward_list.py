"""What a user gives as `model.reward` -> a list of `RewardFunction`s with unique names, checked."""

import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

from stateset_lightning.errors import ConfigError
from stateset_lightning.rewards.base import BatchReward, RewardFunction
from stateset_lightning.rewards.functions import FunctionReward, TRLReward, is_list_function
from stateset_lightning.rewards.group import GroupReward

# What is accepted as a reward: a list of `RewardFunction`s and functions, or one of them. In this order: jsonargparse
# tries the members from the left; it could not save a config with the callable first.
Reward = list[RewardFunction | Callable[..., Any]] | RewardFunction | Callable[..., Any]


def as_rewards(reward: Any) -> list[RewardFunction]:
    """Turn what a user gave as reward into a list of `RewardFunction`s with unique names.

    A name that is taken gets `_2`, `_3`, ... appended; it is set on the reward itself.

    Args:
        reward: A `RewardFunction`, a function as `FunctionReward` takes it, or a list of these.

    Raises:
        ConfigError: If it is something else, empty, contains one object twice, or a weight, name or time-out is
            unusable.
    """
    given = list(reward) if isinstance(reward, list | tuple) else [reward]
    if not given:
        raise ConfigError("reward=[] is empty: give at least one reward, such as rewards.ExactMatch()")
    rewards = [_as_reward(item) for item in given]
    if not any(item.weight for item in rewards):
        raise ConfigError(f"all rewards have weight 0 ({', '.join(r.name for r in rewards)}): nothing would be trained")
    if len({id(item) for item in rewards}) < len(rewards):
        raise ConfigError("the same reward object stands twice in the list; make a second one, or raise its weight")
    names = [item.name for item in rewards]
    for i, item in enumerate(rewards):
        if item.name in names[:i]:
            numbered = (f"{item.name}_{count}" for count in itertools.count(2))
            names[i] = item.name = next(name for name in numbered if name not in names)
    others = [item.name for item in rewards if not isinstance(item, GroupReward)]
    for item in rewards:
        if isinstance(item, GroupReward) and (absent := sorted(set(item.reads).difference(others))):
            has = ", ".join(others) or "no other reward"
            raise ConfigError(f"reward '{item.name}' reads the scores of {absent[0]}, but there is {has}")
    return rewards


def _as_reward(item: Any) -> RewardFunction:
    if isinstance(item, type):
        raise ConfigError(f"reward {item.__name__} is a class; give an instance: {item.__name__}()")
    if not isinstance(item, RewardFunction):
        if not callable(item):
            accepted = "a RewardFunction, a function f(turns, context), or a list of these"
            given = f"reward={item!r} ({type(item).__name__}) is no reward"
            raise ConfigError(f"{given}; accepted are {accepted} (in YAML: class_path and init_args)")
        item = TRLReward(item) if is_list_function(item) else FunctionReward(item)
    if item.name is None:  # a dataclass whose own __post_init__ does not call ours
        item.name = type(item).name
    _check(item)
    return item


def _check(reward: RewardFunction) -> None:
    name, weight, timeout = reward.name, reward.weight, reward.timeout
    if not isinstance(name, str) or not name:
        raise ConfigError(f"name={name!r} of {type(reward).__name__} must be a non-empty string")
    if not (_is_number(weight) and abs(weight) <= 1e30):  # times the largest score, and summed, it is still finite
        raise ConfigError(f"weight={weight!r} of reward '{name}' must be a finite number, at most 1e+30")
    if timeout is not None and not (_is_number(timeout) and 0 < timeout < math.inf):
        raise ConfigError(f"timeout={timeout!r} of reward '{name}' must be a positive number of seconds, or None")
    if isinstance(reward, BatchReward) and timeout is not None:
        raise ConfigError(f"timeout={timeout} of reward '{name}', which scores a whole batch: leave it out")
    if isinstance(reward, FunctionReward):
        return
    takes = ("conversations", "context", "scores") if isinstance(reward, GroupReward) else ("turns", "context")
    call = reward.compute_rewards if isinstance(reward, GroupReward) else reward.compute_reward
    try:
        inspect.signature(call).bind(*takes)
    except TypeError as error:
        given = f"{call.__name__}{inspect.signature(call)}"
        raise ConfigError(f"reward '{name}' must accept ({', '.join(takes)}), but has {given}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
