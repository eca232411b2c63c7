"""Each turn of a conversation has an advantage of its own: what follows it, compared with the same turn of others.

A turn's return is the sum of the environment's rewards from it on, discounted by turn, as in GiGPO (arXiv:2505.10978,
section 4.3). It is compared, as in MT-GRPO (arXiv:2505.11821), with the returns of the same turn of the group's other
conversations; GiGPO's groups of equal states need an environment that names its states. Other rewards are of the whole
conversation, and count the same for each of its turns. So the algorithm's advantage formula is evaluated once per turn,
over the conversations that have it, with the return in place of the environment's reward: for a single turn it is the
advantage of the conversation.

Letters: P prompts, G conversations of each, N = P * G, K turns of the longest conversation, F rewards, T tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stateset_lightning.algorithm import Algorithm
from stateset_lightning.ranks import Ranks
from stateset_lightning.rewards import EnvironmentReward, RewardFunction
from stateset_lightning.types import Metrics, Scores


@dataclass(frozen=True)
class TurnScores:
    """What advantages of this rank's turns are made of.

    Args:
        values_NKF: The conversation's scores, with the turn's return as the environment's; that is NaN where the
            conversation has no such turn.
        lengths_NK: Sampled tokens of each turn.
    """

    values_NKF: Tensor
    lengths_NK: Tensor

    def of_tokens(self, advantages_PGK: Tensor, sampled_T: Tensor) -> Tensor:
        """The advantage of each sampled token's turn, float32 [T]; 0 for an environment's tokens."""
        values = advantages_PGK.flatten().repeat_interleave(self.lengths_NK.flatten())
        return torch.zeros(len(sampled_T)).masked_scatter(sampled_T, values.float())


@dataclass(frozen=True)
class TrainedScores:
    """The scores that advantages are made of.

    Args:
        scores: Of the rewards that are trained on, and the KL as a last column "kl" where it is part of the reward.
        weights: Of these columns.
        baseline_PF: Scores of a greedy completion per prompt by the rewards alone, where the algorithm compares with
            it.
        logprobs_T: Of the policy that sampled, where they had to be computed.
        ref_logprobs_T: Of the reference, likewise.
        turns: Of the turns of conversations, where these have advantages of their own.
    """

    scores: Scores
    weights: list[float]
    baseline_PF: Tensor | None = None
    logprobs_T: Tensor | None = None
    ref_logprobs_T: Tensor | None = None
    turns: TurnScores | None = None


def turn_scores(
    scores: Scores, turns: Sequence[Sequence[tuple[int, float]]], rewards: Sequence[RewardFunction], ranks: Ranks
) -> TurnScores:
    """The scores of each turn; all ranks call it together.

    Args:
        scores: Of this rank's conversations, by the rewards that are trained on.
        turns: Sampled tokens and return of each turn of each conversation.
        rewards: Of the run.
        ranks: Of the run.
    """
    num_turns = max(ranks.gather(max(1, *map(len, turns))))
    padded = [[*of_one, *[(0, math.nan)] * (num_turns - len(of_one))] for of_one in turns]
    lengths_NK, returns_NK = torch.tensor(padded, dtype=torch.float64).unbind(-1)
    values_NKF = scores.values_NF[:, None].repeat(1, num_turns, 1)
    for reward in rewards:
        if isinstance(reward, EnvironmentReward) and reward.name in scores.names:
            column_NK = values_NKF[..., scores.names.index(reward.name)]
            column_NK.copy_(returns_NK.where(column_NK.isfinite(), column_NK))  # else failed, or does not apply
    return TurnScores(values_NKF, lengths_NK.long())


def turn_advantages(
    turns: TurnScores, algorithm: Algorithm, weights_F: Tensor, lengths_PG: Tensor, advantages_PG: Tensor, ranks: Ranks
) -> Tensor:
    """Advantages of the turns of all ranks, float64 [P, G, K]; all ranks call it together.

    NaN where the conversation has failed. 0 of a turn that it has not, and of one with nothing to compare with, since
    no other conversation of its group has it.

    Args:
        turns: Of this rank.
        algorithm: Whose formula it is.
        weights_F: Of the rewards.
        lengths_PG: Sampled tokens of each conversation.
        advantages_PG: Of the conversations.
        ranks: Of the run.
    """
    scores_PGKF = ranks.by_position(turns.values_NKF.unflatten(0, (-1, lengths_PG.shape[1])))
    of_turns = [algorithm.advantages(scores_PGF, weights_F, lengths_PG) for scores_PGF in scores_PGKF.unbind(2)]
    return torch.stack(of_turns, -1).nan_to_num(nan=0.0).where(advantages_PG.isfinite()[..., None], torch.nan)


def score_by_turns(totals_N: Tensor, turns: Sequence[Sequence[object]]) -> Metrics:
    """Mean total reward by the number of turns, of conversations that have a score; nothing where there are none."""
    by_turns: dict[int, list[float]] = {}
    for of_one, total in zip(turns, totals_N.tolist(), strict=False):
        if math.isfinite(total):
            by_turns.setdefault(len(of_one), []).append(total)
    return {f"conversation/score_by_turns/{n}": (sum(totals), len(totals)) for n, totals in sorted(by_turns.items())}
