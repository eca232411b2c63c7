"""The in-process engine: samples from the policy itself, in the same process.

A prompt is prefilled once and its cache repeated for its group; rows that finish leave the batch; keys and values go into
preallocated buffers. The noise of a completion is counted (see `stateset_lightning.seeding`), so it is the same whatever else is in
the batch. Letters: B rows of the running batch, N completions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stateset_lightning.errors import ConfigError, NonFiniteError
from stateset_lightning.policy.loading import context_length, end_of_sequence_ids
from stateset_lightning.rollout.cache import make_cache, select_rows
from stateset_lightning.rollout.config import RolloutConfig
from stateset_lightning.rollout.engine import OnFinished
from stateset_lightning.rollout.fast_linear import fast_linears
from stateset_lightning.rollout.sampling import sample_tokens
from stateset_lightning.rollout.stopping import StopStrings
from stateset_lightning.seeding import uniforms
from stateset_lightning.types import FinishReason, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.cache_utils import DynamicCache

    from stateset_lightning.policy import Policy

COMPACT_BELOW = 0.75
"""Finished rows leave the batch when fewer than this share of its rows is still running: compaction copies the cache."""


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
        self.decoded_rows = 0  # rows x steps of the last `generate`, for the account of work done

    def sync(self, policy: Policy) -> None:
        self._policy = policy

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
        self.decoded_rows = 0

        def finish(n: int) -> None:
            texts[n] = stop.cut(self._text(completions[n].tokens))
            if on_finished is not None:
                on_finished(n, texts[n], len(completions[n].tokens))

        with self._sampling_mode(), fast_linears(self.policy.model, min(len(completions), sampling.max_batch_rows)):
            for start in range(0, len(completions), sampling.max_batch_rows):
                rows = list(range(start, min(start + sampling.max_batch_rows, len(completions))))
                noise_BT = None if greedy else uniforms([seeds_N[n] for n in rows], sampling.max_new_tokens)
                batch = _Batch(self, prompts, rows, num_generations, sampling, None if noise_BT is None else torch.from_numpy(noise_BT))
                for n in batch.decode(completions, stop):
                    finish(n)
                self.decoded_rows += batch.decoded_rows
        return Rollout(
            prompt_tokens=prompts,
            completion_tokens_T=torch.tensor([token for c in completions for token in c.tokens], dtype=torch.long),
            lengths_N=torch.tensor([len(c.tokens) for c in completions]),
            logprobs_T=torch.tensor([logprob for c in completions for logprob in c.logprobs], dtype=torch.float32),
            finish_reasons=[c.finish_reason for c in completions],
            texts=texts,
        )

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
                f"a prompt of {longest} tokens and model.rollout.max_new_tokens={max_new_tokens} exceed the model's {limit} positions: "
                f"set data.max_prompt_tokens to at most {max(limit - max_new_tokens, 0)}, or lower max_new_tokens"
            )

    @contextmanager
    def _sampling_mode(self) -> Iterator[None]:
        """Evaluation mode (no dropout; a cache, which gradient checkpointing forbids in training mode), weights cast once."""
        model = self.policy.model
        training = {module: module.training for module in model.modules()}
        weights = {parameter: parameter.data for parameter in model.parameters()}
        model.eval()
        try:
            if self.dtype is not None:
                for parameter, data in weights.items():
                    parameter.data = data.to(self.dtype)
            # Under autocast every step would cast every weight again.
            with torch.autocast(model.device.type, enabled=False):
                yield
        finally:
            for parameter, data in weights.items():
                parameter.data = data
            for module, was_training in training.items():
                module.training = was_training


class _Batch:
    """Rows that are decoded together, left-padded so that all write their next token at the same place of the cache."""

    def __init__(
        self,
        engine: InProcessEngine,
        prompts: list[list[int]],
        rows: list[int],
        num_generations: int,
        sampling: RolloutConfig,
        noise_BT: Tensor | None,
    ) -> None:
        self.model = engine.policy.model
        self.device = self.model.device
        self.rows = rows
        self.sampling = sampling
        self.noise_TB = None if noise_BT is None else noise_BT.t().contiguous().to(self.device)
        self.eos = torch.tensor(sorted(end_of_sequence_ids(self.model, engine.tokenizer)), device=self.device)
        first = rows[0] // num_generations
        self.prompts = prompts[first : rows[-1] // num_generations + 1]
        self.prompt_of_row = torch.tensor([n // num_generations - first for n in rows], device=self.device)
        self.width = max(map(len, self.prompts))
        self.padded = any(len(prompt) != self.width for prompt in self.prompts)
        self.decoded_rows = 0

    def decode(self, completions: list[_Completion], stop: StopStrings) -> Iterator[int]:
        """Decodes all rows, fills in their completions, and yields each completion's number when it is finished."""
        cache, logits_BV = self._prefill()
        select_rows(cache, self.prompt_of_row)
        logits_BV = logits_BV[self.prompt_of_row]
        lengths_B = torch.tensor([len(prompt) for prompt in self.prompts], device=self.device)[self.prompt_of_row]
        mask_BC = self._mask(lengths_B)
        alive = self.rows
        running = torch.arange(len(alive), device=self.device)  # rows of the batch that the columns of the noise belong to
        done: set[int] = set()
        for step in range(self.sampling.max_new_tokens):
            noise_B = None if self.noise_TB is None else self.noise_TB[step, running]
            tokens_B, logprobs_B = sample_tokens(logits_BV, noise_B, self.sampling)
            ended = torch.isin(tokens_B, self.eos).tolist()
            self.decoded_rows += len(alive)
            for n, token, logprob, end in zip(alive, tokens_B.tolist(), logprobs_B.tolist(), ended, strict=True):
                if n in done:
                    continue
                if logprob != logprob:
                    raise NonFiniteError(
                        "the policy's logits are not finite, so nothing can be sampled: its weights have diverged; go back to an earlier "
                        "checkpoint, with a lower learning rate or trainer.gradient_clip_val"
                    )
                completion = completions[n]
                completion.tokens.append(token)
                completion.logprobs.append(logprob)
                if end or stop.found(completion.tokens):
                    completion.finish_reason = FinishReason.STOP
                    done.add(n)
                    yield n
                elif step + 1 == self.sampling.max_new_tokens:
                    done.add(n)
                    yield n
            num_running = sum(n not in done for n in alive)
            if num_running == 0:
                return
            if num_running < COMPACT_BELOW * len(alive):
                keep = torch.tensor([i for i, n in enumerate(alive) if n not in done], device=self.device)
                select_rows(cache, keep)
                alive = [n for n in alive if n not in done]
                running, tokens_B, lengths_B = running[keep], tokens_B[keep], lengths_B[keep]
                mask_BC = None if mask_BC is None else mask_BC[keep]
            logits_BV = self._step(cache, tokens_B, lengths_B + step, mask_BC, self.width + step + 1)

    def _prefill(self) -> tuple[DynamicCache, Tensor]:
        """All prompts of the batch, each once; the cache and the logits that predict their first token."""
        cache = make_cache(self.model, self.width + self.sampling.max_new_tokens)
        ids = torch.tensor([[0] * (self.width - len(prompt)) + prompt for prompt in self.prompts], device=self.device)
        lengths = torch.tensor([len(prompt) for prompt in self.prompts], device=self.device)
        # Positions count from the first real token; models with learned positions need them.
        positions = (torch.arange(self.width, device=self.device)[None] - (self.width - lengths)[:, None]).clamp(min=0)
        mask = self._mask(lengths)
        output = self.model(
            input_ids=ids,
            attention_mask=None if mask is None else mask[:, : self.width],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return cache, output.logits[:, -1]

    def _step(self, cache: DynamicCache, tokens_B: Tensor, positions_B: Tensor, mask_BC: Tensor | None, length: int) -> Tensor:
        mask = None if mask_BC is None else mask_BC[:, :length]
        if mask is not None and self._takes_ready_masks:
            mask = mask[:, None, None, :]
        output = self.model(
            input_ids=tokens_B[:, None],
            attention_mask=mask,
            position_ids=positions_B[:, None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    @property
    def _takes_ready_masks(self) -> bool:
        """Whether a boolean mask of four dimensions serves every layer: not for windows, nor for additive masks."""
        config = self.model.config
        windowed = getattr(config, "sliding_window", None) or "sliding_attention" in (getattr(config, "layer_types", None) or [])
        return config._attn_implementation in ("sdpa", "stateset_prefix") and not windowed

    def _mask(self, lengths_B: Tensor) -> Tensor | None:
        """Bool [B, C]: false on the padding left of a prompt. None when nothing is padded."""
        if not self.padded:
            return None
        columns = torch.arange(self.width + self.sampling.max_new_tokens, device=self.device)
        return columns[None] >= (self.width - lengths_B)[:, None]
