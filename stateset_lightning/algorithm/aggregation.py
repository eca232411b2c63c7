"""From completions to tokens and back, and the weight of each token in the loss.

Letters: N completions, T their sampled tokens, packed one completion after the other.
"""

from typing import Literal

import torch
from torch import Tensor

from stateset_lightning.types import TokenBatch

# Completions and their tokens: differentiable, without a loop ---------------------------------------------------------


def per_token(values_N: Tensor, lengths_N: Tensor, num_tokens: int | None = None) -> Tensor:
    """Repeats a value per completion for each of its tokens: [N] -> [T].

    On a GPU the host waits for T, unless it is given as `num_tokens`.
    """
    return values_N.repeat_interleave(lengths_N.to(values_N.device), dim=0, output_size=num_tokens)


def token_advantages(tokens: TokenBatch) -> Tensor:
    """The advantage of each token, [T]: its own where tokens have one, else its completion's."""
    if tokens.advantages_T is not None:
        return tokens.advantages_T
    return per_token(tokens.advantages_N, tokens.lengths_N, len(tokens.logprobs_T))


def sequence_sums(values_T: Tensor, lengths_N: Tensor) -> Tensor:
    """Sum over the tokens of each completion: [T] -> [N]."""
    completion_T = per_token(torch.arange(len(lengths_N), device=values_T.device), lengths_N, len(values_T))
    return values_T.new_zeros(len(lengths_N)).index_add(0, completion_T, values_T)


def sequence_means(values_T: Tensor, lengths_N: Tensor) -> Tensor:
    """Mean over the tokens of each completion: [T] -> [N]; 0 for a completion without tokens."""
    return sequence_sums(values_T, lengths_N) / lengths_N.to(values_T.device).clamp(min=1)


# The weight of a token ------------------------------------------------------------------------------------------------

Aggregation = Literal["sequence_mean", "token_mean", "sequence_sum", "constant_length", "prompt_mean"]


def token_weights(
    lengths_N: Tensor, groups_N: Tensor, trains_N: Tensor, aggregation: Aggregation, constant_length: int | None = None
) -> Tensor:
    """Weight of each token of a completion, float64 [N]; zero where `trains_N` is false.

    The one reduction rule: a loss is the sum over tokens of weight x per-token loss. Weights are computed once per
    optimizer step, over the completions of all ranks and micro-steps of that step, so the gradient does not depend on
    how the step is split. Completions that do not train (failed, dropped, masked) are not counted; completions with an
    advantage of zero are.

    With B the completions that train, |o| the length of one and S the sum of their lengths:

    - `sequence_mean`: 1 / (B |o|), the mean over completions of the mean over tokens (GRPO, arXiv:2402.03300);
    - `token_mean`: 1 / S, the mean over all tokens (DAPO, arXiv:2503.14476);
    - `sequence_sum`: 1 / B, the mean over completions of the sum over tokens (LUSPO, arXiv:2602.05261);
    - `constant_length`: 1 / (B L), the same divided by a constant L (Dr. GRPO, arXiv:2503.20783);
    - `prompt_mean`: 1 / (P s), the mean over prompts of the mean over a prompt's s tokens (ScaleRL, arXiv:2510.13786).

    Args:
        lengths_N: Sampled tokens of each completion.
        groups_N: Which prompt each completion answers.
        trains_N: Which completions train.
        aggregation: One of the above.
        constant_length: L, for `constant_length`.

    Raises:
        ValueError: If L is missing.
    """
    trains_N = trains_N & (lengths_N > 0)
    lengths_N = lengths_N.double()
    count = trains_N.sum().clamp(min=1).double()
    _, prompt_of_N = torch.unique(groups_N, return_inverse=True)
    tokens_P = torch.zeros_like(lengths_N).index_add(0, prompt_of_N, lengths_N * trains_N)
    divisors = {
        "sequence_mean": count * lengths_N.clamp(min=1),
        "token_mean": tokens_P.sum().clamp(min=1),
        "sequence_sum": count,
        "constant_length": count * (constant_length or 0),
        "prompt_mean": (tokens_P > 0).sum().clamp(min=1) * tokens_P.clamp(min=1)[prompt_of_N],
    }
    if aggregation == "constant_length" and constant_length is None:
        raise ValueError("aggregation 'constant_length' needs `constant_length`, the most tokens of a completion")
    return torch.where(trains_N, 1 / divisors[aggregation], 0.0)
