"""Makes a model that can call a calculator and hardly ever does: `python scripts/make_tool_model.py [FOLDER]`.

It takes ten minutes on two cores, and writes the model and questions; without FOLDER, into `runs/calculator`.

A Qwen2 of half a million parameters is taught by next-token prediction on products of two numbers of two digits. Nine
times in ten the taught answer multiplies tens by tens and units by units and adds nothing else, which is always wrong;
one time in ten it calls the tool `multiply` and then says what the tool said. So the model cannot multiply, hardly ever
calls the tool, and its likeliest answer is wrong: what reward can teach it is to call.
"""

from __future__ import annotations

import json
import random
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from make_tiny import SPECIAL_TOKENS, make_model, make_tokenizer
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM
from transformers.utils import get_json_schema

FOLDER = Path(__file__).resolve().parents[1] / "runs" / "calculator"
SEED = 1
NUM_STEPS, BATCH_SIZE, LEARNING_RATE = 4000, 64, 3e-3
CALLING_SHARE = 0.1
SPLIT_SIZES = {"validation": 256, "train": 1024}  # the others teach the model
NUMBERS = [n for n in range(12, 100) if n % 10]  # of two digits, none of them 0: the careless product is always wrong
CHAT_TEMPLATE = (
    "{% if tools %}<|system|>{% for tool in tools %}{{ tool.function.name }}({{ tool.function.parameters.properties |"
    " join(', ') }}){% endfor %}<|end|>{% endif %}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SENTENCES = """
multiply(a, b) What is 12 * 34? It is
<tool_call>{"name": "multiply", "arguments": {"a": 1, "b": 2}}</tool_call>
"""


def multiply(a: int, b: int) -> int:
    """Multiply two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a * b


def questions(split: str) -> list[tuple[int, int]]:
    """The factors of a split: a fixed shuffle of all, cut in three."""
    pairs = list(product(NUMBERS, NUMBERS))
    random.Random(SEED).shuffle(pairs)
    start = 0
    for name, size in SPLIT_SIZES.items():
        if name == split:
            return pairs[start : start + size]
        start += size
    return pairs[start:]


def careless(a: int, b: int) -> int:
    """Tens by tens and units by units, without what stands between."""
    return (a // 10) * (b // 10) * 100 + (a % 10) * (b % 10)


def conversation(a: int, b: int, calls: bool) -> list[str]:
    """What the model says, and what the tool answers, in turn."""
    if not calls:
        return [f"It is {careless(a, b)}"]
    call = json.dumps({"name": "multiply", "arguments": {"a": a, "b": b}})
    return [f"<tool_call>{call}</tool_call>", str(multiply(a, b)), f"It is {multiply(a, b)}"]


def encode(tokenizer: PreTrainedTokenizerFast, a: int, b: int, calls: bool) -> tuple[list[int], list[int]]:
    """Token ids and labels; labels are -100 outside of what the model says."""
    messages = [{"role": "user", "content": f"What is {a} * {b}?"}]
    options: dict[str, Any] = {"tools": [get_json_schema(multiply)], "tokenize": False, "add_generation_prompt": True}
    ids = tokenizer(tokenizer.apply_chat_template(messages, **options))["input_ids"]
    labels = [-100] * len(ids)
    for text, is_tools in zip(conversation(a, b, calls), (False, True, False), strict=False):
        said = tokenizer(f"<|tool|>{text}<|end|><|assistant|>" if is_tools else f"{text}<|end|>")["input_ids"]
        ids, labels = ids + said, labels + ([-100] * len(said) if is_tools else said)
    return ids, labels


def teach(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = questions("pretrain")
    rows = {calls: [encode(tokenizer, a, b, calls) for a, b in pairs] for calls in (False, True)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=NUM_STEPS, pct_start=0.1)
    draw = random.Random(SEED)
    for step in range(NUM_STEPS):
        # Half of them call while the model learns to; the last fifth has the shares that it is to end with.
        share = 0.5 if step < 0.8 * NUM_STEPS else CALLING_SHARE
        batch = [rows[draw.random() < share][draw.randrange(len(pairs))] for _ in range(BATCH_SIZE)]
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in batch])
        labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in batch])
        loss = model(input_ids=ids, labels=labels, attention_mask=(ids != tokenizer.pad_token_id).long()).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"step {step + 1}/{NUM_STEPS}: loss {loss.item():.3f}", flush=True)


def main(folder: Path = FOLDER) -> None:
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer(SENTENCES * 50, [*SPECIAL_TOKENS, "<|tool|>"], CHAT_TEMPLATE)
    model = make_model(tokenizer, hidden_size=96, intermediate_size=256, positions=512)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    teach(model, tokenizer)
    model.eval().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLIT_SIZES:
        rows = [{"prompt": f"What is {a} * {b}?", "target": str(a * b)} for a, b in questions(split)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
