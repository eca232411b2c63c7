"""A part of an episode -> its loss: scores the tokens, asks the algorithm, and adds up by the one reduction rule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from stateset_lightning.algorithm import Algorithm, TokenBatch
from stateset_lightning.algorithm.aggregation import per_token
from stateset_lightning.policy import AdapterReference, Group, Policy
from stateset_lightning.seeding import derive_seed
from stateset_lightning.training.episode import Episode, Part, Plan
from stateset_lightning.types import Metrics, Rollout, Scores


def zero_loss(policy: Policy) -> Tensor:
    """Zero, but a function of every parameter: each rank must take part in every reduction, and in every gathering of
    shards.
    """
    if isinstance(policy, FSDPModule):
        return policy.score([Group([0], [[0]])])[0].sum() * 0.0
    return torch.stack([p.flatten()[0] for p in policy.parameters() if p.requires_grad]).sum() * 0.0


@contextmanager
def seeded_dropout(device: torch.device, seed: int | None) -> Iterator[None]:
    """Dropout draws from the global generator: a seeded fork of it resumes exactly and leaves it untouched. None: no
    dropout.
    """
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def part_loss(policy: Policy, algorithm: Algorithm, part: Part, temperature: float) -> tuple[Tensor, Metrics]:
    """Sum over the part's tokens of weight x per-token loss, and metrics as (sum, count)."""
    logprobs_T, entropies_T = policy.score(part.groups, temperature)
    device = logprobs_T.device

    def here(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.to(device)

    tokens = TokenBatch(
        logprobs_T=logprobs_T,
        # With one optimizer step per episode the old log-probs are the new ones: no pass is made for them.
        old_logprobs_T=logprobs_T.detach() if part.old_logprobs_T is None else part.old_logprobs_T.to(device),
        advantages_N=part.advantages_N.to(device),
        lengths_N=part.lengths_N.to(device),
        ref_logprobs_T=here(part.ref_logprobs_T),
        sampling_logprobs_T=here(part.sampling_logprobs_T),
        entropies_T=entropies_T,
        select_T=here(part.select_T),
    )
    loss_T, metrics = algorithm.per_token_loss(tokens)
    difference_T = (logprobs_T.detach() - part.sampling_logprobs_T.to(device)).abs()
    metrics["policy/entropy"] = (entropies_T.detach().sum(), entropies_T.numel())
    metrics["policy/sampling_difference"] = (difference_T.sum(), difference_T.numel())
    weights_T = per_token(part.weights_N.to(device, loss_T.dtype), tokens.lengths_N)
    return (weights_T * loss_T).sum(), metrics


# MERGED: What stays fixed while an episode is trained on: log-probs of the policy that sampled and of the reference, and the
# selected tokens.
#

ROUNDING = 1e-4
"""Nats that log-probs and entropies are rounded to before tokens are selected by them, and the KL before it is a score.

Far above float error (float32), which depends on what else is in the batch, and far below any difference that matters.
Equal contexts are so equal for every split and number of ranks, and a group of equal rewards stays constant while the
policy is its reference: a standard deviation of float noise would be divided by, and make advantages of it.
"""


def with_kl_scores(
    scores: Scores, rollout: Rollout, algorithm: Algorithm, logprobs_T: Tensor, ref_logprobs_T: Tensor
) -> Scores:
    """The scores with a further column "kl": the KL estimate summed over each completion, nats. `totals_N` stays the
    rewards'.

    It is NaN for a failed completion: where no reward applies, the column must not be what makes the completion scored.
    """
    kl_N = _rounded(algorithm.kl_scores(logprobs_T, ref_logprobs_T, rollout.lengths_N).to(scores.values_NF))
    kl_N = kl_N.where(scores.totals_N.isfinite(), torch.nan)
    return replace(scores, names=(*scores.names, "kl"), values_NF=torch.cat([scores.values_NF, kl_N[:, None]], dim=1))


def all_logprobs(policy: Policy | AdapterReference, rollout: Rollout, temperature: float) -> Tensor:
    """Log-probs of all completions of a rollout, float32 [T] on the CPU."""
    completions, size = rollout.completions(), rollout.num_generations
    groups = [
        # an engine may return an empty completion
        Group(prompt, [c for c in completions[p * size : (p + 1) * size] if c])
        for p, prompt in enumerate(rollout.prompt_tokens)
    ]
    return policy.score_without_gradient([group for group in groups if group.completions], temperature)[0].cpu()


def add_fixed_logprobs(
    episode: Episode,
    policy: Policy,
    reference: Policy | AdapterReference | None,
    algorithm: Algorithm,
    plan: Plan,
    temperature: float,
    seed: int,
    *,
    old: bool,
) -> None:
    """Fills in the reference's log-probs, the old ones and the selected tokens, as far as they are needed.

    Args:
        episode: Log-probs that it has already are kept.
        policy: As it was when it sampled.
        reference: None where the algorithm has none.
        algorithm: Says whether tokens are selected.
        plan: The episode's.
        temperature: Divides the logits.
        seed: The run's.
        old: Whether the loss needs old log-probs. With a single optimizer step they are the new ones, and no pass is
            made.
    """
    groups = episode.active_part().groups
    if reference is not None and episode.ref_logprobs_T is None:
        episode.ref_logprobs_T = episode.scatter(reference.score_without_gradient(groups, temperature)[0])
    if not algorithm.selects_tokens and (not old or episode.old_logprobs_T is not None):
        return
    logprobs, entropies = policy.score_without_gradient(groups, temperature)
    episode.old_logprobs_T = episode.scatter(logprobs)
    if algorithm.selects_tokens:
        episode.select_T = selected_tokens(
            episode, episode.old_logprobs_T, episode.scatter(entropies), algorithm, plan, seed
        )


def selected_tokens(
    episode: Episode, logprobs_T: Tensor, entropies_T: Tensor, algorithm: Algorithm, plan: Plan, seed: int
) -> Tensor:
    """`algorithm.select` for each optimizer step of a pass, on the active completions of all ranks in global order;
    bool [T].

    The result is the same for every split into micro-steps and every number of ranks. Tokens of other completions are
    False.
    """
    ranks, size = plan.ranks, episode.num_generations
    n = torch.arange(len(episode.lengths_N))
    position_N = (n // size * ranks.world + ranks.rank) * size + n % size  # of a completion among those of all ranks
    step_N = episode.micro_step_N // plan.accumulate
    rows = [int(i) for i in episode.active_N.nonzero()]
    parts = [values_T.split(episode.lengths_N.tolist()) for values_T in (logprobs_T, entropies_T)]
    mine = {
        int(position_N[i]): (int(step_N[i]), float(episode.advantages_N[i]), parts[0][i], parts[1][i]) for i in rows
    }
    everyone = {position: values for of_rank in ranks.gather(mine) for position, values in of_rank.items()}

    chosen: dict[int, Tensor] = {}
    for step in range(plan.optimizer_steps):
        positions = sorted(position for position, values in everyone.items() if values[0] == step)
        if positions:
            tokens = _token_batch([everyone[position][1:] for position in positions])
            kept_T = algorithm.select(tokens, derive_seed(seed, "select", episode.index, step))
            chosen.update(zip(positions, kept_T.cpu().split(tokens.lengths_N.tolist()), strict=True))
    select_T = torch.zeros(len(logprobs_T), dtype=torch.bool)
    views = select_T.split(episode.lengths_N.tolist())
    for i in rows:
        views[i].copy_(chosen[int(position_N[i])])
    return select_T


def _rounded(nats: Tensor) -> Tensor:
    return torch.round(nats / ROUNDING) * ROUNDING


def _token_batch(completions: list[tuple[float, Tensor, Tensor]]) -> TokenBatch:
    advantages, logprobs, entropies = zip(*completions, strict=True)
    logprobs_T, entropies_T = (_rounded(torch.cat(values)) for values in (logprobs, entropies))
    return TokenBatch(
        logprobs_T=logprobs_T,
        old_logprobs_T=logprobs_T,
        advantages_N=torch.tensor(advantages),
        lengths_N=torch.tensor([len(values) for values in logprobs]),
        entropies_T=entropies_T,
    )
