"""A whole model for a vLLM server on the policy's own GPU, through memory that both see (vLLM's `ipc` engine).

What is spoken is vLLM's "Weight Transfer" (docs.vllm.ai, version 0.32). None of vLLM's code is needed here.
"""

import pickle
from base64 import b64encode
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from stateset_lightning.errors import ConfigError, ServerError
from stateset_lightning.rollout.vllm_client import VLLMServer

NEEDED = (
    "VLLM_SERVER_DEV_MODE=1, VLLM_ALLOW_INSECURE_SERIALIZATION=1 and --weight-transfer-config"
    """ '{"backend": "ipc"}', on the GPU of the policy (model.engine.transfer=ipc)"""
)


def shared(buffer: Tensor) -> dict[str, Any]:
    """What another process opens a GPU's memory with (CUDA IPC), by the GPU's UUID.

    Raises:
        ConfigError: If it is no GPU's.
    """
    if not buffer.is_cuda:
        what = f"the policy is on device {buffer.device.type}, and only a CUDA device's memory can be shared"
        raise ConfigError(f"model.engine.transfer=ipc: {what}: take files")
    return {str(torch.cuda.get_device_properties(buffer.device).uuid): reduce_tensor(buffer)[1]}


def updates(model: PreTrainedModel, blocks: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Any]]:
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
        info: dict[str, Any] = {"names": list(named), "tensor_sizes": sizes, "ipc_handles_pickled": handles.decode()}
        info["dtype_names"] = [str(tensor.dtype).removeprefix("torch.") for tensor in named.values()]
        info["shapes"] = [list(tensor.shape) for tensor in named.values()]
        yield {"update_info": info}


def send(server: VLLMServer, model: PreTrainedModel, blocks: Iterable[dict[str, Tensor]]) -> None:
    """Gives a server the weights of these blocks.

    Raises:
        ConfigError: If the weights are not on a CUDA device; the server is not asked then.
        ServerError: If the server refuses.
        ServerLost: If it is away.
    """
    for number, update in enumerate(updates(model, blocks)):
        if number == 0:
            server.tell("/init_weight_transfer_engine", {"init_info": {"packed": True}}, NEEDED)
            try:
                server.call("/start_weight_update", {})
            except ServerError:  # an update was broken off: perhaps that of a run that was killed
                server.tell("/finish_weight_update", {}, NEEDED)
                server.tell("/start_weight_update", {}, NEEDED)
        server.tell("/update_weights", update, NEEDED)
    server.tell("/finish_weight_update", {}, NEEDED)
    if torch.cuda.is_available():
        torch.cuda.ipc_collect()  # the server has closed the buffer: its memory may be used again
