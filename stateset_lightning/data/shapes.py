"""What the columns of a file mean: a shape says which column, or template of columns, is prompt, target and so on.

A shape is recognised by the names of a file's columns, or named by `data.format`; what the user chose in `data.fields`,
`data.prompt_template` and `data.system_template` wins. Templates are the user's own, or made here of names of columns:
nothing that a row holds is ever read as one.
"""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, get_args

from stateset_lightning.data import templates
from stateset_lightning.data.rows import BadRow, RawRow, listed
from stateset_lightning.data.templates import columns_of, compiled, is_template
from stateset_lightning.errors import ConfigError, DataError, by_path, one_line
from stateset_lightning.types import ABSENT, at_path, of_numpy, read_literal

QUESTION_COLUMNS = ("prompt", "messages", "user_responses")

Format = Literal["auto", "prompt", "messages", "alpaca", "sharegpt", "verl", "openai", "preference", "qa"]
FinalTurn = Literal["target", "prefill", "error"]

# The columns that a format needs, and by which it is recognised, in this order.
_NEEDED = {"verl": ["prompt", "reward_model"], "preference": ["prompt", "chosen", "rejected"], "prompt": ["prompt"]}
_NEEDED |= {"messages": ["messages"], "openai": ["messages"], "user_responses": ["user_responses"]}
_NEEDED |= {"sharegpt": ["conversations"], "alpaca": ["instruction"], "qa": ["question"]}
# Other names for what a column holds, most telling first. Names are compared in lower case, without space around them,
# and with _ for other space.
_ALIASES = {
    "question": "question problem query question_stem",
    "choices": "choices options input",
    "passage": "passage context article",
    "system": "system system_prompt",
    "conversations": "conversations conversation",
    "target": "target answerkey ground_truth final_answer expected_answer reference reference_answer correct_answer"
    " answer answers solution completion response output targets",
}
# Which of the choices is right: a number from 0, or a letter.
_INDEX = (
    "label correct_answer_id correct_answer answer_index answer_idx correct_option correct_index gold answerkey answer"
)
TARGET_COLUMNS = _ALIASES["target"].split()
_TEMPLATES = {"prompt": "prompt_template", "context": "system_template"}
LEFT_OUT = "left out by data.row"
_NULLS = (None, "null")  # a flag's null is text: --data.fields.messages=null

# Never proposed as prompts; of other texts, the likely ones are.
_NO_QUESTION = re.compile(
    r"(.*_)?(id|ids|idx|index|uuid|guid|hash|labels?|target|class|category|tags?|score|level|type|subject|source|url|path"
    r"|code|sol|opt|op[a-h]|options?[a-h]?|ctx|choices?|endings?|tests?|distractors?|split|lang|language|date|time"
    r"|timestamp|name|title|topic|model|file|filename|dataset|difficulty|sentiment|emotion"
    r"|intent|rating|gold|summary|chosen|rejected|answers?|solution|completion|response|output)\d*(_.*)?|system.*"
)
_LIKELY = ("text", "input", "inputs", "content", "sentence")
_COUNTDOWN = "Using the numbers {{ nums }}, write an expression that equals {{ target }}."


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

    Raises:
        ConfigError: If options contradict each other, or are none.
    """

    fields: dict[str, str | None] | None = None
    format: Format | None = None
    prompt_template: str | None = None
    system_template: str | None = None
    row: str | Callable[..., Any] | None = None
    final_assistant_turn: FinalTurn | None = None

    def __post_init__(self) -> None:
        columns = {} if self.fields is None else self.fields
        if not (isinstance(columns, Mapping) and all(isinstance(column, str | None) for column in columns.values())):
            raise ConfigError(f"data.fields={columns!r} must map our names to columns, which are text or null")
        for name, hint in (("format", Format), ("final_assistant_turn", FinalTurn)):
            if (value := getattr(self, name)) not in (None, *get_args(hint)):
                raise ConfigError(f"data.{name}={value!r} must be one of {', '.join(get_args(hint))}")
        for name, option in _TEMPLATES.items():
            if columns.get(name) not in _NULLS and getattr(self, option) is not None:
                raise ConfigError(f"data.{option} and data.fields.{name} are both given; leave one of them out")

    def key(self, ours: str) -> str:
        """The option that says where `ours` comes from."""
        option = _TEMPLATES.get(ours)
        return option if option and getattr(self, option) is not None else f"fields.{ours}"

    def of(self, said: Mapping[str, Any]) -> "RowOptions":
        """Those among what is `said` (of a source, say), if it has any; else these."""
        own = {each.name: value for each in fields(self) if (value := said.get(each.name)) is not None}
        return RowOptions(**own) if own else self

    @cached_property
    def chosen(self) -> dict[str, str | None]:
        """What the user chose: our name -> a path, a template, or None."""
        given = {name: text for name, option in _TEMPLATES.items() if (text := getattr(self, option)) is not None}
        sources = {**(self.fields or {}), **given}
        # On a command line, the shell leaves `\n` as it is. In LaTeX a small letter follows (`\nu`).
        written = {name: re.sub(r"\\n(?![a-z])", "\n", str(text)) for name, text in sources.items()}
        return {name: None if sources[name] in _NULLS else text for name, text in written.items()}

    @cached_property
    def _function(self) -> Callable[..., Any] | None:
        return by_path(self.row, "data.row", "write it as my_module.my_function")

    def columns(self, row: RawRow) -> Mapping[str, Any] | None:
        """The columns of a row; None if the user's function leaves it out.

        Raises:
            BadRow: If it raises, or returns something else. ConfigError: If it cannot be imported.
        """
        if (function := self._function) is None:
            return row.columns
        try:
            made = function(deepcopy(dict(row.columns)))  # it is called again, and may change what a cell holds
        except Exception as error:
            raise BadRow(f"data.row raised {type(error).__name__}: {one_line(error)}") from error
        if made is not None and not (isinstance(made, Mapping) and all(isinstance(name, str) for name in made)):
            raise BadRow(f"data.row returned {made!r:.40}, which is neither a mapping of columns nor None")
        return made


@dataclass(frozen=True, slots=True)
class Shape:
    """How the rows of a file are read.

    Args:
        name: A format, or `fields` where the user chose the prompt.
        sources: Our name -> a column, a dotted path, a template, or None: there is none.
        present: The columns that the file has.
        options: What the user said.
        required: Those of our names that the user chose and that must be there.
        counts: What was done to how many rows, in words; grows as rows are read.
    """

    name: str
    sources: Mapping[str, str | None]
    present: Sequence[str]
    options: RowOptions
    required: Sequence[str]
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def target_column(self) -> str | None:
        """The column that is the target; of a template, the one by whose name a target goes."""
        source = self.sources.get("target")
        if source is None or source in self.present or not is_template(source):
            return source if source in self.present else None
        targets = {*TARGET_COLUMNS, *_INDEX.split()}
        named = [name for name in columns_of(source, "fields.target") if name.lower() in targets]
        return named[0] if len(named) == 1 else None

    def columns(self, row: RawRow) -> dict[str, Any] | None:
        """The columns of a row under our names, and all others; None for a row that is left out.

        Raises:
            BadRow: If a column that was chosen is not there, or a template cannot be rendered.
        """
        if (given := self.options.columns(row)) is None:
            self.counts[LEFT_OUT] += 1
            return None
        return {**given, **{ours: self._value(ours, theirs, given) for ours, theirs in self.sources.items()}}

    def announcement(self) -> str:
        """What was taken for what, and done to rows; empty where the file has our names, and nothing was done."""
        words = {**dict.fromkeys(QUESTION_COLUMNS, "prompt"), "context": "system turn", "target": "target"}
        shown = {ours: theirs for ours in words if (theirs := self.sources.get(ours))}
        said = ", ".join(f"{words[ours]} from {theirs!r}" for ours, theirs in shown.items())
        done = [f"{what} ({count:,} rows)" for what, count in self.counts.items()]
        is_plain = self.name in QUESTION_COLUMNS and not done and all(map(str.__eq__, shown, shown.values()))
        return "" if is_plain else "; ".join([f"read as {self.name}: {said}", *done])

    def _value(self, ours: str, theirs: str | None, given: Mapping[str, Any]) -> Any:
        if theirs is None or theirs in given:  # most are
            return None if theirs is None else given[theirs]
        if is_template(theirs):
            # A column of other rows may be missing here; for the user's own template that is an error.
            columns = given if ours in self.required else {**dict.fromkeys(self.present), **given}
            try:
                return compiled(theirs).render({"row": given, **columns}).strip() or (None if ours == "target" else "")
            except Exception as error:  # a template may ask anything of a value
                raise BadRow(f"the template of the {ours}: {one_line(error)}; the row has: {listed(given)}") from error
        if (found := at_path(given, theirs)) is not ABSENT:
            return found
        if ours in self.required:
            raise BadRow(f"no column '{theirs}' (data.fields.{ours}); the row has: {listed(given)}")
        return None


def recognise(sample: Sequence[RawRow], options: RowOptions, origin: str, needs_target: bool = True) -> Shape:
    """How the rows of `origin` (a file, say) are read, by their first ones; see `Shape`.

    Raises:
        ConfigError: If a template is none.
        DataError: If none of the rows has a column that the user chose, or it is not clear which one holds the prompt.
            It names the columns that there are.
    """
    rows: list[Mapping[str, Any]] = []
    for row in sample:
        with suppress(BadRow):  # told of when all rows are read
            rows += filter(None, [options.columns(row)])
    # What each column holds, in some row.
    example: dict[str, Any] = {name: None for row in rows for name in row}
    cells = ((name, of_numpy(value)) for row in reversed(rows) for name, value in row.items())
    example |= {name: value for name, value in cells if not templates.is_empty(value)}
    required = [ours for ours in options.chosen if needs_target or ours != "target"]
    for ours in required if rows else ():
        for name in _named(ours, options, example):
            if all(at_path(row, name) is ABSENT for row in rows):
                absent = f"data.{options.key(ours)} names the column '{name}', which is not there"
                raise DataError(f"{origin}: {absent}; it has: {_described(example)}")
    name, sources = _recognised(example, options, origin) if rows else ("prompt", {})
    chosen = dict(options.chosen)
    # The letter of a choice, and not its index, also where the user names the column that is taken by itself.
    if (target := chosen.get("target")) in example and f"{{{{ {target} | letter(" in (sources.get("target") or ""):
        del chosen["target"]
    return Shape(name, {**sources, **chosen}, list(example), options, required)


def _recognised(example: Mapping[str, Any], options: RowOptions, origin: str) -> tuple[str, dict[str, str | None]]:
    """A shape's name, and what it takes for what."""
    present = [name for name in example if options.chosen.get(name, name) is not None]
    columns = {templates.normal(name): name for name in present} | {name: name for name in present}
    told = [(ours, name) for ours, names in _ALIASES.items() for name in reversed(names.split()) if name in columns]
    columns |= {ours: columns[name] for ours, name in told}
    target, system = columns.get("target"), columns.get("system")
    sources: dict[str, str | None] = {**dict.fromkeys(QUESTION_COLUMNS), "target": target}
    sources["context"] = columns.get("context", system)
    if any(options.chosen.get(ours) for ours in QUESTION_COLUMNS):
        if columns.get("context") in _named("prompt", options, example):
            sources["context"] = system  # the template has the other
        return "fields", sources
    is_named = options.format in _NEEDED
    known = [name for name, needed in _NEEDED.items() if columns.keys() >= {*needed}]
    known = [name for name in known if name == options.format or not is_named]
    if not known:
        raise _unsure(example, options, origin)
    # A question may stand beside its conversation (NuminaMath).
    name = read_as = "qa" if known[0] == "messages" and "qa" in known and target else known[0]
    label = example.get(columns.get("label", ""))
    is_judged = isinstance(label, bool | str) and str(label).lower() in ("true", "false")
    parts = [asked := columns[_NEEDED[name][0]]]
    if name in ("alpaca", "qa"):
        passage, choices = columns.get("passage"), columns.get("choices")
        labels = {each: example[columns[each]] for each in _INDEX.split() if each in columns}
        indices = (each for each, value in labels.items() if templates.is_label(value, each not in TARGET_COLUMNS))
        which = columns.get(next(indices, ""))
        answers = columns.get("answers", "")
        if which and choices is None and isinstance(example.get(answers), list):  # ReClor
            choices, target = answers, which
        target = target or which
        example = {**example, **{name: read_literal(example[name]) for name in [choices] if name}}
        if target and isinstance(example.get(choices or ""), list | Mapping) and not isinstance(example[target], list):
            sources["target"] = f"{{{{ {templates.reference(target)} | letter({templates.reference(str(choices))}) }}}}"
        parts = [each for each in (passage, asked, choices) if each]
        sources |= {"prompt": templates.joined(parts, example) if len(parts) > 1 else asked, "context": system}
    elif name in QUESTION_COLUMNS and not is_named:
        sources |= {ours: columns.get(ours) for ours in QUESTION_COLUMNS}  # a row has one of them
    else:
        sources["messages" if name in ("messages", "openai", "sharegpt") else "prompt"] = asked
    if name == "verl":
        sources["target"] = f"{columns['reward_model']}.ground_truth"
    elif name == "preference" or is_judged:  # TRL's unpaired one
        name, sources["target"] = "preference", "target" if "target" in example else None
    used = {*parts, *(theirs for ours, theirs in sources.items() if theirs and ours != "target")}
    left = [each for each in present if templates.is_part(each) or (read_as == "qa" and each == "text")]
    lost = templates.lost_of([each for each in left if each not in used], [*used], example)
    if lost and not is_named:
        raise _incomplete(read_as, [each for each in present if each in [*parts, *lost]], lost, example, origin)
    return name, sources


def _incomplete(name: str, whole: list[str], lost: list[str], example: Mapping[str, Any], origin: str) -> DataError:
    """The error where columns of a question would be left out; it proposes a template of the `whole`."""
    proposed = [f"--data.format={name} (without {listed(lost)})"]
    with suppress(ValueError):
        if any(re.search("distractor|incorrect|wrong", each.lower()) for each in lost):
            raise ValueError("the right one is missing among them: no template is proposed")
        template = templates.joined(whole, example)
        compiled(template).render({"row": example, **example})
        proposed = ["--data.prompt_template='{}'".format(template.replace("\n", "\\n")), *proposed]
    what = f"read as {name}, the prompt would be without {listed(lost)}; it has: {_described(example)}"
    return DataError(f"{origin}: {what}. Say which columns it is made of: {' or '.join(proposed)}")


def _named(ours: str, options: RowOptions, example: Mapping[str, Any]) -> list[str]:
    """The columns or paths that the user named for `ours`."""
    if (theirs := options.chosen.get(ours)) is None:
        return []
    return columns_of(theirs, options.key(ours)) if is_template(theirs) and theirs not in example else [theirs]


def _described(example: Mapping[str, Any]) -> str:
    """The columns, those inside a mapping too."""
    inner = {name: list(value) if isinstance(value, Mapping) else [] for name, value in example.items()}
    return listed(name for outer, names in inner.items() for name in [f"{outer}.{each}" for each in names] or [outer])


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, Mapping) and "role" in item for item in value)


def _unsure(example: Mapping[str, Any], options: RowOptions, origin: str) -> DataError:
    """The error where no prompt is found; it proposes what is likely to be right, or nothing."""
    texts = [name for name, value in example.items() if isinstance(value, str) and name.isidentifier()]
    texts = [name for name in texts if not _NO_QUESTION.fullmatch(name.lower())]
    texts = [name for name in texts if name in _LIKELY or " " in example[name].strip()]  # one word may be a label
    parts = filter(templates.is_part, example.keys() - {*texts, *_ALIASES["system"].split()})
    texts = [] if any(parts) else texts  # alone they would be no question (PIQA)
    likely = texts if len(texts) == 1 else [each for each in texts if each in _LIKELY]
    proposed = [f"--data.fields.prompt={name}" for name in likely[:1]]
    chats = [name for name, value in example.items() if _is_chat(value)]
    if chats:
        proposed = [f"--data.fields.messages={chats[0]}"]
    elif nums := {"nums", "numbers"} & example.keys() if "target" in example else ():
        proposed = [f"--data.prompt_template='{_COUNTDOWN.replace('nums', min(nums))}'"]
    elif 2 <= len(texts) <= 4:
        proposed.append(f"--data.prompt_template='{' '.join(f'{{{{ {name} }}}}' for name in texts)}'")
    what = "there is no column 'prompt', 'messages' or 'user_responses', and no shape that is known by its columns"
    if options.format in _NEEDED:
        what = f"data.format={options.format} needs the columns {', '.join(_NEEDED[options.format])}"
    say = " or ".join(proposed) or "data.fields.prompt (a column), data.prompt_template (of several) or data.row"
    return DataError(f"{origin}: {what}; it has: {_described(example)}. Say which one holds the prompt: {say}")
