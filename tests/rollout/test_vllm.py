"""The vLLM engine against a stub that answers as a recorded server did, with a real model behind it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from timing import within
from vllm_stub import Running, running

from stateset_lightning.errors import ConfigError, SamplingError, ServerError
from stateset_lightning.policy import LoRAConfig, Policy, PolicyConfig, load_model, load_tokenizer
from stateset_lightning.rollout import InProcessEngine, RolloutConfig, VLLMEngine, vllm_weights
from stateset_lightning.rollout import vllm_client as vllm_client_module
from stateset_lightning.rollout.vllm_client import ServerLost, VLLMServer

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]
SAMPLING = RolloutConfig(num_generations=2, max_new_tokens=6, temperature=0.7)
SEEDS = [11, 2**62 + 1, 13, 14, 15, 16]
TOKENIZER = load_tokenizer(PolicyConfig("tiny"))


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_client_module, "FIRST_PAUSE", 0.02)


@pytest.fixture
def server() -> Iterator[Running]:
    with running() as server:
        yield server


@cache
def _adapted() -> tuple[Policy, dict[str, torch.Tensor]]:
    config = PolicyConfig("tiny", lora=LoRAConfig(rank=4))
    policy = Policy(load_model(config), config)
    change(policy)
    return policy, {name: value.clone() for name, value in policy.state_dict().items()}


def adapted() -> Policy:
    """A policy whose adapter is not nothing; the same for each test."""
    policy, weights = _adapted()
    policy.load_state_dict(weights)
    return policy


def change(policy: Policy, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def synced(server: Running, policy: Policy, sampling: RolloutConfig = SAMPLING, **options: Any) -> VLLMEngine:
    engine = VLLMEngine([server.url], **options)
    engine.setup(TOKENIZER, sampling)
    engine.sync(policy)
    return engine


# Sampling ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling", [SAMPLING, RolloutConfig(num_generations=2, max_new_tokens=6, stop=["1", "4"])], ids=["plain", "stop"]
)
def test_a_rollout_is_what_the_in_process_engine_gives(server: Running, sampling: RolloutConfig) -> None:
    """The stub samples as that engine does, from the adapter that was handed over: all else must be the same, too."""
    policy, finished = adapted(), {}
    engine = synced(server, policy, sampling)
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
    engine = synced(server, adapted())
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
        "prompt": PROMPTS[0],
        "seed": 11,
        "cache_salt": f"{adapter}-1",
    }
    assert by_seed[11] == told
    assert (greedy["temperature"], "stop" in greedy) == (0.0, False)


def test_prompts_are_dealt_out_to_the_servers() -> None:
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


# Weights -------------------------------------------------------------------------------------------------------------


def test_weights_are_handed_over_when_they_change_and_only_then(server: Running) -> None:
    policy = adapted()
    engine = synced(server, policy)
    assert 0 <= engine.pop_metrics()["mismatch/after_sync"][0] < 1e-4
    engine.sync(policy)
    assert "time/sync_s" not in engine.pop_metrics()
    change(policy, 1e-4)
    engine.sync(policy)
    first, second = server.stub.bodies("/v1/load_lora_adapter")
    # The same adapter in another place: a server's prefix cache tells adapters apart by name and path, and requests by
    # their salt.
    assert first["lora_name"] == second["lora_name"]
    assert first["lora_path"] != second["lora_path"]
    assert first["load_inplace"] is second["load_inplace"] is True
    assert not Path(first["lora_path"]).exists()
    assert sorted(path.name for path in Path(second["lora_path"]).iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    salts = [body["cache_salt"] for body in server.stub.bodies()]
    assert len(set(salts)) == 2
    engine.generate(PROMPTS, 2, SAMPLING, SEEDS)
    assert {body["cache_salt"] for body in server.stub.samples()} == {salts[-1]}


def test_a_server_that_keeps_old_weights_stops_the_run(server: Running) -> None:
    policy = adapted()
    engine = synced(server, policy)
    server.stub.loads = False
    change(policy)
    with pytest.raises(
        SamplingError, match=rf"{server.url} does not compute the policy: .* Probably it serves another model"
    ):
        engine.sync(policy)
    change(policy)
    with pytest.raises(SamplingError):  # nor does it go on as if that sync had been made
        engine.sync(policy)


def test_a_whole_model_that_is_not_reloaded_stops_the_run(server: Running) -> None:
    """As with vLLM 0.32's CPU build, which reports success."""
    policy = Policy(load_model(PolicyConfig("tiny")), PolicyConfig("tiny"))
    engine = synced(server, policy)  # the server has been started with these weights
    (request,) = server.stub.bodies("/collective_rpc")
    assert request["method"] == "reload_weights"
    assert (Path(request["kwargs"]["weights_path"]) / "model.safetensors").exists()
    engine.sync(policy)
    assert len(server.stub.bodies("/collective_rpc")) == 1
    change(policy)
    with pytest.raises(
        SamplingError, match=r"cannot reload weights, as vLLM's CPU build: then train an adapter, model.policy.lora"
    ):
        engine.sync(policy)


def test_logprobs_of_the_wrong_kind_stop_the_run(server: Running) -> None:
    server.stub.logprobs_mode = "raw_logprobs"
    with pytest.raises(
        SamplingError, match=r"temperature 0.7\). Probably .* start it with --logprobs-mode processed_logprobs"
    ):
        synced(server, adapted())
    synced(server, adapted(), RolloutConfig(top_k=1))  # at temperature 1 they are the right ones
    server.stub.logprobs_mode = "processed_logprobs"
    with pytest.raises(
        SamplingError, match=r"behind top_k=1, vLLM's log-probs are ours with --logprobs-mode raw_logprobs alone"
    ):
        synced(server, adapted(), RolloutConfig(top_k=1))


def test_the_tolerance_follows_the_coarser_dtype(server: Running) -> None:
    policy = adapted()
    engines = {dtype: synced(server, policy, dtype=dtype) for dtype in (None, "bfloat16")}
    server.stub.loads = False
    change(policy, 3e-4)
    engines["bfloat16"].sync(policy)  # a hundredth of a nat may be its rounding
    assert 1e-3 < engines["bfloat16"].pop_metrics()["mismatch/after_sync"][0] < 1
    with pytest.raises(SamplingError, match=r"float error is below 0.0014 \(temperature 0.7\)"):
        engines[None].sync(policy)
    server.stub.loads = True
    with pytest.raises(SamplingError, match="float error is below 1e-12"):
        synced(server, policy, tolerance=1e-12)


# Servers that fail ---------------------------------------------------------------------------------------------------


def test_a_server_that_is_started_again_gets_its_weights_back(server: Running) -> None:
    policy = adapted()
    engine = synced(server, policy)
    wanted = engine.generate(PROMPTS, 2, SAMPLING, SEEDS)
    assert engine.pop_metrics()["work/server_restarts"] == (0, 1.0)
    server.stop()
    threading.Timer(0.3, server.start).start()
    rollout = engine.generate(PROMPTS, 2, SAMPLING, SEEDS)
    assert rollout.completions() == wanted.completions()
    assert engine.pop_metrics()["work/server_restarts"] == (1, 1.0)  # six requests failed, one of them saw to it
    server.stub.adapters.clear()  # it was quicker than us: nothing was refused but the name
    assert engine.generate(PROMPTS, 2, SAMPLING, SEEDS).completions() == wanted.completions()
    assert len(server.stub.bodies("/v1/load_lora_adapter")) == 3


def test_a_server_that_comes_back_as_another_stops_the_run(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = synced(server, adapted())
    server.stub.adapters.clear()
    monkeypatch.setattr(server.stub, "policy", lambda folder, original=server.stub.policy: original(None))
    with pytest.raises(SamplingError, match="came back and answers differently"):
        engine.generate(PROMPTS, 2, SAMPLING, SEEDS)


def test_a_server_that_stays_away_ends_the_run_in_time(server: Running) -> None:
    engine = synced(server, adapted(), max_wait_minutes=0.5 / 60)
    server.stop()
    expected = rf"{server.url} has been away for 0.00833 minutes \(model.engine.max_wait_minutes; .*refused"

    def loses_it() -> None:
        with pytest.raises(ServerError, match=expected):
            engine.generate(PROMPTS, 2, SAMPLING, SEEDS)

    within(1.5, loses_it)


def test_a_broken_answer_is_asked_for_again_and_a_refusal_is_not(server: Running) -> None:
    engine = synced(server, adapted())
    wanted = engine.generate(PROMPTS, 2, SAMPLING, SEEDS).completions()
    server.stub.answers = [(500, "Internal Server Error"), (503, "{}"), (200, "a page of a proxy")]
    server.stub.reason = "abort"
    assert engine.generate(PROMPTS, 2, SAMPLING, SEEDS).completions() == wanted
    refusal = {
        "error": {
            "message": "max_tokens=600 cannot be greater than max_model_len=512.",
            "type": "BadRequestError",
            "code": 400,
        }
    }
    server.stub.answers = [(400, json.dumps(refusal))]
    with pytest.raises(ServerError, match=r"/v1/completions refuses \(400\): max_tokens=600 cannot be greater"):
        engine.generate(PROMPTS, 2, SAMPLING, SEEDS)


def test_a_server_without_adapters_says_what_it_needs(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = server.stub.answer

    def without(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return (404, '{"detail":"Not Found"}') if path == "/v1/load_lora_adapter" else answer(path, body)

    monkeypatch.setattr(server.stub, "answer", without)
    with pytest.raises(
        ServerError, match=r"\(404\): Not Found. The server is started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
    ):
        synced(server, adapted())


def test_only_the_first_rank_hands_over_and_all_end_where_it_fails(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SecondOfTwo:
        rank = 1
        first: Any = None

        def gather(self, mine: Any) -> list[Any]:
            return [self.first, mine]

    first = synced(server, adapted())
    asked = len(server.stub.requests)
    ranks = SecondOfTwo()
    monkeypatch.setattr(vllm_weights.Ranks, "current", lambda: ranks)
    ranks.first = first._weights.synced
    second = synced(server, adapted())
    assert [path for path, _ in server.stub.requests[asked:]] == ["/v1/models"]
    assert (
        second.generate(PROMPTS, 2, SAMPLING, SEEDS).completions()
        == first.generate(PROMPTS, 2, SAMPLING, SEEDS).completions()
    )
    ranks.first = SamplingError("the first rank's")
    with pytest.raises(SamplingError, match="the first rank's"):
        synced(server, adapted())


def test_no_weights_are_handed_over_while_another_rank_samples(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FirstOfTwo:
        """Notes what the server had been asked when the ranks met."""

        rank = 0

        def __init__(self) -> None:
            self.asked: list[list[str]] = []

        def gather(self, mine: Any) -> list[Any]:
            self.asked.append([path for path, _ in server.stub.requests])
            return [mine, mine]

    ranks = FirstOfTwo()
    monkeypatch.setattr(vllm_weights.Ranks, "current", lambda: ranks)
    synced(server, adapted())
    before, after = ranks.asked
    assert "/v1/load_lora_adapter" not in before
    assert "/v1/load_lora_adapter" in after


def test_a_server_may_be_away_more_than_once_for_one_request(server: Running) -> None:
    """A request that was served for longer than the longest absence has its whole patience again when the server goes
    once more.
    """
    lost = VLLMServer(server.url, request_timeout=10, max_wait=0.3)
    attempts = iter([0.0, 0.5, 0.5, 0.0])

    def attempt() -> str:
        time.sleep(next(attempts))
        if lost.restored < 3:
            raise ServerLost("gone")
        return "answer"

    assert lost.patiently(attempt) == "answer"
    assert lost.restored == 3


# At the door ---------------------------------------------------------------------------------------------------------


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
    engine = synced(server, adapted())
    with pytest.raises(
        ConfigError, match=r"a prompt of 510 tokens and .*=6 exceed the server's --max-model-len of 512"
    ):
        engine.generate([[5] * 510], 2, SAMPLING, SEEDS[:2])
