"""`model.environment`: which environment answers completions, and how long a conversation may be."""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from stateset_lightning.environments.scripted_user import ScriptedUser
from stateset_lightning.errors import ConfigError, bounded, by_path

MIN_DEFAULT_TOKENS = 1024  # short answers, such as moves of a game, may get long replies


@bounded("model.environment")
@dataclass(frozen=True)
class EnvironmentConfig:
    """Conversations of several turns: an environment answers each completion, until one of both ends it.

    Args:
        factory: Makes an environment for each conversation: a class, or a function without required arguments, given
            by itself or by its import path; or a mapping of several, of which the scenario's column `environment` names
            one. By default `ScriptedUser`: a scenario's own texts are said one after another.
        options: Keyword arguments of the factory.
        max_turns: Completions of a conversation at most. With 1 the environment only scores the one completion, and
            without a factory the run is single-turn.
        max_tokens: Tokens of a conversation behind its prompt at most, the environment's included; by default twice
            `max_turns` times `max_new_tokens`, and at least 1,024. A turn begins only where `max_new_tokens` more fit.
        timeout: Seconds that an environment may take to begin, to answer, or to score, and a tool half of them.
        parts: Parts of an episode's prompts that take their turns without waiting for one another: one samples while
            environments of the others answer. Each part's batches are smaller, so that sampling itself takes longer.
        processes: Worker processes that environments run in, which can be killed; 0: on threads of the trainer.
        turn_rewards: What a turn of the model is credited with: `sum`, the conversation's reward, as all its turns are;
            `discounted`, what the environment gives from this turn on.
        turn_discount: Of `discounted`: each later turn's reward counts this many times less than the one before it.
    """

    factory: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    max_turns: Annotated[int, Ge(1)] = 8
    max_tokens: Annotated[int, Ge(1)] | None = None
    timeout: Annotated[float, Gt(0)] = 60.0
    parts: Annotated[int, Ge(1)] = 1
    processes: Annotated[int, Ge(0)] = 0
    turn_rewards: Literal["sum", "discounted"] = "sum"
    turn_discount: Annotated[float, Ge(0), Le(1)] = 1.0

    def __post_init__(self) -> None:
        of = self.factory.values() if isinstance(self.factory, Mapping) else [self.factory]
        if self.factory is not None and not (of and all(callable(one) or isinstance(one, str) for one in of)):
            kinds = "no class or function, no import path of one, and no mapping of several by name"
            raise ConfigError(f"model.environment.factory={self.factory!r} is {kinds}")
        if self.turn_rewards == "sum" and self.turn_discount != 1:
            given = f"model.environment.turn_discount={self.turn_discount:g} has no effect with turn_rewards=sum"
            raise ConfigError(f"{given}: set turn_rewards to discounted, or remove it")

    def factories(self) -> dict[str, Callable[..., Any]]:
        """By name; a single one by "".

        Raises:
            ConfigError: If an import path names nothing that can be called.
        """
        several = self.factory if isinstance(self.factory, Mapping) else {"": self.factory or ScriptedUser}
        key, say = "model.environment.factory", "write it as my_module.MyEnvironment"
        return {name: by_path(one, key, say) for name, one in several.items()}

    @property
    def are_scripts(self) -> bool:
        """Whether a scenario's own texts are said one after another: `user_responses` are one conversation then."""
        return self.max_turns > 1 and not self.options and self.factories() == {"": ScriptedUser}

    def most_tokens(self, max_new_tokens: int) -> int:
        """Tokens of a conversation behind its prompt at most; the model's context may end it before.

        Args:
            max_new_tokens: Of a turn.
        """
        return max(max_new_tokens, self.max_tokens or max(MIN_DEFAULT_TOKENS, 2 * self.max_turns * max_new_tokens))

    @classmethod
    def of(cls, given: Any) -> "EnvironmentConfig | None":
        """The config that is given, as such, as a mapping of its options, or as its factory alone; None of None, and of
        a single turn without a factory, which nobody answers.
        """
        are_options = isinstance(given, Mapping) and given.keys() <= {option.name for option in fields(cls)}
        config = given if isinstance(given, cls | None) else cls(**given) if are_options else cls(given)
        return None if config is None or (config.factory is None and config.max_turns == 1) else config
