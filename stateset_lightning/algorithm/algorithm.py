"""What every algorithm shares, and how a preset is made.

An algorithm is an advantage, a policy loss, an aggregation and further terms. It sees packed tensors and knows nothing
of models, prompts or Lightning. Letters: P prompts, G completions per prompt, N completions, T sampled tokens, F
rewards.

No `from __future__ import annotations`: the command line reads the types of the options.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, dataclass_transform

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from stateset_lightning.algorithm import terms
from stateset_lightning.algorithm.advantages import Scale, group_advantages, total_scores
from stateset_lightning.algorithm.aggregation import Aggregation, per_token, sequence_sums, token_weights
from stateset_lightning.algorithm.losses import advantages_of, policy_gradient_loss
from stateset_lightning.algorithm.terms import KL, AdaptiveEntropy, Mismatch, needed
from stateset_lightning.errors import ConfigError, bounded, log
from stateset_lightning.types import Metrics, TokenBatch


def fixed(value: Any) -> Any:
    """An option of the base class that this preset's formulas contradict or do not read: it cannot be set."""
    return field(default=value, init=False)


AdvantageFormula = Callable[..., Tensor]
LossFormula = Callable[..., tuple[Tensor, Metrics]]


@dataclass_transform(kw_only_default=True, eq_default=False)
class Formulas:
    """The two formulas of an algorithm, functions that get each of their parameters by its name; and its options.

    A parameter is a quantity (`advantages` and `policy_loss` say which there are) or an option of the algorithm. So an
    option is read by the formula that names it. A subclass names its formulas behind its base:
    `class Mine(Algorithm, advantage=..., loss=...)`.

    As in a dataclass, annotated attributes of a subclass are its options, unless somebody wrote its constructor:
    keyword arguments that are held against the bounds of their annotations. An inherited option that is assigned again
    has a new default; assigned `fixed(value)`, it is no longer an option.

    A class of its own, and no dataclass: of a class that is a dataclass throughout, jsonargparse takes no subclass.
    """

    advantage_formula: ClassVar[AdvantageFormula] = staticmethod(group_advantages)
    loss_formula: ClassVar[LossFormula] = staticmethod(policy_gradient_loss)

    def __init_subclass__(cls, advantage: AdvantageFormula | None = None, loss: LossFormula | None = None) -> None:
        """A subclass as data.

        Args:
            advantage: How scores become advantages; None for the base class's. One that does not name `scale`, by which
                the base class's divides, fixes it to "none".
            loss: The policy loss; None for the base class's.
        """
        if advantage is not None:
            cls.advantage_formula = staticmethod(advantage)
            if "scale" not in inspect.signature(advantage).parameters:
                cls.scale = fixed("none")  # type: ignore[attr-defined]
        if loss is not None:
            cls.loss_formula = staticmethod(loss)
        constructed_by = next(base for base in cls.__mro__ if "__init__" in vars(base))
        if constructed_by is object or "__dataclass_fields__" in vars(constructed_by):  # nobody wrote it
            inherited = getattr(cls, "__dataclass_fields__", {})
            for name in inherited.keys() & vars(cls).keys():
                cls.__annotations__.setdefault(name, inherited[name].type)
            bounded("model.algorithm")(dataclass(kw_only=True, eq=False)(cls))


class Algorithm(Formulas):
    """Plain policy gradient on group-relative advantages, with the terms and corrections that all algorithms share.

    Args:
        beta: Coefficient of the KL divergence from the reference policy. 0 means that no reference exists.
        kl: How that divergence is estimated, and where it enters; see `KL`.
        entropy_coefficient: Coefficient of an entropy bonus, the start of an adaptive one. 0 for none.
        adaptive_entropy: Moves the entropy coefficient; see `AdaptiveEntropy`. None keeps it fixed.
        top_entropy: Train this share of the tokens alone, those of the highest entropy (arXiv:2506.01939); None for
            all.
        mismatch: Correction for a sampler whose log-probs differ from the trainer's; see `Mismatch`. None: truncated
            importance sampling where another process samples, else nothing.
        off_policy_threshold: Leave a completion with a negative advantage out of the policy loss when its tokens'
            log-probs have fallen by more than this on average since they were sampled (DeepSeek-V3.2,
            arXiv:2512.02556); None for never.
        positive_coefficient: Coefficient of the mean negative log-likelihood of right completions, those with a total
            reward above 0, aggregated as the loss is (VAPO, arXiv:2504.05118: 0.1, over tokens). 0 for none.
        scale: What centred rewards are divided by: the standard deviation of the group, that of the whole batch, or
            nothing. `leave_one_out` takes mean and deviation of the group's other completions.
        advantage_clip: Advantages are held within plus and minus this (ROLL has 2); None for no bound.
        aggregation: How per-token losses are averaged; see `stateset_lightning.algorithm.aggregation`.
        constant_length: Divisor of aggregation "constant_length"; None for the rollout's `max_new_tokens`.
        mask_truncated: Leave completions that were cut at `max_new_tokens` out of the loss (and out of its normaliser).
    """

    beta: Annotated[float, Ge(0)] = 0.0
    kl: KL = KL()
    entropy_coefficient: Annotated[float, Ge(0)] = 0.0
    adaptive_entropy: AdaptiveEntropy | None = None
    top_entropy: Annotated[float, Gt(0), Lt(1)] | None = None
    mismatch: Mismatch | None = None
    off_policy_threshold: Annotated[float, Gt(0)] | None = None
    positive_coefficient: Annotated[float, Ge(0)] = 0.0
    scale: Scale = "group"
    advantage_clip: Annotated[float, Gt(0)] | None = None
    aggregation: Aggregation = "sequence_mean"
    constant_length: Annotated[int, Ge(1)] | None = None
    mask_truncated: bool = False

    # What a preset says of itself: whether it trains on the scenarios' targets, and not on samples; whether groups of
    # equal rewards, which dynamic sampling replaces, teach it something; whether `advantages` compares with the scores
    # of a greedy completion per prompt; whether the loss weighs whole completions, which a mismatch correction of
    # single tokens contradicts; why the KL cannot be part of the reward, empty where it can; and whether a teacher
    # scores the samples.
    trains_on_targets: ClassVar[bool] = False
    learns_from_equal_rewards: ClassVar[bool] = False
    needs_greedy_baseline: ClassVar[bool] = False
    weighs_completions: ClassVar[bool] = False
    why_no_kl_in_reward: ClassVar[str] = ""
    needs_teacher: ClassVar[bool] = False

    def __post_init__(self) -> None:
        name, kind = type(self).__name__, None if self.mismatch is None else self.mismatch.kind
        problems = {
            f"constant_length={self.constant_length} has no effect with aggregation={self.aggregation!r}: remove it, or"
            " set aggregation to 'constant_length'": self.constant_length and self.aggregation != "constant_length",
            f"kl.target={self.kl.target} has no effect with beta=0: set beta, where the adaptive coefficient starts, or"
            " remove the target": self.kl.target is not None and self.beta == 0,
            f"kl.place='reward' does not go with {name}: {self.why_no_kl_in_reward}; use kl.place='loss'": (
                self.why_no_kl_in_reward and self.kl.place == "reward"
            ),
            f"mismatch.kind={kind!r} weighs single tokens, and {name}'s ratio is of whole completions: choose"
            " sequence_tis, sequence_mask or product_mask": self.weighs_completions and kind in ("token_tis", "icepop"),
        }
        for problem in (problem for problem, is_there in problems.items() if is_there):
            raise ConfigError(f"model.algorithm.{problem}")
        self.kl_coefficient = self.beta
        # In force now: an adaptive one has measured no entropy yet.
        self.entropy_bonus = self.entropy_coefficient if self.adaptive_entropy is None else 0.0

    def setup(self, max_new_tokens: int, samples_elsewhere: bool = False) -> None:
        """Fills in what follows from the rollout; called once, before training."""
        if samples_elsewhere and self.mismatch is None:
            self.mismatch = Mismatch("sequence_tis" if self.weighs_completions else "token_tis")
            log.info("model.algorithm.mismatch: %s, since another process samples (kind: none for none)", self.mismatch)
        if self.aggregation == "constant_length" and self.constant_length is None:
            self.constant_length = max_new_tokens

    def advantages(
        self, scores_PGF: Tensor, weights_F: Tensor, lengths_PG: Tensor | None = None, baseline_PF: Tensor | None = None
    ) -> Tensor:
        """Advantages of the completions of all ranks, float64 [P, G]; NaN for failed completions and dropped groups.

        The formula may also name `rewards_PG`, the weighted sums of the scores, and `baseline_P`, those of the greedy
        completions.

        Args:
            scores_PGF: Scores by reward; NaN = failed, `NOT_APPLICABLE` = left out of the sum.
            weights_F: Weights of the rewards.
            lengths_PG: Sampled tokens of each completion, for algorithms that weigh by length.
            baseline_PF: Scores of a greedy completion per prompt, for algorithms that compare with it.
        """
        given = {"scores_PGF": scores_PGF, "weights_F": weights_F, "lengths_PG": lengths_PG}
        given["rewards_PG"] = total_scores(scores_PGF, weights_F)
        if baseline_PF is not None:
            # The KL may be one more score, the last one; greedy completions do not have it.
            given["baseline_P"] = total_scores(baseline_PF, weights_F[: baseline_PF.shape[-1]])
        found_PG = self._evaluate(self.advantage_formula, given)
        return found_PG if self.advantage_clip is None else found_PG.clamp(-self.advantage_clip, self.advantage_clip)

    def policy_loss(self, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        """The advantage's part of each token's loss, [T], and metrics as (sum, count)."""
        return self._evaluate(self.loss_formula, {"tokens": tokens})

    def _evaluate(self, formula: Callable[..., Any], given: Mapping[str, Any]) -> Any:
        names = inspect.signature(formula).parameters
        return formula(**{name: given[name] if name in given else getattr(self, name) for name in names})

    # What the training side has to provide

    @property
    def needs_reference(self) -> bool:
        """Whether the loss or the reward needs the reference policy's log-probs."""
        return self.beta > 0

    @property
    def kl_in_reward(self) -> bool:
        """Whether `kl_scores` are one more score of every completion, with weight -kl_coefficient."""
        return self.beta > 0 and self.kl.place == "reward"

    @property
    def selects_tokens(self) -> bool:
        """Whether `select` is to be called, once per optimizer step."""
        return self.top_entropy is not None

    @property
    def trains_on_rewards(self) -> bool:
        """Whether anything that rewards say is trained on; if not, their failures stop no run."""
        return not self.trains_on_targets

    @property
    def trains_on_zero_advantage(self) -> bool:
        """Whether completions with an advantage of zero train too, by a term of the loss that does not depend on it."""
        kl_in_loss = self.beta > 0 and self.kl.place == "loss"
        return kl_in_loss or self._has_entropy_bonus or self.positive_coefficient > 0

    @property
    def _has_entropy_bonus(self) -> bool:
        return self.entropy_coefficient > 0 or self.adaptive_entropy is not None

    def kl_scores(self, logprobs_T: Tensor, ref_logprobs_T: Tensor, lengths_N: Tensor) -> Tensor:
        """The KL estimate summed over each completion's tokens, nats, [N]: a score with weight -kl_coefficient."""
        return sequence_sums(terms.kl_estimate(self.kl.estimator, logprobs_T, ref_logprobs_T).detach(), lengths_N)

    # From tokens to a loss

    def select(self, tokens: TokenBatch, seed: int) -> Tensor:
        """Which tokens the policy loss treats as usual, bool [T]; called before an optimizer step's first backward.

        Args:
            tokens: All completions of the optimizer step that train, of all ranks, with what the policy that sampled
                them says of them.
            seed: For selections that draw.
        """
        assert self.top_entropy is not None
        return terms.top_entropy_tokens(needed(tokens, "entropies_T", "top_entropy"), self.top_entropy)

    advantages_per_token = staticmethod(advantages_of)

    def per_token_loss(self, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        """Loss of each token, [T], and metrics as (sum, count). Not yet weighted: see `token_weights`.

        The policy loss, less what selection and off-policy mask leave out, times the mismatch weights; plus the KL
        term, minus the entropy bonus and the log-likelihood of right completions. The last three act on every token.
        """
        loss_T, metrics = self.policy_loss(tokens)
        if self.top_entropy is not None:
            loss_T = torch.where(needed(tokens, "select_T", "top_entropy"), loss_T, 0.0)
        if self.off_policy_threshold is not None:
            keep_N = terms.on_policy(tokens, self.off_policy_threshold)
            loss_T = torch.where(per_token(keep_N, tokens.lengths_N, len(loss_T)), loss_T, 0.0)
            metrics["policy/off_policy"] = ((~keep_N).sum(), keep_N.numel())
        metrics |= terms.mismatch_metrics(tokens)
        if self.mismatch is not None and self.mismatch.kind != "none":
            needed(tokens, "sampling_logprobs_T", "mismatch")
            weights_T = terms.mismatch_weights(tokens, self.mismatch)
            metrics["mismatch/masked"] = ((weights_T == 0).sum(), weights_T.numel())
            loss_T = weights_T.to(loss_T.dtype) * loss_T
        if self.beta > 0:
            ref_T = needed(tokens, "ref_logprobs_T", f"beta={self.beta}")
            kl_T = terms.kl_estimate(self.kl.estimator, tokens.logprobs_T, ref_T, tokens.old_logprobs_T)
            metrics["policy/kl"] = (kl_T.detach().sum(), kl_T.numel())
            if self.kl.place == "loss":
                loss_T = loss_T + self.kl_coefficient * kl_T
        if self._has_entropy_bonus:
            entropies_T = needed(tokens, "entropies_T", "entropy_coefficient")
            metrics["policy/entropy"] = (entropies_T.detach().sum(), entropies_T.numel())
            loss_T = loss_T - self.entropy_bonus * entropies_T
        if self.positive_coefficient > 0:
            right_N = needed(tokens, "right_N", "positive_coefficient").to(loss_T.dtype)
            likelihood_T = per_token(right_N, tokens.lengths_N, len(loss_T)) * tokens.logprobs_T
            loss_T = loss_T - self.positive_coefficient * likelihood_T
        return loss_T, metrics

    def token_weights(self, lengths_N: Tensor, groups_N: Tensor, trains_N: Tensor | None = None) -> Tensor:
        """Weight of each token of a completion, float64 [N]; called once per optimizer step on all its completions.

        Args:
            lengths_N: Sampled tokens of each completion of the optimizer step, of all ranks and micro-steps.
            groups_N: Which prompt each completion answers.
            trains_N: Which completions train; None for all.
        """
        trains_N = torch.ones_like(lengths_N, dtype=torch.bool) if trains_N is None else trains_N
        return token_weights(lengths_N, groups_N, trains_N, self.aggregation, self.constant_length)

    # Adaptive coefficients

    def adapt(self, metrics: Mapping[str, float]) -> None:
        """Moves adaptive coefficients; called after each optimizer step with the means of its metrics, of all ranks."""
        if self.kl.target is not None:
            self.kl_coefficient = self.kl.adapted(self.kl_coefficient, metrics["policy/kl"])
        if self.adaptive_entropy is not None:
            entropy = metrics["policy/entropy"]
            self.entropy_coefficient = self.adaptive_entropy.adapted(self.entropy_coefficient, entropy)
            self.entropy_bonus = self.entropy_coefficient if entropy <= self.adaptive_entropy.target else 0.0

    def state_dict(self) -> dict[str, float]:
        """Adaptive coefficients, as plain floats; empty for an algorithm without any."""
        state = {} if self.kl.target is None else {"kl_coefficient": self.kl_coefficient}
        if self.adaptive_entropy is not None:
            state |= {"entropy_coefficient": self.entropy_coefficient, "entropy_bonus": self.entropy_bonus}
        return state

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes over a checkpoint's adaptive coefficients; ConfigError for one that this algorithm does not adapt."""
        if unknown := sorted(set(state) - set(self.state_dict())):
            held = f"the checkpoint holds the adaptive {', '.join(unknown)}"
            raise ConfigError(f"{held}, and {type(self).__name__} is not set to adapt them: resume as it was started")
        vars(self).update(state)
