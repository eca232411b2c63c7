"""How near the completion is to the target in meaning, by a small encoder."""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
import math
from collections.abc import Mapping, Sequence
from typing import Any

from stateset_lightning.errors import DataError
from stateset_lightning.rewards.reward_model import TextModelReward
from stateset_lightning.rewards.text import completion, target_texts
from stateset_lightning.types import Turn


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
        from stateset_lightning.text_model import mean_pooled

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
