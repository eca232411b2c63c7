"""The bounds that signatures state (`Annotated[int, Ge(1)]`), held from Python too and not only on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

from stateset_lightning.errors import ConfigError

_CHECKS: dict[type, tuple[str, str]] = {
    Ge: ("ge", "at least"),
    Gt: ("gt", "above"),
    Le: ("le", "at most"),
    Lt: ("lt", "below"),
}


def check_bounds(prefix: str, signature: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Holds each value against the bounds of its parameter or field.

    Raises:
        ConfigError: Naming the first value out of bounds, as `prefix.name=value`.
    """
    for name, hint in get_type_hints(signature, include_extras=True).items():
        if (value := values.get(name)) is not None:
            for bound in _bounds(hint):
                attribute, words = _CHECKS[type(bound)]
                limit = getattr(bound, attribute)
                inside = {"ge": value >= limit, "gt": value > limit, "le": value <= limit, "lt": value < limit}[
                    attribute
                ]
                if not inside:
                    raise ConfigError(f"{prefix}.{name}={value} must be {words} {limit}")


def _bounds(hint: Any) -> list[Any]:
    """Bounds of a hint and, for `Annotated[...] | None`, of its members."""
    own = [item for item in getattr(hint, "__metadata__", ()) if type(item) in _CHECKS]
    members = [] if own else [bound for member in get_args(hint) for bound in _bounds(member)]
    return own + members
