"""How completions are sampled."""

# No `from __future__ import annotations`: jsonargparse holds an engine's methods against these signatures (4.53).
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Protocol, runtime_checkable

import torch
from annotated_types import Ge, Gt, Le
from transformers import PreTrainedTokenizerBase

from stateset_lightning.errors import ConfigError, bounded
from stateset_lightning.policy import Policy
from stateset_lightning.types import FinishReason, Metrics, Rollout


@bounded("model.rollout")
@dataclass(frozen=True)
class RolloutConfig:
    """Sampling of a group of completions for each prompt."""

    num_generations: Annotated[int, Ge(2)] = 8
    """Completions per prompt (the group, G). Advantages compare within a group, so at least 2."""
    max_new_tokens: Annotated[int, Ge(1)] = 256
    """Tokens per completion at most; one that reaches it is truncated (finish reason `length`)."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """Divides the logits, in sampling and in the log-probs that the loss sees alike."""
    top_k: Annotated[int, Ge(1)] | None = None
    """Sample from the k likeliest tokens only. Like `top_p` and `min_p` it shapes what is sampled, not the
    log-probs.
    """
    top_p: Annotated[float, Gt(0), Le(1)] | None = None
    """Sample from the likeliest tokens that together have this probability."""
    min_p: Annotated[float, Gt(0), Le(1)] | None = None
    """Sample from tokens that have at least this share of the likeliest token's probability."""
    stop: list[str] = field(default_factory=list)
    """A completion ends where one of these appears. The string stays among the tokens and is cut from the text."""
    dynamic_sampling: Annotated[int, Ge(0)] = 0
    """Rounds in which groups with one and the same reward are replaced by other prompts (DAPO, arXiv:2503.14476). 0 for
    none.
    """
    sampling_ahead: Annotated[int, Ge(0), Le(1)] = 0
    """1: sample the next episode while this one trains, on servers (`model.engine`). Its samples are an episode
    off-policy.
    """
    max_batch_rows: Annotated[int, Ge(1)] = 256
    """Completions decoded at a time (with servers: requested). Lower it when sampling runs out of memory; results do
    not change.
    """

    def __post_init__(self) -> None:
        if self.sampling_ahead and self.dynamic_sampling:
            raise ConfigError(
                "model.rollout.sampling_ahead=1 has an episode's samples drawn before their rewards are asked for, and"
                f" dynamic_sampling={self.dynamic_sampling} draws others by their rewards, from newer weights: set one"
                " of them to 0"
            )
        if any(not text for text in self.stop):
            raise ConfigError(
                f"model.rollout.stop={self.stop!r} contains an empty string, which would stop every completion at once"
            )


# MERGED: The interface of a rollout engine: whatever turns prompts into groups of completions.

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
    """Packs completions whose tokens were all sampled by the model."""
    completion_tokens_T = torch.tensor([token for tokens in tokens_N for token in tokens], dtype=torch.long)
    return Rollout(
        prompt_tokens=prompts,
        completion_tokens_T=completion_tokens_T,
        lengths_N=torch.tensor([len(tokens) for tokens in tokens_N]),
        logprobs_T=torch.tensor([logprob for logprobs in logprobs_N for logprob in logprobs], dtype=torch.float32),
        sampled_T=torch.ones_like(completion_tokens_T, dtype=torch.bool),
        finish_reasons=finish_reasons,
        texts=texts,
    )
