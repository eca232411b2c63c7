"""Which tokens end a completion, by what the tokenizer, its chat template and the model's generation config say."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stateset_lightning.workers import rendered


def end_of_sequence_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """All tokens that end a completion: the tokenizer's, those of the model's generation config, the template's."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = [configured] if isinstance(configured, int) else configured or []
    return frozenset([tokenizer.eos_token_id, *listed, *end_of_turn_ids(tokenizer)])


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token by which the chat template ends a turn of the assistant, or opens the next one; empty without one.

    It may be another than the end of a sequence: `<|im_end|>` beside `<|endoftext|>`. Not known where the template
    refuses a plain conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        return []
    asked, said = {"role": "user", "content": "Question"}, {"role": "assistant", "content": "Its-answer"}
    tokens = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    # As the last turn first: gpt-oss ends an earlier one by what also stands between its thoughts and its answer.
    for text in rendered(tokenizer, {"conversation": [asked, said]}, {"conversation": [asked, said, asked]}):
        behind = text.partition(said["content"])[2].lstrip()
        if found := [token for token in tokens if token.strip() and behind.startswith(token)]:
            return [tokens[max(found, key=len)]]
    return []
