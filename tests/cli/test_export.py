"""A run -> its checkpoint tried and exported: identical greedy completions, a folder whole or absent, a card that is
right.
"""

import dataclasses
import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from cli_runs import RUN_CONFIG, start_in
from gguf_files import write_gguf
from lightning.pytorch.callbacks import ModelCheckpoint
from module_runs import fit, make_module
from tokenizers.processors import TemplateProcessing

from stateset_lightning.cli import export as export_module
from stateset_lightning.cli.main import main
from stateset_lightning.cli.trained import load_trained
from stateset_lightning.errors import CheckpointError, ConfigError
from stateset_lightning.files import atomic_folder
from stateset_lightning.policy import PolicyConfig, load_model

PROMPTS = [f"What is {i} + {j}?" for i in (3, 18) for j in (4, 27)]
CHECKPOINT = "runs/task/version_0/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with a system prompt, a held-out reward and two validations."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt, "target": "7"}) + "\n" for prompt in PROMPTS)
    )
    config = {
        "seed_everything": 3,
        "baseline": True,
        "model": {
            "policy": {"model_name": "tiny"},
            "reward": [
                {"class_path": "stateset_lightning.rewards.ExactMatch"},
                {
                    "class_path": "stateset_lightning.rewards.RegexMatch",
                    "init_args": {"pattern": "^[0-9]+$", "weight": 0},
                },
            ],
            "rollout": {"num_generations": 2, "max_new_tokens": 4},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
            "evaluation": {"samples": 2},
        },
        "data": {
            "train": "rows.jsonl",
            "validation": "rows.jsonl",
            "batch_size": 4,
            "system_prompt": "Only the number.",
        },
        "trainer": {
            "max_steps": 1,
            "val_check_interval": 1,
            "accelerator": "cpu",
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": "runs", "name": "task"},
            },
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
            ],
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["fit", "--config", "config.yaml"])
        main(["export", CHECKPOINT, "out"])
    return folder


def answers(run, capsys, monkeypatch, *words, prompts=PROMPTS):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(prompt + "\n" for prompt in prompts)))
    capsys.readouterr()
    main(["generate", "--device", "cpu", *words])
    return capsys.readouterr().out.splitlines()[-len(prompts) :]


def test_transformers_gives_the_same_greedy_completions(run, capsys, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = answers(run, capsys, monkeypatch, "--ckpt_path", str(run / CHECKPOINT))
    tokenizer, model = AutoTokenizer.from_pretrained(run / "out"), AutoModelForCausalLM.from_pretrained(run / "out")
    theirs = []
    for prompt in PROMPTS:
        messages = [{"role": "system", "content": "Only the number."}, {"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, do_sample=False)  # as long as in training without being told
        theirs.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert theirs == ours
    assert len(set(ours)) > 1
    saved = torch.load(run / CHECKPOINT, weights_only=True)["state_dict"]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, saved[f"policy.model.{name}"])
    # The folder is a model like any other, too, but knows no system prompt.
    told = ["--system_prompt", "Only the number."]
    assert answers(run, capsys, monkeypatch, "--ckpt_path", str(run / "out"), *told) == ours


@pytest.mark.parametrize(
    ("options", "is_varied"),
    [
        ({"temperature": 1.0, "top_k": 0, "top_p": None, "min_p": None}, True),
        ({"temperature": 0.001}, False),
        ({"top_k": 1}, False),
        ({"top_p": 0.001}, False),
        ({"min_p": 1.0}, False),
    ],
)
def test_a_folder_is_sampled_as_its_generation_config_says(run, tmp_path, capsys, monkeypatch, options, is_varied):
    shutil.copytree(run / "out", folder := tmp_path / "model")
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))
    main(["generate", "--device=cpu", f"--ckpt_path={folder}", "--samples=16", "--seed=1", "--prompt=What is 9 + 14?"])
    texts = re.findall(r"^\[\d+\] (.*)$", capsys.readouterr().out, flags=re.MULTILINE)
    assert len(texts) == 16
    assert (len(set(texts)) > 1) == is_varied


def test_a_run_of_a_gguf_file_goes_on_and_is_exported(tmp_path, make_model, tiny_tokenizer):
    write_gguf(name := tmp_path / "small.gguf", make_model("llama", intermediate_size=64))
    tiny_tokenizer.save_pretrained(tmp_path)
    options = {"enable_checkpointing": True, "callbacks": [ModelCheckpoint(tmp_path / "a", save_last=True)]}
    reward = {"reward": lambda turns, context: float(len(turns[-1].content) % 3)}  # varied, whatever it samples
    first = fit(tmp_path, make_module(str(name), **reward), max_steps=1, **options)
    last = tmp_path / "a" / "last.ckpt"
    resumed = fit(tmp_path, make_module(str(name), **reward), max_steps=2, ckpt_path=last, **options)
    before, after = (trainer.lightning_module.policy.model.state_dict() for trainer in (first, resumed))
    assert not all(torch.equal(before[name], weight) for name, weight in after.items())
    for source, out, weights in (last, "run", after), (name, "plain", load_model(PolicyConfig(str(name))).state_dict()):
        export_module.main([str(source), str(tmp_path / out)])
        assert "quantization_config" not in json.loads((tmp_path / out / "config.json").read_text())
        exported = load_model(PolicyConfig(str(tmp_path / out))).state_dict()
        assert all(torch.equal(weight, weights[name]) for name, weight in exported.items())


def test_the_folder_holds_no_pickle_and_nothing_of_the_machine(run):
    names = {path.name for path in (run / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".ckpt", ".pkl"))]
    for path in (run / "out").glob("*.[jm]*"):
        if path.suffix != ".safetensors":
            assert str(run) not in path.read_text(), path.name
    assert {path.name for path in run.iterdir()} >= {"out"}
    assert not list(run.glob(".out*"))


def test_the_card_tells_task_rewards_and_metrics_and_its_code_runs(run, capsys, monkeypatch):
    card = (run / "out" / "README.md").read_text()
    assert "base_model:" not in card  # `tiny` is on no hub, which would link to whatever has that name
    for line in (
        "# out",
        "`tiny`, trained by group-relative policy optimisation for 1 optimizer steps.",
        "- task: `rows.jsonl`",
        "- system prompt: 'Only the number.'",
        "- reward: `RegexMatch`, held out",
        "- algorithm: `GRPO`",
        "| metric | after step 0 | after step 1 |",
    ):
        assert line in card.splitlines(), line
    for name in ("reward", "reward/exact_match", "reward/regex_match", "solved", "pass@1", "pass@2", "majority@2"):
        assert re.search(rf"^\| {re.escape(name)} \| [\d.]+ \| [\d.]+ \|$", card, re.MULTILINE), name
    assert re.search(r"Made with stateset-lightning [\d.]+, lightning [\d.]+, transformers", card)
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    (ours,) = answers(run, capsys, monkeypatch, "--ckpt_path", str(run / CHECKPOINT), prompts=["What is 2 + 2?"])
    monkeypatch.chdir(run / "out")
    exec(code, {})
    assert capsys.readouterr().out == ours + "\n"


@pytest.mark.parametrize(
    ("algorithm", "trained_by", "is_tagged"),
    [
        ("stateset_lightning.algorithm.Supervised", "supervised steps", False),
        ({"class_path": "stateset_lightning.algorithm.GKD"}, "distillation", False),
        ({"class_path": "mine.Loss", "init_args": {}}, "group-relative policy optimisation", True),
    ],
)
def test_the_card_says_by_what_a_model_was_trained(run, algorithm, trained_by, is_tagged):
    trained = load_trained(str(run / CHECKPOINT))
    model = {**trained.config["model"], "algorithm": algorithm}
    card = export_module.model_card(dataclasses.replace(trained, config={**trained.config, "model": model}), "out")
    assert f"trained by {trained_by} for 1 optimizer steps." in card
    assert ("grpo" in card.split("---")[1]) == is_tagged


FENCE = "```"  # which must not end the code in the card
LORA = {"policy": {"model_name": "tiny", "lora": {"rank": 2}}, "rollout": {"stop": ["1", "22"]}}
FRAMED = {"policy": {"model_name": "framed"}, "rollout": {"stop": ["=1", "7"]}}
PLAIN = {"use_chat_template": False, "prompt_template": "{{ prompt }} ="}
MARKED = {"use_chat_template": False, "prompt_template": "<|user|>{{ prompt }}<|end|><|assistant|>"}


def framed_model(folder):
    """The bundled model, with a tokenizer that puts a token before every text, and one that ends it behind."""
    from stateset_lightning.policy import PolicyConfig, load_model, load_tokenizer

    load_model(PolicyConfig("tiny")).save_pretrained(folder)
    tokenizer = load_tokenizer(PolicyConfig("tiny"))
    tokenizer.bos_token = "<|user|>"
    frame = TemplateProcessing(single="<|user|> $A <|end|>", special_tokens=[("<|user|>", 3), ("<|end|>", 1)])
    tokenizer.backend_tokenizer.post_processor = frame
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ({"rollout": {"stop": ["4", "12", "|>2"]}}, {}),
        ({}, {"system_prompt": FENCE, "chat_template_kwargs": {"a": FENCE}}),
        (FRAMED, PLAIN),
        (FRAMED, {**MARKED, "parse_special_tokens": True}),
        (LORA, {"system_prompt": "Add."}),
    ],
    ids=["stop strings", "system prompt", "plain text", "special tokens", "adapter"],
)
def test_the_code_of_the_card_answers_as_the_evaluation_did(tmp_path, monkeypatch, capsys, caplog, model, data):
    policy = model.get("policy", {"model_name": "tiny"})
    rollout = {"num_generations": 2, "max_new_tokens": 6, "temperature": 0.7, **model.get("rollout", {})}
    config = {**RUN_CONFIG, "model": {**RUN_CONFIG["model"], "policy": policy, "rollout": rollout}}
    config["trainer"] = {**RUN_CONFIG["trainer"], "max_steps": 1, "val_check_interval": 1}
    config["data"] = {**RUN_CONFIG["data"], **data}
    start_in(tmp_path, monkeypatch, config, 18)
    with open("rows.jsonl", "a") as file:
        file.writelines(json.dumps({"prompt": f"<|{word}|> 12?", "target": "2"}) + "\n" for word in ("user", "end"))
    if policy["model_name"] == "framed":
        framed_model("framed")
    main(["fit", "--config", "config.yaml", f"--model.optimizer.lr={0.03 if 'lora' in policy else 1e-4}"])
    samples = map(json.loads, Path("runs/r/version_0/samples.jsonl").read_text().splitlines())
    kit = [sample["completion"] for sample in samples if sample["split"] == "validation"]
    assert len(set(kit)) > 5
    template = data.get("prompt_template", "{{ prompt }}")
    rows = map(json.loads, Path("rows.jsonl").read_text().splitlines())
    prompts = [template.replace("{{ prompt }}", row["prompt"]) for row in rows]
    assert len(prompts) == len(kit) == 20
    for words in ([], ["--merge"]) if "lora" in policy else ([],):
        main(["export", "last", "out", "--overwrite", *words])
        (code,) = re.findall(r"```python\n(.*?)```", Path("out/README.md").read_text(), flags=re.DOTALL)
        with monkeypatch.context() as patch:
            patch.chdir("out")
            exec(code, card := {})
            assert [card["answer"](prompt) for prompt in prompts] == kit
    assert [record for record in caplog.records if record.name.startswith("transformers")] == []
    if "stop" in model.get("rollout", {}) and policy["model_name"] == "tiny":  # the folder is a model like any other
        told = ["--ckpt_path", "out", "--config", "runs/r/version_0/config.yaml"]
        assert answers(tmp_path, capsys, monkeypatch, *told, prompts=prompts[:18]) == kit[:18]


def test_the_code_of_the_card_computes_as_training_sampled(run):
    trained = load_trained(str(run / CHECKPOINT))
    half = dataclasses.replace(trained, config={**trained.config, "trainer": {"precision": "bf16-mixed"}})
    assert "from_pretrained(\".\", dtype='bfloat16')" in export_module.model_card(half, "out")


def test_samples_are_counted_and_repeatable(run, capsys):
    words = ["generate", "--ckpt_path", str(run / CHECKPOINT), "--prompt", "What is 3 + 4?", "--device", "cpu"]
    said = []
    for seed in ("1", "1", "2"):
        main([*words, "--samples", "6", "--temperature", "3", "--seed", seed])
        said.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("[")])
    assert [line[:3] for line in said[0]] == [f"[{i}]" for i in range(1, 7)]
    assert said[0] == said[1] != said[2]
    assert len({line[3:] for line in said[0]}) > 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate"], "the following arguments are required: --ckpt_path; see stateset-lightning generate --help"),
        (["generate", "--ckpt_path", "tiny", "--prompt", " "], "--prompt item 1: the prompt is empty"),
        (["generate", "--ckpt_path", "none.ckpt"], "ckpt_path=none.ckpt: there is no such file"),
        (
            ["generate", "--ckpt_path", "tiny", "--samples", "0"],
            "--samples=0 must be at least 1",
        ),
        (
            ["generate", "--ckpt_path", "tiny", "--prompt", "a", "--temperature", "0"],
            "error: --temperature=0.0 must be above 0",
        ),
        (["generate", "--ckpt_path", "tiny", "--prompt", "a", "--device", "nope"], "--device nope: Expected one of"),
        (["export", "tiny", "out"], "out has files in it; choose another folder, or say --overwrite"),
        (["export", "tiny", "config.yaml"], "config.yaml: cannot be written (Not a directory)"),
        (["export", "none.ckpt", "new"], "ckpt_path=none.ckpt: there is no such file"),
    ],
)
def test_what_cannot_be_done_is_said(run, monkeypatch, capsys, words, said):
    monkeypatch.chdir(run)
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert not (run / "new").exists()


def test_a_completion_cannot_control_the_terminal(run, monkeypatch, capsys):
    from stateset_lightning.rollout import InProcessEngine

    sampled = InProcessEngine.generate

    def hostile(self, *args, **kwargs):
        return dataclasses.replace(sampled(self, *args, **kwargs), texts=["\x1b]0;x\x07 a\nb\x9b2J"])

    monkeypatch.setattr(InProcessEngine, "generate", hostile)
    for is_terminal, said in ((True, "\\x1b]0;x\\x07 a\nb\\x9b2J\n"), (False, "\x1b]0;x\x07 a\nb\x9b2J\n")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda answer=is_terminal: answer)
        main(["generate", "--ckpt_path", "tiny", "--prompt", "a", "--device", "cpu"])
        assert capsys.readouterr().out.endswith(said)


def test_a_long_prompt_does_not_end_the_conversation(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("1 " * 3000 + "\nWhat is 3 + 4?\n"))
    main(["generate", "--ckpt_path", str(run / CHECKPOINT), "--device", "cpu"])
    said = capsys.readouterr()
    assert "exceed the model's" in said.err
    assert said.out.splitlines()[-1].isdigit()


def test_a_failed_export_leaves_what_was_there(run, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(run)
    before = {path.name: path.read_bytes() for path in (run / "out").iterdir()}
    monkeypatch.setattr(export_module, "model_card", fail)  # the last of the files
    for folder in ("out", "new"):
        with pytest.raises(ValueError, match="No space left on device"):
            export_module.main([CHECKPOINT, folder, "--overwrite"])
    assert {path.name: path.read_bytes() for path in (run / "out").iterdir()} == before
    assert not list(run.glob("*new*"))
    assert not list(run.glob(".out*"))


def test_an_overwritten_folder_is_replaced_as_a_whole(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x")
    with pytest.raises(ConfigError, match="has files in it"), atomic_folder(tmp_path / "out"):
        pass
    with atomic_folder(tmp_path / "out", overwrite=True) as folder:
        assert (tmp_path / "out" / "old").exists()
        (folder / "new").write_text("y")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]
    # Killed between the two renames, the old folder comes back first.
    (tmp_path / "out").rename(tmp_path / ".out.host-0123456789abcdef.old")
    with pytest.raises(ConfigError, match="has files in it"), atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "new").read_text() == "y"


def test_weights_of_another_model_are_refused(run, tmp_path):
    content = torch.load(run / CHECKPOINT, weights_only=True)
    name = next(name for name in content["state_dict"] if name.startswith("policy.model."))
    content["state_dict"][name] = torch.zeros(2, 2)
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="its weights do not fit tiny"):
        load_trained(str(tmp_path / "other.ckpt"))


def test_without_its_run_a_checkpoint_says_so(run, tmp_path, caplog):
    content = torch.load(run / CHECKPOINT, weights_only=True)
    content["stateset"]["run_folder"] = str(tmp_path / "gone")
    torch.save(content, tmp_path / "alone.ckpt")
    with caplog.at_level("INFO", logger="stateset_lightning"):
        trained = load_trained(str(tmp_path / "alone.ckpt"))
    assert "no config of its run is found" in caplog.text
    assert trained.encoder().system_prompt is None
    found = load_trained(str(tmp_path / "alone.ckpt"), str(run / "runs/task/version_0/config.yaml"))
    assert found.encoder().system_prompt == "Only the number."
    with pytest.raises(ConfigError, match="is no config of a run"):
        load_trained("tiny", str(run / "out" / "config.json"))


@pytest.mark.parametrize("command", [["generate", "--prompt=1", "--ckpt_path"], ["export"]], ids=["generate", "export"])
def test_the_adapter_of_a_config_is_not_left_out_without_a_word(command, tmp_path, capsys):
    """The model would answer, or be written, without it."""
    config = tmp_path / "served.yaml"
    place = [] if command[0] == "generate" else [str(tmp_path / "out")]
    for policy, told in (("{adapter: mine}", True), ("{adapter: null}", False), ("tiny", False)):
        config.write_text(f"model: {{policy: {policy}}}", encoding="utf-8")
        if not told:
            load_trained("tiny", str(config))
            continue
        with pytest.raises(SystemExit):
            main([*command, "tiny", *place, f"--config={config}"])
        assert "model.policy.adapter='mine' is left out here: give its run's checkpoint" in capsys.readouterr().err


def test_the_commands_of_the_docs_run(run, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    commands = [
        line for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL) for line in block.splitlines()
    ]
    monkeypatch.chdir(run)
    places = {
        "CKPT": str(run / CHECKPOINT),
        "my_model": str(tmp_path / "my_model"),
        "configs/single_turn.yaml": "config.yaml",
    }
    for command in commands:
        monkeypatch.setattr(sys, "stdin", io.StringIO("What is 1 + 2?\n"))
        _, *words = shlex.split(command)
        main([places.get(word, word) for word in words])
    said = capsys.readouterr().out
    assert "val/pass@8" in said
    assert re.search(r"^\[4\] \d+$", said, re.MULTILINE)
    assert (tmp_path / "my_model" / "model.safetensors").exists()


@pytest.mark.slow  # starts a process
def test_the_help_of_the_own_subcommands_is_quick(run):
    import subprocess

    for command in ("generate", "export"):
        code = f"import sys; from stateset_lightning.cli.main import main\ntry: main(['{command}', '--help'])\n"
        code += "except SystemExit: print('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.startswith(f"usage: stateset-lightning {command}")
        assert done.stdout.endswith("False\n")
