"""Tokenizers as models have them, through whole runs: which text rewards see, where a completion ends, what begins a
prompt.

Each model here says one thing: it is a chain, in which each token has one that follows it.
"""

from __future__ import annotations

import logging
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from module_runs import fit, make_data, make_module
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stateset_lightning import RewardFunction, RolloutConfig
from stateset_lightning.errors import ConfigError
from stateset_lightning.rewards import FormatReward, RewardModel
from stateset_lightning.run.samples import token_texts

SPECIAL = ["<pad>", "<s>", "<eos>", "<|user|>", "<|assistant|>", "<|im_end|>", "<think>", "</think>"]
CHARACTERS = [*string.digits, *string.ascii_letters, *"?.+ \n"]

TURN = "<|{{ m.role }}|>{{ m.content }}"
ENDED = "{% for m in messages %}" + TURN + "<|im_end|>\n{% endfor %}"
OPEN = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
# Thoughts only in the last turn, as templates of thinking models have it.
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<eos>\n{% endfor %}"
)
NO_THOUGHTS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}<eos>{% endfor %}"
)
WITHOUT_ENDS = "{% for m in messages %}" + TURN + "\n{% endfor %}" + OPEN


def opening(text: str, header: str = "<|assistant|>\n") -> str:
    return "{% if add_generation_prompt %}" + header + text + "{% endif %}"


def make_tokenizer(template: str | None = None, bos: bool = False, **options: Any) -> PreTrainedTokenizerFast:
    """A token for each character, and for each of `SPECIAL`."""
    numbers = {text: number for number, text in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(SPECIAL)
    names = {"bos_token": "<s>", "eos_token": "<eos>", "pad_token": "<pad>", **options}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names)


def save_model(folder: Path, tokenizer: PreTrainedTokenizerFast, says: Sequence[str] = "42", rows: int = 0) -> Path:
    """A model whose answer to every prompt that ends with `says[0]` is the rest of `says`.

    Attention and feed-forward add nothing to the embedding, which is the token itself; the head has its successor.
    """
    size = rows or len(tokenizer)
    sizes = {"hidden_size": size, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=size, head_dim=4, eos_token_id=2, **sizes))
    layer, successor = model.model.layers[0], torch.zeros(size, size)
    for before, after in pairwise(says):
        successor[tokenizer.convert_tokens_to_ids(after), tokenizer.convert_tokens_to_ids(before)] = 5.0
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(successor)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Listening(RewardFunction):
    """Keeps what it sees; its scores vary within a group."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def compute_reward(self, turns: Any, context: Any = None) -> float:
        self.seen.append(turns)
        return float(len(self.seen) % 2)


class Prompts(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.tokens = batch.prompt_tokens


@dataclass
class Case:
    """A model that says `says` after its prompt's last token; rewards must see `text`, whose end is the model's own."""

    template: str
    says: list[str]
    text: str
    stop: list[str] = field(default_factory=list)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    told: str = ""
    opened: str = ""  # comes from the prompt


def said(text: str, after: str = "<|assistant|>") -> list[str]:
    """Tokens, of which special ones stand between spaces."""
    return [after, *(token for word in text.split() for token in ([word] if word in SPECIAL else word))]


THOUGHTS = said("a </think> 42 <eos>", after="\n")
CASES = {
    "a stop string that is a special token": Case(WITHOUT_ENDS, said("42 <|im_end|> xyz"), "42", ["<|im_end|>"]),
    "a stop string that is the padding": Case(
        WITHOUT_ENDS, said("42 <|im_end|> xyz"), "42", ["<|im_end|>"], {"pad_token": "<|im_end|>"}
    ),
    "a stop string with a special token in it": Case(WITHOUT_ENDS, said("42 <think> xyz"), "42", ["<think>x"]),
    "thoughts between special tokens": Case(WITHOUT_ENDS, said("<think> a </think> 42 <eos>"), "<think>a</think>42"),
    "an end of turn that is not eos": Case(
        ENDED + OPEN, said("42 <|im_end|> xyz"), "42", told="ends turns with '<|im_end|>'"
    ),
    "an end of turn between turns alone": Case(
        "{% for m in messages %}" + TURN + "{% if not loop.last %}<|im_end|>{% endif %}{% endfor %}" + OPEN,
        said("42 <|im_end|> xyz"),
        "42",
        told="ends turns with '<|im_end|>'",
    ),
    "an end of turn that opens the next": Case(
        WITHOUT_ENDS, said("42 <|user|> xyz"), "42", told="ends turns with '<|user|>'"
    ),
    "opened thoughts": Case(
        THINKING + opening("<think>\n"), THOUGHTS, "<think>\na</think>42", opened="<think>\n", told="opens the answer"
    ),
    "opened thoughts of a template that closes those of the past": Case(
        NO_THOUGHTS + opening("<think>\n", "<|assistant|>"), THOUGHTS, "<think>\na</think>42", opened="<think>\n"
    ),
    "thoughts that one variable of the template opens": Case(
        THINKING + opening("{% if deep %}<think>\n{% endif %}"),
        THOUGHTS,
        "<think>\na</think>42",
        data={"chat_template_kwargs": {"deep": True}},
        opened="<think>\n",
    ),
    "thoughts that the system turn opens": Case(
        THINKING + opening("{% if messages[0].role == 'system' %}<think>\n{% endif %}"),
        THOUGHTS,
        "<think>\na</think>42",
        data={"system_prompt": "Think"},
        opened="<think>\n",
    ),
    "thoughts that are opened and closed": Case(
        THINKING + opening("<think>\n\n</think>\n\n"), said("42 <eos>", after="\n"), "42"
    ),
    "thoughts that are closed in other words": Case(
        THINKING + opening("<|channel>thought\n<channel|>\n"), said("42 <eos>", after="\n"), "42"
    ),
    "an answer of which the prompt has the first words": Case(
        THINKING + opening("Sum\n"), said("42 <eos>", after="\n"), "Sum\n42", opened="Sum\n"
    ),
    "turns of the user that end in several ways": Case(
        "{% for m in messages %}{{ m.content }}{{ '' if m.content.endswith('?') else '.' }}<eos>{% endfor %}" + OPEN,
        said("42 <eos>"),
        "42",
    ),
    "spaces that a clean-up would take": Case(
        WITHOUT_ENDS, [*said("42"), " ", ".", "<eos>"], "42 .", tokenizer={"clean_up_tokenization_spaces": True}
    ),
    "a stop string that a clean-up would hide": Case(
        WITHOUT_ENDS, [*said("42"), " ", ".", "x"], "42", [" ."], {"clean_up_tokenization_spaces": True}
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_rewards_and_samples_see_what_the_model_says_to_its_end(
    case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = make_tokenizer(case.template, **case.tokenizer)
    folder = save_model(tmp_path / "model", tokenizer, case.says)
    listening, form = Listening(), FormatReward(tags=["think"], weight=0.0)
    rollout = RolloutConfig(num_generations=4, max_new_tokens=12, stop=case.stop)
    with caplog.at_level(logging.INFO, logger="stateset_lightning"):
        module = make_module(str(folder), reward=[listening, form], rollout=rollout)
        fit(tmp_path, module, make_data(**case.data), max_steps=1)
    assert {turns[-1].content for turns in listening.seen} == {case.text}
    assert {[turn.role for turn in turns].count("assistant") for turns in listening.seen} == {1}
    records, episode = module.last_records, module.episode
    assert {record["completion"] for record in records} == {case.text.removeprefix(case.opened)}
    assert {record["finish_reason"] for record in records} == {"stop"}
    assert {record["rewards"]["format"] for record in records} == {float("</think>" in case.text)}
    assert case.told in caplog.text
    assert episode is not None
    first = episode.completion_tokens_T[: int(episode.lengths_N[0])].tolist()
    assert "".join(token_texts(tokenizer, first)).startswith(case.text.removeprefix(case.opened))


@pytest.mark.parametrize(
    ("prompt", "bos", "begins"),
    [
        ("<s><|user|>q<|assistant|>", True, ["<s>", "<|user|>"]),
        ("<|user|>q<|assistant|>", True, ["<s>", "<|user|>"]),
        ("<s><s>q<|assistant|>", True, ["<s>", "<s>", "q"]),  # two of its own
        ("<s><s>q<|assistant|>", False, ["<s>", "<s>", "q"]),
    ],
)
def test_a_prompt_with_markup_gets_no_second_bos(tmp_path: Path, prompt: str, bos: bool, begins: list[str]) -> None:
    tokenizer, prompts = make_tokenizer(bos=bos), Prompts()
    folder = save_model(tmp_path / "model", tokenizer, said("42 <eos>"))
    data = make_data(
        train=[{"prompt": prompt}], batch_size=1, use_chat_template=False, parse_special_tokens=True, validation=None
    )
    fit(tmp_path, make_module(str(folder), reward=Listening()), data, max_steps=1, callbacks=[prompts])
    assert tokenizer.convert_ids_to_tokens(prompts.tokens[0][: len(begins)]) == begins
    assert tokenizer.decode(prompts.tokens[0]).removeprefix("<s>") == prompt.removeprefix("<s>")


def test_a_tokenizer_larger_than_the_embedding_is_refused_when_the_model_is_loaded(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(ENDED + OPEN)
    folder = save_model(tmp_path / "model", tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>", "</tool>"]})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"model\.policy\.model_name=.* has 2 tokens \('</tool>', '<tool>'\)") as told:
        fit(tmp_path, make_module(str(folder)))
    assert "\n" not in str(told.value)
    assert f"resize_token_embeddings({len(tokenizer)})" in str(told.value)


def test_the_place_of_an_image_needs_no_row_of_the_embedding(tmp_path: Path) -> None:
    """Gemma 3's smallest model has the tokenizer of the others, and an embedding without it."""
    says, names = said("42 <|im_end|>"), {"image_token": "<image>"}
    folder = save_model(tmp_path / "model", make_tokenizer(ENDED + OPEN), says)
    make_tokenizer(ENDED + OPEN, extra_special_tokens=names).save_pretrained(folder)
    module = make_module(str(folder), reward=Listening())
    fit(tmp_path, module, max_steps=1)
    assert {record["completion"] for record in module.last_records} == {"42"}


def test_a_reward_models_tokenizer_larger_than_its_embedding_is_refused(tmp_path: Path) -> None:
    from text_models import save_classifier, word_tokenizer

    save_classifier(tmp_path, ["score"])
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"reward_model\.model_name=.* has 1 tokens \('more'\)|has 1 tokens"):
        _ = RewardModel(str(tmp_path)).model
