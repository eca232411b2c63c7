"""Run one reward on one completion and say what came out: a value or a failure.

This is the only place that catches exceptions of rewards. It runs on threads, on the event loop and in worker
processes.
"""

from __future__ import annotations

import inspect
import math
import os
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from stateset_lightning.errors import ConfigError, RewardError
from stateset_lightning.redaction import redacted_text
from stateset_lightning.rewards.base import BatchReward, RewardFunction, RewardResult
from stateset_lightning.types import NOT_APPLICABLE, Turn

LARGEST_SCORE = 3.4028234e38
"""Scores beyond float32's range turn into infinities in the arithmetic that follows."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one reward made of one completion.

    `value` is its score, `NOT_APPLICABLE`, or NaN after a failure; then `error` names the exception's type.
    """

    value: float
    breakdown: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    message: str = ""
    traceback: str = ""


def evaluate(
    reward: RewardFunction,
    turns: Sequence[Turn],
    context: Mapping[str, Any],
    run_coroutine: Callable[[Coroutine[Any, Any, Outcome]], Outcome],
) -> Outcome:
    """Call a blocking reward. If it returns an awaitable, `run_coroutine` completes it."""
    with _no_second_return():
        try:
            output = reward.compute_reward(turns, context)
            return run_coroutine(complete(output)) if inspect.isawaitable(output) else to_outcome(output)
        # SystemExit: code under test may call exit(), which must not end the run
        except (Exception, SystemExit) as error:
            return failure(error)


def evaluate_batch(
    reward: BatchReward, conversations: Sequence[Sequence[Turn]], contexts: Sequence[Mapping[str, Any]]
) -> list[Outcome]:
    """Call a batched reward.

    Raises:
        ConfigError: The reward's own: its model cannot be loaded, say.
    """
    try:
        outputs = list(reward.compute_rewards(conversations, contexts))
        if len(outputs) != len(conversations):
            raise RewardError(
                f"reward '{reward.name}' returned {len(outputs)} scores for {len(conversations)} completions"
            )
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        return [failure(error)] * len(conversations)
    return [_item(output) for output in outputs]


async def evaluate_async(reward: RewardFunction, turns: Sequence[Turn], context: Mapping[str, Any]) -> Outcome:
    """Call an async reward."""
    try:
        awaitable = reward.compute_reward(turns, context)
    except Exception as error:  # the call itself failed, before anything ran
        return failure(error)
    return await complete(awaitable)


async def complete(awaitable: Awaitable[Any]) -> Outcome:
    """Await what a reward returned."""
    with _no_second_return():
        try:
            return to_outcome(await awaitable)
        except (Exception, SystemExit) as error:  # SystemExit would end the event loop
            return failure(error)


def to_outcome(output: Any) -> Outcome:
    """Read what a reward returned.

    Raises:
        RewardError: If it is neither a finite number, nor a `RewardResult` with one, nor None.
    """
    if output is None:
        return Outcome(NOT_APPLICABLE)
    if not isinstance(output, RewardResult):
        return Outcome(_finite(output))
    if output.score is None:
        raise RewardError("RewardResult.score is None; return None itself to say that the reward does not apply")
    return Outcome(_finite(output.score), dict(output.breakdown or {}))


def _item(output: Any) -> Outcome:
    if isinstance(output, Exception):
        return failure(output)
    try:
        return to_outcome(output)
    except RewardError as error:
        return failure(error)


def failure(error: BaseException) -> Outcome:
    """The outcome of a reward that raised `error`."""
    try:
        message = redacted_text(str(error))
    except Exception:  # an exception of the reward's own may fail to print
        message = "(its message could not be printed)"
    return Outcome(
        math.nan, {}, type(error).__name__, message, redacted_text("".join(traceback.format_exception(error)))
    )


@contextmanager
def _no_second_return() -> Iterator[None]:
    """Ends the child of a reward that forked and let the child come back too: it would go on as a second trainer, or
    answer twice.
    """
    process = os.getpid()
    try:
        yield
    finally:
        if os.getpid() != process:
            os._exit(0)


def _finite(value: Any) -> float:
    """A float from a number-like value. A string is no number: `float("nan")` and `float("1_0")` would both succeed."""
    if isinstance(value, str | bytes | bytearray):
        raise RewardError(f"the reward returned the {type(value).__name__} {value[:80]!r}, which is no number")
    try:
        number = float(value)
    # torch raises RuntimeError for several elements
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise RewardError(
            f"the reward returned {repr(value)[:80]} ({type(value).__name__}), which is no finite number"
        ) from error
    if not math.isfinite(number) or abs(number) > LARGEST_SCORE:
        raise RewardError(f"the reward returned {number}, which is no finite float32 number")
    return number
