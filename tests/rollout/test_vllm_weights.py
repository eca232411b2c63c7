"""Weights reach the servers, and no run goes on with a server that computes something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm_stub import PROMPTS, SAMPLING, SEEDS, TOKENIZER, Running, adapted, change, synced_engine

from stateset_lightning.errors import DiskError, SamplingError, ServerError
from stateset_lightning.policy import Policy, PolicyConfig, load_model
from stateset_lightning.rollout import InProcessEngine, RolloutConfig, vllm_weights
from stateset_lightning.threads import Interruption


def test_weights_are_handed_over_when_they_change_and_only_then(server: Running) -> None:
    policy = adapted()
    engine = synced_engine(server, policy)
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
    engine = synced_engine(server, policy)
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
    engine = synced_engine(server, policy)  # the server has been started with these weights
    (request,) = server.stub.bodies("/collective_rpc")
    assert request["method"] == "reload_weights"
    assert (Path(request["kwargs"]["weights_path"]) / "model.safetensors.index.json").exists()
    engine.sync(policy)
    assert len(server.stub.bodies("/collective_rpc")) == 1
    change(policy)
    with pytest.raises(
        SamplingError, match=r"cannot reload weights, as vLLM's CPU build: then train an adapter, model.policy.lora"
    ):
        engine.sync(policy)


def test_a_whole_model_is_handed_over_when_it_changes(server: Running) -> None:
    server.stub.reloads = True
    policy = Policy(load_model(PolicyConfig("tiny")), PolicyConfig("tiny"))
    engine = synced_engine(server, policy)
    change(policy)
    engine.sync(policy)
    first, second = (Path(body["kwargs"]["weights_path"]) for body in server.stub.bodies("/collective_rpc"))
    assert (first.exists(), second.exists()) == (False, True)
    assert first.parent.parent == Path("/dev/shm")  # where it exists
    assert engine.pop_metrics()["mismatch/after_sync"][0] < 1e-4
    other = InProcessEngine(TOKENIZER)
    other.sync(policy)
    wanted = other.generate(PROMPTS, 2, SAMPLING, SEEDS)
    assert engine.generate(PROMPTS, 2, SAMPLING, SEEDS).completions() == wanted.completions()
    server.stop()  # and comes back with the weights of its start
    server.start()
    assert engine.generate(PROMPTS, 2, SAMPLING, SEEDS).completions() != wanted.completions()
    engine.sync(policy)
    assert engine.generate(PROMPTS, 2, SAMPLING, SEEDS).completions() == wanted.completions()


def test_logprobs_of_the_wrong_kind_stop_the_run(server: Running) -> None:
    server.stub.logprobs_mode = "raw_logprobs"
    with pytest.raises(
        SamplingError, match=r"temperature 0.7\). Probably .* start it with --logprobs-mode processed_logprobs"
    ):
        synced_engine(server, adapted())
    synced_engine(server, adapted(), RolloutConfig(top_k=1))  # at temperature 1 they are the right ones
    server.stub.logprobs_mode = "processed_logprobs"
    with pytest.raises(
        SamplingError, match=r"behind top_k=1, vLLM's log-probs are ours with --logprobs-mode raw_logprobs alone"
    ):
        synced_engine(server, adapted(), RolloutConfig(top_k=1))


def test_the_tolerance_follows_the_coarser_dtype(server: Running) -> None:
    policy = adapted()
    engines = {dtype: synced_engine(server, policy, dtype=dtype) for dtype in (None, "bfloat16")}
    server.stub.loads = False
    change(policy, 3e-4)
    engines["bfloat16"].sync(policy)  # a hundredth of a nat may be its rounding
    assert 1e-3 < engines["bfloat16"].pop_metrics()["mismatch/after_sync"][0] < 1
    with pytest.raises(SamplingError, match=r"float error is below 0.0014 \(temperature 0.7\)"):
        engines[None].sync(policy)
    server.stub.loads = True
    with pytest.raises(SamplingError, match="float error is below 1e-12"):
        synced_engine(server, policy, tolerance=1e-12)


def test_a_server_that_comes_back_as_another_stops_the_run(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = synced_engine(server, adapted())
    server.stub.adapters.clear()
    monkeypatch.setattr(server.stub, "policy", lambda folder, original=server.stub.policy: original(None))
    with pytest.raises(SamplingError, match="came back and answers differently"):
        engine.generate(PROMPTS, 2, SAMPLING, SEEDS)


def test_a_server_without_adapters_says_what_it_needs(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = server.stub.answer

    def without(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return (404, '{"detail":"Not Found"}') if path == "/v1/load_lora_adapter" else answer(path, body)

    monkeypatch.setattr(server.stub, "answer", without)
    with pytest.raises(
        ServerError, match=r"\(404\): .*Not Found.*. The server is started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
    ):
        synced_engine(server, adapted())


def test_a_folder_that_cannot_be_written_is_named(server: Running, tmp_path: Path) -> None:
    folder = str(tmp_path / "not mounted")
    with pytest.raises(
        DiskError, match=rf"model\.engine\.folder='{folder}': no weights can be handed over there: .*No such"
    ):
        synced_engine(server, adapted(), folder=folder)


def test_only_the_first_rank_hands_over_and_all_end_where_it_fails(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OneOfTwo:
        """The first rank, whose words are noted, then the second, which hears them."""

        rank = 0
        words: list[Any] = []

        def gather(self, mine: Any) -> list[Any]:
            if self.rank == 0:
                self.words.append(mine)
                return [mine, None]
            return [self.words.pop(0), mine]

    ranks = OneOfTwo()
    monkeypatch.setattr(vllm_weights.Ranks, "current", lambda: ranks)
    first = synced_engine(server, adapted())
    asked = len(server.stub.requests)
    ranks.rank = 1
    second = synced_engine(server, adapted())
    assert [path for path, _ in server.stub.requests[asked:]] == ["/v1/models"]
    assert (
        second.generate(PROMPTS, 2, SAMPLING, SEEDS).completions()
        == first.generate(PROMPTS, 2, SAMPLING, SEEDS).completions()
    )
    assert ranks.words == []  # both have met as often
    for error in (SamplingError("the first rank's"), Interruption(143)):
        ranks.words = [None, error]
        with pytest.raises(type(error), match=r"the first rank's|143"):
            synced_engine(server, adapted())


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
    synced_engine(server, adapted())
    before, *_, after = ranks.asked
    assert "/v1/load_lora_adapter" not in before
    assert "/v1/load_lora_adapter" in after
