"""Servers that go away, come back, break off or refuse."""

from __future__ import annotations

import json
import re
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain, count, cycle, repeat
from typing import Any

import pytest
from timing import within
from vllm_stub import PROMPTS, SAMPLING, SEEDS, TOKENIZER, Running, adapted, synced_engine

from stateset_lightning.errors import ConfigError, ServerError
from stateset_lightning.rollout import VLLMEngine, vllm_client
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
    with pytest.raises(ServerError, match=r"/v1/completions refuses \(400\): .*max_tokens=600 cannot be greater"):
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
        ('{"error": {"message": "no such model"}}', '{"error": {"message": "no such model"}}'),
        ("<html>\n  a proxy's\n</html>", "<html> a proxy's </html>"),
        ("", "Bad Request"),
    ],
)
def test_a_refusal_is_told_whatever_its_form(server: Running, answer: str, said: str) -> None:
    server.stub.answers = [(400, answer)]
    with pytest.raises(ServerError, match=rf"/v1/completions refuses \(400\): {re.escape(said)}$"):
        VLLMServer(server.url, request_timeout=10, max_wait=1).choices({"model": "tiny"})


def test_the_key_in_the_environment_is_sent_along(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    VLLMServer(server.url, request_timeout=10, max_wait=1).call("/health")
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    VLLMServer(server.url, request_timeout=10, max_wait=1).call("/health")
    url = server.url.replace("://", "://me:pass%20word@")
    VLLMServer(url, request_timeout=10, max_wait=1).call("/health")
    assert server.stub.authorizations == [None, "Bearer secret", "Basic bWU6cGFzcyB3b3Jk"]


# Answers that no vLLM gives -------------------------------------------------------------------------------------------

BODY = {"model": "tiny", "prompt": [5, 6], "max_tokens": 4}
CHOICE = {"token_ids": [5, 1], "logprobs": {"token_logprobs": [-1.5, 0]}, "finish_reason": "stop"}
Written = bytes | Iterator[bytes]


class Hostile(socketserver.ThreadingTCPServer):
    """Answers completions (and the question for its models) with bytes that a test gives; all else with an empty 200.

    What comes from an iterator goes out piece by piece, every 20 ms, as long as anybody listens.
    """

    daemon_threads, allow_reuse_address, request_queue_size = True, True, 64

    def __init__(self, written: Callable[[], Written]) -> None:
        super().__init__(("127.0.0.1", 0), _HostileHandler)
        self.written, self.asked = written, 0
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def server_close(self) -> None:
        self.shutdown()
        super().server_close()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class _HostileHandler(socketserver.StreamRequestHandler):
    server: Hostile

    def handle(self) -> None:
        if not (words := self.rfile.readline().split()):
            return  # the client has given up
        headers = dict(line.rstrip().split(b": ", 1) for line in iter(self.rfile.readline, b"\r\n"))
        self.rfile.read(int(headers.get(b"Content-Length", 0)))
        if words[1] not in (b"/v1/completions", b"/v1/models"):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            return
        self.server.asked += 1
        written = self.server.written()
        with suppress(OSError):  # nobody listens any more
            for part in [written] if isinstance(written, bytes) else written:
                self.wfile.write(part)
                if len(part) < 2:
                    time.sleep(0.02)


def told(content: Any, status: str = "200 OK", headers: str = "") -> Callable[[], bytes]:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda: f"HTTP/1.1 {status}\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


def of_choice(**changes: Any) -> Callable[[], bytes]:
    return told({"choices": [CHOICE | changes]})


def of_logprobs(*logprobs: Any) -> Callable[[], bytes]:
    return of_choice(logprobs={"token_logprobs": logprobs})


def dripping(begin: bytes, endless: bytes) -> Callable[[], Iterator[bytes]]:
    """A byte every 20 ms, for ever."""
    return lambda: (bytes([byte]) for byte in chain(begin, cycle(endless)))


def flooding(begin: bytes, endless: bytes) -> Callable[[], Iterator[bytes]]:
    return lambda: chain([begin], repeat(endless * (65536 // len(endless))))


OK = b"HTTP/1.1 200 OK\r\n"
REFUSED = "400 Bad Request"
HOSTILE = {
    # asked again, and then the end
    "no JSON": (told(b"<html>\x1b[2J</html>"), "Invalid JSON"),
    "cut off": (lambda: OK + b'Content-Length: 999\r\n\r\n{"choices": [', "Invalid JSON"),
    "nothing": (told(b""), "Invalid JSON"),
    "no UTF-8": (told(b'{"choices": "\xff"}'), "Invalid JSON"),
    "packed": (told(b"\x1f\x8b\x08\x00", headers="Content-Encoding: gzip\r\n"), "Invalid JSON"),
    "deep": (told(b"[" * 100_000), "Invalid JSON: recursion limit"),
    "a list": (told([]), "valid dictionary|object"),
    "no choices": (told({"error": "\x1b]0;title\x07"}), "choices: Field required"),
    "choices null": (told({"choices": None}), "choices: Input should be a valid array"),
    "none": (told({"choices": []}), "0 completions where 1 were"),
    "two": (told({"choices": [CHOICE, CHOICE]}), "2 completions where 1 were"),
    "a choice null": (told({"choices": [None]}), "choices.0: Input should be an object"),
    "no tokens": (of_choice(token_ids=[], logprobs={"token_logprobs": []}), "0 tokens where 1 to 4"),
    "tokens null": (of_choice(token_ids=None), "token_ids: Input should be a valid array"),
    "50 times the tokens": (of_choice(token_ids=[5] * 200, logprobs={"token_logprobs": [-1] * 200}), "200 tokens"),
    "other id": (of_choice(token_ids=[5, 100]), "token 100 of a vocabulary of 100"),
    "negative id": (of_choice(token_ids=[5, -1]), r"token_ids\.1: Input should be greater than or equal to 0"),
    "no int64": (of_choice(token_ids=[5, 2**63]), r"token_ids\.1: Input should be less than"),
    "5,000 digits": (told(b'{"choices": [{"token_ids": [' + b"9" * 5000 + b"]}]}"), "Invalid JSON|token_ids"),
    "true as id": (of_choice(token_ids=[5, True]), r"token_ids\.1: Input should be a valid integer"),
    "text as id": (of_choice(token_ids=[5, "1"]), r"token_ids\.1: Input should be a valid integer"),
    "half an id": (of_choice(token_ids=[5, 1.5]), r"token_ids\.1: Input should be a valid integer"),
    "no log-probs": (of_choice(logprobs=None), r"logprobs\S*: Field required"),
    "fewer log-probs": (of_logprobs(-1.0), "1 log-probs of 2 tokens"),
    "log-prob above 0": (of_logprobs(-1.0, 0.02), r"a log-prob of 0\.02, above 0"),
    "true as log-prob": (of_logprobs(-1.0, False), r"token_logprobs\.1: Input should be a valid number"),
    "text as log-prob": (of_logprobs(-1.0, "-1"), r"token_logprobs\.1: Input should be a valid number"),
    "broken off": (of_choice(finish_reason="abort"), "finish_reason: Input should be 'stop' or 'length'"),
    "no reason": (of_choice(finish_reason=None), "finish_reason: Input should be 'stop' or 'length'"),
    "100 MB told": (lambda: OK + b"Content-Length: 100000000\r\n\r\n" + b" " * 2**21, "far longer"),
    "endless body": (flooding(OK + b"\r\n", b" "), "far longer"),
    "endless chunks": (flooding(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"), "far longer"),
    "endless 100s": (flooding(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), "far longer"),
    "dripping status": (dripping(b"HTTP/1.1 200 ", b"x"), r"no whole answer within 0\.2 s \(model.engine.request"),
    "dripping headers": (dripping(OK + b"X: ", b"x"), r"no whole answer within 0\.2 s"),
    "dripping body": (dripping(OK + b"\r\n", b" "), r"no whole answer within 0\.2 s"),
    "dripping chunks": (dripping(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"), "no whole answer"),
    "hanging": (lambda: (b"" for _ in count()), r"no whole answer within 0\.2 s"),
    "infinite": (of_logprobs(float("nan"), float("inf")), r"a log-prob of inf, above 0"),
    # asked once
    "redirected": (told(b"", "302 Found", "Location: http://10.0.0.1/\x1b[2J\r\n"), r"\(302\).* http://10.0.0.1/ \[2J"),
    "nested refusal": (told(b'{"error":' * 100_000, REFUSED), r"refuses \(400\)"),
    "a number's refusal": (told(b'{"error": ' + b"9" * 5000 + b"}", REFUSED), r"refuses \(400\): \{\"error\": 999"),
    "lines": (told("a\nb\u2028c\x1b[2J".encode(), REFUSED), r"refuses \(400\): a b c \[2J$"),
    # no answer
    "no HTTP": (lambda: b"SSH-2.0-OpenSSH_9.6\r\n", "has been away .*BadStatusLine: SSH-2.0"),
    "too many headers": (lambda: OK + b"A: b\r\n" * 200, "has been away .*more than 100 headers"),
    "a long header": (lambda: OK + b"A: " + b"b" * 70_000, "has been away .*LineTooLong"),
    "silence": (lambda: b"", "has been away .*RemoteDisconnected"),
    "always 500": (told(b"\x1b[2J" * 10_000, "500 Internal Server Error"), r"has been away .*HTTP 500: \[2J"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_an_answer_that_cannot_be_used_ends_the_run_in_one_line(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a number of attempts, in bounded time; with the server's address, and without the password in it."""
    written, expected = HOSTILE[case]
    is_slow, is_bad = "no whole answer" in expected, list(HOSTILE).index(case) < list(HOSTILE).index("redirected")
    monkeypatch.setattr(vllm_client, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nobody is: it is not asked
    with Hostile(written) as server:
        client = VLLMServer(
            f"http://user:hunter2hunter2@{server.address}/v1",
            request_timeout=0.2 if is_slow else 30,
            max_wait=5 if is_bad else 0.1,
        )
        client.vocabulary = 100
        begun = time.monotonic()
        with pytest.raises(ServerError, match=expected) as error:
            client.patiently(lambda: client.choices(BODY))
        assert time.monotonic() - begun < 10
        message = str(error.value)
        assert f"http://{server.address}" in message
        assert "hunter2" not in message
        assert len(message) < 700
        assert message.isprintable()
        if is_bad:
            assert (server.asked, "attempt 3 of 3" in message) == (3, True)


def test_a_usable_answer_is_taken() -> None:
    """So the cases above fail for what each changes; rounding may lift a log-prob above 0 by a little."""
    length = of_choice(finish_reason="length", token_ids=[0, 99])
    for written in (of_choice(), of_logprobs(-99.0, 1e-4), of_logprobs(None, -1.0), length):
        with Hostile(written) as server:
            client = VLLMServer(f"http://{server.address}", request_timeout=30, max_wait=1)
            client.vocabulary = 100
            (choice,) = client.choices(BODY)
            assert len(choice.token_ids) == 2


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"data": []}, "names no model that it serves"),
        ({"data": [{"id": "lora", "parent": "tiny"}]}, "names no model that it serves"),
        ({"data": [{"id": "tiny", "max_model_len": None}]}, "names no model that it serves"),
        ({"data": [{"id": "tiny", "max_model_len": True}]}, "data.0.max_model_len: Input should be a valid integer"),
        ({"data": [{"id": 7, "max_model_len": 512}]}, "data.0.id: Input should be a valid string"),
        ({"models": []}, "data: Field required"),
    ],
)
def test_a_server_that_is_no_vllm_is_told_at_the_start(
    answer: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_client, "FIRST_PAUSE", 0.01)
    with Hostile(told(answer)) as server, pytest.raises(ServerError, match=rf"http://{server.address} .*{expected}"):
        VLLMEngine([f"http://{server.address}"]).setup(TOKENIZER, SAMPLING)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:99999",
        "http://127.0.0.1:port",
        "http://",
        "http://user:hunter2hunter2@:8000",
        "user:hunter2hunter2@10.0.0.1:8000",
        "http://a..b:8000",
        "http://127.0.0.1:8000/a b",
        "http://127.0.0.1:8000/\r\nX: y",
        "http://[::1:8000",
        "file:///etc/passwd",
    ],
)
def test_what_is_no_address_is_refused_at_once(url: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.engine\.urls: .* is no address") as error:
        VLLMServer(url, request_timeout=10, max_wait=1)
    assert "hunter2" not in str(error.value)


def test_a_key_that_no_header_holds_is_refused_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "first line\nsecond line")
    with pytest.raises(ConfigError, match="VLLM_API_KEY holds characters that cannot be sent") as error:
        VLLMServer("http://127.0.0.1:8000", request_timeout=10, max_wait=1)
    assert "line\n" not in str(error.value)
