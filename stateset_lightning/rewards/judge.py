"""A language model as judge, over any server that speaks OpenAI's chat completions."""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from stateset_lightning.errors import ConfigError, RewardError, bounded
from stateset_lightning.rewards.base import Context, RewardFunction, RewardResult, Turns
from stateset_lightning.rewards.group import GroupReward
from stateset_lightning.workers import Instructions, OpenAIClient

_NUMBER = r"-?\d+(?:\.\d+)?"
# Possessive: marks are looked at once.
_SCORE_LINE = re.compile(
    rf"[\s*_#`]*+scores?[\s*_`]*+(?:[:=][\s*_`\[]*+)?({_NUMBER}(?:[,;\s]++{_NUMBER})*+)(?:\s*/\s*({_NUMBER}))?[\]\s*_`.]*",
    re.IGNORECASE,
)
_DEFAULTS: dict[str, Any] = {"temperature": 0.0, "max_completion_tokens": 512}


@bounded("model_judge")
class Judge(RewardFunction):
    """Base class of judges: a model on a server, a rubric, and a range of scores that becomes 0 to 1.

    Conversation and answers stand between marks that an answer cannot contain, since they are a hash of it. The marks
    make it harder to talk the judge into a score, not impossible: hold out a second reward.

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
        timeout: Seconds that one completion, or the completions of a prompt where they are compared, may take, all
            attempts and the wait for a free request included.
        turns: Which of the model's turns are the answer: the `last`, or `all`, joined.
        **server: Options of `stateset_lightning.workers.OpenAIClient`: `base_url`, `api_key_env`, `max_concurrency`
            (`model.reward_concurrency` is a limit as well), `max_retries`, `request_timeout`, `cache`, `max_cached`.

    Raises:
        ConfigError: If the client is not installed, a key or the cache is missing, or an argument cannot be used.
    """

    instructions: str

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
        turns: Literal["last", "all"] = "last",
        **server: Any,
    ) -> None:
        super().__init__(weight=weight, name=name or "", timeout=timeout)
        self.turns = turns
        self.low, self.high = score_range
        if not (math.isfinite(self.high - self.low) and self.low < self.high):
            raise ConfigError(f"{self.name}.score_range={[self.low, self.high]} must be two numbers, the lower first")
        self.rubric = Instructions(f"{self.name}.rubric", rubric, "what a good answer is")
        self.needs = self.rubric.columns
        self.client = OpenAIClient(self.name, model, request={**_DEFAULTS, **(request or {})}, **server)

    def take_counts(self) -> dict[str, float]:
        return self.client.take_counts()

    def messages(
        self, asked: Turns, answers: Mapping[str, str], context: Mapping[str, Any], **words: Any
    ) -> list[dict[str, str]]:
        """A request: the instructions, with these words, and the conversation and answers by tag, between marks."""
        conversation = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in asked)
        mark = _hash(conversation, *answers.values())[:16]
        rubric = self.rubric.filled(context)
        texts = {"conversation": conversation, **answers}
        material = "\n\n".join(f"<{tag}-{mark}>\n{text}\n</{tag}-{mark}>" for tag, text in texts.items())
        instructions = self.instructions.format(rubric=rubric, mark=mark, low=self.low, high=self.high, **words)
        return [{"role": "system", "content": instructions}, {"role": "user", "content": material}]

    def scores(self, form: str, count: int, reply: str, truncated: bool) -> list[float]:
        """The scores in the last line of a reply, which must be of this form.

        Raises:
            RewardError: If there are fewer or more, one is out of range, or the reply was cut off.
        """
        found = _SCORE_LINE.fullmatch((reply.strip().splitlines() or [""])[-1])
        scores = list(map(float, re.findall(_NUMBER, found[1]))) if found else []
        if truncated:  # even if it ends in a score, which may be half a number
            problem = f"reply was cut off ({self.client.request}): {reply[-100:]!r}"
        elif found is None or len(scores) != count:
            problem = f"reply does not end with a line {form}: {reply[-200:]!r}"
        elif float(found[2] or self.high) != self.high or not all(self.low <= score <= self.high for score in scores):
            problem = f"score is {found[0].strip()[:80]!r}, outside {self.low:g} to {self.high:g}"
        else:
            return scores
        raise RewardError(self.client.line(f"the judge's {problem}"))

    def result(self, score: float, reply: str) -> RewardResult:
        return RewardResult((score - self.low) / (self.high - self.low), {"score": score, "reply": reply})


class ModelJudge(Judge):
    """The score that a language model gives by a rubric, scaled to the range 0 to 1 (extra `judge`).

    The judge gets the rubric, the conversation and the answer, and must end with a line `Score: <number>`. A reply
    without one, with one outside the range, or that was cut off fails the completion. Its arguments are those of
    `Judge`.
    """

    instructions = Path(__file__).with_name("judge_instructions.txt").read_text().rstrip()

    async def compute_reward(self, turns: Turns, context: Context = None) -> RewardResult:
        messages = self.messages(turns[:-1], {"answer": turns[-1]["content"]}, context or {})
        reply, (score,) = await self.client.ask(messages, partial(self.scores, "'Score: <number>'", 1))
        return self.result(score, reply)


class RelativeJudge(GroupReward, Judge):
    """The score that a language model gives each completion of a prompt beside the others, 0 to 1 (extra `judge`).

    As RULER does (https://art.openpipe.ai/fundamentals/ruler): a judge that sees all answers at once tells them apart
    better than one that grades each by itself, and only differences within the group enter the advantages. Its scores
    say nothing about another prompt, nor how good the answers are at all.

    The answers are shown in an order that follows from a hash of them, so that a judge who prefers a place prefers no
    completion; equal answers are shown once and get the same score. The reply must end with a line `Scores: <number>,
    <number>, ...`. Any other fails the completions of this prompt. Its arguments are those of `Judge`.
    """

    instructions = Path(__file__).with_name("relative_judge_instructions.txt").read_text().rstrip()

    async def compute_rewards(
        self, conversations_G: Sequence[Turns], context: Mapping[str, Any], scores: Mapping[str, Any]
    ) -> list[RewardResult]:
        texts = [str(turns[-1]["content"]) for turns in conversations_G]
        group = _hash(*sorted(set(texts)))
        unique = sorted(set(texts), key=lambda text: _hash(group, text))
        shown = {f"answer-{i}": text for i, text in enumerate(unique, start=1)}
        messages = self.messages(conversations_G[0][:-1], shown, context, count=len(unique))
        form = f"'Scores: ...' of {len(unique)}"
        reply, given = await self.client.ask(messages, partial(self.scores, form, len(unique)))
        by_text = dict(zip(unique, given, strict=True))
        return [self.result(by_text[text], reply) for text in texts]


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()
