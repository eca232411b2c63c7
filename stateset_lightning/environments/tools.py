"""Tools that a model calls: plain Python functions, and how calls of them are answered.

Each call gets one turn of the tool, in the order of the calls; what goes wrong is a line that begins with `error:`, so
that the model can do better. Functions run in this process: a tool that is not to be trusted with it belongs into a
sandbox of its own.
"""

import inspect
import json
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import Any

from pydantic import PositiveFloat

from stateset_lightning.environments.base import EnvironmentFailure, Reply, kept_for_each, signature_of
from stateset_lightning.environments.tool_calls import Call, Malformed
from stateset_lightning.errors import ConfigError, bounded, by_path, one_line, told_as
from stateset_lightning.threads import DaemonThreads, EventLoopThread
from stateset_lightning.types import Turn

CALL_COUNTS = "tool_calls", "malformed_calls", "tool_errors", "tool_timeouts"
Functions = Mapping[str, Callable[..., Any]]  # by the names that the model calls

_LOOP = EventLoopThread(10_000, "environments")


class TookTooLong(Exception):
    """A call of the user's code that has not ended in its time."""


class UserCode:
    """Runs what the user wrote, one call after another.

    Functions run always on the same thread, since some of what they use is bound to one (SQLite, a browser), and
    coroutines on an event loop. Nothing is started before the first call.

    Args:
        timeout: Seconds after which a coroutine is cancelled that is given no time of its own; None: never.
    """

    def __init__(self, timeout: float | None = None) -> None:
        self._timeout = timeout
        self._thread: DaemonThreads | None = None

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Calls a function on the thread. What that gives to `run` runs in it, too."""
        self._thread = thread = self._thread or DaemonThreads(1, "environment")
        return thread.submit(function, *args)

    def run(self, call: Callable[[], Any], timeout: float | None = None) -> tuple[Any, BaseException | None]:
        """What a call returns, and None; or None, and what it raises.

        A coroutine that takes longer than `timeout` seconds is cancelled. A function cannot be: it keeps its thread,
        its result is dropped, and later calls run on a new thread beside it.
        """
        if inspect.iscoroutinefunction(call):
            return _outcome(_LOOP.submit(call, timeout=self._timeout), timeout)
        is_here = self._thread is not None and self._thread.are_here
        result, error = outcome_of(call) if is_here else _outcome(self.submit(call), timeout)
        if isinstance(error, TookTooLong):
            self.close()
        if inspect.isawaitable(result):
            return _outcome(_LOOP.submit(lambda: result, timeout=self._timeout), timeout)
        return result, error

    def close(self) -> None:
        """Ends the thread, and leaves behind one that hangs. A later call starts another."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.close(0)


def outcome_of(call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """As `UserCode.run`, in the caller's thread."""
    try:
        return call(), None
    except BaseException as error:
        return None, error


def _outcome(future: Future[Any], timeout: float | None) -> tuple[Any, BaseException | None]:
    try:
        error = future.exception(timeout)
    except TimeoutError:  # of this wait: one that the call raised is returned
        future.cancel()
        return None, TookTooLong(f"no answer within {timeout:g} s")
    except CancelledError as cancelled:
        return None, cancelled
    return (future.result(), None) if error is None else (None, error)


@bounded("environment")
class Tools:
    """An environment of plain functions: calls are answered, and a completion without any ends the conversation.

    Args:
        functions: Functions, sync or async, or import paths of them (`my_module.add`). Each argument has a type, and a
            line in the docstring's `Args:`.
        timeout: Seconds that a call may take; None: half of `model.environment.timeout`.

    Raises:
        ConfigError: If there is no function, two have the same name, or one cannot be imported or described.
    """

    is_quick = True  # needs no thread

    def __init__(self, functions: list[Callable[..., Any] | str], timeout: PositiveFloat | None = None) -> None:
        found = [by_path(item, "environment.functions", "give module.function") for item in functions]
        names = [schema_of(function)["function"]["name"] for function in found]
        if not 0 < len(names) == len(set(names)):
            raise ConfigError(f"environment.functions={names} must be one or more functions of different names")
        self.functions = dict(zip(names, found, strict=True))
        self.timeout = timeout

    def reset(self, scenario: Mapping[str, Any], seed: int) -> None:
        """Begins a conversation; the prompt stays as it is."""

    def step(self, text: str) -> Reply:
        """Ends the conversation: a completion that calls `functions` does not come here (`Driver.step`)."""
        return Reply(done=True)


@kept_for_each
def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a tool, as chat templates take it.

    Raises:
        ConfigError: If an argument has no type or description, or the function no docstring.
    """
    from transformers.utils import get_json_schema  # slow to import

    name = getattr(function, "__qualname__", repr(function))
    must = '; write a type for each argument, and a docstring with "Args:" and a line "name: what it is" for each'
    # The library's own errors are plain exceptions, and hints may raise any.
    with told_as(ConfigError, f"tool {name} cannot be described to the model: ", after=must):
        return get_json_schema(function)


def run_tools(calls: list[Call | Malformed], functions: Functions, code: UserCode, timeout: float | None) -> Reply:
    """Answers calls, one after another.

    Args:
        calls: Of a completion, as `find_calls` gives them.
        functions: By name.
        code: What runs the functions.
        timeout: Seconds for each call; None: no limit.

    Returns:
        A turn of the tool for each call: a text as it is, else JSON. Its counts: `tool_calls` (that could be read),
        `malformed_calls`, `tool_errors` (unknown tools and wrong arguments among them) and `tool_timeouts`.

    Raises:
        EnvironmentFailure: If a tool raises it.
    """
    counts = dict.fromkeys(CALL_COUNTS, 0)
    turns = []
    for call in calls:
        if isinstance(call, Malformed):
            answer, problem = f"this tool call is malformed: {call.reason}: {call.text}", "malformed_calls"
        else:
            counts["tool_calls"] += 1
            answer, problem = _answer(call, functions, code, timeout)
        if problem:
            counts[problem] += 1
            answer = f"error: {one_line(answer)}"
        turns.append(Turn("tool", answer))
    return Reply(tuple(turns), counts=counts)


def _answer(call: Call, functions: Functions, code: UserCode, timeout: float | None) -> tuple[str, str]:
    """The answer to a call, and what it counts as, if it is an error."""
    if (function := functions.get(call.name)) is None:
        return f"there is no tool {call.name!r}, there are: {', '.join(functions)}", "tool_errors"
    signature = signature_of(function)
    try:
        signature.bind(**call.arguments)
    except TypeError as error:
        return f"{call.name} takes ({', '.join(signature.parameters)}): {error}", "tool_errors"
    result, failure = code.run(partial(function, **call.arguments), timeout)
    if failure is None:
        try:
            return _as_text(result), ""
        except Exception as error:  # of a result's own methods
            failure = error
    if isinstance(failure, EnvironmentFailure):
        raise failure
    problem = "tool_timeouts" if isinstance(failure, TookTooLong) else "tool_errors"
    return f"{type(failure).__name__}: {failure}", problem


def _as_text(result: Any) -> str:
    text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
    return text.encode(errors="replace").decode()  # half of a pair of surrogates, which a model's JSON may have
