"""Decoding on a GPU: a step of all rows, sampling included, is recorded once as a CUDA graph, and replayed.

Launched one after the other, the thousand operations of a step take the host several times as long as the device. A
graph replays the same kernels at the same addresses. So what a step changes is changed in place, what it depends on
lies on the device, and the host looks only every `LOOK_EVERY` tokens which rows have finished.

A graph is made for so many rows of such a capacity, and recorded anew when rows come or go, which they do when half of
them have finished. That takes as long as a few steps, and is simpler than rows that are replaced within a graph. It
lives within one `generate`, as do the weights that are cast for it.

Rows are aligned on the left in a cache of fixed size. Attention is PyTorch's flash kernel, which reads of each row what
is there; in float32, and where there is no such kernel, it is plain attention under a mask. Elsewhere than on CUDA the
same steps run without a graph.

Letters: B rows, C capacity of the cache in tokens, T tokens that are appended, P prompts, H hidden size, k key heads, d
size of a head.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from stateset_lightning.rollout.cpu_decoding import MODEL_TYPES, LlamaDecoder, has_llama_layers, linears, own_layer
from stateset_lightning.rollout.kept import Kept, stacked

# Tokens between two looks of the host. Rows that have finished decode up to 15 more, which nobody reads.
LOOK_EVERY = 16

# Kinds of devices where steps are recorded and replayed; elsewhere they are called.
WITH_GRAPHS = ("cuda",)

# Of a forward: bounds the activations of many long prompts.
PREFILL_TOKENS = 16_384

# Queries [T, heads, d], keys and values [2, B, C, k, d], scaling -> [T, heads, d].
Attend = Callable[[Tensor, Tensor, float], Tensor]


def obstacle_to_graph(model: PreTrainedModel) -> str | None:
    """Why `GraphBatch` does not know a model; None if it does."""
    if not has_llama_layers(model, adapted=True) or model.model.rotary_emb.rope_type in ("dynamic", "longrope"):
        known = ", ".join(MODEL_TYPES)
        return f"it knows plain layers of {known} alone, without windows, hooks or rotary frequencies by length"
    return None


class GraphBatch:
    """As `RunningBatch`, for models without an `obstacle_to_graph`, on any device and in any precision.

    Args:
        model: Its weights must not change while there are rows.
        max_new_tokens: Tokens that a row decodes at most.
        decoder: None: this makes its steps itself.
    """

    gain = "a CUDA graph"
    compact_below = 0.5
    can_keep = True

    def __init__(self, model: PreTrainedModel, max_new_tokens: int, decoder: LlamaDecoder | None = None) -> None:
        self.model, self.max_new_tokens, self.look_every = model, max_new_tokens, LOOK_EVERY
        self.layers = [_Layer(layer) for layer in model.model.layers]
        empty = partial(torch.empty, device=model.device, dtype=model.model.norm.weight.dtype)
        self.caches = [empty(2, 0, 0, layer.sizes[1], layer.head_dim) for layer in self.layers]
        # Tokens in the cache, and the most that there may be.
        self.lengths_B = self.limits_B = torch.empty(0, dtype=torch.int32, device=model.device)
        self.logits_BV = torch.empty(0)
        self._graph: torch.cuda.CUDAGraph | None = None

    def __len__(self) -> int:
        return len(self.lengths_B)

    @property
    def capacity(self) -> int:
        return self.caches[0].shape[2]

    def admit(self, prompts: Sequence[Sequence[int]], prompt_of_row: Sequence[int]) -> None:
        """Prefills each prompt once, without padding, and adds rows that continue them."""
        device, width = self.model.device, max(map(len, prompts))
        rows = torch.tensor(prompt_of_row, device=device)
        # A column more than there are tokens: there goes what a finished row decodes.
        capacity = max(self.capacity, width + self.max_new_tokens + 1)
        self._make_rotations(capacity)
        prefilled = [cache.new_zeros(2, len(prompts), width, *cache.shape[3:]) for cache in self.caches]
        logits_PV = self._append_all(prefilled, prompts, [0] * len(prompts))
        self._resize(capacity, prefilled, rows)
        lengths_B = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32, device=device)[rows]
        self.logits_BV = torch.cat([self.logits_BV, logits_PV[rows]]) if len(self) else logits_PV[rows]
        self.limits_B = torch.cat([self.limits_B, lengths_B + self.max_new_tokens])
        self.lengths_B = torch.cat([self.lengths_B, lengths_B])

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these."""
        self._graph = None
        for i, cache in enumerate(self.caches):
            self.caches[i] = cache[:, rows]
        self.lengths_B, self.limits_B = self.lengths_B[rows], self.limits_B[rows]
        self.logits_BV = self.logits_BV[rows]

    def step(self, tokens_B: Tensor) -> None:
        """Appends a token to each row; `logits_BV` are then those that predict the next one."""
        positions_B = self.lengths_B.long()
        attend = _attention(self.caches[0], self.lengths_B + 1, None)
        rows_B = torch.arange(len(self), device=tokens_B.device)
        self.logits_BV.copy_(self._logits(self._forward(tokens_B, positions_B, rows_B, self.caches, attend)))
        self.lengths_B.copy_(torch.minimum(self.lengths_B + 1, self.limits_B))

    def repeat(self, advance: Callable[[], None], times: int) -> None:
        """Calls `advance`, which makes steps of this batch and changes all else in place, too; on CUDA by a graph.

        Between two changes of the rows it must be the same function.
        """
        if self.model.device.type in WITH_GRAPHS and self._graph is None:
            self._graph, times = _recorded(advance, self.model.device), times - 1
        for _ in range(times):
            advance() if self._graph is None else self._graph.replay()

    def kept(self, row: int, length: int) -> Kept:
        """See `RunningBatch.kept`."""
        return Kept([cache[:, row, :length] for cache in self.caches])

    def resume(self, kept: Sequence[Kept], rows: Sequence[Sequence[int]]) -> None:
        """See `RunningBatch.resume`."""
        lengths = [row.columns[0].shape[1] for row in kept]
        behind = [tokens[length:] for tokens, length in zip(rows, lengths, strict=True)]
        capacity = max(map(len, rows)) + self.max_new_tokens + 1
        self._make_rotations(capacity)
        self.caches = [stacked(kept, i, capacity).transpose(0, 1).contiguous() for i in range(len(self.layers))]
        self.logits_BV = self._append_all(self.caches, behind, lengths)
        self.lengths_B = torch.tensor(list(map(len, rows)), dtype=torch.int32, device=self.model.device)
        self.limits_B = self.lengths_B + self.max_new_tokens

    def _make_rotations(self, capacity: int) -> None:
        positions_C = torch.arange(capacity, device=self.model.device)
        cos, sin = self.model.model.rotary_emb(self.caches[0], positions_C[None])
        self._cos_Cd, self._sin_Cd = cos[0], sin[0].clone()
        self._sin_Cd[:, : sin.shape[-1] // 2].neg_()  # the sign of the first half of a rotation

    def _resize(self, capacity: int, added: Sequence[Tensor], rows: Tensor) -> None:
        """Adds `rows` of other caches, and columns."""
        self._graph = None
        for i, (cache, more) in enumerate(zip(self.caches, added, strict=True)):
            # Plain attention multiplies what it masks by zero, and zero times NaN is NaN.
            made = cache.new_zeros(2, cache.shape[1] + len(rows), capacity, *cache.shape[3:])
            made[:, : cache.shape[1], : cache.shape[2]] = cache
            made[:, cache.shape[1] :, : more.shape[2]] = more[:, rows]
            self.caches[i] = made

    def _append_all(self, caches: Sequence[Tensor], tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> Tensor:
        """As `_append`, some rows at a time."""
        size = max(1, PREFILL_TOKENS // max(map(len, tokens)))
        shares = [slice(start, start + size) for start in range(0, len(tokens), size)]
        return torch.cat([self._append([x[:, some] for x in caches], tokens[some], starts[some]) for some in shares])

    def _append(self, caches: Sequence[Tensor], tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> Tensor:
        """Tokens behind the first `starts` ones of each row, at least one each; the logits behind the last.

        They are packed: what is computed is the tokens alone.
        """
        counts = [len(row) for row in tokens]
        packed = (
            [token for row in tokens for token in row],
            [start + i for start, count in zip(starts, counts, strict=True) for i in range(count)],
            [row for row, count in enumerate(counts) for _ in range(count)],
        )
        device = self.model.device
        used_B = torch.tensor([a + b for a, b in zip(starts, counts, strict=True)], dtype=torch.int32, device=device)
        tokens_T, positions_T, rows_T = (torch.tensor(values, device=device) for values in packed)
        hidden_TH = self._forward(tokens_T, positions_T, rows_T, caches, _attention(caches[0], used_B, counts))
        return self._logits(hidden_TH[[end - 1 for end in accumulate(counts)]])

    def _forward(
        self, tokens_T: Tensor, positions_T: Tensor, rows_T: Tensor, caches: Sequence[Tensor], attend: Attend
    ) -> Tensor:
        hidden_TH = self.model.model.embed_tokens(tokens_T)
        cos, sin = self._cos_Cd[positions_T][:, None], self._sin_Cd[positions_T][:, None]
        places_T = rows_T * caches[0].shape[2] + positions_T
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden_TH = layer.step(hidden_TH, cos, sin, cache, places_T, attend)
        return hidden_TH

    def _logits(self, hidden_TH: Tensor) -> Tensor:
        return own_layer(self.model.lm_head)(_normed(hidden_TH, self.model.model.norm))


class _Layer:
    def __init__(self, layer: Any) -> None:
        attention = layer.self_attn
        self.scaling, self.head_dim = attention.scaling, attention.head_dim
        *inputs, self.output, self.gate, self.up, self.down = linears(layer)
        self.inputs = _stacked(inputs)
        self.sizes = [linear.out_features // self.head_dim for linear in inputs]  # heads of queries, keys, values
        self.attention_norm, self.mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.head_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]  # Qwen3's

    def step(
        self, hidden_TH: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, places_T: Tensor, attend: Attend
    ) -> Tensor:
        stacked = self.inputs(_normed(hidden_TH, self.attention_norm))
        *turned, value = stacked.unflatten(-1, (-1, self.head_dim)).split(self.sizes, dim=1)
        turned = [x if norm is None else _normed(x, norm) for x, norm in zip(turned, self.head_norms, strict=True)]
        query, key = (torch.addcmul(x * cos, x.roll(self.head_dim // 2, -1), sin) for x in turned)
        for kept, new in zip(cache, (key, value), strict=True):
            kept.view(-1, *key.shape[1:]).index_copy_(0, places_T, new)
        hidden_TH = hidden_TH + self.output(attend(query, cache, self.scaling).flatten(1))
        normed_TH = _normed(hidden_TH, self.mlp_norm)
        return hidden_TH + self.down(F.silu(self.gate(normed_TH)) * self.up(normed_TH))


def _stacked(linears: Sequence[nn.Linear]) -> Callable[[Tensor], Tensor]:
    """The outputs of layers with the same input, one behind the other: of plain layers by one product."""
    if any(type(linear) is not nn.Linear for linear in linears):
        return lambda x: torch.cat([linear(x) for linear in linears], dim=-1)
    biases = tuple(linear.bias for linear in linears if linear.bias is not None)  # all have one, or none
    weight, bias = torch.cat(tuple(linear.weight for linear in linears)), torch.cat(biases) if biases else None
    return lambda x: F.linear(x, weight, bias)


def _normed(x: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


# Attention -----------------------------------------------------------------------------------------------------------


def _attention(cache: Tensor, used_B: Tensor, counts: Sequence[int] | None) -> Attend:
    """Of the last tokens of each row to all that is in the row's cache.

    Args:
        cache: Of any layer.
        used_B: Tokens in it, those that ask included.
        counts: How many of these a row has; None for one.
    """
    _, rows, capacity = cache.shape[:3]
    if cache.is_cuda and cache.dtype in (torch.bfloat16, torch.float16):
        options: dict[str, Any] = {"dtype": torch.int32, "device": cache.device}
        ends = torch.arange(rows + 1, **options)
        asked = ends if counts is None else torch.tensor([0, *accumulate(counts)], **options)
        return partial(_flash, asked, ends * capacity, 1 if counts is None else max(counts), used_B)
    if counts is None:
        return partial(_attend_one, torch.arange(capacity, device=cache.device) < used_B[:, None])
    return partial(_attend_several, counts, used_B.tolist())


def _flash(
    asked: Tensor, offered: Tensor, longest: int, used_B: Tensor, query: Tensor, cache: Tensor, scaling: float
) -> Tensor:
    """The operator below `torch.nn.attention.varlen`, which torch has had since before 2.8.

    Where a row has fewer queries than keys, the causal mask is aligned at their ends.
    """
    keys, values = cache.flatten(1, 2)
    ends = asked, offered, longest, cache.shape[2]
    options = {"scale": scaling, "seqused_k": used_B}
    return torch.ops.aten._flash_attention_forward(query, keys, values, *ends, 0.0, longest > 1, False, **options)[0]


def _attend_one(seen_BC: Tensor, query: Tensor, cache: Tensor, scaling: float) -> Tensor:
    keys, values = cache.transpose(2, 3)
    # The query heads of a key head stand where queries of several tokens would: no kernel needs copies of key heads.
    query = query.unflatten(1, (keys.shape[1], -1))
    mask = seen_BC[:, None, None]
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling).flatten(1, 2)


def _attend_several(counts: Sequence[int], used: Sequence[int], query: Tensor, cache: Tensor, scaling: float) -> Tensor:
    parts = []
    for row, (some, total) in enumerate(zip(query.split(list(counts)), used, strict=True)):
        keys, values = cache[:, row, None, :total].transpose(2, 3)
        mask = torch.ones(len(some), total, dtype=torch.bool, device=query.device).tril(total - len(some))
        options: dict[str, Any] = {"attn_mask": mask, "scale": scaling, "enable_gqa": True}
        attended = F.scaled_dot_product_attention(some.transpose(0, 1)[None], keys, values, **options)
        parts.append(attended[0].transpose(0, 1))
    return torch.cat(parts)


def _recorded(advance: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """Calls it once, in which libraries set themselves up, and then records it, in which nothing is computed."""
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # also where recording raises: `torch.cuda.graph` would stay in its stream
        advance()
        # Other threads may use the device meanwhile, such as those of rewards.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            advance()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph
