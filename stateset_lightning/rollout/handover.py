"""A whole model in a folder that servers read: in the dtype that they compute in, never more than a block in memory."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from stateset_lightning.errors import log
from stateset_lightning.ranks import unsharded

SHARED_MEMORY = Path("/dev/shm")


def roomy_folder(size: int) -> str:
    """Shared memory, if there are `size` bytes free and some to spare; else the system's folder for temporary files."""
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    if free > 1.1 * size:
        return str(SHARED_MEMORY)
    folder = tempfile.gettempdir()
    what = f"of {size / 1e9:.1f} GB do not fit into {SHARED_MEMORY}, where {free / 1e9:.1f} GB are free"
    log.warning("weights %s: they are handed over in %s, slower (model.engine.folder)", what, folder)
    return folder


def weights_by_block(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """The weights by name, in this dtype: those of a block together, any other alone.

    Where weights are sharded, all ranks iterate together: one block at a time is made whole.
    """
    # Parameters and buffers themselves, so that tied ones are one object: they are written under their first name.
    named: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        named.setdefault(id(tensor), (name, tensor))
    in_float32 = model._keep_in_fp32_modules_strict or ()  # parts of names; servers keep these as well

    def whole(name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if tensor.is_floating_point() and not any(part in name for part in in_float32):
            tensor = tensor.to(dtype)  # a shard is cast before it is sent
        return unsharded(tensor)

    # A block is what stands before a name's first number, and that number; of a name without one, all of it.
    for _, block in groupby(named.values(), key=lambda item: re.sub(r"(\.\d+\.).*", r"\1", item[0])):
        yield {name: whole(name, tensor) for name, tensor in block}


def write_model(model: PreTrainedModel, blocks: Iterable[dict[str, Tensor]], folder: Path) -> None:
    """Writes weights as `from_pretrained` and vLLM read them, with the names of the hub: a file for each block."""
    model.config.save_pretrained(folder)
    files: dict[str, str] = {}
    for number, block in enumerate(blocks):
        file = f"model-{number:05}.safetensors"
        named = {name: tensor.cpu().contiguous() for name, tensor in revert_weight_conversion(model, block).items()}
        save_file(named, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(named, file)
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": files}))
