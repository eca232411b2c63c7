"""The work that both sides of a comparison do: the same random model, prompts and reward.

Letters are tokens, so that a prompt of P letters has P tokens for everybody.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY = 512
EOS, PAD = 1, 0
UNREACHABLE_EOS = VOCABULARY  # see `add_unreachable_end`
NUM_PROMPTS, NUM_GENERATIONS = 2, 8

# TRL's fastest honest setting on a CPU: an episode in one generation and one backward pass, no reference, no gradient
# checkpointing, float32, nothing written.
TRL_SETTINGS: dict[str, Any] = {
    "steps_per_generation": 1,
    "gradient_accumulation_steps": 1,
    "beta": 0.0,
    "loss_type": "grpo",
    "gradient_checkpointing": False,
    "model_init_kwargs": {"dtype": "float32"},
    "bf16": False,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


@dataclass(frozen=True)
class Case:
    """One line of the table; `eos_rate` is the probability of ending at a token, 0 for completions that all run to the
    end.
    """

    prompt_tokens: int
    completion_tokens: int
    eos_rate: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.prompt_tokens} / {self.completion_tokens}" + (
            f", EOS 1/{round(1 / self.eos_rate)}" if self.eos_rate else ""
        )


CASES = [Case(32, 64), Case(256, 64), Case(1024, 32), Case(32, 128, 1 / 40), Case(256, 128, 1 / 40)]


def make_tokenizer(unreachable_eos: bool, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """One token per byte, and enough others to name every token that the model may sample."""
    letters = {letter: 2 + i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    names = {f"<{i}>": i for i in range(vocabulary + 1) if i not in letters.values()}
    tokenizer = Tokenizer(models.BPE({**letters, **names}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    eos = vocabulary if unreachable_eos else EOS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=f"<{eos}>", pad_token=f"<{PAD}>", unk_token=f"<{PAD}>"
    )


def make_model(family: str = "qwen2", **sizes: int) -> PreTrainedModel:
    """About 32M parameters unless told otherwise, random, tied embeddings.

    "gemma3" has Gemma 3's smallest window, in five of six layers.
    """
    torch.manual_seed(0)
    shape = {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 2048,
    }
    options: dict[str, Any] = {**shape, "vocab_size": VOCABULARY, **sizes}
    options |= {"tie_word_embeddings": True, "pad_token_id": PAD, "eos_token_id": None, "bos_token_id": None}
    if family == "gemma3":
        return Gemma3ForCausalLM(Gemma3TextConfig(**options, head_dim=64, sliding_window=512))
    return Qwen2ForCausalLM(Qwen2Config(**options))


@torch.no_grad()
def add_unreachable_end(model: PreTrainedModel) -> None:
    """Appends a token whose logit is far below all others, so that every completion runs to its limit.

    The first number of the residual stream is made large and positive in every token, and only that token's output
    embedding looks at it, with a minus.
    """
    model.resize_token_embeddings(model.config.vocab_size + 1, mean_resizing=False)
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    inputs[:, 0] = 1.0
    outputs[-1] = 0.0
    outputs[-1, 0] = -50.0


def teach_eos_rate(model: PreTrainedModel, rate: float, steps: int = 40) -> None:
    """Trains on random token streams that end with probability `rate` per token, so that samples end about as often."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for _ in range(steps):
        ids = torch.randint(5, VOCABULARY, (8, 64), generator=generator)
        ids[torch.rand(ids.shape, generator=generator) < rate] = EOS
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def save_workload(folder: Path, case: Case, family: str = "qwen2") -> None:
    """Model and tokenizer of a case, as a folder that both sides load."""
    model = make_model(family)
    if case.eos_rate:
        teach_eos_rate(model, case.eos_rate)
    else:
        add_unreachable_end(model)
    eos = EOS if case.eos_rate else UNREACHABLE_EOS
    model.generation_config.eos_token_id = eos
    model.generation_config.pad_token_id = PAD
    model.save_pretrained(folder)
    make_tokenizer(not case.eos_rate).save_pretrained(folder)


def make_prompts(case: Case, number: int) -> list[str]:
    generator = torch.Generator().manual_seed(2)
    letters = torch.randint(ord("a"), ord("z") + 1, (number, case.prompt_tokens), generator=generator)
    return ["".join(map(chr, row)) for row in letters.tolist()]


def score(text: str) -> float:
    """Some number that differs between completions: every group is mixed, so nobody may skip anything."""
    return sum(text.encode()) % 97 / 97
