"""The interface of a rollout engine: whatever turns prompts into groups of completions."""

# No `from __future__ import annotations`: jsonargparse holds an engine's methods against these signatures (4.53).
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from stateset_lightning.policy import Policy
from stateset_lightning.rollout.config import RolloutConfig
from stateset_lightning.types import FinishReason, Metrics, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnFinished = Callable[[int, str, int], None]
"""Called with (completion, text, tokens) as soon as a completion is finished, in no particular order."""


class RolloutEngine(Protocol):
    """Samples completions. Letters: P prompts, N = P * num_generations completions."""

    def generate(
        self,
        prompts: list[list[int]],
        num_generations: int,
        sampling: RolloutConfig,
        seeds_N: Sequence[int],
        greedy: bool = False,
        on_finished: OnFinished | None = None,
    ) -> Rollout:
        """Completions n of prompt n // num_generations; their noise follows from `seeds_N[n]` alone."""
        ...

    def sync(self, policy: Policy) -> None:
        """Makes `policy` the model that `generate` samples from, weights as they are now."""
        ...


@runtime_checkable
class RemoteEngine(RolloutEngine, Protocol):
    """An engine that samples elsewhere, from a copy of the weights as they were at the last `sync`."""

    def setup(self, tokenizer: "PreTrainedTokenizerBase", sampling: RolloutConfig) -> None:
        """Called once before a run; raises where it could not be sampled as `sampling` says."""
        ...

    def pop_metrics(self) -> Metrics:
        """Of what happened since the last call, as (sum, count)."""
        ...


def rollout_of(
    prompts: list[list[int]],
    tokens_N: Sequence[Sequence[int]],
    logprobs_N: Sequence[Sequence[float]],
    finish_reasons: list[FinishReason],
    texts: list[str],
) -> Rollout:
    """The rollout of completions that are there one by one."""
    return Rollout(
        prompt_tokens=prompts,
        completion_tokens_T=torch.tensor([token for tokens in tokens_N for token in tokens], dtype=torch.long),
        lengths_N=torch.tensor([len(tokens) for tokens in tokens_N]),
        logprobs_T=torch.tensor([logprob for logprobs in logprobs_N for logprob in logprobs], dtype=torch.float32),
        finish_reasons=finish_reasons,
        texts=texts,
    )
