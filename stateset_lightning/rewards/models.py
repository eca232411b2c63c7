"""A frozen model that reads texts for a reward: a sequence classifier or an encoder, with its tokenizer.

It is no submodule of anything: neither trained, nor saved, nor touched by the Trainer's precision.
"""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stateset_lightning.data import special_tokens
from stateset_lightning.errors import ConfigError, DataError, check_bounds
from stateset_lightning.policy import check_complete, context_length, loading_errors, resolve_model_name
from stateset_lightning.rewards.base import BatchReward
from stateset_lightning.rewards.text import completion, target_texts
from stateset_lightning.types import Turn

log = logging.getLogger("stateset_lightning")

Encoded = Mapping[str, list[int]]
"""`input_ids` of a text, and what else its model takes (`attention_mask`, `token_type_ids`)."""


class TextModel:
    """Reads texts in batches of similar length, without gradient.

    Equal texts are read once: rounding that differs with the padding would make different scores of equal completions.

    Args:
        key: What errors call the model, such as `reward_model.model_name`.
        model_name: A folder or a Hugging Face id.
        kind: `classifier` has a head of one or several labels, `encoder` gives hidden states.
        dtype: Precision of weights and computation.
        batch_size: Texts at a time. A model without a pad token reads one at a time (announced).
        max_tokens: Longest text; by default what the model has positions for.
        revision: Branch, tag or commit of a Hugging Face id.

    Raises:
        ConfigError: If the model cannot be loaded or lacks weights.
    """

    def __init__(
        self,
        key: str,
        model_name: str,
        kind: Literal["classifier", "encoder"],
        *,
        dtype: str = "float32",
        batch_size: int = 16,
        max_tokens: int | None = None,
        revision: str | None = None,
    ) -> None:
        self.key = f"{key}={model_name!r}"
        self.model, self.tokenizer = _load(key, model_name, kind, dtype, revision)
        self.batch_size = batch_size
        if self.tokenizer.pad_token_id is None:
            log.info("%s has no pad token: it reads one text at a time", self.key)
            self.batch_size = 1
        elif self.model.config.pad_token_id is None:
            self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.tokenizer.padding_side = "right"
        self.tokenizer.chat_control_tokens = special_tokens(self.tokenizer)
        positions = context_length(self.model)
        table = next(
            (m for name, m in self.model.named_modules() if name.endswith("embeddings.position_embeddings")), None
        )
        padding = getattr(table, "padding_idx", None)
        if positions is not None and padding is not None:  # RoBERTa's begin behind the padding's
            positions -= padding + 1
        limits = [limit for limit in (max_tokens, positions, self.tokenizer.model_max_length) if limit is not None]
        self.max_tokens = min(limits)

    def encode(self, text: str, second: str | None = None) -> Encoded | DataError:
        """A text, or a pair of them; control tokens in it (`[SEP]`, `<|im_end|>`) are ordinary text."""
        return self._checked(self.tokenizer(text, second, split_special_tokens=True, verbose=False))

    def encode_conversation(self, turns: Sequence[Turn]) -> Encoded | DataError:
        """By the chat template; without one the last turn is the second of a pair, behind the others joined by blank
        lines.
        """
        if not self.tokenizer.chat_template:
            return self.encode("\n\n".join(turn["content"] for turn in turns[:-1]), turns[-1]["content"])
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
        try:
            return self._checked(
                self.tokenizer.apply_chat_template(messages, sanitize_control_tokens=True, return_dict=True)
            )
        except Exception as error:  # a template is foreign code
            return DataError(f"{self.key}: its chat template refuses the conversation: {error}")

    def read(
        self, texts: Sequence[Encoded | DataError], device: torch.device | str, head: Callable[[Any, Tensor], Tensor]
    ) -> list[Tensor | DataError]:
        """`head(output, attention_mask)` of each text, float32 on the CPU; errors stay in their places.

        Args:
            texts: From `encode`.
            device: Where to compute; the model is moved there and stays.
            head: Makes of a batch's output one row per text.
        """
        if self.model.device != torch.device(device):
            self.model.to(device)
        unique = {_identity(text): text for text in texts if not isinstance(text, DataError)}
        order = sorted(unique, key=lambda identity: (len(unique[identity]["input_ids"]), identity))
        rows: dict[Any, Tensor] = {}
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            rows |= zip(part, self._forward([unique[identity] for identity in part], head), strict=True)
        return [text if isinstance(text, DataError) else rows[_identity(text)] for text in texts]

    def _forward(self, texts: Sequence[Encoded], head: Callable[[Any, Tensor], Tensor]) -> Tensor:
        device = self.model.device
        batch = self.tokenizer.pad(list(texts), padding=len(texts) > 1, return_tensors="pt").to(device)
        # Called inside the training step: its autocast must not decide the reward's precision.
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            return head(self.model(**batch), batch["attention_mask"]).float().cpu()

    def _checked(self, encoded: Any) -> Encoded | DataError:
        count = len(encoded["input_ids"])
        if 0 < count <= self.max_tokens:
            return dict(encoded)
        return DataError(f"{self.key} reads texts of 1 to {self.max_tokens} tokens; this one has {count}")


def mean_pooled(output: Any, mask: Tensor) -> Tensor:
    """Mean of the last hidden states over the tokens that are no padding, [texts, width]."""
    weights = mask.unsqueeze(-1).float()
    return (output.last_hidden_state.float() * weights).sum(1) / weights.sum(1)


def _identity(text: Encoded) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(values) for _, values in sorted(text.items()))


def _load(
    key: str, model_name: str, kind: str, dtype: str, revision: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    name = resolve_model_name(model_name, key)
    auto = AutoModelForSequenceClassification if kind == "classifier" else AutoModel
    option = f"{key}={model_name!r}"
    with loading_errors(option):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or "main")
        # an encoder's pooler, which is not used, may be missing: it is filled at random
        with torch.random.fork_rng(devices=[]):
            model, report = auto.from_pretrained(
                name,
                dtype=getattr(torch, dtype),
                revision=revision or "main",
                weights_only=True,
                output_loading_info=True,
            )
    check_complete(
        option, (weight for weight in report["missing_keys"] if kind == "classifier" or "pooler" not in weight), kind
    )
    return model.eval().requires_grad_(False), tokenizer


# MERGED: A trained sequence classifier as a reward, and what all rewards that are models have in common.


class TextModelReward(BatchReward):
    """Base of rewards that are a model of transformers. It lies on the policy's device and is neither trained nor
    saved.

    A text that is too long for the model fails its completion. Control tokens that a text spells out (`[SEP]`) are
    ordinary text.

    Args:
        model_name: A folder or a Hugging Face id.
        dtype: Precision of weights and computation, whatever the Trainer's is.
        batch_size: Texts at a time.
        max_tokens: Longest text; by default what the model has positions for.
        revision: Branch, tag or commit of a Hugging Face id.
        **common: `weight` and `name` of every reward.

    Raises:
        ConfigError: If there is no such folder. When the first batch is scored: if the model cannot be loaded, or lacks
            weights.
    """

    kind: Literal["classifier", "encoder"]

    def __init__(
        self,
        model_name: str,
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        batch_size: Annotated[int, Ge(1)] = 32,
        max_tokens: Annotated[int, Ge(1)] | None = None,
        revision: str | None = None,
        **common: Any,
    ) -> None:
        from stateset_lightning.policy import resolve_model_name  # here: worker processes do without torch

        super().__init__(**common)
        self.model_name = model_name
        self.options: dict[str, Any] = {
            "dtype": dtype,
            "batch_size": batch_size,
            "max_tokens": max_tokens,
            "revision": revision,
        }
        check_bounds(self.name, TextModelReward.__init__, self.options)
        resolve_model_name(model_name, f"{self.name}.model_name")

    @cached_property
    def model(self) -> "TextModel":
        """The model, loaded when it is first asked for."""
        from stateset_lightning.rewards.models import TextModel

        return TextModel(f"{self.name}.model_name", self.model_name, self.kind, **self.options)


class RewardModel(TextModelReward):
    """The score that a sequence classifier gives the conversation: one logit, or the probability of a label.

    Args:
        model_name: A folder or a Hugging Face id that `AutoModelForSequenceClassification` loads.
        label: Label (name or number) whose probability is the score. None: the model has one label, and its logit is
            the score.
        reads: `conversation`, by the model's chat template, or as a pair of question and answer where it has none; or
            `completion` alone.
        **options: Those of `TextModelReward`.

    Raises:
        ConfigError: As `TextModelReward`, and if the model has no such label.
    """

    kind = "classifier"

    def __init__(
        self,
        model_name: str,
        *,
        label: int | str | None = None,
        reads: Literal["conversation", "completion"] = "conversation",
        **options: Any,
    ) -> None:
        super().__init__(model_name, **options)
        self.label, self.reads = label, reads

    def compute_rewards(
        self, conversations: Sequence[Sequence[Turn]], contexts: Sequence[Mapping[str, Any]]
    ) -> list[Any]:
        model, label = self.model, self._label
        encode = (
            model.encode_conversation if self.reads == "conversation" else lambda turns: model.encode(completion(turns))
        )
        rows = model.read([encode(turns) for turns in conversations], self.device, lambda output, _: output.logits)
        if label is not None:
            rows = [row if isinstance(row, Exception) else row.softmax(-1)[label] for row in rows]
        return [row if isinstance(row, Exception) else float(row) for row in rows]

    @cached_property
    def _label(self) -> int | None:
        names: dict[int, str] = self.model.model.config.id2label
        if self.label is None and len(names) == 1:
            return None
        found = [number for number, name in names.items() if self.label in (number, name)]
        if not found:
            raise ConfigError(
                f"{self.name}.label={self.label!r} must be one of the model's: {', '.join(names.values())}"
            )
        return found[0]


# MERGED: How near the completion is to the target in meaning, by a small encoder.


class EmbeddingSimilarity(TextModelReward):
    """Cosine, -1 to 1, between the embeddings of the completion and the scenario's `target`; the best of several
    targets.

    An embedding is the mean of the encoder's last hidden states. A completion without text scores 0. Similar is not
    right: `5 pm` and `6 pm` are neighbours. Give it beside a reward that checks facts.

    Args:
        model_name: A folder or a Hugging Face id that `AutoModel` loads: `sentence-transformers/all-MiniLM-L6-v2`, say.
        prefix: What stands before every text (`query: ` for E5).
        **options: Those of `TextModelReward`.

    Raises:
        ConfigError: As `TextModelReward`.
    """

    kind = "encoder"

    def __init__(self, model_name: str, *, prefix: str = "", **options: Any) -> None:
        super().__init__(model_name, **options)
        self.prefix = prefix

    def compute_rewards(
        self, conversations: Sequence[Sequence[Turn]], contexts: Sequence[Mapping[str, Any]]
    ) -> list[Any]:
        answers = [completion(turns) for turns in conversations]
        targets = [self._targets(context) for context in contexts]
        embeddings = self._embeddings(
            {*answers, *(text for texts in targets if isinstance(texts, list) for text in texts)}
        )
        return [self._similarity(answer, texts, embeddings) for answer, texts in zip(answers, targets, strict=True)]

    def _targets(self, context: Mapping[str, Any]) -> list[str] | DataError:
        try:
            texts = target_texts(context, self.name)
        except DataError as error:
            return error
        return (
            texts
            if all(map(str.strip, texts))
            else DataError(f"target={texts!r} of scenario {context.get('id')!r} is empty")
        )

    def _embeddings(self, texts: set[str]) -> dict[str, Any]:
        """Text -> unit vector, or why there is none."""
        from stateset_lightning.rewards.models import mean_pooled

        some = sorted(text for text in texts if text.strip())
        rows = self.model.read([self.model.encode(self.prefix + text) for text in some], self.device, mean_pooled)
        return {
            text: row if isinstance(row, DataError) else row / row.norm() for text, row in zip(some, rows, strict=True)
        }

    def _similarity(
        self, answer: str, targets: list[str] | DataError, embeddings: Mapping[str, Any]
    ) -> float | DataError:
        if isinstance(targets, DataError):
            return targets
        if not answer.strip():
            return 0.0
        mine, *theirs = [embeddings[text] for text in (answer, *targets)]
        if error := next((item for item in (mine, *theirs) if isinstance(item, DataError)), None):
            return error
        similarities = [float(mine @ other) for other in theirs]
        if any(map(math.isnan, similarities)):  # of which min and max would make a score
            return math.nan
        return min(1.0, max(similarities))  # rounding may go beyond
