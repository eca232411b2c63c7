"""A part of an episode -> its loss: scores the tokens, asks the algorithm, and adds up by the one reduction rule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from stateset_lightning.algorithm import Algorithm, TokenBatch
from stateset_lightning.algorithm.segments import per_token
from stateset_lightning.episode import Part
from stateset_lightning.policy import Group, Policy
from stateset_lightning.types import Metrics


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
