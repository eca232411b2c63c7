"""The vLLM engine: samples on running vLLM servers. Token ids go out, token ids and their log-probs come back.

The servers get the policy's weights before they sample: an adapter is swapped in, a whole model is reloaded from a
shared folder. Each time the log-probs of a few tokens are compared with the policy's, so no run goes on with a server
that computes something else.
"""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt
from transformers import PreTrainedTokenizerBase

from stateset_lightning.errors import ConfigError, bounded
from stateset_lightning.policy import Policy, end_of_sequence_ids
from stateset_lightning.policy.config import Dtype
from stateset_lightning.ranks import Ranks
from stateset_lightning.rollout.engine import OnFinished, RemoteEngine, RolloutConfig
from stateset_lightning.rollout.sampling import StopStrings, check_length
from stateset_lightning.rollout.vllm_client import Choice, VLLMServer
from stateset_lightning.rollout.vllm_transfer import NcclGroups, send_by_ipc
from stateset_lightning.rollout.vllm_weights import WeightSync, request
from stateset_lightning.threads import DaemonThreads, as_they_end, interruptible
from stateset_lightning.types import Metrics, Rollout


def servers_at(urls: list[str], option: str, request_timeout: float, max_wait_minutes: float) -> list[VLLMServer]:
    """The servers that `option` (`model.engine`, say) gives; see `VLLMServer`.

    Raises:
        ConfigError: If they are no list of addresses.
    """
    if not urls or isinstance(urls, str):
        raise ConfigError(f"{option}.urls={urls!r} must be a list of addresses, as [http://127.0.0.1:8000]")
    waits = {"request_timeout": request_timeout, "max_wait": 60 * max_wait_minutes}
    return [VLLMServer(url, option=option, **waits) for url in urls]


@bounded("model.engine")
class VLLMEngine(RemoteEngine):
    """Samples from the policy on vLLM servers.

    Each completion is a request of its own with its own seed, so its noise does not depend on what is sampled beside
    it. The same tokens come again as far as the server's kernels give the same logits in another batch. Greedy
    completions have log-probs at temperature 1.

    Args:
        urls: The servers. Prompts are dealt out to them in turn, from another one on each device; all completions of a
            prompt go to one server, which prefills it once.
        folder: Where weights are handed over; the servers must see it under the same path. None: shared memory
            (/dev/shm); where it is missing or has no room, the system's for temporary files (announced).
        dtype: That the servers compute in (their --dtype). A whole model is handed over in it, and it decides the
            tolerance. None: the policy's.
        tolerance: Nats per token by which log-probs of servers and policy may differ after a sync. None: by dtype
            (`LOGPROB_TOLERANCE`).
        request_timeout: Seconds for one completion, including the time that it waits in the server's queue, from the
            first byte to the last. After three that come too late the run stops.
        max_wait_minutes: How long a server may be away before the run stops.
        sleep: The servers keep nothing on their GPU while nobody samples, so that the policy can train on it. For a
            run of one process.
        transfer: How a whole model is handed over; an adapter is always a file. `files`: in `folder`. In a run of one
            process `ipc`, through memory of the GPU on which one server and the policy are, or `nccl`, to servers on
            other GPUs.
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
        sleep: bool = False,
        transfer: Literal["files", "ipc", "nccl"] = "files",
    ) -> None:
        self.servers = servers_at(urls, "model.engine", request_timeout, max_wait_minutes)
        if transfer == "ipc" and len(urls) > 1:
            several = f"{len(urls)} model.engine.urls"
            raise ConfigError(f"model.engine.transfer=ipc with {several}: one server shares the GPU")
        self._make_sync = partial(WeightSync, self.servers, folder=folder, dtype=dtype, tolerance=tolerance)
        self._send = {"files": None, "ipc": send_by_ipc, "nccl": NcclGroups().send}[transfer]
        self._for_one_process = "sleep=true" if sleep else f"transfer={transfer}" if self._send else None
        self._restored = 0
        self._sleeps = sleep

    def setup(self, tokenizer: PreTrainedTokenizerBase, sampling: RolloutConfig) -> None:
        """Waits for the servers and asks what they serve; called before a run.

        Raises:
            ConfigError: If no server could give the log-probs that `sampling` needs, or one would sleep, or take the
                policy's weights, while both are needed.
            ServerError: If a server does not answer, or not as vLLM does.
        """
        self.tokenizer = tokenizer
        self._weights = self._make_sync(sampling, send=self._send)
        if sampling.temperature != 1 and (filters := sampling.filters):
            what = f"model.rollout.temperature={sampling.temperature} with {filters}"
            why = "vLLM's log-probs are either those behind the filters or those at temperature 1"
            raise ConfigError(f"{what}: {why}, and training needs neither: set temperature to 1, or leave filters out")
        if self._for_one_process and (sampling.sampling_ahead or Ranks.current().world > 1):
            where = f"sampling_ahead={sampling.sampling_ahead} on {Ranks.current().world} devices"
            what = f"model.engine.{self._for_one_process} with {where}"
            raise ConfigError(f"{what}: it is for one process that trains or samples")
        self.max_length = min([server.find_model() for server in self.servers])
        self._tell("/sleep")

    def _tell(self, path: str) -> None:
        """Has servers that share the policy's device give its memory back (/sleep), or take it again (/wake_up)."""
        if not self._sleeps:
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what training has freed, and torch still holds
        for server in self.servers:
            needed = "VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode (model.engine.sleep)"
            server.patiently(partial(server.call, path, {}, needed=needed))

    def pop_metrics(self) -> Metrics:
        """What happened since the last call, as (sum, count): the last sync, and how often servers came back."""
        restored = sum(server.restored for server in self.servers)
        metrics = {**self._weights.metrics, "work/server_restarts": (restored - self._restored, 1.0)}
        self._weights.metrics, self._restored = {}, restored
        return metrics

    @interruptible()
    def sync(self, policy: Policy) -> None:
        """See `RolloutEngine.sync`. Every rank calls it; the first one acts.

        Raises:
            DiskError: If weights cannot be written into the folder.
            SamplingError: If a server does not compute the policy.
            ServerError: If a server does not take the weights.
        """
        self._tell("/wake_up")
        self.ends = end_of_sequence_ids(policy.model, self.tokenizer)
        for server in self.servers:
            server.vocabulary = policy.model.config.get_text_config().vocab_size
        self._weights.update(policy)

    @interruptible()
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
            NonFiniteError: If a server does not know too many log-probs.
            ServerError: If a server refuses, answers badly, or stays away for too long.
        """
        synced, limit = self._weights.synced, self.max_length
        assert synced is not None, "sync(policy) comes before generate"
        assert len(seeds_N) == len(prompts) * num_generations
        whose = f"the server's --max-model-len of {limit} (raise it, if the model allows)"
        check_length(max(map(len, prompts)), sampling.max_new_tokens, limit, whose)
        stop = StopStrings(sampling.stop, self.tokenizer, self.ends)
        common: dict[str, Any] = {"max_tokens": sampling.max_new_tokens, "stop_token_ids": sorted(stop.ends)}
        if sampling.stop:  # looked for in a text with special tokens, as `stop` does
            common |= {"stop": sampling.stop, "include_stop_str_in_output": True, "skip_special_tokens": False}
        self._tell("/wake_up")
        choices, texts = [Choice.model_construct()] * len(seeds_N), [""] * len(seeds_N)
        numbers = {}
        rank = Ranks.current().rank  # by place: a conversation mostly goes on where its beginning is cached
        servers_N = [self.servers[(rank + n // num_generations) % len(self.servers)] for n in range(len(seeds_N))]
        with DaemonThreads(sampling.max_batch_rows, "vllm-request") as threads:
            for n, (server, seed) in enumerate(zip(servers_N, seeds_N, strict=True)):
                own = {"prompt": prompts[n // num_generations], "seed": seed}
                body = {**request(server, synced, sampling, greedy), **common, **own}
                numbers[threads.submit(server.patiently, partial(server.choices, body))] = n
            for future in as_they_end(numbers):
                n, (choice,) = numbers[future], future.result()
                choices[n], texts[n] = choice, stop.text(choice.token_ids)
                if on_finished is not None:
                    on_finished(n, texts[n], len(choice.token_ids))
        self._tell("/sleep")
        for server in self.servers:
            server.check_known([choice for choice, its in zip(choices, servers_N, strict=True) if its is server])
        completion_tokens_T = torch.tensor([token for choice in choices for token in choice.token_ids])
        logprobs_T = torch.tensor([logprob for choice in choices for logprob in choice.logprobs], dtype=torch.float32)
        lengths_N = torch.tensor([len(choice.token_ids) for choice in choices])
        sampled_T = torch.ones_like(completion_tokens_T, dtype=torch.bool)
        finish_reasons = [choice.finish_reason for choice in choices]
        return Rollout(prompts, completion_tokens_T, lengths_N, logprobs_T, sampled_T, finish_reasons, texts)
