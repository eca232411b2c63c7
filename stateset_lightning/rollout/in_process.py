"""The in-process engine: samples from the policy itself, in the process that trains it.

A prompt is prefilled once and its cache repeated for its group; rows that finish leave the batch, and waiting prompts
take their place; keys and values go into preallocated buffers. On a GPU a step is a CUDA graph where that knows the
model, and the host looks only every some tokens who has finished. The noise of a completion is counted (see
`stateset_lightning.seeding`), so it is the same whatever else is in the batch. Letters: B rows of the running batch, N
completions, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial

import torch
from transformers import PreTrainedTokenizerBase

from stateset_lightning.errors import tell_once
from stateset_lightning.policy import Group, Policy, end_of_sequence_ids
from stateset_lightning.policy.precision import cast_parameters
from stateset_lightning.policy.probes import check_sampler, sampler_limit
from stateset_lightning.rollout.cpu_decoding import LlamaDecoder, has_llama_layers, is_supported, prepacked_linears
from stateset_lightning.rollout.decoding import Decoding, KeptRows
from stateset_lightning.rollout.engine import OnFinished, RolloutConfig, RolloutEngine
from stateset_lightning.rollout.kept import Kept
from stateset_lightning.rollout.probe import Way, exact_way
from stateset_lightning.rollout.running_batch import batch_kinds
from stateset_lightning.rollout.sampling import StopStrings, check_length
from stateset_lightning.types import Rollout


class InProcessEngine(RolloutEngine):
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
        self._kept: list[KeptRows] | None = None  # within `keeping_caches`

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
            way, before = self._taken(prompts) if num_generations == 1 else (None, [])
            kind, is_fast = way = way or self._exact_way(kinds, has_llama_layers(model) and is_supported(model))
            stop, noise = StopStrings(sampling.stop, self.tokenizer, self.ends), None if greedy else seeds_N

            def report(n: int, tokens: list[int]) -> None:
                texts[n] = stop.text(tokens)
                if on_finished is not None:
                    on_finished(n, texts[n], len(tokens))

            kept = self._new_rows(way, len(texts), sampling.max_batch_rows)
            decoding = Decoding(model, prompts, num_generations, sampling, noise, stop, report, kept)
            decoder = LlamaDecoder(model) if kind is not None and is_fast else None
            num_rows = min(len(texts), sampling.max_batch_rows)
            with prepacked_linears(model, num_rows) if decoder is None else nullcontext():
                if kind is None:
                    decoding.run_plainly(use_cache=is_fast)
                else:
                    decoding.run(kind(model, sampling.max_new_tokens, decoder), before)
        self.decoded_rows, self._rollout = decoding.decoded_rows, decoding.rollout(texts)
        return self._rollout

    @contextmanager
    def keeping_caches(self) -> Iterator[None]:
        """Inside, a prompt that goes on from a completion of before is computed from there on, if all in the call do.

        What is kept for it takes as much memory as `max_batch_rows` rows, and is let go of at the end; where more
        completions are sampled at a time, nothing is kept. The weights must not change meanwhile.
        """
        self._kept = []
        try:
            yield
        finally:
            self._kept = None

    def _new_rows(self, way: Way, count: int, most: int) -> KeptRows | None:
        """Where so many completions are kept; None if they are not, or would be more than `most` with all others."""
        if self._kept is None:
            return None
        if count + sum(len(others.rows) for others in self._kept) > most:
            rows = f"model.rollout.max_batch_rows={most}"
            tell_once(f"{rows} is less than the conversations at a time, so each turn computes its own anew.")
            return None
        self._kept.append(KeptRows(way))
        return self._kept[-1]

    def _taken(self, prompts: list[list[int]]) -> tuple[Way | None, list[Kept]]:
        """What these prompts go on from, which is kept no longer, and how that was decoded; or nothing."""
        all_rows = self._kept or []
        for kept in all_rows:
            if before := kept.before(prompts):
                all_rows.remove(kept)
                return kept.way, before
        return None, []

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
