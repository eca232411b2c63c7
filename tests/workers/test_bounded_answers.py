"""Answers of an OpenAI-compatible server are checked: by a schema, in size, and in time as a whole."""

import asyncio
import gzip
import json
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from stateset_lightning.errors import ConfigError
from stateset_lightning.rewards import ModelJudge, Scorer
from stateset_lightning.types import Turn
from stateset_lightning.workers import OpenAIClient
from stateset_lightning.workers.addresses import is_this_machine
from stateset_lightning.workers.bounded_http import LARGEST_ANSWER


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.paths.append(self.path)
        with suppress(OSError):  # the client has hung up
            self.server.answer(self)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.paths = True, []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def send(body, status=200, **headers):
    def answer(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    return answer


def drips(handler):
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.02)


def drips_headers(handler):
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n")
    while True:
        handler.wfile.write(b"x-more: of it\r\n")
        handler.wfile.flush()
        time.sleep(0.02)


def completion(content="Score: 5", usage=None, **choice):
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"} | choice
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}


def ask(server, *, address="", **options):
    url = f"http://{address}127.0.0.1:{server.server_port}/v1"
    judge = ModelJudge("m", "Good?", base_url=url, max_retries=1, **{"request_timeout": 30, **options})
    with Scorer(judge) as scorer:
        session = scorer.start(1)
        session.submit(0, [Turn("assistant", "An answer.")])
        scores = session.collect()
    return scores, judge.take_counts()


SCHEMA = "ServerError", "no chat completion: "


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (send(b""), *SCHEMA),
        (send(b"<html>welcome</html>"), *SCHEMA),
        (send(b"null"), *SCHEMA),
        (send(b"[" * 100_000), *SCHEMA),
        (send(b"\xff\xfe"), *SCHEMA),
        (send([]), *SCHEMA),
        (send({}), *SCHEMA),
        (send({"choices": None}), *SCHEMA),
        (send({"choices": "abc"}), *SCHEMA),
        (send({"choices": []}), *SCHEMA),
        (send({"choices": [None]}), *SCHEMA),
        (send({"choices": [{"message": "text"}]}), *SCHEMA),
        (send(completion(message=None)), *SCHEMA),
        (send(completion(content=["Score: 5"])), *SCHEMA),
        (send(completion(content=5)), *SCHEMA),
        (send(completion(content="x" * 1_000_001)), *SCHEMA),
        (send(completion(finish_reason=7)), *SCHEMA),
        (send(completion(usage="many")), *SCHEMA),
        (send(completion(usage={"prompt_tokens": 10**400})), *SCHEMA),
        (send(completion(usage={"prompt_tokens": 10**12})), *SCHEMA),
        (send(completion(usage={"prompt_tokens": -1})), *SCHEMA),
        (send(completion(usage={"completion_tokens": float("nan")})), *SCHEMA),
        (send(completion(usage={"completion_tokens": float("inf")})), *SCHEMA),
        (send(completion(usage={"completion_tokens": 0.5})), *SCHEMA),
        (send(b" " * (LARGEST_ANSWER + 1)), "ServerError", "the answer has more than 8,388,608 bytes"),
        (send(gzip.compress(b" " * 10**8), content_encoding="gzip"), "ServerError", "the answer has more than"),
        (send(b"x" * 10**6, 400), "BadRequestError", "Error code: 400"),
        (send({"error": {"message": "no\nsuch\x1b[2Jmodel" * 9999}}, 404), "NotFoundError", "no such"),
        (send(b"\x00\xff", 422), "UnprocessableEntityError", ""),
        (send({}, 302, location="ftp://nowhere"), "APIConnectionError", "ftp"),
    ],
)
def test_a_malformed_answer_fails_its_completion_in_one_line(server, answer, error, message):
    server.answer = answer
    scores, counts = ask(server, address="me:pw@")
    (failure,) = scores.failures
    assert failure.error == error
    assert failure.message.startswith(f"http://127.0.0.1:{server.server_port}/v1: ")
    assert message in failure.message
    assert len(failure.message) < 700
    assert "\n" not in failure.message
    assert "pw" not in failure.message
    assert (counts["calls"], counts["retries"]) == (1, len(server.paths) - 1)


@pytest.mark.parametrize("answer", [drips, drips_headers, lambda handler: time.sleep(60)])
def test_an_answer_without_end_is_late_whatever_drips(server, answer):
    server.answer = answer
    begin = time.monotonic()
    scores, counts = ask(server, request_timeout=0.2)
    assert time.monotonic() - begin < 10
    assert [failure.error for failure in scores.failures] == ["APITimeoutError"]
    assert "127.0.0.1" in scores.failures[0].message
    assert (len(server.paths), counts["calls"], counts["retries"]) == (2, 1, 1)


def test_a_broken_connection_is_counted_and_named(server):
    server.answer = lambda handler: handler.connection.close()
    scores, counts = ask(server)
    assert [failure.error for failure in scores.failures] == ["APIConnectionError"]
    assert (len(server.paths), counts["retries"]) == (2, 1)


@pytest.mark.parametrize(
    "reply",
    [
        "score " + "*" * 500_000,
        "score " + " _" * 250_000 + "x",
        "score: 5" + " " * 500_000 + "x",
        "*" * 500_000,
        " " * 500_000 + "x",
        "score: " + "9" * 500_000,
        "9" * 500_000 + "x",
        "score: 5" + "." * 500_000 + "/",
        "score: 5/" + "9" * 500_000,
        "٣" * 5000,
        "Score: 1e400",
    ],
    ids=lambda reply: repr(reply[:9]),
)
def test_a_reply_that_is_hard_to_read_fails_at_once(server, reply):
    server.answer = send(completion(reply))
    begin = time.monotonic()
    scores, _ = ask(server)
    assert time.monotonic() - begin < 10
    assert [failure.error for failure in scores.failures] == ["RewardError"]
    assert len(scores.failures[0].message) < 10_000


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_proxy_is_not_used_for_this_machine(server, monkeypatch, name):
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    server.answer = send(completion())
    assert ask(server)[0].totals_N.tolist() == [0.5]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://localhost:8000/v1", True),
        ("http://judge.localhost/v1", True),
        ("http://127.8.9.1/v1", True),
        ("http://[::1]:8000/v1", True),
        ("http://0.0.0.0:8000/v1", True),
        ("https://api.openai.com/v1", False),
        ("http://127.0.0.1.example.com/v1", False),
        ("http://10.0.0.1/v1", False),
        ("http://notlocalhost/v1", False),
    ],
)
def test_which_addresses_are_this_machine(url, expected):
    assert is_this_machine(url) is expected


def test_a_proxy_is_used_for_other_machines(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{server.server_port}")
    server.answer = send(completion())
    client = OpenAIClient("judge", "m", request={}, base_url="http://judge.example.com/v1")
    assert asyncio.run(client.ask([], lambda text, cut: text)) == ("Score: 5", "Score: 5")
    assert server.paths == ["http://judge.example.com/v1/chat/completions"]


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host/v1", "nonsense", "http://", "http://[::1", "http://host:port"]
)
def test_what_is_no_address_is_refused_at_the_start(url):
    with pytest.raises(ConfigError, match="base_url"):
        ModelJudge("m", "Good?", base_url=url)
