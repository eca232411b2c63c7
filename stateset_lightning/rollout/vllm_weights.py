"""The policy's weights on vLLM servers: handed over, and checked by what the servers answer with them."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from stateset_lightning.errors import DiskError, SamplingError, UserError
from stateset_lightning.files import DISK_ERRORS
from stateset_lightning.policy import Group, Policy
from stateset_lightning.policy.lora import adapter_weights, write_adapter
from stateset_lightning.policy.precision import LOGPROB_TOLERANCE
from stateset_lightning.ranks import Ranks
from stateset_lightning.rollout.engine import RolloutConfig
from stateset_lightning.rollout.handover import roomy_folder, weights_by_block, write_model
from stateset_lightning.rollout.vllm_client import VLLMServer
from stateset_lightning.rollout.vllm_transfer import Blocks
from stateset_lightning.threads import Interruption
from stateset_lightning.types import Metrics

T = TypeVar("T")

PROBE_PROMPT = list(range(3, 16))
# Asks for the few tokens whose log-probs are compared. Any tokens do: the policy scores the same ones.
PROBE = {"prompt": PROBE_PROMPT, "n": 4, "max_tokens": 8, "seed": 0, "ignore_eos": True}

# Tokens and their log-probs, float32, of some completions.
Completions = list[tuple[list[int], Tensor]]


@dataclass(frozen=True)
class Synced:
    """The weights that the servers have.

    Args:
        path: Where they were handed over; a name alone where they were not written.
        adapter: Its name on the servers; None for a whole model.
        answers: The policy's to `PROBE`.
        tolerance: Nats per token by which answers of servers may differ from them.
        difference: The largest difference of a log-prob that was found, in nats.
    """

    path: str
    adapter: str | None
    answers: Completions = field(default_factory=list)
    tolerance: float = 0.0
    difference: float = 0.0


def request(server: VLLMServer, synced: Synced, sampling: RolloutConfig, greedy: bool = False) -> dict[str, Any]:
    """What every completion request says.

    Nothing is left out: what a request does not say, a server takes from the model's generation_config.json.
    """
    return {
        "model": synced.adapter or server.model,
        "cache_salt": "-".join(Path(synced.path).parts[-2:]),  # vLLM allows no slashes
        "temperature": 0.0 if greedy else sampling.temperature,
        "top_k": sampling.top_k or 0,
        "top_p": sampling.top_p or 1.0,
        "min_p": sampling.min_p or 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logprobs": 0,  # of the sampled tokens alone
        "return_token_ids": True,
    }


@dataclass(eq=False)
class WeightSync:
    """Keeps the servers' weights equal to the policy's.

    Args:
        servers: Those that sample.
        sampling: The run's; log-probs are compared under it.
        folder: Where weights are handed over; None for shared memory (`roomy_folder`).
        dtype: That the servers compute in, and weights are handed over in; None for the policy's.
        tolerance: Nats per token; None for that of the coarser dtype (`LOGPROB_TOLERANCE`).
        send: Gives a server a whole model, in place of a folder.

    Attributes:
        synced: What the servers have; None before the first sync.
        metrics: Of the last sync, as (sum, count).
    """

    servers: Sequence[VLLMServer]
    sampling: RolloutConfig
    folder: str | None
    dtype: str | None
    tolerance: float | None
    send: Callable[[VLLMServer, PreTrainedModel, Blocks], None] | None = None
    synced: Synced | None = None
    metrics: Metrics = field(default_factory=dict)
    _home: tempfile.TemporaryDirectory[str] | None = None
    _version: int = 0
    _fingerprint: list[int] = field(default_factory=list)  # of the weights that the servers have
    _policy: Policy = field(init=False)  # the last that was handed over

    def update(self, policy: Policy) -> None:
        """Gives the servers the policy's weights, unless they have them. Every rank calls it; the first one acts.

        Where weights are sharded, all ranks take part in making each block whole and in the forwards that the servers
        are compared with, also when the first rank fails.

        Raises:
            DiskError: If the folder cannot be written.
            SamplingError: If a server does not compute the policy.
            ServerError: If a server does not take the weights.
        """
        # Of all ranks together where weights are sharded: an update may leave the part of one rank as it was.
        fingerprint = policy.fingerprint_of_shards or fingerprint_of(policy)
        if self.synced is not None and fingerprint == self._fingerprint:
            if self.synced.adapter is None:
                # A server that was started again meanwhile would sample from the weights of its start, and not say so.
                for server in self.servers:
                    server.patiently(partial(self._keep, server, self.synced))
            return
        start, self._policy = time.perf_counter(), policy
        Ranks.current().gather(None)  # no rank is sampling any more: each gets here when it has its own samples
        blocks: Iterator[dict[str, Tensor]] = iter(())
        if policy.adapter is not None:
            blocks = map(adapter_weights, [policy.model])
        elif self.send is None:
            blocks = weights_by_block(policy.model, self._served_dtype(policy))
        synced = self._of_first_rank(partial(self._write, policy, blocks), together=blocks)
        answers = self._of_first_rank(partial(self._hand_over, synced))
        scores = self._scores(policy, answers)
        self.synced = self._of_first_rank(partial(self._compared, synced, answers, scores))
        self._fingerprint = fingerprint
        for server in self.servers:
            server.give_weights = partial(self._restore, synced=self.synced)
        difference = self.synced.difference
        self.metrics = {"time/sync_s": (time.perf_counter() - start, 1), "mismatch/after_sync": (difference, 1)}

    def _of_first_rank(self, act: Callable[[], T], together: Iterable[object] = ()) -> T:
        """What `act` returns or raises on the first rank, on every rank: all end when the first one fails.

        Args:
            act: Called on the first rank alone.
            together: An iterator of which each item takes all ranks. The others go through it while the first one acts,
                and the first one as well through what it leaves.
        """
        ranks = Ranks.current()
        outcome: Any = None
        try:
            outcome = act() if ranks.rank == 0 else None
        except (UserError, Interruption) as error:
            outcome = error
        except DISK_ERRORS as error:
            outcome = DiskError(f"model.engine.folder={self.folder!r}: no weights can be handed over there: {error}")
        for _ in together:
            pass
        agreed = ranks.gather(outcome)[0]
        if isinstance(agreed, UserError | Interruption):
            raise agreed
        return agreed

    def _served_dtype(self, policy: Policy) -> torch.dtype:
        return getattr(torch, self.dtype) if self.dtype else policy.model.dtype

    def _write(self, policy: Policy, blocks: Iterator[dict[str, Tensor]]) -> Synced:
        """Writes the weights to a new path."""
        if self._home is None:
            size = self._served_dtype(policy).itemsize * sum(p.numel() for p in policy.parameters())
            where = self.folder or roomy_folder(size if policy.adapter is None and self.send is None else 0)
            self._home = tempfile.TemporaryDirectory(None, "stateset-lightning-", where, ignore_cleanup_errors=True)
        home = Path(self._home.name)
        # First, as there may be no room for two: the servers have read it, and nobody samples now.
        shutil.rmtree(home / str(self._version), ignore_errors=True)
        # A new path for each version, or vLLM's prefix cache would go on with keys and values of old weights: it tells
        # adapters apart by name and path, and requests by their salt, which is made of the path.
        self._version += 1
        path = home / str(self._version)
        if policy.adapter is not None:
            write_adapter(policy.model, policy.config.public_name, path, next(blocks))
        elif self.send is None:
            write_model(policy.model, blocks, path)
        return Synced(str(path), None if policy.adapter is None else home.name)

    def _hand_over(self, synced: Synced) -> list[Completions]:
        """Has every server load the weights. Returns the servers' answers to `PROBE`."""
        for server in self.servers:
            server.give_weights = partial(self._load, synced=synced)
            server.patiently(partial(self._load, server, synced))
        return [server.patiently(partial(self._answers, server, synced)) for server in self.servers]

    def _load(self, server: VLLMServer, synced: Synced) -> None:
        """Makes a server load weights."""
        if synced.adapter is None and self.send is not None:  # the policy's, which have not changed since the sync
            model, dtype = self._policy.model, self._served_dtype(self._policy)
            self.send(server, model, weights_by_block(model, dtype))
            return
        if synced.adapter is None:
            path = "/collective_rpc"
            body: dict[str, Any] = {"method": "reload_weights", "kwargs": {"weights_path": synced.path}}
            needed = "VLLM_SERVER_DEV_MODE=1"
        else:
            path = "/v1/load_lora_adapter"
            body = {"lora_name": synced.adapter, "lora_path": synced.path, "load_inplace": True}
            rank = "a --max-lora-rank of at least model.policy.lora.rank"
            needed = f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora and {rank}"
        server.call(path, body, needed=f"{needed}, and sees the folder (model.engine.folder)")

    def _keep(self, server: VLLMServer, synced: Synced) -> None:
        """Weights again for a server that has lost them."""
        if not _difference(self._answers(server, synced), synced.answers) <= synced.tolerance:
            self._restore(server, synced)

    def _restore(self, server: VLLMServer, synced: Synced) -> None:
        """Weights for a server that was started again.

        The policy may be in training meanwhile, so the server's answers are compared with those of the last sync.
        """
        self._load(server, synced)
        difference = _difference(self._answers(server, synced), synced.answers)
        if not difference <= synced.tolerance:
            off = f"its log-probs are off by {difference:.2g} nats per token"
            raise SamplingError(f"{server.url} came back and answers differently: {off}")

    def _answers(self, server: VLLMServer, synced: Synced) -> Completions:
        choices = server.choices({**request(server, synced, self.sampling), **PROBE})
        server.check_known(choices)
        return [(choice.token_ids, torch.tensor(choice.logprobs)) for choice in choices]

    def _scores(self, policy: Policy, answers: Sequence[Completions]) -> list[list[Tensor]]:
        """The policy's log-probs of each server's answer: at the run's temperature, and at 1."""
        groups = [Group(PROBE_PROMPT, [tokens for tokens, _ in answer]) for answer in answers]
        sizes, temperatures = [group.num_completion_tokens for group in groups], (self.sampling.temperature, 1.0)
        with torch.autocast(policy.device.type, enabled=False):
            scores = [policy.score_without_gradient(groups, t)[0].cpu().split(sizes) for t in temperatures]
        return [list(pair) for pair in zip(*scores, strict=True)]

    def _compared(self, synced: Synced, answers: list[Completions], scores: list[list[Tensor]]) -> Synced:
        """Compares the servers' answers with the policy, and notes the policy's.

        Args:
            synced: What the servers have.
            answers: The servers'.
            scores: Of these answers, by the policy: at the run's temperature, and at 1.

        Raises:
            SamplingError: If their log-probs differ by more than float error.
        """
        temperature, dtypes = self.sampling.temperature, (self._policy.model.dtype, self._served_dtype(self._policy))
        limit = self.tolerance or max(LOGPROB_TOLERANCE[dtype] for dtype in dtypes) / min(temperature, 1.0)
        for server, answer, (ours_T, undivided_T) in zip(self.servers, answers, scores, strict=True):
            tokens, logprobs = zip(*answer, strict=True)
            theirs_T = torch.cat(logprobs)
            difference = float((theirs_T - ours_T).abs().nanmean())  # NaN: not known
            if not difference <= limit:
                reason = self._guess(synced, is_undivided=float((theirs_T - undivided_T).abs().nanmean()) <= limit)
                found = f"with its weights, log-probs differ by {difference:.2g} nats per token, and float error is"
                found += f" below {limit:.2g} (temperature {temperature:g}). Probably {reason}"
                raise SamplingError(f"{server.url} does not compute the policy: {found}")
            ours = list(zip(tokens, ours_T.split([len(completion) for completion in tokens]), strict=True))
            largest = max(synced.difference, float((theirs_T - ours_T).abs().nan_to_num(0.0).max()))
            synced = replace(synced, answers=ours, tolerance=limit, difference=largest)
        return synced

    def _guess(self, synced: Synced, is_undivided: bool) -> str:
        """Why the log-probs of a server are probably others than the policy's.

        Args:
            synced: What it should have.
            is_undivided: Whether they are the policy's at temperature 1.
        """
        if filters := self.sampling.filters:
            return f"behind {filters}, vLLM's log-probs are ours with --logprobs-mode raw_logprobs alone"
        if is_undivided:
            return "its log-probs ignore the temperature: start it with --logprobs-mode processed_logprobs"
        another = "it serves another model"
        if synced.adapter is None:
            remedy = "train an adapter, model.policy.lora"
            return f"{another}, or cannot reload weights, as vLLM's CPU build: then {remedy}"
        return f"{another} than model.policy.model_name, or in a precision that model.engine.dtype does not say"


def _difference(answers: Completions, expected: Completions) -> float:
    """Mean absolute difference of log-probs in nats, as far as the tokens are the same; infinite if none is."""
    differences = []
    for (tokens, logprobs), (other_tokens, other_logprobs) in zip(answers, expected, strict=True):
        pairs = zip(tokens, other_tokens, logprobs.tolist(), other_logprobs.tolist(), strict=True)
        # Tokens that follow a near tie, which float error decides, have other log-probs.
        same = takewhile(lambda pair: pair[0] == pair[1], pairs)
        differences += [abs(logprob - other) for _, _, logprob, other in same if logprob == logprob]  # NaN: not known
    return sum(differences) / len(differences) if differences else float("inf")


def fingerprint_of(policy: Policy) -> list[int]:
    """Sums of the bits of the trained weights (of this rank's part of them, if sharded): other weights, other sums."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    parameters = list(policy.parameters())
    trained = [p for p in parameters if p.requires_grad] or parameters
    parts = [(p.to_local() if isinstance(p, DTensor) else p).detach() for p in trained]
    return torch.stack([p.view(integers[p.element_size()]).sum(dtype=torch.int64) for p in parts]).tolist()
