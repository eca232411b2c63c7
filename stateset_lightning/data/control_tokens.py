"""Control tokens in a scenario's text: found, so that text never ends a turn, opens another or ends the sequence.

A tokenizer reads `<|im_end|>` as one token wherever it stands, in a user's text as in the template's own.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Conversation = list[dict[str, str]]
"""Turns as chat templates take them."""


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The tokenizer's special tokens, and other added tokens that its chat template writes (whitespace aside, which is
    ordinary text).
    """
    template = str(getattr(tokenizer, "chat_template", None) or "")
    added = tokenizer.added_tokens_decoder.values()
    return [
        t.content for t in added if t.content and (t.special or (not t.content.isspace() and t.content in template))
    ]


def pattern_of(tokens: Sequence[str]) -> re.Pattern[str] | None:
    """Finds any of the tokens in a text; None if there are none."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def encode_as_text(
    tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[str], conversation: Conversation, kwargs: Mapping[str, Any]
) -> list[int]:
    """Prompt tokens of a conversation whose contents hold some of `tokens`: these are spelt out there, but not in the
    template's own text.

    Raises:
        ValueError: If the tokenizer has no other way to write such a token.
    """
    own = copy.copy(tokenizer)
    own.chat_control_tokens = list(tokens)
    ids = own.apply_chat_template(
        conversation, add_generation_prompt=True, sanitize_control_tokens=True, return_dict=False, **kwargs
    )
    return [int(i) for i in ids]
