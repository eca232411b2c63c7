"""Probes find what changes log-probs beyond a threshold, and the noise of a dtype is measured on the model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recurrent_models import small_family
from transformers import AutoModelForCausalLM, RecurrentGemmaConfig

from stateset_lightning.errors import ConfigError, SamplingError
from stateset_lightning.policy import Policy, PolicyConfig, probes


@pytest.mark.parametrize(
    ("difference", "dtype", "temperature", "stops"),
    [
        (9e-4, torch.float32, 1.0, False),
        (2e-3, torch.float32, 1.0, True),
        (2e-3, torch.float32, 0.4, False),  # the temperature divides the logits, and multiplies their error
        (2e-3, torch.float64, 2.0, True),
        (9e-4, torch.bfloat16, 1.0, False),
        (5.0, torch.bfloat16, 1.0, True),
        (float("nan"), torch.float32, 1.0, True),
    ],
)
def test_a_sampler_may_differ_by_float_error_alone(
    make_model: Callable[..., Any], difference: float, dtype: torch.dtype, temperature: float, stops: bool
) -> None:
    limit = probes.sampler_limit(make_model("llama"), dtype, temperature, [5, 6, 7])
    if stops:
        match = r"nats per token, where float error .* Set model\.policy\.scoring to padded"
        with pytest.raises(SamplingError, match=match):
            probes.check_sampler(difference, limit, dtype)
    else:
        probes.check_sampler(difference, limit, dtype)


def test_a_sampler_may_differ_by_more_where_products_of_float32_are_rounded(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    exact, float16 = (probes.sampler_limit(model, dtype, 0.1, [5, 6, 7]) for dtype in (torch.float32, torch.float16))
    try:
        torch.set_float32_matmul_precision("medium")
        bfloat16 = probes.sampler_limit(model, torch.float32, 0.1, [5, 6, 7])
        torch.set_float32_matmul_precision("high")
        assert probes.sampler_limit(model, torch.float32, 0.1, [5, 6, 7]) == float16
        during = []
        assert probes.exact_on(model, "x", lambda _: during.append(torch.get_float32_matmul_precision()) or 0.0) is None
    finally:
        torch.set_float32_matmul_precision("highest")
    assert exact < float16 < bfloat16
    assert set(during) == {"highest"}


def test_the_noise_of_bfloat16_is_that_of_the_model(make_model: Callable[..., Any]) -> None:
    """A model with small weights has less of it than a constant for all models says: 0.025 nats."""
    noises = [probes.float_noise(make_model("llama", initializer_range=scale), torch.bfloat16) for scale in (0.02, 0.2)]
    assert 1e-5 < noises[0] < noises[1] / 2 < 0.05
    assert probes.float_noise(make_model("llama"), torch.float32) == 0


def test_the_noise_is_that_of_the_text_and_the_temperature(tiny_model: Any, tiny_tokenizer: Any) -> None:
    """The bundled model is sure of much of its own task's text, where errors change little."""
    told = [{"role": "user", "content": "What is 8 + 4?"}, {"role": "assistant", "content": "12"}]
    text = tiny_tokenizer.apply_chat_template(told, return_dict=False)
    assert probes.float_noise(tiny_model, torch.bfloat16, text) < 0.7 * probes.float_noise(tiny_model, torch.bfloat16)
    assert probes.float_noise(tiny_model, torch.bfloat16, temperature=0.5) > 1.2 * probes.float_noise(
        tiny_model, torch.bfloat16, temperature=2.0
    )


def test_a_twin_has_each_kind_of_layer_once_and_short_thresholds(make_model: Callable[..., Any]) -> None:
    window = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3, "num_hidden_layers": 6}
    model = make_model(
        "qwen2",
        **window,
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4},
    )
    before = torch.get_rng_state()
    twin = probes.make_twin(model)
    assert twin.config.layer_types == ["full_attention", "sliding_attention"]
    assert twin.config.sliding_window == twin.model.layers[1].self_attn.sliding_window == 8
    assert twin.config.rope_parameters["original_max_position_embeddings"] == 16
    assert type(twin) is type(model)
    assert model.config.sliding_window == 64
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gemma4_text", {"global_head_dim": 8}),
        ("gemma3n_text", {"intermediate_size": [48] * 6, "activation_sparsity_pattern": [0.0] * 6, "laurel_rank": 4}),
    ],
)
def test_layers_that_share_keys_are_on_the_twin_too(
    name: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    kinds = {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3}
    sizes = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 384}
    model = small_family(name, {**kinds, **sizes, **options, "num_kv_shared_layers": 2})
    assert probes.make_twin(model).config.num_kv_shared_layers == 2
    assert Policy(model, PolicyConfig("random")).uses_packed_scoring
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_path_that_is_wrong_beyond_a_threshold_or_raises_vouches_for_nothing(make_model: Callable[..., Any]) -> None:
    model = make_model("llama", max_position_embeddings=1024)

    def wrong_on_a_twin(probed: Any) -> float:
        return 0.0 if probed is model else 0.5

    def raises(probed: Any) -> float:
        raise IndexError("no such layer")

    assert probes.exact_on(model, "a path", lambda probed: 1e-6) is None
    assert "off by 5.0e-01 nats" in str(probes.exact_on(model, "another", wrong_on_a_twin))
    assert probes.exact_on(model, "a third", raises) == "a probe raised IndexError: no such layer"
    assert "nan" in str(probes.exact_on(model, "a fourth", lambda probed: float("nan")))


def test_a_router_that_rounding_tips_in_bfloat16_is_no_fault_of_a_path(make_model: Callable[..., Any]) -> None:
    """The path of a token is another then, far beyond the noise of the others; in float32 nothing tips."""
    model = make_model("llama").to(torch.bfloat16)

    def tips(probed: Any) -> float:
        return 3.0 if probed.dtype == torch.bfloat16 else 1e-6

    def wrong(probed: Any) -> float:
        return 3.0 if probed.dtype == torch.bfloat16 else 2e-3 if probed is model else 0.0

    assert probes.exact_on(model, "a path", tips) is None
    assert "off by 2.0e-03 nats" in str(probes.exact_on(model, "another", wrong))
    assert model.dtype == torch.bfloat16


def test_rows_that_depend_on_their_neighbours_are_scored_alone(
    make_model: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model("gemma2")

    def leaks(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        output.last_hidden_state = output.last_hidden_state + 0.1 * (kwargs["input_ids"].shape[0] - 1)

    model.model.register_forward_hook(leaks, with_kwargs=True)
    policy = Policy(model, PolicyConfig("random", scoring="padded"))
    assert policy.scores_alone
    assert "scored a completion at a time: in a probe its log-probs were off" in caplog.text


def test_a_soft_cap_of_another_name_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes the small logits of these weights by less than a probe allows for, and larger ones by more."""
    sizes = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 32, "lru_width": 32}
    config = RecurrentGemmaConfig(**sizes, num_attention_heads=2, head_dim=16, logits_soft_cap=30.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    assert Policy(model, PolicyConfig("random")).uses_chunked_head
    monkeypatch.setattr("stateset_lightning.policy.policy.softcap", lambda config: None)  # as if nobody knew this name
    probes._vouched.clear()
    assert not Policy(model, PolicyConfig("random")).uses_chunked_head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_scoring_of_experts_that_is_wrong_is_not_used(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when completions were packed without the places that they stand at."""
    options = {"num_experts_per_tok": 2, "num_experts": 8, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    assert Policy(small_family("qwen3_moe", options).to(dtype), PolicyConfig("random")).uses_packed_scoring
    forward = Policy._forward

    def misplaced(self: Policy, ids: Any, sources: Any, **arguments: Any) -> Any:
        arguments["position_ids"] = torch.arange(ids.shape[1]).expand(ids.shape)
        return forward(self, ids, sources, **arguments)

    monkeypatch.setattr(Policy, "_forward", misplaced)
    assert not Policy(small_family("qwen3_moe", options).to(dtype), PolicyConfig("random")).uses_packed_scoring
    assert "in a probe its log-probs were off by" in caplog.text


def draws(module: Any, args: Any, kwargs: Any, output: Any) -> None:
    output.logits = output.logits + torch.randn_like(output.logits)


def raises_beyond_a_chunk(module: Any, args: Any, kwargs: Any, output: Any) -> None:
    if kwargs["input_ids"].shape[-1] > 16:
        raise RuntimeError("expected m1 and m2 to have the same dtype")


@pytest.mark.parametrize(
    ("hook", "dtype", "match"),
    [
        (
            draws,
            torch.float32,
            "random: LlamaForCausalLM gives other log-probs at each call .* draws random numbers also",
        ),
        (
            raises_beyond_a_chunk,
            torch.float32,
            "LlamaForCausalLM does not run in float32 on text alone .* RuntimeError.*: use another",
        ),
        (
            raises_beyond_a_chunk,
            torch.bfloat16,
            r"LlamaForCausalLM does not run in bfloat16 .*trainer\.precision=32-true",
        ),
    ],
)
def test_a_model_whose_own_forward_cannot_be_relied_on_is_refused(
    make_model: Callable[..., Any], hook: Callable[..., None], dtype: torch.dtype, match: str
) -> None:
    model = make_model("llama").to(dtype)
    model.register_forward_hook(hook, with_kwargs=True)
    with pytest.raises(ConfigError, match=match) as caught:
        Policy(model, PolicyConfig("random"))
    assert "\n" not in str(caught.value)


def test_a_model_that_draws_beyond_a_threshold_is_refused() -> None:
    """Reformer's hash buckets; its chunks are longer than the probe of the real weights, and those of its twin not."""
    layers = {"attn_layers": ["local", "lsh"], "local_attn_chunk_length": 80, "lsh_attn_chunk_length": 80}
    sizes = {"axial_pos_embds": False, "attention_head_size": 8, "feed_forward_size": 48, "is_decoder": True}
    with pytest.raises(ConfigError, match=r"Reformer.* gives other log-probs at each call for the same tokens"):
        Policy(small_family("reformer", {**layers, **sizes}), PolicyConfig("random"))
