"""A teacher on vLLM servers: it says how likely it would have sampled what the policy sampled."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import cycle

import torch
from pydantic import AliasPath, Field
from torch import Tensor

from stateset_lightning.policy import Group
from stateset_lightning.rollout.sampling import check_length
from stateset_lightning.rollout.vllm import servers_at
from stateset_lightning.rollout.vllm_client import LARGEST_LOGPROB, Answer, BadAnswer, Logprob, VLLMServer
from stateset_lightning.threads import DaemonThreads, interruptible, wait_for

# Requests at a time; the servers have a queue of their own.
REQUESTS = 64


class TokenLogprob(Answer):
    logprob: Logprob


class ScoredPrompt(Answer):
    """Of each token of a prompt, by its id as text; the first has no log-prob."""

    tokens: list[dict[str, TokenLogprob] | None] = Field(validation_alias=AliasPath("choices", 0, "prompt_logprobs"))


class VLLMTeacher:
    """Scores completions as prompts, whose log-probs vLLM gives at temperature 1, whatever a request says.

    Args:
        urls: Of the servers, as [http://127.0.0.1:8000]; completions are dealt out to them in turn. Nobody checks
            that their tokenizer is the policy's.
        request_timeout: Seconds for one completion.
        max_wait_minutes: How long a server may be away before the run stops.

    Raises:
        ConfigError: If an address is none.
    """

    def __init__(self, urls: list[str], *, request_timeout: float = 1800.0, max_wait_minutes: float = 10.0) -> None:
        self.urls = urls
        self.servers = servers_at(urls, "model.teacher", request_timeout, max_wait_minutes)

    def setup(self, longest: int, max_new_tokens: int) -> None:
        """Waits for the servers and asks what they serve; called before a run.

        Args:
            longest: Tokens of the longest prompt.
            max_new_tokens: Of a completion.

        Raises:
            ConfigError: If both together are longer than a server allows.
            ServerError: If a server does not answer, or not as vLLM does.
        """
        for server in self.servers:
            limit = server.find_model() - 1  # of one token at least the request must ask for
            whose = f"the {limit} tokens that {server.url} (model.teacher.urls) scores by its --max-model-len"
            check_length(longest, max_new_tokens, limit, whose)

    @interruptible()
    def score_without_gradient(self, groups: Sequence[Group], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probs of the sampled tokens, as `Policy.score_without_gradient`, NaN where none is known; no entropies.

        Raises:
            ServerError: If a server refuses, answers badly, or stays away for too long.
        """
        assert temperature == 1, "checked before the run"
        servers, scored = cycle(self.servers), []
        with DaemonThreads(REQUESTS, "vllm-teacher") as threads:
            for group in groups:
                for completion, places in zip(group.completions, group.sampled_places, strict=True):
                    tokens, server = [*group.prompt, *completion], next(servers)
                    attempt = partial(_logprobs, server, tokens, len(completion))
                    scored.append((threads.submit(server.patiently, attempt), places))
            logprobs = [wait_for(future).result()[place] for future, places in scored for place in places]
        return torch.tensor(logprobs, dtype=torch.float32), torch.empty(0)


def _logprobs(server: VLLMServer, tokens: list[int], count: int) -> list[float]:
    """Of the last `count` tokens; NaN for those that the server does not know.

    Raises:
        BadAnswer: If the answer leaves one out.
    """
    body = {"model": server.model, "prompt": tokens, "max_tokens": 1, "prompt_logprobs": 0, "temperature": 0}
    answered = server.ask("/v1/completions", ScoredPrompt, body).tokens
    if len(answered) != len(tokens):
        raise BadAnswer(f"log-probs of {len(answered)} tokens where {len(tokens)} were asked for")
    found = [(known or {}).get(str(token)) for known, token in zip(answered, tokens, strict=True)][-count:]
    logprobs = [math.inf if each is None else each.logprob for each in found]
    if any(logprob > LARGEST_LOGPROB for logprob in logprobs):  # NaN is not
        raise BadAnswer("log-probs that are missing or above 0")
    return logprobs
