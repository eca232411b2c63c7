"""How completions are sampled."""

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Gt, Le

from stateset_lightning.bounds import check_bounds
from stateset_lightning.errors import ConfigError


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
        check_bounds("model.rollout", type(self), vars(self))
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
