"""How completions are sampled (`RolloutConfig`), and the interface of what samples them (`RolloutEngine`)."""

# No `from __future__ import annotations`: jsonargparse compares an engine's methods with these signatures (4.53).
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol, runtime_checkable

from annotated_types import Ge, Gt, Le
from transformers import PreTrainedTokenizerBase

from stateset_lightning.errors import ConfigError, bounded
from stateset_lightning.policy import Policy
from stateset_lightning.types import Metrics, Rollout

DecodingKind = Literal["auto", "graph", "eager"]


@bounded("model.rollout")
@dataclass(frozen=True)
class RolloutConfig:
    """Sampling of a group of completions for each prompt.

    Args:
        num_generations: Completions per prompt (the group, G). Advantages compare within a group, so at least 2.
        max_new_tokens: Tokens per completion at most; one that reaches it is truncated (finish reason `length`).
        temperature: Divides the logits, both when sampling and in the log-probs of the loss.
        top_k: Sample from the k likeliest tokens only. Like `top_p` and `min_p` it changes what is sampled, but not the
            log-probs, unless `keep_sampling_mask` is set.
        top_p: Sample from the likeliest tokens that together have this probability.
        min_p: Sample from tokens that have at least this share of the likeliest token's probability.
        keep_sampling_mask: Keep for each sampled token which tokens `top_k`, `top_p` and `min_p` left, and have all
            log-probs and entropies of training be over these alone, the reference's too (DeepSeek-V3.2,
            arXiv:2512.02556). In this process only: no servers.
        stop: A completion ends where one of these strings appears. The string stays among the tokens and is cut from
            the text.
        dynamic_sampling: Rounds in which groups whose rewards are all equal are replaced by other prompts (DAPO,
            arXiv:2503.14476). 0 for none.
        sampling_ahead: 1: sample the next episode while this one trains, on servers (`model.engine`). Its samples are
            an episode off-policy.
        max_batch_rows: Completions decoded at a time (with servers: requested at a time). Lower it when sampling runs
            out of memory; results do not change.
        decoding: How this process decodes (servers do not ask). `graph`: each step is recorded as a CUDA graph and
            replayed, for models of the kinds llama, mistral, qwen2 and qwen3; on other devices its steps run without a
            graph. `eager`: the model's own forward, or what is faster on a CPU. `auto`: `graph` on CUDA where it knows
            the model, else `eager`. Results are the same.

    Raises:
        ConfigError: If two options exclude each other, a way of decoding is not known, or a stop string is empty.
    """

    num_generations: Annotated[int, Ge(2)] = 8
    max_new_tokens: Annotated[int, Ge(1)] = 256
    temperature: Annotated[float, Gt(0)] = 1.0
    top_k: Annotated[int, Ge(1)] | None = None
    top_p: Annotated[float, Gt(0), Le(1)] | None = None
    min_p: Annotated[float, Gt(0), Le(1)] | None = None
    keep_sampling_mask: bool = False
    stop: list[str] = field(default_factory=list)
    dynamic_sampling: Annotated[int, Ge(0)] = 0
    sampling_ahead: Annotated[int, Ge(0), Le(1)] = 0
    max_batch_rows: Annotated[int, Ge(1)] = 256
    decoding: DecodingKind = "auto"

    def __post_init__(self) -> None:
        if self.sampling_ahead and self.dynamic_sampling:
            ahead = "sampling_ahead=1 draws all samples of an episode before their rewards are known"
            others = f"dynamic_sampling={self.dynamic_sampling} draws others by their rewards, from newer weights"
            raise ConfigError(f"model.rollout.{ahead}, and {others}: set one of them to 0")
        if self.keep_sampling_mask and not self.filters:
            raise ConfigError("model.rollout.keep_sampling_mask=true has no effect: set top_k, min_p or top_p below 1")
        if not all(self.stop):
            why = "contains an empty string, which would stop every completion at once"
            raise ConfigError(f"model.rollout.stop={self.stop!r} {why}")

    @property
    def filters(self) -> str:
        """What changes the samples beside the temperature, as `name=value, ...`; empty if nothing does."""
        values = {"top_k": self.top_k, "top_p": None if self.top_p == 1 else self.top_p, "min_p": self.min_p}
        return ", ".join(f"{name}={value}" for name, value in values.items() if value is not None)


# Called with (completion, text, tokens) as soon as a completion is finished, in no particular order.
OnFinished = Callable[[int, str, int], None]


@runtime_checkable
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
        """Samples a group of completions for each prompt.

        Args:
            prompts: Token ids of the P prompts.
            num_generations: Completions per prompt; completion n belongs to prompt n // num_generations.
            sampling: How to sample; its own `num_generations` does not count here.
            seeds_N: The noise of completion n depends on `seeds_N[n]` alone.
            greedy: Take the likeliest token each time; seeds do not count then.
            on_finished: Called for each completion while the others are still being sampled.
        """

    def sync(self, policy: Policy) -> None:
        """Makes `policy`, with its weights as they are now, the model that `generate` samples from."""


@runtime_checkable
class RemoteEngine(RolloutEngine, Protocol):
    """An engine that samples elsewhere, from a copy of the weights as they were at the last `sync`."""

    def setup(self, tokenizer: PreTrainedTokenizerBase, sampling: RolloutConfig) -> None:
        """Called once before a run; raises if the engine cannot sample as `sampling` says."""

    def pop_metrics(self) -> Metrics:
        """What happened since the last call, as (sum, count)."""
