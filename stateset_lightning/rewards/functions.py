"""Functions as rewards: one's own and those of other libraries, called by the names of their parameters."""

import gc
import inspect
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from functools import partial
from itertools import islice
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from stateset_lightning.errors import ConfigError, RewardError
from stateset_lightning.rewards import base
from stateset_lightning.rewards.base import Context, RewardFunction, RewardResult, Turns, completion, options

# What a parameter of this name gets. Of prompt and target, a column of that very name comes first.
_WORDS = {
    "turns": "turns conversation messages",
    "context": "context columns row scenario",
    "completion": "completion response solution_str response_str predict_str prediction generation generated_text"
    " model_output model_answer answer_text output_text pred y_pred guess",
    "prompt": "prompt question problem query instruction",
    "target": "target ground_truth label gold reference expected expected_answer expected_output reference_answer"
    " gold_answer correct_answer answers gt truth y_true",
    "answered": "reward_input",
    "environments": "environments",
}
_ROLES = {word: role for role, words in _WORDS.items() for word in words.split()}
# The completion where no other parameter is, else this: `f(answer, target)` and `f(completion, answer)` are both meant.
_UNSURE = {"answer": "target", "solution": "target", "output": "column", "text": "column"}
_MEANS_TARGET = (*_WORDS["target"].split(), "answer", "solution")
TARGET_NAMES = (*_WORDS["target"].split(), *_UNSURE)
# Functions of TRL and OpenRLHF, and some of verl and EasyR1, take lists.
_OF_TRL = {"prompts": "asked", "completions": "completion", "log_extra": "log_extra", "log_metric": "log_metric"}
_LISTS = {f"{word}s": role for word, role in _ROLES.items() if role not in ("turns", "context")}
_LISTS |= {**dict.fromkeys(_MEANS_TARGET, "target"), **_OF_TRL, "queries": "query", "environments": "environments"}
_NO_LISTS = ("log_extra", "log_metric", "environments")  # what functions that take lists get one of, or as a list
_ANSWERS = ("completion", "query", "answered")  # roles that hold the completion
# What verl gives where the data has no such column.
STAND_INS: dict[str, Any] = {"data_source": None, "extra_info": {}}

# How a function of (turns, context) can give what another takes.
_GIVEN = {"turns": "turns", "context": "context", "completion": "turns[-1].content", "prompt": "turns[-2].content"}
_GIVEN |= {"target": 'context["target"]', "unused": "None"}
_OF_VERIFIERS = {"state": '{**context, "completion": turns[-1].content, "answer": context["target"]}'}
_OF_VERIFIERS |= {"parser": '__import__("types").SimpleNamespace(parse=str, parse_answer=str)'}

_LIBRARIES = {"math_verify", "timeout_decorator"}  # that set alarms
_ALARMS = {"alarm", "setitimer", "signal"}
WITHOUT_ALARMS = "parse(..., parsing_timeout=None) and verify(..., timeout_seconds=None)"
_SOUND = sys.stdlib_module_names | {"stateset_lightning"}
# What holds others and has no code of its own.
_HOLDERS = (partial, MethodType, staticmethod, classmethod, property, CellType, dict, list, tuple, set, frozenset)


@options
class FunctionReward(RewardFunction):
    """A function as a reward, sync or async, called by the names of its parameters.

    - `turns`: the conversation, the completion last; `context`: all columns.
    - `completion`, or `response`, `solution_str`, ...: the completion's text.
    - `prompt`, or `question`, ...: the column of that name, else the text of the turn before the completion.
    - `target`, or `ground_truth`, `label`, `reference`, ...: the column of that name, else the scenario's target.
    - `answer`, `solution`: as `target`; the completion, where no other parameter is.
    - Any other name: the column of that name. `**kwargs` gets the columns that no parameter names, and the target under
      each of its names that is no column.

    The target's own column holds what `types.as_target` makes of it: a number stays a number, 5.0 becomes 5.

    - `reward_input` (EasyR1's): the columns, `response` and `ground_truth` in one mapping.
    - `environments` (TRL's): a list of one, the environment of the conversation, as that has left it. Such a function
      runs in the training process and has no time-out.

    A function that names `completions` (TRL's), `queries` (OpenRLHF's), or several of another name that gets the
    completion (`solution_strs`, `predictions`), or takes keywords alone, gets lists of one of everything and returns a
    list (array, tensor) of one. Completions are scored as they finish: a function that
    compares them with each other cannot work this way (see `GroupReward`). They get messages where the scenario has
    `messages`, else texts; what they give to `log_extra` and `log_metric` enters the breakdown. NaN, which TRL
    takes for None, is a failure here.

    Args:
        function: The function; it returns what `RewardFunction.compute_reward` may return.
        conversational: Whether prompt and completion are messages. None: for functions that take lists, where the
            scenario has `messages`; verifiers' functions get them by True.
        **common: `weight`, `name` and `timeout` of every reward; the name is by default the function's.

    Raises:
        ConfigError: If the names do not say what the function takes, or it takes what is not here; the message has a
            function to give in its place.
    """

    function: Callable[..., Any]
    conversational: bool | None = None

    def __post_init__(self) -> None:
        function = self.function.func if isinstance(self.function, partial) else self.function
        name = getattr(function, "__name__", None) or base.snake_case(type(function).__name__)
        self.name = self.name or ("function" if name == "<lambda>" else name)
        parameters = _parameters(self.function)
        self.takes_lists = is_list_function(self.function)
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self.required = {p.name for p in named if p.default is p.empty}
        # What `**kwargs` does not get: what is given otherwise, what a partial has set, and options of the function.
        self._hidden = {"prompt", "messages", *getattr(self.function, "keywords", ()), *(p.name for p in named)}
        self._roles = self._roles_of([p.name for p in named])
        self.takes_environments = "environments" in self._roles

    def compute_reward(self, turns: Turns, context: Context = None) -> Any:
        logged: dict[str, Any] = {}
        given = self._given(turns, context or {}, logged)
        output = self.function(*[given.pop(name) for name in self._positional if name in given], **given)
        if not self.takes_lists:
            return output
        return self._awaited(output, logged) if inspect.isawaitable(output) else self._only(output, logged)

    def missing(self, columns: Mapping[str, Any]) -> list[str]:
        named = {self._column(name, columns): self._roles[name] for name in sorted(self.required)}
        absent = {name: role for name, role in named.items() if columns.get(name) is None}
        needed = [{"column": name, "target": "target"}.get(role) for name, role in absent.items()]
        return [name for name in needed if name is not None and columns.get(name) is None]

    def _roles_of(self, names: Sequence[str]) -> dict[str, str]:
        """What each parameter gets.

        Raises:
            ConfigError: If that is not clear, or not here.
        """
        for name in {"completion_ids", "trainer_state"}.intersection(names):
            given = "rewards get texts and columns, the number completion_tokens among them"
            raise ConfigError(f"reward '{self.name}' takes {name}, which is not here: {given}. Remove the parameter")
        if self.takes_lists:
            named = {name: _LISTS.get(name, "column") for name in names}
            return _OF_TRL | named if self._takes_all else named
        words = {name: name.strip("_") for name in names}
        roles = {name: _ROLES.get(word, "column" if word else "unused") for name, word in words.items()}
        if self.conversational and "prompt" in roles:
            roles["prompt"] = "asked"  # messages, which no column holds
        unsure = [name for name, word in words.items() if word in _UNSURE]
        is_alone = len(unsure) == 1 and not {"completion", "turns"} & set(roles.values())
        roles |= {name: "completion" if is_alone else _UNSURE[words[name]] for name in unsure}
        if "solution_str" in names:  # verl's: the rest are options of the function
            roles = {n: role for n, role in roles.items() if role != "column" or n in self.required | STAND_INS.keys()}
        completions = [name for name, role in roles.items() if role in _ANSWERS]
        if len(completions) > 1 or not (completions or "turns" in roles.values()):
            why = f"takes ({', '.join(names)}), which does not say what gets the completion (see docs/rewards.md)"
            guessed = [name for name, role in roles.items() if role in ("column", "completion") or name in unsure]
            guessed = [name for name in guessed if name in self.required]
            is_known = "target" in [role for name, role in roles.items() if name not in guessed]
            meant = ("completion",) if is_known else ("completion", "target")
            roles |= dict.fromkeys(guessed, "column") | dict(zip(guessed, meant, strict=False))
            if len(guessed) > 1:
                why += f"; if {guessed[1]} gets it, swap what {guessed[0]} and {guessed[1]} get in what follows"
        elif foreign := sorted(_OF_VERIFIERS.keys() & self.required):
            why = f"takes {foreign[0]}, which is not here"
        else:
            return roles
        forms = f"{why}. Write f(completion, target), f(prompt, completion) or f(turns, context)"
        raise ConfigError(f"reward '{self.name}' {forms}, or give this in its place: {self._wrapper(roles)}")

    def _wrapper(self, roles: Mapping[str, str]) -> str:
        """A function of (turns, context) that calls this one, on a line."""
        required = [name for name in roles if name in self.required]
        texts = {n: _OF_VERIFIERS.get(n) or _GIVEN.get(roles[n], f'context["{n}"]') for n in required}
        called = ", ".join(text if name in self._positional else f"{name}={text}" for name, text in texts.items())
        begin, wait = ("async def", "await ") if inspect.iscoroutinefunction(self.function) else ("def", "")
        return f"{begin} {self.name}_reward(turns, context): return {wait}{self.name}({called})"

    def _given(self, turns: Turns, context: Mapping[str, Any], logged: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call, by name."""
        columns, given = {**STAND_INS, **context}, dict[str, Any]()
        by_role = self._by_role(turns, context)
        by_role["log_extra"] = lambda column, values: logged.update({column: values[0]})
        by_role["log_metric"] = lambda name, value: logged.update({name: value})
        for name, role in self._roles.items():
            column = self._column(name, columns)
            value = columns.get(column) if role in ("prompt", "target", "column") else None
            value = by_role.get(role) if value is None else value
            if value is not None or (role == "column" and column in columns):
                given[name] = value
        if absent := sorted(self.required - given.keys()):
            has = f"which this row does not have; it has: {', '.join(sorted(context))}"
            raise RewardError(f"reward '{self.name}' asks for the column {absent[0]}, {has}; data.fields maps columns")
        if self._takes_all:
            target = by_role["target"]
            named = {n: target for n in _MEANS_TARGET if target is not None and context.get(n) is None}
            given = {n: value for n, value in {**context, **named}.items() if n not in self._hidden} | given
        return {n: value if n in _NO_LISTS else [value] for n, value in given.items()} if self.takes_lists else given

    def _column(self, name: str, columns: Mapping[str, Any]) -> str:
        """The column of a parameter: of `extra_infos`, which takes lists, `extra_info`."""
        return name.removesuffix("s") if self.takes_lists and name not in columns else name

    def _by_role(self, turns: Turns, context: Mapping[str, Any]) -> dict[str, Any]:
        answer, asked = completion(turns), turns[-2]["content"] if len(turns) > 1 else ""
        found: dict[str, Any] = {"turns": turns, "completion": answer, "prompt": asked, "asked": asked}
        found |= {"context": context, "target": context.get("target"), "query": asked + answer, "unused": ""}
        if callable(alive := context.get("environments")):
            found["environments"] = alive()
        found["answered"] = {**context, "response": answer, "ground_truth": context.get("target")}
        gets_messages = self.conversational
        if gets_messages is None:
            gets_messages = self.takes_lists and context.get("messages") is not None and "queries" not in self._roles
        if gets_messages:
            messages = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
            # TRL's completion of a conversation is all that came behind the prompt.
            is_played = self.turns == "last" and "turn_rewards" in context
            first = len(base.joined(turns, context["num_turns"]) if is_played else turns) - 1
            found["asked"], found["completion"] = messages[:first], messages[first:]
        return found

    async def _awaited(self, output: Awaitable[Any], logged: dict[str, Any]) -> Any:
        return self._only(await output, logged)

    def _only(self, output: Any, logged: dict[str, Any]) -> Any:
        """The score in a list of one."""
        items = output
        if isinstance(output, Mapping) and "rewards" in output:  # OpenRLHF's
            items = output["rewards"]
            logged |= {name: value for name, value in output.items() if name != "rewards"}
        is_list = isinstance(items, Iterable) and not isinstance(items, str | Mapping | Set)
        scores = list(islice(items, 2)) if is_list else []
        if len(scores) != 1:  # at most two are asked for: there may be no end
            must = "gets lists and must return a list of one number or None"
            raise RewardError(f"reward '{self.name}' {must}, but returned {output!r:.80}")
        outcome = base.to_outcome(scores[0])
        return None if scores[0] is None else RewardResult(outcome.value, {**outcome.breakdown, **logged})


class TRLReward(FunctionReward):
    """A reward function as TRL's `GRPOTrainer` takes it, unchanged; the `weight` is one of TRL's `reward_weights`."""


def is_list_function(function: Callable[..., Any]) -> bool:
    """Whether a function takes lists: it names several completions, or takes keywords alone."""
    kinds = {parameter.name: parameter.kind.name for parameter in _parameters(function)}
    if "completion_ids" in kinds or any(_LISTS.get(name) in _ANSWERS for name in kinds):
        return True
    by_keyword = {"VAR_KEYWORD"} <= set(kinds.values()) <= {"VAR_KEYWORD", "KEYWORD_ONLY"}
    return by_keyword and not any(_ROLES.get(name) == "completion" or name in _UNSURE for name in kinds)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Of a function, without those that a partial has set; (turns, context) where it does not say."""
    try:
        found = list(inspect.signature(function).parameters.values())
    except ValueError:  # of some builtins
        found = [inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)]
    kinds = {p.kind.name for p in found}
    if {"VAR_POSITIONAL"} <= kinds <= {"VAR_POSITIONAL", "VAR_KEYWORD"}:
        held = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        if len(kinds) == 2 and len(held) == 1 and inspect.isfunction(held[0]) and not inspect.ismethod(function):
            return _parameters(held[0])  # decorated without `functools.wraps`
        found = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in ("turns", "context")]
    return [parameter for parameter in found if parameter.name not in getattr(function, "keywords", ())]


def written(reward: RewardFunction) -> Callable[..., Any]:
    """What the user wrote: a function, or the method of a class."""
    own: Any = reward.compute_rewards if reward.scores_several else reward.compute_reward
    return getattr(reward, "function", own)  # of a `FunctionReward`


def is_async(reward: RewardFunction) -> bool:
    """Whether the reward is written as `async def`; a `def` that returns an awaitable is not."""
    call = written(reward)
    return any(map(inspect.iscoroutinefunction, (call, getattr(call, "__call__", None))))  # noqa: B004


def alarm_in(function: Any) -> str:
    """What a function uses that works in a main thread alone, as far as its code tells; empty if nothing is found.

    Looked through is what it names and holds: functions, classes and objects, of other installed libraries none, and
    what these name and hold.
    """
    left, seen, own = [function], dict[int, Any](), ""
    while left:
        item = left.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item  # kept, so that no other gets its id
        if isinstance(item, _HOLDERS):
            left += gc.get_referents(item)[:1000]
            continue
        space, kind = getattr(item, "__dict__", {}), item if isinstance(item, type) else type(item)
        # Not by a function's own word: a wrapper says that it is at home where the wrapped one is.
        scope = item.__globals__ if isinstance(item, FunctionType) else space if isinstance(item, ModuleType) else {}
        home = str(scope.get("__name__", kind.__module__)).partition(".")[0]
        own = own or home
        if home in _LIBRARIES:
            return home
        left.append(space.get("__wrapped__"))
        is_installed = "site-packages" in str(getattr(sys.modules.get(home), "__file__", ""))
        if home in _SOUND or (is_installed and home != own) or isinstance(item, ModuleType):
            continue
        if not isinstance(item, FunctionType):
            left += [dict(space), *kind.__mro__]
            continue
        names = _names(item.__code__)
        if found := sorted(names & (_LIBRARIES | _ALARMS)):
            return found[0]
        modules = [vars(item.__globals__[n]) for n in names if isinstance(item.__globals__.get(n), ModuleType)]
        left += [scope[name] for scope in (item.__globals__, *modules) for name in names if name in scope]
        left += [item.__defaults__, item.__kwdefaults__, item.__closure__]
    return ""


def _names(code: CodeType) -> set[str]:
    """The names of globals, attributes and imports in a function and in those inside it."""
    names = set(code.co_names)
    if names & {"import_module", "__import__"}:
        names |= {text for text in code.co_consts if isinstance(text, str)}
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return {name.partition(".")[0] for name in names}.union(*map(_names, inner))
