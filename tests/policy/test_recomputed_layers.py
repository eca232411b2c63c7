"""Layers that recompute: the outputs and gradients of those that they replace, and less kept for the backward pass."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from plain_kernels import plain_kernels
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from stateset_lightning.policy.recomputed_layers import use_recomputed_layers

IDS = torch.tensor([[3, 17, 29, 4, 98], [55, 6, 7, 81, 9]])


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    logits = model(IDS).logits.float()
    (logits.log_softmax(-1) * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_model_has_the_same_outputs_and_gradients(make_model: Callable[..., Any], name: str) -> None:
    stock = make_model(name)
    changed = copy.deepcopy(stock)
    layers = stock.config.num_hidden_layers
    norms = {"llama": 2, "qwen2": 2, "qwen3": 4}[name]  # Qwen3 has norms of query and key, too
    assert use_recomputed_layers(changed) == layers * (norms + 1) + 1
    torch.testing.assert_close(changed(IDS).logits, stock(IDS).logits, rtol=1e-5, atol=1e-6)
    expected = gradients(stock)
    for parameter, grad in gradients(changed).items():
        assert relative_difference(grad, expected[parameter]) < 1e-5, parameter
    with torch.no_grad():  # as in sampling
        torch.testing.assert_close(changed(IDS).logits, stock(IDS).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_in_lower_precision_they_differ_by_its_rounding(make_model: Callable[..., Any], precision: str) -> None:
    stock = make_model("qwen2")
    exact = gradients(stock)
    if precision == "bf16-true":
        stock = stock.to(torch.bfloat16)
    changed = copy.deepcopy(stock)
    assert use_recomputed_layers(changed)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        rounded, recomputed = gradients(stock), gradients(changed)
    for name, grad in recomputed.items():
        assert grad.dtype == rounded[name].dtype
        error = relative_difference(rounded[name], exact[name])
        assert relative_difference(grad, exact[name]) < 1.5 * error + 1e-3, name


def saved_floats(module: nn.Module, x: torch.Tensor) -> int:
    """Numbers that a backward pass through the module keeps, each storage once, parameters aside."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    parameters = {p.data_ptr() for p in module.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(x)
    assert output.requires_grad
    return sum(kept.values())


def test_what_is_kept_counted_by_hand(make_model: Callable[..., Any]) -> None:
    tokens, hidden, inner = 10, 64, 256
    x = torch.randn(1, tokens, hidden, generator=torch.Generator().manual_seed(0)).requires_grad_()
    norm = LlamaRMSNorm(hidden)
    assert saved_floats(norm, x) == tokens * (2 * hidden + 1)  # x, x / rms(x), 1 / rms(x)
    use_recomputed_layers(norm)
    assert saved_floats(norm, x) == tokens * (hidden + 1)

    config = make_model("qwen2").config
    config.hidden_size, config.intermediate_size = hidden, inner
    mlp = Qwen2MLP(config)
    assert saved_floats(mlp, x) == tokens * (hidden + 4 * inner)  # x, gate, silu(gate), up, their product
    use_recomputed_layers(mlp)
    assert saved_floats(mlp, x) == tokens * (hidden + 2 * inner)  # x, gate, up
    mlp.down_proj = nn.Sequential(mlp.down_proj)
    assert saved_floats(mlp, x) == tokens * (hidden + 3 * inner)  # no plain layer: it keeps its input


def test_a_layer_keeps_two_fifths_less(make_model: Callable[..., Any]) -> None:
    shape = {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    model = make_model("qwen2", **shape)
    layer, x = model.model.layers[0], torch.randn(1, 64, 512).requires_grad_()
    positions = model.model.rotary_emb(x, torch.arange(64)[None])
    layer.forward = partial(layer.forward, position_embeddings=positions)
    kept = saved_floats(layer, x)
    use_recomputed_layers(layer)
    assert 1 - saved_floats(layer, x) / kept == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize(
    "frozen", [[], ["down_proj.weight"], ["down_proj.weight", "down_proj.bias"], ["gate_proj.weight", "gate_proj.bias"]]
)
def test_biases_and_frozen_weights_of_the_layer_behind_the_gate(
    make_model: Callable[..., Any], frozen: list[str]
) -> None:
    stock = LlamaMLP(make_model("llama", mlp_bias=True).config)
    changed = copy.deepcopy(stock)
    assert use_recomputed_layers(changed) == 1
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for mlp in (stock, changed):
        for name in frozen:
            mlp.get_parameter(name).requires_grad_(False)
        given = x.clone().requires_grad_()
        mlp(given).square().sum().backward()
        found.append({"x": given.grad, **{name: p.grad for name, p in mlp.named_parameters()}})
    for name, grad in found[0].items():
        assert (grad is None) == (name in frozen) == (found[1][name] is None)
        if grad is not None:
            assert relative_difference(found[1][name], grad) < 1e-5, name


def test_hooks_of_the_layer_behind_the_gate_are_called(make_model: Callable[..., Any]) -> None:
    mlp = Qwen2MLP(make_model("qwen2").config)
    use_recomputed_layers(mlp)
    mlp.down_proj.register_forward_hook(lambda module, args, output: output * 0)
    assert not mlp(torch.ones(1, 3, 32)).any()


def test_layers_of_another_form_stay(make_model: Callable[..., Any]) -> None:
    assert use_recomputed_layers(make_model("gpt2")) == 0
    assert use_recomputed_layers(Gemma2RMSNorm(8)) == 0
    config = make_model("qwen2").config
    mlp = Qwen2MLP(config)
    mlp.act_fn = nn.GELU()
    assert use_recomputed_layers(mlp) == 0

    class Shifted(LlamaRMSNorm):
        """Scales by 1 + weight, as Gemma does, under the names of Llama's norm."""

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) * (1 + 1 / self.weight)

    assert use_recomputed_layers(Shifted(8)) == 0


def test_norms_in_float32_beside_other_weights_give_their_models_dtype() -> None:
    """DeepSeek-V4 keeps them so in bfloat16, and rounds after the weight; in float32 the order changes nothing."""

    class RoundsLast(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states.float()).to(hidden_states.dtype)

    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16), RoundsLast(8))
    assert use_recomputed_layers(model) == 0
    assert model(torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert use_recomputed_layers(model.float()) == 1


def test_quantized_layers_stay() -> None:
    """Their weights are packed integers, of another shape than the layer."""
    norm = LlamaRMSNorm(8)
    norm.weight = nn.Parameter(torch.ones(4, dtype=torch.uint8), requires_grad=False)
    assert use_recomputed_layers(norm) == 0


def test_a_copy_has_its_own_weights(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    use_recomputed_layers(model)
    copied = copy.deepcopy(model)
    assert use_recomputed_layers(copied) == 0  # it has them already
    before = model(IDS).logits
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(model(IDS).logits, before)
    assert not copied(IDS).logits.any()


@pytest.mark.parametrize(("dtype", "calls"), [(torch.float32, 1), (torch.bfloat16, 0)])
def test_on_a_gpu_a_float32_norm_is_one_operator(dtype: torch.dtype, calls: int) -> None:
    norm = LlamaRMSNorm(24).to(dtype)
    changed = copy.deepcopy(norm)
    assert use_recomputed_layers(changed) == 1
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    expected = norm(x)
    with plain_kernels(), patch.object(F, "rms_norm", wraps=F.rms_norm) as fused:
        output = changed(x)
    assert fused.call_count == calls
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=0)
    grads = (
        torch.autograd.grad(y.square().sum(), (x, layer.weight)) for y, layer in ((expected, norm), (output, changed))
    )
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0.02 if dtype == torch.bfloat16 else 1e-5)
