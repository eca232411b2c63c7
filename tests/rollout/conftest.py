"""A stub of a vLLM server for each test that asks for one, and retries that do not wait."""

from collections.abc import Iterator

import pytest
from vllm_stub import Running, running

from stateset_lightning.rollout import vllm_client


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setattr(vllm_client, "FIRST_PAUSE", 0.02)
    with running() as server:
        yield server
