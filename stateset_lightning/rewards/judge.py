"""A language model as judge, over any server that speaks OpenAI's chat completions."""

from __future__ import annotations

import hashlib
import math
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stateset_lightning.errors import ConfigError, DataError, RewardError, bounded
from stateset_lightning.rewards.base import Context, RewardFunction, RewardResult, Turns
from stateset_lightning.types import ABSENT, at_path
from stateset_lightning.workers import OpenAIClient

_INSTRUCTIONS = (Path(__file__).parent / "judge_instructions.txt").read_text().rstrip()
_SCORE_LINE = re.compile(
    # possessive: marks are looked at once
    r"[\s*_#`]*+score[\s*_`]*+(?:[:=][\s*_`]*+)?(-?\d+(?:\.\d+)?)(?:\s*/\s*(\d+(?:\.\d+)?))?[\s*_`.]*",
    re.IGNORECASE,
)
_COLUMN = re.compile(r"[^\W\d]\w*([.\[][\w.\[\]]+)?")
_DEFAULTS: dict[str, Any] = {"temperature": 0.0, "max_completion_tokens": 512}


@bounded("model_judge")
class ModelJudge(RewardFunction):
    """The score that a language model gives by a rubric, scaled to the range 0 to 1 (extra `judge`).

    The judge gets the rubric, the conversation and the answer. Conversation and answer stand between marks that the
    answer cannot contain, since they are a hash of it. The judge must end with a line `Score: <number>`. A reply
    without one, with one outside the range, or that was cut off fails the completion. The marks make it harder to talk
    the judge into a score, not impossible: hold out a second reward.

    Equal requests are sent once: replies that hold a score are cached. Server errors (5xx, 429, time-outs, broken
    connections) are retried with waits that double, or that the server names. What the judge costs is logged:
    `cost/<name>/calls`, `retries`, `cache_hits`, `prompt_tokens` and `completion_tokens`.

    Args:
        model: The judge's name on the server.
        rubric: What a good answer is. `{column}` is replaced by the scenario's column (`{target}`, say), also at a
            dotted path (`{extra_info.answer}`); write `{{` for a brace.
        score_range: The judge's lowest and highest score, which become 0 and 1.
        request: Further parameters of a request, over `temperature: 0.0` and `max_completion_tokens: 512`; null leaves
            one of these out.
        weight: Factor of this reward in a completion's total.
        name: Name in logs.
        timeout: Seconds that one completion may take, all attempts and the wait for a free request included.
        **server: Options of `stateset_lightning.workers.OpenAIClient`: `base_url`, `api_key_env`, `max_concurrency`
            (`model.reward_concurrency` is a limit as well), `max_retries`, `request_timeout`, `cache`, `max_cached`.

    Raises:
        ConfigError: If the client is not installed, a key or the cache is missing, or an argument cannot be used.
    """

    def __init__(
        self,
        model: str,
        rubric: str,
        *,
        score_range: tuple[float, float] = (0.0, 10.0),
        request: dict[str, Any] | None = None,
        weight: float = 1.0,
        name: str | None = None,
        timeout: float | None = None,
        **server: Any,
    ) -> None:
        super().__init__(weight=weight, name=name, timeout=timeout)
        self.rubric = rubric
        self.low, self.high = score_range
        self.columns = self._checked_columns()
        parameters = {k: v for k, v in {**_DEFAULTS, **(request or {})}.items() if v is not None}
        self.client = OpenAIClient(self.name, model, request=parameters, **server)

    async def compute_reward(self, turns: Turns, context: Context = None) -> RewardResult:
        reply, score = await self.client.ask(self._messages(turns, context or {}), self._score)
        return RewardResult((score - self.low) / (self.high - self.low), {"score": score, "reply": reply})

    def take_counts(self) -> dict[str, float]:
        return self.client.take_counts()

    def _messages(self, turns: Turns, context: Mapping[str, Any]) -> list[dict[str, str]]:
        conversation = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns[:-1])
        answer = turns[-1]["content"]
        mark = hashlib.sha256(f"{conversation}\0{answer}".encode("utf-8", "surrogatepass")).hexdigest()[:16]
        parts = string.Formatter().parse(self.rubric)
        rubric = "".join(text + (self._column(name, context) if name else "") for text, name, *_ in parts)
        texts = {f"conversation-{mark}": conversation, f"answer-{mark}": answer}
        material = "\n\n".join(f"<{name}>\n{text}\n</{name}>" for name, text in texts.items())
        return [
            {"role": "system", "content": _INSTRUCTIONS.format(rubric=rubric, mark=mark, low=self.low, high=self.high)},
            {"role": "user", "content": material},
        ]

    def _score(self, reply: str, truncated: bool) -> float:
        if truncated:
            # even if it ends in a score, which may be half a number
            raise RewardError(f"the judge's reply was cut off ({self.client.request}): {reply[-100:]!r}")
        lines = reply.strip().splitlines() or [""]
        if (found := _SCORE_LINE.fullmatch(lines[-1])) is None:
            raise RewardError(f"the judge's reply does not end with a line 'Score: <number>': {reply[-200:]!r}")
        score = float(found[1])
        out_of = float(found[2] or self.high)
        if not self.low <= score <= self.high or out_of != self.high:
            raise RewardError(f"the judge's score is {found[0].strip()[:80]!r}, outside {self.low:g} to {self.high:g}")
        return score

    def _checked_columns(self) -> list[str]:
        """The columns that the rubric names."""
        if not (math.isfinite(self.high - self.low) and self.low < self.high):
            raise ConfigError(f"{self.name}.score_range={[self.low, self.high]} must be two numbers, the lower first")
        if not self.rubric.strip():
            raise ConfigError(f"{self.name}.rubric is empty: say what a good answer is")
        try:
            parts = list(string.Formatter().parse(self.rubric))
        except ValueError as error:
            raise ConfigError(f"{self.name}.rubric={self.rubric!r}: {error}; write {{{{ and }}}} for braces") from error
        for _, column, form, conversion in parts:
            if form or conversion or not (column is None or _COLUMN.fullmatch(column)):
                raise ConfigError(f"{self.name}.rubric names the column '{{{column}}}'; write {{{{ for a brace")
        return [column for _, column, _, _ in parts if column]

    def _column(self, name: str, context: Mapping[str, Any]) -> str:
        if (found := at_path(context, name)) is None or found is ABSENT:
            raise DataError(f"scenario {context.get('id')!r} has no column '{name}', which {self.name}.rubric names")
        return str(found)
