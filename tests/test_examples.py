"""The examples with a folder of their own, made small: what they write, what they show, and that they go on where they
were stopped.
"""

import csv
import json
import os
import random
import re
import shlex
import sys
from collections import Counter
from pathlib import Path
from pkgutil import resolve_name

import lightning.pytorch  # noqa: F401 (here, so that its log handlers do not hold the stream of the first test)
import pytest
import torch
import yaml
from gguf import GGUFWriter, TokenType
from gguf_files import write_gguf
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from stateset_lightning.cli.main import main
from stateset_lightning.data.prompts import PromptEncoder
from stateset_lightning.errors import DataError
from stateset_lightning.types import Scenario

ROOT = Path(__file__).parents[1]
INTENTS = ROOT / "examples" / "intent_classification"
GSM8K = ROOT / "examples" / "gsm8k"
SMALL_CHAT = ROOT / "examples" / "small_chat_model"
CALCULATOR = ROOT / "examples" / "calculator"
GAME = ROOT / "examples" / "multi_turn"
sys.path += [str(INTENTS), str(SMALL_CHAT)]

import run as intent_run  # noqa: E402
import topics  # noqa: E402
import train as small_chat  # noqa: E402
import warm_start  # noqa: E402
from messages import Message, read_messages, split_messages  # noqa: E402

TEXTS = {
    "card_arrival": "when will my card number {} arrive",
    "pin_blocked": "my pin is blocked since {} days",
    "age_limit": "may I open it at {}",
}
MESSAGES = [Message(text.format(n), intent) for intent, text in TEXTS.items() for n in range(20)]


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.chdir(ROOT)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    file = tmp_path / "messages.csv"
    with file.open("w", newline="") as lines:
        csv.writer(lines).writerows([("text", "category"), *((m.text, m.intent) for m in MESSAGES)])
    return file


def test_a_split_has_every_message_once_and_every_intent_in_proportion(table: Path) -> None:
    messages = read_messages(table)
    assert messages == MESSAGES
    split = split_messages(messages, labelled=0.1, held_out=0.25)
    parts = (split.labelled, split.checkable, split.held_out)
    assert Counter(m for part in parts for m in part) == Counter(MESSAGES)
    for part, count in zip(parts, (2, 13, 5), strict=True):  # of the 20 of each intent
        assert Counter(m.intent for m in part) == dict.fromkeys(TEXTS, count)
    assert split == split_messages(messages, labelled=0.1, held_out=0.25)
    assert split != split_messages(messages, labelled=0.1, held_out=0.25, seed=1)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "is not there"), ("text,category\nhello,\n", "row 1"), ("body\nhello\n", "row 1")]
)
def test_messages_that_cannot_be_used_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "m.csv"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DataError, match=message):
        read_messages(file)


def test_the_warm_start_is_taught_the_prompts_that_grpo_will_see() -> None:
    tokenizer = warm_start.make_tokenizer(MESSAGES, sorted(TEXTS))
    row, labels = warm_start.encode(tokenizer, MESSAGES[0])
    prompt = PromptEncoder(tokenizer=tokenizer).encode([Scenario(id="0", prompt=MESSAGES[0].text)], "train").tokens[0]
    assert row[: len(prompt)] == list(prompt)
    assert labels == [-100] * len(prompt) + row[len(prompt) :]
    assert tokenizer.decode(row[len(prompt) : -1]) == "card_arrival"
    assert row[-1] == tokenizer.eos_token_id
    assert tokenizer.tokenize("card_arrival") == ["card", "_arrival"]  # several tokens: a wrong form is possible


def test_batches_are_epochs_of_rows_of_similar_length() -> None:
    lengths = list(range(1, 101))
    stream = warm_start.batches(lengths, 10, random.Random(0))
    for _ in range(2):
        epoch = [[lengths[row] for row in next(stream)] for _ in range(10)]
        assert sorted(length for batch in epoch for length in batch) == lengths
        assert max(max(batch) - min(batch) for batch in epoch) <= 18  # 10, and 4 at either end


def test_teaching_teaches() -> None:
    torch.manual_seed(0)
    tokenizer = warm_start.make_tokenizer(MESSAGES, sorted(TEXTS))
    model = warm_start.make_model(tokenizer, hidden_size=32, num_layers=1)
    warm_start.teach(model, tokenizer, MESSAGES, num_steps=40, learning_rate=1e-2, batch_size=16)
    for message in (MESSAGES[3], MESSAGES[25], MESSAGES[47]):
        row, labels = warm_start.encode(tokenizer, message)
        start = labels.count(-100)
        assert model(torch.tensor([row])).logits[0, start - 1 : -1].argmax(-1).tolist() == row[start:]


@pytest.mark.slow  # trains and validates through the command line, twice
def test_intent_classification_prints_its_table_and_goes_on_where_it_was(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs"
    monkeypatch.chdir(tmp_path)
    words = [f"--data={table}", f"--folder={folder}", "--held_out=0.25", "--warm_steps=12", "--steps=2", "--seeds=3"]
    results = intent_run.main(words)
    (result,) = results.values()
    assert list(result) == ["warm_start", "grpo", "control"]
    # shares of the held-out messages
    assert all(accuracy * 15 == pytest.approx(round(accuracy * 15)) for accuracy in result.values())
    out = capsys.readouterr().out
    assert "Accuracy on 15 held-out messages" in out
    assert f"| 3 | {result['warm_start']:.3f} | {result['grpo']:.3f} |" in out
    # nothing beside what was named
    assert [file.name for file in tmp_path.iterdir() if file.name != table.name] == ["runs"]
    train, held_out = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").open()] for name in ("checkable", "held_out")
    )
    assert len(train) == 36
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}

    def teach(*_: object, **__: object) -> None:
        raise AssertionError("a model that is there was made again")

    monkeypatch.setattr(intent_run, "teach", teach)
    # of a try that was killed before its first checkpoint
    killed = folder / "seed_3" / "grpo" / "version_7" / "metrics.csv"
    killed.parent.mkdir()
    killed.write_text("step,val/solved\n0,0.123\n")
    os.utime(killed, (0, 0))
    (folder / "seed_3" / "result.json").unlink()  # stopped at the very end: models and checkpoint are there
    assert intent_run.main(words) == results


def test_the_table_has_mean_spread_and_gain() -> None:
    results = {1: {"warm_start": 0.5, "grpo": 0.6, "control": 0.5}, 2: {"warm_start": 0.6, "grpo": 0.8, "control": 0.7}}
    last = intent_run.table(results).splitlines()[-1]
    assert last == "| mean ± sd | 0.550 ± 0.071 | 0.700 ± 0.141 | +0.150 ± 0.071 | 0.600 ± 0.141 |"
    worse = {seed: {**result, "grpo": result["warm_start"] - 0.1} for seed, result in results.items()}
    assert "| -0.100 ± 0.000 |" in intent_run.table(worse).splitlines()[-1]


def test_gsm8k_config_makes_one_optimizer_step_per_episode() -> None:
    config = yaml.safe_load((GSM8K / "config.yaml").read_text())
    assert config["trainer"]["accumulate_grad_batches"] == config["data"]["steps_per_episode"]
    assert config["trainer"]["val_check_interval"] % config["data"]["steps_per_episode"] == 0


FIT = re.compile(r"^ *stateset-lightning (fit (?:.*\\\n)*.*)$", re.MULTILINE)


@pytest.mark.parametrize(
    "page",
    [folder / "README.md" for folder in (INTENTS, GSM8K, SMALL_CHAT, CALCULATOR, GAME)],
    ids=lambda page: page.parent.name,
)
def test_commands_and_links_of_a_page_hold(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page.read_text()
    commands = FIT.findall(text)
    assert commands
    for command in commands:
        with pytest.raises(SystemExit) as exit_:
            main([*shlex.split(command.replace("\\\n", " "), comments=True), "--print_config"])
        assert exit_.value.code == 0, capsys.readouterr().err
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.slow  # trains
def test_gsm8k_dry_run(tmp_path: Path) -> None:
    config = GSM8K / "config.yaml"
    assert yaml.safe_load(config.read_text())["data"]["train"] == "openai/gsm8k:main"
    rows = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(100)]
    data = tmp_path / "gsm8k.jsonl"  # in place of the hub's
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        f"--data.train={data}",
        f"--trainer.logger.init_args.save_dir={tmp_path}",
        "--trainer.limit_val_batches=0",
        "--trainer.max_steps=2",
    ]
    best = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
    (tmp_path / "no_monitor.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [best]}}))
    configs = [f"--config={file}" for file in (config, GSM8K / "dry_run.yaml", tmp_path / "no_monitor.yaml")]
    cli = main(["fit", *configs, *flags])
    assert cli is not None
    assert cli.trainer.global_step == 2
    assert cli.datamodule.num_scenarios == {"train": 98, "validation": 2}
    (metrics,) = tmp_path.rglob("metrics.csv")
    header, *rows = list(csv.reader(metrics.open()))
    assert [row[header.index("reward/numeric_answer")] for row in rows] == ["0.0", "0.0"]
    assert {"reward/format", "completion/truncated"} <= set(header)


def test_held_out_messages_share_no_sentence_and_no_thing_with_those_to_train_on() -> None:
    parts = {split: topics.messages(split) for split in ("train", "held_out")}
    assert len(parts["held_out"]) >= 400
    for part in parts.values():
        assert len(set(part)) == len(part)
        assert len(set(Counter(message.topic for message in part).values())) == 1
    texts = {split: " ".join(message.message for message in part) for split, part in parts.items()}
    for split, other in (("train", "held_out"), ("held_out", "train")):
        for slot in ("thing", "day", "number", "device"):
            assert not [value for value in topics.SLOTS[split][slot] if value in texts[other]]
    for sentences, held_out in topics.TEMPLATES.values():
        assert not set(sentences) & set(held_out)
    assert topics.messages("held_out") == parts["held_out"]


@pytest.mark.slow  # trains
def test_small_chat_model_shows_what_training_changed_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(topics, "MESSAGES_PER_TOPIC", {"train": 3, "held_out": 2})
    words = [f"--folder={tmp_path}", "--model=tiny", "--steps=1", "--prompt_messages=6"]
    accuracies = small_chat.main(words)
    out = capsys.readouterr().out
    chosen = json.loads((tmp_path / "prompts.json").read_text())
    assert set(chosen) == {"chat.yaml", "examples.yaml", "list_and_examples.yaml"}
    assert f"seed 1, after : {accuracies[1][1]:.3f} of the held-out messages right, 95% interval" in out
    shown = out.split("message\n")[1].splitlines()[:10]
    held_out = [json.loads(line) for line in (tmp_path / "held_out.jsonl").open()]
    assert [line.split()[-len(row["message"].split()) - 1 :] for line, row in zip(shown, held_out, strict=False)] == [
        [row["topic"], *row["message"].split()] for row in held_out[:10]
    ]

    def fail(*_: object) -> None:
        raise AssertionError("a prompt was tried again")

    monkeypatch.setattr(small_chat, "validate", fail)
    assert small_chat.main(words) == accuracies


def test_banking77_is_read_from_the_authors_file_and_from_the_hubs() -> None:
    from banking77 import six_intents

    ours = {"message": "Where is my card?", "target": "delivery"}
    assert six_intents({"text": " Where is my card?", "category": "card_arrival"}) == ours
    assert six_intents({"text": "Where is my card?", "label": 11, "label_text": "card_arrival"}) == ours
    assert six_intents({"text": "Where is my card?", "category": "card_linking"}) is None
    assert six_intents({"text": "Are money transfers free?", "category": "transfer_fee_charged"}) is None


def test_the_model_of_the_package_keeps_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from make_model import make_model, read_model

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    original = LlamaForCausalLM(config).eval()
    write_gguf(tmp_path / "model.gguf", original)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "stateset_lightning" / "tiny" / "model")
    monkeypatch.setattr("make_model.download", lambda folder: tmp_path / "model.gguf")
    monkeypatch.setattr("make_model.read_tokenizer", lambda file: tokenizer)
    make_model(tmp_path / "made")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert made.dtype == torch.float32
    assert not hasattr(made.config, "quantization_config")
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(made(tokens).logits, original(tokens).logits, atol=0.02, rtol=0.02)  # 8 bits a weight
    assert made.generation_config.eos_token_id == tokenizer.eos_token_id
    torch.testing.assert_close(made(tokens).logits, read_model(tmp_path / "model.gguf", tokenizer)(tokens).logits)


def test_the_tokenizer_of_the_package_cuts_numbers_and_spaces_as_the_original_does(tmp_path: Path) -> None:
    from make_model import read_tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(ByteLevel.alphabet()), "ab", "Ġab", "12", "Ġ1"]

    def add(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
        writer.add_token_merges(["a b", "Ġ ab", "1 2", "Ġ 1"])
        writer.add_bos_token_id(1)

    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=2, eos_token_id=2,
    )  # fmt: skip
    write_gguf(file := tmp_path / "model.gguf", LlamaForCausalLM(config), add=add)
    as_it_comes = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    assert "1" not in as_it_comes.tokenize("ab 12")
    read_tokenizer(file).save_pretrained(tmp_path / "made")
    for made in (read_tokenizer(file), AutoTokenizer.from_pretrained(tmp_path / "made")):
        text = "<|im_start|>ab ab  ab12 ab 12<|im_end|>"
        pieces = ["ab", "Ġab", "Ġ", "Ġab", "1", "2", "Ġab", "Ġ", "1", "2"]
        assert made.tokenize(text) == ["<|im_start|>", *pieces, "<|im_end|>"]
        assert made(text)["input_ids"] == made.convert_tokens_to_ids(made.tokenize(text))
        assert made.decode(made(text)["input_ids"]) == text
        assert (made.bos_token_id, made.eos_token_id, made.pad_token_id, len(made)) == (1, 2, 2, len(tokens))
        assert made.model_max_length == 8192


def test_the_calculator_is_hardly_ever_called_at_first_and_its_answer_is_used(tmp_path: Path) -> None:
    """What the first step samples is what the model does before training; without a call it is always wrong."""
    folder = f"--trainer.logger.init_args.save_dir={tmp_path}"
    flags = ["--trainer.max_steps=1", "--baseline=false", "--trainer.limit_val_batches=0", folder]
    main(["fit", f"--config={CALCULATOR / 'config.yaml'}", *flags])
    with next(tmp_path.rglob("metrics.csv")).open(newline="") as lines:
        (row,) = (row for row in csv.DictReader(lines) if row["conversation/tool_calls"])
    assert 0 < float(row["train/reward"]) < float(row["conversation/tool_calls"]) < 0.2


def test_the_game_leaves_what_is_left() -> None:
    game = resolve_name("examples.multi_turn.find_the_number.FindTheNumber")()
    assert game.reset({"number": 7}, seed=0) == "What is it, 1 to 9?"
    assert game.step("5") == ("What is it, 6 to 9?", 0.0, False)
    assert game.step("8") == ("What is it, 6 to 7?", 0.0, False)
    assert game.step("seven") == ("What is it, 6 to 7?", 0.0, False)
    assert game.step("7") == (None, 1.0, True)
