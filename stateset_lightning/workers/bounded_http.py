"""An HTTP client for servers whose answers are not trusted: bounded in size, and in time as a whole.

The time-outs of `httpx` are for each read: a server that sends a byte every second would be read for hours.
"""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from importlib import import_module
from typing import Any

from openai import DefaultAsyncHttpxClient

from stateset_lightning.errors import ServerError
from stateset_lightning.workers.addresses import is_this_machine

# Bytes of an answer, unpacked; a chat completion has kilobytes.
LARGEST_ANSWER = 2**23

_httpx = import_module(DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0])  # openai 3 takes httpx2


class BoundedClient(DefaultAsyncHttpxClient):
    """Reads whole answers.

    Args:
        url: The server's. A proxy that the environment names is not used for this machine itself.
        seconds: That one attempt may take, from its begin to the answer's last byte.
        count: Called at each attempt.
    """

    def __init__(self, url: str, seconds: float, count: Callable[[], None]) -> None:
        super().__init__(trust_env=not is_this_machine(url))
        self._seconds, self._count = seconds, count

    async def send(self, request: Any, **options: Any) -> Any:
        """Send a request. The library `openai` asks again after a time-out.

        Raises:
            ServerError: If the answer is too large.
        """
        self._count()
        try:
            async with asyncio.timeout(self._seconds):
                async with aclosing(await super().send(request, **{**options, "stream": True})) as response:
                    content = await _content(response)
        except TimeoutError as error:
            raise _httpx.ReadTimeout(f"no whole answer within {self._seconds:g} s", request=request) from error
        headers = [(name, value) for name, value in response.headers.items() if name != "content-encoding"]
        return _httpx.Response(response.status_code, headers=headers, content=content, request=request)


async def _content(response: Any) -> bytes:
    content = b""
    async for part in response.aiter_bytes():
        content += part
        if len(content) > LARGEST_ANSWER:
            raise ServerError(f"the answer has more than {LARGEST_ANSWER:,} bytes")
    return content
