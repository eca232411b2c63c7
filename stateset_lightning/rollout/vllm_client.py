"""The HTTP client of one vLLM server: JSON requests, patience while the server is away, its weights when it returns.

No answer is taken as it is: each is bounded in size and in time, has a schema, and must be one to what was asked.
"""

import http.client
import io
import json
import math
import os
import re
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Annotated, Any, TypeVar
from urllib.parse import unquote

from annotated_types import Ge, Lt
from pydantic import AliasPath, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from stateset_lightning.errors import ConfigError, NonFiniteError, ServerError, log, one_line
from stateset_lightning.redaction import remember
from stateset_lightning.types import FinishReason
from stateset_lightning.workers.addresses import http_address

T = TypeVar("T")
Schema = TypeVar("Schema", bound=BaseModel)

# Seconds between two attempts; each pause is twice the one before.
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 10.0

# Bad answers to one request that end the run, where the server is there all the time.
ATTEMPTS = 3

# Of an answer at most, with its headers. A token with its text and log-prob takes about a hundred.
BYTES, BYTES_PER_TOKEN = 2**20, 500

# Nats; rounding may make the log-prob of a certain token that much larger than 0.
LARGEST_LOGPROB = 0.01

# What vLLM's API writes for a log-prob of -inf, and in places for NaN; elsewhere NaN comes as it is, or as null.
NO_LOGPROB = -9999.0

# Of a server's log-probs that may be missing. It has none for some nearly certain tokens, of which short answers of a
# trained policy have many; none at all where the weights have diverged.
UNKNOWN_SHARE = 0.5

INT64 = 2**63


class Answer(BaseModel):
    """What is read of an answer of vLLM's OpenAI-compatible API. `true` is no number, and no text is one."""

    model_config = ConfigDict(strict=True)


class Model(Answer):
    """A model that a server has; those with a parent are adapters."""

    id: str
    parent: str | None = None
    max_model_len: Annotated[int, Ge(1), Lt(INT64)] | None = None


class Models(Answer):
    data: list[Model]


def _known(logprob: Any) -> Any:
    """NaN for a log-prob that the server does not know; any other answer as it is."""
    return math.nan if logprob is None or (isinstance(logprob, float) and logprob <= NO_LOGPROB) else logprob


Logprob = Annotated[float, BeforeValidator(_known)]


class Choice(Answer):
    """A completion. Log-probs that the server does not know are NaN."""

    token_ids: list[Annotated[int, Ge(0), Lt(INT64)]]
    logprobs: list[Logprob] = Field(validation_alias=AliasPath("logprobs", "token_logprobs"))
    finish_reason: FinishReason  # `abort` comes from a server that is shutting down


class Choices(Answer):
    choices: list[Choice]


class ServerLost(Exception):
    """The server gave no answer, or one that says that it cannot at the moment or no longer has its weights."""

    def __init__(self, reason: str) -> None:
        super().__init__(one_line(reason))


class BadAnswer(ServerLost):
    """The server is there, and its answer is too late, too large, or none to what was asked."""


class VLLMServer:
    """A server of vLLM's OpenAI-compatible API; several threads may call every method.

    The servers stand beside the trainer: neither a proxy that the environment names nor a redirect is followed.

    Args:
        url: Such as http://127.0.0.1:8000. The environment's VLLM_API_KEY is sent along, if there is one, or the user
            and the password that the address names.
        request_timeout: Seconds that a request may take, from the first byte to the last.
        max_wait: Seconds to wait for a server that is away.
        option: Whose `urls`, `request_timeout` and `max_wait_minutes` these are.

    Attributes:
        url: Without user and password.
        model: Name of the model that the server was started with.
        vocabulary: Token ids are below it.
        restored: How often it went away and came back.
        give_weights: Called when it is back, since a server that was started again has the weights of its start.

    Raises:
        ConfigError: If the address is none, or the key cannot be sent.
    """

    def __init__(self, url: str, *, request_timeout: float, max_wait: float, option: str = "model.engine") -> None:
        remember(url)
        self._option = option
        parts, self.url = http_address(f"{option}.urls", url.rstrip("/").removesuffix("/v1"))
        self._address, self._path = (parts.hostname or "", parts.port), parts.path
        self._connection = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.request_timeout = request_timeout
        self.max_wait = max_wait
        self.model = ""
        self.vocabulary = INT64
        self.restored = 0
        self.give_weights: Callable[[VLLMServer], None] = lambda server: None
        self._lock = threading.Lock()
        self._headers = {"Content-Type": "application/json"}
        if parts.username:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._headers["Authorization"] = f"Basic {b64encode(pair.encode()).decode()}"
        elif key := os.environ.get("VLLM_API_KEY", "").strip():
            if not re.fullmatch("[!-~]+", key):
                raise ConfigError("VLLM_API_KEY holds characters that cannot be sent: check it for blanks and quotes")
            self._headers["Authorization"] = f"Bearer {key}"

    def call(
        self, path: str, body: Mapping[str, Any] | None = None, *, needed: str = "", seconds: float | None = None
    ) -> bytes:
        """One request (GET without a body). Returns the answer.

        Args:
            path: Behind the server's address.
            body: Sent as JSON. An answer to its prompt may be as long as `max_tokens` and `n` say.
            needed: With what the server must have been started. Said where it refuses.
            seconds: That it may take; None for `request_timeout`.

        Raises:
            ServerLost: If there is no answer, or the server is overloaded or broken, or lacks the model to sample from.
            ServerError: If the server refuses.
        """
        data = None if body is None else json.dumps(body).encode()
        seconds = self.request_timeout if seconds is None else seconds
        asked = body or {}
        tokens = asked.get("n", 1) * (len(asked.get("prompt", ())) + asked.get("max_tokens", 0))
        deadline, limit = time.monotonic() + seconds, BYTES + BYTES_PER_TOKEN * tokens
        with closing(self._connection(*self._address, timeout=seconds)) as connection:
            try:
                connection.connect()
                connection.request("GET" if data is None else "POST", self._path + path, data, self._headers)
                answer = http.client.HTTPResponse(_Incoming(connection.sock, deadline, limit))  # type: ignore[arg-type]
                answer.begin()
                content = answer.read(limit)
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, TimeoutError) and connection.sock is not None:
                    raise BadAnswer(f"no whole answer within {seconds:g} s ({self._option}.request_timeout)") from error
                raise ServerLost(f"{type(error).__name__}: {error}") from error
        if 200 <= answer.status < 300:
            return content
        message = one_line(content.decode(errors="replace")) or one_line(answer.reason)
        failed_inside = b"collective_rpc method failed" in content  # as it would each time
        # One that has been started again knows no adapter of ours.
        has_lost_weights = answer.status == 404 and path == "/v1/completions"
        if (answer.status >= 500 and not failed_inside) or answer.status in (408, 429) or has_lost_weights:
            raise ServerLost(f"HTTP {answer.status}: {message}")
        if place := answer.headers["Location"]:
            message += f"; it sends us to {one_line(place)}, where we do not go: give the address itself"
        if needed:
            message += f". The server is started with {needed}"
        raise ServerError(f"{self._option}.urls: {self.url}{path} refuses ({answer.status}): {message}")

    def ask(
        self, path: str, schema: type[Schema], body: Mapping[str, Any] | None = None, *, needed: str = ""
    ) -> Schema:
        """As `call`, and reads the answer.

        Raises:
            BadAnswer: If it does not have this form.
        """
        try:
            return schema.model_validate_json(self.call(path, body, needed=needed))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise BadAnswer(f"{path} answers in another form than vLLM's: {place}: {first['msg']}") from error

    def find_model(self) -> int:
        """Waits for the server and notes the model that it serves. Returns the most tokens of a sequence.

        Raises:
            ServerError: If it stays away, or does not answer as vLLM does.
        """
        models = self.patiently(partial(self.ask, "/v1/models", Models)).data
        served = next((model for model in models if not model.parent), None)  # the others are adapters
        if served is None or served.max_model_len is None:
            raise ServerError(f"{self.url} ({self._option}.urls) names no model that it serves: is it vLLM?")
        self.model = served.id
        log.info("%s serves %r, up to %s tokens", self.url, served.id, served.max_model_len)
        return served.max_model_len

    def choices(self, body: Mapping[str, Any]) -> list[Choice]:
        """The choices of a completion request.

        Raises:
            BadAnswer: If they are none to this request.
            ServerLost: If there is no answer, or the server does not have our weights.
            ServerError: If the server refuses.
        """
        choices = self.ask("/v1/completions", Choices, body).choices
        if len(choices) != body.get("n", 1):
            raise BadAnswer(f"{len(choices)} completions where {body.get('n', 1)} were asked for")
        for choice in choices:
            count, logprobs = len(choice.token_ids), choice.logprobs
            if not 1 <= count <= body["max_tokens"]:
                raise BadAnswer(f"{count} tokens where 1 to {body['max_tokens']} were asked for")
            if len(logprobs) != count:
                raise BadAnswer(f"{len(logprobs)} log-probs of {count} tokens")
            if max(choice.token_ids) >= self.vocabulary:
                raise BadAnswer(f"token {max(choice.token_ids)} of a vocabulary of {self.vocabulary}")
            if too_large := [logprob for logprob in logprobs if logprob > LARGEST_LOGPROB]:  # NaN is not
                raise BadAnswer(f"a log-prob of {max(too_large):g}, above 0")
        return choices

    def check_known(self, choices: Sequence[Choice]) -> None:
        """The server knew most log-probs of these.

        Raises:
            NonFiniteError: If more than `UNKNOWN_SHARE` of them are missing, and not a single one.
        """
        logprobs = [logprob for choice in choices for logprob in choice.logprobs]
        unknown = sum(map(math.isnan, logprobs))
        if unknown > max(1, UNKNOWN_SHARE * len(logprobs)):
            what = f"{self.url} ({self._option}.urls) knows no log-prob for {unknown} of {len(logprobs)} tokens"
            remedy = "go back to an earlier checkpoint, or start the server in a wider --dtype if training goes well"
            raise NonFiniteError(f"{what}, NaN, null or -inf: perhaps the weights have diverged; {remedy}")

    def patiently(self, attempt: Callable[[], T]) -> T:
        """Calls `attempt` until it does not raise `ServerLost`.

        Raises:
            ServerError: If the server stays away for longer than `max_wait`, or answers badly again and again.
        """
        deadline, pause, failures = None, FIRST_PAUSE, 0
        while True:
            restored, begun = self.restored, time.monotonic()
            try:
                return attempt()
            except ServerLost as error:
                # During an attempt that lasted so long the server was not away: its time starts anew.
                was_there = time.monotonic() - begun > self.max_wait
                failures += was_there or isinstance(error, BadAnswer)
                if failures == ATTEMPTS:
                    what = f"{self.url} ({self._option}.urls) is there and gives no answer that can be used"
                    raise ServerError(f"{what}: {error} (attempt {ATTEMPTS} of {ATTEMPTS})") from error
                deadline = time.monotonic() + self.max_wait if deadline is None or was_there else deadline
                self._restore(restored, deadline, error, pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def _restore(self, seen: int, deadline: float, reason: ServerLost, pause: float) -> None:
        """Waits until the server answers, and gives it its weights. One thread does; the others wait for that one.

        Args:
            seen: `restored` before the attempt that failed.
            deadline: By `time.monotonic`.
            reason: Why the server is thought to be away.
            pause: Seconds before the server is asked, twice as many each time.
        """
        minutes = f"{self.max_wait / 60:.3g} minutes"
        with self._lock:
            if self.restored != seen:
                return
            log.warning("%s does not answer (%s): waiting for it, %s at most", self.url, reason, minutes)
            while True:
                if time.monotonic() + pause > deadline:
                    what = f"{self.url} has been away for {minutes} ({self._option}.max_wait_minutes; {reason})"
                    raise ServerError(f"{what}: start it again, then the run with --ckpt_path last") from reason
                time.sleep(pause)
                try:
                    self.call("/health", seconds=LONGEST_PAUSE)
                    self.give_weights(self)
                    break
                except ServerLost as error:
                    reason, pause = error, min(2 * pause, LONGEST_PAUSE)
            self.restored += 1
            log.info("%s is back, with its weights", self.url)


class _Incoming(io.RawIOBase):
    """What a server sends, until a moment and up to a size. The time-out of a socket begins anew with each byte."""

    def __init__(self, connection: socket.socket, deadline: float, limit: int) -> None:
        self._connection, self._deadline, self._left = connection, deadline, limit

    def makefile(self, mode: str) -> io.BufferedReader:
        """In place of a socket's, which http.client reads from."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if (seconds := self._deadline - time.monotonic()) <= 0:
            raise TimeoutError
        self._connection.settimeout(seconds)
        count = self._connection.recv_into(buffer)
        self._left -= count
        if self._left < 0:
            raise BadAnswer("its answer is far longer than what was asked for")
        return count
