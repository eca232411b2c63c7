"""The in-process engine: samples from the policy itself, in the process that trains it.

A prompt is prefilled once and its cache repeated for its group; rows that finish leave the batch, and waiting prompts
take their place; keys and values go into preallocated buffers. On a GPU a step is a CUDA graph where that knows the
model, and the host looks only every some tokens who has finished. The noise of a completion is counted (see
`stateset_lightning.seeding`), so it is the same whatever else is in the batch. Letters: B rows of the running batch, N
completions, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stateset_lightning.errors import NonFiniteError
from stateset_lightning.policy import Group, Policy, end_of_sequence_ids
from stateset_lightning.policy.precision import cast_parameters
from stateset_lightning.policy.probes import check_sampler, sampler_limit
from stateset_lightning.rollout.cpu_decoding import LlamaDecoder, has_llama_layers, is_supported, prepacked_linears
from stateset_lightning.rollout.cuda_decoding import GraphBatch
from stateset_lightning.rollout.engine import OnFinished, RolloutConfig
from stateset_lightning.rollout.probe import decode_plainly, exact_way
from stateset_lightning.rollout.running_batch import RunningBatch, batch_kinds
from stateset_lightning.rollout.sampling import MaskRecorder, StopStrings, check_length, sample_tokens
from stateset_lightning.seeding import uniforms
from stateset_lightning.types import WITHOUT_FLOAT64, FinishReason, Rollout


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
        self.policy: Policy  # of the last `sync`, which comes before `generate`

    def sync(self, policy: Policy) -> None:
        if policy is not getattr(self, "policy", None):
            self.policy = policy
            self.ends = end_of_sequence_ids(policy.model, self.tokenizer)
            self._exact_way = cache(partial(exact_way, policy.model, policy.config.model_name))  # probed once
            self._limits: dict[float, float] = {}  # of the difference to scoring, by temperature, once one matters

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
            check_length(max(map(len, prompts)), sampling.max_new_tokens, limit, f"the model's {limit} positions")
        texts = [""] * len(seeds_N)
        with self._sampling_mode():
            model = self.policy.model
            kinds = batch_kinds(model, max(map(len, prompts)), sampling.decoding)
            kind, is_fast = self._exact_way(kinds, has_llama_layers(model) and is_supported(model))
            stop, noise = StopStrings(sampling.stop, self.tokenizer, self.ends), None if greedy else seeds_N

            def report(n: int, tokens: list[int]) -> None:
                texts[n] = stop.text(tokens)
                if on_finished is not None:
                    on_finished(n, texts[n], len(tokens))

            decoding = _Decoding(model, prompts, num_generations, sampling, noise, stop, report)
            decoder = LlamaDecoder(model) if kind is not None and is_fast else None
            num_rows = min(len(texts), sampling.max_batch_rows)
            with prepacked_linears(model, num_rows) if decoder is None else nullcontext():
                if kind is None:
                    decoding.run_plainly(use_cache=is_fast)
                else:
                    decoding.run(kind(model, sampling.max_new_tokens, decoder))
        self.decoded_rows, self._rollout = decoding.decoded_rows, decoding.rollout(texts)
        return self._rollout

    def check(self, rollout: Rollout | None, temperature: float) -> None:
        """Compares the longest completion with scoring, where no training does so; None: of the last `generate`.

        Raises:
            SamplingError: If their log-probs differ by more than float error.
        """
        rollout = rollout or self._rollout
        n, group = _longest(rollout)
        assert rollout.logprobs_T is not None
        logprobs_T = rollout.logprobs_T.split(rollout.lengths_N.tolist())[n]
        scored_T, _ = self.policy.score_without_gradient([group], temperature)
        self.check_difference(float((scored_T.cpu() - logprobs_T).abs().mean()), temperature)

    def check_difference(self, difference: float, temperature: float) -> None:
        """See `check_sampler`; `difference` is that of this engine's log-probs to those of scoring."""
        model, limit = self.policy.model, self._limits.get(temperature, 0.0)
        dtype = self.dtype or model.dtype
        if not difference <= limit:
            _, group = _longest(self._rollout)
            text = [*group.prompt, *group.completions[0]]
            self._limits[temperature] = limit = sampler_limit(model, dtype, temperature, text)
        check_sampler(difference, limit, dtype)

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
                nullcontext() if self.dtype is None else cast_parameters(model, self.dtype),
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


def _longest(rollout: Rollout) -> tuple[int, Group]:
    """The number of the completion that is longest with its prompt, and both."""
    completions, size = rollout.completions(), rollout.num_generations
    groups = [Group(rollout.prompt_tokens[n // size], [tokens]) for n, tokens in enumerate(completions)]
    return max(enumerate(groups), key=lambda pair: len(pair[1].prompt) + pair[1].num_completion_tokens)


@dataclass(eq=False)
class _Decoding:
    """One call of `generate`: which completions are being decoded, and what has been sampled for them.

    Args:
        model: That samples.
        prompts: Token ids.
        num_generations: Completions per prompt.
        sampling: How to sample.
        seeds_N: Of the noise; None decodes greedily.
        stop: Strings and tokens that end a completion.
        report: Called with the number and the tokens of each completion when it is finished.
    """

    model: PreTrainedModel
    prompts: list[list[int]]
    num_generations: int
    sampling: RolloutConfig
    seeds_N: Sequence[int] | None
    stop: StopStrings
    report: Callable[[int, list[int]], None]

    def __post_init__(self) -> None:
        self.decoded_rows = 0
        # Probabilities and noise need float64.
        self.device = torch.device("cpu") if self.model.device.type in WITHOUT_FLOAT64 else self.model.device
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
        self.masks = MaskRecorder() if self.sampling.keep_sampling_mask and self.seeds_N is not None else None
        self.num_admitted = 0
        # Per row of the batch: which completion it is, on the host and on the device, and how many tokens it has.
        self.numbers: list[int] = []
        self.numbers_B = self.counts_B = torch.empty(0, dtype=torch.long, device=self.device)
        self.count = 0  # of the rows that came last
        # Tokens of each completion that has ended by itself; 0 while it runs. The host learns of it when it looks.
        self.ended_N = torch.zeros(num_completions, dtype=torch.long, device=self.device)

    def rollout(self, texts: list[str]) -> Rollout:
        """All completions, once they are finished."""
        lengths_N = torch.tensor(self.lengths)
        is_token_NT = torch.arange(self.tokens_NT.shape[1]) < lengths_N[:, None]
        tokens_T = self.tokens_NT.cpu()[is_token_NT]
        logprobs_T = self.logprobs_NT.cpu()[is_token_NT]
        sampled_T = torch.ones_like(tokens_T, dtype=torch.bool)
        mask = None if self.masks is None else self.masks.mask(is_token_NT)
        return Rollout(self.prompts, tokens_T, lengths_N, logprobs_T, sampled_T, self.finish_reasons, texts, mask)

    def _enter(self, admitted: range) -> None:
        """Makes these completions the last rows of those that are decoded."""
        self.numbers += admitted
        self.count = 0
        self.numbers_B = torch.tensor(self.numbers, device=self.device)
        self.counts_B = torch.cat([self.counts_B, self.counts_B.new_zeros(len(admitted))])
        if self.seeds_N is not None:
            noise = uniforms([self.seeds_N[n] for n in admitted], self.noise_NT.shape[1])
            self.noise_NT[admitted[0] : admitted[-1] + 1] = torch.from_numpy(noise)

    def _sample(self, logits_BV: Tensor) -> Tensor:
        """The next token of every row, written down with its log-prob; finished rows get one that nobody reads.

        All is changed in place and nothing waits for the device, so that a graph can record it.
        """
        width = self.tokens_NT.shape[1]
        place_B = self.numbers_B * width + self.counts_B.clamp(max=width - 1)
        noise_B = None if self.seeds_N is None else self.noise_NT.view(-1)[place_B]
        keep = None if self.masks is None else partial(self.masks.write, place_B)
        tokens_B, logprobs_B = sample_tokens(logits_BV.to(self.device), noise_B, self.sampling, keep)
        self.tokens_NT.view(-1).scatter_(0, place_B, tokens_B)
        self.logprobs_NT.view(-1).scatter_(0, place_B, logprobs_B)
        self.counts_B += 1
        is_last_B = (tokens_B[:, None] == self.ends).any(-1) | (self.counts_B >= self.sampling.max_new_tokens)
        before_B = self.ended_N[self.numbers_B]
        ends_B = (is_last_B | ~logprobs_B.isfinite()) & (before_B == 0)
        self.ended_N.scatter_(0, self.numbers_B, torch.where(ends_B, self.counts_B, before_B))
        return tokens_B.to(logits_BV.device)

    def _look(self, steps: int = 1) -> None:
        """Reports completions that end within the last `steps` tokens. Waits for the device once, again if any does."""
        self.count += steps
        self.decoded_rows += steps * len(self.numbers)
        if self.masks is not None:
            self.masks.collect()
        lengths = self.ended_N[self.numbers_B].tolist()
        if self.stop.strings:
            self._find_stops(lengths, steps)
        rows = [row for row, n in enumerate(self.numbers) if lengths[row] and self.lengths[n] == 0]
        if not rows:
            return
        numbers, last = [self.numbers[row] for row in rows], [lengths[row] - 1 for row in rows]
        values = self.tokens_NT[numbers].tolist(), self.logprobs_NT[numbers, last].tolist()
        for n, end, tokens, logprob in zip(numbers, last, *values, strict=True):
            if logprob != logprob:
                raise NonFiniteError(
                    "the policy's logits are not finite, so nothing can be sampled: its weights have diverged; go back"
                    " to an earlier checkpoint, with a lower learning rate or trainer.gradient_clip_val"
                )
            self.lengths[n] = end + 1
            if tokens[end] in self.stop.ends:
                self.finish_reasons[n] = FinishReason.STOP
            self.report(n, tokens[: end + 1])

    def _find_stops(self, lengths: list[int], steps: int) -> None:
        """Puts into `lengths` those of the rows that end by a stop string among the last `steps` tokens."""
        width = self.tokens_NT.shape[1]
        columns_BS = self.counts_B[:, None] + torch.arange(-steps, 0, device=self.device)
        tokens_BS = self.tokens_NT.view(-1)[self.numbers_B[:, None] * width + columns_BS.clamp(max=width - 1)]
        for row, (n, tokens) in enumerate(zip(self.numbers, tokens_BS.tolist(), strict=True)):
            tail = self.tails[n]
            for token in tokens if self.lengths[n] == 0 else ():
                tail.append(token)
                if self.stop.found(tail):
                    lengths[row], self.finish_reasons[n] = len(tail), FinishReason.STOP
                if len(tail) == lengths[row]:
                    break

    def _num_running(self) -> int:
        return sum(self.lengths[n] == 0 for n in self.numbers)

    def run(self, batch: RunningBatch | GraphBatch) -> None:
        """Decodes everything by an empty batch, which is filled as room allows."""

        def advance() -> None:
            batch.step(self._sample(batch.logits_BV))

        self._admit(batch)
        while self.numbers:
            if self.masks is not None:
                self.masks.make_room(batch.logits_BV.to(self.device), batch.look_every)
            steps, tokens_B = min(batch.look_every, self.sampling.max_new_tokens - self.count), None
            if batch.look_every > 1:
                batch.repeat(advance, steps)
            else:  # the forward waits for the look, and leaves out who has finished
                tokens_B = self._sample(batch.logits_BV)
            self._look(steps)
            num_running = self._num_running()
            if num_running < batch.compact_below * len(self.numbers):
                kept = self._drop_finished(batch)
                tokens_B = None if tokens_B is None else tokens_B[kept]
            if tokens_B is not None and num_running:
                batch.step(tokens_B)
            self._admit(batch)

    def _admit(self, batch: RunningBatch | GraphBatch) -> None:
        """Lets waiting completions in as room allows: whole groups, so that a prompt is prefilled once, if one fits."""
        size, room = self.num_generations, self.sampling.max_batch_rows - len(self.numbers)
        if size <= self.sampling.max_batch_rows:
            room -= room % size
        admitted = range(len(self.lengths))[self.num_admitted :][:room]
        if not admitted:
            return
        self.num_admitted += len(admitted)
        first, last = admitted[0] // size, admitted[-1] // size
        batch.admit(self.prompts[first : last + 1], [n // size - first for n in admitted])
        self._enter(admitted)

    def _drop_finished(self, batch: RunningBatch | GraphBatch) -> Tensor:
        """Drops finished rows from the batch; returns the former indices of the rows that stay."""
        rows = [row for row, n in enumerate(self.numbers) if self.lengths[n] == 0]
        keep = torch.tensor(rows, dtype=torch.long, device=self.device)
        batch.keep(keep.to(self.model.device))
        self.numbers = [self.numbers[row] for row in rows]
        self.numbers_B, self.counts_B = self.numbers_B[keep], self.counts_B[keep]
        return keep

    def run_plainly(self, use_cache: bool) -> None:
        """Decodes everything by transformers' `generate`, with nothing padded or shared.

        The rows of a batch have one prompt, and stay until the last of them is finished.

        Args:
            use_cache: Whether the model's own cache is exact.
        """
        for p, prompt in enumerate(self.prompts):
            group = range(p * self.num_generations, (p + 1) * self.num_generations)
            for start in range(0, len(group), self.sampling.max_batch_rows):
                self._generate(prompt, group[start : start + self.sampling.max_batch_rows], use_cache)

    def _generate(self, prompt: list[int], numbers: range, use_cache: bool) -> None:
        def only_the_sampled(ids: Tensor, logits_BV: Tensor) -> Tensor:
            tokens_B = self._sample(logits_BV)
            self._look()
            return torch.zeros_like(logits_BV).scatter(-1, tokens_B[:, None], 1.0)

        def all_are_finished(ids: Tensor, scores: Tensor) -> Tensor:
            return torch.full((len(ids),), self._num_running() == 0, device=ids.device)

        self.numbers, self.counts_B = [], self.counts_B[:0]
        self._enter(numbers)
        ids = torch.tensor([prompt] * len(numbers), device=self.model.device)
        hooks = only_the_sampled, all_are_finished
        decode_plainly(self.model, ids, self.sampling.max_new_tokens, use_cache, *hooks)
