"""Logits -> next tokens, with the randomness given from outside. Letters: B rows of the batch, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stateset_lightning.rollout.engine import RolloutConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def sample_tokens(logits_BV: Tensor, uniforms_B: Tensor | None, sampling: RolloutConfig) -> tuple[Tensor, Tensor]:
    """Draws one token per row by inverting the cumulative distribution at `uniforms_B`; greedy where that is None.

    Returns the tokens [B] and their log-probs [B] (nats, float32): log-softmax of logits / temperature, before top-k,
    top-p and min-p.
    """
    logprobs_BV = (logits_BV.float() / sampling.temperature).log_softmax(-1)
    if uniforms_B is None:
        tokens_B = logprobs_BV.argmax(-1)
    else:
        # Summed in float64: with a large vocabulary the float32 sum loses the unlikely tokens.
        cumulative_BV = filter_probabilities(logprobs_BV.exp(), sampling).cumsum(-1, dtype=torch.float64)
        total_B = cumulative_BV[:, -1]
        # Strictly below the total, so that the index is that of a token with some probability.
        point_B = torch.minimum(uniforms_B * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
        # Clamped for logits that are not finite: the caller sees a log-prob of NaN rather than an index out of range.
        tokens_B = torch.searchsorted(cumulative_BV, point_B[:, None], right=True)[:, 0].clamp(
            max=logits_BV.shape[-1] - 1
        )
    return tokens_B, logprobs_BV.gather(-1, tokens_B[:, None])[:, 0]


def filter_probabilities(probs_BV: Tensor, sampling: RolloutConfig) -> Tensor:
    """Zeroes what top-k, then top-p, then min-p exclude (each on what the one before left); not renormalised.

    The likeliest token always stays. Ties at a boundary are kept or dropped by token id, lower first.
    """
    if sampling.top_k is not None and sampling.top_k < probs_BV.shape[-1]:
        order_BV = probs_BV.sort(dim=-1, descending=True, stable=True).indices
        probs_BV = probs_BV.scatter(-1, order_BV[:, sampling.top_k :], 0.0)
    if sampling.top_p is not None and sampling.top_p < 1:
        sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV  # probability of all likelier tokens
        kept_BV = sorted_BV.where(before_BV < sampling.top_p * sorted_BV.sum(-1, keepdim=True), 0.0)
        probs_BV = torch.zeros_like(probs_BV).scatter(-1, order_BV, kept_BV)
    if sampling.min_p is not None:
        probs_BV = probs_BV.where(probs_BV >= sampling.min_p * probs_BV.amax(-1, keepdim=True), 0.0)
    return probs_BV


# MERGED: Stop strings: a completion ends where one of them appears, also in the middle of a token or across tokens.


class StopStrings:
    """Looks for any of some strings at the end of a growing completion."""

    def __init__(self, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.strings = list(strings)
        self.tokenizer = tokenizer
        # Every token is at least one byte, so a string lies within as many tokens as it has bytes. The extra ones
        # complete a character that is cut at the window's start.
        self.window = max((len(text.encode()) for text in strings), default=0) + 4

    def found(self, tokens: list[int]) -> bool:
        """Whether a stop string appears among the last tokens."""
        if not self.strings:
            return False
        tail = self.tokenizer.decode(tokens[-self.window :], skip_special_tokens=True)
        return any(text in tail for text in self.strings)

    def cut(self, text: str) -> str:
        """The text before the first stop string."""
        ends = [position for stop in self.strings if (position := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text
