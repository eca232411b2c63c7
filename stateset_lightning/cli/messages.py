"""What a config gives, option by option, and what is wrong with it: in one line, with key, value and what is accepted.

jsonargparse says at length which member of a type did not fit, and hides what a class raised. Here each option is held
against its type again, by itself, from the inside out: the first that does not fit is what is wrong.
"""

import copy
import difflib
import importlib
import inspect
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser, Namespace, _typehints
from jsonargparse._required import iter_required_keys

from stateset_lightning.cli.overlays import REMOVED, SPECIFICATION, as_list, is_class, loaded
from stateset_lightning.errors import ConfigError, UserError, one_line
from stateset_lightning.rewards import RewardFunction
from stateset_lightning.run.folder import CONFIGS

PROGRAM = "stateset-lightning"

_WORDS = {"int": "an integer", "float": "a number", "str": "text", "bool": "true or false", "NoneType": "null"}
_WORDS |= {"list": "a list", "Iterable": "a list", "Any": "anything", "Callable": "a function"}
_WORDS |= {"timedelta": "a time, in quotes: 'DD:HH:MM:SS'"}
_BOUNDS = {"ge": "greater than or equal to", "gt": "greater than", "le": "less than or equal to", "lt": "less than"}
_SECTIONS = {"Trainer": "trainer", "GRPOLightningModule": "model", "ScenarioDataModule": "data"}
_PACKAGE = str(Path(__file__).parents[1])
_FUTURES = str(Path("concurrent", "futures"))  # a wait for the user's code

# The options
# ----------------------------------------------------------------------------------------------------------------------

_CALLED_WITH = {"params", "optimizer"}  # what the trainer adds to the options of an optimizer or scheduler

MISSING = object()  # the value of an option that must be given and is not


@dataclass
class Option:
    """An option with its full name, its name in its parser, and its action, None where there is no such option."""

    name: str
    value: Any
    parser: ArgumentParser
    dest: str
    action: Any

    @property
    def hint(self) -> Any:
        return getattr(self.action, "_typehint", getattr(self.action, "type", None))


def options(parser: ArgumentParser, given: dict[str, Any], name: str = "", dest: str = "") -> Iterator[Option]:
    """Every option of a mapping, those inside a class before the one that holds it, then those that are missing.

    On the way a null is given its meaning: over a key of a mapping whose keys are free it takes the key out; elsewhere
    it is the option's value, or its default where the option cannot be null.

    Args:
        parser: Knows the types of the mapping's options.
        given: The mapping.
        name: Of the mapping itself, a prefix of its options' names.
        dest: The same as the parser calls it: empty for the options of a class of their own.
    """
    actions = known(parser)
    for key in list(given):
        option = Option(f"{name}{key}", given[key], parser, f"{dest}{key}", actions.get(f"{dest}{key}"))
        is_section = any(name.startswith(f"{option.dest}.") for name in actions)
        hints = (option.hint, *get_args(option.hint))
        if option.value in (None, REMOVED):
            option.value = given[key] = None
            if is_section or (option.action is not None and type(None) not in hints):
                del given[key]
                continue
        elif any(_typehints.get_typehint_origin(hint) in _typehints.mapping_origin_types for hint in hints):
            option.value = given[key] = _without_removed(option.value)
        if is_section and isinstance(option.value, dict):
            yield from options(parser, option.value, f"{option.name}.", f"{option.dest}.")
            continue
        option.action = None if is_section else option.action
        yield from _inside(option)
        yield option
    for required in iter_required_keys(parser):
        key = required.removeprefix(dest)
        if required.startswith(dest) and key.split(".")[0] not in given and key not in _CALLED_WITH:
            yield Option(f"{name}{key}", MISSING, parser, required, actions[required])


def known(parser: ArgumentParser) -> dict[str, Any]:
    """The actions of the options that a parser knows, by the options' names in it."""
    return {action.dest: action for action in parser._actions if not action.dest.endswith(("help", "config"))}


def classes(hint: Any, items: bool = True) -> tuple[type, ...]:
    """The classes that a type takes instances of: its members', what its callable returns and, if asked, its items'."""
    return _typehints.get_subclass_or_closed_types(hint, also_lists=items, callable_return=True) or ()


def class_options(parser: ArgumentParser) -> Iterator[str]:
    """Names of the options inside the classes that a parser's options have by default."""
    for dest, action in known(parser).items():
        option = Option(dest, None, parser, dest, action)
        if (bases := classes(option.hint, items=False)) and (inside := _class_parser(option, bases, None)):
            yield from (f"{dest}.init_args.{name}" for name in known(inside))


def _inside(option: Option) -> Iterator[Option]:
    """The options of the class that an option's value names, or of each class in a list."""
    value = loaded(option.value)
    bases = classes(option.hint, isinstance(value, list))
    for number, item in enumerate(as_list(value) if bases else []):
        item = {"class_path": item} if is_class(item) else item
        if isinstance(item, dict) and (parser := _class_parser(option, bases, item.get("class_path"))):
            name = f"{option.name}[{number}]." if isinstance(value, list) and len(value) > 1 else f"{option.name}."
            given = (item.get("init_args") or {}) if {"class_path", "init_args"} & set(item) else item
            yield from options(parser, given if isinstance(given, dict) else {}, name)


def _class_parser(option: Option, bases: Any, path: Any) -> ArgumentParser | None:
    """Knows the options of a class, by default of the one that the option takes; None if there is no such class."""
    default = getattr(option.action, "default", None)
    path = path or (default.get("class_path") if isinstance(default, Namespace | dict) else None)
    try:
        cls = _typehints.import_object(_typehints.resolve_class_path_by_name(bases, path)) if path else bases[0]
        if RewardFunction in bases and inspect.isfunction(cls):
            form = f"class_path: FunctionReward, init_args: {{function: {path}, weight: 1.0}}"
            raise ConfigError(f"{option.name}: {path} is a function, no class: write {path} alone, or {form}")
        with _typehints.parser_context(parent_parser=option.parser):
            return _typehints.ActionTypeHint.get_class_parser(cls, getattr(option.action, "sub_add_kwargs", None))
    except ConfigError:
        raise
    except Exception:  # a user's module may raise anything; the check of the option says what
        return None


def _without_removed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_removed(item) for key, item in value.items() if item is not REMOVED}
    return value


# What is wrong
# ----------------------------------------------------------------------------------------------------------------------


def explain(parser: ArgumentParser, given: dict[str, Any]) -> str:
    """What is wrong with a config; empty if each option fits its type.

    Args:
        parser: Knows the options.
        given: What the user wrote.
    """
    missing: list[str] = []
    for option in options(parser, given):
        if option.value is MISSING:
            missing.append(option.name)
        elif not any(name.startswith(option.name) for name in missing) and (fault := _fault(option)):
            return fault
    said = f"set it in a config (--config{_config_of_run(given.get('ckpt_path'))}) or as a flag"
    return f"missing: {', '.join(missing)}; {said}" if missing else ""


def _config_of_run(ckpt_path: Any) -> str:
    """The config in the folder of the run that a checkpoint, or a folder of some, is of; empty if there is none."""
    path = Path(str(ckpt_path)).absolute()
    near = [folder / name for folder in [path, *path.parents[:2]] for name in CONFIGS] if path.exists() else []
    return next((f" {file}" for file in near if file.is_file()), "")


def refusal(cls: type, error: Exception, parser: ArgumentParser, given: dict[str, Any]) -> Exception:
    """What a class of the config raised when it was made, as an error with its key.

    The error itself if it says enough, or if the mistake is this package's own and needs its traceback.
    """
    place = traceback.extract_tb(error.__traceback__)[-1].filename
    if isinstance(error, UserError) or (place.startswith(_PACKAGE) and not isinstance(error, ValueError | TypeError)):
        return error
    if fault := explain(parser, given):  # what jsonargparse lets pass, such as a list for a section
        return ConfigError(fault)
    keys = {class_name(item): option.name for option in options(parser, given) for item in as_list(option.value)}
    key = (keys | _SECTIONS).get(cls.__name__, "a class of the config")
    return ConfigError(f"{key}: {cls.__name__}: {_raised(error)}")


def class_name(given: Any) -> str:
    """The name of a class in a config, given by its path or as {class_path, init_args}; empty for None."""
    path = given.get("class_path", "") if isinstance(given, dict) else str(given or "")
    return str(path).rpartition(".")[2]


def without_traceback(message: str) -> str:
    """A message that ends in a traceback (a reward's) with the traceback's last place alone."""
    before, found, trace = message.partition("Traceback (most recent call last):")
    if not found:
        return message
    places = re.findall(r'File "(.+?)", line (\d+), in (\S+)', trace)
    own = [place for place in places if _PACKAGE not in place[0] and _FUTURES not in place[0]]
    return "\n  ".join([before.strip(), *("raised at {}:{}, in {}".format(*place) for place in own[-1:])])


def _fault(option: Option) -> str:
    """What is wrong with one option; empty if nothing is."""
    if option.action is None:
        return _unknown(option)
    try:  # the value alone against its type
        with _typehints.parser_context(parent_parser=option.parser, load_value_mode="yaml"):
            option.parser._check_value_key(option.action, copy.deepcopy(option.value), option.dest, Namespace())
    except Exception:  # a user's module may raise anything
        bases = classes(option.hint)
        for item in as_list(option.value):
            if isinstance(item, dict) and "class_path" in item and (reason := _specification_fault(item)):
                return f"{option.name}: {reason}"
            path = str(item.get("class_path", "") if isinstance(item, dict) else item)
            is_path = is_class(path) or re.fullmatch(r"(\w+\.)+\w+", path)  # of a class, or of a function
            if bases and is_path and (reason := _class_fault(bases, path)):
                place = f": class_path {path}" if "." in path else f"={path}"
                return f"{option.name}{place}: {reason}"
        return f"{option.name}={str(option.value)[:80]}: must be {_in_words(option.hint)}"
    return ""


def _unknown(option: Option) -> str:
    names = list(known(option.parser))
    place, dest, value = option.name.removesuffix(option.dest), option.dest, option.value
    if any(name.startswith(f"{dest}.") for name in names):
        return f"{option.name}={str(value)[:80]}: must be a mapping"
    while isinstance(value, dict) and value:  # of a section that does not exist, the first option
        dest, value = f"{dest}.{next(iter(value))}", next(iter(value.values()))
    name = f".{dest.rpartition('.')[2]}".replace("learning_rate", "lr")
    same = [] if place else [each for each in class_options(option.parser) if each.endswith(name)]
    near = f"; did you mean {same[0]}?" if same else _suggest(dest, [*names, *SPECIFICATION])
    others = f"; its keys are {', '.join(names) or 'none'}" if place else "; --help lists all keys"
    return f"{place[:-1]}{': ' if place else ''}there is no key {dest}{near or others}"


def _specification_fault(item: dict[str, Any]) -> str:
    """What is wrong with the keys beside `class_path`; empty if nothing is."""
    if unknown := [key for key in item if key not in SPECIFICATION]:
        return f"there is no key {unknown[0]} beside class_path; options of the class stand below init_args"
    is_mapping = isinstance(item.get("init_args"), dict | None)
    return "" if is_mapping else f"init_args={item['init_args']!r:.80}: must be a mapping"


def _class_fault(bases: tuple[type, ...], path: str) -> str:
    """Why the class that a path names cannot be had; empty if it can."""
    module, _, name = path.rpartition(".")
    if not module:
        parts = (full.rpartition(".") for base in bases for full in _typehints.get_all_subclass_paths(base, True))
        homes = {known_name: home for home, _, known_name in parts}
        module = homes[difflib.get_close_matches(name, homes, n=1, cutoff=0)[0]]
    try:
        home = importlib.import_module(module)
        found = getattr(home, name, None)
    except Exception as error:  # a user's module may raise anything
        absent = getattr(error, "name", "")
        if str(error).startswith(f"No module named {absent!r}") and f"{module}.".startswith(f"{absent}."):
            return f"module {module} cannot be imported; is it spelt right, and on PYTHONPATH?"
        return _raised(error)
    if found is None:
        return f"{module} has no {name}{_suggest(name, dir(home)) or '; give the class_path of one that there is'}"
    if isinstance(found, type) and not issubclass(found, bases):
        return f"it is no {' or '.join(base.__name__ for base in bases)}"
    if inspect.isabstract(found):
        return f"{path} is abstract: it lacks {', '.join(sorted(found.__abstractmethods__))}"
    return ""


def _in_words(hint: Any) -> str:
    """What a type accepts."""
    origin, members = get_origin(hint), get_args(hint)
    if hint is None or (isinstance(origin or hint, type) and issubclass(origin or hint, Mapping)):
        return "a mapping" + (f" to {_in_words(members[1])}" if members else "")
    if not members:
        name = getattr(hint, "__name__", str(hint))
        return _WORDS.get(name, f"a {name} (class_path and init_args)")
    if origin is Literal:
        return f"one of {', '.join(map(str, members))}"
    if metadata := getattr(hint, "__metadata__", None):
        named = ((item, key) for item in metadata for key in _BOUNDS if hasattr(item, key))
        bounds = [f"{_BOUNDS[key]} {getattr(item, key)}" for item, key in named]
        return f"{_in_words(members[0])} {' and '.join(bounds)}"
    if origin is Callable:
        makes = isinstance(members[-1], type) and members[-1].__module__ != "builtins"  # an optimizer, say
        return _in_words(members[-1]) if makes else "a function"
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return f"a list of {_in_words(members[0])}"
    ordered = sorted(members, key=lambda member: member is type(None))
    return " or ".join(dict.fromkeys(map(_in_words, ordered)))


def _raised(error: BaseException) -> str:
    """What a user's code or a library raised, with the place in the user's code."""
    foreign = re.compile(rf"{re.escape(_PACKAGE)}|site-packages|importlib|<")
    frames = traceback.extract_tb(error.__traceback__)
    places = [f" ({frame.filename}:{frame.lineno})" for frame in frames if not foreign.search(frame.filename)]
    reason = one_line(error)
    if isinstance(error, SyntaxError):
        places, reason = [f" ({error.filename}:{error.lineno})"], error.msg
    return f"{type(error).__name__}: {reason}{places[-1] if places else ''}"


def _suggest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, [name for name in known if not name.startswith("_")], n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
