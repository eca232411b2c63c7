"""Plays conversations: an engine samples a turn of each, environments answer, and the engine goes on where they did.

A conversation is what was sampled. An environment's turns become the tokens that the chat template adds for them, and
are marked as not sampled; nothing that the model said is encoded again. Conversations of a part of the prompts
sample their next turn together; an environment answers on a thread, while other conversations still sample.

Letters: P prompts, N = P * G conversations, T tokens of all of them behind their prompts.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from stateset_lightning.data.prompts import PromptEncoder
from stateset_lightning.environments.adapters import Driver, Settings, as_environment
from stateset_lightning.environments.config import EnvironmentConfig
from stateset_lightning.environments.play import Limits, OnEnded, OnTurn, Play
from stateset_lightning.errors import ConfigError
from stateset_lightning.rollout import RolloutConfig, RolloutEngine
from stateset_lightning.rollout.in_process import InProcessEngine
from stateset_lightning.threads import DaemonThreads, interruptible
from stateset_lightning.types import Metrics, PromptBatch, Rollout


@dataclass(frozen=True)
class Player:
    """Plays conversations with any engine.

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

    @interruptible()
    def play(
        self,
        engine: RolloutEngine,
        batch: PromptBatch,
        num_generations: int,
        sampling: RolloutConfig,
        seeds_N: Sequence[int],
        limits: Limits,
        on_ended: OnEnded,
        greedy: bool = False,
    ) -> tuple[PromptBatch, Rollout, Metrics]:
        """Samples whole conversations.

        Args:
            engine: Samples turns.
            batch: What conversations are about.
            num_generations: Conversations of each prompt.
            sampling: Of each turn.
            seeds_N: Of the noise of each conversation's first turn; those of the others follow from it. The seed of a
                group's environments is the first of the group's.
            limits: Of turns and conversations.
            on_ended: Scores a conversation, while others go on.
            greedy: See `RolloutEngine.generate`.

        Returns:
            The batch with the prompts that its conversations begin with; what was said; and what happened, by metric,
            as (sum, conversations).
        """
        threads = DaemonThreads(len(seeds_N), "environment")
        play = Play(self, threads, batch, num_generations, sampling, seeds_N, limits, engine, greedy)
        try:
            play.begin()
            with engine.keeping_caches() if isinstance(engine, InProcessEngine) else nullcontext():
                play.take_turns(on_ended)
        finally:
            threads.close(seconds=0)
            for conversation in play.all:
                conversation.let_go()
            if play.processes is not None:
                play.processes.close()
        return play.result()
