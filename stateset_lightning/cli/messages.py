"""What the parser says about a config -> a line that names the key, the value and what is accepted.

jsonargparse lists every member of a union type that did not fit, over many lines. The most telling of these is kept;
wording that is not known here is cut to its first lines, so that nothing is lost but length.
"""

from __future__ import annotations

import difflib
import importlib
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser

from stateset_lightning.errors import ConfigError

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
# Where the classes that a key takes are found, to suggest one whose name is close.
CLASS_HOMES = {
    "model.reward": "stateset_lightning.rewards",
    "model.algorithm": "stateset_lightning.algorithm",
    "model.optimizer": "torch.optim",
    "model.lr_scheduler": "torch.optim.lr_scheduler",
    "trainer.callbacks": "lightning.pytorch.callbacks",
    "trainer.logger": "lightning.pytorch.loggers",
}
CLASSES = {
    "model.policy": "stateset_lightning.policy.PolicyConfig",
    "model.rollout": "stateset_lightning.rollout.RolloutConfig",
}
CLASSES["model.evaluation"] = "stateset_lightning.evaluation.EvaluationConfig"
# From the most telling to the least; the first that is found is reported.
_TELLING = tuple(
    re.compile(pattern)
    for pattern in (
        r"Input should be (?P<bound>.*?)(?:, unable.*)? ?\[type=",
        r"Option '(?P<unknown>.+?)' is not accepted",
        r"arguments are required: (?P<required>.+)",
        r"Problem with given class_path '(?P<path>.+?)'",
        r"Import path (?P<no_subclass>\S+) does not correspond to a subclass of (?P<base>\w+)",
        r"(?P<abstract>\S+) is abstract",
        r"Expected a dot import path string: (?P<name>.+)",
    )
)


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
            if match := pattern.search(line):
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
    pairs = [word.split("=", 1) for word in words if word.startswith("--config=")]
    pairs += [list(pair) for pair in itertools.pairwise(words) if pair[0] in ("--config", "-c")]
    for _, name in pairs:
        if name.lstrip().startswith("{") or "\n" in name:  # a config written out on the command line
            continue
        try:
            content = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"--config {name}: cannot be read ({error.strerror}); paths are relative to {Path.cwd()}"
            ) from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"--config {name}: not valid UTF-8; save the file as UTF-8") from error
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise ConfigError(
                f"{name}:{line}: malformed YAML: {error.problem}; check indentation, brackets and quotes"
            ) from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{name}: malformed YAML: {str(error).splitlines()[0]}") from error
        if not isinstance(content, dict):
            found = "empty" if content is None else f"not a mapping of keys but {content!r:.60}"
            raise ConfigError(
                f"--config {name}: the file is {found}; it must hold keys such as model:, data: and trainer:"
            )


def without_traceback(message: str) -> str:
    """A message that ends in a traceback (a reward's) with the traceback's last place alone."""
    before, found, trace = message.partition("Traceback (most recent call last):")
    if not found:
        return message
    here = str(Path(__file__).parents[1])
    places = [
        place for place in re.findall(r'File "(.+?)", line (\d+), in (\S+)', trace) if not place[0].startswith(here)
    ]
    return "\n  ".join(
        [before.strip(), *(f"raised at {file}:{line}, in {function}" for file, line, function in places[-1:])]
    )


def _told(key: str, value: str, found: dict[str, str], message: str) -> str:
    if "bound" in found:
        bound = found["bound"]
        if bound.endswith(("than", "to")):  # jsonargparse 4.53 loses the number of some bounds
            bound = " ".join([bound, *re.findall(r"G[te]\(g[te]=([^)]+)\)", message)[:1]])
        return f"{key}={value}: must be {bound}"
    if "unknown" in found:
        known = _parameters_near(message, key)
        return f"{key}: there is no key {found['unknown']}{_suggest(found['unknown'], known) or _listed(known)}"
    if "path" in found:
        module, _, name = found["path"].rpartition(".")
        try:
            near = _suggest(name, dir(importlib.import_module(module)))
        except (ImportError, ValueError):
            return (
                f"{key}: class_path {found['path']}: module {module or name} cannot be imported; is it spelt right, and"
                " on PYTHONPATH?"
            )
        return f"{key}: class_path {found['path']}: {module} has no {name}{near or '; check its spelling'}"
    if "no_subclass" in found:
        return f"{key}: {found['no_subclass']} is no {found['base']}; give the class path of one"
    if "abstract" in found:
        return f"{key}: {found['abstract']} is abstract: it lacks a method that its base class wants"
    if "required" in found:
        names = [re.sub(r"^(fit|validate|test|predict)\.", "", name) for name in found["required"].split(", ")]
        return (
            f"missing: {', '.join(f'{key}.{name}' if key else name for name in names)}; set it in a config (--config)"
            " or as a flag"
        )
    home = next((module for start, module in CLASS_HOMES.items() if key.startswith(start)), None)
    near = _suggest(found["name"], dir(importlib.import_module(home))) if home else ""
    example = f", such as those of {home}" if home else ""
    return f"{key}={found['name']}: no such class{near or f'; give class_path (and init_args){example}'}"


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
    choices = [
        choice
        for group in re.findall(r"Expected a typing\.Literal\[(.+?)\]", message)
        for choice in re.findall(r"'(.+?)'", group)
    ]
    if choices:
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


def _listed(known: Sequence[str]) -> str:
    return f"; its keys are {', '.join(known)}" if known else ""
