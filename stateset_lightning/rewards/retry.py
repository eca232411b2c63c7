"""Try a reward again: for judges behind a network, which fail now and then. An `async def` reward waits without
blocking anybody.
"""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
import asyncio
import builtins
import inspect
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from annotated_types import Ge, Gt

from stateset_lightning.errors import ConfigError
from stateset_lightning.rewards.interface import BatchReward, RewardFunction, as_rewards, is_async
from stateset_lightning.types import Turn


class Retry(RewardFunction):
    """Calls a reward again after certain exceptions; the last one fails the completion, as it would without retries.

    Before attempt k + 1 it waits `backoff * 2 ** (k - 1)` seconds, at most `max_wait`. Nothing here is random: calls to
    a judge are spread over time by their completions, which end at different times. The time-out, if any, covers all
    attempts and waits together.

    Args:
        reward: The reward to call. Its weight, name and time-out are those of the whole, unless they are given here.
        retries: Further attempts after the first.
        backoff: Seconds before the second attempt; each further wait is twice as long.
        max_wait: Longest wait, in seconds.
        exceptions: Names of the exception types to try again after, built in (`TimeoutError`, `ConnectionError`;
            subclasses count) or of a library, by their own or their full name (`RateLimitError`,
            `openai.RateLimitError`). Any other fails the completion at once.
        weight: Factor of this reward in a completion's total.
        name: Name in logs.
        timeout: Seconds that one completion may take, with all attempts.
    """

    def __init__(
        self,
        reward: RewardFunction,
        *,
        retries: Annotated[int, Ge(0)] = 3,
        backoff: Annotated[float, Gt(0)] = 0.5,
        max_wait: Annotated[float, Gt(0)] = 30.0,
        exceptions: Sequence[str] = ("ConnectionError", "TimeoutError"),
        weight: float | None = None,
        name: str | None = None,
        timeout: float | None = None,
    ) -> None:
        (self.wrapped,) = as_rewards(reward)
        if isinstance(self.wrapped, BatchReward):
            raise ConfigError(
                f"Retry calls a reward by completion, and '{self.wrapped.name}' scores batches: leave Retry out"
            )
        super().__init__(
            weight=self.wrapped.weight if weight is None else weight,
            name=name or self.wrapped.name,
            timeout=self.wrapped.timeout if timeout is None else timeout,
        )
        if retries < 0:
            raise ConfigError(f"retries={retries} of reward '{self.name}' must be at least 0")
        if not (backoff > 0 and max_wait > 0):
            raise ConfigError(
                f"backoff={backoff} and max_wait={max_wait} of reward '{self.name}' must be seconds above 0"
            )
        self.retries = retries
        self.backoff = backoff
        self.max_wait = max_wait
        self.exceptions = _checked(exceptions, self.name)

    def compute_reward(self, turns: Sequence[Turn], context: Mapping[str, Any] | None = None) -> Any:
        if is_async(self):
            return self._compute_async(turns, context)
        for attempt in range(self.retries + 1):
            try:
                # Own copies: an attempt that changed them before it failed must not spoil the next.
                output = self.wrapped.compute_reward(list(turns), dict(context or {}))
                # A `def` that returns an awaitable fails only when it is awaited.
                return self._compute_async(turns, context, output, attempt) if inspect.isawaitable(output) else output
            except Exception as error:
                if not self._tries_again(error, attempt):
                    raise
            time.sleep(self._wait(attempt))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def take_counts(self) -> Mapping[str, float]:
        return self.wrapped.take_counts()

    async def _compute_async(
        self, turns: Sequence[Turn], context: Mapping[str, Any] | None, awaitable: Any = None, first: int = 0
    ) -> Any:
        for attempt in range(first, self.retries + 1):
            try:
                if awaitable is None:
                    awaitable = self.wrapped.compute_reward(list(turns), dict(context or {}))
                return await awaitable
            except Exception as error:
                awaitable = None
                if not self._tries_again(error, attempt):
                    raise
            await asyncio.sleep(self._wait(attempt))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _tries_again(self, error: Exception, attempt: int) -> bool:
        names = {name for cls in type(error).__mro__ for name in (cls.__name__, f"{cls.__module__}.{cls.__qualname__}")}
        names |= {f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(error).__mro__}
        return attempt < self.retries and not names.isdisjoint(self.exceptions)

    def _wait(self, attempt: int) -> float:
        return min(self.backoff * 2.0 ** min(attempt, 60), self.max_wait)


def _checked(exceptions: Sequence[str], reward: str) -> tuple[str, ...]:
    if isinstance(exceptions, str) or not exceptions:
        raise ConfigError(
            f"exceptions={exceptions!r} of reward '{reward}' must be a list of exception names, such as"
            " [ConnectionError, TimeoutError]"
        )
    for name in exceptions:
        if not isinstance(name, str):
            raise ConfigError(
                f"exceptions of reward '{reward}' names {name!r}: write the name of the type, such as 'ConnectionError'"
            )
        known = getattr(builtins, name, None)
        if known is not None and not (isinstance(known, type) and issubclass(known, Exception)):
            raise ConfigError(
                f"exceptions of reward '{reward}' names '{name}', which is no exception that a reward may survive"
            )
    return tuple(exceptions)
