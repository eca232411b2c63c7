"""A server that answers as vLLM 0.32 does, with a small real model behind it, and an engine that samples from it.

The forms of its answers are those of a recorded server.
"""

from __future__ import annotations

import json
import pickle
import queue
import threading
from base64 import b64decode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file

from stateset_lightning.policy import Group, LoRAConfig, Policy, PolicyConfig, load_model, load_tokenizer
from stateset_lightning.policy.lora import load_weights
from stateset_lightning.rollout import InProcessEngine, RolloutConfig, VLLMEngine

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]
SAMPLING = RolloutConfig(num_generations=2, max_new_tokens=6, temperature=0.7)
SEEDS = [11, 2**62 + 1, 13, 14, 15, 16]
TOKENIZER = load_tokenizer(PolicyConfig("tiny"))

MODEL_CARD = {
    "object": "model",
    "created": 1795412807,
    "owned_by": "vllm",
    "root": "tiny",
    "parent": None,
    "max_model_len": 512,
}
COMPLETION = {"id": "cmpl-b5facf9daa43dd11", "object": "text_completion", "created": 1795412807, "model": "tiny"}
CHOICE = {"stop_reason": None, "prompt_logprobs": None, "routed_experts": None}
LOADED = "Success: LoRA adapter '{}' added successfully."
LOCK = threading.Lock()  # the model behind all stubs is one

# The ipc and nccl engines ---------------------------------------------------------------------------------------------

GPU = "GPU-5f0e3d2c-0000-4000-8000-000000000000"
MEMORY: dict[int, torch.Tensor] = {}  # what stands for a GPU's, by the number in a handle
TRANSFER = ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update")


def shared(buffer: torch.Tensor) -> dict[str, Any]:
    """In place of a CUDA handle: 15 values, as `rebuild_cuda_tensor` takes, the address in that of the handle."""
    MEMORY[len(MEMORY)] = buffer
    size = len(buffer)
    args = (torch.Tensor, (size,), (1,), 0, torch.storage.TypedStorage, torch.uint8, 0, len(MEMORY) - 1, size, 0)
    return {GPU: (*args, False, b"counter", 0, b"event", True)}


class Transfer:
    """What vLLM's engines keep and refuse, in the words of their source (0.32)."""

    backend: str

    def __init__(self) -> None:
        self.received: dict[str, torch.Tensor] | None = None  # in the update that is under way
        self.chunks: list[list[str]] = []  # the names of each, of the last update
        self.forget()

    def forget(self) -> None:
        """As a server that is started again."""
        self.received = None

    def receive(self, update_info: dict[str, Any]) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def start_weight_update(self) -> None:
        if self.received is not None:
            already = "start_weight_update called while a weight update is already active."
            raise RuntimeError(f"{already} Call finish_weight_update first.")
        self.received, self.chunks = {}, []

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if self.received is None:
            raise RuntimeError("start_weight_update must be called before update_weights.")
        received, self.received = self.received, None  # a failed one ends the update
        new = self.receive(update_info)
        assert not new.keys() & received.keys(), "a name twice"
        self.received = received | new
        self.chunks.append(update_info["names"])

    def finish_weight_update(self, weight_version: str | None = None) -> dict[str, torch.Tensor]:
        if self.received is None:
            raise RuntimeError("finish_weight_update called without a matching start_weight_update.")
        received, self.received = self.received, None
        return received


class IpcTransfer(Transfer):
    """Packed transfers alone."""

    backend = "ipc"
    trusts = True  # started with VLLM_ALLOW_INSECURE_SERIALIZATION=1
    gpu = GPU

    def forget(self) -> None:
        super().forget()
        self.packed: bool | None = None  # None: never initialised

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        if unknown := init_info.keys() - {"packed"}:
            what = f"IPCWeightTransferInitInfo.__init__() got an unexpected keyword argument {unknown.pop()!r}"
            raise ValueError(f"Invalid init_info for IPCWeightTransferEngine: {what}")
        self.packed = init_info.get("packed", False)

    def receive(self, update_info: dict[str, Any]) -> dict[str, torch.Tensor]:
        fields = {"names", "dtype_names", "shapes", "tensor_sizes", "ipc_handles_pickled"}
        assert update_info.keys() == fields
        assert self.packed, "not initialised as packed"
        if not self.trusts:
            needed = "VLLM_ALLOW_INSECURE_SERIALIZATION=1"
            raise ValueError(f"Refusing to deserialize `ipc_handles_pickled` without {needed}")
        handles = pickle.loads(b64decode(update_info["ipc_handles_pickled"], validate=True))
        if self.gpu not in handles:
            raise ValueError(f"IPC handle not found for GPU UUID {self.gpu}. Available UUIDs: {[*handles]}")
        args = handles[self.gpu]
        assert len(args) == 15
        names, dtypes = update_info["names"], [getattr(torch, name) for name in update_info["dtype_names"]]
        shapes, sizes = update_info["shapes"], update_info["tensor_sizes"]
        assert len(names) == len(dtypes) == len(shapes) == len(sizes) > 0
        packed = MEMORY[args[7]][: sum(sizes)]
        assert (len(packed), packed.dtype) == (sum(sizes), torch.uint8)
        parts = zip(names, dtypes, shapes, packed.split(sizes), strict=True)
        return {name: part.contiguous().view(dtype).view(shape).clone() for name, dtype, shape, part in parts}


class NcclGroup:
    """In place of an NCCL group: each call waits until the others have made theirs, as long as that takes."""

    made: ClassVar[dict[bytes, NcclGroup]] = {}

    def __init__(self, size: int) -> None:
        self.size = size
        self.sent: queue.Queue[torch.Tensor] = queue.Queue()
        self.together = threading.Barrier(2)  # the trainer, and all workers as one

    @classmethod
    def id(cls, device: torch.device) -> bytes:
        return bytes([len(cls.made)]) * 128

    @classmethod
    def join(cls, group: bytes, size: int, device: object = None) -> NcclGroup:
        with LOCK:
            member = cls.made.setdefault(group, cls(size))
        assert member.size == size
        member.together.wait(60)
        return member

    @staticmethod
    def broadcast(tensors: Sequence[torch.Tensor], member: NcclGroup) -> None:
        for tensor in tensors:
            assert tensor.is_contiguous()
            member.sent.put(tensor.clone())
            member.together.wait()

    def receive(self) -> torch.Tensor:
        tensor = self.sent.get(timeout=60)
        self.together.wait(60)
        return tensor


class NcclTransfer(Transfer):
    """Transfers of a group that is joined by its id, not packed."""

    backend = "nccl"
    workers = 2
    fails: str | None = None  # says of the next tensors that they do not fit

    def forget(self) -> None:
        super().forget()
        self.member: NcclGroup | None = None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        assert init_info.keys() == {"nccl_unique_id_b64", "rank_offset", "world_size", "packed"}
        group = b64decode(init_info["nccl_unique_id_b64"], validate=True)
        assert (len(group), init_info["rank_offset"], init_info["packed"]) == (128, 1, False)
        self.member = NcclGroup.join(group, init_info["world_size"])
        assert self.member.size == 1 + self.workers

    def receive(self, update_info: dict[str, Any]) -> dict[str, torch.Tensor]:
        if self.member is None:
            raise RuntimeError("NCCL weight transfer not initialized. Call init_transfer_engine() first.")
        names, dtypes, shapes = update_info["names"], update_info["dtype_names"], update_info["shapes"]
        assert update_info.keys() == {"names", "dtype_names", "shapes"}
        assert len(names) == len(dtypes) == len(shapes)
        if names and self.fails is not None:
            raise ValueError(self.fails)
        received = {name: self.member.receive() for name in names}
        assert [str(tensor.dtype) for tensor in received.values()] == [f"torch.{dtype}" for dtype in dtypes]
        assert [[*tensor.shape] for tensor in received.values()] == shapes
        return received


# The server -----------------------------------------------------------------------------------------------------------

UNKNOWN = {
    "message": "The model `{}` does not exist. Valid aliases: tiny.",
    "type": "NotFoundError",
    "param": "model",
    "code": 404,
}


class Stub:
    """What the server does. Tests set its attributes, and read what it was asked."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.authorizations: list[str | None] = []  # the header of each request
        self.adapters: dict[str, str] = {}  # name -> folder
        self.logprobs_mode = "processed_logprobs"
        self.loads = True  # False: says that it has loaded weights, and has not
        self.reloads = False  # the same of a whole model; False is what vLLM's CPU build does
        self.sleeping: bool | None = None  # None: started without VLLM_SERVER_DEV_MODE=1
        self.transfer: Transfer | None = None  # None: started without --weight-transfer-config
        self.whole: Policy | None = None  # the model that was reloaded
        self.answers: list[tuple[int, Any]] = []  # given instead of the next completions: status and body
        self.reason: str | None = None  # given once instead of the finish reason
        self.gate = threading.Event()  # completions wait for it
        self.gate.set()
        self._weights: dict[str, Any] = {}  # by folder, which does not stay

    def bodies(self, path: str = "/v1/completions") -> list[dict[str, Any]]:
        return [body for asked, body in self.requests if asked == path]

    def samples(self) -> list[dict[str, Any]]:
        """Completion requests that are no probes."""
        return [body for body in self.bodies() if "n" not in body]

    def policy(self, folder: str | None) -> Policy:
        if folder is None:
            return self.whole or _model(None)
        rank, weights = self._weights[folder]
        policy = _model(rank)
        load_weights(policy.model, weights, folder)
        return policy

    def load(self, folder: str) -> None:
        rank = json.loads((Path(folder) / "adapter_config.json").read_text())["r"]
        self._weights[folder] = rank, load_file(Path(folder) / "adapter_model.safetensors")

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        self.requests.append((path, body))
        if path == "/health":
            return 200, None
        if path == "/v1/models":
            adapters = [{**MODEL_CARD, "id": name, "parent": "tiny", "max_model_len": None} for name in self.adapters]
            return 200, {"object": "list", "data": [{**MODEL_CARD, "id": "tiny"}, *adapters]}
        if path == "/v1/load_lora_adapter":
            if self.loads or body["lora_name"] not in self.adapters:
                self.adapters[body["lora_name"]] = body["lora_path"]
                self.load(body["lora_path"])
            return 200, LOADED.format(body["lora_name"])
        if path == "/get_world_size":
            return 200, {"world_size": NcclTransfer.workers}
        if path in ("/sleep", "/wake_up"):
            if self.sleeping is None:
                return 404, {"detail": "Not Found"}
            self.sleeping = path == "/sleep"
            status = {"status": "sleeping", "level": 1} if self.sleeping else {"status": "awake", "tags": None}
            return 200, status
        assert not self.sleeping, f"{path} while it sleeps"  # vLLM would not answer
        if path == "/collective_rpc":
            if self.reloads:
                with LOCK:
                    config = PolicyConfig(body["kwargs"]["weights_path"])
                    self.whole = Policy(load_model(config, torch.float32), config)
            return 200, {"results": [None]}
        if path[1:] in TRANSFER:
            try:
                self.take(path[1:], body)
            except Exception as error:
                why = f"Worker failed with error '{error}', please check the stack trace above for the root cause"
                failed = {"message": f"Call to collective_rpc method failed: {why}", "type": "InternalServerError"}
                return 500, {"error": {**failed, "param": None, "code": 500}}
            return 200, {"message": path}
        assert path == "/v1/completions"
        return self.complete(body)

    def take(self, call: str, body: dict[str, Any]) -> None:
        """A call of the ipc or the nccl engine."""
        if self.transfer is None:
            set_it = "Please set weight_transfer_config to enable weight transfer."
            raise RuntimeError(f"Weight transfer not configured. {set_it}")
        received = getattr(self.transfer, call)(**body)
        if received:  # vLLM keeps what it has of a layer that it gets no weights for, and says nothing
            with LOCK:
                policy = Policy(load_model(PolicyConfig("tiny"), torch.float32), PolicyConfig("tiny"))
                policy.model.load_state_dict(received, strict=False)
                self.whole = policy

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.gate.wait(60)
        if self.answers:
            return self.answers.pop(0)
        if body["model"] != "tiny" and body["model"] not in self.adapters:
            return 404, {"error": {**UNKNOWN, "message": UNKNOWN["message"].format(body["model"])}}
        with LOCK:
            return 200, {**COMPLETION, "choices": [self.choice(body, index) for index in range(body.get("n", 1))]}

    def choice(self, body: dict[str, Any], index: int) -> dict[str, Any]:
        """One completion, by the sampler of this package: vLLM, too, gives the i-th of several the seed + i."""
        policy = self.policy(self.adapters.get(body["model"]))
        if "prompt_logprobs" in body:
            return self.scored(body["prompt"], policy)
        engine = InProcessEngine(TOKENIZER)
        engine.sync(policy)
        greedy = body["temperature"] == 0
        temperature = 1.0 if greedy else body["temperature"]
        top_p = body["top_p"] if body["top_p"] < 1 else None
        sampling = RolloutConfig(
            max_new_tokens=body["max_tokens"],
            temperature=temperature,
            top_k=body["top_k"] or None,
            top_p=top_p,
            stop=body.get("stop", []),
        )
        sample = engine.generate([body["prompt"]], 1, sampling, [body["seed"] + index], greedy=greedy)
        tokens, logprobs_T = sample.completion_tokens_T.tolist(), sample.logprobs_T
        if self.logprobs_mode == "raw_logprobs":
            logprobs_T = policy.score_without_gradient([Group(body["prompt"], [tokens])], 1.0)[0]
        elif sampling.top_k == 1:
            logprobs_T = torch.zeros_like(logprobs_T)  # behind the filter nothing else is left
        reason, self.reason = self.reason or str(sample.finish_reasons[0]), None
        logprobs = {"text_offset": [], "token_logprobs": logprobs_T.tolist(), "tokens": [], "top_logprobs": []}
        text = {"index": index, "text": sample.texts[0], "finish_reason": reason, "token_ids": tokens}
        return {**CHOICE, **text, "logprobs": logprobs, "prompt_token_ids": body["prompt"]}

    def scored(self, prompt: list[int], policy: Policy) -> dict[str, Any]:
        """A prompt's log-probs: at temperature 1, whatever was asked for, and none of its first token."""
        logprobs_T = policy.score_without_gradient([Group(prompt[:1], [prompt[1:]])], 1.0)[0]
        known = [
            {str(token): {"logprob": logprob, "rank": 1, "decoded_token": "?"}}
            for token, logprob in zip(prompt[1:], logprobs_T.tolist(), strict=True)
        ]
        return {**CHOICE, "index": 0, "text": "?", "finish_reason": "length", "prompt_logprobs": [None, *known]}


@cache
def _model(rank: int | None) -> Policy:
    """One for all stubs: loading is most of a test's time, and transformers does not load in two threads at once."""
    config = PolicyConfig("tiny", lora=None if rank is None else LoRAConfig(rank=rank, alpha=32))
    return Policy(load_model(config), config)


class _Handler(BaseHTTPRequestHandler):
    stub: Stub

    def do_GET(self) -> None:
        self._send(*self.stub.answer(self.path, {}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._send(*self.stub.answer(self.path, body))

    def _send(self, status: int, content: Any) -> None:
        self.stub.authorizations.append(self.headers["Authorization"])
        text = content if isinstance(content, str) else "" if content is None else json.dumps(content)
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 64  # requests come all at once
    daemon_threads = False  # `server_close` waits for them


class Running:
    """A stub at an address, which can go away and come back as a server that was started again: without adapters."""

    def __init__(self) -> None:
        self.stub = Stub()
        self._server: Server | None = None
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        handler = type("Handler", (_Handler,), {"stub": self.stub})
        self._server = Server(("127.0.0.1", self._port), handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        server, self._server = self._server, None  # a test's thread may stop it, too
        if server is not None:
            server.shutdown()
            server.server_close()
        self.stub.adapters.clear()
        self.stub.whole = None
        if self.stub.transfer is not None:
            self.stub.transfer.forget()


@contextmanager
def running() -> Iterator[Running]:
    server = Running()
    try:
        yield server
    finally:
        server.stop()


# The engine, and a policy to sample from ------------------------------------------------------------------------------


@cache
def _adapted() -> tuple[Policy, dict[str, torch.Tensor]]:
    config = PolicyConfig("tiny", lora=LoRAConfig(rank=4))
    policy = Policy(load_model(config), config)
    change(policy)
    return policy, {name: value.clone() for name, value in policy.state_dict().items()}


def adapted() -> Policy:
    """A policy whose adapter does something; the same for each test."""
    policy, weights = _adapted()
    policy.load_state_dict(weights)
    return policy


def change(policy: Policy, scale: float = 0.1) -> None:
    """Moves the trained weights, by the same noise each time."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def synced_engine(server: Running, policy: Policy, sampling: RolloutConfig = SAMPLING, **options: Any) -> VLLMEngine:
    """An engine whose server has the policy's weights."""
    engine = VLLMEngine([server.url], **options)
    engine.setup(TOKENIZER, sampling)
    engine.sync(policy)
    return engine
