"""What a reward is: a function of a conversation that ends in a completion, with a weight, a name and a time-out.

A reward returns a number (`float`, `int`, `bool`, or a numpy or torch scalar), a `RewardResult`, or None for "does not
apply to this completion". Whatever else it does (it raises, takes too long, returns NaN, infinity or something that is
no number) fails the completion: a failure is never a score of zero.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stateset_lightning.errors import ConfigError
from stateset_lightning.types import Turn


@dataclass
class RewardResult:
    """A score with its parts.

    Attributes:
        score: The reward of the completion; any finite number.
        breakdown: Named parts of the score, for logs and sample tables. They do not enter the score.
        metadata: Anything else; kept by nobody.
    """

    score: float
    breakdown: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


class RewardFunction(ABC):
    """Base of all rewards: subclass it and write `compute_reward`, as `def` or `async def`.

    A subclass may define its own `__init__` without calling this one: the defaults are class attributes.

    Args:
        weight: Factor of this reward in a completion's total. 0 holds it out: it is scored and shown, and neither its
            scores nor its failures touch the training. Beside the trained ones it tells a better answer from a reward
            that has been gamed.
        name: Name in logs and in a scenario's `rewards` column; by default the class name in snake case, without
            `Reward`.
        timeout: Seconds that one completion may take; None means no limit of its own. A `def` reward with a time-out
            runs in a worker process that can be killed, so it must be picklable, and what it stores on itself stays in
            that process. An `async def` reward is cancelled at its next `await`: one that blocks (`time.sleep`, a slow
            regular expression) cannot be stopped and holds up all other async rewards, so write blocking work as plain
            `def`.
    """

    weight: float = 1.0
    timeout: float | None = None
    _name: str | None = None

    def __init__(self, *, weight: float = 1.0, name: str | None = None, timeout: float | None = None) -> None:
        self.weight = weight
        self.timeout = timeout
        self._name = name

    @property
    def name(self) -> str:
        """Name in logs and in a scenario's `rewards` column."""
        return self._name or snake_case(type(self).__name__)

    @name.setter
    def name(self, name: str) -> None:
        self._name = name

    @abstractmethod
    def compute_reward(self, turns: Sequence[Turn], context: Mapping[str, Any] | None = None) -> Any:
        """Score the conversation's last turn.

        Args:
            turns: The conversation; the last turn is the completion.
            context: All columns of the scenario (`target`, ...), and `completion_tokens`, the completion's number of
                tokens.

        Returns:
            A number, a `RewardResult`, or None if this reward does not apply.
        """

    def take_counts(self) -> Mapping[str, float]:
        """What this reward has counted since the last call (tokens bought, say): logged as `cost/<name>/<key>`, added
        up over ranks.
        """
        return {}


class BatchReward(RewardFunction):
    """A reward that scores many completions in one call, such as a model: subclass it and write `compute_rewards`.

    It is called once per episode, when all completions are sampled, in their order. Batches that fill up as completions
    finish would differ from run to run, and with them the last digits of the scores; and the model would compete with
    decoding for the device. It runs in the training process and cannot be stopped, so it has no time-out.
    """

    device: Any = "cpu"
    """The policy's device; set before each call."""

    @abstractmethod
    def compute_rewards(
        self, conversations: Sequence[Sequence[Turn]], contexts: Sequence[Mapping[str, Any]]
    ) -> Sequence[Any]:
        """Score the last turn of each conversation.

        Returns:
            One item per conversation: what `compute_reward` may return, or an exception, which fails this completion
            alone. What is raised fails all of them; a `ConfigError` ends the run.
        """

    def compute_reward(self, turns: Sequence[Turn], context: Mapping[str, Any] | None = None) -> Any:
        (output,) = self.compute_rewards([turns], [context or {}])
        if isinstance(output, Exception):
            raise output
        return output


class FunctionReward(RewardFunction):
    """A plain function `f(turns, context)`, sync or async, as a reward.

    Args:
        function: The function; it returns what `RewardFunction.compute_reward` may return.
        weight: Factor of this reward in a completion's total.
        name: Name in logs; by default the function's.
        timeout: Seconds that one completion may take.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        weight: float = 1.0,
        name: str | None = None,
        timeout: float | None = None,
    ) -> None:
        super().__init__(weight=weight, name=name or _function_name(function), timeout=timeout)
        self.function = function

    def compute_reward(self, turns: Sequence[Turn], context: Mapping[str, Any] | None = None) -> Any:
        return self.function(turns, context)


LARGEST_WEIGHT = 1e30
"""Times the largest score, and added up over rewards, this is still a finite total."""

# In this order: jsonargparse tries the members from the left, and could not save a config with the callable first.
Reward = list[RewardFunction] | RewardFunction | Callable[..., Any]
"""What is accepted as a reward: a list of `RewardFunction`s, one of them, or a function `f(turns, context)` or of TRL's
kind.
"""


def as_rewards(reward: Any) -> list[RewardFunction]:
    """Turn what a user gave as reward into a list of `RewardFunction`s with unique names.

    A name that is taken gets `_2`, `_3`, ... appended; it is set on the reward itself.

    Args:
        reward: A `RewardFunction`, a function `f(turns, context)` or `f(prompts, completions, **columns)` as TRL's, or
            a list of these.

    Raises:
        ConfigError: If it is something else, empty, contains one object twice, or a weight, name or time-out is
            unusable.
    """
    given = list(reward) if isinstance(reward, list | tuple) else [reward]
    if not given:
        raise ConfigError(
            "reward=[] is empty: give at least one reward, such as stateset_lightning.rewards.ExactMatch()"
        )
    rewards = [_as_reward(item) for item in given]
    if not any(item.weight for item in rewards):
        raise ConfigError(
            f"all rewards have weight 0 ({', '.join(item.name for item in rewards)}): nothing would be trained"
        )
    if len({id(item) for item in rewards}) < len(rewards):
        raise ConfigError(
            "the same reward object stands twice in the list; construct a second one, or raise its weight"
        )
    taken: set[str] = set()
    explicit = {item.name for item in rewards}
    for item in rewards:
        if item.name in taken:
            name, count = item.name, 2
            while f"{name}_{count}" in explicit | taken:
                count += 1
            item.name = f"{name}_{count}"
        taken.add(item.name)
    return rewards


def is_async(reward: RewardFunction) -> bool:
    """Whether the reward, or the one that it wraps, is written as `async def` (a `def` that returns an awaitable is
    not).
    """
    while isinstance(inner := getattr(reward, "wrapped", None), RewardFunction):
        reward = inner
    call = reward.function if isinstance(reward, FunctionReward) else reward.compute_reward
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(
        getattr(call, "__call__", None)  # noqa: B004
    )


def snake_case(class_name: str) -> str:
    """`JSONValidReward` -> `json_valid`."""
    words = re.sub(
        r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", class_name.removesuffix("Reward") or class_name
    )
    return words.strip("_").lower()


def check_timeout(key: str, timeout: float | None) -> None:
    """Raise ConfigError unless `timeout` is None or a positive, finite number of seconds."""
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
        raise ConfigError(f"{key}={timeout!r} must be a positive number of seconds, or None for no limit")


def _as_reward(item: Any) -> RewardFunction:
    if isinstance(item, type):
        raise ConfigError(f"reward {item.__name__} is a class; give an instance: {item.__name__}()")
    if not isinstance(item, RewardFunction):
        if not callable(item):
            raise ConfigError(
                f"reward={item!r} ({type(item).__name__}) is no reward; accepted are a RewardFunction, a function "
                "f(turns, context), or a list of these (in YAML: class_path and init_args)"
            )
        from stateset_lightning.rewards.trl import TRLReward, is_trl_function  # here, since it builds on this file

        item = TRLReward(item) if is_trl_function(item) else FunctionReward(item)
    _check(item)
    return item


def _check(reward: RewardFunction) -> None:
    name, weight = reward.name, reward.weight
    if not isinstance(name, str) or not name:
        raise ConfigError(f"name={name!r} of {type(reward).__name__} must be a non-empty string")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) <= LARGEST_WEIGHT:
        raise ConfigError(f"weight={weight!r} of reward '{name}' must be a finite number, at most {LARGEST_WEIGHT:g}")
    check_timeout(f"timeout of reward '{name}'", reward.timeout)
    if isinstance(reward, BatchReward) and reward.timeout is not None:
        raise ConfigError(
            f"timeout={reward.timeout} of reward '{name}': it scores a whole batch in the training process; leave"
            " it out"
        )
    call = reward.function if type(reward) is FunctionReward else reward.compute_reward
    try:
        signature = inspect.signature(call)
    except ValueError:  # some builtins have none; calling them tells
        return
    try:
        signature.bind([], {})
    except TypeError as error:
        raise ConfigError(
            f"reward '{name}' must accept two arguments, (turns, context), but is {name}{signature}: {error}"
        ) from error


def _function_name(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", None) or snake_case(type(function).__name__)
    return "function" if name == "<lambda>" else name
