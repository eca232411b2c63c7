"""Cases of hostile servers: a judge and vLLM that answer what no server should, late, or not at all."""

from __future__ import annotations

import gzip
import json
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from cases import Place, Plan, hostile_value, leaves, listening_socket, put

JUDGED = {
    "id": "c",
    "object": "chat.completion",
    "created": 1,
    "model": "judge",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Good.\nScore: 7"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8},
}
Asked = tuple[str, dict[str, str], dict[str, Any]]
"""Path, headers and body of a request."""


def receive(connection: socket.socket) -> Asked | None:
    """A request; None where the other side has gone."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (part := connection.recv(65_536)):
            return None
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    while len(body) < int(headers.get("content-length", 0)):
        if not (part := connection.recv(65_536)):
            return None
        body += part
    return first.split()[1], headers, json.loads(body or b"{}")


def answer(content: bytes, status: int = 200, **headers: Any) -> bytes:
    """An HTTP answer; a header that is None is left out."""
    wanted = {"Content-Type": "application/json", "Content-Length": len(content), "Connection": "close"}
    wanted |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{name}: {value}" for name, value in wanted.items() if value is not None]
    return "\r\n".join([f"HTTP/1.1 {status} X", *lines, "", ""]).encode("latin-1") + content


# How bytes are sent ---------------------------------------------------------------------------------------------------

Send = Callable[[socket.socket, bytes], None]


def at_once(connection: socket.socket, data: bytes) -> None:
    connection.sendall(data)


def dripping(connection: socket.socket, data: bytes) -> None:
    for byte in data:
        connection.sendall(bytes([byte]))
        time.sleep(0.2)


def half(connection: socket.socket, data: bytes) -> None:
    connection.sendall(data[: len(data) // 2])


def half_then_nothing(connection: socket.socket, data: bytes) -> None:
    connection.sendall(data[: len(data) // 2])
    time.sleep(60)


def nothing(connection: socket.socket, data: bytes) -> None:
    time.sleep(60)


def reset(connection: socket.socket, data: bytes) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def endless(connection: socket.socket, data: bytes) -> None:
    connection.sendall(answer(b"", Content_Length=None))
    while True:
        connection.sendall(b'"' + b"x" * 65_536)


def endless_header(connection: socket.socket, data: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        connection.sendall(b"X: " + b"x" * 60_000 + b"\r\n")


SENDS: tuple[Send, ...] = (dripping, half, half_then_nothing, nothing, reset, endless, endless_header)


# What is answered instead ---------------------------------------------------------------------------------------------


def odd_answers(rng: random.Random, good: bytes, asked: Asked, url: str) -> bytes:
    """An answer that is none."""
    key = asked[1].get("authorization", "")
    said = json.dumps({"error": {"message": f"bad {key} at {url}", "headers": {"Authorization": key}}}).encode()
    deep = b"[" * 100_000
    kinds: tuple[Callable[[], bytes], ...] = (
        lambda: answer(good, rng.choice((100, 101, 199, 204, 206, 300, 304, 400, 404, 408, 418, 500, 503, 599))),
        lambda: answer(said, rng.choice((400, 401, 403, 404, 429, 500, 503))),
        lambda: answer(said),
        lambda: answer(key.encode(), 401, Content_Type="text/plain"),
        lambda: answer(good, rng.choice((301, 302, 307, 308)), Location=url + asked[0]),
        lambda: answer(good, 302, Location=rng.choice(("file:///etc/passwd", "gopher://x", "", "http://127.0.0.1:1/"))),
        lambda: answer(good[: rng.randrange(len(good))]),
        lambda: answer(good, Content_Length=len(good) + 50),
        lambda: answer(good, Content_Length=max(len(good) - 9, 0)),
        lambda: answer(good, Content_Length="minus one"),
        lambda: answer(b"zz\r\n" + good, Content_Length=None, Transfer_Encoding="chunked"),
        lambda: answer(b"FFFFFFFFFFFFFFFFF\r\n" + good, Content_Length=None, Transfer_Encoding="chunked"),
        lambda: answer(gzip.compress(b"[" + b"0," * 60_000_000), Content_Encoding="gzip"),
        lambda: answer(good, Content_Encoding="gzip"),
        lambda: answer(good, Content_Encoding="br, zstd, x"),
        lambda: answer(deep),
        lambda: answer(deep + b"]" * 100_000),
        lambda: answer(b'{"a":' * 50_000),
        lambda: answer(b""),
        lambda: answer(b"null"),
        lambda: answer(b"\xff\xfe\x00"),
        lambda: answer(b"NaN"),
        lambda: answer(b"1" * 6_000),
        lambda: answer(b'"' + b"x" * 60_000_000 + b'"'),
        lambda: answer(b"<html>" + b"<p>" * 100_000, Content_Type="text/html"),
        lambda: answer(good, Content_Type="text/plain; charset=utf-99"),
        lambda: answer(good, 429, Retry_After=rng.choice(("1e9", "-1", "nan", "Fri, 31 Dec 9999 23:59:59 GMT", "x"))),
        lambda: answer(b"{}", 503, Retry_After="100000"),
        lambda: b"HTTP/9.9 abc\r\n\r\n",
        lambda: b"nonsense\r\n" * 10,
        lambda: good,
        lambda: b"HTTP/1.1 100 Continue\r\n\r\n" * 500 + answer(good),
        lambda: b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(5_000)) + b"\r\n" + good,
        lambda: answer(good, Set_Cookie="x" * 200_000),
    )
    return rng.choice(kinds)()


REPLIES = (
    "Score: 10\u2028",
    "score " + "*" * 50_000,
    "Score: 1e999",
    "Score: -0",
    "Score: nan",
    "Score: " + "9" * 5_000,
    "Score: 7" + "0" * 5_000,
    "score:" + " " * 50_000 + "x",
    "Score: ٣",
    "Score: 7/10 Score: 3",
    "\ud800 Score: 7",
    "",
    "x" * 3_000_000,
    None,
    7,
    ["Score: 7"],
    {"type": "text", "text": "Score: 7"},
)


def judged(rng: random.Random, mutate: bool) -> bytes:
    """A judge's answer, or one with something wrong in it."""
    content = json.loads(json.dumps(JUDGED))
    if mutate and rng.random() < 0.5:
        content["choices"][0]["message"]["content"] = rng.choice(REPLIES)
    elif mutate:
        put(content, rng.choice([*leaves(content), ("choices",), ("usage",), ("choices", 0, "message")]), odd(rng))
    return json.dumps(content).encode()


def odd(rng: random.Random) -> Any:
    return rng.choice((hostile_value(rng, 2), 10**400, -1, float("nan"), [], {}, None))


# The servers ----------------------------------------------------------------------------------------------------------


def serving(listening: socket.socket, respond: Callable[[socket.socket, Asked], None]) -> Callable[[], None]:
    """A function that serves for ever: each connection in a thread."""

    def talk(connection: socket.socket) -> None:
        with suppress(OSError, ValueError, IndexError), connection:
            if (asked := receive(connection)) is not None:
                respond(connection, asked)

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:  # the case is over
                return
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    return serve


def judge_plan(place: Place) -> Plan:
    rng = place.rng
    listening, url = listening_socket()
    how = rng.choice(("mutated", "mutated", "odd", "odd", "sent"))
    send = rng.choice(SENDS) if how == "sent" else at_once
    share, draw = rng.choice((0.3, 1.0)), random.Random(rng.random())

    def respond(connection: socket.socket, asked: Asked) -> None:
        wrong = draw.random() < share
        good = judged(draw, wrong and how == "mutated")
        if wrong and how == "odd":
            connection.sendall(odd_answers(draw, good, asked, url))
        else:
            (send if wrong else at_once)(connection, answer(good))

    judge = {
        "model": "judge",
        "rubric": "Is it {target}?",
        "base_url": f"{url}/v1",
        "api_key_env": "JUDGE_API_KEY",
        "timeout": 2.0,
        "request_timeout": 1.0,
        "max_retries": 1,
    }
    place.config(
        {
            "model.reward": [{"class_path": "stateset_lightning.rewards.ModelJudge", "init_args": judge}],
            "model.max_reward_failures": rng.choice((0.3, 1.0)),
            "data.eval_batch_size": 4,
        }
    )
    command = rng.choice(("fit", "fit", "validate"))
    title = f"a judge's answers in {command}: {send.__name__ if how == 'sent' else how}, {share:.0%} of them"
    words = [command, "--config", "config.yaml", *place.flags()]
    return Plan(words, title, serve=serving(listening, respond), listening=listening, patience=12.0)


def vllm_plan(place: Place) -> Plan:
    from vllm_stub import Stub

    rng = place.rng
    listening, url = listening_socket()
    stub = Stub()
    how = rng.choice(("mutated", "mutated", "mutated", "odd", "sent"))
    send = rng.choice(SENDS) if how == "sent" else at_once
    share, draw = rng.choice((0.1, 1.0)), random.Random(rng.random())
    good_requests = rng.choice((0, 2, 5, 9))
    lock, seen = threading.Lock(), [0]

    def respond(connection: socket.socket, asked: Asked) -> None:
        path, _, body = asked
        with lock:
            seen[0] += 1
            wrong = seen[0] > good_requests and draw.random() < share
        status, content = stub.answer(path, body)
        if wrong and how == "mutated" and isinstance(content, dict):
            content = json.loads(json.dumps(content))
            for _ in range(draw.choice((1, 1, 3))):
                mutate_completion(content, draw)
        good = (content if isinstance(content, str) else "" if content is None else json.dumps(content)).encode()
        if wrong and how == "odd":
            connection.sendall(odd_answers(draw, good or b" ", asked, url))
        else:
            kind = "text/plain" if isinstance(content, str) else "application/json"
            (send if wrong else at_once)(connection, answer(good, status, Content_Type=kind))

    engine = {"urls": [url], "request_timeout": 2.0, "max_wait_minutes": 0.05}
    place.config(
        {
            "model.policy.lora": {"rank": 2},
            "model.engine": {"class_path": "stateset_lightning.rollout.VLLMEngine", "init_args": engine},
        }
    )
    title = f"vLLM's answers: {send.__name__ if how == 'sent' else how}, {share:.0%} after {good_requests}"
    words = ["fit", "--config", "config.yaml", *place.flags()]
    return Plan(words, title, serve=serving(listening, respond), listening=listening, patience=15.0)


def mutate_completion(content: dict[str, Any], rng: random.Random) -> None:
    """Something wrong in an answer: any place, or what only a completion has."""
    choices = content.get("choices")
    if not choices or rng.random() < 0.4:
        put(content, rng.choice([path for path in leaves(content) if path] or [("x",)]), odd(rng))
        return
    choice, kind = rng.choice(choices), rng.randrange(10)
    if not isinstance(choice, dict) or not isinstance(choice.get("logprobs"), dict):
        return
    ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    if not isinstance(ids, list) or not isinstance(logprobs, list):
        return
    if kind == 0:
        choice["token_ids"] = ids * 50
    elif kind == 1:
        choice["token_ids"], choice["logprobs"]["token_logprobs"] = ids * 50, logprobs * 50
    elif kind == 2:
        choice["token_ids"] = [rng.choice((-1, 10**6, 2**63, 1.5, "7", None, True)) for _ in ids]
    elif kind == 3:
        choice["logprobs"]["token_logprobs"] = [rng.choice((0.5, float("nan"), -1e308, None, "x")) for _ in logprobs]
    elif kind == 4:
        choice["logprobs"]["token_logprobs"] = logprobs[:-1]
    elif kind == 5:
        choice["token_ids"] = []
    elif kind == 6:
        choice["index"] = rng.choice((-1, 5, "0", None))
    elif kind == 7:
        choice["finish_reason"] = rng.choice((None, "abort", 5, "tool_calls", ["stop"]))
    elif kind == 8:
        content["choices"] = choices * rng.choice((0, 2, 100))
    else:
        choice["text"] = rng.choice(("\ud800", None, 5, "x" * 1_000_000))


def plan(place: Place) -> Plan:
    return judge_plan(place) if place.rng.random() < 0.5 else vllm_plan(place)
