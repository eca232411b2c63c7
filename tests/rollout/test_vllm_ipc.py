"""A whole model through memory that a server shares with the policy, against a stub of vLLM's ipc engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_stub
from vllm_stub import MEMORY, PROMPTS, SAMPLING, SEEDS, TOKENIZER, Running, Transfer, adapted, change, synced_engine

from stateset_lightning.errors import ConfigError, SamplingError, ServerError
from stateset_lightning.policy import Policy, PolicyConfig, load_model
from stateset_lightning.rollout import InProcessEngine, RolloutConfig, RolloutEngine, VLLMEngine, vllm_ipc
from stateset_lightning.rollout.handover import weights_by_block


@pytest.fixture
def ipc(server: Running, monkeypatch: pytest.MonkeyPatch) -> Running:
    """A server with the engine, and memory of the host in place of a GPU's."""
    server.stub.transfer = Transfer()
    monkeypatch.setattr(vllm_ipc, "shared", vllm_stub.shared)
    MEMORY.clear()
    return server


def whole() -> Policy:
    policy = Policy(load_model(PolicyConfig("tiny")), PolicyConfig("tiny"))
    change(policy)
    return policy


def sampled(engine: RolloutEngine) -> list[list[int]]:
    return engine.generate(PROMPTS[:1], 2, SAMPLING, SEEDS[:2]).completions()


def wanted(policy: Policy) -> list[list[int]]:
    engine = InProcessEngine(TOKENIZER)
    engine.sync(policy)
    return sampled(engine)


def test_a_whole_model_goes_through_memory_a_block_at_a_time(ipc: Running) -> None:
    policy = whole()
    engine = synced_engine(ipc, policy, transfer="ipc")
    assert sampled(engine) == wanted(policy)
    assert engine.pop_metrics()["mismatch/after_sync"][0] < 1e-4
    assert ipc.stub.transfer is not None
    assert len(ipc.stub.transfer.chunks) > policy.model.config.num_hidden_layers
    largest = max(sum(t.nbytes for t in block.values()) for block in weights_by_block(policy.model, torch.float32))
    assert max(len(buffer) for buffer in MEMORY.values()) == largest
    change(policy)
    engine.sync(policy)
    assert sampled(engine) == wanted(policy)
    paths = [path for path, _ in ipc.stub.requests if path[1:] in vllm_stub.TRANSFER]
    updates = ["/update_weights"] * len(ipc.stub.transfer.chunks)
    once = ["/init_weight_transfer_engine", "/start_weight_update", *updates, "/finish_weight_update"]
    assert paths == 2 * once
    assert ipc.stub.bodies("/collective_rpc") == []  # and no files
    salts = [body["cache_salt"] for body in ipc.stub.bodies()]
    assert len(set(salts)) == 2  # no keys and values of old weights


def test_weights_come_in_the_dtype_of_the_server_and_as_they_are(make_model: Callable[..., Any], ipc: Running) -> None:
    model = make_model("qwen2")
    transfer = Transfer()
    transfer.init_weight_transfer_engine({"packed": True})
    transfer.start_weight_update()
    for update in vllm_ipc.updates(model, weights_by_block(model, torch.bfloat16)):
        transfer.update_weights(**update)
    received = transfer.finish_weight_update()
    named = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    assert received.keys() == set(named.values())
    assert all(torch.equal(received[name], model.state_dict()[name].to(torch.bfloat16)) for name in received)


def test_dtypes_of_other_widths_lie_where_they_can_be_read(make_model: Callable[..., Any], ipc: Running) -> None:
    block = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.arange(2.0), "c": torch.tensor(7)}
    (update,) = vllm_ipc.updates(make_model("llama"), [block])
    transfer = Transfer()
    transfer.init_weight_transfer_engine({"packed": True})
    transfer.start_weight_update()
    transfer.update_weights(**update)
    received = transfer.finish_weight_update()
    assert all(torch.equal(received[name], tensor) for name, tensor in block.items())


def test_a_server_that_is_started_again_gets_its_weights_back(ipc: Running) -> None:
    policy = whole()
    engine = synced_engine(ipc, policy, transfer="ipc")
    ipc.stop()
    ipc.start()
    engine.sync(policy)  # nothing has changed, but the server answers as at its start
    assert sampled(engine) == wanted(policy)
    change(policy)
    engine.sync(policy)
    ipc.stub.whole, ipc.stub.answers = None, [(500, "Internal Server Error")] * 2  # lost while it samples
    assert sampled(engine) == wanted(policy)
    assert engine.pop_metrics()["work/server_restarts"] == (1, 1.0)


def test_an_update_that_was_broken_off_is_begun_again(ipc: Running) -> None:
    assert ipc.stub.transfer is not None
    ipc.stub.transfer.start_weight_update()  # by a run that was killed
    policy = whole()
    engine = synced_engine(ipc, policy, transfer="ipc")
    assert sampled(engine) == wanted(policy)


def test_weights_that_do_not_arrive_stop_the_run(ipc: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = whole()
    monkeypatch.setattr(ipc.stub, "take", lambda call, body: None)
    with pytest.raises(SamplingError, match=rf"{ipc.url} does not compute the policy"):
        synced_engine(ipc, policy, transfer="ipc")


def without_endpoints(stub: vllm_stub.Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(path: str, body: dict[str, Any], original: Any = stub.answer) -> tuple[int, Any]:
        return (404, {"detail": "Not Found"}) if path[1:] in vllm_stub.TRANSFER else original(path, body)

    monkeypatch.setattr(stub, "answer", answer)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda stub, patch: patch.setattr(stub, "transfer", None), "Weight transfer not configured"),
        (lambda stub, patch: patch.setattr(stub.transfer, "trusts", False), "Refusing to deserialize"),
        (lambda stub, patch: patch.setattr(stub.transfer, "gpu", "GPU-other"), "not found for GPU UUID GPU-other"),
        (without_endpoints, r"\(404\): .*Not Found"),
    ],
    ids=["no engine", "no trust", "another GPU", "no such endpoint"],
)
def test_a_server_that_cannot_take_them_says_at_once_what_it_needs(
    ipc: Running, monkeypatch: pytest.MonkeyPatch, changed: Callable[..., None], said: str
) -> None:
    changed(ipc.stub, monkeypatch)
    needed = r"The server is started with VLLM_SERVER_DEV_MODE=1, VLLM_ALLOW_INSECURE_SERIALIZATION=1 and --weight-tr"
    with pytest.raises(ServerError, match=rf"{ipc.url}/\w+ refuses .*{said}.*{needed}"):
        synced_engine(ipc, whole(), transfer="ipc")


def test_what_cannot_share_memory_is_refused(server: Running) -> None:
    with pytest.raises(ConfigError, match=r"transfer=ipc: the policy is on device cpu, .*: take files"):
        synced_engine(server, whole(), transfer="ipc")
    assert not any(path[1:] in vllm_stub.TRANSFER for path, _ in server.stub.requests)
    with pytest.raises(ConfigError, match=r"transfer='nccl' must be one of files, ipc"):
        VLLMEngine([server.url], transfer="nccl")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"transfer=ipc with sampling_ahead=1 on 1 devices"):
        VLLMEngine([server.url], transfer="ipc").setup(TOKENIZER, RolloutConfig(sampling_ahead=1))
    with pytest.raises(ConfigError, match=r"transfer=ipc with 2 model.engine.urls: one server shares the GPU"):
        VLLMEngine([server.url, "http://127.0.0.1:1"], transfer="ipc")


def test_an_adapter_is_a_file_all_the_same(ipc: Running) -> None:
    synced_engine(ipc, adapted(), transfer="ipc")
    (load,) = ipc.stub.bodies("/v1/load_lora_adapter")
    assert (Path(load["lora_path"]) / "adapter_model.safetensors").exists()
