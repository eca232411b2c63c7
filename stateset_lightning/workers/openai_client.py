"""A client of servers that speak OpenAI's chat completions: retries, a limit on requests, a cache, counts of tokens."""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
import asyncio
import hashlib
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar
from weakref import WeakValueDictionary

from annotated_types import Ge, Gt, Le, Len
from pydantic import AliasPath, BaseModel, Field, ValidationError

from stateset_lightning.errors import ConfigError, ServerError, check_bounds, one_line, require, told_as
from stateset_lightning.redaction import is_secret_name, remember
from stateset_lightning.workers.addresses import http_address

T = TypeVar("T")

COUNTS = ("calls", "retries", "cache_hits", "prompt_tokens", "completion_tokens")
_TABLE = "CREATE TABLE IF NOT EXISTS replies (number INTEGER PRIMARY KEY, key TEXT UNIQUE, reply TEXT NOT NULL)"
_OLDEST = "DELETE FROM replies WHERE number <= (SELECT MAX(number) FROM replies) - ?"
_WAIT_SECONDS = 30.0  # for another process that writes to the cache
_LONGEST_MESSAGE = 500  # characters of a server's message that an error shows

_Tokens = Annotated[int, Ge(0), Le(10**9)]


class _Choice(BaseModel):
    content: Annotated[str, Len(0, 1_000_000)] | None = Field(validation_alias=AliasPath("message", "content"))
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: _Tokens = 0
    completion_tokens: _Tokens = 0


class _Answer(BaseModel):
    """What is read of a chat completion; whatever else it holds is passed over."""

    choices: Annotated[list[_Choice], Len(1)]
    usage: _Usage | None = None


class ReplyCache:
    """The newest replies by request, in one SQLite file that several processes may share, or in memory.

    Several threads may use it: each statement is a transaction of its own, and SQLite runs one at a time.

    Args:
        path: The file, created if there is none; None keeps replies in memory, for this process.
        max_replies: Replies at most; the oldest are deleted.

    Raises:
        ConfigError: If the file cannot be opened, or is no cache.
    """

    def __init__(self, path: str | None, max_replies: int) -> None:
        self._max_replies = max_replies
        file = ":memory:" if path is None else os.path.expanduser(path)
        opening = f"cache={path!r} cannot be opened: "
        with told_as(ConfigError, opening, OSError, sqlite3.Error, after="; give a file of its own"):
            if path is not None:
                Path(file).parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(file, _WAIT_SECONDS, check_same_thread=False, isolation_level=None)
            self._connection.executescript(f"PRAGMA synchronous = NORMAL; {_TABLE}")

    def get(self, key: str) -> str | None:
        """The reply under `key`, if there is one."""
        row = self._connection.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put(self, key: str, reply: str) -> None:
        """Keep a reply; it is on disk when this returns."""
        self._connection.execute("INSERT OR REPLACE INTO replies (key, reply) VALUES (?, ?)", (key, reply))
        self._connection.execute(_OLDEST, (self._max_replies,))

    def close(self) -> None:
        self._connection.close()


@dataclass(frozen=True)
class _Connection:
    loop: asyncio.AbstractEventLoop
    client: Any
    slots: asyncio.Semaphore
    closing: asyncio.Task[None]
    pending: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)


async def _closed_with_loop(client: Any) -> None:
    """Close the client when the loop ends and cancels its tasks. One left to the garbage collector complains."""
    async with client:
        await asyncio.Event().wait()


@dataclass(eq=False)
class OpenAIClient:
    """Sends chat requests to one model (extra `judge`).

    Equal requests are sent once: replies are cached. Server errors (5xx, 429, time-outs, broken connections) are
    retried by the library, which waits twice as long each time, or as long as the server says.

    Args:
        key: What errors call the owner of this client, such as `model_judge`.
        model: The model's name on the server.
        request: Further parameters of each request; None leaves one out.
        base_url: The server (`http://localhost:8000/v1`); by default OpenAI's.
        api_key_env: Environment variable that holds the key. By default OPENAI_API_KEY with OpenAI's server, and no key
            with another.
        max_concurrency: Requests at the same time.
        max_retries: Further attempts after the first.
        request_timeout: Seconds that one attempt may take, to the last byte of the answer.
        cache: File of the cache; None keeps replies in memory.
        max_cached: Replies that are kept at most.

    Raises:
        ConfigError: If the library `openai` is not installed, the key is missing, or an argument cannot be used.
    """

    key: str
    model: str
    _: KW_ONLY
    request: Mapping[str, Any]
    base_url: str | None = None
    api_key_env: str | None = None
    max_concurrency: Annotated[int, Ge(1)] = 16
    max_retries: Annotated[int, Ge(0)] = 4
    request_timeout: Annotated[float, Gt(0)] = 60.0
    cache: str | None = None
    max_cached: Annotated[int, Ge(1)] = 100_000

    def __post_init__(self) -> None:
        key = self.key
        check_bounds(key, OpenAIClient, vars(self))  # not `bounded`: the key is the owner's name
        require("openai", "judge", key)
        from stateset_lightning.workers import bounded_http  # noqa: F401 (a second that must not count as a request's)

        remember({"base_url": self.base_url, "request": self.request})
        self._key_env = self.api_key_env or (None if self.base_url else "OPENAI_API_KEY")
        self._url = self.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        self._counts: Counter[str] = Counter()
        if taken := {"model", "messages", "stream", "n"} & self.request.keys():
            raise ConfigError(f"{key}.request sets '{min(taken)}', which is set elsewhere: remove it")
        self.request = {"model": self.model, **self.request}
        _, self._place = http_address(f"{key}.base_url", self._url)
        if self._key_env is not None and not is_secret_name(self._key_env):
            raise ConfigError(f"{key}.api_key_env={self._key_env!r}: take a name that ends in API_KEY; logs hide it")
        if self._key_env is not None and not os.environ.get(self._key_env):
            raise ConfigError(f"{key}.api_key_env: the environment variable {self._key_env} is not set ({self._url})")
        if self.cache is not None:  # a file that cannot be opened is an error now
            ReplyCache(self.cache, self.max_cached).close()

    async def ask(self, messages: list[dict[str, str]], read: Callable[[str, bool], T], **more: Any) -> tuple[str, T]:
        """The reply to a conversation, from the cache or the server.

        Args:
            messages: The conversation, as dicts of `role` and `content`.
            read: Reads what is wanted from the reply's text; its second argument is whether the token limit cut the
                reply off. If it raises, the reply is not cached.
            **more: Parameters of this request, where those of each request do not name them.

        Returns:
            The reply's text, and what `read` returned.

        Raises:
            ServerError: If the answer is no chat completion, or too large. Besides, what `openai` raises after the last
                retry. Both name the server in one line.
        """
        request = {k: v for k, v in {**more, **self.request, "messages": messages}.items() if v is not None}
        asked = json.dumps([self.base_url, request], sort_keys=True)
        key = hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()
        connection = self._connection()
        # Whoever sends the same request meanwhile waits for this reply.
        async with connection.pending.setdefault(key, asyncio.Lock()):
            if (text := self._replies.get(key)) is not None:
                value = read(text, False)
                self._counts["cache_hits"] += 1
                return text, value
            async with connection.slots:
                text, truncated = await self._send(connection.client, request)
            value = read(text, truncated)
            self._replies.put(key, text)
            return text, value

    def take_counts(self) -> dict[str, float]:
        """Calls, retries, cache hits and tokens since the last call; calls that failed count, too."""
        counts, self._counts = self._counts, Counter()
        counts["retries"] = max(0, counts["attempts"] - counts["calls"])
        return {name: counts[name] for name in COUNTS}

    async def _send(self, client: Any, request: Mapping[str, Any]) -> tuple[str, bool]:
        import openai

        self._counts["calls"] += 1
        try:
            raw = await client.chat.completions.with_raw_response.create(**request)
            answer = _Answer.model_validate_json(raw.content)
        except ValidationError as error:
            first = error.errors()[0]
            raise ServerError(self.line(f"no chat completion: {first['loc']}: {first['msg']}")) from None
        except (openai.OpenAIError, ServerError) as error:
            error.args = (self.line(f"{error} ({error.__cause__})" if error.__cause__ else str(error)),)
            raise
        self._counts.update((answer.usage or _Usage()).model_dump())
        return answer.choices[0].content or "", answer.choices[0].finish_reason == "length"

    def line(self, text: str) -> str:
        """A line that names the server, without a password that its address may hold."""
        return f"{self._place}: {one_line(text, _LONGEST_MESSAGE)}"

    @cached_property
    def _replies(self) -> ReplyCache:
        return ReplyCache(self.cache, self.max_cached)

    def _connection(self) -> _Connection:
        """Client and locks of the running event loop: they are bound to it, and every scorer has its own loop."""
        loop = asyncio.get_running_loop()
        connection: _Connection | None = self.__dict__.get("_current")
        if connection is None or connection.loop is not loop:
            from openai import AsyncOpenAI

            from stateset_lightning.workers.bounded_http import BoundedClient

            # Never without a key: the client would then send OPENAI_API_KEY to whatever server this is.
            key = os.environ[self._key_env] if self._key_env else "none"
            http = BoundedClient(self._url, self.request_timeout, lambda: self._counts.update(attempts=1))
            limits: dict[str, Any] = {"max_retries": self.max_retries, "timeout": self.request_timeout}
            client = AsyncOpenAI(api_key=key, base_url=self._url, http_client=http, **limits)
            # nor with OPENAI_ORG_ID, _PROJECT_ID and _CUSTOM_HEADERS, which may hold another server's key
            if self.base_url is not None:
                client.organization = client.project = None
                client._custom_headers = {}
            closing = loop.create_task(_closed_with_loop(client))
            self._current = connection = _Connection(loop, client, asyncio.Semaphore(self.max_concurrency), closing)
        return connection
