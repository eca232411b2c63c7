"""The loss of a micro-batch, and the log-probs that stay fixed while an episode is trained on.

Letters: P prompts, G completions per prompt, N = P * G completions, T sampled tokens, F rewards.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from stateset_lightning.algorithm import GKD, Algorithm, TokenBatch
from stateset_lightning.algorithm.aggregation import per_token
from stateset_lightning.policy import AdapterReference, Group, Policy
from stateset_lightning.policy.routing import balance
from stateset_lightning.seeding import derive_seed
from stateset_lightning.training import metrics
from stateset_lightning.training.episode import Episode, MicroBatch, Plan, groups_of
from stateset_lightning.training.teacher import teacher_logprobs
from stateset_lightning.training.turns import TrainedScores
from stateset_lightning.types import Metrics, Rollout

if TYPE_CHECKING:
    from stateset_lightning.training.collect import Collection
    from stateset_lightning.training.step import TrainingStep

# Nats that log-probs and entropies are rounded to before tokens are selected by them, and the KL before it is a score.
#
# Far above float error (float32), which depends on what else is in the batch, and far below any difference that
# matters. So equal contexts are equal for every split and number of ranks, and a group of equal rewards stays constant
# while the policy is its reference: otherwise a standard deviation of float noise would be divided by, and make
# advantages of it.
ROUNDING = 1e-4


def micro_batch_loss(
    policy: Policy, algorithm: Algorithm, batch: MicroBatch, temperature: float, dropout_seed: int, step_tokens: int
) -> tuple[Tensor, Metrics]:
    """Sum over the batch's tokens of weight x per-token loss, and metrics as (sum, count).

    Args:
        policy: Scores the tokens, with dropout if it has any.
        algorithm: Makes a loss of them.
        batch: What the micro-step trains; nothing, perhaps.
        temperature: Divides the logits.
        dropout_seed: Of this micro-step.
        step_tokens: What its optimizer step trains, of all ranks.
    """
    if not batch.groups:
        return zero_loss(policy), {}
    policy.routed = 0
    with seeded_dropout(policy.device, dropout_seed) if policy.has_dropout else nullcontext():
        logprobs_T, entropies_T, *divergences_T = policy.score(batch.groups, temperature, batch.comparison)
    batch = batch.to(logprobs_T.device)
    names = {field.name for field in fields(TokenBatch)}
    given: dict[str, Any] = {name: value for name, value in vars(batch).items() if name in names}
    if batch.old_logprobs_T is None:
        # With one optimizer step per episode the old log-probs are the new ones: no pass is made for them.
        given["old_logprobs_T"] = logprobs_T.detach()
    given |= {"logprobs_T": logprobs_T, "entropies_T": entropies_T, "divergences_T": next(iter(divergences_T), None)}
    tokens = TokenBatch(**given)
    loss_T, sums = algorithm.per_token_loss(tokens)
    weights_T = per_token(batch.weights_N.to(loss_T.dtype), tokens.lengths_N, len(loss_T))
    loss = (weights_T * loss_T).sum()
    sums |= metrics.of_tokens(logprobs_T.detach(), batch.sampling_logprobs_T, entropies_T.detach())
    if batch.experts_per_token_E is not None:
        router_loss = balance(policy.routed[0], batch.experts_per_token_E)
        loss = loss + policy.config.router_aux_loss / step_tokens * router_loss
        sums["train/router_aux_loss"] = (router_loss.detach(), len(logprobs_T))
    return loss, sums


def zero_loss(policy: Policy) -> Tensor:
    """Zero, but a function of every parameter: each rank must take part in every reduction, and in every unsharding."""
    if isinstance(policy, FSDPModule):
        return policy.score([Group([0], [[0]])])[0].sum() * 0.0
    return torch.stack([p.flatten()[0] for p in policy.parameters() if p.requires_grad]).sum() * 0.0


def nan_if_not_finite(loss: Tensor) -> Tensor:
    """The loss, times NaN if it is not finite: its gradient could be finite, and only gradients reach the other
    ranks.
    """
    return loss * torch.where(loss.detach().isfinite(), loss.new_ones(()), loss.new_full((), torch.nan))


@contextmanager
def seeded_dropout(device: torch.device, seed: int) -> Iterator[None]:
    """Dropout draws from the global generator: a seeded fork of it resumes exactly and leaves it untouched."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


# Log-probs that stay fixed --------------------------------------------------------------------------------------------


def trained_scores(step: "TrainingStep", collection: "Collection") -> TrainedScores:
    """The scores of an episode that are trained on.

    A held-out reward, of weight 0, is shown and never trained on: where it fails, 0 x NaN would fail the completion.
    """
    algorithm, weights = step.algorithm, [reward.weight for reward in step.sampler.scorer.rewards]
    columns = [f for f, weight in enumerate(weights) if weight]
    weights = [weights[f] for f in columns]
    scores, rollout = collection.sample.scores, collection.sample.rollout
    names = tuple(scores.names[f] for f in columns)
    scores = replace(scores, names=names, values_NF=scores.values_NF[:, columns])
    baseline_PF = None if collection.baseline is None else collection.baseline.scores.values_NF[:, columns]
    if not algorithm.kl_in_reward:
        return TrainedScores(scores, weights, baseline_PF)
    assert step.reference is not None
    # Both from the same kind of pass: a sampler of lower precision would add noise, of which a constant group makes
    # advantages.
    models, temperature = (step.sampled_policy, step.reference), step.sampler.config.temperature
    logprobs_T, ref_logprobs_T = (all_logprobs(model, rollout, temperature) for model in models)
    kl_N = _rounded(algorithm.kl_scores(logprobs_T, ref_logprobs_T, rollout.lengths_N).to(scores.values_NF))
    # Where no reward applies, the KL must not be what makes the completion scored.
    kl_N = kl_N.where(scores.totals_N.isfinite(), torch.nan)
    scores = replace(scores, names=(*names, "kl"), values_NF=torch.cat([scores.values_NF, kl_N[:, None]], dim=1))
    return TrainedScores(scores, [*weights, -algorithm.kl_coefficient], baseline_PF, logprobs_T, ref_logprobs_T)


def all_logprobs(policy: Policy | AdapterReference, rollout: Rollout, temperature: float) -> Tensor:
    """Log-probs of all tokens of a rollout, float32 [T] on the CPU; 0 for those that were not sampled."""
    lengths = rollout.lengths_N.tolist()
    completions, sampled = (values.cpu().split(lengths) for values in (rollout.completion_tokens_T, rollout.sampled_T))
    rows = [n for n, length in enumerate(lengths) if length]  # an engine may return an empty one
    mask = None if rollout.sampling_mask is None else rollout.sampling_mask[rollout.sampled_T]
    groups = groups_of(rollout.prompt_tokens, completions, rows, sampled, mask)
    all_T = torch.zeros(len(rollout.completion_tokens_T), dtype=torch.float32)  # the default dtype may be bfloat16
    all_T[rollout.sampled_T] = policy.score_without_gradient(groups, temperature)[0].cpu()
    return all_T


def add_fixed_logprobs(step: "TrainingStep", episode: Episode, scored: TrainedScores, plan: Plan, *, old: bool) -> None:
    """Fills in the reference's and the teacher's log-probs, the old ones and the selected tokens, as they are needed.

    Args:
        step: Its policy is as it was when it sampled.
        episode: Gets them.
        scored: Log-probs that were needed for the scores already.
        plan: The episode's.
        old: Whether the loss needs old log-probs. With a single optimizer step they are the new ones, and no pass is
            made for them.
    """
    algorithm, temperature = step.algorithm, step.sampler.config.temperature
    episode.ref_logprobs_T = scored.ref_logprobs_T
    episode.old_logprobs_T = scored.logprobs_T if old else None
    groups = episode.active_batch().groups
    if step.reference is not None and episode.ref_logprobs_T is None:
        episode.ref_logprobs_T = episode.scatter(step.reference.score_without_gradient(groups, temperature)[0])
    if step.teacher is not None and not isinstance(algorithm, GKD):
        episode.teacher_logprobs_T = episode.scatter(teacher_logprobs(step.teacher, groups, temperature))
    balances = step.policy.config.router_aux_loss > 0 and any(episode.active_by_step)
    if not (algorithm.selects_tokens or balances) and (not old or episode.old_logprobs_T is not None):
        return
    rows_N = counted(episode, plan) if algorithm.selects_tokens else episode.active_N
    groups = episode.batch_of(rows_N).groups if algorithm.selects_tokens else groups
    step.sampled_policy.routed = 0
    logprobs_T, entropies_T = step.sampled_policy.score_without_gradient(groups, temperature)
    if old or algorithm.selects_tokens:
        episode.old_logprobs_T = episode.scatter(logprobs_T, rows_N)
    if balances:  # over the episode, so that the loss is linear in its tokens, however they are divided
        chosen: list[Any] = step.ranks.gather(step.sampled_policy.routed[1].cpu() if groups else 0)
        episode.experts_per_token_E = sum(chosen) / sum(step.ranks.gather(len(logprobs_T)))
    if algorithm.selects_tokens:
        assert episode.old_logprobs_T is not None
        scattered = episode.old_logprobs_T, episode.scatter(entropies_T, rows_N)
        episode.select_T = selected_tokens(episode, *scattered, algorithm, plan, step.sampler.seed)


def counted(episode: Episode, plan: Plan) -> Tensor:
    """What a selection sees: the completions that count in an optimizer step's loss, if any of them trains; bool [N].

    Those with an advantage of zero are among them.
    """
    step_trains = torch.tensor(episode.active_by_step) > 0
    return (episode.weights_N > 0) & step_trains[episode.micro_step_N // plan.accumulate]


def selected_tokens(
    episode: Episode, logprobs_T: Tensor, entropies_T: Tensor, algorithm: Algorithm, plan: Plan, seed: int
) -> Tensor:
    """`algorithm.select` for each optimizer step of a pass, on `counted` completions of all ranks in global order.

    The result, bool [T] over all tokens, is the same for every split into micro-steps and every number of ranks. Tokens
    of other completions, and those that were not sampled, are False.
    """
    ranks, size, lengths = plan.ranks, episode.num_generations, episode.lengths_N.tolist()
    n = torch.arange(len(lengths))
    position_N = (n // size * ranks.world + ranks.rank) * size + n % size  # of a completion among those of all ranks
    positions_N, steps_N = position_N.tolist(), (episode.micro_step_N // plan.accumulate).tolist()
    advantages = episode.advantages_N.tolist()
    rows_N = counted(episode, plan)
    rows = [int(i) for i in rows_N.nonzero()]
    sampled = episode.sampled_tokens_of(rows_N).split(lengths)
    own_T = per_token(episode.advantages_N, episode.lengths_N) if episode.advantages_T is None else episode.advantages_T
    of_tokens = [values_T.split(lengths) for values_T in (logprobs_T, entropies_T, own_T)]
    mine = {positions_N[i]: (steps_N[i], advantages[i], *(values[i][sampled[i]] for values in of_tokens)) for i in rows}
    everyone = {position: values for of_rank in ranks.gather(mine) for position, values in of_rank.items()}

    chosen: dict[int, Tensor] = {}
    for step in range(plan.optimizer_steps):
        positions = sorted(position for position, values in everyone.items() if values[0] == step)
        if positions:
            of_rows, logprobs, entropies, own = zip(*(everyone[position][1:] for position in positions), strict=True)
            old_T, entropy_T = (_rounded(torch.cat(values)) for values in (logprobs, entropies))
            lengths_N = torch.tensor([len(values) for values in logprobs])
            advantages_N = torch.tensor(of_rows, dtype=torch.float32)
            given = {"entropies_T": entropy_T, "advantages_T": torch.cat(own)}
            tokens = TokenBatch(old_T, old_T, advantages_N, lengths_N, **given)
            kept_T = algorithm.select(tokens, derive_seed(seed, "select", episode.index, step))
            chosen.update(zip(positions, kept_T.cpu().split(tokens.lengths_N.tolist()), strict=True))
    select_T = torch.zeros(len(logprobs_T), dtype=torch.bool)
    views = select_T.split(lengths)
    for i in rows:
        views[i][sampled[i]] = chosen[positions_N[i]]
    return select_T


def _rounded(nats: Tensor) -> Tensor:
    return torch.round(nats / ROUNDING) * ROUNDING
