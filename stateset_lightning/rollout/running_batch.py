"""The rows that are decoded together: admitted when there is room, dropped when they are finished.

All rows write their next token at the same column of the cache, so each is padded on the left to end there; a mask
hides the padding. Letters: B rows of the batch, C columns of the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stateset_lightning.policy import packed_attention
from stateset_lightning.policy.packed_attention import SharedPrompts
from stateset_lightning.rollout.cache import grow, join, make_cache, select_rows
from stateset_lightning.rollout.cpu_decoding import attend_to_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import DynamicCache

    from stateset_lightning.rollout.cpu_decoding import Attend, LeanDecoder

SHARE_FROM = 256
"""Tokens of the longest prompt from which sharing is faster than a kernel call over copies (benchmarks/RESULTS.md)."""


def make_running_batch(
    model: PreTrainedModel, max_new_tokens: int, longest_prompt: int, decoder: LeanDecoder | None = None
) -> RunningBatch:
    """A batch whose rows share their prompts' keys and values, where the model's attention can do that and it is
    faster.
    """
    # The kernels of other devices and precisions are fast enough, and accumulate in float32.
    shares = (
        model.config._attn_implementation == packed_attention.NAME
        and model.device.type == "cpu"
        and model.dtype == torch.float32
    )
    kind = SharingBatch if shares and longest_prompt >= SHARE_FROM else RunningBatch
    return kind(model, max_new_tokens, decoder)


class RunningBatch:
    """The state of decoding, without what is sampled: a model's cache, and the logits of the next tokens.

    Args:
        model: A causal language model.
        max_new_tokens: Tokens that a row decodes at most.
        decoder: Makes the steps in place of the model.
    """

    def __init__(self, model: PreTrainedModel, max_new_tokens: int, decoder: LeanDecoder | None = None) -> None:
        self.model = model
        self.decoder = decoder
        self.max_new_tokens = max_new_tokens
        self.cache = make_cache(model, 0)
        self.column = 0  # where the next token goes
        self.starts_B = torch.empty(0, dtype=torch.long, device=model.device)  # first column of each row
        # last position of each row: a finished one that has not left must not run beyond the model's
        self.limits_B = self.starts_B
        self.logits_BV = torch.empty(0)
        self._padded = False

    def __len__(self) -> int:
        return len(self.starts_B)

    def admit(self, prompts: Sequence[Sequence[int]], prompt_of_row: Sequence[int]) -> None:
        """Prefills each prompt once and adds `len(prompt_of_row)` rows that go on from them."""
        width = max(map(len, prompts))
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.model.device)
        # Room for the completions where the buffers stay, none where they are copied into the running batch's.
        capacity = width if len(self) else width + self.max_new_tokens
        cache, logits_BV = self._prefill(prompts, width, lengths, capacity)
        rows = torch.tensor(prompt_of_row, device=self.model.device)
        select_rows(cache, rows)
        starts_B, limits_B = width - lengths[rows], lengths[rows] + self.max_new_tokens - 1
        if len(self):
            first = int(self.starts_B.min())  # columns before it are padding of every row
            column = max(self.column - first, width)
            join(self.cache, cache, first, column, column + self.max_new_tokens)
            self.starts_B = torch.cat([self.starts_B + column - self.column, starts_B + column - width])
            self.limits_B = torch.cat([self.limits_B, limits_B])
            self.logits_BV = torch.cat([self.logits_BV, logits_BV[rows]])
            self.column = column
        else:
            self.limits_B = limits_B
            self.cache, self.starts_B, self.logits_BV, self.column = cache, starts_B, logits_BV[rows], width
        self._padded = bool((self.starts_B > 0).any())

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these."""
        select_rows(self.cache, rows)
        self.starts_B, self.limits_B = self.starts_B[rows], self.limits_B[rows]

    def step(self, tokens_B: Tensor) -> None:
        """Appends a token to each row; `logits_BV` are those that predict the next one."""
        positions_B = torch.minimum(self._positions(), self.limits_B)
        if self.decoder is not None:
            self.logits_BV = self.decoder.step(tokens_B, positions_B, self.cache, self._attend())
        else:
            output = self.model(
                input_ids=tokens_B[:, None],
                position_ids=positions_B[:, None],
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
                **self._attention_arguments(),
            )
            self.logits_BV = output.logits[:, -1]
        self.column += 1

    def _positions(self) -> Tensor:
        """Of each row's next token, int64 [B]."""
        return self.column - self.starts_B

    def _attention_arguments(self) -> dict[str, Any]:
        """What else the attention of the model's step needs to know."""
        return {"attention_mask": self._mask(self.starts_B, self.column + 1)}

    def _attend(self) -> Attend:
        """The attention of the decoder's step."""
        mask = self._mask(self.starts_B, self.column + 1)
        return partial(attend_to_cache, None if mask is None else ~mask.view(len(self), 1, 1, -1))

    def _prefill(
        self, prompts: Sequence[Sequence[int]], width: int, lengths: Tensor, capacity: int
    ) -> tuple[DynamicCache, Tensor]:
        """The cache of all prompts, each once, and the logits that predict their first token."""
        cache = make_cache(self.model, capacity)
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=self.model.device)
        # Positions count from the first real token; models with learned positions need them.
        positions = (torch.arange(width, device=self.model.device)[None] - (width - lengths)[:, None]).clamp(min=0)
        padded = any(len(prompt) != width for prompt in prompts)
        mask = torch.arange(width, device=self.model.device)[None] >= (width - lengths)[:, None] if padded else None
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return cache, output.logits[:, -1]

    def _mask(self, starts_B: Tensor, length: int) -> Tensor | None:
        """Bool [B, length], or [B, 1, 1, length] where that is what attention takes; None when nothing is padded."""
        if not self._padded:
            return None
        mask = torch.arange(length, device=starts_B.device)[None] >= starts_B[:, None]
        return mask[:, None, None, :] if self._takes_ready_masks else mask

    @property
    def _takes_ready_masks(self) -> bool:
        """Whether a boolean mask of four dimensions serves every layer: not for windows, nor for additive masks."""
        config = self.model.config
        windowed = getattr(config, "sliding_window", None) or "sliding_attention" in (
            getattr(config, "layer_types", None) or []
        )
        return config._attn_implementation in ("sdpa", "stateset_prefix") and not windowed


class SharingBatch(RunningBatch):
    """The same with each prompt's keys and values kept once: the cache holds what the rows have decoded themselves."""

    def __init__(self, model: PreTrainedModel, max_new_tokens: int, decoder: LeanDecoder | None = None) -> None:
        super().__init__(model, max_new_tokens, decoder)
        self.prompts: SharedPrompts | None = None
        # Any mask of four dimensions keeps transformers from building one.
        self._unused_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device)

    def admit(self, prompts: Sequence[Sequence[int]], prompt_of_row: Sequence[int]) -> None:
        width = max(map(len, prompts))
        lengths_P = torch.tensor([len(prompt) for prompt in prompts], device=self.model.device)
        prefilled, logits_PV = self._prefill(prompts, width, lengths_P, width)
        rows = torch.tensor(prompt_of_row, device=self.model.device)
        keys, values = [layer.keys for layer in prefilled.layers], [layer.values for layer in prefilled.layers]
        added = SharedPrompts(keys, values, lengths_P, rows, torch.zeros_like(rows))
        limits_B = lengths_P[rows] + self.max_new_tokens - 1
        self.limits_B = torch.cat([self.limits_B, limits_B]) if len(self) else limits_B
        if self.prompts is not None and len(self):
            first = int(self.starts_B.min())
            self.column -= first
            grow(self.cache, len(rows), first, self.column + self.max_new_tokens)
            self.prompts = self.prompts.join(added, first, self.column)
            self.logits_BV = torch.cat([self.logits_BV, logits_PV[rows]])
        else:
            self.cache, self.column = make_cache(self.model, self.max_new_tokens), 0
            self.prompts, self.logits_BV = added, logits_PV[rows]
        self.starts_B = self.prompts.starts_B

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self.prompts = self.prompts.select(rows) if self.prompts is not None and len(rows) else None

    def _positions(self) -> Tensor:
        assert self.prompts is not None
        return super()._positions() + self.prompts.lengths_P[self.prompts.prompt_of_row_B]

    def _attention_arguments(self) -> dict[str, Any]:
        return {"attention_mask": self._unused_mask, packed_attention.SHARED_PROMPTS_ARGUMENT: self.prompts}

    def _attend(self) -> Attend:
        assert self.prompts is not None
        return self.prompts.attend
