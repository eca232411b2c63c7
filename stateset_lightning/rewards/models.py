"""Rewards that are a frozen model of transformers: a sequence classifier, or an encoder that compares meanings.

The model is no submodule of the policy's module: neither trained, nor saved, nor touched by the Trainer's precision.
"""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
# Torch, transformers and the policy are imported where they are used: worker processes import this file without them.
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from stateset_lightning.errors import ConfigError, DataError, log, told_as
from stateset_lightning.rewards.base import BatchReward, Turns, completion, options, target_texts
from stateset_lightning.workers import limited

if TYPE_CHECKING:
    from torch import Tensor

# `input_ids` of a text, and what else its model takes (`attention_mask`, `token_type_ids`).
Encoded = Mapping[str, list[int]]


@options
class TextModelReward(BatchReward):
    """Base class of rewards that are a model of transformers.

    The model is loaded when the first batch is scored, and stays on the policy's device. Texts are read in batches of
    similar length, without gradient. Equal texts are read once: rounding differs with the padding, so that equal
    completions would get different scores.

    A text that is too long for the model fails its completion. Special tokens that a text spells out (`[SEP]`,
    `<|im_end|>`) are ordinary text.

    Args:
        model_name: A folder or a Hugging Face id.
        dtype: Precision of weights and computation, whatever the Trainer's is.
        batch_size: Texts at a time. A model without a pad token reads one at a time (announced).
        max_tokens: Longest text; by default what the model has positions for.
        revision: Branch, tag or commit of a Hugging Face id.
        **common: `weight` and `name` of every reward.

    Raises:
        ConfigError: If there is no such folder. When the first batch is scored: if the model cannot be loaded, or lacks
            weights.
    """

    # With a head of one or several labels, or giving hidden states.
    kind: ClassVar[Literal["classifier", "encoder"]]

    model_name: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_size: Annotated[int, Ge(1)] = 32
    max_tokens: Annotated[int, Ge(1)] | None = None
    revision: str | None = None

    def _set_up(self) -> None:
        from stateset_lightning.policy.loading import resolve_model_name

        self.path = resolve_model_name(self.model_name, f"{self.name}.model_name")
        self.key = f"{self.name}.model_name={self.model_name!r}"
        self.revision = self.revision or "main"

    @cached_property
    def model(self) -> Any:
        """The model, in evaluation mode; loaded when it is first asked for."""
        import torch
        from transformers import AutoModel, AutoModelForSequenceClassification

        from stateset_lightning.policy.loading import check_complete, check_vocabulary, loading_errors

        auto = AutoModelForSequenceClassification if self.kind == "classifier" else AutoModel
        options = {"dtype": getattr(torch, self.dtype), "revision": self.revision, "weights_only": True}
        # An encoder's pooler, which is not used, may be missing: it is initialised at random.
        with loading_errors(self.key), torch.random.fork_rng(devices=[]):
            model, report = auto.from_pretrained(self.path, **options, output_loading_info=True)
        missing = [name for name in report["missing_keys"] if self.kind == "classifier" or "pooler" not in name]
        check_complete(self.key, missing, self.kind)
        check_vocabulary(self.key, model, self.tokenizer)
        config = model.config.get_text_config()  # which is where transformers looks
        if config.pad_token_id is None:
            config.pad_token_id = self.tokenizer.pad_token_id
        return model.eval().requires_grad_(False)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        from transformers import AutoTokenizer

        from stateset_lightning.data.prompts import special_tokens
        from stateset_lightning.policy.loading import loading_errors

        with loading_errors(self.key):
            tokenizer = AutoTokenizer.from_pretrained(self.path, revision=self.revision)
        if tokenizer.pad_token_id is None:
            log.info("%s has no pad token: it reads one text at a time", self.key)
        tokenizer.padding_side = "right"
        tokenizer.chat_control_tokens = special_tokens(tokenizer)
        return tokenizer

    @cached_property
    def limit(self) -> int:
        """Tokens that the model can read."""
        from stateset_lightning.policy import context_length

        positions = context_length(self.model)
        tables = [m for name, m in self.model.named_modules() if name.endswith("embeddings.position_embeddings")]
        if positions is not None and tables and (padding := getattr(tables[0], "padding_idx", None)) is not None:
            positions -= padding + 1  # RoBERTa's positions begin after the padding's
        limits = [self.max_tokens, positions, self.tokenizer.model_max_length]
        return min(limit for limit in limits if limit is not None)

    def encode(self, text: str, second: str | None = None) -> Encoded:
        """A text, or a pair of texts, as tokens.

        Raises:
            DataError: If it is empty, or longer than the model can read.
        """
        return self._checked(self.tokenizer(text, second, split_special_tokens=True, verbose=False))

    def encode_conversations(self, conversations: Sequence[Turns]) -> list[Encoded | DataError]:
        """Conversations by the chat template, or why one has no tokens: it is too long, or the template refuses it.

        Without a template the last turn is the second of a pair; the first are the others, joined by blank lines.

        Raises:
            DataError: If the template takes too much time or memory.
        """
        if not self.tokenizer.chat_template:
            asked = ["\n\n".join(turn["content"] for turn in turns[:-1]) for turns in conversations]
            return [_attempt(self.encode, *pair) for pair in zip(asked, map(completion, conversations), strict=True)]
        _ = self.limit  # asks the model, which is not to be loaded in the fork
        texts = (_attempt(self._by_template, turns) for turns in conversations)
        return list(limited(texts, f"the chat template of {self.key}"))

    def _by_template(self, turns: Turns) -> Encoded:
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
        with told_as(DataError, f"{self.key}: its chat template refuses the conversation: "):  # it is foreign code
            encoded = self.tokenizer.apply_chat_template(messages, sanitize_control_tokens=True, return_dict=True)
        return self._checked(encoded)

    def read(self, texts: Sequence[Encoded | DataError], head: Callable[[Any, "Tensor"], "Tensor"]) -> list[Any]:
        """`head(output, attention_mask)` of each text, float32 on the CPU; errors stay in their places.

        Args:
            texts: Results of `encode`, or its errors.
            head: Makes one row per text of a batch's output.
        """
        import torch

        if self.model.device != torch.device(self.device):
            self.model.to(self.device)
        size = 1 if self.tokenizer.pad_token_id is None else self.batch_size
        unique = {_identity(text): text for text in texts if not isinstance(text, DataError)}
        order = sorted(unique, key=lambda identity: (len(unique[identity]["input_ids"]), identity))
        rows: dict[Any, Tensor] = {}
        for start in range(0, len(order), size):
            keys = order[start : start + size]
            batch = self.tokenizer.pad([unique[key] for key in keys], padding=len(keys) > 1, return_tensors="pt")
            batch = batch.to(self.model.device)
            # Called inside the training step: its autocast must not decide the reward's precision.
            with torch.inference_mode(), torch.autocast(self.model.device.type, enabled=False):
                output = head(self.model(**batch), batch["attention_mask"]).float().cpu()
            rows |= zip(keys, output, strict=True)
        return [_attempt(lambda text: rows[_identity(text)], text) for text in texts]

    def _checked(self, encoded: Any) -> Encoded:
        count = len(encoded["input_ids"])
        if 0 < count <= self.limit:
            return dict(encoded)
        raise DataError(f"{self.key} reads texts of 1 to {self.limit} tokens; this one has {count}")


@options
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

    label: int | str | None = None
    reads: Literal["conversation", "completion"] = "conversation"

    def compute_rewards(self, conversations: Sequence[Turns], contexts: Sequence[Mapping[str, Any]]) -> list[Any]:
        names: dict[int, str] = self.model.config.id2label
        found = [number for number, name in names.items() if self.label in (number, name)]
        is_logit = self.label is None and len(names) == 1
        if not (found or is_logit):
            known = ", ".join(names.values())
            raise ConfigError(f"{self.name}.label={self.label!r} must be one of the model's: {known}")
        answers, is_alone = map(completion, conversations), self.reads == "completion"
        texts = [_attempt(self.encode, a) for a in answers] if is_alone else self.encode_conversations(conversations)
        rows = self.read(texts, lambda output, _: output.logits)
        return [_attempt(lambda row: float(row if is_logit else row.softmax(-1)[found[0]]), row) for row in rows]


@options
class EmbeddingSimilarity(TextModelReward):
    """Cosine similarity, -1 to 1, between the completion and the scenario's `target`; the best of several targets.

    The embedding of a text is the mean of the encoder's last hidden states. A completion without text scores 0. Similar
    is not right: `5 pm` and `6 pm` are neighbours. Give it beside a reward that checks facts.

    Args:
        model_name: A folder or a Hugging Face id that `AutoModel` loads: `sentence-transformers/all-MiniLM-L6-v2`, say.
        prefix: What stands before every text (`query: ` for E5).
        **options: Those of `TextModelReward`.

    Raises:
        ConfigError: As `TextModelReward`.
    """

    kind = "encoder"
    needs = ("target",)

    prefix: str = ""

    def compute_rewards(self, conversations: Sequence[Turns], contexts: Sequence[Mapping[str, Any]]) -> list[Any]:
        answers = [completion(turns) for turns in conversations]
        targets = [_attempt(target_texts, context, self.name, str.strip) for context in contexts]
        texts = {text for found in targets if isinstance(found, list) for text in found}
        vectors = self._embeddings(texts.union(answers))
        return [_attempt(self._similarity, *pair, vectors) for pair in zip(targets, answers, strict=True)]

    def _embeddings(self, texts: set[str]) -> dict[str, Any]:
        """Text -> unit vector, or why there is none."""
        some = sorted(text for text in texts if text.strip())
        rows = self.read([_attempt(self.encode, self.prefix + text) for text in some], _mean_pooled)
        return {text: _attempt(lambda row: row / row.norm(), row) for text, row in zip(some, rows, strict=True)}

    def _similarity(self, targets: list[str], answer: str, embeddings: Mapping[str, Any]) -> float:
        if not answer.strip():
            return 0.0
        vectors = [embeddings[text] for text in (answer, *targets)]
        if errors := [vector for vector in vectors if isinstance(vector, DataError)]:
            raise errors[0]
        similarities = [float(vectors[0] @ other) for other in vectors[1:]]
        # `max` might pass over what is no number; rounding may go beyond 1.
        return math.nan if any(map(math.isnan, similarities)) else min(1.0, max(similarities))


def _attempt(function: Callable[..., Any], first: Any, *others: Any) -> Any:
    """What a function returns, or the DataError that it raises: the failure of one completion of a batch.

    One that stands already in the place of what it is called with is returned.
    """
    try:
        return first if isinstance(first, DataError) else function(first, *others)
    except DataError as error:
        return error


def _mean_pooled(output: Any, mask: "Tensor") -> "Tensor":
    """Mean of the last hidden states over the tokens that are no padding, [texts, width]."""
    weights = mask.unsqueeze(-1).float()
    return (output.last_hidden_state.float() * weights).sum(1) / weights.sum(1)


def _identity(text: Encoded) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(values) for _, values in sorted(text.items()))
