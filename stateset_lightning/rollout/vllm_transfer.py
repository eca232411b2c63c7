"""A whole model from the policy's GPU into a vLLM server's, by vLLM's `ipc` and `nccl` engines.

What is spoken is vLLM's "Weight Transfer" (docs.vllm.ai, version 0.32). None of vLLM's code is needed here.
"""

import pickle
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor
from torch.cuda import nccl
from torch.multiprocessing.reductions import reduce_tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from stateset_lightning.errors import ConfigError, ServerError, log, one_line
from stateset_lightning.rollout.vllm_client import Answer, VLLMServer
from stateset_lightning.threads import DaemonThreads, Interruption, as_they_end, wait_for

IPC = (
    "VLLM_SERVER_DEV_MODE=1, VLLM_ALLOW_INSECURE_SERIALIZATION=1 and --weight-transfer-config"
    """ '{"backend": "ipc"}', on the GPU of the policy (model.engine.transfer=ipc)"""
)
NCCL = (
    """VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config '{"backend": "nccl"}', on other GPUs than the policy's and"""
    " with the same version of NCCL (model.engine.transfer=nccl)"
)

# That NCCL may take here once the server has ended or a signal has come, and the server once NCCL has failed here. A
# signal that cuts off a wait after 3 s still ends a run within 10.
SECONDS = 5.0

Blocks = Iterable[dict[str, Tensor]]


def begin(server: VLLMServer, needed: str) -> None:
    """Has a server expect new weights."""
    try:
        server.call("/start_weight_update", {})
    except ServerError:  # an update was broken off: perhaps that of a run that was killed
        server.call("/finish_weight_update", {}, needed=needed)
        server.call("/start_weight_update", {}, needed=needed)


def described(named: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a server is told of tensors that it gets in another way."""
    dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in named.values()]
    return {"names": list(named), "dtype_names": dtypes, "shapes": [list(tensor.shape) for tensor in named.values()]}


# ipc: memory of the GPU that both are on ------------------------------------------------------------------------------


def shared(buffer: Tensor) -> dict[str, Any]:
    """What another process opens a GPU's memory with (CUDA IPC), by the GPU's UUID.

    Raises:
        ConfigError: If it is no GPU's.
    """
    if not buffer.is_cuda:
        what = f"the policy is on device {buffer.device.type}, and only a CUDA device's memory can be shared"
        raise ConfigError(f"model.engine.transfer=ipc: {what}: take files")
    return {str(torch.cuda.get_device_properties(buffer.device).uuid): reduce_tensor(buffer)[1]}


def updates(model: PreTrainedModel, blocks: Blocks) -> Iterator[dict[str, Any]]:
    """Each block as the body of an /update_weights request ("packed": one behind the other in one buffer).

    The buffer holds a block until the next is asked for; the server copies what it keeps before it answers.
    """
    buffer, handles = torch.empty(0, dtype=torch.uint8), b""
    for block in blocks:
        # The widest dtype first, so that no tensor begins inside an item of its own dtype.
        named = dict(sorted(revert_weight_conversion(model, block).items(), key=lambda item: -item[1].itemsize))
        parts = [tensor.reshape(-1).view(torch.uint8) for tensor in named.values()]
        sizes = [len(part) for part in parts]
        if sum(sizes) > len(buffer):
            buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=parts[0].device)
            # The server unpickles it where it has been told to trust us. Nothing is ever unpickled here.
            handles = b64encode(pickle.dumps(shared(buffer)))
        torch.cat(parts, out=buffer[: sum(sizes)])
        if buffer.is_cuda:
            torch.cuda.synchronize(buffer.device)  # written before it is read
        own = {"tensor_sizes": sizes, "ipc_handles_pickled": handles.decode()}
        yield {"update_info": {**described(named), **own}}


def send_by_ipc(server: VLLMServer, model: PreTrainedModel, blocks: Blocks) -> None:
    """Gives a server the weights of these blocks.

    Raises:
        ConfigError: If the weights are not on a CUDA device; the server is not asked then.
        ServerError: If the server refuses.
        ServerLost: If it is away.
    """
    for number, update in enumerate(updates(model, blocks)):
        if number == 0:
            server.call("/init_weight_transfer_engine", {"init_info": {"packed": True}}, needed=IPC)
            begin(server, IPC)
        server.call("/update_weights", update, needed=IPC)
    server.call("/finish_weight_update", {}, needed=IPC)
    if torch.cuda.is_available():
        torch.cuda.ipc_collect()  # the server has closed the buffer: its memory may be used again


# nccl: from one GPU to others -----------------------------------------------------------------------------------------


class Workers(Answer):
    """How many processes of a server take weights."""

    world_size: Annotated[int, Ge(1)]


def group_id(device: torch.device) -> bytes:
    """The id of a new NCCL group.

    Raises:
        ConfigError: If this is not the device of one.
    """
    if device.type != "cuda":
        raise ConfigError(f"model.engine.transfer=nccl: the policy is on device {device.type}, not on CUDA: take files")
    return nccl.unique_id()


def join(group: bytes, size: int, device: torch.device) -> Any:
    """This process as the first of an NCCL group, with a stream; returns once the others have joined."""
    stream = torch.cuda.Stream(device)  # the group's own: of the 32 that PyTorch deals out in turn, one may be stuck
    with torch.cuda.stream(stream):
        comm = nccl.init_rank(size, group, 0)
        # With this each of vLLM's workers begins. The default dtype may be the Trainer's.
        nccl.all_reduce([torch.zeros(1, dtype=torch.float32, device=device)], comms=[comm])
    return comm, stream


def broadcast(tensors: Sequence[Tensor], member: Any) -> None:
    """Sends tensors to the others of a group, on its stream: should they fail, that one waits for ever."""
    comm, stream = member
    stream.wait_stream(torch.cuda.default_stream(stream.device))
    with torch.cuda.stream(stream):
        for tensor in tensors:
            nccl.broadcast([tensor], comms=[comm])
    stream.synchronize()


def at_once(server: VLLMServer, path: str, body: Mapping[str, Any], act: Callable[[], Any]) -> Any:
    """Has the server and this process act together. Returns what `act` does.

    NCCL waits for all its members. So whoever fails ends the wait, and a call of the other may be left in its thread.
    """
    with DaemonThreads(2, "vllm-nccl") as threads:
        theirs, ours = threads.submit(partial(server.call, path, body, needed=NCCL)), threads.submit(act)
        try:
            for future in as_they_end([theirs, ours]):
                future.result()
                if future is theirs and not wait_for(ours, time.monotonic() + SECONDS).done():
                    raise RuntimeError(f"it has ended, and {SECONDS:g} s later NCCL has not")
        except Interruption:
            wait_for(ours, time.monotonic() + SECONDS)  # half a block would keep the server inside NCCL for ever
            raise
        except RuntimeError as error:
            if wait_for(theirs, time.monotonic() + SECONDS).done():
                theirs.result()  # raises what the server says of it, or that it is gone
            what = f"{server.url}{path}: {one_line(str(error))}"
            raise ServerError(f"{what}. The server is started with {NCCL}") from error
        finally:
            if not ours.done():
                log.warning("%s: a call is left inside NCCL. If this process does not end, kill it", server.url)
    return ours.result()


class NcclGroups:
    """For each server an NCCL group: this process, the first in it, and the server's workers.

    A group stays until its server is started again or a transfer fails: PyTorch never gives back what a member takes.
    """

    def __init__(self) -> None:
        self._members: dict[str, Any] = {}  # by the server's address

    def send(self, server: VLLMServer, model: PreTrainedModel, blocks: Blocks) -> None:
        """As `send_by_ipc`."""
        if server.url not in self._members or not self._is_member(server):
            self._join(server, model.device)
            begin(server, NCCL)
        member = self._members.pop(server.url)  # back when all is sent: with a call left inside it is of no more use
        for block in blocks:
            named = revert_weight_conversion(model, block)
            act = partial(broadcast, [tensor.contiguous() for tensor in named.values()], member)
            at_once(server, "/update_weights", {"update_info": described(named)}, act)
        server.call("/finish_weight_update", {}, needed=NCCL)
        self._members[server.url] = member

    def _is_member(self, server: VLLMServer) -> bool:
        """Begins an update. Whether the server would take part: one that was started again knows no group."""
        try:
            begin(server, NCCL)
            server.call("/update_weights", {"update_info": described({})})
        except ServerError as error:
            log.warning("%s joins a new NCCL group, as it does not know ours: %s", server.url, error)
            return False
        return True

    def _join(self, server: VLLMServer, device: torch.device) -> None:
        group = group_id(device)
        size = 1 + server.ask("/get_world_size", Workers, needed=NCCL).world_size
        init = {"nccl_unique_id_b64": b64encode(group).decode(), "rank_offset": 1, "world_size": size, "packed": False}
        act = partial(join, group, size, device)
        self._members[server.url] = at_once(server, "/init_weight_transfer_engine", {"init_info": init}, act)
