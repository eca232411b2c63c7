"""Rewards that compare the completions of a prompt. The judge that does is in `judge`."""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from stateset_lightning.errors import RewardError
from stateset_lightning.rewards.base import Context, RewardFunction, Turns, options


class GroupReward(RewardFunction):
    """A reward that compares the completions of one prompt: subclass it and write `compute_rewards`.

    As `def` or `async def`. It is called once per prompt, when all completions of the episode are sampled and the other
    rewards have scored them; several prompts at a time. Where a prompt has one completion, as in greedy validation, it
    does not apply.
    """

    scores_several = True
    # Names of the rewards whose scores it reads; that there are such is checked at the start.
    reads: Collection[str] = ()

    @abstractmethod
    def compute_rewards(
        self, conversations_G: Sequence[Turns], context: Mapping[str, Any], scores: Mapping[str, Sequence[float | None]]
    ) -> Any:
        """Score the last turn of each of a prompt's G conversations.

        Args:
            conversations_G: They differ in their last turn alone, the completion.
            context: All columns of the scenario, and `completion_tokens`, the G numbers of tokens.
            scores: What the other rewards said, G scores by name: NaN after a failure, None where one does not apply.
                Group rewards are not among them.

        Returns:
            G items: what `compute_reward` may return, or an exception, which fails this completion alone. What is
            raised fails all G.
        """

    def compute_reward(self, turns: Turns, context: Context = None) -> Any:
        raise RewardError(f"reward '{self.name}' compares the completions of a prompt and scores none by itself")


@options
class RelativeLength(GroupReward):
    """Shorter is better among the right completions of a prompt: 0.5 for the shortest, -0.5 for the longest of them.

    Kimi k1.5's length reward (arXiv 2501.12599, section 2.3.3), 0.5 - (length - shortest) / (longest - shortest), in
    tokens. There the shortest and the longest are those of all completions, and wrong ones get min(0, reward). Here
    they are those of the right ones, and wrong ones get 0: a short wrong answer is no measure for a right one. All get
    0 where fewer than two are right, or all right ones have one length.

    Args:
        right_by: Name of the reward that says which completions are right.
        right_at: From which score on they are.
        **common: `weight`, `name` and `timeout` of every reward.

    Raises:
        ConfigError: If there is no such reward.
    """

    right_by: str
    right_at: float = 1.0

    def _set_up(self) -> None:
        self.reads = (self.right_by,)

    def compute_rewards(
        self, conversations_G: Sequence[Turns], context: Mapping[str, Any], scores: Mapping[str, Sequence[float | None]]
    ) -> list[float]:
        least = self.right_at - 1e-9  # weighted sums fall short of 1 by rounding
        right = [score is not None and score >= least for score in scores[self.right_by]]
        answers = list(zip(context["completion_tokens"], right, strict=True))
        lengths = [length for length, is_right in answers if is_right] or [0]
        shortest, spread = min(lengths), max(lengths) - min(lengths)
        return [0.5 - (length - shortest) / spread if is_right and spread else 0.0 for length, is_right in answers]
