"""Plays conversations: an engine samples a turn of each, environments answer, and the engine goes on where they did.

A conversation is what was sampled. An environment's turns become the tokens that the chat template adds for them, and
are marked as not sampled; nothing that the model said is encoded again. All conversations that go on sample their next
turn together; an environment answers on a thread, while other conversations still sample.

Letters: P prompts, N = P * G conversations, T tokens of all of them behind their prompts.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from stateset_lightning.data.prompts import PromptEncoder, asked
from stateset_lightning.environments.adapters import Driver, Settings, as_environment
from stateset_lightning.environments.base import EnvironmentFailure, Opening
from stateset_lightning.environments.config import EnvironmentConfig
from stateset_lightning.environments.conversation import Conversation
from stateset_lightning.errors import ConfigError
from stateset_lightning.rollout import RolloutConfig, RolloutEngine
from stateset_lightning.seeding import derive_seed
from stateset_lightning.threads import DaemonThreads, interruptible
from stateset_lightning.types import FinishReason, Metrics, PromptBatch, Rollout, Scenario, Turn, answered

# Called with (number, conversation, its environment's reward) when it has ended, in no particular order.
OnEnded = Callable[[int, Conversation, float | None], None]


_Call = tuple[Future[Any], float]  # of an environment, and by when, of `time.monotonic`, it must have returned


@dataclass(frozen=True)
class Limits:
    """What ends a turn, and a conversation.

    Args:
        ends: Tokens that end a turn of the model.
        context_length: Tokens of a conversation with its prompt at most; None: no limit.
    """

    ends: frozenset[int]
    context_length: int | None = None


@dataclass(frozen=True)
class Player:
    """Plays conversations with any engine.

    Args:
        config: Which environment, and how long.
        encoder: Makes tokens of prompts, and of what environments answer.
        make: A new environment.
        counts: What has happened since it was last emptied: conversations, turns, ends by cause, what environments
            count.
    """

    config: EnvironmentConfig
    encoder: PromptEncoder
    make: Callable[[], Driver]
    counts: Counter[str] = field(default_factory=Counter)
    encoders: dict[str, PromptEncoder] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls, config: EnvironmentConfig | None, sampling: RolloutConfig, data: Any, tokenizer: PreTrainedTokenizerBase
    ) -> Player | None:
        """The player of a run; None where no environment answers.

        Args:
            config: `model.environment`.
            sampling: `model.rollout`.
            data: The run's data module, whose prompts and templates conversations go on with; None of plain loaders.
            tokenizer: The policy's.

        Raises:
            ConfigError: If the factory cannot be used, or the options exclude each other.
        """
        if config is None:
            return None
        if sampling.keep_sampling_mask:
            what = "model.rollout.keep_sampling_mask=true with model.environment"
            raise ConfigError(f"{what}: the masks of a conversation are not kept; leave one of them out")
        encoder = PromptEncoder(tokenizer=tokenizer) if data is None else data.current_encoder()
        factories = {name: partial(one, **config.options) for name, one in config.factories().items()}
        settings = Settings(tokenizer, config.timeout / 2, config.max_turns)
        return cls(config, encoder, partial(as_environment, factories.get("", factories), settings))

    def encoder_with(self, schemas: list[dict[str, Any]]) -> PromptEncoder:
        """Makes prompts of whole conversations, with the schemas of these tools; once for those that are alike."""
        if (key := str(schemas)) not in self.encoders:
            tools = {"tools": schemas} if schemas else {}
            options = {**self.encoder.chat_template_kwargs, **tools}
            self.encoders[key] = replace(self.encoder, system_prompt=None, chat_template_kwargs=options)
        return self.encoders[key]

    def pop_metrics(self) -> Metrics:
        """What happened since the last call, by metric, as (sum, conversations)."""
        counts = dict(self.counts)
        self.counts.clear()
        total = counts.pop("conversations", 0)
        return {f"conversation/{name}": (float(count), float(total)) for name, count in sorted(counts.items())}

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
    ) -> tuple[PromptBatch, Rollout]:
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
            The batch with the prompts that its conversations begin with, and what was said.
        """
        threads = DaemonThreads(len(seeds_N), "environment")
        play = _Play(self, threads, batch, num_generations, sampling, seeds_N, limits)
        try:
            play.begin()
            live = [n for n in play.numbers if not play.all[n].ended]
            for n in play.numbers:
                if play.all[n].ended:
                    on_ended(n, play.all[n], None)
            while live:
                play.take_turn(engine, live, greedy)
                play.end([n for n in live if play.all[n].ended], on_ended)
                live = [n for n in live if not play.all[n].ended]
        finally:
            threads.close(seconds=0)
        return play.result()


class _Play:
    """One call of `Player.play`."""

    def __init__(
        self,
        player: Player,
        threads: DaemonThreads,
        batch: PromptBatch,
        num_generations: int,
        sampling: RolloutConfig,
        seeds_N: Sequence[int],
        limits: Limits,
    ) -> None:
        self.player, self.config, self.threads = player, player.config, threads
        self.batch, self.size, self.sampling = batch, num_generations, sampling
        self.seeds_N, self.limits = seeds_N, limits
        self.numbers = range(len(seeds_N))
        self.all: list[Conversation] = []
        self.prompts: list[list[int]] = []  # of each group
        self.rendered: dict[Any, tuple[list[Turn], list[int]]] = {}

    # The parts of a conversation -------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Makes and resets all environments, and prompts of what they begin with."""
        starts = [self._call(self._reset, n) for n in self.numbers]
        for n, start in enumerate(starts):
            p = n // self.size
            conversation = Conversation([], [], self.batch.scenarios[p])
            self.all.append(conversation)
            driver, opening = self._wait(conversation, start) or (None, Opening())
            conversation.driver = driver
            if driver is None or not (opening != Opening() or driver.schemas()):
                conversation.turns, conversation.prompt = self.batch.conversations[p], self.batch.prompt_tokens[p]
            else:
                self._render(conversation, driver, opening)
        for p in range(len(self.batch)):
            group = self.all[p * self.size : (p + 1) * self.size]
            shared = _common_start([conversation.prompt for conversation in group])
            self.prompts.append(shared)
            for conversation in group:  # what a prompt has of its own counts as the environment's
                conversation.add(conversation.prompt[len(shared) :])

    def take_turn(self, engine: RolloutEngine, live: list[int], greedy: bool) -> None:
        """Samples a turn of these conversations, and adds what their environments answer."""
        steps: dict[int, _Call] = {}

        def answer(i: int, text: str, num_tokens: int) -> None:
            if num_tokens < self.sampling.max_new_tokens:  # else it may have been cut off, which is known later
                steps[live[i]] = self._call(self._driver(live[i]).step, text)

        texts = self._sample(engine, live, greedy, answer)
        for n, text in zip(live, texts, strict=True):
            conversation = self.all[n]
            conversation.turns = answered(conversation.turns, text)
            if conversation.reason == FinishReason.LENGTH:
                conversation.ended = "length"
                continue
            step = steps[n] if n in steps else self._call(self._driver(n).step, text)
            reply = self._wait(conversation, step)
            if reply is None:
                continue
            self.player.counts.update(reply.counts or {})
            conversation.rewards.append(reply.reward)
            conversation.ended = "environment" if reply.done or not reply.turns else self._go_on(n, reply.turns)

    def end(self, ended: Iterable[int], on_ended: OnEnded) -> None:
        """Asks environments for their rewards, and hands conversations over to be scored."""
        rewards = [(n, self._call(self._reward, n)) for n in ended]
        for n, asked_for in rewards:
            on_ended(n, self.all[n], self._wait(self.all[n], asked_for))

    def result(self) -> tuple[PromptBatch, Rollout]:
        """The batch with the prompts that were used, and the rollout of all conversations."""
        counts = self.player.counts
        counts.update(f"ended_by_{conversation.ended}" for conversation in self.all)
        counts.update({"conversations": len(self.all), "turns": sum(c.num_turns for c in self.all)})
        batch = copy(self.batch)
        batch.prompt_tokens = self.prompts
        tokens_T = torch.tensor([token for c in self.all for token in c.tokens], dtype=torch.long)
        rollout = Rollout(
            self.prompts,
            tokens_T,
            torch.tensor([len(c.tokens) for c in self.all]),
            torch.tensor([logprob for c in self.all for logprob in c.logprobs], dtype=torch.float32),
            torch.tensor([sampled for c in self.all for sampled in c.sampled], dtype=torch.bool),
            [c.reason for c in self.all],
            [c.said(self.batch.conversations[n // self.size]) for n, c in enumerate(self.all)],
        )
        return batch, rollout

    # ------------------------------------------------------------------------------------------------------------------

    def _reset(self, n: int) -> tuple[Driver, Opening]:
        columns = self.batch.scenarios[n // self.size].columns()
        driver = self.player.make()
        seed = derive_seed(self.seeds_N[n // self.size * self.size], "environment")
        return driver, driver.reset(columns, seed)

    def _reward(self, n: int) -> float | None:
        conversation = self.all[n]
        try:
            return None if conversation.failure else self._driver(n).get_reward()
        finally:
            if conversation.driver is not None:
                conversation.driver.close()

    def _driver(self, n: int) -> Driver:
        driver = self.all[n].driver
        assert driver is not None, "a conversation without an environment has ended"
        return driver

    def _render(self, conversation: Conversation, driver: Driver, opening: Opening) -> None:
        """The prompt of a scenario with what its environment begins with, and with the tools; once for a group."""
        scenario, schemas = conversation.scenario, driver.schemas()
        encoder = self.player.encoder_with(schemas)
        turns = opening.after(scenario.turns(self.player.encoder.system_prompt))
        key = scenario.id, str(schemas), tuple(turns)
        if key not in self.rendered:
            opened = Scenario(id=scenario.id, messages=tuple(turns))
            prompts = encoder.encode([opened], "model.environment", is_tried=True)
            tokens = [int(token) for token in prompts.tokens[0]]
            self.rendered[key] = asked(opened, prompts.opened[0]), tokens
        conversation.turns, conversation.prompt = self.rendered[key]

    def _sample(
        self, engine: RolloutEngine, live: list[int], greedy: bool, answer: Callable[[int, str, int], None]
    ) -> list[str]:
        """The next turn of these conversations, as texts. The first one of all shares the prompts of groups."""
        is_first = len(live) == len(self.all) and not any(conversation.tokens for conversation in self.all)
        prompts = self.prompts if is_first else [[*self.prompts[n // self.size], *self.all[n].tokens] for n in live]
        seeds = [
            self.seeds_N[n] if (turn := self.all[n].num_turns) == 0 else derive_seed(self.seeds_N[n], "turn", turn)
            for n in live
        ]
        size = self.size if is_first else 1
        said = engine.generate(prompts, size, self.sampling, seeds, greedy=greedy, on_finished=answer)
        assert said.logprobs_T is not None
        logprobs = said.logprobs_T.cpu().split(said.lengths_N.tolist())
        for n, tokens, values, reason in zip(live, said.completions(), logprobs, said.finish_reasons, strict=True):
            self.all[n].add(tokens, values.tolist())
            self.all[n].num_turns += 1
            self.all[n].reason = reason
        return said.texts

    def _go_on(self, n: int, turns: Sequence[Turn]) -> str:
        """Adds an environment's turns; or says what ends the conversation instead."""
        conversation, tokenizer = self.all[n], self.player.encoder.tokenizer
        if conversation.num_turns == self.config.max_turns:
            return "turns"
        last = conversation.tokens[-1]
        said = tokenizer.decode([last]) if last in self.limits.ends else self._stop_string(conversation)
        tokens = self.player.encoder.between_answers(turns, said)
        most = self.config.max_tokens or 2 * self.config.max_turns * self.sampling.max_new_tokens
        if self.limits.context_length is not None:
            most = min(most, self.limits.context_length - len(self.prompts[n // self.size]))
        if len(conversation.tokens) + len(tokens) + self.sampling.max_new_tokens > most:
            conversation.reason = FinishReason.LENGTH
            return "tokens"
        conversation.add(tokens)
        conversation.turns = [*conversation.turns, *turns]
        return ""

    def _stop_string(self, conversation: Conversation) -> str:
        """The stop string that a turn ends with, if any."""
        text = self.player.encoder.tokenizer.decode(conversation.tokens[-16:])
        return max((stop for stop in self.sampling.stop if text.endswith(stop)), key=len, default="")

    def _call(self, function: Callable[..., Any], *args: Any) -> _Call:
        """Calls an environment, at once: there is a thread for each conversation."""
        return self.threads.submit(function, *args), time.monotonic() + self.config.timeout

    def _wait(self, conversation: Conversation, call: _Call) -> Any:
        """What an environment returned; None where it failed, which ends the conversation."""
        future, deadline = call
        try:
            return future.result(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            limit = f"model.environment.timeout={self.config.timeout:g}"
            failure: BaseException = EnvironmentFailure(f"gave no answer within {limit} s")
        except Exception as error:  # an environment is foreign code
            failure = error
        conversation.failure, conversation.ended = failure, "failure"
        return None


def _common_start(rows: Sequence[Sequence[int]]) -> list[int]:
    """The tokens with which all rows begin; at least one is left to each row that has more than the others."""
    same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False))
    return [tokens[0] for tokens in same]
