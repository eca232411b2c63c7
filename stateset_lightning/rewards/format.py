"""Rewards for the form of a completion: tags in their order, a pattern, JSON. All score 0 or 1."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from stateset_lightning.errors import ConfigError, require
from stateset_lightning.rewards.base import RewardFunction, RewardResult
from stateset_lightning.rewards.match import compiled
from stateset_lightning.rewards.text import completion
from stateset_lightning.types import Turn

_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL | re.IGNORECASE)


class FormatReward(RewardFunction):
    """1 if the completion has the wanted form, else 0. Exactly one of `tags` and `pattern` is given.

    Args:
        tags: Names of tags, such as `[think, answer]`: `<think>...</think>` and then `<answer>...</answer>` must each
            occur exactly once, in this order, not inside each other, and hold some text.
        pattern: A regular expression (Python's `re`) that the completion, without space around it, must match as a
            whole. `.` matches line ends too. Give a `timeout` if it has nested repetitions.
        only_tags: Whether text outside the tags is forbidden.
        **common: `weight`, `name` and `timeout` of every reward.

    Raises:
        ConfigError: If not exactly one of `tags` and `pattern` is given, or either is unusable.
    """

    def __init__(
        self, *, tags: list[str] | None = None, pattern: str | None = None, only_tags: bool = False, **common: Any
    ) -> None:
        super().__init__(**common)
        if (tags is None) == (pattern is None):
            raise ConfigError(f"exactly one of tags={tags!r} and pattern={pattern!r} must be given")
        if tags is not None and (isinstance(tags, str) or not tags or len(set(tags)) < len(tags)):
            raise ConfigError(f"tags={tags!r} must be a list of different names, such as [think, answer]")
        for tag in tags or []:
            if not re.fullmatch(r"\w[\w-]*", tag):
                raise ConfigError(f"tags={tags!r}: give bare names, such as think for <think>...</think>, not {tag!r}")
        if only_tags and tags is None:
            raise ConfigError(
                "only_tags=True goes with tags, not with a pattern: a pattern says itself what may stand where"
            )
        self.tags = tags
        self.pattern = None if pattern is None else compiled(pattern, re.DOTALL)
        self.only_tags = only_tags

    def compute_reward(self, turns: Sequence[Turn], context: Mapping[str, Any] | None = None) -> float:
        text = completion(turns).strip()
        if self.pattern is not None:
            return float(self.pattern.fullmatch(text) is not None)
        return float(self._tags_in_order(text))

    def _tags_in_order(self, text: str) -> bool:
        end, outside = 0, ""
        for tag in self.tags or []:
            opening, closing = f"<{tag}>", f"</{tag}>"
            if text.count(opening) != 1 or text.count(closing) != 1:
                return False
            start, stop = text.index(opening), text.index(closing)
            # out of order, closed before it opens, or empty
            if start < end or not text[start + len(opening) : stop].strip():
                return False
            outside += text[end:start]
            end = stop + len(closing)
        return not (self.only_tags and (outside + text[end:]).strip())


class JsonValid(RewardFunction):
    """1 if the completion is one valid JSON value (and satisfies a schema), else 0.

    JSON as in RFC 8259: `NaN` and `Infinity`, which Python would read, are not valid.

    Args:
        schema: A JSON Schema (https://json-schema.org) that the value must satisfy; needs the package `jsonschema`.
        allow_fence: Whether the whole completion may stand in a Markdown code fence, three backticks with or without
            `json`.
        **common: `weight`, `name` and `timeout` of every reward.

    Raises:
        ConfigError: If the schema is no schema, or `jsonschema` is not installed.
    """

    def __init__(self, *, schema: dict[str, Any] | None = None, allow_fence: bool = False, **common: Any) -> None:
        super().__init__(**common)
        if schema is not None:
            _check_schema(schema)
        self.schema = schema
        self.allow_fence = allow_fence

    def compute_reward(self, turns: Sequence[Turn], context: Mapping[str, Any] | None = None) -> RewardResult:
        text = completion(turns).strip()
        fenced = _FENCE.fullmatch(text) if self.allow_fence else None
        try:
            value = json.loads(fenced[1] if fenced else text, parse_constant=_reject_constant)
            return RewardResult(float(self.schema is None or _satisfies(value, self.schema)), {"parses": 1.0})
        except (ValueError, RecursionError):  # RecursionError: thousands of opening brackets
            return RewardResult(0.0, {"parses": 0.0})


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _check_schema(schema: dict[str, Any]) -> None:
    require("jsonschema", "json", "JsonValid(schema=...)")
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    try:
        validator_for(schema).check_schema(schema)
    except SchemaError as error:
        raise ConfigError(f"schema={schema!r} is no JSON Schema: {error.message} (at {error.json_path})") from error


def _satisfies(value: Any, schema: dict[str, Any]) -> bool:
    from jsonschema.validators import validator_for
    from referencing.jsonschema import EMPTY_REGISTRY  # the default one would fetch a remote $ref over the network

    return bool(validator_for(schema)(schema, registry=EMPTY_REGISTRY).is_valid(value))
