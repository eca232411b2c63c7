"""The in-process engine: samples from the policy itself, in the process that trains it.

A prompt is prefilled once and its cache repeated for its group; rows that finish leave the batch, and waiting prompts
take their place; keys and values go into preallocated buffers. The noise of a completion is counted (see
`stateset_lightning.seeding`), so it is the same whatever else is in the batch. Letters: B rows of the running batch, N
completions, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from stateset_lightning.errors import NonFiniteError
from stateset_lightning.policy import Policy, end_of_sequence_ids
from stateset_lightning.policy.precision import replaced_parameters
from stateset_lightning.rollout.cpu_decoding import CPUDecoding
from stateset_lightning.rollout.engine import OnFinished, RolloutConfig
from stateset_lightning.rollout.running_batch import RunningBatch, make_running_batch
from stateset_lightning.rollout.sampling import StopStrings, check_length, sample_tokens
from stateset_lightning.seeding import uniforms
from stateset_lightning.types import FinishReason, Rollout

# Finished rows leave the batch when fewer than this share of its rows is still running: leaving copies the cache.
COMPACT_BELOW = 0.75


class InProcessEngine:
    """Samples from the policy's own weights.

    Args:
        tokenizer: Turns completions into text.
        dtype: Weights are cast to it while sampling (under mixed precision); None samples with them as they are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None = None) -> None:
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.decoded_rows = 0  # rows x steps of the last `generate`, for the metrics of work done
        self._policy: Policy | None = None

    @property
    def policy(self) -> Policy:
        assert self._policy is not None, "sync(policy) comes before generate"
        return self._policy

    def sync(self, policy: Policy) -> None:
        if policy is not self._policy:
            self._policy, self._cpu_decoding = policy, CPUDecoding(policy.model)

    @torch.no_grad()
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
            ConfigError: If a prompt and its completion do not fit into the model's positions.
            NonFiniteError: If the policy's logits are not finite.
        """
        assert len(seeds_N) == len(prompts) * num_generations
        if (limit := self.policy.context_length) is not None:
            check_length(prompts, sampling.max_new_tokens, limit, f"the model's {limit} positions")
        texts = [""] * len(seeds_N)
        with self._sampling_mode(), self._cpu_decoding.prepared(min(len(texts), sampling.max_batch_rows)) as decoder:
            batch = make_running_batch(self.policy.model, sampling.max_new_tokens, max(map(len, prompts)), decoder)
            ends, noise = end_of_sequence_ids(batch.model, self.tokenizer), None if greedy else seeds_N
            stop = StopStrings(sampling.stop, self.tokenizer, ends)
            decoding = _Decoding(batch, prompts, num_generations, sampling, noise, stop)
            for n, tokens in decoding.run():
                texts[n] = stop.text(tokens)
                if on_finished is not None:
                    on_finished(n, texts[n], len(tokens))
        self.decoded_rows = decoding.decoded_rows
        return decoding.rollout(texts)

    @contextmanager
    def _sampling_mode(self) -> Iterator[None]:
        """Evaluation mode, with weights cast once: no dropout, and a cache (which gradient checkpointing forbids)."""
        model = self.policy.model
        training = {module: module.training for module in model.modules()}
        model.eval()
        try:
            # Under autocast every step would cast every weight again. Inference mode costs less per operation than
            # `no_grad`.
            with (
                torch.autocast(model.device.type, enabled=False),
                self._weights_cast(),
                self.policy.merged_adapter(),
                torch.inference_mode(),
            ):
                yield
        finally:
            for module, was_training in training.items():
                module.training = was_training
                for name, buffer in module._buffers.items():
                    # Rotary frequencies that grew while sampling: DDP, for one, could not write to them.
                    if buffer is not None and buffer.is_inference():
                        module._buffers[name] = buffer.clone()

    def _weights_cast(self) -> AbstractContextManager[None]:
        if self.dtype is None:
            return nullcontext()

        @cache  # tied weights stay tied
        def cast(weight: torch.nn.Parameter) -> torch.nn.Parameter:
            is_quantized = not weight.is_floating_point()
            return weight if is_quantized else torch.nn.Parameter(weight.detach().to(self.dtype), requires_grad=False)

        return replaced_parameters(self.policy.model.modules(), cast)


@dataclass(eq=False)
class _Decoding:
    """One call of `generate`: which completions are being decoded, and what has been sampled for them.

    Args:
        batch: Empty; it is filled as room allows.
        prompts: Token ids.
        num_generations: Completions per prompt.
        sampling: How to sample.
        seeds_N: Of the noise; None decodes greedily.
        stop: Strings and tokens that end a completion.
    """

    batch: RunningBatch
    prompts: list[list[int]]
    num_generations: int
    sampling: RolloutConfig
    seeds_N: Sequence[int] | None
    stop: StopStrings

    def __post_init__(self) -> None:
        self.decoded_rows = 0
        self.device = self.batch.model.device
        self.ends = torch.tensor(sorted(self.stop.ends), device=self.device)
        num_completions = len(self.prompts) * self.num_generations
        # A column more than a completion has tokens: there go those of rows that have finished, but not left yet.
        shape = (num_completions, self.sampling.max_new_tokens + 1)
        self.tokens_NT = torch.zeros(shape, dtype=torch.long, device=self.device)
        self.logprobs_NT = torch.zeros(shape, dtype=torch.float32, device=self.device)
        self.noise_NT = torch.zeros(shape, dtype=torch.float64, device=self.device)
        self.lengths = [0] * num_completions  # 0 until a completion is finished
        self.finish_reasons = [FinishReason.LENGTH] * num_completions
        self.tails: list[list[int]] = [[] for _ in self.lengths]  # tokens on the host, for stop strings alone
        self.num_admitted = 0
        # Per row of the batch: which completion it is, on the host and on the device, and how many tokens it has.
        self.numbers: list[int] = []
        self.numbers_B = self.counts_B = torch.empty(0, dtype=torch.long, device=self.device)

    def run(self) -> Iterator[tuple[int, list[int]]]:
        """Decodes everything; yields the number and the tokens of each completion when it is finished."""
        self._admit()
        while self.numbers:
            tokens_B, logprobs_B = self._sample()
            yield from self._finish(tokens_B, logprobs_B)
            num_running = sum(self.lengths[n] == 0 for n in self.numbers)
            if num_running < COMPACT_BELOW * len(self.numbers):
                tokens_B = tokens_B[self._drop_finished()]
            if num_running:
                self.batch.step(tokens_B)
            self._admit()

    def rollout(self, texts: list[str]) -> Rollout:
        """All completions, once they are finished."""
        lengths_N = torch.tensor(self.lengths)
        is_token_NT = torch.arange(self.tokens_NT.shape[1]) < lengths_N[:, None]
        completion_tokens_T = self.tokens_NT.cpu()[is_token_NT]
        logprobs_T = self.logprobs_NT.cpu()[is_token_NT]
        sampled_T = torch.ones_like(completion_tokens_T, dtype=torch.bool)
        return Rollout(self.prompts, completion_tokens_T, lengths_N, logprobs_T, sampled_T, self.finish_reasons, texts)

    def _admit(self) -> None:
        """Lets waiting completions in as room allows: whole groups, so that a prompt is prefilled once, if one fits."""
        size, room = self.num_generations, self.sampling.max_batch_rows - len(self.numbers)
        if size <= self.sampling.max_batch_rows:
            room -= room % size
        admitted = range(len(self.lengths))[self.num_admitted :][:room]
        if not admitted:
            return
        self.num_admitted += len(admitted)
        first, last = admitted[0] // size, admitted[-1] // size
        self.batch.admit(self.prompts[first : last + 1], [n // size - first for n in admitted])
        self.numbers += admitted
        self.numbers_B = torch.tensor(self.numbers, device=self.device)
        self.counts_B = torch.cat([self.counts_B, self.counts_B.new_zeros(len(admitted))])
        if self.seeds_N is not None:
            noise = uniforms([self.seeds_N[n] for n in admitted], self.noise_NT.shape[1])
            self.noise_NT[admitted[0] : admitted[-1] + 1] = torch.from_numpy(noise)

    def _sample(self) -> tuple[Tensor, Tensor]:
        """The next token of every row and its log-prob, written down; finished rows get one that nobody reads."""
        width = self.tokens_NT.shape[1]
        place_B = self.numbers_B * width + self.counts_B.clamp(max=width - 1)
        noise_B = None if self.seeds_N is None else self.noise_NT.take(place_B)
        tokens_B, logprobs_B = sample_tokens(self.batch.logits_BV, noise_B, self.sampling)
        self.tokens_NT.put_(place_B, tokens_B)
        self.logprobs_NT.put_(place_B, logprobs_B)
        self.counts_B += 1
        self.decoded_rows += len(self.numbers)
        return tokens_B, logprobs_B

    def _finish(self, tokens_B: Tensor, logprobs_B: Tensor) -> Iterator[tuple[int, list[int]]]:
        """The completions that these tokens finish. Waits for the device once, and again only if there are any."""
        stopped_B = torch.isin(tokens_B, self.ends)
        ended_B = stopped_B | (self.counts_B >= self.sampling.max_new_tokens) | ~logprobs_B.isfinite()
        ended = ended_B.tolist()
        if self.stop.strings:
            for row, (n, token) in enumerate(zip(self.numbers, tokens_B.tolist(), strict=True)):
                self.tails[n].append(token)
                if self.lengths[n] == 0 and self.stop.found(self.tails[n]):
                    ended[row], self.finish_reasons[n] = True, FinishReason.STOP
        rows = [row for row, n in enumerate(self.numbers) if ended[row] and self.lengths[n] == 0]
        if not rows:
            return
        numbers = [self.numbers[row] for row in rows]
        values = (values[rows].tolist() for values in (stopped_B, self.counts_B, logprobs_B))
        for n, tokens, stopped, count, logprob in zip(numbers, self.tokens_NT[numbers].tolist(), *values, strict=True):
            if logprob != logprob:
                raise NonFiniteError(
                    "the policy's logits are not finite, so nothing can be sampled: its weights have diverged; go back"
                    " to an earlier checkpoint, with a lower learning rate or trainer.gradient_clip_val"
                )
            self.lengths[n] = count
            if stopped:
                self.finish_reasons[n] = FinishReason.STOP
            yield n, tokens[:count]

    def _drop_finished(self) -> Tensor:
        """Drops finished rows from the batch; returns the former indices of the rows that stay."""
        rows = [row for row, n in enumerate(self.numbers) if self.lengths[n] == 0]
        keep = torch.tensor(rows, dtype=torch.long, device=self.device)
        self.batch.keep(keep)
        self.numbers = [self.numbers[row] for row in rows]
        self.numbers_B, self.counts_B = self.numbers_B[keep], self.counts_B[keep]
        return keep
