"""Small models of several architectures, built in memory with weights large enough that outputs vary; no network
anywhere.
"""

import os

# Of every test and of what it starts, and set before torch is imported: Lightning's launchers would otherwise take all
# cores for whatever this process does after them, and threads of several workers wait for each other, spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from bundled_shortcuts import bundled_shortcuts
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from stateset_lightning.policy import PolicyConfig, load_model, load_tokenizer

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gpt2")
COMMON = {"vocab_size": 384, "initializer_range": 0.2, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def small_config(name: str, **changes: Any) -> Any:
    """The configuration of a small model; Gemma2's window is shorter than the prompts, and its soft caps bite."""
    if name == "llama":
        return LlamaConfig(**{**COMMON, **SIZES, "num_key_value_heads": 2, **changes})
    if name == "qwen2":
        return Qwen2Config(**{**COMMON, **SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True, **changes})
    if name == "qwen3":
        return Qwen3Config(**{**COMMON, **SIZES, "num_key_value_heads": 1, "head_dim": 8, **changes})
    if name == "mistral":
        return MistralConfig(**{**COMMON, **SIZES, "num_key_value_heads": 2, "sliding_window": None, **changes})
    if name == "mixtral":
        return MixtralConfig(**{**COMMON, **SIZES, "num_key_value_heads": 2, "num_local_experts": 4, **changes})
    if name == "gemma2":
        gemma = {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 4,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        }
        return Gemma2Config(**{**COMMON, **SIZES, "num_key_value_heads": 2, **gemma, **changes})
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    return GPT2Config(**{**COMMON, **sizes, **changes})


def small_model(name: str, **changes: Any) -> PreTrainedModel:
    """The same weights at every call: float32, evaluation mode, biases and norms away from their trivial initial
    values.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attention = "eager" if name == "gemma2" else "sdpa"
        model = AutoModelForCausalLM.from_config(small_config(name, **changes), attn_implementation=attention)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    offset = 0.3 * torch.randn_like(parameter)
                    parameter.add_(
                        offset
                        if "bias" in parameter_name or "norm" in parameter_name or "ln" in parameter_name
                        else 0.0
                    )
    return model.eval()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, then those of many: a worker that gets a long file last works alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -sizes[item.path]))


@pytest.fixture
def wandb_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder is the test's own, and what W&B writes goes there."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    import wandb  # here, for machines that run only the tests of a GPU and lack it

    wandb.teardown()  # its service, if an earlier test has started it, works in that test's folder


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(previous)


@pytest.fixture(scope="session", autouse=True)
def _bundled_shortcuts() -> Iterator[None]:
    with bundled_shortcuts():
        yield


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Lightning leaves LOCAL_RANK and MASTER_PORT behind: a run that a later test starts would wait for ranks that
    nobody starts.
    """
    with patch.dict(os.environ):
        yield


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """The name of each architecture in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """`make_model(architecture, **configuration)` -> a small random model of one's own."""
    return small_model


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """The bundled tokenizer: 384 tokens, `<|end|>` (1) ends a completion, `<|pad|>` (0) pads."""
    return load_tokenizer(PolicyConfig("tiny"))


@pytest.fixture
def tiny_model() -> PreTrainedModel:
    """The bundled model."""
    return load_model(PolicyConfig("tiny"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Callable[..., Path]:
    """`model_folder(architecture, **configuration)` -> a folder that `save_pretrained` wrote, the bundled tokenizer
    beside; made once.
    """
    folders: dict[str, Path] = {}

    def folder(name: str, **changes: Any) -> Path:
        key = f"{name}-{sorted(changes.items())}"
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(name)
            small_model(name, **changes).save_pretrained(folders[key])
            tiny_tokenizer.save_pretrained(folders[key])
        return folders[key]

    return folder
