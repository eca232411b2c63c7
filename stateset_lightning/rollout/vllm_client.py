"""One vLLM server as its client sees it: JSON over HTTP, patience while it is away, and its weights given back when it
returns.
"""

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

log = logging.getLogger("stateset_lightning")

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 10.0
"""Seconds between two attempts; each pause is twice the one before."""

# The servers stand beside the trainer: a proxy that the environment names is for elsewhere.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerLost(Exception):
    """No answer, or one that says that the server cannot at the moment, or no longer knows its weights."""


class VLLMServer:
    """A server of vLLM's OpenAI-compatible API; every method may be called by several threads.

    Args:
        url: Such as http://127.0.0.1:8000. The environment's VLLM_API_KEY is sent along, if there is one.
        request_timeout: Seconds that a request may take.
        max_wait: Seconds to wait for a server that is away.
    """

    def __init__(self, url: str, *, request_timeout: float, max_wait: float) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"model.engine.urls: {url!r} is no address: give one such as http://127.0.0.1:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.request_timeout = request_timeout
        self.max_wait = max_wait
        self.model = ""
        """Name of the model that it was started with."""
        self.restored = 0
        """How often it went away and came back."""
        self.give_weights: Callable[[VLLMServer], None] = lambda server: None
        """Called when it is back: a server that was started again has the weights it was started with."""
        self._lock = threading.Lock()
        key = os.environ.get("VLLM_API_KEY")
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}

    def call(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """One request, and what it answers: JSON, or text where it is none.

        Raises:
            ServerLost: If there is no answer, or the server is overloaded or broken.
            ServerError: If it refuses.
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
        """The choices of a completion request. Waits for a server that is lost, and asks again when it is back.

        Raises:
            ServerError: If the server refuses, or stays away for longer than `max_wait`.
        """

        def attempt() -> list[dict[str, Any]]:
            try:
                answer = self.call("/v1/completions", body)
            except ServerError as error:
                if error.status == 404:  # it has been started again, and has not our weights
                    raise ServerLost(str(error)) from error
                raise
            if not isinstance(answer, dict):
                raise ServerLost(f"it answers {str(answer)[:100]!r}")
            choices: list[dict[str, Any]] = answer["choices"]
            if any(choice["finish_reason"] not in ("stop", "length") for choice in choices):  # it is shutting down
                raise ServerLost(f"it broke off: finish_reason={[choice['finish_reason'] for choice in choices]}")
            return choices

        return self.patiently(attempt)

    def patiently(self, attempt: Callable[[], T]) -> T:
        """Calls `attempt` until it is not lost.

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
                # An attempt that lasted so long was not away: its time starts anew.
                deadline = now + self.max_wait if deadline is None or now - begun > self.max_wait else deadline
                self._restore(restored, deadline, error)

    def _restore(self, seen: int, deadline: float, reason: ServerLost) -> None:
        """Waits until it answers and gives it its weights; one thread does, the others wait for that."""
        with self._lock:
            if self.restored != seen:
                return
            log.warning(
                "%s does not answer (%s): waiting for it, %.3g minutes at most", self.url, reason, self.max_wait / 60
            )
            pause = FIRST_PAUSE
            while True:
                if time.monotonic() + pause > deadline:
                    raise ServerError(
                        f"{self.url} has been away for {self.max_wait / 60:.3g} minutes (model.engine.max_wait_minutes;"
                        f" {reason}): start it again, then the run with --ckpt_path last"
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
    """What a refusal says; vLLM's are JSON, a proxy's perhaps a page."""
    try:
        text = error.read().decode(errors="replace")
        content = json.loads(text)
    except json.JSONDecodeError:
        return " ".join(text.split())[:300] or str(error.reason)
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    inner = content.get("error", content) if isinstance(content, dict) else content
    return (
        str(inner.get("message") or inner.get("detail") or inner)[:300] if isinstance(inner, dict) else str(inner)[:300]
    )
