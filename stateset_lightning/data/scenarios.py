"""Raw rows -> checked scenarios.

A row has its prompt in one of three forms: `prompt` (text), `messages` (a conversation that ends with a turn of the
user; TRL's data sets call it `prompt` too), or `user_responses` (several texts, each of which becomes a scenario of its
own; or where they are a script, the first is the prompt of a conversation that has them all). A `Shape` says which
columns these are. Rewards see all columns of the file under their own names, too; that of the target as the target is,
unless it is text or a mapping.
"""

import datetime
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from stateset_lightning.data.rows import BadRow, Problem, RawRow, Rows, kind
from stateset_lightning.data.shapes import QUESTION_COLUMNS, TARGET_COLUMNS, Shape
from stateset_lightning.data.templates import is_template, lost_of
from stateset_lightning.files.yaml_text import MAX_DIGITS
from stateset_lightning.redaction import MAX_DEPTH, MAX_VALUES
from stateset_lightning.types import Scenario, Turn, as_target, of_numpy, read_literal

_MEDIA_COLUMN = lru_cache(re.compile(r"(image|img|picture|photo|video|audio)(_(path|file|url))?s?", re.I).fullmatch)
# In such a column: a file, an address, or the bytes as base64; no caption.
_MEDIA_FILE = re.compile(
    r"data:|\S*://|\S{32,}$|.*\.(png|jpe?g|gif|webp|bmp|tiff?|mp[34]|wav|flac|ogg|m4a|webm|mov|avi|mkv)$", re.I
)
# Where LLaVA's rows and others' have them.
_MEDIA_MARK = re.compile(r"\A\s*<(image|video|audio)>\s*\n|\n\s*<(image|video|audio)>\s*\Z")
_NO_MEDIA = "only the text model is trained: take the row out"
_NAMES = {"system": "system developer", "user": "user human prompter", "assistant": "assistant gpt bot model chatgpt"}
_NAMES |= {"tool": "tool function observation"}
_ROLES = {name: role for role, names in _NAMES.items() for name in names.split()}
_AS_PROMPTS = "each of the user_responses is a prompt of its own (model.environment.max_turns above 1: a conversation)"
_AS_SCRIPT = "the user_responses are said one after another, in a conversation"
_PRINTED_LIST = re.compile(r"""[\[{].*\barray\(|\[\s*('[^']*'|"[^"]*")\s+['"]""", re.DOTALL)
_PRINTED = "was printed by pandas with its arrays; write the rows as .jsonl or .parquet"
_CONTEXT = "'context', which goes into the system turn unless data.fields.context=null,"


@dataclass(frozen=True)
class Part:
    """The rows of one file or list, and how scenarios are made of them.

    Args:
        rows: The rows, and what is known of those that cannot be read.
        shape: How they are read.
        label: Rows without an id get `<label>:<row number>`.
        rewards: Names of the reward functions for rows that do not name their own.
        are_scripts: Whether a row's `user_responses` are said in one conversation.
    """

    rows: Rows
    shape: Shape
    label: str
    rewards: Sequence[str] | None = None
    are_scripts: bool = False

    def scenarios(self, readings: Iterable[RawRow | Problem]) -> tuple[list[tuple[Scenario, str]], list[Problem]]:
        """The scenarios of some of the rows, each with its place, and the problems of those that cannot be used."""
        scenarios, problems = list[tuple[Scenario, str]](), list[Problem]()
        for row in readings:
            try:
                scenarios += [(scenario, row.place) for scenario in _row_scenarios(row, self)]
            except BadRow as bad:
                problems.append(Problem(row.place, str(bad)))
        return scenarios, problems


def _row_scenarios(row: RawRow | Problem, part: Part) -> list[Scenario]:
    if isinstance(row, Problem):
        raise BadRow(row.reason)
    shape = part.shape
    for column in row.columns.items():
        _check_values(*column)  # before a template writes one out
    if not shape.options.row:  # which gets what it is given
        row = replace(row, columns={n: v if isinstance(v, str) else _plain(v) for n, v in row.columns.items()})
    if (columns := shape.columns(row)) is None:
        return []
    for name, value in columns.items():
        if shape.options.row or value is not row.columns.get(name):  # else it has been looked at
            _check_values(name, value)
            columns[name] = value if isinstance(value, str) else _plain(value)
    columns["id"] = _checked_id(columns.get("id"), f"{part.label}:{row.number}")
    columns["context"] = _checked_text(_CONTEXT, columns["context"]) if columns.get("context") else None
    topic = columns.get("topic")
    topic = ", ".join(map(str, topic)) if isinstance(topic, list) else topic
    columns["topic"] = None if topic in (None, "") else str(topic)
    # The name of this column is reserved: it says which reward functions score the row.
    given_rewards = columns.get("rewards")
    columns["rewards"] = part.rewards if given_rewards is None else checked_texts("rewards", given_rewards)
    columns["target"] = _checked_target(columns.get("target"), shape)
    if (source := shape.target_column) and not isinstance(columns.get(source), str | Mapping):
        columns[source] = columns["target"]
    _lift_messages(columns, shape)
    given = [name for name in QUESTION_COLUMNS if columns.get(name) is not None]
    turns = columns.get("messages")
    has_both = given == ["prompt", "messages"] and isinstance(turns, list) and len(turns) > 1
    if has_both and not lost_of(["prompt"], ["messages"], columns):
        del columns["prompt"], given[0]  # the messages have it, and more (No Robots)
    if len(given) != 1:
        found = " and ".join(f"'{name}'" for name in given) or "none of them"
        choose = f"; choose one: data.format={given[0]} or data.fields.{given[0]}=null" if given else ""
        raise BadRow(f"needs exactly one of 'prompt', 'messages' and 'user_responses', but has {found}{choose}")
    if (responses := columns.pop("user_responses", None)) is not None:
        texts = checked_texts("user_responses", responses)
        if len(texts) > 1:
            shape.counts[_AS_SCRIPT if part.are_scripts else _AS_PROMPTS] += 1
        if part.are_scripts:
            return [Scenario.model_validate({**columns, "prompt": texts[0], "user_responses": texts})]
        prompts = enumerate(texts)
        return [Scenario.model_validate({**columns, "id": f"{columns['id']}/{i}", "prompt": p}) for i, p in prompts]
    if given == ["messages"]:
        columns["messages"] = _conversation(columns, shape)
    else:
        columns["prompt"] = _checked_text("the prompt", columns["prompt"])
    _refuse_media(columns, shape)
    return [Scenario.model_validate(columns)]


def _plain(value: Any) -> Any:
    """Lists and numbers of numpy as Python's; NaN, which stands for what is missing in a table, as None."""
    value = of_numpy(value)
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    is_missing = type(value).__name__ in ("NAType", "NaTType")  # pandas'
    return None if is_missing or (isinstance(value, float) and math.isnan(value)) else value


def _lift_messages(columns: dict[str, Any], shape: Shape) -> None:
    """A conversation stands in `messages`, as a list, wherever it came from."""
    name = "messages" if columns.get("messages") is not None else "prompt"
    value = columns.get(name)
    if isinstance(value, str) and re.match(r"\s*\[\s*\{", value) and not is_template(shape.sources.get(name) or ""):
        found = read_literal(value)
        if isinstance(found, list) and all(isinstance(m, Mapping) and ("role" in m or "from" in m) for m in found):
            _check_values(name, found)
            shape.counts["messages that were written as text are read as messages"] += 1
            columns[name] = found
        elif isinstance(found, str) and re.match(r"\s*\[\s*\{\s*'(role|from)'", found):
            raise BadRow(f"the conversation {_PRINTED}")
    if name == "prompt" and isinstance(columns.get(name), list | tuple):
        columns["messages"] = columns.pop(name)


def _checked_target(value: object, shape: Shape) -> Any:
    source = shape.sources.get("target") or "target"
    value = read_literal(value) if source == "answers" else value  # SQuAD's, in a table of texts
    if isinstance(value, str) and _PRINTED_LIST.match(value):
        raise BadRow(f"the target {_PRINTED}")
    if isinstance(value, str) and re.fullmatch(r"""-?\d+\.0|\[['"].*\]""", value, re.DOTALL):
        shape.counts["targets written as 4.0 or as ['4'] are compared as such text; pandas' .to_csv writes so"] += 1
    try:
        return as_target(value)
    except ValueError as error:
        keys = [*value] if isinstance(value, Mapping) else []
        likely = [key for key in keys if len(keys) == 1 or key in (*TARGET_COLUMNS, "value")]
        inner = f"={source}.{likely[0]}" if likely else ""
        takes = f"data.fields.target{inner} takes a part of it (a dotted path), data.fields.target=null none"
        whole = f"a function gets it whole by the latter and data.fields.ground_truth={source}"
        raise BadRow(
            f"the target {error}; give text, a number, true/false or a list of such: {takes}; {whole}"
        ) from error


def _refuse_media(columns: Mapping[str, Any], shape: Shape) -> None:
    """No row with an image, a sound or a video is trained without it, unless `data.fields` sets its column to null."""
    for name, value in columns.items():
        if not value or name in shape.options.chosen:
            continue
        item = value[0] if isinstance(value, list) else value
        is_media = isinstance(item, Mapping) and ({"bytes", "path"} <= item.keys() or "sampling_rate" in item)
        if _MEDIA_COLUMN(name):
            is_media = bool(_MEDIA_FILE.match(value)) if isinstance(value, str) else not isinstance(value, int | float)
        if is_media:
            raise BadRow(f"'{name}' holds what no model sees: {_NO_MEDIA}, or data.fields.{name}=null to train without")


def _checked_id(value: object, default: str) -> str:
    if value is None or value == "":
        return default
    # YAML makes numbers and dates of what looks like them; true/false is a slip.
    if isinstance(value, bool) or not isinstance(value, str | int | float | datetime.date):
        raise BadRow(f"the id must be text or a number, not {kind(value)}; data.fields.id=null numbers the rows")
    return str(as_target(value) if isinstance(value, float) and math.isfinite(value) else value)


def _checked_text(what: str, value: object) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{what} must be text, not {kind(value)} ({value!r:.40}); put it in quotes")
    if not value or value.isspace():
        raise BadRow(f"{what} is empty")
    if mark := _MEDIA_MARK.search(value):
        raise BadRow(f"{what} has the mark {mark[0].strip()} of what no model sees: {_NO_MEDIA}")
    return value


def _check_values(name: str, value: object) -> None:
    """A column holds what can be read to its end, copied and written."""
    if isinstance(value, str) and value.isascii() and name.isascii():
        return  # quickly: nearly all are such
    what = f"the {repr(name)[1:-1]} holds"
    left: list[tuple[object, int]] = [(name, 0), (value, 0)]
    seen = 0
    while left:
        (item, depth), seen = left.pop(), seen + 1
        if seen > MAX_VALUES or depth > MAX_DEPTH:
            raise BadRow(f"{what} more than {MAX_VALUES:,} values, or is nested more than {MAX_DEPTH} deep")
        if isinstance(item, str) and (half := None if item.isascii() else re.search("[\ud800-\udfff]", item)):
            # JSON can write half of a surrogate pair, which no tokenizer takes and no file can hold.
            raise BadRow(f"{what} \\u{ord(half[0]):04x}, half of a character (a surrogate without a pair); replace it")
        if isinstance(item, int) and item.bit_length() > MAX_DIGITS * math.log2(10):
            raise BadRow(f"{what} an integer of more than {MAX_DIGITS:,} digits; make it text")
        if isinstance(item, Mapping):
            left += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list | tuple):
            left += [(part, depth + 1) for part in item]


def _checked_list(name: str, items: str, value: object) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise BadRow(f"'{name}' must be a list of {items}, not {kind(value)}")
    if not value:
        raise BadRow(f"'{name}' is an empty list")
    return value


def checked_texts(name: str, value: object) -> list[str]:
    """The texts of a column.

    Raises:
        BadRow: If it is no list, is empty, or holds what is no text, or an empty one.
    """
    texts = enumerate(_checked_list(name, "texts", value), start=1)
    return [_checked_text(f"item {number} of '{name}'", text) for number, text in texts]


def _conversation(columns: dict[str, Any], shape: Shape) -> tuple[Turn, ...]:
    """The turns that are answered. A last one of the assistant is the target, a prefill or refused."""
    final, messages = shape.options.final_assistant_turn, columns["messages"]
    listed = enumerate(_checked_list("messages", "{role, content}", messages), start=1)
    turns = [_checked_turn(number, message) for number, message in listed]
    begun: list[Turn] = []
    if len(turns) > 1 and turns[-1].role == "assistant" and final != "error":
        answer = turns.pop().content
        if final == "prefill":
            begun = [Turn("assistant", _checked_text("the last turn, a prefill,", answer))]
            shape.counts["the last turn, the assistant's, begins the answer (data.final_assistant_turn)"] += 1
        elif columns["target"] is None or final == "target":
            columns["target"] = answer
            shape.counts["the last turn, the assistant's, is the target (data.final_assistant_turn)"] += 1
        else:
            shape.counts["the last turn, the assistant's, is left out: a column is the target"] += 1
    if turns[-1].role != "user":
        remedy = " (data.final_assistant_turn=target or prefill)" if final == "error" else ""
        raise BadRow(f"the last message must be the user's, not the {turns[-1].role}'s; the model answers it{remedy}")
    _checked_text("the last message", turns[-1].content)
    return (*turns, *begun)


def _checked_turn(number: int, message: object) -> Turn:
    """A turn of {role, content} or {from, value}; what else it holds does not count."""
    if isinstance(message, Turn):
        return message
    names = ("from", "value") if isinstance(message, Mapping) and "from" in message else ("role", "content")
    if not isinstance(message, Mapping) or not {*names} <= message.keys():
        keys = f"a mapping with {', '.join(map(str, message)) or 'nothing'}" if isinstance(message, Mapping) else ""
        found = keys or kind(message)
        raise BadRow(f"message {number} must have 'role' and 'content' (or 'from' and 'value'), but is {found}")
    if lost := next((name for name in ("tool_calls", "function_call", "images", "audio") if message.get(name)), None):
        raise BadRow(f"message {number} holds '{lost}', which would be lost: {_NO_MEDIA}")
    role, content = message[names[0]], message[names[1]]
    if not isinstance(role, str) or (known := _ROLES.get(role.lower())) is None:
        raise BadRow(f"message {number} has the role {role!r}; the roles are {', '.join(_ROLES)}")
    if isinstance(content, list | tuple):
        parts = [part if isinstance(part, Mapping) else {"text": part} for part in content]
        kinds = [each for part in parts if isinstance(each := part.get("type"), str)]
        if media := [each for each in kinds if each not in ("text", "input_text", "output_text")]:
            raise BadRow(f"message {number} holds {media[0]!r:.40}: {_NO_MEDIA}")
        if parts and all(isinstance(part.get("text"), str) for part in parts):
            content = "".join(part["text"] for part in parts)
    if not isinstance(content, str):
        raise BadRow(f"the content of message {number} must be text, not {kind(content)}")
    return Turn(known, content)  # type: ignore[arg-type]
