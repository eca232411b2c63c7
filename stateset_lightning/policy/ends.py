"""Which tokens end a completion, by what the tokenizer, its chat template and the model's generation config say."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def end_of_sequence_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """All tokens that end a completion: the tokenizer's, those of the model's generation config, the template's."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = [configured] if isinstance(configured, int) else configured or []
    return frozenset([tokenizer.eos_token_id, *listed, *end_of_turn_ids(tokenizer)])


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token by which the chat template ends a turn of the assistant, or opens the next one; empty without one.

    It may be another than the end of a sequence: `<|im_end|>` beside `<|endoftext|>`.
    """
    if not getattr(tokenizer, "chat_template", None):
        return []
    asked, said = {"role": "user", "content": "Question"}, {"role": "assistant", "content": "Its-answer"}
    tokens = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    # As the last turn first: gpt-oss ends an earlier one by what also stands between its thoughts and its answer.
    for turns in ([asked, said], [asked, said, asked]):
        try:
            text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        except Exception as error:  # a template is foreign code
            log.info("The chat template refuses a plain conversation, so its end of turn is not known: %s", error)
            return []
        behind = text.partition(said["content"])[2].lstrip()
        if found := [token for token in tokens if token.strip() and behind.startswith(token)]:
            return [tokens[max(found, key=len)]]
    return []
