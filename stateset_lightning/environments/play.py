"""Plays conversations: an engine samples a turn of each, environments answer, and the engine goes on where they did.

A conversation is what was sampled. An environment's turns become the tokens that the chat template adds for them, and
are marked as not sampled; nothing that the model said is encoded again. Conversations of a part of the prompts
sample their next turn together; an environment answers on a thread, while other conversations still sample.

Letters: P prompts, N = P * G conversations, T tokens of all of them behind their prompts.
"""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from typing import Any

import torch

from stateset_lightning.data.prompts import asked
from stateset_lightning.environments.adapters import Driver
from stateset_lightning.environments.base import EnvironmentFailure, Opening
from stateset_lightning.environments.conversation import CLOSING, Conversation
from stateset_lightning.environments.player import Player, TurnTaken
from stateset_lightning.environments.processes import HostedDriver, Processes
from stateset_lightning.environments.tools import CALL_COUNTS, UserCode
from stateset_lightning.errors import DataError
from stateset_lightning.rollout import InProcessEngine, OnFinished, RolloutConfig, RolloutEngine
from stateset_lightning.seeding import derive_seed
from stateset_lightning.threads import DaemonThreads, interruptible, wait_for
from stateset_lightning.types import FinishReason, Metrics, PromptBatch, Rollout, Scenario, Turn, answered

# Called with (number, conversation, its environment's reward) when it has ended, in no particular order. It may take
# over the environment, of the conversation's `driver`, which is closed otherwise.
OnEnded = Callable[[int, Conversation, float | None], None]
_Call = tuple[Future[Any], float]  # of an environment, and by when, of `time.monotonic`, it must have returned


@dataclass(frozen=True)
class Limits:
    """What ends a turn, and a conversation.

    Args:
        ends: Tokens that end a turn of the model.
        context_length: Tokens of a conversation with its prompt at most.
    """

    ends: frozenset[int]
    context_length: float = math.inf


@dataclass
class Play:
    """The conversations of a batch: the state of all of them, and what happens turn by turn.

    Args:
        player: Of the run.
        batch: What conversations are about.
        size: Conversations of each prompt.
        sampling: Of each turn.
        seeds_N: Of the noise of each conversation's first turn; those of the others follow from it. The seed of a
            group's environments is the first of the group's.
        limits: Of turns and conversations.
        engine: Samples turns.
        greedy: See `RolloutEngine.generate`.
    """

    player: Player
    batch: PromptBatch
    size: int
    sampling: RolloutConfig
    seeds_N: Sequence[int]
    limits: Limits
    engine: RolloutEngine
    greedy: bool = False
    all: list[Conversation] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)  # of each group
    rendered: dict[Any, tuple[list[Turn], list[int]]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.config = self.player.config
        self.threads = DaemonThreads(len(self.seeds_N), "environment")
        self.processes = Processes(self.config, self.player.make) if self.config.processes else None

    @interruptible()
    def run(self, on_ended: OnEnded) -> tuple[PromptBatch, Rollout, Metrics]:
        """Samples whole conversations, and has each scored by `on_ended` while others go on.

        Returns:
            The batch with the prompts that its conversations begin with; what was said; and what happened, by metric,
            as (sum, conversations).
        """
        try:
            self.begin()
            with self.engine.keeping_caches() if isinstance(self.engine, InProcessEngine) else nullcontext():
                self.take_turns(on_ended)
        finally:
            self.threads.close(seconds=0)
            for conversation in self.all:
                conversation.let_go()
            if self.processes is not None:
                self.processes.close()
        return self.result()

    # The parts of a conversation -------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Makes and resets all environments, and prompts of what they begin with."""
        codes = [UserCode(self.config.timeout) for _ in self.seeds_N]
        starts = [self._call(code.submit, self._reset, n, code) for n, code in enumerate(codes)]
        for n, start in enumerate(starts):
            p = n // self.size
            given = self.batch.conversations[p], self.batch.prompt_tokens[p], self.batch.scenarios[p]
            conversation = Conversation(*given)
            self.all.append(conversation)
            driver, opening = self._wait(conversation, start) or (None, Opening())
            if driver is None:
                start[0].add_done_callback(_close_late)
            conversation.driver = driver
            if driver is not None and (opening != Opening() or driver.schemas):
                self._render(conversation, driver, opening)
        for p in range(len(self.batch)):
            group = [c for c in self.all[p * self.size : (p + 1) * self.size] if not c.ended]
            shared = _common_start([conversation.prompt for conversation in group])
            self.prompts.append(shared or self.batch.prompt_tokens[p])
            for conversation in group:
                if shared:  # what a prompt has of its own counts as the environment's
                    conversation.add(conversation.prompt[len(shared) :])
                else:
                    self._fail(conversation, EnvironmentFailure("a group's environments begin with nothing in common"))

    def take_turns(self, on_ended: OnEnded) -> None:
        """Plays all conversations to their ends, in parts: while environments of one answer, another samples.

        What is sampled together is decided beforehand and not by who answers first: log-probs depend, in their last
        bits, on what else is in a batch.
        """
        bounds = [len(self.batch) * i // self.config.parts * self.size for i in range(self.config.parts + 1)]
        parts = (self._play_part(range(a, b), on_ended) for a, b in pairwise(bounds))
        waits_for = {part: list[_Call]() for part in parts}
        while waits_for:
            over = (part for part, calls in waits_for.items() if len(waits_for) == 1 or all(map(_is_over, calls)))
            if (part := next(over, None)) is None:
                time.sleep(0.005)  # cheaper than to have thousands of calls wake this thread
                continue
            del waits_for[part]
            if (calls := next(part, None)) is not None:
                waits_for[part] = calls  # behind those that have waited longer

    def _play_part(self, numbers: Iterable[int], on_ended: OnEnded) -> Iterator[list[_Call]]:
        """Plays these conversations, which take their turns together. Yields the calls that it waits for next."""
        live = list(numbers)
        while True:
            yield from self._end([n for n in live if self.all[n].ended], on_ended)
            if not (live := [n for n in live if not self.all[n].ended]):
                return
            steps = self._take_turn(live)
            yield list(steps.values())
            for n, step in steps.items():
                if (reply := self._wait(self.all[n], step)) is not None:
                    self.counts.update(reply.counts or {})
                    self.all[n].rewards.append(reply.reward)
                    self.all[n].ended = "environment" if reply.done else self._go_on(n, reply.turns)
            self.player.on_turn(self.all[live[0]].num_turns, [self._taken(self.all[n]) for n in live])

    def _take_turn(self, live: list[int]) -> dict[int, _Call]:
        """Samples a turn of these conversations, and has their environments answer, unless a turn was cut off."""
        steps: dict[int, _Call] = {}

        def answer(i: int, text: str, num_tokens: int) -> None:
            if num_tokens < self.sampling.max_new_tokens:  # else it may have been cut off, which is known later
                steps[live[i]] = self._step(live[i], text)

        for n, text in zip(live, self._sample(live, answer), strict=True):
            conversation = self.all[n]
            if conversation.reason == FinishReason.LENGTH:
                conversation.ended = "length"
                steps.pop(n, None)  # an engine may cut off before `max_new_tokens`, where its own length ends
            elif n not in steps:
                steps[n] = self._step(n, text)
            conversation.turns = answered(conversation.turns, text)
        return steps

    def _end(self, ended: list[int], on_ended: OnEnded) -> Iterator[list[_Call]]:
        """Asks environments for their rewards, and hands conversations over to be scored."""
        drivers = {n: self._driver(n) for n in ended if self.all[n].failure is None}
        rewards = {n: self._call(driver.code.submit, driver.get_reward) for n, driver in drivers.items()}
        yield list(rewards.values())
        for n in ended:
            on_ended(n, self.all[n], self._wait(self.all[n], rewards[n]) if n in rewards else None)
            self.all[n].let_go()

    def result(self) -> tuple[PromptBatch, Rollout, Metrics]:
        """The batch with the prompts that were used, the rollout of all conversations, and what happened."""
        self.counts.update(f"ended_by_{conversation.ended}" for conversation in self.all)
        self.counts["turns"] = sum(conversation.num_turns for conversation in self.all)
        metrics: Metrics = {}
        for name, count in sorted(self.counts.items()):
            if name.startswith("cost/"):  # of an episode, as those of rewards
                metrics[name] = float(count), 1.0
            else:
                metrics[f"conversation/{name}"] = float(count), float(len(self.all))
        batch = copy(self.batch)
        batch.prompt_tokens = self.prompts
        tokens_T = torch.tensor([token for c in self.all for token in c.tokens], dtype=torch.long)
        lengths_N = torch.tensor([len(c.tokens) for c in self.all])
        logprobs_T = torch.tensor([logprob for c in self.all for logprob in c.logprobs], dtype=torch.float32)
        sampled_T = torch.tensor([sampled for c in self.all for sampled in c.sampled], dtype=torch.bool)
        reasons = [c.reason for c in self.all]
        texts = [c.said(self.batch.conversations[n // self.size]) for n, c in enumerate(self.all)]
        return batch, Rollout(self.prompts, tokens_T, lengths_N, logprobs_T, sampled_T, reasons, texts), metrics

    # ------------------------------------------------------------------------------------------------------------------

    def _reset(self, n: int, code: UserCode) -> tuple[Driver, Opening]:
        columns = self.batch.scenarios[n // self.size].columns()
        tokenizer = self.player.encoder.tokenizer
        hosted = None if self.processes is None else HostedDriver(self.processes, n, tokenizer, code)
        driver = hosted or self.player.make(code=code)
        seed = derive_seed(self.seeds_N[n // self.size * self.size], "environment")
        try:
            return driver, driver.reset(columns, seed)
        except BaseException:
            CLOSING.submit(driver.close)
            raise

    def _step(self, n: int, text: str) -> _Call:
        """Has an environment answer: the completion, behind what the prompt has opened of it (`<think>`)."""
        return self._call(self.threads.submit, self._driver(n).step, answered(self.all[n].turns, text)[-1].content)

    def _taken(self, conversation: Conversation) -> TurnTaken:
        """The last turn of the model, and what came behind it."""
        turns = conversation.turns
        last = max(i for i, turn in enumerate(turns) if turn.role == "assistant")
        return TurnTaken(conversation.scenario.id, turns[last].content, tuple(turns[last + 1 :]), conversation.ended)

    def _fail(self, conversation: Conversation, failure: BaseException) -> None:
        conversation.failure, conversation.ended = failure, "failure"

    def _driver(self, n: int) -> Driver:
        driver = self.all[n].driver
        assert driver is not None, "a conversation without an environment has ended"
        return driver

    def _render(self, conversation: Conversation, driver: Driver, opening: Opening) -> None:
        """The prompt of a scenario with what its environment begins with, and with the tools; once for a group."""
        scenario, schemas = conversation.scenario, driver.schemas
        self.counts.update(dict.fromkeys(CALL_COUNTS if schemas else (), 0))  # also where nothing is called
        try:
            turns = opening.after(scenario.turns(self.player.encoder.system_prompt))
            if (key := (scenario.id, str(schemas), tuple(turns))) not in self.rendered:
                opened = Scenario(id=scenario.id, messages=tuple(turns))
                prompts = self.player.encoder.with_tools(schemas).encode([opened], "model.environment", is_tried=True)
                self.rendered[key] = asked(opened, prompts.opened[0]), prompts.tokens[0]
        except (EnvironmentFailure, DataError) as error:  # the template may refuse what an environment begins with
            self._fail(conversation, error)
            return
        conversation.turns, conversation.prompt = self.rendered[key]
        needed = len(conversation.prompt) + self.sampling.max_new_tokens
        if needed > self.limits.context_length:
            what = f"with what its environment begins with, it needs {needed} tokens"
            self._fail(conversation, EnvironmentFailure(f"{what}, and the context has {self.limits.context_length}"))

    def _sample(self, live: list[int], answer: OnFinished) -> list[str]:
        """The next turn of these conversations, as texts. The first one of whole groups shares their prompts."""
        are_whole = len(live) == len({n // self.size for n in live}) * self.size
        size = self.size if are_whole and not any(self.all[n].tokens for n in live) else 1
        prompts = [[*self.prompts[n // self.size], *self.all[n].tokens] for n in live[::size]]
        turns = [(self.seeds_N[n], self.all[n].num_turns) for n in live]
        seeds = [derive_seed(seed, "turn", turn) if turn else seed for seed, turn in turns]
        said = self.engine.generate(prompts, size, self.sampling, seeds, greedy=self.greedy, on_finished=answer)
        assert said.logprobs_T is not None
        logprobs = said.logprobs_T.cpu().split(said.lengths_N.tolist())
        for n, tokens, values, reason in zip(live, said.completions(), logprobs, said.finish_reasons, strict=True):
            self.all[n].add(tokens, values.tolist())
            self.all[n].reason = reason
        return said.texts

    def _go_on(self, n: int, turns: Sequence[Turn]) -> str:
        """Adds an environment's turns; or says what ends the conversation instead."""
        conversation, tokenizer = self.all[n], self.player.encoder.tokenizer
        if conversation.num_turns == self.config.max_turns:
            return "turns"
        last = conversation.tokens[-1]
        said = tokenizer.decode([last]) if last in self.limits.ends else self._stop_string(conversation)
        try:
            tokens = self.player.encoder.between_answers(turns, said)
        except DataError as error:  # a template that refuses such turns
            conversation.failure = error
            return "failure"
        most = self.config.most_tokens(self.sampling.max_new_tokens)
        room = min(most, self.limits.context_length - len(self.prompts[n // self.size]))
        if len(conversation.tokens) + len(tokens) + self.sampling.max_new_tokens > room:
            conversation.reason = FinishReason.LENGTH
            return "tokens"
        conversation.add(tokens)
        conversation.turns = [*conversation.turns, *turns]
        return ""

    def _stop_string(self, conversation: Conversation) -> str:
        """The stop string that a turn ends with, if any."""
        text = self.player.encoder.tokenizer.decode(conversation.tokens[-16:])
        return max((stop for stop in self.sampling.stop if text.endswith(stop)), key=len, default="")

    def _call(self, submit: Callable[..., Future[Any]], *call: Any) -> _Call:
        """Calls an environment, at once: there are two threads for each conversation, its own and one for tools."""
        # A process ends what takes too long; until it begins, a call may wait for others.
        seconds = self.config.timeout if self.processes is None else threading.TIMEOUT_MAX / 2
        return submit(*call), time.monotonic() + seconds

    def _wait(self, conversation: Conversation, call: _Call) -> Any:
        """What an environment returned; None where it failed, which ends the conversation."""
        future, deadline = call
        try:
            return wait_for(future, deadline).result(0)
        except TimeoutError:
            limit = f"model.environment.timeout={self.config.timeout:g}"
            failure: BaseException = EnvironmentFailure(f"gave no answer within {limit} s")
        except Exception as error:  # an environment is foreign code
            failure = error
        self._fail(conversation, failure)
        return None


def _is_over(call: _Call) -> bool:
    future, deadline = call
    return future.done() or time.monotonic() >= deadline


def _close_late(start: Future[tuple[Driver, Opening]]) -> None:
    """Closes an environment whose beginning took too long, when it has begun at last."""
    if not start.cancelled() and start.exception() is None:
        start.result()[0].close()


def _common_start(rows: Sequence[Sequence[int]]) -> list[int]:
    """The tokens with which all rows begin; at least one is left to each row that has more than the others."""
    return [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False))]
