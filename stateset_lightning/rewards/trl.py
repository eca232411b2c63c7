"""TRL's reward functions `f(prompts, completions, **columns) -> list`, called with the one completion that has just
finished.
"""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from stateset_lightning.errors import ConfigError, RewardError
from stateset_lightning.rewards.base import FunctionReward, RewardResult
from stateset_lightning.types import Turn

_MARKS = {"completions", "completion_ids"}
_OWN = {"prompts", "completions", "log_extra", "log_metric"}
_MISSING = {
    "completion_ids": (
        "a reward gets the text; the number of tokens is the column completion_tokens: [n]. For TRL's functions of"
        " token ids take OverlongPenalty, LengthPenalty or RepetitionPenalty"
    ),
    "trainer_state": "a reward must not depend on when it is called; change weights between runs",
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
        weight: Factor of this reward in a completion's total; TRL's `reward_weights`.
        name: Name in logs; by default the function's.
        timeout: Seconds that one completion may take.

    Raises:
        ConfigError: If the function asks for something that only TRL has.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        conversational: bool | None = None,
        weight: float = 1.0,
        name: str | None = None,
        timeout: float | None = None,
    ) -> None:
        super().__init__(function, weight=weight, name=name, timeout=timeout)
        self.conversational = conversational
        parameters = inspect.signature(function).parameters.values()
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self._required = {p.name for p in parameters if p.name in self._named and p.default is p.empty}
        for missing in _MISSING.keys() & self._named:
            raise ConfigError(
                f"TRL reward '{self.name}' takes {missing}, which is not here: {_MISSING[missing]}. Remove the"
                " parameter"
            )

    def compute_reward(self, turns: Sequence[Turn], context: Mapping[str, Any] | None = None) -> Any:
        logged: dict[str, Any] = {}
        output = self.function(**self._arguments(turns, context or {}, logged))
        return self._awaited(output, logged) if inspect.isawaitable(output) else self._score(output, logged)

    def _arguments(self, turns: Sequence[Turn], context: Mapping[str, Any], logged: dict[str, Any]) -> dict[str, Any]:
        conversational = context.get("messages") is not None if self.conversational is None else self.conversational
        *prompt, completion = [{"role": turn.role, "content": turn.content} for turn in turns]
        arguments: dict[str, Any] = {
            name: [value] for name, value in context.items() if name not in ("prompt", "messages", *_OWN)
        }
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
            scores = list(output)
        except TypeError:
            scores = []
        if isinstance(output, str) or len(scores) != 1:
            raise RewardError(
                f"TRL reward '{self.name}' returned {output!r:.80} for one completion; it must return a list of one"
                " number or None"
            )
        return None if scores[0] is None else RewardResult(scores[0], logged)


def is_trl_function(function: Callable[..., Any]) -> bool:
    """Whether a function is one of TRL's kind: it names `completions` or `completion_ids`, or takes nothing but
    keywords.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some builtins have none
        return False
    return not _MARKS.isdisjoint(p.name for p in parameters) or (
        bool(parameters) and all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in parameters)
    )
