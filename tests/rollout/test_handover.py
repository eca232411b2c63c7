"""A whole model in a folder: what servers read is what the policy is, in their dtype."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from stateset_lightning.rollout import handover
from stateset_lightning.rollout.handover import roomy_folder, weights_by_block, write_model


# a head of its own; tied; another layout; fused experts, which the hub's checkpoints have one by one
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_what_is_written_is_the_model_with_the_names_of_save_pretrained(
    name: str, dtype: torch.dtype, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_model(name)
    write_model(model, weights_by_block(model, dtype), tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    ours = {key: tensor for file in files for key, tensor in tensors(file).items()}
    theirs = tensors(tmp_path / "theirs" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key].to(dtype)) for key in theirs)
    assert {tensor.dtype for tensor in ours.values()} == {dtype}
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())["weight_map"]
    assert {key: tmp_path / "ours" / file for key, file in index.items()} == {
        key: file for file in files for key in tensors(file)
    }
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=dtype).state_dict()
    assert all(torch.equal(read[key], value.to(dtype)) for key, value in model.state_dict().items())


def tensors(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(file, "pt") as stream:
        return {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118


def test_a_block_at_a_time_is_in_memory(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    sizes = [sum(tensor.nbytes for tensor in block.values()) for block in weights_by_block(model, torch.bfloat16)]
    embedding = 2 * model.config.vocab_size * model.config.hidden_size
    layer = 2 * sum(p.numel() for p in model.model.layers[0].parameters())
    assert sizes == [embedding, layer, layer, 2 * model.config.hidden_size, embedding]


@pytest.mark.parametrize("free", [0, 100, 10**6])
def test_shared_memory_is_used_where_it_has_room(
    free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(handover, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    fits = free == 10**6
    assert (roomy_folder(1000) == str(tmp_path)) is fits
    assert ("do not fit" in caplog.text) is not fits
    monkeypatch.setattr(handover, "SHARED_MEMORY", tmp_path / "none")
    assert roomy_folder(1000) != str(tmp_path)
