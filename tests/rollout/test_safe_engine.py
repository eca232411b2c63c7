"""Families of other kinds than Llama's, sampled, scored and trained; and transformers' own decoding, by which those are
sampled that the fast engine does not know.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from module_runs import fit, make_data, make_module
from recurrent_models import EXPERTS, LINEAR, RECURRENT, small_family

from stateset_lightning.errors import ConfigError, SamplingError
from stateset_lightning.policy import Group, Policy, PolicyConfig
from stateset_lightning.policy.probes import own_logprobs
from stateset_lightning.rollout import FinishReason, InProcessEngine, RolloutConfig

LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
UNSHARED: dict[str, dict[str, Any]] = {
    "diffllama": {},
    "deepseek_v3": {**LATENT, **ROUTED, **EXPERTS},
    "jetmoe": {"num_local_experts": 2, "num_experts_per_tok": 2, "kv_channels": 8},
}
OWN_CACHE: dict[str, dict[str, Any]] = {"minimax": {**LINEAR, **EXPERTS, "num_local_experts": 2, "block_size": 8}}
FAMILIES = RECURRENT | UNSHARED | OWN_CACHE
ANNOUNCED = {
    **dict.fromkeys(UNSHARED, "is sampled without sharing prompts"),
    **dict.fromkeys(OWN_CACHE, "is sampled by transformers' own decoding"),
}
LONG = [3 + 17 * i * i % 300 for i in range(260)]  # beyond every threshold of sharing
PROMPTS = [LONG, [8, 9, 11]]


def family(name: str) -> Any:
    return small_family(name, FAMILIES[name])


def announced(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if "is sampled" in message]


def varied(turns: Any, context: Any) -> float:
    return sum(map(ord, turns[-1].content)) % 7 / 7


@pytest.fixture(params=[*FAMILIES])
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
    assert [ANNOUNCED[name] in message for message in announced(caplog)] == [True] * (name in ANNOUNCED)


def test_a_family_trains_for_two_steps(
    name: str, tiny_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family(name).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    sampling = RolloutConfig(num_generations=4, max_new_tokens=3)
    module = make_module(str(tmp_path / "model"), rollout=sampling, reward=varied)
    trainer = fit(tmp_path, module, make_data(batch_size=2, validation=None))
    assert trainer.global_step == 2
    assert module.metrics.last["policy/sampling_difference"] < 1e-4
    assert name not in RECURRENT or not announced(caplog)  # by the fast engine


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
    monkeypatch.setattr("stateset_lightning.rollout.in_process.batch_kinds", lambda *_: ())
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
    policy, engine = Policy(small_family("camembert", changes), PolicyConfig("random")), InProcessEngine(tiny_tokenizer)
    engine.sync(policy)
    prompts = [[20, 31, 42, 53, 64, 75, 86], [9, 8]]
    rollout = engine.generate(prompts, 1, RolloutConfig(max_new_tokens=6), [0, 1])
    groups = [Group(prompt, [tokens]) for prompt, tokens in zip(prompts, rollout.completions(), strict=True)]
    scored_T, _ = policy.score_without_gradient(groups)
    own = small_family("camembert", changes)
    rows = [own_logprobs(own, [*each.prompt, *each.completions[0]])[len(each.prompt) - 1 : -1] for each in groups]
    expected_T = torch.cat(rows).gather(-1, rollout.completion_tokens_T[:, None])[:, 0].detach()
    torch.testing.assert_close(scored_T, expected_T, atol=1e-5, rtol=0)
    torch.testing.assert_close(rollout.logprobs_T, expected_T, atol=1e-5, rtol=0)
    assert "scored a completion at a time" in caplog.text


def test_an_encoder_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"random is no causal language model: .* set `is_decoder` to true"):
        Policy(small_family("camembert", {"is_decoder": False}), PolicyConfig("random"))


def test_a_forward_that_raises_in_the_dtype_of_sampling_is_refused(tiny_tokenizer: Any, make_model: Any) -> None:
    """Of a model that was sound when it was loaded, and is cast for sampling or by the Trainer."""
    model = make_model("llama")

    def raises_in_bfloat16(module: Any, *given: Any) -> None:
        if model.dtype == torch.bfloat16:
            raise RuntimeError("expected m1 and m2 to have the same dtype")

    model.model.layers[0].register_forward_hook(raises_in_bfloat16)
    engine = InProcessEngine(tiny_tokenizer, torch.bfloat16)
    engine.sync(Policy(model, PolicyConfig("random")))
    with pytest.raises(ConfigError, match=r"random: LlamaForCausalLM does not run in bfloat16 on text alone"):
        engine.generate([[20, 31, 42]], 2, RolloutConfig(max_new_tokens=2), [0, 1])


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
