"""Messages of the command line: one line that names the key, the value and what is accepted.

jsonargparse lists every member of a union type that did not fit, over many lines. The most telling one is kept. Wording
that is not known here is cut to its first lines, so that nothing is lost but length. Seen in jsonargparse 4.53.
"""

from __future__ import annotations

import difflib
import importlib
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from stateset_lightning.errors import ConfigError
from stateset_lightning.redaction import remember

PROGRAM = "stateset-lightning"

_KEY = re.compile(r'Parser key "([^"]+)"')
_GIVEN = re.compile(r"(?:Given value: |Got value: )(.*)")
_NESTED = re.compile(r"NestedArg\(key='(.+)', val=(.*)\)$")
_WORDS = {
    "int": "an integer",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "dict": "a mapping",
    "list": "a list",
    "Iterable": "a list",
    "NoneType": "null",
}
CLASS_HOMES = {
    "model.reward": "stateset_lightning.rewards",
    "model.algorithm": "stateset_lightning.algorithm",
    "model.optimizer": "torch.optim",
    "model.lr_scheduler": "torch.optim.lr_scheduler",
    "trainer.callbacks": "lightning.pytorch.callbacks",
    "trainer.logger": "lightning.pytorch.loggers",
}
"""Where the classes that a key takes are found, to suggest one whose name is close."""

CLASSES = {
    "model.policy": "stateset_lightning.policy.PolicyConfig",
    "model.rollout": "stateset_lightning.rollout.RolloutConfig",
    "model.evaluation": "stateset_lightning.evaluation.EvaluationConfig",
}
"""The class that a key always takes, to suggest one of its options."""

_TELLING = (
    r"Input should be (?P<bound>.*?)(?:, unable.*)? ?\[type=",
    r"Option '(?P<unknown>.+?)' is not accepted",
    r"arguments are required: (?P<required>.+)",
    r"Problem with given class_path '(?P<path>.+?)'",
    r"Import path (?P<no_subclass>\S+) does not correspond to a subclass of (?P<base>\w+)",
    r"(?P<abstract>\S+) is abstract",
    r"Expected a dot import path string: (?P<name>.+)",
)
"""From the most telling to the least; the first that is found is reported."""


def shorten(message: str, keys: Sequence[str] = ()) -> str:
    """A parser's message in a line or two.

    Args:
        message: What jsonargparse says.
        keys: All keys that the parser knows, to suggest a close one.
    """
    lines = message.splitlines()
    if match := re.search(r"(?:does not accept option|[Uu]nrecognized arguments:|^Option) '?(?:--)?([^' =]+)", message):
        return f"there is no key {match[1]}{_suggest(match[1], keys) or '; --help lists all keys'}"
    for pattern in _TELLING:
        for number, line in enumerate(lines):
            if match := re.search(pattern, line):
                key, value = _key(lines, number), _value("\n".join(lines[number : number + 3])) or _value(message)
                return _told(key, value, {name: text for name, text in match.groupdict().items() if text}, message)
    accepted = _accepted(message)
    if accepted and _KEY.search(message):
        return f"{_key(lines, len(lines))}={_value(message)}: must be {accepted}"
    told = [line.strip() for line in lines if line.strip()]
    return "\n  ".join(line[:300] for line in told[:4])


def check_config_files(words: Sequence[str]) -> None:
    """The files given by --config are there and hold a mapping in YAML; jsonargparse would not name the file and line.

    Raises:
        ConfigError: If one is not.
    """
    given = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    given += [value for flag, value in itertools.pairwise(words) if flag in ("--config", "-c")]
    for name in given:
        if not name.lstrip().startswith("{") and "\n" not in name:  # else it is a config itself
            read_yaml(name, f"--config {name}", "keys such as model:, data: and trainer:")


def read_yaml(file: str | Path, name: str, keys: str) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Args:
        file: Its path.
        name: What the user calls it, for the error.
        keys: What it must hold, for the error.

    Raises:
        ConfigError: If it cannot be read or holds something else.
    """
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror}); paths are relative to {Path.cwd()}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not valid UTF-8; save the file as UTF-8") from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place, reason = f":{mark.line + 1}" if mark else "", problem or str(error).splitlines()[0]
        raise ConfigError(f"{file}{place}: malformed YAML: {reason}; check indentation, brackets and quotes") from error
    if not isinstance(content, dict):
        found = "empty" if content is None else f"not a mapping of keys but {content!r:.60}"
        raise ConfigError(f"{name}: the file is {found}; it must hold {keys}")
    remember(content)
    return content


def class_name(given: Any) -> str:
    """The name of a class in a config, given by its path or as {class_path, init_args}; empty for None."""
    path = given.get("class_path", "") if isinstance(given, dict) else str(given or "")
    return str(path).rpartition(".")[2]


def without_traceback(message: str) -> str:
    """A message that ends in a traceback (a reward's) with the traceback's last place alone."""
    before, found, trace = message.partition("Traceback (most recent call last):")
    if not found:
        return message
    here = str(Path(__file__).parents[1])
    places = re.findall(r'File "(.+?)", line (\d+), in (\S+)', trace)
    own = [f"raised at {file}:{line}, in {function}" for file, line, function in places if not file.startswith(here)]
    return "\n  ".join([before.strip(), *own[-1:]])


def _told(key: str, value: str, found: dict[str, str], message: str) -> str:
    """The message of one of `_TELLING`; `found` holds what its group matched."""
    match found:
        case {"bound": bound}:
            if bound.endswith(("than", "to")):  # jsonargparse 4.53 loses the number of some bounds
                bound = " ".join([bound, *re.findall(r"G[te]\(g[te]=([^)]+)\)", message)[:1]])
            return f"{key}={value}: must be {bound}"
        case {"unknown": unknown}:
            known = _parameters_near(message, key)
            listed = f"; its keys are {', '.join(known)}" if known else ""
            return f"{key}: there is no key {unknown}{_suggest(unknown, known) or listed}"
        case {"path": path}:
            module, _, name = path.rpartition(".")
            return f"{key}: class_path {path}: {_absence(module or name, name)}"
        case {"no_subclass": path, "base": base}:
            return f"{key}: {path} is no {base}; give the class path of one"
        case {"abstract": path}:
            return f"{key}: {path} is abstract: it lacks a method that its base class wants"
        case {"required": required}:
            names = [re.sub(r"^(fit|validate|test|predict)\.", "", name) for name in required.split(", ")]
            missing = ", ".join(f"{key}.{name}" if key else name for name in names)
            return f"missing: {missing}; set it in a config (--config) or as a flag"
    home = next((module for start, module in CLASS_HOMES.items() if key.startswith(start)), None)
    reason = _absence(home, found["name"]) if home else "no such class; give class_path and init_args"
    return f"{key}={found['name']}: {reason}"


def _absence(module: str, name: str) -> str:
    """Why a name cannot be had from a module; what this package says of names that have moved or left comes first."""
    home = None
    try:
        home = importlib.import_module(module)
        getattr(home, name)
    except (ImportError, AttributeError, ValueError) as error:
        if not str(error).startswith(("No module named", "module ", "Empty module name")):  # as Python says it
            return str(error)
    if home is None:
        return f"module {module} cannot be imported; is it spelt right, and on PYTHONPATH?"
    return f"{module} has no {name}{_suggest(name, dir(home)) or '; give the class_path of one that there is'}"


def _key(lines: Sequence[str], number: int) -> str:
    """The key that a line is about: those of the lines above it that it is nested in."""
    names: list[str] = []
    depth = 1_000 if number == len(lines) else _indent(lines[number]) + 1
    for line in reversed(lines[: number + 1]):
        match = _KEY.search(line)
        if match and _indent(line) < depth:
            names.insert(0, match[1])
            depth = _indent(line)
    nested = _NESTED.search(lines[-1]) if lines else None
    if nested and len(names) == 1:
        names.append(nested[1])
    return ".".join(names)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" -"))


def _value(message: str) -> str:
    given = re.findall(r"input_value=(.+?), input_type", message)[:1] or _GIVEN.findall(message)
    value = given[-1] if given else ""
    nested = _NESTED.search(value)
    return (nested[2] if nested else value).strip("'")[:80]


def _accepted(message: str) -> str:
    """What types and choices would have been accepted, in words."""
    kinds = [_WORDS.get(name.rpartition(".")[2], name) for name in re.findall(r"Expected a <class '(.+?)'>", message)]
    literals = " ".join(re.findall(r"Expected a typing\.Literal\[(.+?)\]", message))
    if choices := re.findall(r"'(.+?)'", literals):
        kinds = [f"one of {', '.join(dict.fromkeys(choices))}"]
    return " or ".join(dict.fromkeys(kinds))


def _parameters_near(message: str, key: str) -> list[str]:
    """Parameters of the classes that the message's value names, or of the one that the key always takes."""
    names: list[str] = []
    named = re.findall(r"(?:class_path'?[:=] ?|given class_path )'([\w.]+)'", message)
    for path in named or ([CLASSES[key]] if key in CLASSES else []):
        module, _, name = path.rpartition(".")
        cls = getattr(importlib.import_module(module), name, None)
        if isinstance(cls, type):  # the parser's own view: a class may hide options of its base
            parser = ArgumentParser()
            parser.add_class_arguments(cls, fail_untyped=False)
            names += [option for option in vars(parser.get_defaults()) if option not in ("args", "kwargs", "common")]
    return list(dict.fromkeys(names))


def _suggest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, [name for name in known if not name.startswith("_")], n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
