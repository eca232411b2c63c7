"""`model.environment`: which environment answers completions, and how long a conversation may be."""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

from annotated_types import Ge, Gt, Le

from stateset_lightning.environments.base import imported
from stateset_lightning.errors import ConfigError, bounded


@bounded("model.environment")
@dataclass(frozen=True)
class EnvironmentConfig:
    """Conversations of several turns: an environment answers each completion, until one of both ends it.

    Args:
        factory: Makes an environment for each conversation: a class, or a function without required arguments, given
            by itself or by its import path; or a mapping of several, of which the scenario's column `environment` names
            one.
        options: Keyword arguments of the factory.
        max_turns: Completions of a conversation at most. With 1 the environment only scores the one completion.
        max_tokens: Tokens of a conversation behind its prompt at most, the environment's included; by default twice
            `max_turns` times `max_new_tokens`. A turn begins only where `max_new_tokens` more fit.
        timeout: Seconds that an environment may take to begin, to answer, or to score, and a tool half of them.
        turn_rewards: What a turn of the model is credited with: `sum`, the conversation's reward, as all its turns are;
            `discounted`, what the environment gives from this turn on.
        turn_discount: Of `discounted`: each later turn's reward counts this many times less than the one before it.
    """

    factory: Any
    options: dict[str, Any] = field(default_factory=dict)
    max_turns: Annotated[int, Ge(1)] = 8
    max_tokens: Annotated[int, Ge(1)] | None = None
    timeout: Annotated[float, Gt(0)] = 60.0
    turn_rewards: Literal["sum", "discounted"] = "sum"
    turn_discount: Annotated[float, Ge(0), Le(1)] = 1.0

    def __post_init__(self) -> None:
        of = self.factory.values() if isinstance(self.factory, Mapping) else [self.factory]
        if not of or not all(callable(one) or isinstance(one, str) for one in of):
            raise ConfigError(
                f"model.environment.factory={self.factory!r} is no class or function, no import path of one, and no"
                " mapping of several by name"
            )
        if self.turn_rewards == "sum" and self.turn_discount != 1:
            given = f"model.environment.turn_discount={self.turn_discount:g} has no effect with turn_rewards=sum"
            raise ConfigError(f"{given}: set turn_rewards to discounted, or remove it")

    def factories(self) -> dict[str, Callable[..., Any]]:
        """By name; a single one by "".

        Raises:
            ConfigError: If an import path names nothing that can be called.
        """
        several = self.factory if isinstance(self.factory, Mapping) else {"": self.factory}
        return {name: one if callable(one) else _imported(one) for name, one in several.items()}

    @classmethod
    def of(cls, given: Any) -> "EnvironmentConfig | None":
        """The config that is given, as such, as a mapping of its options, or as its factory alone; None of None."""
        if given is None or isinstance(given, cls):
            return given
        return cls(**given) if isinstance(given, Mapping) and "factory" in given else cls(given)


def _imported(path: str) -> Callable[..., Any]:
    option = f"model.environment.factory={path!r}"
    found = imported(path, option, "write it as my_module.MyEnvironment")
    if not callable(found):
        raise ConfigError(f"{option} is a {type(found).__name__}, which makes no environments: name a class")
    return cast(Callable[..., Any], found)
