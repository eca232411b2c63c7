"""A small language model from nothing, taught on a few labelled messages: what GRPO starts from.

A byte-level BPE tokenizer and a Qwen2 of two million random parameters, then next-token prediction on the intents. It
stands for the model that a task starts with: with one from the hub this file is not needed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from messages import Message
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(
    messages: Sequence[Message], intents: Sequence[str], vocabulary: int = 2048
) -> PreTrainedTokenizerFast:
    """Words and their parts from the messages; an intent is read word by word (`card`, `_arrival`)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[ _]?\p{L}+| ?\d| ?[^\s\p{L}\d]|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [message.text for message in messages] + list(intents) * 20,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            min_frequency=2,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|pad|>",  # Qwen2's tokenizer would otherwise add a token that the model has no embedding for
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL_TOKENS[2:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, *, hidden_size: int = 256, num_layers: int = 2) -> Qwen2ForCausalLM:
    """Random weights, from torch's global generator."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,  # of 64 dimensions
        num_key_value_heads=2,
        intermediate_size=3 * hidden_size,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, message: Message) -> tuple[list[int], list[int]]:
    """Token ids (the message as a prompt of the chat template, its intent, the end) and labels, which are -100 in the
    prompt.
    """
    turns = [{"role": "user", "content": message.text}]
    prompt = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))["input_ids"]
    answer = [*tokenizer(message.intent)["input_ids"], tokenizer.eos_token_id]
    return prompt + answer, [-100] * len(prompt) + answer


def batches(lengths: Sequence[int], batch_size: int, shuffle: random.Random) -> Iterator[list[int]]:
    """Endless epochs of batches of rows, by number, of similar length: padding costs as much as text does."""
    while True:
        # other neighbours in each epoch
        order = sorted(range(len(lengths)), key=lambda row: lengths[row] + shuffle.uniform(0, 4))
        starts = list(range(0, len(order), batch_size))
        shuffle.shuffle(starts)
        yield from (order[start : start + batch_size] for start in starts)


def teach(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    *,
    num_steps: int,
    learning_rate: float,
    batch_size: int = 64,
    seed: int = 0,
) -> None:
    """Next-token prediction on the intents: AdamW, warm-up over a tenth of the steps, cosine to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_steps, pct_start=0.1)
    rows = [[torch.tensor(part) for part in encode(tokenizer, message)] for message in messages]
    order = batches([len(ids) for ids, _ in rows], batch_size, random.Random(seed))
    model.train()
    for step, batch in enumerate(islice(order, num_steps), start=1):
        # Padding stands behind the text, where causal attention does not see it: no mask is needed.
        ids = pad_sequence([rows[row][0] for row in batch], batch_first=True, padding_value=tokenizer.pad_token_id)
        labels = pad_sequence([rows[row][1] for row in batch], batch_first=True, padding_value=-100)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == num_steps:
            print(f"supervised step {step}/{num_steps}: loss {loss.item():.3f}", flush=True)
    model.eval()
