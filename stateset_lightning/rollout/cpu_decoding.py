"""Fast decoding steps in float32 on a CPU; other devices and precisions need none of it.

A decoding step multiplies a few rows with every weight of the model. The stock kernel then reads float32 weights at a
fraction of the memory's speed; oneDNN is 1.5 to 2 times as fast (`benchmarks/RESULTS.md`). It is used in two ways:

* `LlamaDecoder` computes a whole step of Llama-like models in few operations. The rows of the batch are columns there,
  so the weights are the left matrix of a product, which oneDNN reads row after row where it lies.
* `prepacked_linears` serves every other model: its linear layers multiply with a copy of the weights in oneDNN's
  layout, held while sampling, when there are no gradients or activations.

Letters: B rows, H hidden size, d size of a head, C columns of the cache, K inputs and N outputs of a product.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

# Inputs with more rows (a prefill) take the stock kernel, which is as fast there.
MAX_ROWS = 64

# Whose layers `LlamaDecoder` and `GraphBatch` compute.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

# Layer, query [B, heads, 1, d], keys and values [B, key heads, C, d], scaling -> [B, 1, heads, d].
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


def is_supported(module: nn.Module) -> bool:
    """Whether torch has the operations, and all weights are float32 on a CPU (others have oneDNN's kernel already)."""
    has_operations = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_operations and all(p.device.type == "cpu" and p.dtype == torch.float32 for p in module.parameters())


# Any model: linear layers with weights in oneDNN's layout ------------------------------------------------------------


@contextmanager
def prepacked_linears(model: nn.Module, num_rows: int) -> Iterator[None]:
    """Replaces the forward of every plain linear layer while the context lasts; weights must not change in it."""
    candidates = model.modules() if is_supported(model) else ()
    plain = [m for m in candidates if type(m) is nn.Linear and "forward" not in vars(m)]
    try:
        for linear in plain:
            packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), min(num_rows, MAX_ROWS))
            vars(linear)["forward"] = partial(_prepacked_forward, linear, packed)
        yield
    finally:
        for linear in plain:
            vars(linear).pop("forward", None)


def _prepacked_forward(linear: nn.Linear, packed: Tensor, x: Tensor) -> Tensor:
    if x.numel() > MAX_ROWS * linear.in_features:
        return F.linear(x, linear.weight, linear.bias)
    return torch.ops.mkldnn._linear_pointwise(x, packed, linear.bias, "none", [], "")


# Llama-like models: a step in few operations -------------------------------------------------------------------------


def attend_to_cache(
    hidden: Tensor | None, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
) -> Tensor:
    """An `Attend`, once `hidden` is given: bool, broadcast to [B, 1, 1, C], the columns that a row does not see.

    Plain products: for one query per row they are faster than the fused kernel, which is made for many.
    """
    scores = (query * scaling).view(len(query), key.shape[1], -1, query.shape[-1]) @ key.transpose(-1, -2)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ value).view(len(query), 1, -1, query.shape[-1])


def has_llama_layers(model: PreTrainedModel, adapted: bool = False) -> bool:
    """Whether the decoders know the model: transformers' own code, plain layers without hooks.

    `LlamaDecoder` needs `is_supported` as well; `GraphBatch` takes layers with an adapter beside them (`adapted`).
    """
    config, kind = model.config.get_text_config(), model.config.model_type  # a composite model is another kind
    is_known = kind in MODEL_TYPES and type(model).__module__ == f"transformers.models.{kind}.modeling_{kind}"
    if not is_known or config.hidden_act != "silu" or getattr(config, "sliding_window", None):
        return False
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return False
    own = [own_layer(model.lm_head), *(linear for layer in model.model.layers for linear in linears(layer))]
    return all(type(linear) is nn.Linear or (adapted and _has_adapter(linear)) for linear in own)


class LlamaDecoder:
    """A decoding step of Llama (arXiv:2302.13971), with what Mistral, Qwen2 and Qwen3 add to its layer.

    No module's wrapping is called, and queries and keys are rotated together.

    Args:
        model: For which `has_llama_layers` holds. Its weights must not change while the decoder is in use: those of
            queries, keys and values are copied.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.embed = model.model.embed_tokens
        self.rotary = model.model.rotary_emb
        self.layers = [_Layer(layer) for layer in model.model.layers]
        self.norm = _Norm(model.model.norm)
        self.head = _Product([own_layer(model.lm_head)])

    def step(self, tokens_B: Tensor, positions_B: Tensor, cache: DynamicCache, attend: Attend) -> Tensor:
        """Appends a token to each row of the cache; returns the logits [B, V] that predict the next one."""
        embedded_BH = self.embed(tokens_B)
        cos_dB, sin_dB = (x[0].t().contiguous() for x in self.rotary(embedded_BH[None], positions_B[None]))
        sin_dB[: len(sin_dB) // 2].neg_()  # the sign of the first half of a rotation
        hidden_HB = embedded_BH.t().contiguous()
        for layer in self.layers:
            hidden_HB = layer.step(hidden_HB, cos_dB, sin_dB, cache, attend)
        return self.head(self.norm(hidden_HB)).t().contiguous()


class _Layer:
    def __init__(self, layer: Any) -> None:
        attention = layer.self_attn
        self.index, self.scaling, self.head_dim = attention.layer_idx, attention.scaling, attention.head_dim
        *inputs, output, gate, up, down = linears(layer)
        self.inputs = _Product(inputs)
        self.output, self.gate, self.up, self.down = (_Product([linear]) for linear in (output, gate, up, down))
        self.sizes = [linear.out_features // self.head_dim for linear in inputs]  # heads of queries, keys, values
        self.attention_norm, self.mlp_norm = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        head_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]  # Qwen3's
        self.head_norms = [_Norm(norm) for norm in head_norms if norm is not None]

    def step(self, hidden_HB: Tensor, cos_dB: Tensor, sin_dB: Tensor, cache: DynamicCache, attend: Attend) -> Tensor:
        heads = self.inputs(self.attention_norm(hidden_HB)).unflatten(0, (-1, self.head_dim))
        rotated = self._rotated(heads[: self.sizes[0] + self.sizes[1]], cos_dB, sin_dB)
        parts = rotated[: self.sizes[0]], rotated[self.sizes[0] :], heads[-self.sizes[2] :]
        query, key, value = (part.permute(2, 0, 1)[:, :, None] for part in parts)
        keys, values = cache.layers[self.index].update(key, value)
        attended_BN = attend(self.index, query.contiguous(), keys, values, self.scaling).flatten(1)
        hidden_HB = self.output(attended_BN.t()).add_(hidden_HB)
        normed_HB = self.mlp_norm(hidden_HB)
        return self.down(F.silu(self.gate(normed_HB), inplace=True).mul_(self.up(normed_HB))).add_(hidden_HB)

    def _rotated(self, heads: Tensor, cos_dB: Tensor, sin_dB: Tensor) -> Tensor:
        """Queries and keys [heads, d, B] rotated by their positions (arXiv:2104.09864); `sin_dB` has the signs."""
        if self.head_norms:
            parts = heads.split(self.sizes[:2])
            heads = torch.cat([norm(part) for norm, part in zip(self.head_norms, parts, strict=True)])
        return torch.addcmul(heads * cos_dB, heads.roll(self.head_dim // 2, 1), sin_dB)


class _Product:
    """A linear layer, or several with the same input stacked into one, for inputs that are columns."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        weights = [linear.weight.detach() for linear in linears]
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]  # all have one, or none
        self.weight_NK = torch.cat(weights) if len(weights) > 1 else weights[0]
        self.bias_N1 = torch.cat(biases)[:, None] if biases else None

    def __call__(self, x_KB: Tensor) -> Tensor:
        """[N, B]."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(self.weight_NK, x_KB.t(), None, "none", [], "")
        return product if self.bias_N1 is None else product.add_(self.bias_N1)


class _Norm:
    """The root-mean-square norm of [..., features, B] over its features (arXiv:1910.07467)."""

    def __init__(self, norm: Any) -> None:
        self.weight = norm.weight.detach()[:, None]
        self.epsilon = norm.variance_epsilon
        self.mean = torch.full_like(norm.weight, 1 / len(norm.weight))[None]

    def __call__(self, x: Tensor) -> Tensor:
        # A product with a row of 1 / features, because `mean` over the rows of a narrow matrix is slow.
        inverse = (self.mean @ (x * x)).add_(self.epsilon).rsqrt_()
        return (x * inverse).mul_(self.weight)


def linears(layer: Any) -> list[nn.Linear]:
    """Of queries, keys and values; of the attention's output; of gate, up and down."""
    attention, mlp = layer.self_attn, layer.mlp
    inputs = [attention.q_proj, attention.k_proj, attention.v_proj]
    return [own_layer(linear) for linear in (*inputs, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)]


def own_layer(linear: Any) -> nn.Linear:
    """The layer itself, or the one under an adapter that is merged into it."""
    return linear.get_base_layer() if getattr(linear, "merged", False) else linear


def _has_adapter(linear: Any) -> bool:
    """Whether it is peft's sum of a plain layer and an adapter."""
    return type(linear).__module__ == "peft.tuners.lora.layer" and type(linear.get_base_layer()) is nn.Linear
