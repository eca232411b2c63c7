"""The options that a config gives, one by one, however deep in classes they are, each with its type."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from jsonargparse import ArgumentParser, Namespace
from jsonargparse._common import parser_context
from jsonargparse._required import iter_required_keys
from jsonargparse._typehints import (
    ActionTypeHint,
    callable_origin_types,
    get_typehint_origin,
    mapping_origin_types,
    resolve_class_path_by_name,
    sequence_origin_types,
)
from jsonargparse._util import import_object

from stateset_lightning.cli.overlays import REMOVED, as_list, is_class, loaded

_NO_OPTIONS = {"help", "config", "print_config"}
_CALLED_WITH = {"params", "optimizer"}  # what the trainer adds to the options of an optimizer or scheduler
_SPECIFIED = {"class_path", "init_args"}

MISSING = object()
"""The value of an option that must be given and is not."""


@dataclass
class Option:
    """An option in `holder[key]`: its full name and its parser's action, None where there is no such option."""

    name: str
    key: str
    holder: dict[str, Any]
    parser: ArgumentParser
    dest: str
    action: Any

    @property
    def value(self) -> Any:
        return self.holder.get(self.key, MISSING)

    @property
    def hint(self) -> Any:
        return getattr(self.action, "_typehint", getattr(self.action, "type", None))

    def check(self) -> None:
        """Holds the value alone against its type.

        Raises:
            TypeError: If it does not fit; likewise ValueError and KeyError.
        """
        with parser_context(parent_parser=self.parser, load_value_mode="yaml"):
            self.parser._check_value_key(self.action, copy.deepcopy(self.value), self.dest, Namespace())


def options(parser: ArgumentParser, given: dict[str, Any], name: str = "", dest: str = "") -> Iterator[Option]:
    """Every option of a mapping, those inside a class before the one that holds it, then those that are missing.

    Args:
        parser: Knows the types of the mapping's options.
        given: The mapping.
        name: Of the mapping itself, a prefix of its options' names.
        dest: The same as the parser calls it: empty for the options of a class of their own.
    """
    actions = {action.dest: action for action in parser._actions if action.dest.split(".")[-1] not in _NO_OPTIONS}
    for key in list(given):
        option_dest, value = f"{dest}{key}", loaded(given[key])
        option = Option(f"{name}{key}", key, given, parser, option_dest, actions.get(option_dest))
        if any(known.startswith(f"{option_dest}.") for known in actions):
            if isinstance(value, dict):
                yield from options(parser, value, f"{option.name}.", f"{option_dest}.")
                continue
            option.action = None
        elif option.action is not None:
            for number, item in enumerate(as_list(value)):
                item = {"class_path": item} if is_class(item) and classes(option.hint) else item
                if isinstance(item, dict) and (inner := class_parser(option, item)):
                    place = (
                        f"{option.name}[{number}]." if isinstance(value, list) and len(value) > 1 else f"{option.name}."
                    )
                    yield from options(inner, (item.get("init_args") or {}) if _SPECIFIED & set(item) else item, place)
        yield option
    for required in iter_required_keys(parser):
        key = required.removeprefix(dest)
        if required.startswith(dest) and key.split(".")[0] not in given and key not in _CALLED_WITH:
            yield Option(f"{name}{key}", key, given, parser, required, actions[required])


def class_parser(option: Option, value: Mapping[str, Any]) -> ArgumentParser | None:
    """Knows the options of the class that a value names, or that the option takes by itself; None if there is none."""
    bases, default = (
        classes(option.hint, isinstance(loaded(option.value), list)),
        getattr(option.action, "default", None),
    )
    path = value.get("class_path") or (default.get("class_path") if isinstance(default, Mapping | Namespace) else None)
    try:
        cls = (
            import_object(
                next((full for base in bases if "." in (full := resolve_class_path_by_name(base, path))), path)
            )
            if path
            else bases[0]
        )
        with parser_context(parent_parser=option.parser):
            return ActionTypeHint.get_class_parser(cls, getattr(option.action, "sub_add_kwargs", None))
    except Exception:  # a user's module may raise anything; the check of the option says what
        return None


def classes(hint: Any, items: bool = True) -> list[type]:
    """The classes that a type takes instances of: its members', what its callable returns and, if asked, its items'."""
    members, origin = get_args(hint), get_typehint_origin(hint)
    if isinstance(hint, type) and not members:
        return [] if hint.__module__ in ("builtins", "collections.abc", "typing") or issubclass(hint, dict) else [hint]
    if not items and origin in sequence_origin_types:
        return []
    return [cls for member in members[-(origin in callable_origin_types) :] for cls in classes(member, items)]


def resolve_removed(parser: ArgumentParser, given: dict[str, Any]) -> None:
    """A null over a key takes it out of a mapping whose keys are free, and is the value of an option."""
    for option in options(parser, given):
        free = any(get_typehint_origin(hint) in mapping_origin_types for hint in (option.hint, *get_args(option.hint)))
        if free and isinstance(option.value, dict):
            option.holder[option.key] = _without_removed(option.value)
        elif option.value in (None, REMOVED):
            option.holder[option.key] = None
            if option.action is not None and type(None) not in get_args(option.hint):
                del option.holder[option.key]  # the default


def _without_removed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_removed(item) for key, item in value.items() if item is not REMOVED}
    return value
