"""Distillation on the student's own samples: a teacher says of each sampled token what it would rather have seen.

The two forms differ in what they ask of the teacher. `OnPolicyDistillation` needs its log-prob of the token that was
sampled, which is an advantage; `GKD` its whole distribution, from which the policy's diverges. Both take a reward along
by weight. The teacher is `model.teacher`. Letters: P prompts, G completions per prompt, T sampled tokens, V vocabulary.

No `from __future__ import annotations`: the command line reads the types of the options.
"""

import math
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from stateset_lightning.algorithm.advantages import Scale, group_advantages
from stateset_lightning.algorithm.aggregation import token_advantages
from stateset_lightning.algorithm.algorithm import Algorithm, fixed
from stateset_lightning.algorithm.losses import importance_loss
from stateset_lightning.algorithm.terms import log_ratio, needed
from stateset_lightning.types import Metrics, TokenBatch


def weighed_advantages(rewards_PG: Tensor, scale: Scale, reward_weight: float) -> Tensor:
    """GRPO's advantages times a weight, float64 [P, G].

    With a weight of 0 they are 0, also of completions whose reward failed and of groups with nothing to compare: such a
    reward is shown and not trained on.
    """
    if reward_weight == 0:
        return torch.zeros_like(rewards_PG, dtype=torch.float64)
    return reward_weight * group_advantages(rewards_PG, scale)


def divergence_loss(tokens: TokenBatch, coefficient: float) -> tuple[Tensor, Metrics]:
    """Of each token, [T]: coefficient x divergence from the teacher - ratio A.

    The gradient passes the policy's distribution at the token's place, not the choice of the tokens before it (GKD,
    arXiv:2306.13649, section 3).
    """
    loss_T, metrics = importance_loss(tokens)
    divergences_T = needed(tokens, "divergences_T", "class_path=GKD")
    metrics["policy/divergence"] = (divergences_T.detach().sum(), divergences_T.numel())
    return loss_T + coefficient * divergences_T, metrics


class Distillation(Algorithm, advantage=weighed_advantages, loss=importance_loss):
    """What both forms share: to be built on.

    Args:
        coefficient: Of what the teacher says.
        reward_weight: Of the reward's group-relative advantage. 0: the reward is shown, and not trained on.
    """

    coefficient: Annotated[float, Gt(0)] = 1.0
    reward_weight: Annotated[float, Ge(0)] = 0.0
    why_no_kl_in_reward = "its reward may have no weight"
    off_policy_threshold = fixed(None)
    advantage_clip = fixed(None)
    needs_teacher: ClassVar[bool] = True
    trains_on_zero_advantage: ClassVar[bool] = True  # the teacher has something to say of every token
    learns_from_equal_rewards: ClassVar[bool] = True

    @property
    def trains_on_rewards(self) -> bool:
        return self.reward_weight > 0 or self.positive_coefficient > 0


class OnPolicyDistillation(Distillation):
    """The sampled token's reverse KL as its advantage: coefficient x (log teacher - log policy that sampled).

    Its policy gradient is that of KL(policy || teacher) at each place, the tokens before it as they are: GKD's with
    reverse KL (arXiv:2306.13649) from a sample, and the single-step part of MiniLLM's (arXiv:2306.08543, section 2.2).
    The loss, ratio x advantage without a clip and without rewards of later tokens, is that of Thinking Machines Lab
    ("On-Policy Distillation", 2025). The tokens of the batch are averaged. Of the teacher one log-prob per token is
    needed, so it may be a server. Their difference is bounded at 20 nats (`LARGEST_LOG_RATIO`), and 0 for a token whose
    log-prob the server does not know.
    """

    aggregation = "token_mean"

    def per_token_loss(self, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        teacher_T = needed(tokens, "teacher_logprobs_T", "class_path=OnPolicyDistillation")
        gaps_T, unknown_T = log_ratio(teacher_T, tokens.old_logprobs_T).nan_to_num(nan=0.0), teacher_T.isnan()
        advantages_T = token_advantages(tokens) + self.coefficient * gaps_T
        loss_T, metrics = super().per_token_loss(replace(tokens, advantages_T=advantages_T))
        metrics["policy/teacher_unknown"] = (unknown_T.sum(), unknown_T.numel())
        return loss_T, metrics | {"policy/teacher_kl": (-gaps_T.sum(), (~unknown_T).sum())}


class GKD(Distillation, loss=divergence_loss):
    """Generalised knowledge distillation on the student's samples (arXiv:2306.13649, with lambda 1).

    At each sampled place the divergence of the two distributions over the whole vocabulary, the policy's and the
    teacher's: far less noise than from the sampled token alone. A completion's places are averaged, then completions.
    With a reward it is the paper's "RL + on-policy GKD", with a group-relative advantage.

    Args:
        jsd_beta: The divergence: 0 is forward KL(teacher || policy), 1 reverse KL(policy || teacher), between them the
            generalised Jensen-Shannon divergence. The paper leaves it to the task; 0.5 is TRL's.
    """

    jsd_beta: Annotated[float, Ge(0), Le(1)] = 0.5

    def divergence(self, logps_TV: Tensor, teacher_TV: Tensor) -> tuple[Tensor, Tensor]:
        """The divergence at each place, [T] nats, and its gradient with respect to the policy's logits, [T, V].

        With q the teacher, p the policy and m = b q + (1 - b) p it is b KL(q || m) + (1 - b) KL(p || m), as in
        arXiv:2306.13649, section 2. That is 0 for b of 0 and 1, where the two KLs are meant: its limits, divided by b
        or by 1 - b.
        """
        b, p_TV, q_TV, gaps_TV = self.jsd_beta, logps_TV.exp(), teacher_TV.exp(), teacher_TV - logps_TV
        if b == 0:
            return (q_TV * gaps_TV).sum(-1), p_TV - q_TV
        # log m / p: of the gaps and not of m, so that nothing is left of equal distributions but zeros.
        mixture_TV = torch.logaddexp(gaps_TV + math.log(b), gaps_TV.new_full((), math.log1p(-b))) if b < 1 else gaps_TV
        own_T = -(p_TV * mixture_TV).sum(-1)  # KL(p || m), or KL(p || q)
        gradient_TV = -p_TV * (mixture_TV + own_T[..., None])
        if b == 1:
            return own_T, gradient_TV
        # The gradient of KL(q || m) cancels that of KL(p || m) through m.
        return b * (q_TV * (gaps_TV - mixture_TV)).sum(-1) + (1 - b) * own_T, (1 - b) * gradient_TV
