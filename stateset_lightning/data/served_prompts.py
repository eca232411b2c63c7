"""Prompt tokens of a large split, made when they are served."""

import hashlib
from collections.abc import Sequence
from typing import Any

from stateset_lightning.data import content
from stateset_lightning.data.prompts import EncodedPrompts, PromptEncoder
from stateset_lightning.data.ragged import RaggedTokens
from stateset_lightning.data.served import ServedScenarios, spare_texts
from stateset_lightning.errors import ConfigError
from stateset_lightning.types import Scenario


class ServedPrompts(Sequence[list[int]]):
    """Prompt tokens of such scenarios, each made when it is asked for.

    Args:
        scenarios: Of a split.
        encoder: Makes the prompts.
        key: Of the split, for messages.

    Raises:
        ConfigError: If overlong prompts are to be dropped: only the encoded prompt shows which.
        DataError: As the encoder's `encode`, for the first `SAMPLE`.
    """

    def __init__(self, scenarios: ServedScenarios, encoder: PromptEncoder, key: str) -> None:
        if encoder.overlong_prompts == "drop":
            raise ConfigError(
                f"data.overlong_prompts=drop needs all prompts of {key} at the start, and its {len(scenarios):,} rows"
                " are encoded when they are served; set it to truncate_left, or leave the long rows out of the file"
            )
        self._scenarios, self._encoder, self._key = scenarios, encoder, key
        self.sample = encoder.encode(scenarios[: content.SAMPLE], key)
        self.known: RaggedTokens = self.sample.tokens
        self.lengths = self.known.lengths

    @classmethod
    def encoded(cls, encoder: PromptEncoder, scenarios: Sequence[Scenario], key: str) -> EncodedPrompts:
        """In place of the encoder's `encode`."""
        assert isinstance(scenarios, ServedScenarios)
        prompts = cls(scenarios, encoder, key)
        return EncodedPrompts(prompts, range(len(scenarios)), opened=prompts.sample.opened)

    @property
    def longest(self) -> int:
        """The limit that holds for all; without one, of those that are known."""
        return self._encoder.max_prompt_tokens or self.known.longest

    def __len__(self) -> int:
        return len(self._scenarios)

    def __getitem__(self, index: Any) -> Any:
        return self.encode([self._scenarios[index]]).tokens[0]

    def encode(self, scenarios: Sequence[Scenario]) -> EncodedPrompts:
        """The prompts of some of the scenarios."""
        spare_texts(scenarios)
        return self._encoder.encode(scenarios, self._key, is_tried=True)

    def digest(self) -> str:
        """A hash: the same for the same rows and the same first prompts."""
        return hashlib.sha256((self._scenarios.digest + self.known.digest()).encode()).hexdigest()[:16]
