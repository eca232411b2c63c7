"""A user who is played by a language model, over any server that speaks OpenAI's chat completions."""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from stateset_lightning.environments.base import EnvironmentFailure, Reply, turns_of
from stateset_lightning.errors import ConfigError, ServerError, bounded
from stateset_lightning.types import Turn
from stateset_lightning.workers import Instructions, OpenAIClient

_TOLD = Path(__file__).with_suffix(".txt").read_text().rstrip()
# Before the user's first words: templates of many models want the first turn to be the other side's.
_GREETING = "Hello, how can I help you?"
_TURNED_ROUND = {"user": "assistant", "assistant": "user"}

_clients: dict[str, OpenAIClient] = {}


@bounded("simulated_user")
class SimulatedUser:
    """A model on a server answers as a user would (extra `judge`).

    It is sent the instructions and the conversation with the roles turned round: what the model says comes from the
    other side. System and tool turns are not shown to it. Where the scenario has no turn of the user, it says the first
    words, too.

    A request has the seed of the conversation, so that conversations repeat as far as the server does; with a `cache`,
    those that were led once repeat exactly. Environments of equal options share a client, hence its limit, its cache
    and its counts. Each answer counts what requests have cost meanwhile: `cost/simulated_user/calls`, `retries`,
    `cache_hits`, `prompt_tokens` and `completion_tokens`.

    A server that fails after its retries, and an answer that is empty or cut off, fail the conversation.

    Args:
        model: The name of the user's model on the server.
        instructions: Who the user is and what they want. `{column}` is replaced by the scenario's column, also at a
            dotted path; write `{{` for a brace.
        end_marker: The user is told to answer with it when done. An answer that holds it ends the conversation, and is
            no part of it.
        max_tokens: Of an answer at most.
        request: Further parameters of a request; null leaves out `max_completion_tokens` (which is `max_tokens`) or
            `seed`. Without a seed, equal conversations of a run are given one answer.
        **server: Options of `stateset_lightning.workers.OpenAIClient`: `base_url`, `api_key_env`, `max_concurrency`,
            `max_retries`, `request_timeout`, `cache`, `max_cached`.

    Raises:
        ConfigError: If the client is not installed, a key or the cache is missing, or an argument cannot be used.
    """

    def __init__(
        self,
        model: str,
        instructions: str,
        *,
        end_marker: str = "[END]",
        max_tokens: Annotated[int, Ge(1)] = 512,
        request: dict[str, Any] | None = None,
        **server: Any,
    ) -> None:
        if not end_marker.strip():
            raise ConfigError(f"simulated_user.end_marker={end_marker!r} is in every answer: take a word")
        self._instructions = Instructions("simulated_user.instructions", instructions, "who the user is and wants")
        self._end_marker = end_marker
        parameters = {"max_completion_tokens": max_tokens, **(request or {})}
        client = OpenAIClient("simulated_user", model, request=parameters, **server)
        self._client = _clients.setdefault(str([model, parameters, server]), client)

    async def reset(self, scenario: Mapping[str, Any], seed: int) -> str | None:
        self._seed = seed % 2**31  # not all servers take 63 bits
        told = _TOLD.format(instructions=self._instructions.filled(scenario), end_marker=self._end_marker)
        turns = [turn for turn in turns_of(scenario) if turn["role"] in _TURNED_ROUND]
        self._chat = [{"role": "system", "content": told}]
        if not turns or turns[0]["role"] == "user":
            self._add("user", _GREETING)
        for turn in turns:
            self._add(_TURNED_ROUND[turn["role"]], turn["content"], "\n\n")
        if any(turn["role"] == "user" for turn in turns):
            return None
        first = await self._ask()
        if self._end_marker in first:
            raise EnvironmentFailure(f"the simulated user ended before the conversation began: {first[:80]!r}")
        return first

    async def step(self, text: str) -> Reply:
        self._add("user", text)  # behind a turn of the assistant, it goes on from that
        answer = await self._ask()
        cost = {f"cost/simulated_user/{name}": int(count) for name, count in self._client.take_counts().items()}
        ended = self._end_marker in answer
        return Reply(() if ended else (Turn("user", answer),), done=ended, counts=cost)

    async def _ask(self) -> str:
        import openai  # takes a second

        try:
            _, answer = await self._client.ask(self._chat, self._read, seed=self._seed)
        except (openai.OpenAIError, ServerError) as error:
            raise EnvironmentFailure(f"the simulated user: {type(error).__name__}: {error}") from error
        self._add("assistant", answer)
        return answer

    def _read(self, reply: str, truncated: bool) -> str:
        if truncated or not reply.strip():
            problem = "cut off, raise max_tokens" if truncated else "empty"
            raise EnvironmentFailure(self._client.line(f"the simulated user's answer is {problem}: {reply[-200:]!r}"))
        return reply.strip()

    def _add(self, role: str, text: str, joint: str = "") -> None:
        """One turn of each side after the other: templates refuse two of the same."""
        if self._chat[-1]["role"] == role:
            text = self._chat.pop()["content"] + joint + text
        self._chat.append({"role": role, "content": text})
