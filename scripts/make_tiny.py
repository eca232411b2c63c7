"""Makes the bundled model: `python scripts/make_tiny.py [FOLDER]`, a few minutes on two cores.

Without FOLDER it overwrites the model in `stateset_lightning/tiny/model`.

The tokenizer is a byte-level BPE that keeps digits apart, so that numbers are spelled. The model is a Qwen2 of one
million parameters, taught by next-token prediction on arithmetic questions that the demo never sees. Most of the
answers it is taught are careless: they forget the carry, in the second lesson also into the hundreds. So its likeliest
answer is right about four times in ten, and the right one is often among its samples: there is something for reward to
find.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from arithmetic import careless_answer, prompt_and_answer, split_questions
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from stateset_lightning.tiny import TINY_FOLDER

SEED = 1
BATCH_SIZE = 128
VOCABULARY = 384
SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SENTENCES = """
Answer the question with a number and nothing else. Classify the message. Answer with the name of the intent.
The user asks a question about a card, a payment, a transfer or an account. Think step by step, \
then write the answer after the mark.
Machine learning is the study of programs that learn from data. Neural networks are made of layers. \
Explain what a variable is.
How many does she have left in all? He buys some and sells the other half. Each one costs more money. \
There were people in the room.
"""


def make_tokenizer(
    sentences: str = SENTENCES + "What is 1 + 2?\n" * 50,
    special_tokens: list[str] = SPECIAL_TOKENS,
    chat_template: str = CHAT_TEMPLATE,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE that never merges digits or crosses words; its words are those of the sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d| ?[^\s\d]+|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        sentences.splitlines(),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|pad|>",  # Qwen2's tokenizer would otherwise add a token that the model has no embedding for
        eos_token="<|end|>",
        additional_special_tokens=special_tokens[2:],
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def make_model(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int = 128, intermediate_size: int = 512, positions: int = 2048
) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=intermediate_size,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids and labels; labels are -100 outside the answer."""
    messages = [{"role": "user", "content": prompt}]
    start = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))["input_ids"]
    end = tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
    return start + end, [-100] * len(start) + end


def teach(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    num_steps: int,
    learning_rate: float,
    careless_share: float,
    keep_hundreds: bool,
    seed: int,
) -> None:
    """Next-token prediction on the answers, right ones and careless ones of `arithmetic.careless_answer`."""
    questions = split_questions("pretrain")
    right = [prompt_and_answer(question) for question in questions]
    careless = [
        (prompt, careless_answer(question, keep_hundreds))
        for question, (prompt, _) in zip(questions, right, strict=True)
    ]
    rows = [encode(tokenizer, prompt, answer) for prompt, answer in right + careless]
    width = max(len(ids) for ids, _ in rows)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for step in range(num_steps):
        pick = torch.randint(len(questions), (BATCH_SIZE,), generator=generator)
        pick += len(questions) * (torch.rand(BATCH_SIZE, generator=generator) < careless_share)
        loss = model(input_ids=ids[pick], labels=labels[pick], attention_mask=(ids[pick] != pad).long()).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"step {step + 1}/{num_steps}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def greedy_accuracy(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, split: str = "validation") -> float:
    """Share of questions whose greedy answer is exactly right."""
    questions = [prompt_and_answer(question) for question in split_questions(split)]  # type: ignore[arg-type]
    right = 0
    for prompt, answer in questions:
        start = encode(tokenizer, prompt, answer)[0][: -len(answer) - 1]
        output = model.generate(torch.tensor([start]), max_new_tokens=5, do_sample=False)[0, len(start) :]
        right += tokenizer.decode(output, skip_special_tokens=True) == answer
    return right / len(questions)


def main(folder: Path = TINY_FOLDER) -> None:
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    teach(model, tokenizer, num_steps=1000, learning_rate=2e-3, careless_share=0.6, keep_hundreds=True, seed=SEED)
    teach(model, tokenizer, num_steps=250, learning_rate=5e-4, careless_share=0.75, keep_hundreds=False, seed=SEED + 1)
    model.eval()
    print(f"greedy accuracy on held-out questions: {greedy_accuracy(model, tokenizer):.3f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
