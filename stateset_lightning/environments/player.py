"""What plays of a run have in common: the environment, the encoder of what it says, and who is told of turns."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

from stateset_lightning.data.prompts import PromptEncoder
from stateset_lightning.environments.adapters import Driver, Settings, as_environment
from stateset_lightning.environments.config import EnvironmentConfig
from stateset_lightning.errors import ConfigError
from stateset_lightning.rollout import RolloutConfig
from stateset_lightning.types import Turn


class TurnTaken(NamedTuple):
    """What a conversation has said in a turn: the scenario's id, the model's text, and the environment's turns.

    `ended` is what ended the conversation with this turn (environment, turns, tokens, length, failure); "" if it goes
    on. The reply of one that ends is left out.
    """

    id: str
    text: str
    reply: tuple[Turn, ...]
    ended: str


OnTurn = Callable[[int, list[TurnTaken]], None]


@dataclass(frozen=True)
class Player:
    """What a `Play` needs to know of its run.

    Args:
        config: Which environment, and how long.
        encoder: Makes tokens of prompts, and of what environments answer.
        make: A new environment.
        on_turn: Is told the number of each turn, from 1, and what the conversations that took it have said.
    """

    config: EnvironmentConfig
    encoder: PromptEncoder
    make: Callable[..., Driver]
    on_turn: OnTurn

    @classmethod
    def of(cls, config: EnvironmentConfig, sampling: RolloutConfig, data: Any, tokenizer: Any, tell: OnTurn) -> Self:
        """The player of a run in which an environment answers.

        Args:
            config: `model.environment`.
            sampling: `model.rollout`.
            data: The run's data module, whose prompts and templates conversations go on with; None of plain loaders.
            tokenizer: The policy's.
            tell: The player's `on_turn`.

        Raises:
            ConfigError: If the factory cannot be used, or the options exclude each other.
        """
        if sampling.keep_sampling_mask:
            what = "model.rollout.keep_sampling_mask=true with model.environment"
            raise ConfigError(f"{what}: the masks of a conversation are not kept; leave one of them out")
        encoder = PromptEncoder(tokenizer=tokenizer) if data is None else data.current_encoder()
        factories = {name: partial(one, **config.options) for name, one in config.factories().items()}
        spoken = None if config.processes else tokenizer  # which knows forms of tool calls, and needs torch
        settings = Settings(spoken, config.timeout / 2, config.max_turns, timeout=config.timeout)
        return cls(config, encoder, partial(as_environment, factories.get("", factories), settings), tell)
