"""Errors that a user can mend: each names the key or file, shows the value and says what to do.

The command line prints them in a line or two, without a traceback. Our own mistakes are `assert`s and keep theirs.
"""

import functools
import importlib.util
import inspect
import logging
import operator
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

from stateset_lightning.redaction import redacted_text

# What is no error and yet to be known, such as a slower path that a model needs. The command line prints it.
log = logging.getLogger("stateset_lightning")
tell_once = functools.cache(log.warning)  # of what would come again and again


class UserError(ValueError):
    """Something the user gave cannot be honoured. Base of every error of this package. Its text holds no secrets."""

    def __str__(self) -> str:
        return redacted_text(super().__str__())


class ConfigError(UserError):
    """An option, or a combination of options, cannot be honoured."""


class DataError(UserError):
    """A scenario file or row cannot be used."""


class NonFiniteError(UserError):
    """Logits or gradients are NaN or infinite: the policy has diverged, or overflows its precision."""


class SamplingError(UserError):
    """The sampler and the trainer do not compute the same policy."""


class ServerError(UserError):
    """A server refuses what it is asked, answers badly, or stays away."""


class RewardError(UserError):
    """Rewards failed more often than `max_reward_failures` allows, or returned what is no score."""


class DiskError(UserError):
    """A file cannot be written: the disk is full, or the folder read-only."""


class CheckpointError(ConfigError):
    """A checkpoint is damaged, or is none of this package."""


def one_line(text: object, most: int = 300) -> str:
    """At most so many characters of a text on one line, without secrets and what moves the cursor of a terminal."""
    start = redacted_text(str(text)[: 10 * most])  # it may have megabytes
    return " ".join("".join(c if c.isprintable() else " " for c in start).split())[:most]


# Bounds ---------------------------------------------------------------------------------------------------------------

C = TypeVar("C")

_WORDS = {Ge: "at least", Gt: "above", Le: "at most", Lt: "below"}


def bounded(prefix: str) -> Callable[[type[C]], type[C]]:
    """Class decorator: the arguments of `__init__` are held against the bounds that its signature states.

    The command line holds them by itself; this is for Python. Each class of a hierarchy is decorated by itself, for the
    arguments that it names itself. An object keeps them as `given_arguments`.

    Args:
        prefix: Of the config's key, such as `model.rollout`.

    Raises:
        ConfigError: When an object is made, naming the first argument out of bounds, as `prefix.name=value`.
    """

    def decorate(cls: type[C]) -> type[C]:
        initialise, signature = cls.__init__, inspect.signature(cls.__init__)

        @functools.wraps(initialise)
        def checked(self: C, *args: Any, **kwargs: Any) -> None:
            bound = signature.bind(self, *args, **kwargs)
            check_bounds(prefix, initialise, bound.arguments)
            initialise(self, *args, **kwargs)
            vars(self)["given_arguments"] = {name: value for name, value in bound.arguments.items() if name != "self"}

        cls.__init__ = checked  # type: ignore[method-assign, assignment]
        return cls

    return decorate


def check_bounds(prefix: str, signature: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Holds each value against the bounds, or the choices, of its parameter or field.

    Raises:
        ConfigError: Naming the first value out of bounds, as `prefix.name=value`.
    """
    for name, hint in _hints(signature).items():
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        if choices and values.get(name, choices[0]) not in choices:
            raise ConfigError(f"{prefix}.{name}={values[name]!r} must be one of {', '.join(map(str, choices))}")
        value = values.get(name)
        if value is not None and not isinstance(value, str):  # a word in a number's place
            for bound in _bounds(hint):
                comparison = type(bound).__name__.lower()  # of `operator`; the bound's field has the same name
                limit = getattr(bound, comparison)
                if not getattr(operator, comparison)(value, limit):
                    raise ConfigError(f"{prefix}.{name}={value} must be {_WORDS[type(bound)]} {limit}")


_hints = functools.cache(functools.partial(get_type_hints, include_extras=True))


def _bounds(hint: Any) -> list[Any]:
    """Bounds of a hint and, for `Annotated[...] | None`, of its members."""
    own = [item for item in getattr(hint, "__metadata__", ()) if type(item) in _WORDS]
    return own or [bound for member in get_args(hint) for bound in _bounds(member)]


@contextmanager
def told_as(kind: type[Exception], before: str, *caught: type[Exception], after: str = "") -> Iterator[None]:
    """Foreign errors, of these types or of any, become one of `kind`: what they say, in a line, between two texts."""
    try:
        yield
    except caught or Exception as error:  # noqa: B030 (a tuple of classes, or a class)
        raise kind(f"{before}{one_line(error) or type(error).__name__}{after}") from error


# Optional libraries ---------------------------------------------------------------------------------------------------


def require(module: str, extra: str, what: str) -> None:
    """The library of an extra of this package is installed; nothing is imported.

    Args:
        module: To import.
        extra: That brings it, `pip install "stateset-lightning[extra]"`.
        what: The option or reward that needs it, for the error.

    Raises:
        ConfigError: If it is not.
    """
    if importlib.util.find_spec(module) is None:
        library = module.replace("_", "-")
        raise ConfigError(f'{what} needs the library {library}: pip install "stateset-lightning[{extra}]"')


def imported(module: str, extra: str, what: str) -> Any:
    """The module, for which `require` holds."""
    require(module, extra, what)
    return importlib.import_module(module)


def by_path(given: Any, key: str, say: str) -> Any:
    """A class or function that is given by its import path (`my_module.name`); what is no text is as it is.

    Args:
        given: Either.
        key: Of the option that gives it.
        say: How to write a path.

    Raises:
        ConfigError: If there is nothing at the path, or nothing that can be called.
    """
    if not isinstance(given, str):
        return given
    try:
        found = pkgutil.resolve_name(given)
    except (ImportError, AttributeError, ValueError) as error:  # whatever else a module raises says where
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigError(f"{key}={given!r} cannot be imported: {reason}; {say}") from error
    if not callable(found):
        raise ConfigError(f"{key}={given!r} is a {type(found).__name__}, and no class or function; {say}")
    return found
