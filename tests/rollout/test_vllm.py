"""The vLLM engine against a stub that answers as a recorded server did, with a real model behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from module_runs import SCENARIOS, fit, make_data, make_module
from vllm_stub import PROMPTS, SAMPLING, SEEDS, TOKENIZER, Running, adapted, running, synced_engine

from stateset_lightning.algorithm import DPPO
from stateset_lightning.errors import ConfigError, NonFiniteError, ServerError
from stateset_lightning.policy import LoRAConfig, PolicyConfig
from stateset_lightning.ranks import Ranks
from stateset_lightning.rollout import InProcessEngine, RolloutConfig, VLLMEngine


@pytest.mark.parametrize(
    "sampling", [SAMPLING, RolloutConfig(num_generations=2, max_new_tokens=6, stop=["1", "4"])], ids=["plain", "stop"]
)
def test_a_rollout_is_what_the_in_process_engine_gives(server: Running, sampling: RolloutConfig) -> None:
    """The stub samples as that engine does, from the adapter that was handed over: all else must be the same, too."""
    policy, finished = adapted(), {}
    engine = synced_engine(server, policy, sampling)
    rollout = engine.generate(
        PROMPTS, 2, sampling, SEEDS, on_finished=lambda n, text, count: finished.update({n: (text, count)})
    )
    other = InProcessEngine(TOKENIZER)
    other.sync(policy)
    wanted = other.generate(PROMPTS, 2, sampling, SEEDS)
    assert rollout.completions() == wanted.completions()
    assert (rollout.texts, rollout.finish_reasons, rollout.prompt_tokens) == (
        wanted.texts,
        wanted.finish_reasons,
        PROMPTS,
    )
    assert rollout.lengths_N.tolist() == wanted.lengths_N.tolist()
    assert rollout.sampled_T.tolist() == [True] * len(rollout.completion_tokens_T)
    # a row alone, and among others
    torch.testing.assert_close(rollout.logprobs_T, wanted.logprobs_T, atol=1e-4, rtol=0)
    assert finished == {
        n: (text, len(tokens)) for n, (text, tokens) in enumerate(zip(wanted.texts, wanted.completions(), strict=True))
    }


def test_what_a_completion_request_says(server: Running) -> None:
    engine = synced_engine(server, adapted())
    engine.generate(PROMPTS, 2, RolloutConfig(max_new_tokens=5, top_p=0.9, stop=["x"]), SEEDS)
    engine.generate(PROMPTS[:1], 1, SAMPLING, SEEDS[:1], greedy=True)
    *sampled, greedy = server.stub.samples()
    by_seed = {body["seed"]: body for body in sampled}
    assert [by_seed[seed]["prompt"] for seed in SEEDS] == [PROMPTS[n // 2] for n in range(6)]
    (adapter,) = server.stub.adapters
    # All that a model's generation_config.json would decide otherwise.
    told = {
        "temperature": 1.0,
        "top_p": 0.9,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
    }
    told |= {
        "frequency_penalty": 0.0,
        "model": adapter,
        "max_tokens": 5,
        "logprobs": 0,
        "return_token_ids": True,
        "stop_token_ids": [1],
    }
    told |= {
        "stop": ["x"],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "prompt": PROMPTS[0],
        "seed": 11,
        "cache_salt": f"{adapter}-1",
    }
    assert by_seed[11] == told
    assert (greedy["temperature"], "stop" in greedy) == (0.0, False)


def test_prompts_are_dealt_out_to_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(running()) for _ in range(2)]
        engine = VLLMEngine([server.url for server in servers])
        engine.setup(TOKENIZER, SAMPLING)
        engine.sync(adapted())
        rollout = engine.generate(PROMPTS, 2, SAMPLING, SEEDS)
        asked = [sorted(body["seed"] for body in server.stub.samples()) for server in servers]
        assert asked == [sorted(SEEDS[:2] + SEEDS[4:]), sorted(SEEDS[2:4])]  # whole groups
        assert servers[0].stub.adapters == servers[1].stub.adapters != {}
        assert len(rollout.texts) == 6
        for rank in range(2):  # with one prompt on each device, all of them would go to the first server
            monkeypatch.setattr(Ranks, "current", lambda rank=rank: Ranks(rank, 2))
            engine.generate(PROMPTS[:1], 1, SAMPLING, [70 + rank])
        assert [server.stub.samples()[-1]["seed"] for server in servers] == [70, 71]


def test_what_no_server_can_do_is_refused(server: Running) -> None:
    with pytest.raises(
        ConfigError, match=r"model.rollout.temperature=0.7 with top_k=5, min_p=0.1: vLLM's log-probs are either"
    ):
        VLLMEngine([server.url]).setup(TOKENIZER, RolloutConfig(temperature=0.7, top_k=5, min_p=0.1))
    VLLMEngine([server.url]).setup(TOKENIZER, RolloutConfig(temperature=0.7, top_p=1.0))
    with pytest.raises(ConfigError, match="'localhost:8000' is no address"):
        VLLMEngine(["localhost:8000"])
    for urls in ([], server.url):
        with pytest.raises(ConfigError, match="must be a list of addresses"):
            VLLMEngine(urls)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"model.engine.request_timeout=0 must be above 0"):
        VLLMEngine([server.url], request_timeout=0)
    engine = synced_engine(server, adapted())
    with pytest.raises(
        ConfigError, match=r"a prompt of 510 tokens and .*=6 exceed the server's --max-model-len of 512"
    ):
        engine.generate([[5] * 510], 2, SAMPLING, SEEDS[:2])


def answer(*logprobs: float | None) -> tuple[int, dict[str, Any]]:
    tokens = [5] * (len(logprobs) - 1) + [1]
    return 200, {"choices": [{"finish_reason": "stop", "token_ids": tokens, "logprobs": {"token_logprobs": logprobs}}]}


def test_a_token_without_a_logprob_is_no_reason_to_stop(server: Running) -> None:
    engine = synced_engine(server, adapted())
    # The last is what vLLM's API makes of -inf and, in places, of NaN.
    server.stub.answers = [answer(-1.0, None, math.nan, -math.inf, -9999.0), answer(-1.5, -1.25, -0.5, -0.25)]
    rollout = engine.generate(PROMPTS[:1], 2, RolloutConfig(max_new_tokens=6, max_batch_rows=1), SEEDS[:2])
    wanted_T = torch.tensor([-1, math.nan, math.nan, math.nan, math.nan, -1.5, -1.25, -0.5, -0.25])
    torch.testing.assert_close(rollout.logprobs_T, wanted_T, equal_nan=True)


def test_a_run_trains_on_tokens_without_a_logprob(server: Running, tmp_path: Path) -> None:
    module = make_module(
        PolicyConfig("tiny", lora=LoRAConfig(rank=2)),
        engine=VLLMEngine([server.url]),
        rollout=RolloutConfig(num_generations=2, max_new_tokens=8, max_batch_rows=1),
        algorithm=DPPO(),  # its ratio is to the sampler; others take it for a correction
    )
    complete, asked = server.stub.complete, iter(range(1000))

    def without(body: dict[str, Any]) -> tuple[int, Any]:
        status, content = complete(body)
        if "n" not in body and next(asked) % 4 == 0:  # no probe
            content["choices"][0]["logprobs"]["token_logprobs"][0] = None
        return status, content

    server.stub.complete = without  # type: ignore[method-assign]
    fit(tmp_path, module, make_data(train=SCENARIOS[:4], batch_size=4, validation=None), max_steps=1)
    last = module.metrics.last
    assert 0.05 < last["mismatch/unknown"] < 0.5
    assert last["policy/bad_steps"] == 0
    assert last["policy/grad_norm"] > 0
    assert last["policy/sampling_difference"] < 1e-4
    assert last["mismatch/kl"] < 1e-4


def test_too_many_tokens_without_a_logprob_end_the_run(server: Running) -> None:
    engine = synced_engine(server, adapted())
    for missing, stops in ((1, False), (10, False), (11, True), (20, True)):
        server.stub.answers = [answer(*[None] * missing, *[-1.0] * (20 - missing))]
        said = rf"{server.url} \(model.engine.urls\) knows no log-prob for {missing} of 20 tokens, NaN, null or -inf"
        with pytest.raises(NonFiniteError, match=said) if stops else nullcontext():
            engine.generate(PROMPTS[:1], 1, RolloutConfig(max_new_tokens=20), SEEDS[:1])
    server.stub.answers = [answer(None)]  # one token says nothing of the weights
    engine.generate(PROMPTS[:1], 1, RolloutConfig(max_new_tokens=20), SEEDS[:1])


@pytest.mark.parametrize(("missing", "stops"), [([3, 9], False), (range(32), True)])
def test_a_sync_compares_the_logprobs_that_are_known(
    server: Running, monkeypatch: pytest.MonkeyPatch, missing: Sequence[int], stops: bool
) -> None:
    answered = server.stub.complete

    def without(body: dict[str, Any]) -> tuple[int, Any]:
        status, content = answered(body)
        for place in missing:
            content["choices"][place // 8]["logprobs"]["token_logprobs"][place % 8] = None
        return status, content

    monkeypatch.setattr(server.stub, "complete", without)
    with pytest.raises(NonFiniteError, match="knows no log-prob for 32 of 32 tokens") if stops else nullcontext():
        engine = synced_engine(server, adapted())
        assert 0 <= engine.pop_metrics()["mismatch/after_sync"][0] < 1e-4


def test_special_tokens_end_a_servers_completion_by_number_and_stay_in_the_text_before(server: Running) -> None:
    user, system = TOKENIZER.convert_tokens_to_ids(["<|user|>", "<|system|>"])
    tokens = [system, *TOKENIZER.encode("4"), user]
    choice = {"finish_reason": "stop", "token_ids": tokens, "logprobs": {"token_logprobs": [-1.0] * len(tokens)}}
    engine = synced_engine(server, adapted())
    server.stub.answers = [(200, {"choices": [choice]})]
    rollout = engine.generate(PROMPTS[:1], 1, RolloutConfig(max_new_tokens=5, stop=["<|user|>"]), SEEDS[:1])
    assert rollout.texts == ["<|system|>4"]
    assert server.stub.samples()[-1]["stop_token_ids"] == sorted([TOKENIZER.eos_token_id, user])


def test_a_server_sleeps_while_nobody_samples(server: Running) -> None:
    engine, policy = VLLMEngine([server.url], sleep=True), adapted()
    with pytest.raises(
        ServerError, match=r"/sleep refuses .404.: .*started with VLLM_SERVER_DEV_MODE=1 and --enable-sl"
    ):
        engine.setup(TOKENIZER, SAMPLING)
    server.stub.sleeping = False
    engine.setup(TOKENIZER, SAMPLING)
    assert server.stub.sleeping
    for _ in range(2):  # the second time with the weights that it has
        engine.sync(policy)
        awake = engine.generate(PROMPTS, 2, SAMPLING, SEEDS)
        assert server.stub.sleeping
    assert engine.generate(PROMPTS, 2, SAMPLING, SEEDS).completions() == awake.completions()
    assert engine.generate(PROMPTS, 2, SAMPLING, SEEDS, greedy=True).lengths_N.sum() > 0
    ahead = RolloutConfig(sampling_ahead=1)
    with pytest.raises(ConfigError, match=r"model.engine.sleep=true with sampling_ahead=1 on 1 devices"):
        VLLMEngine([server.url], sleep=True).setup(TOKENIZER, ahead)
