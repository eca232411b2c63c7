"""Decoding on a CPU: the same numbers as the model's own, and no trace of it afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MistralConfig
from vllm_stub import change

from stateset_lightning.errors import ConfigError
from stateset_lightning.policy import Group, LoRAConfig, Policy, PolicyConfig
from stateset_lightning.policy.lora import add_adapter, merge_adapter
from stateset_lightning.policy.precision import LOGPROB_TOLERANCE
from stateset_lightning.rollout import InProcessEngine, RolloutConfig, cpu_decoding
from stateset_lightning.rollout.cpu_decoding import (
    MAX_ROWS,
    LlamaDecoder,
    has_llama_layers,
    is_supported,
    prepacked_linears,
)
from stateset_lightning.rollout.probe import difference_of_decoding
from stateset_lightning.rollout.running_batch import RunningBatch, SharingBatch

# Linear layers with weights in oneDNN's layout -----------------------------------------------------------------------


def make_layers() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    layers = nn.Sequential(nn.Linear(48, 32), nn.SiLU(), nn.Linear(32, 24, bias=False))
    for parameter in layers.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return layers


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 5, 16, MAX_ROWS, MAX_ROWS + 1, 200])
def test_outputs_are_those_of_the_stock_layers(rows: int) -> None:
    layers = make_layers()
    x = torch.randn(rows, 1, 48, generator=torch.Generator().manual_seed(1))
    expected = layers(x)
    with prepacked_linears(layers, num_rows=16):
        assert "forward" in vars(layers[0])
        torch.testing.assert_close(layers(x), expected, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_the_stock_forward_comes_back_after_an_error() -> None:
    layers = make_layers()
    with pytest.raises(KeyError), prepacked_linears(layers, num_rows=4):
        raise KeyError
    assert all("forward" not in vars(layer) for layer in layers)
    layers[0].weight.data.zero_()
    layers[0].bias.data.zero_()
    assert layers(torch.ones(1, 48)).abs().max() == 0  # and sees the weights as they are now


@torch.no_grad()
def test_other_layers_and_precisions_are_left_alone() -> None:
    class Adapted(nn.Linear):
        pass

    layers = nn.Sequential(Adapted(8, 8), nn.Linear(8, 8))
    with prepacked_linears(layers, num_rows=4):
        assert "forward" not in vars(layers[0])
        assert "forward" in vars(layers[1])
    assert not is_supported(make_layers().to(torch.bfloat16))
    with prepacked_linears(half := make_layers().to(torch.bfloat16), num_rows=4):
        assert "forward" not in vars(half[0])


# The decoder of Llama-like models: the model's own logits, and only for models that are made of its layer ------------

KNOWN = ["llama", "qwen2", "qwen3"]
PROMPTS = [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12]]


def policy_model(model: Any) -> Any:
    return Policy(model, PolicyConfig("tiny")).model


def mistral(window: int | None) -> Any:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    config = MistralConfig(vocab_size=384, sliding_window=window, initializer_range=0.2, pad_token_id=0, **sizes)
    return policy_model(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval())


@torch.no_grad()
@pytest.mark.parametrize("kind", [RunningBatch, SharingBatch])
@pytest.mark.parametrize("name", KNOWN)
def test_logits_are_the_models_for_rows_that_come_and_go(
    make_model: Callable[..., Any], name: str, kind: type[RunningBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged prompts, rows that leave, rows that join: the padding, positions and caches of both are the same."""
    biases = {"attention_bias": True, "mlp_bias": True} if name == "llama" else {}
    model = policy_model(make_model(name, **biases))
    assert has_llama_layers(model)
    decoder = LlamaDecoder(model)
    batches = [kind(model, 12), kind(model, 12, decoder)]
    generator = torch.Generator().manual_seed(0)

    def steps(count: int) -> None:
        for _ in range(count):
            tokens_B = torch.randint(3, 384, (len(batches[0]),), generator=generator)
            for batch in batches:
                batch.step(tokens_B)
            torch.testing.assert_close(batches[1].logits_BV, batches[0].logits_BV, rtol=1e-5, atol=2e-5)

    for batch in batches:
        batch.admit(PROMPTS[:2], [0, 0, 1, 1])
    steps(4)
    for batch in batches:
        batch.keep(torch.tensor([1, 2]))
    steps(2)
    for batch in batches:
        batch.admit(PROMPTS[2:], [0, 0])
    steps(3)
    monkeypatch.setattr(type(model), "forward", None)  # the second batch does not need it
    batches.pop(0)
    batches[0].step(torch.tensor([3, 4, 5, 6]))


@torch.no_grad()
def test_a_merged_adapter_is_part_of_the_weights_and_another_is_not_known(adapted_policy: Policy) -> None:
    policy, model = adapted_policy, adapted_policy.model
    assert not has_llama_layers(model)
    with policy.merged_adapter():
        assert has_llama_layers(model)
        assert difference_of_decoding(RunningBatch, model, decodes=True) < 1e-4
    assert difference_of_decoding(RunningBatch, model, decodes=True) > 1e-2  # the adapter does something


@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
def test_other_architectures_are_not_known(make_model: Callable[..., Any], name: str) -> None:
    assert not has_llama_layers(policy_model(make_model(name)))


def test_windows_other_precisions_and_watched_modules_are_not_known(make_model: Callable[..., Any]) -> None:
    assert has_llama_layers(mistral(None))
    assert not has_llama_layers(mistral(8))
    assert not is_supported(policy_model(make_model("llama")).to(torch.bfloat16))
    watched = policy_model(make_model("llama"))
    handle = watched.model.layers[1].mlp.register_forward_hook(lambda *args: None)
    assert not has_llama_layers(watched)
    handle.remove()
    assert has_llama_layers(watched)
    assert not has_llama_layers(policy_model(make_model("llama", hidden_act="gelu")))


def test_code_that_is_not_transformers_own_is_not_known(make_model: Callable[..., Any]) -> None:
    """A model's own code may say "llama" and compute something else, which weights near zero would not show."""
    model = make_model("llama")
    model.__class__ = type("LlamaForCausalLM", (type(model),), {"__module__": "modeling_own"})
    assert not has_llama_layers(policy_model(model))


def test_a_model_that_computes_something_else_is_found_by_the_probe(
    make_model: Callable[..., Any], tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """One whose attention has been replaced by its owner, say: it is sampled as it is."""
    policy = Policy(make_model("llama"), PolicyConfig("tiny"))
    attention = policy.model.model.layers[0].self_attn
    stock = attention.forward
    attention.forward = lambda *args, **kwargs: (0.5 * stock(*args, **kwargs)[0], None)
    assert has_llama_layers(policy.model)
    assert min(forwards(policy, InProcessEngine(tiny_tokenizer), 2)) > 5  # a token each
    assert "is sampled by its own forward, which is slower: in a probe its log-probs were off by" in caplog.text


def test_the_engine_decodes_with_it_and_probes_once(
    make_model: Callable[..., Any], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, engine = Policy(make_model("qwen2"), PolicyConfig("tiny")), InProcessEngine(tiny_tokenizer)
    assert forwards(policy, engine, 3) == [11, 1, 1]  # the prefill, and those of the probes
    monkeypatch.setattr(cpu_decoding, "MODEL_TYPES", ())
    assert min(forwards(policy, engine, 2)) > 5


def forwards(policy: Policy, engine: InProcessEngine, times: int) -> list[int]:
    """How often the model's forward runs in each of several samplings."""
    calls = []
    forward = policy.model.forward
    policy.model.forward = lambda *args, **kwargs: calls.append(0) or forward(*args, **kwargs)
    counts = []
    for _ in range(times):
        calls.clear()
        engine.sync(policy)
        engine.generate([[3, 4, 5], [6, 7]], 2, RolloutConfig(max_new_tokens=8), range(4))
        counts.append(len(calls))
    del policy.model.forward
    return counts


# Quantized weights ----------------------------------------------------------------------------------------------------


class Packed(nn.Linear):
    """As bitsandbytes' layers: a linear layer whose weights are bytes of another shape."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.scale = float(linear.weight.detach().abs().max()) / 127
        codes = (linear.weight.detach() / self.scale).round().add(128).to(torch.uint8)
        self.weight = nn.Parameter(codes.view(-1, 1), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.view(self.out_features, self.in_features).to(x.dtype).sub(128) * self.scale
        return nn.functional.linear(x, weight, self.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_packed_weights_are_not_read_as_if_they_were_plain(
    make_model: Callable[..., Any], tiny_tokenizer: Any, targets: Any, dtype: torch.dtype
) -> None:
    """Under an adapter or without one."""
    model = make_model("qwen2").to(dtype)
    for name, linear in list(model.model.named_modules()):
        if type(linear) is nn.Linear:
            model.model.set_submodule(name, Packed(linear))
    add_adapter(model, lora := LoRAConfig(rank=4, target_modules=targets), seed=0)
    policy, engine = Policy(model, PolicyConfig("tiny", lora=lora)), InProcessEngine(tiny_tokenizer)
    change(policy)
    assert policy.scoring == "packed"
    engine.sync(policy)
    sample = engine.generate(PROMPTS, 2, RolloutConfig(max_new_tokens=8), list(range(6)))
    rows = [tokens.tolist() for tokens in sample.completion_tokens_T.split(sample.lengths_N.tolist())]
    groups = [Group(prompt, rows[2 * i : 2 * i + 2]) for i, prompt in enumerate(PROMPTS)]
    tolerance = LOGPROB_TOLERANCE[dtype]
    scored_T, _ = policy.score(groups)
    assert float((scored_T.detach() - sample.logprobs_T).abs().mean()) < tolerance
    scored_T.sum().backward()  # type: ignore[no-untyped-call]
    trained = {name for name, p in policy.named_parameters() if p.grad is not None}
    assert trained == {f"model.{name}" for name in policy.adapter.names}  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="sits on quantized weights"):
        merge_adapter(model)
