"""The vLLM engine: samples on running vLLM servers, token ids in, token ids and log-probs out.

The servers get the policy's weights before they sample: an adapter is swapped in, a whole model is reloaded from a
shared folder. After each time the log-probs of a few tokens are compared with the policy's: no run goes on with a
server that computes something else.
"""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
import logging
from collections.abc import Sequence
from concurrent.futures import as_completed
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Gt

from stateset_lightning.errors import ConfigError, NonFiniteError, check_bounds
from stateset_lightning.policy import Policy, end_of_sequence_ids
from stateset_lightning.policy.config import Dtype
from stateset_lightning.rollout.engine import OnFinished, RolloutConfig, rollout_of
from stateset_lightning.rollout.sampling import StopStrings
from stateset_lightning.rollout.vllm_client import VLLMServer
from stateset_lightning.rollout.vllm_weights import WeightSync, filters_of, request
from stateset_lightning.threads import DaemonThreads
from stateset_lightning.types import FinishReason, Metrics, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("stateset_lightning")


class VLLMEngine:
    """Samples from the policy on vLLM servers.

    One request per completion, with a seed of its own: its noise follows from that alone, whatever is sampled beside
    it. The same tokens come again as far as the server's kernels give the same logits in another batch. Greedy
    completions have log-probs at temperature 1.

    Args:
        urls: The servers. Prompts are dealt out to them in turn, the completions of one prompt to one server, which
            computes it once.
        folder: Where weights are handed over; the servers must see it under the same path. None: the system's for
            temporary files.
        dtype: That the servers compute in (their --dtype); it decides the tolerance. None: the policy's.
        tolerance: Nats per token by which log-probs of servers and policy may differ after a sync. None: by dtype
            (`logprob_tolerance`).
        request_timeout: Seconds for one completion, with the time that it waits in the server's queue.
        max_wait_minutes: How long a server may be away before the run stops.
    """

    def __init__(
        self,
        urls: list[str],
        *,
        folder: str | None = None,
        dtype: Dtype | None = None,
        tolerance: Annotated[float, Gt(0)] | None = None,
        request_timeout: Annotated[float, Gt(0)] = 1800.0,
        max_wait_minutes: Annotated[float, Gt(0)] = 10.0,
    ) -> None:
        values = {"tolerance": tolerance, "request_timeout": request_timeout, "max_wait_minutes": max_wait_minutes}
        check_bounds("model.engine", VLLMEngine.__init__, values)
        if not urls or isinstance(urls, str):
            raise ConfigError(
                f"model.engine.urls={urls!r} must be a list of addresses, such as [http://127.0.0.1:8000]"
            )
        self.servers = [
            VLLMServer(url, request_timeout=request_timeout, max_wait=60 * max_wait_minutes) for url in urls
        ]
        self._make_sync = partial(WeightSync, self.servers, folder=folder, dtype=dtype, tolerance=tolerance)
        self._restored = 0

    def setup(self, tokenizer: "PreTrainedTokenizerBase", sampling: RolloutConfig) -> None:
        """Waits for the servers and asks what they serve; called before a run.

        Raises:
            ConfigError: If no server could give the log-probs that `sampling` needs.
            ServerError: If a server does not answer.
        """
        self.tokenizer = tokenizer
        self._weights = self._make_sync(sampling)
        if sampling.temperature != 1 and (filters := filters_of(sampling)):
            raise ConfigError(
                f"model.rollout.temperature={sampling.temperature} with {', '.join(filters)}: vLLM's log-probs are"
                " either those behind the filters or those of undivided logits, and training needs neither: set"
                " temperature to 1, or leave the filters out"
            )
        lengths = []
        for server in self.servers:
            models = server.patiently(partial(server.call, "/v1/models"))["data"]
            served = next(model for model in models if not model["parent"])  # the others are adapters
            server.model = served["id"]
            lengths.append(served["max_model_len"])
            log.info("%s serves %s, up to %s tokens", server.url, served["id"], served["max_model_len"])
        self.max_length = min(lengths)

    def pop_metrics(self) -> Metrics:
        """Of what happened since the last call, as (sum, count): the last sync, and how often servers came back."""
        restored = sum(server.restored for server in self.servers)
        metrics = {**self._weights.metrics, "work/server_restarts": (restored - self._restored, 1.0)}
        self._weights.metrics, self._restored = {}, restored
        return metrics

    def sync(self, policy: Policy) -> None:
        """See `RolloutEngine.sync`. Every rank calls it; the first one acts.

        Raises:
            SamplingError: If a server does not compute the policy.
            ServerError: If one does not take the weights.
        """
        self._eos = sorted(end_of_sequence_ids(policy.model, self.tokenizer))
        self._weights.update(policy)

    def generate(
        self,
        prompts: list[list[int]],
        num_generations: int,
        sampling: RolloutConfig,
        seeds_N: Sequence[int],
        greedy: bool = False,
        on_finished: OnFinished | None = None,
    ) -> Rollout:
        """See `RolloutEngine.generate`.

        Raises:
            ConfigError: If a prompt and its completion are longer than the servers allow.
            ServerError: If a server refuses, or stays away for too long.
        """
        synced = self._weights.synced
        assert synced is not None, "sync(policy) comes before generate"
        assert len(seeds_N) == len(prompts) * num_generations
        self._check_length(prompts, sampling.max_new_tokens)
        common = {
            "max_tokens": sampling.max_new_tokens,
            "stop_token_ids": self._eos,
            "logprobs": 0,
            "return_token_ids": True,
        }
        if sampling.stop:
            common |= {"stop": sampling.stop, "include_stop_str_in_output": True}
        calls = []
        for n, seed in enumerate(seeds_N):
            p = n // num_generations
            server = self.servers[p % len(self.servers)]
            own = {"prompt": prompts[p], "seed": seed}
            calls.append(partial(server.complete, {**request(server, synced, sampling, greedy), **common, **own}))
        stop = StopStrings(sampling.stop, self.tokenizer)
        choices: list[dict[str, Any]] = [{}] * len(calls)
        texts = [""] * len(calls)
        threads = DaemonThreads(sampling.max_batch_rows, "vllm-request")
        try:
            numbers = {threads.submit(call): n for n, call in enumerate(calls)}
            for future in as_completed(numbers):
                n, (choice,) = numbers[future], future.result()
                choices[n] = choice
                texts[n] = stop.cut(str(self.tokenizer.decode(choice["token_ids"], skip_special_tokens=True)))
                if on_finished is not None:
                    on_finished(n, texts[n], len(choice["token_ids"]))
        finally:
            threads.close(seconds=0)
        tokens_N, logprobs_N = (
            [choice["token_ids"] for choice in choices],
            [choice["logprobs"]["token_logprobs"] for choice in choices],
        )
        reasons = [FinishReason(choice["finish_reason"]) for choice in choices]
        rollout = rollout_of(prompts, tokens_N, logprobs_N, reasons, texts)
        if not rollout.logprobs_T.isfinite().all():
            raise NonFiniteError(
                "a server's log-probs are not finite: the weights have diverged; go back to an earlier checkpoint"
            )
        return rollout

    def _check_length(self, prompts: list[list[int]], max_new_tokens: int) -> None:
        longest = max(map(len, prompts))
        if longest + max_new_tokens > self.max_length:
            raise ConfigError(
                f"a prompt of {longest} tokens and model.rollout.max_new_tokens={max_new_tokens} exceed the server's"
                f" --max-model-len of {self.max_length}: raise it, or lower max_new_tokens or data.max_prompt_tokens"
            )
