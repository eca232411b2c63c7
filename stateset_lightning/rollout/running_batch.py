"""The rows that are decoded together: admitted when there is room, dropped when they are finished.

All rows write their next token at the same column of the cache, so each is padded on the left to end there; a mask
hides the padding. The state of a recurrent layer must not see padding: where there are some, prompts of one length are
prefilled together, and no others. Letters: B rows of the batch, C columns of the cache, P prompts, V vocabulary.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from inspect import signature
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from stateset_lightning.policy import packed_attention
from stateset_lightning.policy.shared_prompts import SharedPrompts
from stateset_lightning.rollout.cache import BufferLayer, StateLayer, make_cache, modules_with_states
from stateset_lightning.rollout.cpu_decoding import Attend, LlamaDecoder, attend_to_cache
from stateset_lightning.rollout.cuda_decoding import LOOK_EVERY, WITH_GRAPHS, GraphBatch
from stateset_lightning.rollout.engine import DecodingKind
from stateset_lightning.rollout.kept import Kept, stacked

# Tokens of the longest prompt from which sharing is faster than a kernel call over copies (benchmarks/RESULTS.md).
SHARE_FROM = 256
# Tokens of all rows that a forward of rows that go on takes at most: plain attention keeps a score for each and column.
TOGETHER = 256
WORTH_A_PART = 0.75  # rows that lack more than others get a forward of their own if all then is at most so much work


def batch_kinds(
    model: PreTrainedModel, longest_prompt: int, decoding: DecodingKind = "auto"
) -> "tuple[type[RunningBatch | GraphBatch], ...]":
    """The fastest first: by a CUDA graph, or with rows that share their prompts' keys and values where that is faster.

    Args:
        model: That samples.
        longest_prompt: Its tokens.
        decoding: See `RolloutConfig`.
    """
    if decoding == "graph":
        return (GraphBatch,)
    # The kernels of other devices and precisions are fast enough, and accumulate in float32.
    is_float32_on_cpu = model.device.type == "cpu" and model.dtype == torch.float32
    shares = model.config.get_text_config()._attn_implementation == packed_attention.NAME and is_float32_on_cpu
    # Layers that read the keys of others (Gemma 3n's, Gemma 4's) have no prompt of their own.
    shares = shares and not any(getattr(module, "is_kv_shared_layer", False) for module in model.modules())
    if shares and longest_prompt >= SHARE_FROM:
        return (SharingBatch, RunningBatch)
    return (GraphBatch, RunningBatch) if decoding == "auto" and model.device.type in WITH_GRAPHS else (RunningBatch,)


def tokens_between_looks(device: torch.device) -> int:
    """A look costs nothing on a CPU. Elsewhere the host waits for the device, which then waits for the host."""
    return 1 if device.type == "cpu" else LOOK_EVERY


class RunningBatch:
    """The state of decoding: the model's cache, and the logits that predict each row's next token.

    Args:
        model: A causal language model.
        max_new_tokens: Tokens that a row decodes at most.
        decoder: Makes the steps in place of the model.

    Attributes:
        gain: What it has that others do not, for announcements.
        compact_below: Finished rows leave when fewer than this share of the rows is running: leaving copies the cache.
        look_every: Tokens that are sampled before the host looks which rows have finished.
    """

    gain = ""
    compact_below = 0.75

    def __init__(self, model: PreTrainedModel, max_new_tokens: int, decoder: LlamaDecoder | None = None) -> None:
        self.model = model
        self.decoder = decoder
        self.max_new_tokens = max_new_tokens
        self.look_every = tokens_between_looks(model.device)
        self.cache = make_cache(model, 0)
        self.column = 0  # where the next token goes
        self.starts_B = torch.empty(0, dtype=torch.long, device=model.device)  # first column of each row
        # Last position of each row: a finished row that is still in the batch must not exceed the model's positions.
        self.limits_B = self.starts_B
        self.logits_BV = torch.empty(0)
        self._padded = False
        takes = signature(model.forward).parameters
        self._cache_name = "cache_params" if "cache_params" in takes else "past_key_values"
        self._modules_with_states = modules_with_states(model)

    def __len__(self) -> int:
        return len(self.starts_B)

    def admit(self, prompts: Sequence[Sequence[int]], prompt_of_row: Sequence[int]) -> None:
        """Prefills each prompt once and adds `len(prompt_of_row)` rows that continue them."""
        width, rows = max(map(len, prompts)), torch.tensor(prompt_of_row, device=self.model.device)
        # Room for the completions where the buffers stay, none where they are copied into the running batch's.
        cache, logits_PV, lengths_P = self._prefill(prompts, width if len(self) else width + self.max_new_tokens)
        cache.batch_select_indices(rows)
        if len(self):
            first = int(self.starts_B.min())  # columns before it are padding of every row
            column = max(self.column - first, width)
            for layer, added in zip(self.cache.layers, cache.layers, strict=True):
                layer.join(added, first, column, column + self.max_new_tokens)
        else:
            self.cache, column = cache, width
        starts_B = self._extended(self.starts_B + column - self.column, column - lengths_P[rows])
        self._add_rows(logits_PV[rows], lengths_P[rows], starts_B, column)
        self._padded = self._has(BufferLayer) and bool((self.starts_B > 0).any())

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these."""
        self.cache.batch_select_indices(rows)
        self.starts_B, self.limits_B = self.starts_B[rows], self.limits_B[rows]
        self.logits_BV = self.logits_BV[rows]

    @property
    def can_keep(self) -> bool:
        """Whether others may go on from its rows: not from states, which have no columns."""
        return {type(layer) for layer in self.cache.layers} == {BufferLayer}

    def kept(self, row: int, length: int) -> Kept:
        """What has been computed of the first `length` tokens of a row, its prompt's included; views of the batch."""
        start = int(self.starts_B[row])
        buffers = (buffer for layer in self.cache.layers for buffer in layer.buffers)
        return Kept([buffer[row, :, start : start + length] for buffer in buffers])

    def resume(self, kept: Sequence[Kept], rows: Sequence[Sequence[int]]) -> None:
        """Fills an empty batch with rows of which the beginning is kept: what comes behind that is computed.

        Args:
            kept: What is kept of each row.
            rows: Their tokens, at least one more than is kept.
        """
        own = [tokens[row.num_before :] for row, tokens in zip(kept, rows, strict=True)]
        counts = [len(tokens) - row.columns[0].shape[1] for row, tokens in zip(kept, own, strict=True)]
        self.column = max(map(len, own))
        starts = [self.column - len(tokens) for tokens in own]
        self.starts_B = torch.tensor(starts, device=self.model.device)
        self._go_on_from(kept)
        self.limits_B = self._positions() + self.max_new_tokens - 1
        for i, layer in enumerate(self.cache.layers):
            pair = [stacked(kept, n, self.column + self.max_new_tokens, starts) for n in (2 * i, 2 * i + 1)]
            layer.fill(pair, self.column)
        padded = [[*[0] * start, *tokens][-max(counts) :] for start, tokens in zip(starts, own, strict=True)]
        self.logits_BV = self.starts_B.new_empty(len(own), 0)
        self._compute_last(torch.tensor(padded, device=self.model.device), counts)

    def _compute_last(self, tokens_Bn: Tensor, counts: list[int]) -> None:
        """Computes the last columns, of which each row lacks so many; the most that one lacks is n.

        All rows together compute their last ones, with some that they have; before that those that lack many more
        compute these by themselves.
        """
        end, most = self.column, max(counts)
        lasts = sorted(set(counts))
        work = {last: last * len(counts) + (most - last) * sum(count > last for count in counts) for last in lasts}
        last = min(work, key=work.__getitem__)
        if work[last] > WORTH_A_PART * work[most]:
            last = most
        self.column = end - last
        if rows := [row for row, count in enumerate(counts) if count > last]:
            self._compute_part(rows, tokens_Bn[rows, :-last], [counts[row] - last for row in rows])
        for layer in self.cache.layers:
            layer.fill(layer.buffers, self.column)
        for some in tokens_Bn[:, -last:].split(max(1, TOGETHER // self._rows_at_once), dim=1):
            positions = self._positions()[:, None] + torch.arange(some.shape[1], device=some.device)
            arguments = self._attention_arguments(some.shape[1])
            self.logits_BV = self._forward(some, positions.clamp(min=0), self.cache, **arguments)
            self.column += some.shape[1]

    def _compute_part(self, rows: list[int], tokens_Bn: Tensor, counts: list[int]) -> None:
        """As `_compute_last`, of these rows alone."""
        part, last = copy(self), slice(self.column - max(counts), self.column)
        part.cache = copy(self.cache)
        part.cache.layers = [copy(layer) for layer in self.cache.layers]
        part.keep(torch.tensor(rows, device=tokens_Bn.device))
        part._compute_last(tokens_Bn, counts)
        for layer, computed in zip(self.cache.layers, part.cache.layers, strict=True):
            for buffer, new in zip(layer.buffers, computed.buffers, strict=True):
                buffer[rows, :, last] = new[:, :, last]

    @property
    def _rows_at_once(self) -> int:
        return len(self)  # those that attention computes, padding included

    def _go_on_from(self, kept: Sequence[Kept]) -> None:
        """What else `resume` sets, once `starts_B` is known."""
        self._padded = bool((self.starts_B > 0).any())

    def step(self, tokens_B: Tensor) -> None:
        """Appends a token to each row; `logits_BV` are then those that predict the next one."""
        positions_B = torch.minimum(self._positions(), self.limits_B)
        if self.decoder is not None:
            self.logits_BV = self.decoder.step(tokens_B, positions_B, self.cache, self._attend())
        else:
            inputs = tokens_B[:, None], positions_B[:, None], self.cache
            self.logits_BV = self._forward(*inputs, **self._attention_arguments())
        self.column += 1

    def repeat(self, advance: Callable[[], None], times: int) -> None:
        """Calls `advance`, which makes steps of this batch."""
        for _ in range(times):
            advance()

    def _positions(self) -> Tensor:
        """Of each row's next token, int64 [B]."""
        return self.column - self.starts_B

    def _attention_arguments(self, count: int = 1) -> dict[str, Any]:
        """What else the attention to so many new tokens of each row needs to know."""
        mask = self._mask(count)
        if mask is not None and count == 1 and self._takes_ready_masks:
            mask = mask[:, None, None]
        return {"attention_mask": mask}

    def _attend(self) -> Attend:
        """The attention of the decoder's step."""
        mask = self._mask()
        return partial(attend_to_cache, None if mask is None else ~mask[:, None, None])

    def _extended(self, values_B: Tensor, added: Tensor) -> Tensor:
        """Values of the running rows, then those of new ones."""
        return torch.cat([values_B, added]) if len(self) else added

    def _add_rows(self, logits: Tensor, prompt_lengths: Tensor, starts_B: Tensor, column: int) -> None:
        self.logits_BV = self._extended(self.logits_BV, logits)
        self.limits_B = self._extended(self.limits_B, prompt_lengths + self.max_new_tokens - 1)
        self.starts_B, self.column = starts_B, column

    def _prefill(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[DynamicCache, Tensor, Tensor]:
        """Each prompt once: the cache, the logits [P, V] that predict the first token, and the lengths [P]."""
        width, device = max(map(len, prompts)), self.model.device
        if min(map(len, prompts)) < width and self._has(StateLayer):
            return self._prefill_unpadded(prompts, capacity)
        cache = make_cache(self.model, capacity)
        lengths_P = torch.tensor([len(prompt) for prompt in prompts], device=device)
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        # Positions count from the first real token; models with learned positions need them.
        positions = torch.arange(width, device=device) - (width - lengths_P)[:, None]
        mask = positions >= 0 if any(len(prompt) != width for prompt in prompts) else None
        return cache, self._forward(ids, positions.clamp(min=0), cache, attention_mask=mask), lengths_P

    def _prefill_unpadded(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[DynamicCache, Tensor, Tensor]:
        """As `_prefill`, without padding."""
        parts = [self._prefill(list(same), capacity) for _, same in groupby(sorted(prompts, key=len), key=len)]
        cache = parts[0][0]
        for added, _, lengths_P in parts[1:]:
            for layer, added_layer in zip(cache.layers, added.layers, strict=True):
                layer.join(added_layer, 0, int(lengths_P[0]), capacity)
        order = sorted(range(len(prompts)), key=lambda p: len(prompts[p]))
        places = torch.tensor(order, device=self.model.device).argsort()
        cache.batch_select_indices(places)
        return cache, torch.cat([part[1] for part in parts])[places], torch.cat([part[2] for part in parts])[places]

    def _forward(self, ids: Tensor, positions: Tensor, cache: DynamicCache, **arguments: Any) -> Tensor:
        """The model's logits at the last column, [B, V]; keys and values go into the cache."""
        options: dict[str, Any] = {self._cache_name: cache, "use_cache": True, "logits_to_keep": 1}
        for i, (module, name) in enumerate(self._modules_with_states):
            setattr(module, name, cache.layers[-1].conv_states[i])
        logits = self.model(input_ids=ids, position_ids=positions, **options, **arguments).logits[:, -1]
        for i, (module, name) in enumerate(self._modules_with_states):
            cache.layers[-1].conv_states[i] = getattr(module, name)
        return logits

    def _has(self, kind: type) -> bool:
        return any(isinstance(layer, kind) for layer in self.cache.layers)

    def _mask(self, count: int = 1) -> Tensor | None:
        """Bool [B, C]: whether a row sees a column, the next tokens' included; None when nothing is padded."""
        if not self._padded:
            return None
        return torch.arange(self.column + count, device=self.starts_B.device) >= self.starts_B[:, None]

    @property
    def _takes_ready_masks(self) -> bool:
        """Whether a bool mask [B, 1, 1, C] serves every layer: not with sliding windows, nor where masks are added."""
        config = self.model.config.get_text_config()
        layer_types = set(getattr(config, "layer_types", None) or [])
        windowed = getattr(config, "sliding_window", None) or layer_types - {"full_attention"}
        return config._attn_implementation in ("sdpa", packed_attention.NAME) and not windowed


class SharingBatch(RunningBatch):
    """A batch that keeps each prompt's keys and values once: the cache holds only what the rows have decoded."""

    gain = "sharing prompts"
    prompts: SharedPrompts  # there are some as soon as there are rows
    _first: SharedPrompts  # as they were when rows came last, and where each row finds its own among them
    _places_B: Tensor

    def admit(self, prompts: Sequence[Sequence[int]], prompt_of_row: Sequence[int]) -> None:
        rows = torch.tensor(prompt_of_row, device=self.model.device)
        prefilled, logits_PV, lengths_P = self._prefill(prompts, max(map(len, prompts)))
        keys, values = [layer.keys for layer in prefilled.layers], [layer.values for layer in prefilled.layers]
        added = SharedPrompts(keys, values, lengths_P, rows, torch.zeros_like(rows))
        if len(self):
            first = int(self.starts_B.min())
            column = self.column - first
            for layer in self.cache.layers:
                layer.grow(len(rows), first, column + self.max_new_tokens)
            self.prompts = self.prompts.join(added, first, column)
        else:
            self.cache, column, self.prompts = make_cache(self.model, 0), 0, added
            for layer, states in zip(self.cache.layers, zip(keys, values, strict=True), strict=True):
                layer.fill([x.new_empty(len(rows), x.shape[1], self.max_new_tokens, x.shape[3]) for x in states], 0)
        self._add_rows(logits_PV[rows], lengths_P[rows], self.prompts.starts_B, column)
        self._first, self._places_B = self.prompts, self.prompts.prompt_of_row_B

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        if len(rows):
            self.prompts, self._places_B = self.prompts.select(rows), self._places_B[rows]

    def kept(self, row: int, length: int) -> Kept:
        prompt = int(self._places_B[row])
        return Kept(super().kept(row, length - int(self._first.lengths_P[prompt])).columns, self._first, prompt)

    def _go_on_from(self, kept: Sequence[Kept]) -> None:
        whole, rows = kept[0].prompts, torch.tensor([row.prompt for row in kept], device=self.model.device)
        assert whole is not None
        prompts = replace(whole, prompt_of_row_B=rows, starts_B=self.starts_B)
        self.prompts = prompts.select(torch.arange(len(rows), device=rows.device))
        self._first, self._places_B = self.prompts, self.prompts.prompt_of_row_B

    @property
    def _rows_at_once(self) -> int:
        return len(self.prompts.row_of_place)

    def _positions(self) -> Tensor:
        return super()._positions() + self.prompts.lengths_P[self.prompts.prompt_of_row_B]

    def _attention_arguments(self, count: int = 1) -> dict[str, Any]:
        return packed_attention.arguments(self.prompts, self.model.device)

    def _attend(self) -> Attend:
        return self.prompts.attend
