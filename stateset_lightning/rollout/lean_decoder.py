"""A decoding step of Llama-like models in few operations: on a CPU, what lies between the matrix products takes a third of the time.

The layer is Llama's (arXiv:2302.13971) with what Mistral, Qwen2 and Qwen3 add to it. Layers with the same input are one product, queries
and keys are rotated together, rows are vectors without a sequence dimension, and no module's wrapping is called: 7% (64 rows) to 22%
(6 rows) less time per token than the same layers in `transformers` with `fast_linears` (`benchmarks/RESULTS.md`). A probe compares it with
the model's own forward; whatever is not known to be this layer decodes with that one. Letters: B rows, H hidden size, d of a head,
C columns of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stateset_lightning.policy.lean_layers import is_lean
from stateset_lightning.policy.precision import LOGPROB_TOLERANCE
from stateset_lightning.rollout.cache import make_cache
from stateset_lightning.rollout.fast_linear import LaidOut, is_supported

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import DynamicCache

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
"""Layer, query [B, heads, 1, d], keys and values [B, key heads, C, d], scaling -> [B, 1, heads, d]."""


def attend_to_cache(hidden: Tensor | None, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """An `Attend`, but for the columns to hide, bool, broadcast to [B, 1, 1, C].

    Plain products: for one query per row they are faster than the fused kernel, which is made for many.
    """
    scores = (query * scaling).view(len(query), key.shape[1], -1, query.shape[-1]) @ key.transpose(-1, -2)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ value).view(len(query), 1, -1, query.shape[-1])


def make_lean_decoder(model: PreTrainedModel, num_rows: int) -> LeanDecoder | None:
    """A decoder for the weights as they are now, or None where the model is not known to be made of this layer, or watched by hooks."""
    is_known = model.config.model_type in MODEL_TYPES and not getattr(model.config, "sliding_window", None)
    if not is_known or not is_supported(model) or any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return None
    layers = list(model.model.layers)
    norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    families = [family for layer in layers for family in _families(layer)] + [[_plain(model.lm_head)]]
    if not all(map(is_lean, [*norms, model.model.norm, *(layer.mlp for layer in layers)])) or not all(map(_is_one_product, families)):
        return None
    return LeanDecoder(model, num_rows)


class LeanDecoder:
    """See the module's docstring; `make_lean_decoder` checks that the model is one.

    Args:
        model: Its weights are copied into another layout.
        num_rows: That the layout is made for.
    """

    def __init__(self, model: PreTrainedModel, num_rows: int) -> None:
        self.embed = model.model.embed_tokens
        self.rotary = model.model.rotary_emb
        self.layers = [_Layer(layer, num_rows) for layer in model.model.layers]
        self.norm = model.model.norm
        self.head = LaidOut([_plain(model.lm_head)], num_rows)

    def step(self, tokens_B: Tensor, positions_B: Tensor, cache: DynamicCache, attend: Attend) -> Tensor:
        """Appends a token to each row of the cache; the logits that predict the next one, [B, V]."""
        hidden_BH = self.embed(tokens_B)
        cos, sin = self.rotary(hidden_BH[:, None], positions_B[:, None])  # [B, 1, d]
        first, second = sin.chunk(2, -1)
        rotation = cos, torch.cat([-first, second], -1)
        for layer in self.layers:
            hidden_BH = layer.step(hidden_BH, rotation, cache, attend)
        return self.head(_normed(self.norm, hidden_BH))

    def is_exact(self, model: PreTrainedModel) -> bool:
        """Whether a step gives the model's own log-probs, but for float error."""
        ids = (torch.arange(12, device=model.device) % model.config.vocab_size).view(2, 6)
        expected = model(input_ids=ids, use_cache=False).logits[:, -1]
        cache = make_cache(model, ids.shape[1])
        model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
        logits = self.step(ids[:, -1], torch.full_like(ids[:, -1], 5), cache, partial(attend_to_cache, None))
        difference = (logits.log_softmax(-1) - expected.log_softmax(-1)).abs().max()
        return bool(difference < LOGPROB_TOLERANCE[torch.float32])


class _Layer:
    def __init__(self, layer: Any, num_rows: int) -> None:
        attention = layer.self_attn
        self.index = attention.layer_idx
        self.scaling = attention.scaling
        self.head_dim = attention.head_dim
        families = _families(layer)
        self.inputs, self.output, self.gates, self.down = (LaidOut(family, num_rows) for family in families)
        self.sizes = [linear.out_features // self.head_dim for linear in families[0]]  # heads of queries, keys, values
        self.attention_norm, self.mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.head_norms = [norm for norm in (getattr(attention, name, None) for name in ("q_norm", "k_norm")) if norm is not None]

    def step(self, hidden_BH: Tensor, rotation: tuple[Tensor, Tensor], cache: DynamicCache, attend: Attend) -> Tensor:
        heads = self.inputs(_normed(self.attention_norm, hidden_BH)).unflatten(-1, (-1, self.head_dim))
        turned = self._rotated(heads[:, : self.sizes[0] + self.sizes[1]], *rotation)
        query, key, value = turned[:, : self.sizes[0], None], turned[:, self.sizes[0] :, None], heads[:, -self.sizes[2] :, None]
        keys, values = cache.layers[self.index].update(key, value)
        hidden_BH = hidden_BH + self.output(attend(self.index, query, keys, values, self.scaling).flatten(1))
        gate, up = self.gates(_normed(self.mlp_norm, hidden_BH)).chunk(2, -1)
        return hidden_BH + self.down(F.silu(gate).mul_(up))

    def _rotated(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries and keys [B, heads, d] turned by their positions (arXiv:2104.09864); `sin` has the sign of each half."""
        if self.head_norms:
            parts = heads.split(self.sizes[:2], 1)
            heads = torch.cat([_normed(norm, part) for norm, part in zip(self.head_norms, parts, strict=True)], 1)
        return torch.addcmul(heads * cos, heads.roll(self.head_dim // 2, -1), sin)


def _families(layer: Any) -> list[list[nn.Linear]]:
    """Linear layers by what their input is: of queries, keys and values; of their output; of gate and up; of down."""
    attention, mlp = layer.self_attn, layer.mlp
    inputs = [attention.q_proj, attention.k_proj, attention.v_proj]
    return [[_plain(linear) for linear in family] for family in (inputs, [attention.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj])]


def _plain(linear: Any) -> nn.Linear:
    """The layer, or the one under an adapter that is merged into it."""
    base: nn.Linear = linear.get_base_layer() if getattr(linear, "merged", False) else linear
    return base


def _is_one_product(linears: Sequence[nn.Linear]) -> bool:
    return all(type(linear) is nn.Linear for linear in linears) and len({linear.bias is None for linear in linears}) == 1


def _normed(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
