"""Completions that are written and not sampled: the targets of scenarios, for an algorithm that trains on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from stateset_lightning.errors import DataError
from stateset_lightning.policy.ends import end_of_turn_ids
from stateset_lightning.rollout.engine import OnFinished, RolloutConfig
from stateset_lightning.rollout.sampling import StopStrings
from stateset_lightning.types import FinishReason, PromptBatch, Rollout, Scenario, text_of


@dataclass(frozen=True)
class Targets:
    """Targets as the tokens that a model would have to sample, and the token that ends them.

    Special tokens in a target are plain text, as those in a prompt: no target ends a turn, or opens another.

    Args:
        tokenizer: Makes tokens of a target.
        sampling: How long it may be, and what cuts off its text.
        end: The token that ends it.
        parse_special_tokens: Whether special tokens in it count as such.
    """

    tokenizer: PreTrainedTokenizerBase
    sampling: RolloutConfig
    end: int
    parse_special_tokens: bool = False

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, sampling: RolloutConfig, data: Any) -> "Targets":
        """Those of a data module, or of plain loaders: `data` is None. A prompt's chat template says what ends it."""
        given = getattr(data, "given_arguments", {})
        ends = [] if given.get("use_chat_template") is False else end_of_turn_ids(tokenizer)
        return cls(tokenizer, sampling, [*ends, tokenizer.eos_token_id][0], given.get("parse_special_tokens", False))

    def encode(self, scenarios: Sequence[Scenario], opened: Sequence[str] = ()) -> list[list[int]]:
        """Tokens of each scenario's target; `opened` is what each prompt has of its answer already, which is left out.

        Raises:
            DataError: If targets are missing, empty or longer than `max_new_tokens`, with the first of them.
        """
        texts = [target_text(scenario) for scenario in scenarios]
        missing = [s for s, text in zip(scenarios, texts, strict=True) if not text]
        self._refuse(missing, "have no target: name its column by data.fields.target, or leave these rows out")
        texts = [text.removeprefix(start) for text, start in zip(texts, opened, strict=True)] if opened else texts
        options = {"add_special_tokens": False, "split_special_tokens": not self.parse_special_tokens, "verbose": False}
        tokens = [[*ids, self.end] for ids in self.tokenizer(texts, **options)["input_ids"]]
        long = [s for s, ids in zip(scenarios, tokens, strict=True) if len(ids) > self.sampling.max_new_tokens]
        most = max(map(len, tokens), default=0)
        limit = f"model.rollout.max_new_tokens={self.sampling.max_new_tokens}"
        self._refuse(long, f"have a target of more than {limit} tokens: set it to {most}, or leave these rows out")
        return tokens

    def rollout(self, batch: PromptBatch, on_finished: OnFinished) -> Rollout:
        """One completion per prompt, its target, as an engine would have sampled it."""
        opened = [turns[-1].content if turns[-1].role == "assistant" else "" for turns in batch.conversations]
        completions = self.encode(batch.scenarios, opened)
        stop = StopStrings(self.sampling.stop, self.tokenizer, [self.end])
        texts = [stop.text(tokens) for tokens in completions]
        for n, (text, tokens) in enumerate(zip(texts, completions, strict=True)):
            on_finished(n, text, len(tokens))
        lengths_N = torch.tensor([len(tokens) for tokens in completions])
        tokens_T = torch.tensor([token for tokens in completions for token in tokens])
        sampled_T = torch.ones_like(tokens_T, dtype=torch.bool)
        finish_reasons = [FinishReason.STOP] * len(texts)
        return Rollout(batch.prompt_tokens, tokens_T, lengths_N, None, sampled_T, finish_reasons, texts)

    def _refuse(self, scenarios: Sequence[Scenario], why: str) -> None:
        if scenarios:
            shown = ", ".join(scenario.id for scenario in scenarios[:3])
            raise DataError(f"data.train: {len(scenarios)} scenarios ({shown}) {why}")


def target_text(scenario: Scenario) -> str:
    """What is to be answered: a scenario's target or, of several right ones, the first; "" without one."""
    target = scenario.target
    target = next(iter(target), None) if isinstance(target, list) else target
    text = "" if target is None else text_of(target)
    return text if text.strip() else ""
