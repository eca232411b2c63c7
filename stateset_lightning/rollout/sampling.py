"""Logits become tokens, with the randomness given from outside; tokens become text, which stop strings end.

Letters: B rows of the batch, V vocabulary.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from stateset_lightning.errors import ConfigError
from stateset_lightning.policy import SamplingMask
from stateset_lightning.rollout.engine import RolloutConfig


def check_length(longest: int, max_new_tokens: int, limit: int, whose: str) -> None:
    """The longest prompt and its completion must fit into `limit` tokens together; `whose` it is, for the error.

    Raises:
        ConfigError: If they do not.
    """
    if longest + max_new_tokens > limit:
        room, left = limit - max_new_tokens, limit - longest
        ways = [f"lower max_new_tokens to {left}"] if left > 0 else []
        in_run = f"in a run: data.max_prompt_tokens={room} and data.overlong_prompts=drop"
        ways += [f"shorten the prompt to {room} ({in_run})"] if room > 0 else []
        sizes = f"a prompt of {longest} tokens and model.rollout.max_new_tokens={max_new_tokens}"
        remedy = ", or ".join(ways) or "lower max_new_tokens, and shorten the prompts"
        raise ConfigError(f"{sizes} exceed {whose}: {remedy}")


def sample_tokens(
    logits_BV: Tensor, uniforms_B: Tensor | None, sampling: RolloutConfig, keep: Callable[[Tensor], None] | None = None
) -> tuple[Tensor, Tensor]:
    """Draws one token per row by inverting the cumulative distribution at `uniforms_B`; greedy if that is None.

    Where there is `keep`, it gets what top-k, top-p and min-p kept (bool [B, V]), and log-probs are over that alone.

    Returns:
        The tokens [B] and their log-probs [B] (nats, float32): log-softmax of logits / temperature, before top-k, top-p
        and min-p. Where logits are not finite, the log-prob is NaN.
    """
    logprobs_BV = (logits_BV.float() / sampling.temperature).log_softmax(-1)
    if uniforms_B is None:
        tokens_B = logprobs_BV.argmax(-1)
    else:
        # Summed in float64: with a large vocabulary the float32 sum loses the unlikely tokens.
        probs_BV = filter_probabilities(logprobs_BV.exp(), sampling)
        cumulative_BV = probs_BV.cumsum(-1, dtype=torch.float64)
        total_B = cumulative_BV[:, -1]
        # Strictly below the total, so that the index is that of a token with some probability.
        point_B = torch.minimum(uniforms_B * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
        # Logits that are not finite give an index out of range; clamped, so that the caller sees the log-prob of NaN.
        index_B = torch.searchsorted(cumulative_BV, point_B[:, None], right=True)[:, 0]
        tokens_B = index_B.clamp(max=logits_BV.shape[-1] - 1)
        if keep is not None:
            keep(probs_BV > 0)
            logprobs_BV = logprobs_BV - total_B.log().float()[:, None]
    return tokens_B, logprobs_BV.gather(-1, tokens_B[:, None])[:, 0]


def filter_probabilities(probs_BV: Tensor, sampling: RolloutConfig) -> Tensor:
    """Sets to zero what top-k, then top-p, then min-p exclude, each applied to what the one before kept.

    The result is not renormalised. The likeliest token always stays. Of tokens that tie at a boundary, those with the
    lower ids stay.
    """
    if sampling.top_k is not None and sampling.top_k < probs_BV.shape[-1]:
        last_B1 = probs_BV.topk(sampling.top_k).values[:, -1:]  # quicker than a sort of the vocabulary
        above_BV, ties_BV = probs_BV > last_B1, probs_BV == last_B1
        room_B1 = sampling.top_k - above_BV.sum(-1, keepdim=True)
        probs_BV = probs_BV.where(above_BV | (ties_BV & (ties_BV.cumsum(-1) <= room_B1)), 0.0)
    if sampling.top_p is not None and sampling.top_p < 1:
        sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV  # probability of all likelier tokens
        kept_BV = sorted_BV.where(before_BV < sampling.top_p * sorted_BV.sum(-1, keepdim=True), 0.0)
        probs_BV = torch.zeros_like(probs_BV).scatter(-1, order_BV, kept_BV)
    if sampling.min_p is not None:
        probs_BV = probs_BV.where(probs_BV >= sampling.min_p * probs_BV.amax(-1, keepdim=True), 0.0)
    return probs_BV


class MaskRecorder:
    """Collects the sampling masks of one `generate`.

    Those of the newest tokens lie on the device, a flag for each token of the vocabulary, and are changed in place, as
    a graph needs it. Each time that the host looks, they become lists. S: tokens of a row between two looks, at most.
    """

    def __init__(self) -> None:
        self._parts: list[list[Tensor]] = []
        self._places_BS = torch.empty(0, 0)

    def make_room(self, logits_BV: Tensor, steps: int = 1) -> None:
        """For so many steps of these rows until `collect`; called before a graph is recorded."""
        if self._places_BS.shape != (len(logits_BV), steps):
            self._places_BS = torch.full((len(logits_BV), steps), -1, device=logits_BV.device)
            self._kept_BSV = logits_BV.new_zeros(len(logits_BV), steps, logits_BV.shape[1], dtype=torch.bool)

    def write(self, place_B: Tensor, kept_BV: Tensor) -> None:
        """What was kept for each row's token; `place_B` says where that stands among all, and grows by 1 a step."""
        if len(self._places_BS) != len(kept_BV):
            self.make_room(kept_BV)
        rows_B, slots_B = torch.arange(len(place_B), device=place_B.device), place_B % self._places_BS.shape[1]
        self._places_BS[rows_B, slots_B], self._kept_BSV[rows_B, slots_B] = place_B, kept_BV

    def collect(self) -> None:
        """Makes lists of the newest masks. One that is in a list already may come again, unchanged."""
        values = self._places_BS, self._kept_BSV.nonzero()[:, -1].int(), self._kept_BSV.sum(-1, dtype=torch.int32)
        self._parts.append([value.flatten().to("cpu", copy=True) for value in values])

    def mask(self, is_token: Tensor) -> SamplingMask:
        """Of the tokens at the places, in order, that are True."""
        places, ids_K, counts = map(torch.cat, zip(*self._parts, strict=True))
        parts_of = torch.zeros(is_token.numel() + 1, dtype=torch.long)  # one more: for places that none has written
        parts_of[places] = torch.arange(len(places))
        return SamplingMask(ids_K, counts)[parts_of[:-1][is_token.flatten()]]


class StopStrings:
    """Finds stop strings in a growing completion, also inside a token or across tokens.

    Of the special tokens only those that end a completion, and padding, are left out of its text: others are its
    content (`<think>`, `<tool_call>`), which rewards read.

    Args:
        strings: Any of them ends a completion; may be empty.
        tokenizer: Decodes tokens.
        ends: Tokens that end a completion.

    Attributes:
        ends: These, and the stop strings that are a token of their own (`<|im_end|>`).
    """

    def __init__(self, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> None:
        self.strings = list(strings)
        self.tokenizer = tokenizer
        self.ends = {*ends, *(i for text in strings if (i := tokenizer.get_added_vocab().get(text)) is not None)}
        # Every token is at least one byte, so a string lies within as many tokens as it has bytes. The extra ones
        # complete a character that is cut at the window's start.
        self.window = max((len(text.encode()) for text in strings), default=0) + 4
        self._hidden = {*self.ends, tokenizer.pad_token_id}  # which a tokenizer looks up slowly

    def found(self, tokens: list[int]) -> bool:
        """Whether the last tokens contain a stop string."""
        tail = self._decode(tokens[-self.window :])
        return any(text in tail for text in self.strings)

    def text(self, tokens: list[int]) -> str:
        """The text of a finished completion, cut before the first stop string."""
        text = self._decode(tokens)
        return text[: min((end for stop in self.strings if (end := text.find(stop)) >= 0), default=None)]

    def _decode(self, tokens: list[int]) -> str:
        shown = [token for token in tokens if token not in self._hidden]
        # Clean-up would take spaces that were sampled, and other ones from a completion's end than from all of it.
        return str(self.tokenizer.decode(shown, clean_up_tokenization_spaces=False))
