"""TRL's reward functions `f(prompts, completions, **columns) -> list`, called with one completion at a time."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from itertools import islice
from typing import Any

from stateset_lightning.errors import ConfigError, RewardError
from stateset_lightning.rewards.base import Context, FunctionReward, RewardResult, Turns

_MARKS = {"completions", "completion_ids"}
_OWN = {"prompts", "completions", "log_extra", "log_metric"}
_MISSING = {
    "completion_ids": "the column completion_tokens: [n] is the number of tokens; see also OverlongPenalty",
    "trainer_state": "a reward must not depend on when it is called",
    "environments": "there are no environments in single-turn training",
}


class TRLReward(FunctionReward):
    """A reward function as TRL's `GRPOTrainer` takes it, sync or async, unchanged.

    TRL calls it once per batch; here completions are scored as they finish, so every list holds one item. A function
    that compares completions with each other cannot work this way. Like TRL, it is called by keyword:

    - `prompts`, `completions`: lists of one text; with `conversational` lists of one list of `{"role", "content"}`.
    - a list of one for each column of the scenario, and `completion_tokens`. A function without `**kwargs` gets those
      that it names.
    - `log_extra(column, values)` and `log_metric(name, value)`: what is logged enters the completion's breakdown.

    It returns a list (array, tensor) of one number, or of None for "does not apply". NaN, which TRL takes for None, is
    a failure here.

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
        parameters = inspect.signature(function).parameters.values()
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self._required = {p.name for p in parameters if p.name in self._named and p.default is p.empty}
        for name in _MISSING.keys() & self._named:
            why = _MISSING[name]
            raise ConfigError(f"TRL reward '{self.name}' takes {name}, which is not here: {why}. Remove the parameter")

    def compute_reward(self, turns: Turns, context: Context = None) -> Any:
        logged: dict[str, Any] = {}
        output = self.function(**self._arguments(turns, context or {}, logged))
        return self._awaited(output, logged) if inspect.isawaitable(output) else self._score(output, logged)

    def _arguments(self, turns: Turns, context: Mapping[str, Any], logged: dict[str, Any]) -> dict[str, Any]:
        conversational = context.get("messages") is not None if self.conversational is None else self.conversational
        *prompt, completion = [{"role": turn.role, "content": turn.content} for turn in turns]
        hidden = {"prompt", "messages", *_OWN}
        arguments: dict[str, Any] = {name: [value] for name, value in context.items() if name not in hidden}
        arguments.update(
            prompts=[prompt if conversational else prompt[-1]["content"]],
            completions=[[completion] if conversational else completion["content"]],
            log_extra=lambda column, values: logged.update({column: values[0]}),
            log_metric=lambda name, value: logged.update({name: value}),
        )
        if absent := sorted(self._required - arguments.keys()):
            raise RewardError(
                f"TRL reward '{self.name}' asks for the column {absent[0]}, which this row does not have; it has: "
                f"{', '.join(sorted(arguments.keys() - _OWN))}; data.fields maps columns to other names"
            )
        return {name: value for name, value in arguments.items() if self._takes_all or name in self._named}

    async def _awaited(self, output: Awaitable[Any], logged: dict[str, Any]) -> RewardResult | None:
        return self._score(await output, logged)

    def _score(self, output: Any, logged: dict[str, Any]) -> RewardResult | None:
        try:
            scores = list(islice(output, 2))  # there may be no end
        except TypeError:
            scores = []
        if isinstance(output, str) or len(scores) != 1:
            raise RewardError(
                f"TRL reward '{self.name}' returned {output!r:.80}, but must return a list of one number or None"
            )
        return None if scores[0] is None else RewardResult(scores[0], logged)


def is_trl_function(function: Callable[..., Any]) -> bool:
    """Whether a function is one of TRL's kind: it names `completions` or `completion_ids`, or takes keywords alone."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some builtins have none
        return False
    keywords_only = bool(parameters) and all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in parameters)
    return keywords_only or not _MARKS.isdisjoint(p.name for p in parameters)
