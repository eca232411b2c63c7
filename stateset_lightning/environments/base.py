"""What answers a completion: the interface of an environment, and what it may return."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from types import FunctionType
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

from stateset_lightning.types import Turn, of_numpy

T = TypeVar("T")


class Environment(Protocol):
    """One conversation's environment. Methods may be async; an instance is used for one conversation at a time.

    Beside these it may have `get_reward() -> float | None`, asked once at the end, and public methods with typed
    arguments and docstrings, which are the model's tools (see `stateset_lightning.environments.tools`).
    """

    def reset(self, scenario: Mapping[str, Any], seed: int) -> Any:
        """Begins a conversation.

        Args:
            scenario: All columns of the scenario.
            seed: The same for all completions of a prompt in an episode.

        Returns:
            Turns that the prompt ends with (a text is one of the user), or None.
        """

    def step(self, text: str) -> Any:
        """Answers what the model said.

        Args:
            text: The completion, without its end of turn.

        Returns:
            reply, reward, done: turns (a text is one of the user) or None; a number or None; whether it ends here.
        """


class EnvironmentFailure(Exception):
    """An environment raised, took too long, or returned what it may not: the conversation has no reward."""


@dataclass(frozen=True)
class Reply:
    """What an environment answers.

    Args:
        turns: That the conversation goes on with; none if it ends.
        reward: Of this turn; None: none.
        done: Whether the conversation ends here.
        counts: What is counted, such as malformed tool calls.
    """

    turns: tuple[Turn, ...] = ()
    reward: float | None = None
    done: bool = False
    counts: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Opening:
    """How a conversation begins: what an environment makes of its prompt.

    Args:
        turns: That follow the prompt.
        appended_text: That the prompt's last turn of the user goes on with, nothing between (TRL).
        replaces: The turns take the prompt's place (SkyRL). A system turn of the prompt stays, unless they have one.
    """

    turns: tuple[Turn, ...] = ()
    appended_text: str = ""
    replaces: bool = False

    def after(self, prompt: Sequence[Turn]) -> list[Turn]:
        """The conversation that the model is to answer."""
        begun = [t for t in prompt if not self.replaces or (t.role == "system" and self.turns[0].role != "system")]
        begun += self.turns
        last = max((i for i, turn in enumerate(begun) if turn.role == "user"), default=None)
        if self.appended_text and last is None:
            what = f"began with {self.appended_text!r:.80}, and there is no turn of the user to add it to"
            raise EnvironmentFailure(what)
        if last is not None:
            begun[last] = Turn("user", begun[last].content + self.appended_text)
        return begun


def as_turns(value: Any, roles: Sequence[str] = ("user", "tool", "system")) -> tuple[Turn, ...]:
    """Turns of a text, a turn, or a list of turns or mappings with `role` and `content`; none of None.

    Raises:
        EnvironmentFailure: If it is none of these, or a turn has none of the roles.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        return (Turn("user", value),)
    items: Any = [value] if isinstance(value, Turn | Mapping) else value
    try:
        pairs: list[tuple[Any, Any]] = [(item["role"], item["content"]) for item in items]
    except (TypeError, KeyError, IndexError) as error:
        what = f"returned {value!r:.80} where turns belong: a text, or turns with role and content"
        raise EnvironmentFailure(what) from error
    for role, content in pairs:
        if role not in roles or not isinstance(content, str):
            raise EnvironmentFailure(f"returned a turn of role {role!r} with content {content!r:.80}")
    return tuple(Turn(role, content) for role, content in pairs)


def turns_of(scenario: Mapping[str, Any]) -> Sequence[Turn]:
    """The turns that a scenario's columns hold, without its `context`; none if it only has other columns."""
    return scenario.get("messages") or as_turns(scenario.get("prompt"))


def as_reply(value: Any) -> Reply:
    """What `step` returned, checked.

    Raises:
        EnvironmentFailure: If it is no reply, its reward no finite number, or it goes on without any turn.
    """
    if isinstance(value, Reply):
        return value
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 3:
        raise EnvironmentFailure(f"step returned {value!r:.80}, not (reply, reward, done)")
    reply, reward, done = (*value[:2], of_numpy(value[2]))
    if not isinstance(done, bool):
        raise EnvironmentFailure(f"step returned done={done!r:.80}, neither True nor False")
    checked = Reply(() if done else as_turns(reply), as_reward(reward), done)
    if not done and not checked.turns:
        raise EnvironmentFailure(f"step returned done=False and the reply {reply!r:.80}: there is nothing to answer")
    return checked


def as_reward(value: Any) -> float | None:
    """A reward of an environment.

    Raises:
        EnvironmentFailure: If it is no finite number, and not None.
    """
    try:
        number = None if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise EnvironmentFailure(f"gives the reward {value!r:.80}, which is no number") from error
    if number is not None and not math.isfinite(number):
        raise EnvironmentFailure(f"gives the reward {number}, which is not finite")
    return number


OWN_METHODS = ("reset", "step", "get_reward", "close", "init", "render", "seed")


def kept_for_each(compute: Callable[[Any], T]) -> Callable[[Any], T]:
    """Of a function, method or class computes once, as each conversation asks again."""
    plain, bound = WeakKeyDictionary[Any, T](), WeakKeyDictionary[Any, T]()  # a bound method takes an argument less

    @wraps(compute)
    def look_up(function: Any) -> T:
        written = getattr(function, "__func__", function)
        if not isinstance(written, FunctionType | type):
            return compute(function)
        if written not in (known := plain if written is function else bound):
            known[written] = compute(function)
        return known[written]

    return look_up


signature_of = kept_for_each(inspect.signature)


def tool_methods(environment: Any) -> dict[str, Callable[..., Any]]:
    """Public methods that a model may call, by name: those that have a docstring and are no part of an interface."""
    kind = type(environment)  # an instance would compute properties
    names = [name for name in dir(kind) if not name.startswith("_") and name not in OWN_METHODS]
    found = {name: getattr(kind, name, None) for name in names}
    return {n: getattr(environment, n) for n, f in found.items() if inspect.isroutine(f) and inspect.getdoc(f)}
