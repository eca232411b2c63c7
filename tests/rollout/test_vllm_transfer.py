"""A whole model from the policy's GPU into a server's, against a stub of vLLM's ipc and nccl engines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_stub
from vllm_stub import (
    MEMORY,
    PROMPTS,
    SAMPLING,
    SEEDS,
    TOKENIZER,
    IpcTransfer,
    NcclGroup,
    NcclTransfer,
    Running,
    adapted,
    change,
    synced_engine,
)

from stateset_lightning.errors import ConfigError, SamplingError, ServerError
from stateset_lightning.policy import Policy, PolicyConfig, load_model
from stateset_lightning.rollout import InProcessEngine, RolloutConfig, RolloutEngine, VLLMEngine, vllm_transfer
from stateset_lightning.rollout.handover import weights_by_block
from stateset_lightning.rollout.vllm_client import ServerLost
from stateset_lightning.threads import Interruption


@pytest.fixture
def on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of the host in place of a GPU's, and queues in place of NCCL."""
    monkeypatch.setattr(vllm_transfer, "shared", vllm_stub.shared)
    monkeypatch.setattr(vllm_transfer, "group_id", NcclGroup.id)
    monkeypatch.setattr(vllm_transfer, "join", NcclGroup.join)
    monkeypatch.setattr(vllm_transfer, "broadcast", NcclGroup.broadcast)
    MEMORY.clear()
    NcclGroup.made.clear()


@pytest.fixture
def ipc(server: Running, on_the_host: None) -> Running:
    server.stub.transfer = IpcTransfer()
    return server


@pytest.fixture
def nccl(server: Running, on_the_host: None) -> Running:
    server.stub.transfer = NcclTransfer()
    return server


@pytest.fixture(params=[IpcTransfer, NcclTransfer], ids=["ipc", "nccl"])
def either(request: pytest.FixtureRequest, server: Running, on_the_host: None) -> Running:
    server.stub.transfer = request.param()
    return server


def engine_of(server: Running, policy: Policy) -> VLLMEngine:
    assert server.stub.transfer is not None
    return synced_engine(server, policy, transfer=server.stub.transfer.backend)


def asked(server: Running) -> list[str]:
    return [path for path, _ in server.stub.requests if path[1:] in vllm_stub.TRANSFER]


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


def test_a_whole_model_goes_a_block_at_a_time(either: Running) -> None:
    policy = whole()
    engine = engine_of(either, policy)
    assert sampled(engine) == wanted(policy)
    assert engine.pop_metrics()["mismatch/after_sync"][0] < 1e-4
    assert either.stub.transfer is not None
    assert len(either.stub.transfer.chunks) > policy.model.config.num_hidden_layers
    known = {id(tensor): name for name, tensor in reversed(policy.model.state_dict(keep_vars=True).items())}
    assert sorted(chain(*either.stub.transfer.chunks)) == sorted(known.values())  # each once
    before = len(asked(either))
    change(policy)
    engine.sync(policy)
    assert sampled(engine) == wanted(policy)
    updates = ["/update_weights"] * len(either.stub.transfer.chunks)
    assert asked(either)[before:][-len(updates) - 1 :] == [*updates, "/finish_weight_update"]
    assert either.stub.bodies("/collective_rpc") == []  # and no files
    salts = [body["cache_salt"] for body in either.stub.bodies()]
    assert len(set(salts)) == 2  # no keys and values of old weights


def test_memory_that_is_shared_has_room_for_the_largest_block(ipc: Running) -> None:
    policy = whole()
    engine = engine_of(ipc, policy)
    change(policy)
    engine.sync(policy)
    assert ipc.stub.transfer is not None
    largest = max(sum(t.nbytes for t in block.values()) for block in weights_by_block(policy.model, torch.float32))
    assert max(len(buffer) for buffer in MEMORY.values()) == largest
    updates = ["/update_weights"] * len(ipc.stub.transfer.chunks)
    once = ["/init_weight_transfer_engine", "/start_weight_update", *updates, "/finish_weight_update"]
    assert asked(ipc) == 2 * once


def test_a_group_is_made_once_for_each_server(nccl: Running) -> None:
    """PyTorch never gives back what a member takes."""
    policy = whole()
    engine = engine_of(nccl, policy)
    for _ in range(2):
        change(policy)
        engine.sync(policy)
    assert asked(nccl).count("/init_weight_transfer_engine") == len(NcclGroup.made) == 1
    nccl.stop()
    nccl.start()
    engine.sync(policy)
    assert sampled(engine) == wanted(policy)
    assert len(NcclGroup.made) == 2
    with vllm_stub.running() as other:
        other.stub.transfer = NcclTransfer()
        both = VLLMEngine([nccl.url, other.url], transfer="nccl")  # as of another run: it joins anew
        both.setup(TOKENIZER, SAMPLING)
        both.sync(policy)
        assert both.generate(PROMPTS[:2], 1, SAMPLING, SEEDS[:2]).completions()
        assert min(len(server.stub.samples()) for server in (nccl, other)) > 0
        assert len(NcclGroup.made) == 4


@pytest.mark.parametrize("happens", ["a proxy's answer", "it is started again"])
def test_a_transfer_that_fails_in_the_middle_begins_anew_in_another_group(
    nccl: Running, monkeypatch: pytest.MonkeyPatch, happens: str
) -> None:
    """One in which a call was left would take the old tensor for the next."""
    monkeypatch.setattr(vllm_transfer, "SECONDS", 0.2)
    updates = 0

    def answer(path: str, body: dict[str, Any], original: Any = nccl.stub.answer) -> tuple[int, Any]:
        nonlocal updates
        updates += path == "/update_weights" and body["update_info"]["names"] != []
        if updates != 2:
            return original(path, body)
        updates += 1
        if happens == "it is started again":
            assert nccl.stub.transfer is not None
            nccl.stub.transfer.forget()
        return 502, "Bad Gateway"

    monkeypatch.setattr(nccl.stub, "answer", answer)
    policy = whole()
    engine = engine_of(nccl, policy)
    assert updates > 2
    assert len(NcclGroup.made) == 2
    assert sampled(engine) == wanted(policy)


def test_what_the_server_says_counts_more_than_what_nccl_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a server that is gone NCCL may know first, and it is to be waited for."""

    def gone(*given: object, **options: object) -> bytes:
        time.sleep(0.2)
        raise ServerLost("gone")

    (server,) = VLLMEngine(["http://127.0.0.1:1"]).servers
    monkeypatch.setattr(server, "call", gone)
    with pytest.raises(ServerLost, match="gone"):
        vllm_transfer.at_once(server, "/update_weights", {}, fail)


def test_a_signal_waits_for_the_block_that_is_under_way(nccl: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of it would keep the server inside NCCL for ever."""

    def cut_off(futures: object) -> Any:
        raise Interruption(143)

    monkeypatch.setattr(vllm_transfer, "as_they_end", cut_off)
    ended: list[bool] = []
    (server,) = VLLMEngine([nccl.url]).servers
    with pytest.raises(Interruption):
        vllm_transfer.at_once(server, "/health", {}, lambda: (time.sleep(0.2), ended.append(True)))
    assert ended


def fail() -> None:
    raise RuntimeError("NCCL Error 5: invalid usage (run with NCCL_DEBUG=WARN for details)")


@pytest.mark.parametrize("fails", ["the server", "this process"])
def test_who_fails_inside_nccl_ends_the_wait_of_the_other(
    nccl: Running, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    monkeypatch.setattr(vllm_transfer, "SECONDS", 0.2)
    raised = threading.Event()
    if fails == "the server":  # while this process waits in its thread
        monkeypatch.setattr(NcclTransfer, "fails", "out of memory")
    else:  # while the server waits
        monkeypatch.setattr(vllm_transfer, "broadcast", lambda tensors, member: fail())
        monkeypatch.setattr(NcclGroup, "receive", lambda member: raised.wait(60))
    said = "out of memory" if fails == "the server" else "NCCL Error 5: invalid usage"
    with pytest.raises(ServerError, match=rf"{nccl.url}/update_weights.*{said}.*on other GPUs than the policy's"):
        engine_of(nccl, whole())
    raised.set()


def test_weights_come_in_the_dtype_of_the_server_and_as_they_are(make_model: Callable[..., Any], ipc: Running) -> None:
    model = make_model("qwen2")
    transfer = IpcTransfer()
    transfer.init_weight_transfer_engine({"packed": True})
    transfer.start_weight_update()
    for update in vllm_transfer.updates(model, weights_by_block(model, torch.bfloat16)):
        transfer.update_weights(**update)
    received = transfer.finish_weight_update()
    named = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    assert received.keys() == set(named.values())
    assert all(torch.equal(received[name], model.state_dict()[name].to(torch.bfloat16)) for name in received)


def test_dtypes_of_other_widths_lie_where_they_can_be_read(make_model: Callable[..., Any], ipc: Running) -> None:
    block = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.arange(2.0), "c": torch.tensor(7)}
    (update,) = vllm_transfer.updates(make_model("llama"), [block])
    transfer = IpcTransfer()
    transfer.init_weight_transfer_engine({"packed": True})
    transfer.start_weight_update()
    transfer.update_weights(**update)
    received = transfer.finish_weight_update()
    assert all(torch.equal(received[name], tensor) for name, tensor in block.items())


def test_a_server_that_is_started_again_gets_its_weights_back(either: Running) -> None:
    policy = whole()
    engine = engine_of(either, policy)
    either.stop()
    either.start()
    engine.sync(policy)  # nothing has changed, but the server answers as at its start
    assert sampled(engine) == wanted(policy)
    change(policy)
    engine.sync(policy)
    either.stub.whole, either.stub.answers = None, [(500, "Internal Server Error")] * 2  # lost while it samples
    assert sampled(engine) == wanted(policy)
    assert engine.pop_metrics()["work/server_restarts"] == (1, 1.0)


def test_an_update_that_was_broken_off_is_begun_again(either: Running) -> None:
    assert either.stub.transfer is not None
    either.stub.transfer.start_weight_update()  # by a run that was killed
    policy = whole()
    engine = engine_of(either, policy)
    assert sampled(engine) == wanted(policy)


def test_weights_that_do_not_arrive_stop_the_run(either: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = whole()
    monkeypatch.setattr(either.stub, "take", lambda call, body: None)
    monkeypatch.setattr(vllm_transfer, "SECONDS", 0.2)
    by_ipc = isinstance(either.stub.transfer, IpcTransfer)
    error, said = (SamplingError, " does not compute the policy") if by_ipc else (ServerError, ".*NCCL has not")
    with pytest.raises(error, match=f"{either.url}{said}"):
        engine_of(either, policy)


def without_endpoints(stub: vllm_stub.Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(path: str, body: dict[str, Any], original: Any = stub.answer) -> tuple[int, Any]:
        known = path[1:] not in (*vllm_stub.TRANSFER, "get_world_size")
        return original(path, body) if known else (404, {"detail": "Not Found"})

    monkeypatch.setattr(stub, "answer", answer)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda stub, patch: patch.setattr(stub, "transfer", None), "Weight transfer not configured"),
        (without_endpoints, r"\(404\): .*Not Found"),
    ],
    ids=["no engine", "no such endpoint"],
)
def test_a_server_that_cannot_take_them_says_at_once_what_it_needs(
    either: Running, monkeypatch: pytest.MonkeyPatch, changed: Callable[..., None], said: str
) -> None:
    assert either.stub.transfer is not None
    transfer = either.stub.transfer.backend
    changed(either.stub, monkeypatch)
    needed = rf"started with VLLM_SERVER_DEV_MODE=1.*--weight-transfer-config '.\"backend\": \"{transfer}\""
    with pytest.raises(ServerError, match=rf"{either.url}/\w+ refuses .*{said}.*{needed}"):
        synced_engine(either, whole(), transfer=transfer)


@pytest.mark.parametrize(
    ("attribute", "value", "said"),
    [("trusts", False, "Refusing to deserialize"), ("gpu", "GPU-other", "not found for GPU UUID GPU-other")],
)
def test_a_server_that_cannot_open_the_memory_says_at_once_what_it_needs(
    ipc: Running, monkeypatch: pytest.MonkeyPatch, attribute: str, value: object, said: str
) -> None:
    monkeypatch.setattr(IpcTransfer, attribute, value)
    needed = "started with VLLM_SERVER_DEV_MODE=1, VLLM_ALLOW_INSECURE_SERIALIZATION=1 and --weight-transfer-config"
    with pytest.raises(ServerError, match=rf"{ipc.url}/\w+ refuses .*{said}.*{needed}"):
        engine_of(ipc, whole())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_nccl_takes_our_calls() -> None:
    """In a group of this process alone, as there may be one GPU: that the calls are taken, not what arrives."""
    device = torch.device("cuda", torch.cuda.current_device())
    member = vllm_transfer.join(vllm_transfer.group_id(device), 1, device)
    tensors = [torch.arange(6.0, device=device).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    vllm_transfer.broadcast(tensors, member)
    assert all(torch.equal(tensor.float().cpu(), torch.arange(6.0)) for tensor in tensors)


def test_what_cannot_share_memory_is_refused(server: Running) -> None:
    for transfer in ("ipc", "nccl"):
        with pytest.raises(ConfigError, match=rf"transfer={transfer}: the policy is on device cpu, .*: take files"):
            synced_engine(server, whole(), transfer=transfer)
        with pytest.raises(ConfigError, match=rf"transfer={transfer} with sampling_ahead=1 on 1 devices"):
            VLLMEngine([server.url], transfer=transfer).setup(TOKENIZER, RolloutConfig(sampling_ahead=1))  # type: ignore[arg-type]
    assert asked(server) == []
    with pytest.raises(ConfigError, match=r"transfer='mpi' must be one of files, ipc, nccl"):
        VLLMEngine([server.url], transfer="mpi")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"transfer=ipc with 2 model.engine.urls: one server shares the GPU"):
        VLLMEngine([server.url, "http://127.0.0.1:1"], transfer="ipc")


def test_an_adapter_is_a_file_all_the_same(either: Running) -> None:
    engine_of(either, adapted())
    (load,) = either.stub.bodies("/v1/load_lora_adapter")
    assert (Path(load["lora_path"]) / "adapter_model.safetensors").exists()
