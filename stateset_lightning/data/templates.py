"""Templates of prompts over the columns of a row (Jinja2): the user's own, and those of shapes that are recognised.

They run in Jinja2's sandbox: they are the user's word, but the values that they see are not.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from numbers import Real
from string import ascii_uppercase
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError, meta
from jinja2.sandbox import SandboxedEnvironment

from stateset_lightning.errors import ConfigError, one_line
from stateset_lightning.types import is_nested, read_literal

# What belongs to a question; where such a column is neither used nor contained in the prompt, it is not clear what is.
_PART = re.compile(
    r"(prompt|instruction|question|question_stem|problem|query|input|body|premise|hypothesis|passages?|paragraphs?|story"
    r"|documents?|contexts?|article|evidence|support|background|table|schema|tools?|history|system"
    r"|system_prompt)(_?\d+)?"
    r"|(choices?|options?|opt?|endings?|sol|distractors?|incorrect_answers?|wrong_answers?|answer_choices|alternatives"
    r"|ans(?=_?[a-h\d]$)|answer(?=_?[a-h]$))(_?(?P<letter>[a-h]|\d+))?"
    r"|(?P<alone>[a-e])"
)


def is_template(text: str) -> bool:
    return "{{" in text or "{%" in text


def columns_of(template: str, key: str) -> list[str]:
    """The columns that a template names, which stands in the config under this key.

    Raises:
        ConfigError: If it is no template.
    """
    try:
        compiled(template)  # knows unknown filters, too
        return sorted(meta.find_undeclared_variables(_ENVIRONMENT.parse(template)) - {"row"})
    except TemplateSyntaxError as error:
        raise ConfigError(f"data.{key}={template!r:.200} is no Jinja2 template: {one_line(error)}") from error


def is_label(value: Any, as_text: bool = False) -> bool:
    """Whether a value looks like an index of choices (also one `as_text`, as all is in a CSV), or a letter of one."""
    if isinstance(value, str):
        return value in [*ascii_uppercase] or (as_text and re.fullmatch(r"-?\d+", value) is not None)
    return _is_index(value)


def _is_index(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and bool(value % 1 == 0)


def _options(choices: Any) -> dict[str, Any]:
    """Label -> text of choices: of a list, of {text, label} (ARC), a list of such, or such a mapping itself."""
    choices = choices.tolist() if hasattr(choices, "tolist") else read_literal(choices)
    found: Any = {}
    if isinstance(choices, Mapping):
        labels, texts = choices.get("label"), choices.get("text")
        are_lists = isinstance(labels, list) and isinstance(texts, list)
        found = dict(zip(labels, texts, strict=True)) if are_lists else choices  # type: ignore[arg-type]
    elif isinstance(choices, list) and len(choices) <= len(ascii_uppercase):
        letters = dict(zip(ascii_uppercase, choices, strict=False))
        items = {label: item if isinstance(item, Mapping) else {"text": item} for label, item in letters.items()}
        found = {item.get("label", label): item.get("text") for label, item in items.items()}
    if not found or not all(isinstance(text, str | int | float) for text in found.values()):
        known = "a list of at most 26 texts or numbers, or of {label, text}, or label: text"
        raise ValueError(f"the choices are not {known}; as text in a table, write them as JSON, or the rows as .jsonl")
    return {str(label): text for label, text in found.items()}


def _lettered(choices: Any) -> str:
    """A line for each choice: `A. red`."""
    if choices is None or (isinstance(choices, str) and not is_nested(choices)):
        return choices or ""
    return "\n".join(f"{label}. {text}" for label, text in _options(choices).items())


def _letter(answer: Any, choices: Any) -> str:
    """The label of the choice of an index from 0; of -1, which means that it is missing, nothing. Text stays."""
    if answer is None or answer != answer or answer == -1:
        return ""
    labels, texts = list(options := _options(choices)), list(options.values())
    if answer == "-1" and answer not in texts:
        return ""
    is_number = isinstance(answer, str) and answer.isdecimal()
    if is_number and answer not in (*labels, *texts):
        answer = int(answer)
    is_unclear = is_number and isinstance(choices, str) and answer in texts and int(answer) < len(labels)  # of a CSV
    if isinstance(answer, str) and not is_unclear and (answer in [*labels, *texts] or not answer.strip().isdigit()):
        return answer
    if _is_index(answer) and answer not in texts and 0 <= answer < len(labels):
        return labels[int(answer)]
    why = "both an index and one of them" if answer in texts else f"no index of the {len(labels)} (0 is the first)"
    raise ValueError(
        f"the answer {answer!r:.40} to choices is {why}; data.fields.target='{{{{ its column }}}}' takes it as it is"
    )


def _passages(value: Any) -> str:
    """Texts below each other; of a text, a list, or {title, sentences} (HotpotQA)."""
    if isinstance(value, Mapping) and {"title", "sentences"} <= value.keys():
        pairs = zip(value["title"], value["sentences"], strict=True)
        value = [f"{title}: {''.join(sentences)}" for title, sentences in pairs]
    if not all(isinstance(text, str | None) for text in (value if isinstance(value, list) else [value])):
        raise ValueError("a passage is neither text, nor a list of texts, nor title and sentences")
    return "\n\n".join(text or "" for text in value) if isinstance(value, list) else value or ""


# Renders the user's templates and this file's, over data that nobody has looked at. A missing value is no text: not
# "None", not "nan".
_ENVIRONMENT = SandboxedEnvironment(
    undefined=StrictUndefined, finalize=lambda value: "" if value is None or value != value else value
)
_ENVIRONMENT.filters |= {"lettered": _lettered, "passages": _passages, "letter": _letter}
compiled = lru_cache(_ENVIRONMENT.from_string)


def normal(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def is_empty(value: Any) -> bool:
    if isinstance(value, str | list | Mapping):
        return not (value.strip() if isinstance(value, str) else value)
    return value is None or (isinstance(value, float) and value != value)


def texts_of(value: Any, depth: int = 5) -> list[str]:
    """What a value holds, as text; not what is nested deeper, maybe in itself."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping | list | tuple):
        items = value.values() if isinstance(value, Mapping) else value
        return [text for item in items if depth for text in texts_of(item, depth - 1)]
    if isinstance(value, int) and value.bit_length() > 64:  # Python may refuse to write it
        return []
    return [] if is_empty(value) else [f"{value}".strip()]


def is_part(column: str) -> bool:
    """Whether a column's name says that it is part of a question."""
    return _PART.fullmatch(normal(column)) is not None


def lost_of(names: Sequence[str], used: Sequence[str], example: Mapping[str, Any]) -> list[str]:
    """Those columns that hold what the used ones do not."""
    shown = "\n".join(text for name in used for text in texts_of(example.get(name)))
    return [name for name in names if any(text not in shown for text in texts_of(example.get(name)))]


def joined(parts: Sequence[str], example: Mapping[str, Any]) -> str:
    """A template of columns, below each other."""
    shown = []
    for name in parts:
        known = _PART.fullmatch(normal(name))
        letter = known["letter"] or known["alone"] if known else None
        is_choices = normal(name) == "answers" or (known is not None and known[1] is None)
        is_text = isinstance(example[name], str) and not (is_choices and letter is None and is_nested(example[name]))
        filtered = "" if is_text else " | lettered" if is_choices else " | passages"
        shown.append(f"{letter.upper()}. " if letter else "")
        shown[-1] += f"{{{{ {reference(name)}{filtered} }}}}"
    return "\n\n".join(shown)


def reference(column: str) -> str:
    """How a template names a column."""
    return column if column.isidentifier() else f"row[{json.dumps(column, ensure_ascii=False)}]"
