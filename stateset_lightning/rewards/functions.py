"""Functions as rewards: one's own and those of other libraries, called by the names of their parameters."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import islice
from types import CodeType, ModuleType
from typing import Any

from stateset_lightning.errors import ConfigError, RewardError
from stateset_lightning.rewards.base import Context, RewardFunction, RewardResult, Turns, completion, snake_case

# What a parameter of this name gets. Of prompt and target, a column of that very name comes first.
_WORDS = {
    "turns": "turns conversation messages",
    "context": "context columns row scenario",
    "completion": "completion response solution_str response_str predict_str prediction generation generated_text"
    " model_output",
    "prompt": "prompt question problem query instruction",
    "target": "target ground_truth label gold reference expected expected_answer reference_answer gold_answer",
}
_ROLES = {word: role for role, words in _WORDS.items() for word in words.split()}
# The completion where no other parameter is, else this: `f(answer, target)` and `f(completion, answer)` are both meant.
_UNSURE = {"answer": "target", "solution": "target", "output": "column", "text": "column"}
TARGET_NAMES = (*_WORDS["target"].split(), *_UNSURE)
# Functions of TRL and OpenRLHF take lists.
_OF_TRL = {"prompts": "asked", "completions": "completion", "log_extra": "log_extra", "log_metric": "log_metric"}
_LISTS = {**_OF_TRL, "queries": "query", "labels": "target"}
# What verl gives where the data has no such column.
STAND_INS: dict[str, Any] = {"data_source": None, "extra_info": {}}

_MISSING = {
    "completion_ids": "the column completion_tokens: [n] is the number of tokens; see also OverlongPenalty",
    "trainer_state": "a reward must not depend on when it is called",
    "environments": "there are no environments in single-turn training",
}
# How a function of (turns, context) can give what another takes; the last two are those of `verifiers`.
_GIVEN = {
    "turns": "turns",
    "context": "context",
    "completion": "turns[-1].content",
    "prompt": "turns[-2].content",
    "target": 'context["target"]',
    "unused": "None",
    "state": '{**context, "completion": turns[-1].content, "answer": context["target"]}',
    "parser": '__import__("types").SimpleNamespace(parse=str, parse_answer=str)',
}
_FOREIGN = {"state", "parser"}

_LIBRARIES = "math_verify", "timeout_decorator"  # that set alarms
_ALARMS = {"alarm", "setitimer"}
_SOUND = sys.stdlib_module_names | {"stateset_lightning"}


class FunctionReward(RewardFunction):
    """A function as a reward, sync or async, called by the names of its parameters.

    - `turns`: the conversation, the completion last; `context`: all columns.
    - `completion`, or `response`, `solution_str`, ...: the completion's text.
    - `prompt`, or `question`, ...: the column of that name, else the text of the turn before the completion.
    - `target`, or `ground_truth`, `label`, `reference`, ...: the column of that name, else the scenario's target.
    - `answer`, `solution`: the target; the completion, where no other parameter is.
    - Any other name: the column of that name. `**kwargs` gets the columns that no parameter names.

    A function that names `completions` (TRL's) or `queries` (OpenRLHF's), or takes keywords alone, gets lists of one of
    everything and returns a list (array, tensor) of one. Completions are scored as they finish: a function that
    compares them with each other cannot work this way (see `GroupReward`). TRL's get messages where the scenario has
    `messages`, else texts, and what they give to `log_extra` and `log_metric` enters the breakdown. NaN, which TRL
    takes for None, is a failure here.

    Args:
        function: The function; it returns what `RewardFunction.compute_reward` may return.
        **common: `weight`, `name` and `timeout` of every reward; the name is by default the function's.

    Raises:
        ConfigError: If the names do not say what the function takes, or it takes what is not here; the message has a
            function to give in its place.
    """

    conversational: bool | None = None

    def __init__(self, function: Callable[..., Any], **common: Any) -> None:
        self.function = function
        fixed: set[str] = set()
        while isinstance(function, functools.partial):
            fixed |= function.keywords.keys()
            function = function.func
        name = getattr(function, "__name__", None) or snake_case(type(function).__name__)
        self.name = "function" if name == "<lambda>" else name
        super().__init__(**common)
        parameters = _parameters(self.function)
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in fixed]
        self.is_any = not named and any(p.kind is p.VAR_POSITIONAL for p in parameters)  # f(*args)
        self.takes_lists = is_list_function(self.function)
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._positional = [p.name for p in named if p.kind is p.POSITIONAL_ONLY]
        self._required = {p.name for p in named if p.default is p.empty}
        self._roles = self._roles_of([p.name for p in named])

    def compute_reward(self, turns: Turns, context: Context = None) -> Any:
        if self.is_any:
            return self.function(turns, context)
        logged: dict[str, Any] = {}
        given = self._given(turns, context or {}, logged)
        output = self.function(*[given.pop(name) for name in self._positional], **given)
        if not self.takes_lists:
            return output
        return self._awaited(output, logged) if inspect.isawaitable(output) else self._only(output, logged)

    def missing(self, columns: Mapping[str, Any]) -> list[str]:
        roles = {name: self._roles[name] for name in sorted(self._required) if columns.get(name) is None}
        absent = [name for name, role in roles.items() if role == "column"]
        has_target = "target" not in roles.values() or columns.get("target") is not None
        return absent if has_target else [*absent, "target"]

    def _roles_of(self, names: Sequence[str]) -> dict[str, str]:
        """What each parameter gets.

        Raises:
            ConfigError: If that is not clear, or not here.
        """
        for name in _MISSING.keys() & names:
            why = _MISSING[name]
            raise ConfigError(f"reward '{self.name}' takes {name}, which is not here: {why}. Remove the parameter")
        if self.takes_lists:
            named = {name: _LISTS.get(name, "column") for name in names}
            return _OF_TRL | named if self._takes_all else named
        roles = {name: _ROLES.get(name.strip("_"), "column" if name.strip("_") else "unused") for name in names}
        unsure = [name for name in names if name.strip("_") in _UNSURE]
        found = list(roles.values())
        is_alone = len(unsure) == 1 and not {"completion", "turns"} & set(found)
        roles |= {name: "completion" if is_alone else _UNSURE[name.strip("_")] for name in unsure}
        if "solution_str" in names:  # verl's: the rest are options of the function
            roles = {n: role for n, role in roles.items() if role != "column" or n in self._required | STAND_INS.keys()}
        found = list(roles.values())
        is_clear = self.is_any or found.count("completion") == 1 or found.count("completion") < ("turns" in found)
        if is_clear and not (foreign := sorted(_FOREIGN & self._required)):
            return roles
        why = (
            f"takes {foreign[0]}, which is not here"
            if is_clear
            else (
                f"takes ({', '.join(names)}), and does not say what gets the completion: take names of docs/rewards.md,"
                " such as f(completion, target), f(prompt, completion) or f(turns, context)"
            )
        )
        raise ConfigError(f"reward '{self.name}' {why}; or give this in its place: {self._wrapper(roles, is_clear)}")

    def _wrapper(self, roles: dict[str, str], is_clear: bool) -> str:
        """A function of (turns, context) that calls this one, on a line."""
        roles = {name: role for name, role in roles.items() if name in self._required}
        completions = [name for name, role in roles.items() if role == "completion"]
        unclear = [n for n, role in roles.items() if role == "column" or n in _UNSURE or n in completions[1:]]
        if not is_clear:
            known = {role for name, role in roles.items() if name not in unclear}
            guessed = [role for role in ("completion", "target") if role not in known]
            roles |= dict.fromkeys(unclear, "column") | dict(zip(unclear, guessed, strict=False))
        texts = {n: _GIVEN.get(n if n in _FOREIGN else role, f'context["{n}"]') for n, role in roles.items()}
        called = ", ".join(text if name in self._positional else f"{name}={text}" for name, text in texts.items())
        begin, wait = ("async def", "await ") if inspect.iscoroutinefunction(self.function) else ("def", "")
        return f"{begin} {self.name}_reward(turns, context): return {wait}{self.name}({called})"

    def _given(self, turns: Turns, context: Mapping[str, Any], logged: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call, by name."""
        by_role = self._by_role(turns, context, logged)
        given: dict[str, Any] = {}
        for name, role in self._roles.items():
            if role in ("prompt", "target", "column") and (context.get(name) is not None or role == "column"):
                source, key = {**STAND_INS, **context}, name
            else:
                source, key = by_role, role
            if key in source:
                given[name] = source[key]
        if absent := sorted(self._required - given.keys()):
            raise RewardError(
                f"reward '{self.name}' asks for the column {absent[0]}, which this row does not have; it has: "
                f"{', '.join(sorted(context))}; data.fields maps columns to other names"
            )
        if self._takes_all:
            hidden = {"prompt", "messages"} if self.takes_lists else {"messages"}
            given = {name: value for name, value in context.items() if name not in hidden} | given
        if self.takes_lists:
            given = {name: value if name.startswith("log_") else [value] for name, value in given.items()}
        return given

    def _by_role(self, turns: Turns, context: Mapping[str, Any], logged: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"turns": turns, "context": context, "unused": None, "completion": completion(turns)}
        asked = found["prompt"] = found["asked"] = turns[-2]["content"] if len(turns) > 1 else ""
        if context.get("target") is not None:
            found["target"] = context["target"]
        if self.takes_lists:
            found["query"] = f"{asked}{found['completion']}"
            found["log_extra"] = lambda column, values: logged.update({column: values[0]})
            found["log_metric"] = lambda name, value: logged.update({name: value})
            has_messages = context.get("messages") is not None and "queries" not in self._roles
            if has_messages if self.conversational is None else self.conversational:
                *found["asked"], last = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
                found["completion"] = [last]
        return found

    async def _awaited(self, output: Awaitable[Any], logged: dict[str, Any]) -> RewardResult | None:
        return self._only(await output, logged)

    def _only(self, output: Any, logged: dict[str, Any]) -> RewardResult | None:
        """The score in a list of one."""
        items = output
        if isinstance(output, Mapping) and "rewards" in output:  # OpenRLHF's
            items = output["rewards"]
            logged |= {name: value for name, value in output.items() if name != "rewards"}
        try:
            scores = list(islice(items, 2))  # there may be no end
        except TypeError:
            scores = []
        if isinstance(items, str) or len(scores) != 1:
            raise RewardError(
                f"reward '{self.name}' gets lists and returned {output!r:.80}, but must return a list of one number or"
                " None"
            )
        return None if scores[0] is None else RewardResult(scores[0], logged)


class TRLReward(FunctionReward):
    """A reward function as TRL's `GRPOTrainer` takes it, unchanged; see `FunctionReward`.

    Args:
        function: The function.
        conversational: The form of prompts and completions; None: as the scenario's own (`messages` or `prompt`).
        **common: `weight` (TRL's `reward_weights`), `name` and `timeout` of every reward; the name is by default the
            function's.

    Raises:
        ConfigError: If the function asks for something that only TRL has.
    """

    def __init__(self, function: Callable[..., Any], *, conversational: bool | None = None, **common: Any) -> None:
        super().__init__(function, **common)
        self.conversational = conversational


def is_list_function(function: Callable[..., Any]) -> bool:
    """Whether a function takes lists: it names `completions` or `queries`, or takes keywords alone."""
    parameters = _parameters(function)
    names = {parameter.name for parameter in parameters}
    by_keyword = all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in parameters)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    is_named = any(_ROLES.get(name) in ("completion", "turns") or name in _UNSURE for name in names)
    return not names.isdisjoint(("completions", "completion_ids", "queries")) or (
        takes_all and by_keyword and not is_named
    )


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError:  # some builtins do not tell
        return [inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)]


def alarm_in(function: Callable[..., Any]) -> str:
    """What a function uses that works in a main thread alone, as far as its code tells; empty if nothing is found.

    Looked through is what it names: functions and classes, and what these name. Libraries are looked through only where
    the function is their own.
    """
    left: list[Any] = [function]
    seen: set[int] = set()
    home = _home(inspect.unwrap(function))
    while left and len(seen) < 1000:  # it need not see everything
        item = left.pop()
        item = inspect.unwrap(getattr(item, "func", getattr(item, "__func__", item)))
        if _home(item) in _LIBRARIES:
            return _home(item)
        if id(item) in seen or _home(item) in _SOUND:
            continue
        seen.add(id(item))
        code: CodeType | None = getattr(item, "__code__", None)
        if isinstance(item, type):
            left += [value for value in vars(item).values() if callable(value)]
        elif code is None:
            left += [vars(type(item))["__call__"]] if "__call__" in vars(type(item)) else []
        elif _home(item) == home or "site-packages" not in code.co_filename:
            names = _names(code)
            if found := [*names.intersection(_LIBRARIES), *names.intersection(_ALARMS)]:
                return found[0]
            scopes = [item.__globals__]
            modules = [value for name in names if isinstance(value := item.__globals__.get(name), ModuleType)]
            scopes += [vars(module) for module in modules if _home(module) not in _SOUND]
            left += [scope[name] for scope in scopes for name in names if name in scope]
            left += [cell.cell_contents for cell in item.__closure__ or ()]
    return ""


def _home(item: Any) -> str:
    """The top-level package of a function, class, object or module."""
    name = item.__name__ if isinstance(item, ModuleType) else getattr(item, "__module__", None)
    return str(name).partition(".")[0]


def _names(code: CodeType) -> set[str]:
    """The names of globals, attributes and imports in a function and in those inside it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return {name.partition(".")[0] for name in code.co_names}.union(*map(_names, inner))
