"""Raw rows -> checked scenarios.

A row has its prompt in one of three forms: `prompt` (text), `messages` (a conversation that ends with a turn of the
user; TRL's data sets call it `prompt` too), or `user_responses` (several texts, each of which becomes a scenario of its
own). `fields` maps our names to the file's columns. Rewards see all columns of the file under their own names, too.
"""

import datetime
import math
import re
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any, get_args, get_type_hints

from stateset_lightning.data.rows import Problem, RawRow, kind, listed
from stateset_lightning.errors import DataError
from stateset_lightning.files.yaml_text import MAX_DIGITS
from stateset_lightning.redaction import MAX_DEPTH, MAX_VALUES
from stateset_lightning.types import Scenario, Turn

QUESTION_COLUMNS = ("prompt", "messages", "user_responses")
MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")  # where they hold more than a name
ROLES: tuple[str, ...] = get_args(get_type_hints(Turn)["role"])
_LIKELY_QUESTIONS = ("question", "text", "query", "input", "instruction", "problem", "content", "sentence")
_HALF = re.compile("[\ud800-\udfff]")


class _BadRow(Exception):
    """Why a row cannot be a scenario; becomes a `Problem` with the row's place."""


def check_columns(rows: Sequence[RawRow], fields: Mapping[str, str], origin: str) -> None:
    """Checks that the rows of `origin` (a file, say) have the columns that `fields` names, and one with a prompt.

    Raises:
        DataError: If none of the rows has such a column; it names the columns that there are. A column that only some
            rows lack is reported with these rows, by `to_scenarios`.
    """
    present = list(dict.fromkeys(name for row in rows for name in row.columns))
    has = f"it has: {listed(present)}"
    for ours, theirs in fields.items():
        if theirs not in present:
            raise DataError(f"{origin}: data.fields.{ours} names the column '{theirs}', which is not there; {has}")
    if present and not {*QUESTION_COLUMNS} & {*fields, *present}:
        guess = next((name for name in _LIKELY_QUESTIONS if name in present), present[0])
        raise DataError(
            f"{origin}: there is no column 'prompt', 'messages' or 'user_responses'; {has}. "
            f"Say which one holds the prompt, for example data.fields.prompt={guess}"
        )


def to_scenarios(
    rows: Sequence[RawRow], fields: Mapping[str, str], label: str, rewards: Sequence[str] | None = None
) -> tuple[list[tuple[Scenario, str]], list[Problem]]:
    """The scenarios of the rows, each with its place, and the problems of the rows that cannot be used.

    Args:
        rows: Rows of one file or list.
        fields: Our name -> the file's column.
        label: Rows without an id get `<label>:<row number>`.
        rewards: Names of the reward functions for rows that do not name their own.
    """
    scenarios: list[tuple[Scenario, str]] = []
    problems: list[Problem] = []
    for row in rows:
        try:
            scenarios += [(scenario, row.place) for scenario in _row_scenarios(row, fields, label, rewards)]
        except _BadRow as bad:
            problems.append(Problem(row.place, str(bad)))
    return scenarios, problems


def _row_scenarios(row: RawRow, fields: Mapping[str, str], label: str, rewards: Sequence[str] | None) -> list[Scenario]:
    for column in row.columns.items():
        _check_values(*column)
    columns = _renamed(row.columns, fields)
    columns["id"] = _checked_id(columns.get("id"), f"{label}:{row.number}")
    for name in ("context", "topic"):
        columns[name] = _checked_text(f"'{name}'", columns[name]) if columns.get(name) not in (None, "") else None
    columns["rewards"] = _checked_rewards(columns["rewards"]) if columns.get("rewards") is not None else rewards
    if isinstance(columns.get("prompt"), list | tuple) and columns.get("messages") is None:
        columns["messages"] = columns.pop("prompt")
    if media := [name for name in MEDIA_COLUMNS if isinstance(columns.get(name), list | tuple | Mapping | bytes)]:
        raise _BadRow(f"'{media[0]}' holds what no model sees: only the text model is trained, so leave it out")
    given = [name for name in QUESTION_COLUMNS if columns.get(name) is not None]
    if len(given) != 1:
        found = " and ".join(f"'{name}'" for name in given) or "none of them"
        raise _BadRow(f"needs exactly one of 'prompt', 'messages' and 'user_responses', but has {found}")
    responses = columns.pop("user_responses", None)
    if responses is not None:
        prompts = enumerate(_checked_texts("user_responses", responses))
        return [Scenario.model_validate({**columns, "id": f"{columns['id']}/{i}", "prompt": p}) for i, p in prompts]
    if given == ["messages"]:
        columns["messages"] = _checked_messages(columns["messages"])
    else:
        columns["prompt"] = _checked_text("the prompt", columns["prompt"])
    return [Scenario.model_validate(columns)]


def _renamed(columns: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    for ours, theirs in fields.items():
        if theirs not in columns:
            raise _BadRow(f"no column '{theirs}' (data.fields.{ours}); the row has: {listed(columns)}")
    return {**columns, **{ours: columns[theirs] for ours, theirs in fields.items()}}


def _checked_id(value: object, default: str) -> str:
    if value is None or value == "":
        return default
    # YAML makes numbers and dates of what looks like them; true/false is a slip.
    if isinstance(value, bool) or not isinstance(value, str | int | float | datetime.date):
        raise _BadRow(f"the id must be text or a number, not {kind(value)}")
    return str(value)


def _checked_text(what: str, value: object) -> str:
    if not isinstance(value, str):
        raise _BadRow(f"{what} must be text, not {kind(value)} ({value!r:.40}); put it in quotes")
    if not value or value.isspace():
        raise _BadRow(f"{what} is empty")
    return value


def _check_values(name: str, value: object) -> None:
    """A column holds what can be read to its end, copied and written."""
    if isinstance(value, str) and value.isascii() and name.isascii():
        return  # quickly: nearly all are such
    what = f"the {repr(name)[1:-1]} holds"
    left: list[tuple[object, int]] = [(name, 0), (value, 0)]
    for seen in count():
        if not left:
            return
        item, depth = left.pop()
        if seen > MAX_VALUES or depth > MAX_DEPTH:
            raise _BadRow(f"{what} more than {MAX_VALUES:,} values, or is nested more than {MAX_DEPTH} deep")
        if isinstance(item, str) and (half := None if item.isascii() else _HALF.search(item)):
            # JSON can write half of a surrogate pair, which no tokenizer takes and no file can hold.
            code = f"\\u{ord(half[0]):04x}"
            raise _BadRow(f"{what} {code}, half of a character (a surrogate without its pair); replace it")
        if isinstance(item, int) and item.bit_length() > MAX_DIGITS * math.log2(10):
            raise _BadRow(f"{what} an integer of more than {MAX_DIGITS:,} digits; make it text")
        if isinstance(item, Mapping):
            left += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list | tuple):
            left += [(part, depth + 1) for part in item]


def _checked_texts(name: str, value: object) -> list[str]:
    if not isinstance(value, list | tuple):
        raise _BadRow(f"'{name}' must be a list of texts, not {kind(value)}")
    if not value:
        raise _BadRow(f"'{name}' is an empty list")
    return [_checked_text(f"item {number} of '{name}'", text) for number, text in enumerate(value, start=1)]


def _checked_rewards(value: object) -> list[str]:
    # The name of this column is reserved: it says which reward functions score the row.
    names = _checked_texts("rewards", value)
    if len(set(names)) < len(names):
        raise _BadRow(f"'rewards' names a reward twice: {', '.join(names)}")
    return names


def _checked_messages(value: object) -> tuple[Turn, ...]:
    if not isinstance(value, list | tuple):
        raise _BadRow(f"'messages' must be a list of {{role, content}}, not {kind(value)}")
    turns = tuple(_checked_turn(number, message) for number, message in enumerate(value, start=1))
    if not turns:
        raise _BadRow("'messages' is an empty list")
    if turns[-1].role != "user":
        raise _BadRow(f"the last message must be the user's, not the {turns[-1].role}'s; the model answers it")
    _checked_text("the last message", turns[-1].content)
    return turns


def _checked_turn(number: int, message: object) -> Turn:
    if isinstance(message, Turn):
        message = dict(message)
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        found = kind(message)
        if isinstance(message, Mapping):
            found = f"a mapping with {', '.join(map(str, message)) or 'nothing'}"
        raise _BadRow(f"message {number} must have 'role' and 'content' and nothing else, but is {found}")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise _BadRow(f"message {number} has the role {role!r}; the roles are {', '.join(ROLES)}")
    if not isinstance(content, str):
        parts = content if isinstance(content, list | tuple) else ()
        kinds = [part["type"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("type"), str)]
        if media := [name for name in kinds if name != "text"]:
            raise _BadRow(f"message {number} holds {media[0]!r:.40}: only the text model is trained, so leave it out")
        raise _BadRow(f"the content of message {number} must be text, not {kind(content)}")
    return Turn(role, content)
