"""A trained sequence classifier as a reward, and what all rewards that are models have in common."""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from stateset_lightning.bounds import check_bounds
from stateset_lightning.errors import ConfigError
from stateset_lightning.rewards.interface import BatchReward
from stateset_lightning.rewards.text import completion
from stateset_lightning.types import Turn

if TYPE_CHECKING:
    from stateset_lightning.text_model import TextModel


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
        from stateset_lightning.text_model import TextModel

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
