"""Users' environments as they are: what drives those of TRL, Gymnasium, SkyRL and our own interface, all in one way.

Which interface a class has is told by its methods:

    reset(**columns), no step    TRL's `environment_factory`: methods with docstrings are tools, `get_reward()`
    reset(seed=...), step(text)  Gymnasium: (observation, info), then (observation, reward, terminated, truncated, info)
    init(prompt), step(text)     SkyRL: (prompt, info), then observations, reward, done, metadata
    reset(scenario, seed), step  ours: see `stateset_lightning.environments.base`

Gymnasium's `reset` can be called without arguments, and ours cannot, or names a `scenario`. What a class takes beside
is given to it: TRL's the seed, Gymnasium's the columns as `options`.

What they do wrong is `EnvironmentFailure`, with the user's exception as its cause. SkyRL's `postprocessed_action` is
not used: a conversation is what was sampled.
"""

import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

from stateset_lightning.environments import base
from stateset_lightning.environments.base import EnvironmentFailure, Opening, Reply, as_reply, as_turns, turns_of
from stateset_lightning.environments.tool_calls import Call, Malformed, find_calls
from stateset_lightning.environments.tools import Functions, Tools, UserCode, outcome_of, run_tools, schema_of
from stateset_lightning.errors import ConfigError, DataError, one_line
from stateset_lightning.types import Turn, of_numpy


@dataclass(frozen=True)
class Settings:
    """What a run says of all its environments.

    Args:
        tokenizer: Whose `response_template` says what tool calls look like, if it has one.
        tool_timeout: Seconds that a tool call may take; None: no limit. `Tools` have their own.
        max_turns: Which SkyRL's environments are told.
        timeout: Seconds after which an async method is cancelled; None: never.
    """

    tokenizer: Any = None
    tool_timeout: float | None = 30.0
    max_turns: int = 1
    timeout: float | None = None


class Driver:
    """Plays one conversation after another with an environment of our own interface; its subclasses, with others'.

    Its calls wait for the user's code, and none is made beside another. Functions of the environment run on one thread,
    which is the driver's own. Where the model calls tools, they answer; all else is the environment's `step` to answer.

    Args:
        environment: The user's object.
        settings: Of the run.
        code: What runs its methods. It may run the driver's own, too, but for `step`: tools could not be left behind.

    Attributes:
        schemas: JSON schemas of the tools, for the chat template.

    Raises:
        ConfigError: If a tool cannot be described to the model.
    """

    environment: Any  # which rewards may ask for
    _has_tools = True

    def __init__(self, environment: Any, settings: Settings, code: UserCode) -> None:
        self.environment, self._settings, self.code = environment, settings, code
        self._timeout = settings.tool_timeout
        self._functions: Functions = base.tool_methods(environment) if self._has_tools else {}
        if isinstance(environment, Tools):
            self._functions, self._timeout = environment.functions, environment.timeout or settings.tool_timeout
        self.schemas = [schema_of(function) for function in self._functions.values()]
        self._sum: float | None = None

    def reset(self, columns: Mapping[str, Any], seed: int) -> Opening:
        """Begins a conversation.

        Args:
            columns: Of the scenario, with `prompt` or `messages`. The environment gets a copy.
            seed: The same for all completions of a prompt in an episode.
        """
        self._sum = None
        return self._begin(deepcopy(dict(columns)), seed)

    def step(self, text: str) -> Reply:
        """Answers a completion."""
        return self.answer(text, find_calls(text, self._settings.tokenizer, self.schemas) if self.schemas else [])

    def answer(self, text: str, calls: list[Call | Malformed]) -> Reply:
        """Answers a completion that calls these tools."""
        if calls:
            return run_tools(calls, self._functions, self.code, self._timeout)
        reply = self._answer(text)
        if reply.reward is not None:
            self._sum = reply.reward + (self._sum or 0.0)
        return reply

    def get_reward(self) -> float | None:
        """Of the whole conversation: the environment's own, else the sum over its turns. None: there is none."""
        if not _has(self.environment, "get_reward"):
            return self._sum
        return _ask(self.code, base.as_reward, self.environment.get_reward)

    def close(self) -> None:
        """Closes the environment, if it does so within a second, and ends the driver's thread."""
        self._release()
        self.code.close()

    # What interfaces differ in

    def _begin(self, columns: dict[str, Any], seed: int) -> Opening:
        return Opening(_ask(self.code, as_turns, self.environment.reset, columns, seed))

    def _answer(self, text: str) -> Reply:
        return _ask(self.code, as_reply, self.environment.step, text)

    def _release(self) -> None:
        if _has(self.environment, "close"):  # what it raises changes no conversation
            self.code.run(self.environment.close, timeout=1.0)


class _TRL(Driver):
    def _begin(self, columns: dict[str, Any], seed: int) -> Opening:
        columns["prompt"] = columns.get("prompt") or _messages(columns)
        given = _accepted(self.environment.reset, {"seed": seed, **columns})
        return _ask(self.code, _appended, self.environment.reset, **given)

    def _answer(self, text: str) -> Reply:
        return Reply(done=True)


def _appended(text: Any) -> Opening:
    if not isinstance(text, str | None):
        raise EnvironmentFailure(f"returned {text!r:.80}, neither a text nor None")
    return Opening(appended_text=text or "")


class _Gymnasium(Driver):
    _has_tools = False  # its base class has public methods of its own

    def _begin(self, columns: dict[str, Any], seed: int) -> Opening:
        given = _accepted(self.environment.reset, {"seed": seed, "options": columns})
        return _ask(self.code, _gymnasium_opening, self.environment.reset, **given)

    def _answer(self, text: str) -> Reply:
        return _ask(self.code, _gymnasium_reply, self.environment.step, text)


def _gymnasium_opening(result: Any) -> Opening:
    observation, _ = _parts(result, "observation", "info")
    return Opening(_observed(observation))


def _gymnasium_reply(result: Any) -> Reply:
    names = ("observation", "reward", "terminated", "truncated", "info")
    observation, reward, terminated, truncated, _ = _parts(result, *names)
    return as_reply((_observed(observation), reward, of_numpy(terminated) or of_numpy(truncated)))


def _observed(value: Any) -> tuple[Turn, ...]:
    return as_turns(None if value is None else str(value))


class _SkyRL(Driver):
    """Makes an environment for each conversation, as SkyRL does: most keep no way to begin anew.

    Args:
        make: Called with `env_config` (empty) and `extras` (all columns, and `max_turns`), if it takes them.
        settings: Of the run.
        code: What runs it and its methods.
    """

    def __init__(self, make: Callable[..., Any], settings: Settings, code: UserCode) -> None:
        super().__init__(None, settings, code)
        self._make = make

    def _begin(self, columns: dict[str, Any], seed: int) -> Opening:
        self._release()
        given = _accepted(self._make, {"env_config": {}, "extras": {"max_turns": self._settings.max_turns, **columns}})
        self.environment = _ask(self.code, lambda made: made, self._make, **given)
        prompt = _messages(columns)
        return _ask(self.code, partial(_skyrl_opening, _as_prompt(prompt)), self.environment.init, prompt)

    def _answer(self, text: str) -> Reply:
        return _ask(self.code, _skyrl_reply, self.environment.step, text)


def _skyrl_opening(given: tuple[Turn, ...], result: Any) -> Opening:
    prompt, _ = _parts(result, "prompt", "info")
    if not (turns := _as_prompt(prompt)):
        raise EnvironmentFailure("returned an empty prompt")
    is_longer = turns[: len(given)] == given
    return Opening(turns[len(given) :] if is_longer else turns, replaces=not is_longer)


def _skyrl_reply(result: Any) -> Reply:
    names = ("observations", "reward", "done")
    observations, reward, done = (result[n] if isinstance(result, Mapping) else getattr(result, n) for n in names)
    return as_reply((observations, reward, of_numpy(done)))


def _messages(columns: Mapping[str, Any]) -> list[dict[str, str]]:
    """The scenario's prompt, without the system turns that the run adds."""
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns_of(columns)]


def _as_prompt(messages: Any) -> tuple[Turn, ...]:
    return as_turns(messages, ("system", "user", "assistant", "tool"))


def _parts(result: Any, *names: str) -> Any:
    if not isinstance(result, tuple | list) or len(result) != len(names):
        raise EnvironmentFailure(f"returned {result!r:.80}, not ({', '.join(names)})")
    return result


class _Choice(Driver):
    """Chooses among environments by the scenario's column `environment`, which they do not get (TRL)."""

    def __init__(self, choices: Mapping[str, Any], settings: Settings, code: UserCode) -> None:
        super().__init__(None, settings, code)
        self._drivers = {name: as_environment(choice, settings) for name, choice in choices.items()}

    def reset(self, columns: Mapping[str, Any], seed: int) -> Opening:
        name = columns.get("environment")
        if name not in self._drivers:
            raise DataError(f"a scenario has environment={name!r}, which is none of: {', '.join(self._drivers)}")
        self._chosen = self._drivers[name]
        opening = self._chosen.reset({key: value for key, value in columns.items() if key != "environment"}, seed)
        self.environment, self.schemas = self._chosen.environment, self._chosen.schemas
        return opening

    def answer(self, text: str, calls: list[Call | Malformed]) -> Reply:
        return self._chosen.answer(text, calls)

    def get_reward(self) -> float | None:
        return self._chosen.get_reward()

    def _release(self) -> None:
        for driver in self._drivers.values():
            driver.close()


# Which interface it is ------------------------------------------------------------------------------------------------


def as_environment(environment: Any, settings: Settings | None = None, code: UserCode | None = None) -> Driver:
    """What plays conversations with an environment, whichever interface it has.

    Args:
        environment: An object, or a class or function that makes one; or a mapping of these, chosen from by the
            scenario's column `environment`.
        settings: Of the run; None: the defaults.
        code: What runs the environment's methods; None: a new one.

    Raises:
        ConfigError: If it has no interface that is known, or a tool cannot be described to the model.
        EnvironmentFailure: If the class or function raises.
    """
    given, settings = environment, settings or Settings()
    code = code or UserCode(settings.timeout)
    if isinstance(given, Mapping):
        return _Choice(given, settings, code)
    is_maker = isinstance(given, type) or (callable(given) and not _has(given, "reset") and not _has(given, "init"))
    maker = given.func if isinstance(given, partial) else given
    takes_extras = is_maker and "extras" in base.signature_of(maker).parameters
    if is_maker and not takes_extras and not _is_skyrl(given):
        try:
            environment = _ask(code, lambda made: made, given)
        except EnvironmentFailure:
            code.close()
            raise
    if takes_extras or _is_skyrl(environment):
        return _SkyRL(given if is_maker else lambda: given, settings, code)
    if _has(environment, "reset") and not _has(environment, "step"):
        return _TRL(environment, settings, code)
    if _has(environment, "reset") and _accepts(environment.step, "text"):
        if _accepts(environment.reset) and "scenario" not in base.signature_of(environment.reset).parameters:
            return _Gymnasium(environment, settings, code)
        if _accepts(environment.reset, {}, 0):
            return Driver(environment, settings, code)
    methods = [name for name in ("reset", "init", "step", "get_reward") if _has(environment, name)]
    found = ", ".join(f"{name}{inspect.signature(getattr(environment, name))}" for name in methods) or "none of these"
    known = "reset(scenario, seed) and step(text), or those of Gymnasium, SkyRL or TRL (see environments/adapters.py)"
    raise ConfigError(f"environment {type(environment).__name__} has {found}; it must have {known}")


def _ask(code: UserCode, read: Callable[[Any], Any], function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """What `read` makes of what a function of the user returns.

    Raises:
        EnvironmentFailure: If either raises; the user's exception is its cause.
    """
    call, owner = partial(function, *args, **kwargs), getattr(function, "__self__", getattr(function, "func", function))
    kind = owner if isinstance(owner, type) else type(owner)  # itself: what a user derives from it may wait
    result, error = outcome_of(call) if "is_quick" in vars(kind) else code.run(call)
    if error is None:
        try:
            return read(result)
        except Exception as caught:  # of the result's own methods, too
            error = caught
    reason = str(error) if isinstance(error, EnvironmentFailure) else f"{type(error).__name__}: {one_line(error)}"
    raise EnvironmentFailure(f"{getattr(function, '__qualname__', function)}: {reason}") from error


def _has(environment: Any, method: str) -> bool:
    return callable(getattr(environment, method, None))


def _is_skyrl(environment: Any) -> bool:
    return _has(environment, "init") and _has(environment, "step") and not _has(environment, "reset")


def _accepts(method: Callable[..., Any], *args: Any) -> bool:
    try:
        base.signature_of(method).bind(*args)
    except TypeError:
        return False
    return True


def _accepted(function: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Of the arguments that are offered, those that a function takes by name."""
    parameters = base.signature_of(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {name: value for name, value in offered.items() if takes_all or name in parameters}
