"""The HTTP client of one vLLM server: JSON requests, patience while the server is away, its weights when it returns."""

from __future__ import annotations

import http.client
import json
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from stateset_lightning.errors import ConfigError, ServerError
from stateset_lightning.redaction import redacted_text, remember

log = logging.getLogger("stateset_lightning")

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 10.0
"""Seconds between two attempts; each pause is twice the one before."""

# The servers stand beside the trainer: a proxy that the environment names is for other addresses.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerLost(Exception):
    """The server gave no answer, or one that says that it cannot at the moment or no longer has its weights."""


class VLLMServer:
    """A server of vLLM's OpenAI-compatible API; several threads may call every method.

    Args:
        url: Such as http://127.0.0.1:8000. The environment's VLLM_API_KEY is sent along, if there is one.
        request_timeout: Seconds that a request may take.
        max_wait: Seconds to wait for a server that is away.

    Attributes:
        model: Name of the model that the server was started with.
        restored: How often it went away and came back.
        give_weights: Called when it is back, since a server that was started again has the weights of its start.
    """

    def __init__(self, url: str, *, request_timeout: float, max_wait: float) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"model.engine.urls: {url!r} is no address: give one such as http://127.0.0.1:8000")
        remember(url)
        self.url = url.rstrip("/").removesuffix("/v1")
        self.request_timeout = request_timeout
        self.max_wait = max_wait
        self.model = ""
        self.restored = 0
        self.give_weights: Callable[[VLLMServer], None] = lambda server: None
        self._lock = threading.Lock()
        self._headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            self._headers["Authorization"] = f"Bearer {key}"

    def call(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """One request (GET without a body). Returns the answer: JSON, or text if it is none.

        Raises:
            ServerLost: If there is no answer, or the server is overloaded or broken.
            ServerError: If the server refuses.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self._headers)
        try:
            with _OPENER.open(request, timeout=self.request_timeout) as answer:
                content = answer.read()
                is_json = content and answer.headers.get_content_type() == "application/json"
                return json.loads(content) if is_json else content.decode(errors="replace")
        except urllib.error.HTTPError as error:
            message = _message(error)
            if error.code >= 500 or error.code in (408, 429):
                raise ServerLost(f"HTTP {error.code}: {message}") from error
            raise ServerError(f"{self.url}{path} refuses ({error.code}): {message}", error.code) from error
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
            raise ServerLost(f"{type(error).__name__}: {error}") from error

    def complete(self, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The choices of a completion request. If the server is lost, waits for it and asks again.

        Raises:
            ServerError: If the server refuses, or stays away for longer than `max_wait`.
        """

        def attempt() -> list[dict[str, Any]]:
            try:
                answer = self.call("/v1/completions", body)
            except ServerError as error:
                if error.status == 404:  # the server has been started again, and does not have our weights
                    raise ServerLost(str(error)) from error
                raise
            if not isinstance(answer, dict):
                raise ServerLost(f"it answers {str(answer)[:100]!r}")
            choices: list[dict[str, Any]] = answer["choices"]
            reasons = [choice["finish_reason"] for choice in choices]
            if not {"stop", "length"}.issuperset(reasons):  # the server is shutting down
                raise ServerLost(f"it broke off: finish_reason={reasons}")
            return choices

        return self.patiently(attempt)

    def patiently(self, attempt: Callable[[], T]) -> T:
        """Calls `attempt` until it does not raise `ServerLost`.

        Raises:
            ServerError: If the server stays away for longer than `max_wait`.
        """
        deadline = None
        while True:
            restored, begun = self.restored, time.monotonic()
            try:
                return attempt()
            except ServerLost as error:
                now = time.monotonic()
                # During an attempt that lasted so long the server was not away: its time starts anew.
                deadline = now + self.max_wait if deadline is None or now - begun > self.max_wait else deadline
                self._restore(restored, deadline, error)

    def _restore(self, seen: int, deadline: float, reason: ServerLost) -> None:
        """Waits until the server answers, and gives it its weights. One thread does; the others wait for that one.

        Args:
            seen: `restored` before the attempt that failed.
            deadline: By `time.monotonic`.
            reason: Why the server is thought to be away.
        """
        minutes, pause = f"{self.max_wait / 60:.3g} minutes", FIRST_PAUSE
        with self._lock:
            if self.restored != seen:
                return
            log.warning("%s does not answer (%s): waiting for it, %s at most", self.url, reason, minutes)
            while True:
                if time.monotonic() + pause > deadline:
                    raise ServerError(
                        f"{self.url} has been away for {minutes} (model.engine.max_wait_minutes; {reason}): start it"
                        " again, then the run with --ckpt_path last"
                    ) from reason
                time.sleep(pause)
                try:
                    self.call("/health")
                    self.give_weights(self)
                    break
                except ServerLost as error:
                    reason, pause = error, min(2 * pause, LONGEST_PAUSE)
            self.restored += 1
            log.info("%s is back, with its weights", self.url)


def _message(error: urllib.error.HTTPError) -> str:
    """What a refusal says: vLLM's are JSON, those of a proxy perhaps a page."""
    try:
        text = redacted_text(error.read().decode(errors="replace"))  # before a secret is cut in two
        content = json.loads(text)
    except json.JSONDecodeError:
        return " ".join(text.split())[:300] or str(error.reason)
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    inner = content.get("error", content) if isinstance(content, dict) else content
    if isinstance(inner, dict):
        inner = inner.get("message") or inner.get("detail") or inner
    return str(inner)[:300]
