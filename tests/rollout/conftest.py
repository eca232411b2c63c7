"""A stub of a vLLM server with retries that do not wait, and a policy with an adapter, for tests that ask for them."""

from collections.abc import Iterator

import pytest
import torch
from vllm_stub import Running, running

from stateset_lightning.policy import LoRAConfig, Policy, PolicyConfig, load_model
from stateset_lightning.rollout import vllm_client


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setattr(vllm_client, "FIRST_PAUSE", 0.02)
    with running() as server:
        yield server


@pytest.fixture
def adapted_policy() -> Policy:
    """The bundled model with an adapter that does something, in evaluation."""
    config = PolicyConfig("tiny", lora=LoRAConfig(rank=4))
    policy = Policy(load_model(config), config).eval()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    return policy
