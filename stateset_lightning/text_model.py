"""A frozen model that reads texts for a reward: a sequence classifier or an encoder, with its tokenizer.

It is no submodule of anything: neither trained, nor saved, nor touched by the Trainer's precision.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from stateset_lightning.data.control_tokens import control_tokens
from stateset_lightning.errors import DataError
from stateset_lightning.policy import context_length, resolve_model_name
from stateset_lightning.policy.loading_errors import check_complete, loading_errors
from stateset_lightning.types import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
        self.tokenizer.chat_control_tokens = control_tokens(self.tokenizer)
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
