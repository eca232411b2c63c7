"""The options that a config gives, one by one, however deep in classes they are, each with its type."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from jsonargparse import ArgumentParser, Namespace, _typehints
from jsonargparse._required import iter_required_keys

from stateset_lightning.cli.overlays import REMOVED, as_list, is_class, loaded
from stateset_lightning.errors import ConfigError
from stateset_lightning.rewards import RewardFunction

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

    def check(self) -> None:
        """Holds the value alone against its type.

        Raises:
            TypeError: If it does not fit; likewise ValueError and KeyError.
        """
        with _typehints.parser_context(parent_parser=self.parser, load_value_mode="yaml"):
            self.parser._check_value_key(self.action, copy.deepcopy(self.value), self.dest, Namespace())


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


def _class_parser(option: Option, bases: tuple[type, ...], path: Any) -> ArgumentParser | None:
    """Knows the options of a class, by default of the one that the option takes; None if there is no such class."""
    default = getattr(option.action, "default", None)
    path = path or (default.get("class_path") if isinstance(default, Namespace | dict) else None)
    if not isinstance(path, str | None):
        return None
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
