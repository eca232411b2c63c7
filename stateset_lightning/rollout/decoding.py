"""One call of an engine in this process: which completions are being decoded, and what has been sampled for them.

Letters: B rows of the running batch, N completions, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stateset_lightning.errors import NonFiniteError
from stateset_lightning.rollout.cuda_decoding import GraphBatch
from stateset_lightning.rollout.engine import RolloutConfig
from stateset_lightning.rollout.kept import Kept
from stateset_lightning.rollout.probe import Way, decode_plainly
from stateset_lightning.rollout.running_batch import RunningBatch
from stateset_lightning.rollout.sampling import MaskRecorder, StopStrings, sample_tokens
from stateset_lightning.seeding import uniforms
from stateset_lightning.types import WITHOUT_FLOAT64, FinishReason, Rollout


@dataclass(frozen=True)
class KeptRows:
    """Those of one `generate`.

    Args:
        way: How they were decoded, and what can go on from them.
        rows: By their tokens, the prompt's included.
    """

    way: Way
    rows: dict[tuple[int, ...], Kept] = field(default_factory=dict)

    def before(self, prompts: Sequence[Sequence[int]]) -> list[Kept]:
        """The row that each prompt goes on from, by at least one token; empty if one goes on from none."""
        lengths = sorted({len(tokens) for tokens in self.rows}, reverse=True)
        starts_of = ((tuple(prompt[:n]) for n in lengths if n < len(prompt)) for prompt in prompts)
        longest = (next((self.rows[start] for start in starts if start in self.rows), None) for starts in starts_of)
        found = [row for row in longest if row is not None]
        return found if len(found) == len(prompts) else []


@dataclass(eq=False)
class Decoding:
    """One call of `generate`: which completions are being decoded, and what has been sampled for them.

    Args:
        model: That samples.
        prompts: Token ids.
        num_generations: Completions per prompt.
        sampling: How to sample.
        seeds_N: Of the noise; None decodes greedily.
        stop: Strings and tokens that end a completion.
        report: Called with the number and the tokens of each completion when it is finished.
        kept: What is computed of completions that could go on is written down here; None: nothing is.
    """

    model: PreTrainedModel
    prompts: list[list[int]]
    num_generations: int
    sampling: RolloutConfig
    seeds_N: Sequence[int] | None
    stop: StopStrings
    report: Callable[[int, list[int]], None]
    kept: KeptRows | None = None

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
        self.num_admitted += len(admitted)
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

    def _look(self, steps: int = 1, batch: RunningBatch | GraphBatch | None = None) -> None:
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
        is_over = len(rows) == self._num_running()  # what the batch has is not needed for anything else
        numbers, last = [self.numbers[row] for row in rows], [lengths[row] - 1 for row in rows]
        values = self.tokens_NT[numbers].tolist(), self.logprobs_NT[numbers, last].tolist()
        for row, n, end, tokens, logprob in zip(rows, numbers, last, *values, strict=True):
            if logprob != logprob:
                remedy = "go back to an earlier checkpoint, with a lower learning rate or trainer.gradient_clip_val"
                raise NonFiniteError(f"the policy's logits are not finite: its weights have diverged; {remedy}")
            self.lengths[n] = end + 1
            if tokens[end] in self.stop.ends:
                self.finish_reasons[n] = FinishReason.STOP
            goes_on = self.finish_reasons[n] == FinishReason.STOP
            if goes_on and self.kept is not None and batch is not None and batch.can_keep:
                known = (*self.prompts[n // self.num_generations], *tokens[:end])  # nobody has computed the last one
                kept = batch.kept(row, len(known))
                self.kept.rows[known] = kept if is_over else kept.copied()
            self.report(n, tokens[: end + 1])

    def _find_stops(self, lengths: list[int], steps: int) -> None:
        """Puts into `lengths` those of the rows that end by a stop string among the last `steps` tokens."""
        width = self.tokens_NT.shape[1]
        columns_BS = self.counts_B[:, None] + torch.arange(-steps, 0, device=self.device)
        tokens_BS = self.tokens_NT.view(-1)[self.numbers_B[:, None] * width + columns_BS.clamp(0, width - 1)]
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

    def run(self, batch: RunningBatch | GraphBatch, before: list[Kept] | None = None) -> None:
        """Decodes everything by an empty batch: all at once, from what was kept `before`, or filled as room allows."""

        def advance() -> None:
            batch.step(self._sample(batch.logits_BV))

        if before:
            batch.resume(before, self.prompts)
            before.clear()  # it is in the batch now
            self._enter(range(len(self.prompts)))
        self._admit(batch)
        while self.numbers:
            if self.masks is not None:
                self.masks.make_room(batch.logits_BV.to(self.device), batch.look_every)
            steps, tokens_B = min(batch.look_every, self.sampling.max_new_tokens - self.count), None
            if batch.look_every > 1:
                batch.repeat(advance, steps)
            else:  # the forward waits for the look, and leaves out who has finished
                tokens_B = self._sample(batch.logits_BV)
            self._look(steps, batch)
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
