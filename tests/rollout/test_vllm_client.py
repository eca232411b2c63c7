"""Servers that go away, come back, break off or refuse."""

from __future__ import annotations

import json
import re
import threading
import time

import pytest
from timing import within
from vllm_stub import PROMPTS, SAMPLING, SEEDS, Running, adapted, synced_engine

from stateset_lightning.errors import ServerError
from stateset_lightning.rollout.vllm_client import ServerLost, VLLMServer


def test_a_server_that_is_started_again_gets_its_weights_back(server: Running) -> None:
    policy = adapted()
    engine = synced_engine(server, policy)
    wanted = engine.generate(PROMPTS, 2, SAMPLING, SEEDS)
    assert engine.pop_metrics()["work/server_restarts"] == (0, 1.0)
    server.stop()
    threading.Timer(0.3, server.start).start()
    rollout = engine.generate(PROMPTS, 2, SAMPLING, SEEDS)
    assert rollout.completions() == wanted.completions()
    assert engine.pop_metrics()["work/server_restarts"] == (1, 1.0)  # six requests failed, one of them saw to it
    server.stub.adapters.clear()  # it was quicker than us: nothing was refused but the name
    assert engine.generate(PROMPTS, 2, SAMPLING, SEEDS).completions() == wanted.completions()
    assert len(server.stub.bodies("/v1/load_lora_adapter")) == 3


def test_a_server_that_stays_away_ends_the_run_in_time(server: Running) -> None:
    engine = synced_engine(server, adapted(), max_wait_minutes=0.5 / 60)
    server.stop()
    expected = rf"{server.url} has been away for 0.00833 minutes \(model.engine.max_wait_minutes; .*refused"

    def loses_it() -> None:
        with pytest.raises(ServerError, match=expected):
            engine.generate(PROMPTS, 2, SAMPLING, SEEDS)

    within(1.5, loses_it)


def test_a_broken_answer_is_asked_for_again_and_a_refusal_is_not(server: Running) -> None:
    engine = synced_engine(server, adapted())
    wanted = engine.generate(PROMPTS, 2, SAMPLING, SEEDS).completions()
    server.stub.answers = [(500, "Internal Server Error"), (503, "{}"), (200, "a page of a proxy")]
    server.stub.reason = "abort"
    assert engine.generate(PROMPTS, 2, SAMPLING, SEEDS).completions() == wanted
    refusal = {
        "error": {
            "message": "max_tokens=600 cannot be greater than max_model_len=512.",
            "type": "BadRequestError",
            "code": 400,
        }
    }
    server.stub.answers = [(400, json.dumps(refusal))]
    with pytest.raises(ServerError, match=r"/v1/completions refuses \(400\): max_tokens=600 cannot be greater"):
        engine.generate(PROMPTS, 2, SAMPLING, SEEDS)


def test_a_server_may_be_away_more_than_once_for_one_request(server: Running) -> None:
    """A request that was served for longer than the longest absence has its whole patience again when the server goes
    once more.
    """
    lost = VLLMServer(server.url, request_timeout=10, max_wait=0.3)
    attempts = iter([0.0, 0.5, 0.5, 0.0])

    def attempt() -> str:
        time.sleep(next(attempts))
        if lost.restored < 3:
            raise ServerLost("gone")
        return "answer"

    assert lost.patiently(attempt) == "answer"
    assert lost.restored == 3


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ('{"error": {"message": "no such model"}}', "no such model"),
        ('{"error": {"code": 7}}', "{'code': 7}"),
        ('["first", "second"]', "['first', 'second']"),
        ("<html>\n  a proxy's\n</html>", "<html> a proxy's </html>"),
        ("", "Bad Request"),
    ],
)
def test_a_refusal_is_told_whatever_its_form(server: Running, answer: str, said: str) -> None:
    server.stub.answers = [(400, answer)]
    with pytest.raises(ServerError, match=rf"/v1/completions refuses \(400\): {re.escape(said)}$"):
        VLLMServer(server.url, request_timeout=10, max_wait=1).complete({"model": "tiny"})


def test_the_key_in_the_environment_is_sent_along(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    VLLMServer(server.url, request_timeout=10, max_wait=1).call("/health")
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    VLLMServer(server.url, request_timeout=10, max_wait=1).call("/health")
    assert server.stub.authorizations == [None, "Bearer secret"]
