"""Rewards that check the completion's text: equal to the target, containing it, matching a pattern or a form, JSON.

All score 0 or 1.
"""

import json
import re
import unicodedata
from typing import Any, Literal

from stateset_lightning.errors import ConfigError, require, told_as
from stateset_lightning.rewards import base
from stateset_lightning.rewards.base import Context, RewardFunction, RewardResult, Turns, completion, options

_BOOLEANS = {"true", "false"}
_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL | re.IGNORECASE)


@options
class ExactMatch(RewardFunction):
    """1 if the completion equals the scenario's `target` (or one of them, if it is a list), else 0.

    A scenario without a target is a failure, not a zero. `true` and `false` are compared in any case.

    Args:
        ignore_case: Whether upper and lower case are the same.
        ignore_whitespace: Whether space around the text is ignored and any run of white space counts as one space.
        ignore_punctuation: Whether punctuation is removed from both texts (`Paris.` equals `Paris`, `don't` equals
            `dont`).
        **common: `weight`, `name` and `timeout` of every reward.
    """

    needs = ("target",)

    ignore_case: bool = False
    ignore_whitespace: bool = True
    ignore_punctuation: bool = False

    def compute_reward(self, turns: Turns, context: Context = None) -> RewardResult:
        accepted = map(self._normalized, base.target_texts(context, self.name, content=self._normalized))
        return RewardResult(float(self._normalized(completion(turns)) in accepted))

    def _normalized(self, text: str) -> str:
        text = unicodedata.normalize("NFC", text)
        text = text.casefold() if self.ignore_case else text
        if self.ignore_punctuation:
            text = "".join(character for character in text if not unicodedata.category(character).startswith("P"))
        text = " ".join(text.split()) if self.ignore_whitespace else text
        return text.lower() if text.lower() in _BOOLEANS else text


@options
class Contains(RewardFunction):
    """1 if the completion contains the given strings, else 0.

    A completion that lists every possible answer contains the right one as well: give short limits or a `LengthPenalty`
    with it.

    Args:
        strings: What to look for; by default the scenario's `target`, or its items if it is a list.
        require: Whether `all` strings must be there or `any` one of them is enough. By default all `strings`, and any
            item of a target, each of which is right.
        ignore_case: Whether upper and lower case are the same; they always are for `true` and `false`.
        **common: `weight`, `name` and `timeout` of every reward.

    Raises:
        ConfigError: If `strings` is empty or contains an empty string.
    """

    strings: list[str] | None = None
    require: Literal["all", "any"] | None = None
    ignore_case: bool = False

    def _set_up(self) -> None:
        strings = self.strings
        if strings is not None and (isinstance(strings, str) or not strings or not all(strings)):
            raise ConfigError(f"strings={strings!r} must be a list of non-empty strings; leave it out for the target")
        if self.require not in ("all", "any", None):
            raise ConfigError(f"require={self.require!r} must be 'all' or 'any'")
        self.needs = ("target",) if strings is None else ()

    def compute_reward(self, turns: Turns, context: Context = None) -> RewardResult:
        strings = self.strings if self.strings is not None else base.target_texts(context, self.name, content=str.strip)
        text, *strings = (unicodedata.normalize("NFC", each) for each in (completion(turns), *strings))
        if self.ignore_case or _BOOLEANS.issuperset(map(str.lower, strings)):
            text, strings = text.casefold(), [string.casefold() for string in strings]
        found = sum(string in text for string in strings)
        require = self.require or ("any" if self.strings is None else "all")
        score = found == len(strings) if require == "all" else found > 0
        return RewardResult(float(score), {"found": found, "of": len(strings)})


@options
class RegexMatch(RewardFunction):
    """1 if the completion matches a regular expression, else 0.

    Python's expressions can take exponential time on a text that just fails to match (`(a+)+b`). They hold the
    interpreter meanwhile, so give a `timeout` if the pattern has nested repetitions.

    Args:
        pattern: The expression (Python's `re`); flags may be written inline: `(?i)` ignores case, `(?s)` lets `.` match
            line ends.
        match: `search` finds it anywhere, `fullmatch` wants the whole completion to match.
        **common: `weight`, `name` and `timeout` of every reward.

    Raises:
        ConfigError: If the pattern is no regular expression.
    """

    pattern: str
    match: Literal["search", "fullmatch"] = "search"

    def _set_up(self) -> None:
        self._find = getattr(compiled(self.pattern), self.match)

    def compute_reward(self, turns: Turns, context: Context = None) -> float:
        return float(self._find(completion(turns)) is not None)


@options
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

    tags: list[str] | None = None
    pattern: str | None = None
    only_tags: bool = False

    def _set_up(self) -> None:
        tags, pattern = self.tags, self.pattern
        if (tags is None) == (pattern is None):
            raise ConfigError(f"exactly one of tags={tags!r} and pattern={pattern!r} must be given")
        if tags is not None and (isinstance(tags, str) or not tags or len(set(tags)) < len(tags)):
            raise ConfigError(f"tags={tags!r} must be a list of different names, such as [think, answer]")
        if not all(re.fullmatch(r"\w[\w-]*", tag) for tag in tags or []):
            raise ConfigError(f"tags={tags!r}: give bare names, such as think for <think>...</think>")
        if self.only_tags and tags is None:
            raise ConfigError("only_tags=True goes with tags; a pattern says itself what may stand where")
        if tags is not None:
            mark = rf"</?(?:{'|'.join(tags)})>"
            text = rf"(?:(?!{mark}).)*"
            outside = r"\s*" if self.only_tags else text
            pattern = outside + "".join(rf"<{tag}>\s*(?!{mark})\S{text}</{tag}>{outside}" for tag in tags)
        self._form = compiled(pattern or "", re.DOTALL)

    def compute_reward(self, turns: Turns, context: Context = None) -> float:
        return float(self._form.fullmatch(completion(turns).strip()) is not None)


@options
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

    schema: dict[str, Any] | None = None
    allow_fence: bool = False

    def _set_up(self) -> None:
        if self.schema is not None:
            _validator(self.schema)

    def compute_reward(self, turns: Turns, context: Context = None) -> RewardResult:
        text = completion(turns).strip()
        fenced = _FENCE.fullmatch(text) if self.allow_fence else None
        try:
            value = json.loads(fenced[1] if fenced else text, parse_constant=_reject_constant)
            return RewardResult(float(self.schema is None or _validator(self.schema).is_valid(value)), {"parses": 1.0})
        except (ValueError, RecursionError):  # RecursionError: thousands of opening brackets
            return RewardResult(0.0, {"parses": 0.0})


def compiled(pattern: str, flags: int = 0, key: str = "pattern") -> re.Pattern[str]:
    """Compile a user's pattern, given under this key.

    Raises:
        ConfigError: If it is no regular expression.
    """
    with told_as(ConfigError, f"{key}={pattern!r} is no regular expression: ", re.error):
        return re.compile(pattern, flags)


def last_match(pattern: re.Pattern[str], text: str) -> str | None:
    """The last match of a pattern, its first group if it has one; None without a match."""
    matches = list(pattern.finditer(text))
    return (matches[-1][min(1, pattern.groups)] or "") if matches else None


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _validator(schema: dict[str, Any]) -> Any:
    require("jsonschema", "json", "JsonValid(schema=...)")
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for
    from referencing.jsonschema import EMPTY_REGISTRY  # the default one would fetch a remote $ref over the network

    validator = validator_for(schema)
    try:
        validator.check_schema(schema)
    except SchemaError as error:
        raise ConfigError(f"schema={schema!r} is no JSON Schema: {error.message} (at {error.json_path})") from error
    return validator(schema, registry=EMPTY_REGISTRY)
