"""What the columns of a file mean: a shape says which column, or template of columns, is prompt, target and so on.

A shape is recognised by the names of a file's columns, or named by `data.format`; what the user chose in `data.fields`,
`data.prompt_template` and `data.system_template` wins. Templates are the user's own or stand below: nothing that a row
holds is ever read as one.
"""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
import pkgutil
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from string import ascii_uppercase
from typing import Any, Literal, get_args

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, meta
from jinja2.sandbox import SandboxedEnvironment

from stateset_lightning.data.reading import RawRow, kind, listed
from stateset_lightning.errors import ConfigError, DataError, one_line
from stateset_lightning.types import at_path, read_literal

QUESTION_COLUMNS = ("prompt", "messages", "user_responses")

Format = Literal["auto", "prompt", "messages", "alpaca", "sharegpt", "verl", "openai", "preference", "qa"]
FinalTurn = Literal["target", "prefill", "error"]

# The columns by which a shape is recognised, in this order, and for data.format those that it needs. One without any
# has a question under one of the names below.
_NEEDED: dict[str, tuple[str, ...]] = {
    "verl": ("prompt", "reward_model"),
    "preference": ("prompt", "chosen", "rejected"),
    "prompt": ("prompt",),
    "messages": ("messages",),
    "openai": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction",),
    "qa": (),
}

# Names are compared in lower case, without space around them, and with _ for other space.
_QUESTIONS = ("question", "problem", "query", "question_stem")
_CHOICES = ("choices", "options")
_PASSAGES = ("context", "passage", "article")
_TARGETS: tuple[str, ...] = (
    "target",
    "answerkey",
    "answer",
    "final_answer",
    "expected_answer",
    "correct_answer",
    "ground_truth",
)
_TARGETS += ("answers", "solution", "completion", "response", "output")
_SYSTEMS = ("context", "system", "system_prompt")

# What is proposed where nothing is recognised: these before other texts, and never what cannot be a prompt.
_LIKELY_QUESTIONS = ("text", "input", "content", "sentence")
_NO_QUESTION = re.compile(
    r"(.*_)?(id|ids|idx|index|uuid|guid|hash|labels?|target|class|category|tags?|score|level|type|subject|source|url|path"
    r"|split|lang|language|date|time|timestamp|name|title|topic|model|file|filename|dataset|difficulty)(_.*)?|system.*"
)
_COUNTDOWN = "Using the numbers {{ nums }}, write an expression that equals {{ target }}."


class BadRow(Exception):
    """Why a row cannot be a scenario; becomes a `Problem` with the row's place."""


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """What the user says about the columns of the rows.

    Args:
        fields: Our name -> the file's column, a dotted path, a template, or None for none.
        format: The shape of the rows; see `docs/data.md`.
        prompt_template: Jinja2 template of the prompt, over the row's columns.
        system_template: Jinja2 template of the row's system turn.
        row: A function, or its import path: a row's columns -> those that count, or None to leave the row out.
        final_assistant_turn: What a last turn of the assistant is; None: the target, where no column is it.
        needs_target: Whether a target that `fields` names must be there.

    Raises:
        ConfigError: If options contradict each other, or the row function cannot be imported.
    """

    fields: Mapping[str, str | None] | None = None
    format: Format = "auto"
    prompt_template: str | None = None
    system_template: str | None = None
    row: str | Callable[..., Any] | None = None
    final_assistant_turn: FinalTurn | None = None
    needs_target: bool = True

    def __post_init__(self) -> None:
        for name, hint in (("format", Format), ("final_assistant_turn", FinalTurn)):
            if (value := getattr(self, name)) not in (None, *get_args(hint)):
                raise ConfigError(f"data.{name}={value!r} must be one of {', '.join(get_args(hint))}")
        for option, name in _TEMPLATES.items():
            if (self.fields or {}).get(name) is not None and getattr(self, option) is not None:
                raise ConfigError(f"data.{option} and data.fields.{name} are both given; leave one of them out")

    def of(self, said: Mapping[str, Any]) -> "RowOptions":
        """Those among what is `said` (of a source, say), if it has any; else these."""
        own = {each.name: value for each in fields(self) if (value := said.get(each.name)) is not None}
        return RowOptions(**{"needs_target": self.needs_target, **own}) if own else self

    @cached_property
    def chosen(self) -> dict[str, str | None]:
        """What the user chose: our name -> a path, a template, or None."""
        templates = {name: getattr(self, option) for option, name in _TEMPLATES.items()}
        # On a command line, the shell leaves `\n` as it is. In LaTeX a small letter follows (`\nu`).
        written = {name: re.sub(r"\\n(?![a-z])", "\n", text) for name, text in templates.items() if text is not None}
        return {**(self.fields or {}), **written}

    @cached_property
    def _function(self) -> Callable[..., Any] | None:
        if not isinstance(self.row, str):
            return self.row
        try:
            return pkgutil.resolve_name(self.row)
        except Exception as error:  # a user's module may raise anything
            raise ConfigError(
                f"data.row={self.row}: cannot be imported ({type(error).__name__}: {one_line(error)}); give one's"
                " path, such as my_module.to_scenario"
            ) from error

    def columns(self, row: RawRow) -> Mapping[str, Any] | None:
        """The columns of a row; None if the user's function leaves it out.

        Raises:
            BadRow: If that function raises, or returns something else.
        """
        if self._function is None:
            return row.columns
        try:
            made = self._function(dict(row.columns))
        except Exception as error:
            raise BadRow(f"data.row raised {type(error).__name__}: {one_line(error)}") from error
        if made is not None and not (isinstance(made, Mapping) and all(isinstance(name, str) for name in made)):
            raise BadRow(f"data.row returned {made!r:.40}, which is neither a mapping of columns nor None")
        return made


_TEMPLATES = {"prompt_template": "prompt", "system_template": "context"}


@dataclass(frozen=True, slots=True)
class Shape:
    """How the rows of a file are read.

    Args:
        name: A format, or `fields` where the user chose the prompt.
        sources: Our name -> a column, a dotted path, a template, or None: there is none.
        present: The columns that the file has.
        options: What the user said.
        counts: What was done to how many rows, in words; grows as rows are read.
    """

    name: str
    sources: Mapping[str, str | None]
    present: Sequence[str]
    options: RowOptions
    counts: Counter[str] = field(default_factory=Counter)

    def columns(self, row: RawRow) -> dict[str, Any] | None:
        """The columns of a row under our names, and all others; None for a row that is left out.

        Raises:
            BadRow: If a column that was chosen is not there, or a template cannot be rendered.
        """
        if (given := self.options.columns(row)) is None:
            self.counts["left out by data.row"] += 1
            return None
        return {**given, **{ours: self._value(ours, theirs, given) for ours, theirs in self.sources.items()}}

    def announcement(self) -> str:
        """What was taken for what, and done to rows; empty where the file has our names, and nothing was done."""
        shown = {ours: self.sources.get(ours) for ours in (*QUESTION_COLUMNS, "context", "target")}
        words = {**dict.fromkeys(QUESTION_COLUMNS, "prompt"), "context": "system turn"}
        said = [f"{words.get(ours, ours)} from {theirs!r}" for ours, theirs in shown.items() if theirs]
        done = [f"{what} ({count:,} rows)" for what, count in self.counts.items()]
        is_plain = all(theirs in (None, ours) for ours, theirs in shown.items()) and not done
        return "" if is_plain else "; ".join([f"read as {self.name}: {', '.join(said)}", *done])

    def _value(self, ours: str, theirs: str | None, given: Mapping[str, Any]) -> Any:
        if theirs is None:
            return None
        is_chosen = ours in self.options.chosen
        if theirs not in given and is_template(theirs):
            # A column that other rows have is missing here: for the user's own template that is an error.
            return _rendered(theirs, given if is_chosen else {**dict.fromkeys(self.present), **given}, ours)
        with suppress(KeyError):
            return at_path(given, theirs)
        if is_chosen and (ours != "target" or self.options.needs_target):
            raise BadRow(f"no column '{theirs}' (data.fields.{ours}); the row has: {listed(given)}")
        return None


def recognise(sample: Sequence[RawRow], options: RowOptions, origin: str) -> Shape:
    """How the rows of `origin` (a file, say) are read, by their first ones.

    Raises:
        DataError: If none of the rows has a column that the user chose, or it is not clear which one holds the prompt.
            It names the columns that there are.
    """
    rows: list[Mapping[str, Any]] = []
    for row in sample:
        with suppress(BadRow):  # told of when all rows are read
            rows += filter(None, [options.columns(row)])
    # What each column holds, in some row.
    example: dict[str, Any] = {name: value for row in reversed(rows) for name, value in row.items()}
    example |= {name: value for row in reversed(rows) for name, value in row.items() if value is not None}
    present = list(dict.fromkeys(name for row in rows for name in row))
    if not rows:
        return Shape("prompt", options.chosen, present, options)
    chosen, needs_target = options.chosen, options.needs_target
    for ours, theirs in chosen.items():
        if theirs is not None and (ours != "target" or needs_target):
            _check_there(ours, theirs, rows, example, origin)
    name, sources = _recognised(_ByName(present), example, options, origin)
    if any(chosen.get(question) for question in QUESTION_COLUMNS):
        sources |= dict.fromkeys(QUESTION_COLUMNS)
    return Shape(name, {**sources, **chosen}, present, options)


class _ByName(dict[str, str]):
    """The columns by their names as these are compared; an exact name wins."""

    def __init__(self, present: Iterable[str]) -> None:
        super().__init__({re.sub(r"[\s-]+", "_", name.strip().lower()): name for name in present})
        self |= {name: name for name in present}

    def first(self, names: Iterable[str]) -> str | None:
        return next((self[name] for name in names if name in self), None)


def _recognised(
    by_name: _ByName, example: Mapping[str, Any], options: RowOptions, origin: str
) -> tuple[str, dict[str, str | None]]:
    """A shape's name, and what it takes for what."""
    chosen = options.chosen
    target = by_name.first(_TARGETS)
    sources: dict[str, str | None] = {"target": target, "context": by_name.first(_SYSTEMS)}
    if any(chosen.get(question) for question in QUESTION_COLUMNS):
        return "fields", sources
    asked, name = by_name.first(_QUESTIONS), str(options.format)
    if name == "auto":
        own = [column for column in QUESTION_COLUMNS if column in by_name and column not in chosen]
        if "prompt" not in own and asked and target:  # also beside the conversation (NuminaMath)
            name = "qa"
        elif own == ["user_responses"]:
            return "user_responses", sources
        else:
            known = [each for each, needed in _NEEDED.items() if needed and {*needed} <= by_name.keys() - chosen.keys()]
            name = known[0] if known else "qa"
    lacks = [column for column in _NEEDED[name] if column not in by_name]
    if lacks or (name == "qa" and not asked):
        raise _unsure(example, options, origin, lacks)
    question = dict.fromkeys(QUESTION_COLUMNS)
    if options.format == "auto" and name in ("prompt", "messages"):  # a row has one of them
        question = {column: by_name.get(column) for column in QUESTION_COLUMNS}
    elif name in ("prompt", "verl", "preference"):
        question["prompt"] = by_name["prompt"]
    elif name in ("messages", "openai", "sharegpt"):
        question["messages"] = by_name[_NEEDED[name][0]]
    else:
        parts = [by_name["instruction"], by_name.first(["input"])] if name == "alpaca" else [asked]
        choices = by_name.first(_CHOICES) if name == "qa" else None
        passage = by_name.first(_PASSAGES)
        if passage == by_name.get("context"):
            sources["context"] = by_name.first(_SYSTEMS[1:])
        if isinstance(example.get(target or ""), int) and isinstance(example.get(choices or ""), list):  # MMLU
            sources["target"] = f"{{{{ '{ascii_uppercase}'[{_reference(str(target))}] }}}}"
        text = [_reference(part) for part in parts if part]
        text.insert(0 if name == "qa" else len(text), f"{_reference(passage)} | passages" if passage else "")
        text.append(f"{_reference(choices)} | lettered" if choices else "")
        text = [part for part in text if part]
        is_column = text == [_reference(str(parts[0]))]
        question["prompt"] = parts[0] if is_column else "\n\n".join(f"{{{{ {part} }}}}" for part in text)
    if name == "verl":
        sources["target"] = f"{by_name['reward_model']}.ground_truth"
    elif name == "preference":
        sources["target"] = by_name.get("target")
    return name, {**question, **sources}


def _reference(column: str) -> str:
    """How a template names a column."""
    return column if column.isidentifier() else f"row[{column!r}]"


def _check_there(
    ours: str, theirs: str, rows: Sequence[Mapping[str, Any]], example: Mapping[str, Any], at: str
) -> None:
    """Some row has what the user chose."""
    has = f"which is not there; it has: {_described(example)}"
    if theirs not in example and is_template(theirs):
        option = next((o for o, name in _TEMPLATES.items() if name == ours), f"fields.{ours}")
        compiled(theirs, option)
        named = meta.find_undeclared_variables(_environment().parse(theirs))
        if unknown := sorted(named - {*example, "row"}):
            raise DataError(f"{at}: data.{option} names '{unknown[0]}', {has}")
        return
    for row in rows:
        with suppress(KeyError):
            at_path(row, theirs)
            return
    raise DataError(f"{at}: data.fields.{ours} names the column '{theirs}', {has}")


def _described(example: Mapping[str, Any]) -> str:
    """The columns, those inside a mapping too."""
    return listed(
        f"{name}.{inner}" if inner else name
        for name, value in example.items()
        for inner in (list(value) if isinstance(value, Mapping) and value else [""])
    )


def _unsure(example: Mapping[str, Any], options: RowOptions, origin: str, lacks: Sequence[str]) -> DataError:
    """The error where no prompt is found; it proposes what is likely to be right, or nothing."""
    is_text = {name: isinstance(value, str) for name, value in example.items()}
    texts = [n for n, holds in is_text.items() if holds and n.isidentifier() and not _NO_QUESTION.fullmatch(n.lower())]
    likely = next((name for name in _LIKELY_QUESTIONS if name in texts), texts[0] if len(texts) == 1 else None)
    proposed = [f"--data.fields.prompt={likely}"] if likely else []
    template = _COUNTDOWN if {"nums", "target"} <= example.keys() else " ".join(f"{{{{ {name} }}}}" for name in texts)
    if 2 <= len(texts) <= 4 or template == _COUNTDOWN:
        proposed.append(f"--data.prompt_template='{template}'")
    what = "there is no column 'prompt', 'messages' or 'user_responses', and no shape that is known by its columns"
    if options.format != "auto":
        what = f"data.format={options.format} needs the column {' and '.join(map(repr, lacks)) or repr(_QUESTIONS[0])}"
    say = " or ".join(proposed) or "data.fields.prompt (a column), data.prompt_template (of several) or data.row"
    return DataError(f"{origin}: {what}; it has: {_described(example)}. Say which one holds the prompt: {say}")


# Templates ------------------------------------------------------------------------------------------------------------


def is_template(text: str) -> bool:
    return "{{" in text or "{%" in text


@lru_cache
def _environment() -> SandboxedEnvironment:
    """Rendered are the user's templates and this file's, over data that nobody has looked at."""
    # A missing value is no text: not "None", not "nan".
    environment = SandboxedEnvironment(
        undefined=StrictUndefined, finalize=lambda value: "" if value is None or value != value else value
    )
    environment.filters |= {"lettered": _lettered, "passages": _passages}
    return environment


@lru_cache
def compiled(template: str, option: str) -> Template:
    """A user's template, given as this option.

    Raises:
        ConfigError: If it is none.
    """
    try:
        return _environment().from_string(template)
    except TemplateSyntaxError as error:
        raise ConfigError(f"data.{option}={template!r:.200} is no Jinja2 template: {one_line(error)}") from error


def _rendered(template: str, given: Mapping[str, Any], ours: str) -> str:
    try:
        return compiled(template, f"fields.{ours}").render({"row": given, **given}).strip()
    except Exception as error:  # a template may ask anything of a value
        raise BadRow(f"the template of the {ours}: {one_line(error)}; the row has: {_described(given)}") from error


def _lettered(choices: Any) -> str:
    """A line for each choice: `A. red`; of a list, or of {text, label} (ARC)."""
    choices = read_literal(choices) if isinstance(choices, str) else choices
    texts = choices["text"] if isinstance(choices, Mapping) else choices
    labels = choices.get("label") if isinstance(choices, Mapping) else None
    return "\n".join(f"{label}. {text}" for label, text in zip(labels or ascii_uppercase, texts, strict=bool(labels)))


def _passages(value: Any) -> str:
    """Texts below each other; of a text, a list, or {title, sentences} (HotpotQA)."""
    if isinstance(value, Mapping) and {"title", "sentences"} <= value.keys():
        pairs = zip(value["title"], value["sentences"], strict=True)
        value = [f"{title}: {''.join(sentences)}" for title, sentences in pairs]
    if isinstance(value, list):
        return "\n\n".join(map(_passages, value))
    if value is None or isinstance(value, str):
        return value or ""
    raise ValueError(f"a passage must be text, not {kind(value)}; choose another with data.prompt_template")
