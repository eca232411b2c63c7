"""One conversation: what was said, which of its tokens the model sampled, and what its environment gave."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from stateset_lightning.environments.adapters import Driver
from stateset_lightning.threads import DaemonThreads
from stateset_lightning.types import FinishReason, Scenario, Turn

CLOSING = DaemonThreads(10_000, "environment-close")  # nobody waits for what environments do at their ends


@dataclass
class Conversation:
    """As far as it has come.

    Args:
        turns: All of them, the prompt's included: what rewards see.
        prompt: Tokens of its first prompt.
        scenario: That it is about.

    Attributes:
        driver: Its environment; None where that could not begin.
        tokens: Behind the prompt that its group shares.
        sampled: Of each token, whether the model sampled it; `logprobs` are of no meaning where it did not.
        lengths: Sampled tokens of each turn of the model.
        rewards: The environment's, of each turn that it has answered.
        reason: Why its last turn ended.
        ended: What ended it: environment, turns, tokens, length, failure; "" while it goes on.
        failure: What its environment raised.
    """

    turns: list[Turn]
    prompt: list[int]
    scenario: Scenario
    driver: Driver | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    rewards: list[float | None] = field(default_factory=list)
    reason: FinishReason = FinishReason.STOP
    ended: str = ""
    failure: BaseException | None = None

    @property
    def num_turns(self) -> int:
        return len(self.lengths)

    def add(self, tokens: Sequence[int], logprobs: Sequence[float] | None = None) -> None:
        """Tokens of a turn; the environment's have no log-probs."""
        self.tokens += tokens
        self.sampled += [logprobs is not None] * len(tokens)
        self.logprobs += [0.0] * len(tokens) if logprobs is None else logprobs
        self.lengths += [] if logprobs is None else [len(tokens)]

    def let_go(self) -> None:
        """Closes the environment, which may hang, and which nobody waits for."""
        if self.driver is not None:
            CLOSING.submit(self.driver.close)
            self.driver = None

    def said(self, prompt: Sequence[Turn]) -> str:
        """All that came behind the prompt, as one text; of a single turn, its text."""
        first = len(prompt) - (prompt[-1].role == "assistant")
        behind = self.turns[first:]
        if len(behind) <= 1:
            opened = prompt[-1].content if prompt[-1].role == "assistant" else ""
            return "".join(turn.content for turn in behind).removeprefix(opened)
        return "\n".join(f"[{turn.role}] {turn.content}" for turn in behind)

    def told(self, reward: float | None) -> dict[str, Any]:
        """What files say of it: all turns, answers of the model, what ended it, and what the environment gave."""
        turns = [{"role": turn.role, "content": turn.content} for turn in self.turns]
        return {"turns": turns, "num_turns": self.num_turns, "ended_by": self.ended, "environment_reward": reward}

    def credits(self, reward: float | None, discount: float) -> list[tuple[int, float]]:
        """Of each turn, its sampled tokens and its return: rewards from it on, each times `discount` per turn between.

        To be asked before the environment is let go: where that has a `get_reward`, its reward comes with the last
        turn, and takes the place of the turns' own.
        """
        cut_off = self.num_turns - len(self.rewards)  # 1 or 0: no environment answers such a turn
        rewards: Sequence[float | None] = [*self.rewards, *[None] * cut_off]
        if hasattr(getattr(self.driver, "environment", None), "get_reward"):
            rewards = [*[None] * (self.num_turns - 1), reward]
        returns = accumulate((given or 0.0 for given in reversed(rewards)), lambda later, own: own + discount * later)
        return list(zip(self.lengths, reversed([*returns]), strict=False))

    def columns(self, reward: float | None) -> dict[str, Any]:
        """What rewards get as context: the scenario's columns, how it went, and the environment itself, for some."""
        environments = [getattr(self.driver, "environment", None)]
        turns = {"turn_rewards": list(self.rewards), "num_turns": self.num_turns, "ended_by": self.ended}
        # By a function, as columns are copied, and it is not.
        turns["environments"] = lambda: environments
        return {**self.scenario.columns(), "environment_reward": reward, **turns}
