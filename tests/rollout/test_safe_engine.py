"""Families whose layers the fast engine does not know: sampled by transformers' own decoding, scored, trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from module_runs import fit, make_data, make_module
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from stateset_lightning.errors import ConfigError, SamplingError
from stateset_lightning.policy import Group, Policy, PolicyConfig
from stateset_lightning.policy.probes import own_logprobs
from stateset_lightning.rollout import FinishReason, InProcessEngine, RolloutConfig

SIZES = {
    "vocab_size": 384,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "initializer_range": 0.2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
GATED = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
RECURRENT: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {**GATED, **LINEAR},
    "qwen3_next": {**GATED, **LINEAR, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": {**MAMBA, "mamba_n_heads": 4, "mamba_d_ssm": 32},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "mamba2": {"state_size": 8, "num_heads": 8, "n_groups": 1},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"],
        **{"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1},
        **{"moe_intermediate_size": 16, "n_routed_experts": 4},
    },
}
UNSHARED: dict[str, dict[str, Any]] = {
    "diffllama": {},
    "deepseek_v3": {**LATENT, **ROUTED, **EXPERTS},
    "jetmoe": {"num_local_experts": 2, "num_experts_per_tok": 2, "kv_channels": 8},
}
WARNINGS = {"recurrent": "is sampled by transformers' own decoding", "unshared": "is sampled without sharing prompts"}
LONG = [3 + 17 * i * i % 300 for i in range(260)]  # beyond every threshold of sharing
PROMPTS = [LONG, [8, 9, 11]]


def family(name: str, changes: dict[str, Any] | None = None) -> Any:
    """A small model; `changes` to its configuration, of those that are in none of the tables above."""
    config = CONFIG_MAPPING[name](**{**SIZES, **((RECURRENT | UNSHARED)[name] if changes is None else changes)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def varied(turns: Any, context: Any) -> float:
    return sum(map(ord, turns[-1].content)) % 7 / 7


@pytest.fixture(params=[*RECURRENT, *UNSHARED])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_family_is_sampled_and_scored_as_its_own_forward_does(
    name: str, tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine, policy = InProcessEngine(tiny_tokenizer), Policy(family(name), PolicyConfig("random"))
    engine.sync(policy)
    sampling = RolloutConfig(max_new_tokens=6)
    own, greedy = family(name), engine.generate(PROMPTS, 1, sampling, [0, 1], greedy=True)
    for prompt, completion in zip(PROMPTS, greedy.completions(), strict=True):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        expected = own.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert completion == expected[0, len(prompt) :].tolist()
    sampled = engine.generate(PROMPTS, 2, sampling, range(4))
    groups = [Group(prompt, sampled.completions()[2 * p : 2 * p + 2]) for p, prompt in enumerate(PROMPTS)]
    scored_T, _ = policy.score_without_gradient(groups)
    expected_N = []
    for prompt, completion in zip([LONG, LONG, *PROMPTS[1:] * 2], sampled.completions(), strict=True):
        with torch.no_grad():
            logprobs = own(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0].log_softmax(-1)
        expected_N.append(logprobs[len(prompt) - 1 : -1].gather(-1, torch.tensor(completion)[:, None])[:, 0])
    torch.testing.assert_close(scored_T, torch.cat(expected_N), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        sampled.logprobs_T, scored_T, atol=1e-3, rtol=0
    )  # cached states have rounding of their own
    engine.check(sampled, 1.0)
    announced = [
        record for record in caplog.messages if WARNINGS["recurrent" if name in RECURRENT else "unshared"] in record
    ]
    assert len(announced) == 1


def test_a_family_trains_for_two_steps(name: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    family(name).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    sampling = RolloutConfig(num_generations=4, max_new_tokens=3)
    module = make_module(str(tmp_path / "model"), rollout=sampling, reward=varied)
    trainer = fit(tmp_path, module, make_data(batch_size=2, validation=None))
    assert trainer.global_step == 2
    assert module.metrics.last["policy/sampling_difference"] < 1e-4


def test_completions_follow_their_seeds_and_end_like_those_of_the_fast_engine(
    make_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise, log-probs, stop strings, finish reasons and reports, whatever rows are decoded at a time."""
    prompts, ends = [[20, 31, 42], [53, 64, 75, 86]], [1, *range(320, 360)]
    stop = [tiny_tokenizer.decode([100])]

    def sample(rows: int) -> tuple[Any, ...]:
        model = make_model("llama")
        model.generation_config.eos_token_id = ends
        model.generation_config.repetition_penalty = 5.0  # of `generate`, and no part of the policy
        engine, reported = InProcessEngine(tiny_tokenizer), []
        engine.sync(Policy(model, PolicyConfig("random")))
        sampling = RolloutConfig(max_new_tokens=5, stop=stop, top_k=50, temperature=1.5, max_batch_rows=rows)
        rollout = engine.generate(prompts, 6, sampling, range(12), on_finished=lambda *done: reported.append(done))
        assert model.generation_config.repetition_penalty == 5.0
        return rollout, sorted(reported)

    fast, fast_reports = sample(256)
    assert set(fast.finish_reasons) == {FinishReason.STOP, FinishReason.LENGTH}
    monkeypatch.setattr("stateset_lightning.rollout.in_process.batch_kinds", lambda *_: [])
    for rows in (256, 4, 1):
        safe, reports = sample(rows)
        assert reports == fast_reports
        assert (safe.completions(), safe.finish_reasons, safe.texts) == (
            *(fast.completions(), fast.finish_reasons, fast.texts),
        )
        torch.testing.assert_close(safe.logprobs_T, fast.logprobs_T, atol=1e-5, rtol=0)


def test_a_cache_that_is_not_exact_is_not_used(
    tiny_tokenizer: Any, make_model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a model whose decoding with a cache is another than its forward: RWKV of transformers 5.23, say."""
    model = make_model("llama")

    def worse_with_cache(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if kwargs.get("use_cache"):
            output.logits = output.logits.roll(1, -1)

    model.register_forward_hook(worse_with_cache, with_kwargs=True)
    policy, engine = Policy(model, PolicyConfig("random")), InProcessEngine(tiny_tokenizer)
    engine.sync(policy)
    rollout = engine.generate([[20, 31, 42]], 2, RolloutConfig(max_new_tokens=5), [0, 1])
    scored_T, _ = policy.score_without_gradient([Group([20, 31, 42], rollout.completions())])
    torch.testing.assert_close(rollout.logprobs_T, scored_T, atol=1e-5, rtol=0)
    assert "is sampled without a cache, a whole forward per token" in caplog.text


def test_a_family_counts_positions_as_its_own_forward_does(tiny_tokenizer: Any, caplog: Any) -> None:
    """RoBERTa's begin behind the number of the padding token."""
    changes = {"is_decoder": True, "pad_token_id": 2}
    policy, engine = Policy(family("camembert", changes), PolicyConfig("random")), InProcessEngine(tiny_tokenizer)
    engine.sync(policy)
    prompts = [[20, 31, 42, 53, 64, 75, 86], [9, 8]]
    rollout = engine.generate(prompts, 1, RolloutConfig(max_new_tokens=6), [0, 1])
    groups = [Group(prompt, [tokens]) for prompt, tokens in zip(prompts, rollout.completions(), strict=True)]
    scored_T, _ = policy.score_without_gradient(groups)
    own = family("camembert", changes)
    rows = [own_logprobs(own, [*each.prompt, *each.completions[0]])[len(each.prompt) - 1 : -1] for each in groups]
    expected_T = torch.cat(rows).gather(-1, rollout.completion_tokens_T[:, None])[:, 0].detach()
    torch.testing.assert_close(scored_T, expected_T, atol=1e-5, rtol=0)
    torch.testing.assert_close(rollout.logprobs_T, expected_T, atol=1e-5, rtol=0)
    assert "scored a completion at a time" in caplog.text


def test_an_encoder_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"random is no causal language model: .* set `is_decoder` to true"):
        Policy(family("camembert", {"is_decoder": False}), PolicyConfig("random"))


@pytest.mark.parametrize("run", ["validate", "predict"])
def test_evaluation_compares_sampling_with_scoring(tmp_path: Path, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from module_runs import make_trainer

    generate = InProcessEngine.generate

    def shifted(*args: Any, **kwargs: Any) -> Any:
        rollout = generate(*args, **kwargs)
        return replace(rollout, logprobs_T=rollout.logprobs_T + 0.01)

    monkeypatch.setattr(InProcessEngine, "generate", shifted)
    trainer, data = make_trainer(tmp_path, limit_val_batches=1), make_data(predict=[{"prompt": "What is 1 + 1?"}])
    with pytest.raises(SamplingError, match=r"differ by 0\.01 nats per token"):
        getattr(trainer, run)(make_module(), datamodule=data)
