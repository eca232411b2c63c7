"""The in-process engine: samples from the policy itself, in the same process.

A prompt is prefilled once and its cache repeated for its group; rows that finish leave the batch, and waiting prompts
take their place; keys and values go into preallocated buffers. The noise of a completion is counted (see
`stateset_lightning.seeding`), so it is the same whatever else is in the batch. Letters: B rows of the running batch, N
completions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stateset_lightning.errors import ConfigError, NonFiniteError
from stateset_lightning.policy import context_length, end_of_sequence_ids
from stateset_lightning.policy.lora import merged_adapter
from stateset_lightning.policy.precision import replaced_parameters
from stateset_lightning.rollout.cpu_decoding import LeanDecoder, fast_linears, make_lean_decoder
from stateset_lightning.rollout.engine import OnFinished, RolloutConfig, rollout_of
from stateset_lightning.rollout.running_batch import make_running_batch
from stateset_lightning.rollout.sampling import StopStrings, sample_tokens
from stateset_lightning.seeding import uniforms
from stateset_lightning.types import FinishReason, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stateset_lightning.policy import Policy

COMPACT_BELOW = 0.75
"""Finished rows leave the batch when fewer than this share of its rows is still running: leaving copies the cache."""


@dataclass
class _Completion:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason = FinishReason.LENGTH


class InProcessEngine:
    """Samples from the policy's own weights.

    Args:
        tokenizer: Turns completions into text.
        dtype: Weights are cast to it while sampling (under mixed precision); None samples with them as they are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None = None) -> None:
        self.tokenizer = tokenizer
        self.dtype = dtype
        self._policy: Policy | None = None
        # whether a lean decoder gives the policy's logits, once it has been tried
        self._decodes_lean: bool | None = None
        self.decoded_rows = 0  # rows x steps of the last `generate`, for the account of work done

    def sync(self, policy: Policy) -> None:
        if policy is not self._policy:
            self._policy, self._decodes_lean = policy, None

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
        """
        assert self._policy is not None, "sync(policy) comes before generate"
        assert len(seeds_N) == len(prompts) * num_generations
        self._check_context(prompts, sampling.max_new_tokens)
        stop = StopStrings(sampling.stop, self.tokenizer)
        completions = [_Completion() for _ in seeds_N]
        texts = [""] * len(completions)
        with self._sampling_mode(), self._decoder(min(len(completions), sampling.max_batch_rows)) as decoder:
            decoding = _Decoding(self, decoder, prompts, num_generations, sampling, None if greedy else seeds_N, stop)
            for n, completion in decoding.run():
                completions[n] = completion
                texts[n] = stop.cut(self._text(completion.tokens))
                if on_finished is not None:
                    on_finished(n, texts[n], len(completion.tokens))
        self.decoded_rows = decoding.decoded_rows
        tokens_N, logprobs_N = [c.tokens for c in completions], [c.logprobs for c in completions]
        return rollout_of(prompts, tokens_N, logprobs_N, [c.finish_reason for c in completions], texts)

    @property
    def policy(self) -> Policy:
        assert self._policy is not None
        return self._policy

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _check_context(self, prompts: list[list[int]], max_new_tokens: int) -> None:
        limit = context_length(self.policy.model)
        longest = max(map(len, prompts))
        if limit is not None and longest + max_new_tokens > limit:
            raise ConfigError(
                f"a prompt of {longest} tokens and model.rollout.max_new_tokens={max_new_tokens} exceed the model's"
                f" {limit} positions: set data.max_prompt_tokens to at most {max(limit - max_new_tokens, 0)}, or lower"
                " max_new_tokens"
            )

    @contextmanager
    def _sampling_mode(self) -> Iterator[None]:
        """Evaluation mode (no dropout; a cache, which gradient checkpointing forbids in training mode), weights cast
        once.
        """
        model = self.policy.model
        training = {module: module.training for module in model.modules()}
        model.eval()
        try:
            # Under autocast every step would cast every weight again. Inference mode costs less per operation than
            # `no_grad`.
            with (
                torch.autocast(model.device.type, enabled=False),
                self._weights_cast(),
                merged_adapter(model),
                torch.inference_mode(),
            ):
                yield
        finally:
            for module in training:
                for name, buffer in module._buffers.items():
                    # rotary frequencies that grew; DDP, say, could not write to it
                    if buffer is not None and buffer.is_inference():
                        module._buffers[name] = buffer.clone()
            for module, was_training in training.items():
                module.training = was_training

    @contextmanager
    def _decoder(self, num_rows: int) -> Iterator[LeanDecoder | None]:
        """What makes the steps; None for the model itself, whose linear layers are fast then."""
        decoder = None if self._decodes_lean is False else make_lean_decoder(self.policy.model)
        if decoder is not None and self._decodes_lean is None:
            self._decodes_lean = decoder.is_exact(self.policy.model)
        if decoder is not None and self._decodes_lean:
            yield decoder
        else:
            with fast_linears(self.policy.model, num_rows):
                yield None

    def _weights_cast(self) -> AbstractContextManager[None]:
        if self.dtype is None:
            return nullcontext()

        @cache  # tied weights stay tied
        def cast(weight: torch.nn.Parameter) -> torch.nn.Parameter:
            is_quantized = not weight.is_floating_point()
            return weight if is_quantized else torch.nn.Parameter(weight.detach().to(self.dtype), requires_grad=False)

        return replaced_parameters(self.policy.model.modules(), cast)


class _Decoding:
    """One call of `generate`: which completions run, what has been sampled for them, and who waits."""

    def __init__(
        self,
        engine: InProcessEngine,
        decoder: LeanDecoder | None,
        prompts: list[list[int]],
        num_generations: int,
        sampling: RolloutConfig,
        seeds_N: Sequence[int] | None,
        stop: StopStrings,
    ) -> None:
        model = engine.policy.model
        self.device = model.device
        self.batch = make_running_batch(model, sampling.max_new_tokens, max(map(len, prompts)), decoder)
        self.eos = torch.tensor(sorted(end_of_sequence_ids(model, engine.tokenizer)), device=self.device)
        self.prompts = prompts
        self.num_generations = num_generations
        self.sampling = sampling
        self.seeds_N = seeds_N
        self.stop = stop
        self.waiting = list(range(len(prompts) * num_generations))
        self.decoded_rows = 0
        # Per row of the running batch: which completion, whether finished, and what it has so far.
        self.numbers: list[int] = []
        self.finished: list[bool] = []
        self.tails: list[list[int]] = []  # tokens on the host, for stop strings alone
        self.counts_B = torch.empty(0, dtype=torch.long, device=self.device)
        empty_BT = torch.empty(0, sampling.max_new_tokens, device=self.device)
        # not the default dtype
        self.noise_BT, self.logprobs_BT, self.tokens_BT = empty_BT.double(), empty_BT.float(), empty_BT.long()

    def run(self) -> Iterator[tuple[int, _Completion]]:
        """Decodes everything; yields each completion, with its number, when it is finished."""
        self._admit()
        while self.numbers:
            tokens_B, logprobs_B = self._sample()
            yield from self._finish(tokens_B, logprobs_B)
            running = self.finished.count(False)
            if running < COMPACT_BELOW * len(self.numbers):
                tokens_B = tokens_B[self._drop_finished()]
            if running:
                self.batch.step(tokens_B)
            self._admit()

    def _admit(self) -> None:
        """Lets waiting completions in as room allows: whole groups, so that a prompt is prefilled once, unless none
        fits at all.
        """
        room = self.sampling.max_batch_rows - len(self.numbers)
        if self.num_generations <= self.sampling.max_batch_rows:
            room -= room % self.num_generations
        admitted, self.waiting = self.waiting[:room], self.waiting[room:]
        if not admitted:
            return
        first, last = admitted[0] // self.num_generations, admitted[-1] // self.num_generations
        self.batch.admit(self.prompts[first : last + 1], [n // self.num_generations - first for n in admitted])
        self.numbers += admitted
        self.finished += [False] * len(admitted)
        self.tails += [[] for _ in admitted]
        shape = (len(admitted), self.sampling.max_new_tokens)
        self.counts_B = torch.cat([self.counts_B, self.counts_B.new_zeros(len(admitted))])
        self.tokens_BT = torch.cat([self.tokens_BT, self.tokens_BT.new_zeros(shape)])
        self.logprobs_BT = torch.cat([self.logprobs_BT, self.logprobs_BT.new_zeros(shape)])
        if self.seeds_N is not None:
            noise = uniforms([self.seeds_N[n] for n in admitted], shape[1])
            self.noise_BT = torch.cat([self.noise_BT, torch.from_numpy(noise).to(self.device)])

    def _sample(self) -> tuple[Tensor, Tensor]:
        """The next token of every row and its log-prob, written down; finished rows get one that nobody reads."""
        place_B1 = self.counts_B.clamp(max=self.sampling.max_new_tokens - 1)[:, None]
        noise_B = None if self.seeds_N is None else self.noise_BT.gather(1, place_B1)[:, 0]
        tokens_B, logprobs_B = sample_tokens(self.batch.logits_BV, noise_B, self.sampling)
        self.tokens_BT.scatter_(1, place_B1, tokens_B[:, None])
        self.logprobs_BT.scatter_(1, place_B1, logprobs_B[:, None])
        self.counts_B += 1
        self.decoded_rows += len(self.numbers)
        return tokens_B, logprobs_B

    def _finish(self, tokens_B: Tensor, logprobs_B: Tensor) -> Iterator[tuple[int, _Completion]]:
        """The completions that these tokens finish. Asks the device once per token, and again only when there are
        any.
        """
        stopped_B = torch.isin(tokens_B, self.eos)
        ended_B = stopped_B | (self.counts_B >= self.sampling.max_new_tokens) | ~logprobs_B.isfinite()
        ended = ended_B.tolist()
        stopped = [False] * len(ended)
        if self.stop.strings:
            for row, token in enumerate(tokens_B.tolist()):
                self.tails[row].append(token)
                stopped[row] = not self.finished[row] and self.stop.found(self.tails[row])
        rows = [row for row in range(len(ended)) if (ended[row] or stopped[row]) and not self.finished[row]]
        if not rows:
            return
        stopped_by_token, counts = stopped_B[rows].tolist(), self.counts_B[rows].tolist()
        tokens, logprobs = self.tokens_BT[rows].tolist(), self.logprobs_BT[rows].tolist()
        for i, row in enumerate(rows):
            self.finished[row] = True
            if logprobs[i][counts[i] - 1] != logprobs[i][counts[i] - 1]:
                raise NonFiniteError(
                    "the policy's logits are not finite, so nothing can be sampled: its weights have diverged; go back"
                    " to an earlier checkpoint, with a lower learning rate or trainer.gradient_clip_val"
                )
            reason = FinishReason.STOP if stopped[row] or stopped_by_token[i] else FinishReason.LENGTH
            yield self.numbers[row], _Completion(tokens[i][: counts[i]], logprobs[i][: counts[i]], reason)

    def _drop_finished(self) -> Tensor:
        """Drops finished rows from everything; the rows that stay, as they were numbered before."""
        rows = [row for row, finished in enumerate(self.finished) if not finished]
        keep = torch.tensor(rows, dtype=torch.long, device=self.device)
        self.batch.keep(keep)
        self.numbers = [self.numbers[row] for row in rows]
        self.tails = [self.tails[row] for row in rows]
        self.finished = [False] * len(rows)
        self.counts_B, self.tokens_BT, self.logprobs_BT = (
            self.counts_B[keep],
            self.tokens_BT[keep],
            self.logprobs_BT[keep],
        )
        if self.seeds_N is not None:
            self.noise_BT = self.noise_BT[keep]
        return keep
