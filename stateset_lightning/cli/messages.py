"""Messages of the command line: one line that names the key, the value and what is accepted.

jsonargparse says at length which member of a type did not fit, and hides what a class raised. Here each option is held
against its type again, by itself, from the inside out: the first that does not fit is what is wrong.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from stateset_lightning.errors import ConfigError, UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from stateset_lightning.cli.options import Option

PROGRAM = "stateset-lightning"

_WORDS = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}
_BOUNDS = {
    "ge": "greater than or equal to",
    "gt": "greater than",
    "le": "less than or equal to",
    "lt": "less than",
}
_SECTIONS = {"Trainer": "trainer", "GRPOLightningModule": "model", "ScenarioDataModule": "data"}
_PACKAGE = str(Path(__file__).parents[1])


def shorten(message: str) -> str:
    """The first lines of a message."""
    told = [line.strip() for line in message.splitlines() if line.strip()]
    return "\n  ".join(line[:300] for line in told[:4])


def explain(parser: ArgumentParser, given: dict[str, Any]) -> str:
    """What is wrong with a config; empty if each option fits its type.

    Args:
        parser: Knows the options.
        given: What the user wrote.
    """
    from stateset_lightning.cli.options import MISSING, options

    missing: list[str] = []
    for option in options(parser, given):
        if option.value is MISSING:
            missing.append(option.name)
        elif not any(name.startswith(option.name) for name in missing) and (fault := _fault(option)):
            return fault
    return f"missing: {', '.join(missing)}; set it in a config (--config) or as a flag" if missing else ""


def refusal(error: Exception, parser: ArgumentParser, given: dict[str, Any]) -> UserError | None:
    """What a class of the config said when it was made; None if the mistake is this package's own.

    Args:
        error: What jsonargparse made of it.
        parser: Knows the options.
        given: What the user wrote.
    """
    from stateset_lightning.cli.options import options

    chain = list(_causes(error))
    if told := next((each for each in chain if isinstance(each, UserError)), None):
        return told
    cause = next((each for each in chain if "jsonargparse" not in _files(each)[-1]), chain[-1])
    if _files(cause)[-1].startswith(_PACKAGE) and not isinstance(cause, ValueError | TypeError):
        return None
    named = {class_name(option.value): option.name for option in options(parser, given)} | _SECTIONS
    frames = [frame for frame, _ in traceback.walk_tb(cause.__traceback__) if frame.f_code.co_name == "__init__"]
    owners = [type(frame.f_locals.get("self")).__name__ for frame in reversed(frames)]
    key = next((f"{named[owner]}: {owner}: " for owner in owners if owner in named), "a class of the config: ")
    return ConfigError(f"{key}{_raised(cause)}")


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


def _fault(option: Option) -> str:
    """What is wrong with one option; empty if nothing is."""
    from stateset_lightning.cli.options import classes
    from stateset_lightning.cli.overlays import loaded

    if option.action is None:
        return _unknown(option)
    try:
        option.check()
    except Exception:  # a user's module may raise anything
        bases, value = classes(option.hint), loaded(option.value)
        for item in value if isinstance(value, list) else [value]:
            path = item.get("class_path") if isinstance(item, dict) else item
            is_name = isinstance(item, dict) or not any(kind in (int, float, str) for kind in get_args(option.hint))
            if bases and is_name and isinstance(path, str) and (reason := _class_fault(bases, path)):
                place = f": class_path {path}" if "." in path else f"={path}"
                return f"{option.name}{place}: {reason}"
        return f"{option.name}={str(option.value)[:80]}: must be {_in_words(option.hint)}"
    return ""


def _unknown(option: Option) -> str:
    known = [action.dest for action in option.parser._actions if not action.dest.endswith(("help", "print_config"))]
    place, dest, value = option.name.removesuffix(option.dest), option.dest, option.value
    while isinstance(value, dict) and value:  # of a section that does not exist, the first option
        dest, value = f"{dest}.{next(iter(value))}", next(iter(value.values()))
    if not place:
        return f"there is no key {dest}{_suggest(dest, known) or '; --help lists all keys'}"
    listed = ", ".join(known) or "none"
    return f"{place[:-1]}: there is no key {dest}{_suggest(dest, known) or f'; its keys are {listed}'}"


def _class_fault(bases: list[type], path: str) -> str:
    """Why the class that a path names cannot be had; empty if it can."""
    module, _, name = path.rpartition(".")
    base = bases[0]
    if not module:
        package = importlib.import_module(base.__module__.rpartition(".")[0])
        module = package.__name__ if hasattr(package, base.__name__) else base.__module__
    try:
        found = getattr(importlib.import_module(module), name)
    except AttributeError as error:
        if not str(error).startswith("module "):  # not Python's words: those of a module whose name has moved
            return str(error)
        close = _suggest(name, dir(importlib.import_module(module)))
        return f"{module} has no {name}{close or '; give the class_path of one that there is'}"
    except ModuleNotFoundError as error:
        if str(error).startswith("No module named") and f"{module}.".startswith(f"{error.name}."):
            return f"module {module} cannot be imported; is it spelt right, and on PYTHONPATH?"
        return _raised(error)
    except Exception as error:  # a user's module may raise anything
        return _raised(error)
    if isinstance(found, type) and not issubclass(found, tuple(bases)):
        return f"{path} is no {base.__name__}; give the class path of one"
    if inspect.isabstract(found):
        return f"{path} is abstract: it lacks {', '.join(sorted(found.__abstractmethods__))}"
    return ""


def _in_words(hint: Any) -> str:
    """What a type accepts."""
    origin, members = get_origin(hint), get_args(hint)
    if hint is None or (isinstance(hint, type) and issubclass(hint, Mapping)):
        return "a mapping"
    if hint in _WORDS or not members:
        name = getattr(hint, "__name__", str(hint))
        return _WORDS.get(hint) or {"dict": "a mapping", "list": "a list"}.get(
            name, f"class_path and init_args of a {name}"
        )
    if origin is Literal:
        return f"one of {', '.join(map(str, members))}"
    if metadata := getattr(hint, "__metadata__", None):
        bounds = [
            f"{words} {getattr(item, name)}"
            for item in metadata
            for name, words in _BOUNDS.items()
            if hasattr(item, name)
        ]
        return f"{_in_words(members[0])} {' and '.join(bounds)}"
    if inspect.isclass(origin) and issubclass(origin, dict):
        return f"a mapping to {_in_words(members[1])}"
    if inspect.isclass(origin) and issubclass(origin, Iterable):
        return f"a list of {_in_words(members[0])}"
    if not inspect.isclass(origin) or origin.__name__ in ("Union", "UnionType"):
        ordered = sorted(members, key=lambda member: member is type(None))
        return " or ".join(dict.fromkeys(_in_words(member) for member in ordered))
    return f"class_path and init_args of a {getattr(members[-1], '__name__', 'function')}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from, the outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _files(error: BaseException) -> list[str]:
    """Where an error was raised, the innermost last."""
    return [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)] or [""]


def _raised(error: BaseException) -> str:
    """What a user's code or a library raised, with the place in the user's code."""
    places = [
        f" ({frame.f_code.co_filename}:{line})"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not re.search(rf"{re.escape(_PACKAGE)}|site-packages|importlib|<", frame.f_code.co_filename)
    ]
    if isinstance(error, SyntaxError):
        places, error = [f" ({error.filename}:{error.lineno})"], SyntaxError(error.msg)
    reason = " ".join(str(error).split())[:300]
    if not places and isinstance(error, ImportError):
        return reason
    return f"{type(error).__name__}: {reason}{places[-1] if places else ''}"


def _suggest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, [name for name in known if not name.startswith("_")], n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
