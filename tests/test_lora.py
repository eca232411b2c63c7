"""Whole runs with an adapter: what trains, exact resume, small checkpoints, sampling, and what is made of a checkpoint
afterwards.
"""

import io
import json
import logging
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from module_runs import GradientRecorder, fit, make_data, make_module, make_trainer, relative_difference, weights
from safetensors.torch import load_file
from transformers import TorchAoConfig

from stateset_lightning import GRPOLightningModule, RolloutConfig
from stateset_lightning.algorithm import GRPO
from stateset_lightning.cli.export import model_card
from stateset_lightning.cli.main import main
from stateset_lightning.cli.trained import load_trained
from stateset_lightning.errors import CheckpointError, ConfigError
from stateset_lightning.policy import Group, LoRAConfig, PolicyConfig, load_model, load_tokenizer, save_adapter
from stateset_lightning.policy.lora_state import base_digest
from stateset_lightning.rollout import InProcessEngine

LORA = LoRAConfig(rank=4, alpha=8)
CHECKPOINT = "runs/task/version_0/checkpoints/last.ckpt"
PROMPTS = [f"What is {i} + {j}?" for i in (3, 18) for j in (4, 27)]


def module(policy: PolicyConfig | None = None, **options: Any) -> GRPOLightningModule:
    options = {
        "algorithm": GRPO(beta=0.1),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        **options,
    }
    return make_module(policy or PolicyConfig("tiny", lora=LORA), **options)


class Rows(Callback):
    """The metrics of every optimizer step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if not pl_module.inside_optimizer_step:
            self.rows.append(
                {
                    n: v
                    for n, v in pl_module.metrics.last.items()
                    if not n.startswith(("time/", "memory/", "work/tokens_per_s"))
                }
            )


def every_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


# Training
# ----------------------------------------------------------------------------------------------------------------------


def test_the_adapter_alone_is_trained_and_saved(tmp_path: Path) -> None:
    watch, gradients = Rows(), GradientRecorder()
    trainer = fit(
        tmp_path, module(), callbacks=[every_step(tmp_path), watch, gradients], enable_checkpointing=True, max_steps=3
    )
    policy = trainer.lightning_module.policy
    base = load_model(PolicyConfig("tiny")).state_dict()
    now = {
        name.replace(".base_layer", ""): value
        for name, value in policy.model.state_dict().items()
        if "lora_" not in name
    }
    assert now.keys() == base.keys()
    assert all(torch.equal(value, base[name]) for name, value in now.items())  # sampling has merged into copies
    assert {name.removeprefix("policy.model.") for name in gradients.steps[0]} == set(policy.adapter.names)
    assert watch.rows[0]["policy/kl"] == 0
    assert watch.rows[2]["policy/kl"] > 0
    content = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    assert {name.removeprefix("policy.model.") for name in content["state_dict"]} == set(policy.adapter.names)
    moments = [
        value for state in content["optimizer_states"][0]["state"].values() for value in state.values() if value.dim()
    ]
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert sum(value.numel() for value in moments) == 2 * trained
    size = (tmp_path / "step=3.ckpt").stat().st_size
    assert size < 12 * trained + 200_000  # float32, twice more for AdamW, and what is not weights


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_resumed_run_ends_bit_identical(
    step: int, dropout: float, tmp_path: Path, straight: dict[float, Any]
) -> None:
    """Also inside an episode, and into a second pass over it."""
    trainer, folder, rows = straight[dropout]
    watch = Rows()
    again = fit(
        tmp_path,
        two_passes(dropout),
        two_pass_data(),
        callbacks=[watch],
        max_steps=4,
        ckpt_path=folder / f"step={step}.ckpt",
    )
    assert all(torch.equal(value, weights(trainer)[name]) for name, value in weights(again).items())
    mine, theirs = (t.optimizers[0].state_dict()["state"] for t in (again, trainer))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key][name]) for key, state in mine.items() for name, value in state.items())
    assert watch.rows == rows[step:]


def two_passes(dropout: float) -> GRPOLightningModule:
    return module(PolicyConfig("tiny", lora=LoRAConfig(rank=4, dropout=dropout)))


def two_pass_data() -> Any:
    return make_data(num_iterations=2, steps_per_episode=2)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Any]:
    """Runs that nobody stopped, by dropout: trainer, checkpoints, rows."""
    runs = {}
    for dropout in (0.0, 0.2):
        folder, watch = tmp_path_factory.mktemp("straight"), Rows()
        options: dict[str, Any] = {
            "callbacks": [every_step(folder), watch],
            "enable_checkpointing": True,
            "max_steps": 4,
        }
        runs[dropout] = (fit(folder, two_passes(dropout), two_pass_data(), **options), folder, watch.rows)
    return runs


def test_packed_and_padded_runs_have_the_same_gradients(tmp_path: Path) -> None:
    recorded = []
    for scoring in ("packed", "padded"):
        gradients = GradientRecorder()
        policy = PolicyConfig("tiny", lora=LORA, scoring=scoring)  # type: ignore[arg-type]
        fit(
            tmp_path,
            module(policy, optimizer=lambda p: torch.optim.SGD(p, lr=0.05)),
            callbacks=[gradients],
            max_steps=2,
        )
        recorded.append(gradients.steps)
    for packed, padded in zip(*recorded, strict=True):
        assert relative_difference(packed, padded) < 1e-5


def test_the_reference_of_a_loaded_adapter_is_that_adapter(tmp_path: Path) -> None:
    first = fit(tmp_path, module(), max_steps=2).lightning_module
    save_adapter(first.policy, tmp_path / "adapter")
    config = PolicyConfig("tiny", adapter=str(tmp_path / "adapter"))
    options: dict[str, Any] = {
        "callbacks": [every_step(tmp_path), rows := Rows()],
        "enable_checkpointing": True,
        "max_steps": 3,
    }
    straight = fit(tmp_path, module(config), **options)
    assert rows.rows[0]["policy/kl"] == 0
    assert rows.rows[2]["policy/kl"] > 0
    # The checkpoint has the start: the folder may have moved on when the run is resumed.
    other = module()
    other.configure_model()
    save_adapter(other.policy, tmp_path / "adapter")  # type: ignore[arg-type]
    resumed = fit(tmp_path, module(config), ckpt_path=tmp_path / "step=1.ckpt", max_steps=3)
    assert all(torch.equal(value, weights(straight)[name]) for name, value in weights(resumed).items())
    assert torch.load(tmp_path / "step=3.ckpt", weights_only=True)["stateset"]["adapter"]["start"].keys() == set(
        first.policy.adapter.names
    )


def test_other_checkpoints_are_refused_at_the_door(tmp_path: Path) -> None:
    fit(tmp_path, module(), callbacks=[every_step(tmp_path / "lora")], enable_checkpointing=True, max_steps=1)
    fit(tmp_path, make_module(), callbacks=[every_step(tmp_path / "whole")], enable_checkpointing=True, max_steps=1)
    with pytest.raises(ConfigError, match=r"holds an adapter of rank 4 on tiny, and model\.policy has none"):
        fit(tmp_path, make_module(), ckpt_path=tmp_path / "lora" / "step=1.ckpt", max_steps=2)
    with pytest.raises(ConfigError, match="holds a whole model"):
        fit(tmp_path, module(), ckpt_path=tmp_path / "whole" / "step=1.ckpt", max_steps=2)
    with pytest.raises(ConfigError, match="r=2 differs from 4"):
        fit(
            tmp_path,
            module(PolicyConfig("tiny", lora=LoRAConfig(rank=2, alpha=8))),
            ckpt_path=tmp_path / "lora" / "step=1.ckpt",
            max_steps=2,
        )
    other = load_model(PolicyConfig("tiny"))
    with torch.no_grad():
        other.model.norm.weight.mul_(1.1)
    other.save_pretrained(tmp_path / "other")
    module().tokenizer.save_pretrained(tmp_path / "other")
    for run in ("fit", "validate"):
        trainer = make_trainer(tmp_path, max_steps=2, limit_val_batches=1)
        seed_everything(7, verbose=False)
        with pytest.raises(ConfigError, match="is not the model that the checkpoint's adapter was trained on"):
            getattr(trainer, run)(
                module(PolicyConfig(str(tmp_path / "other"), lora=LORA)),
                datamodule=make_data(),
                ckpt_path=tmp_path / "lora" / "step=1.ckpt",
            )


# Sampling
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bf16-mixed"])
def test_samples_are_of_the_adapted_policy(dtype: torch.dtype | None, tiny_tokenizer: Any) -> None:
    runner = module()
    runner.configure_model()
    policy = runner.policy
    assert policy is not None
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    engine = InProcessEngine(tiny_tokenizer, dtype)
    engine.sync(policy)
    prompts = [[20, 31, 42, 53], [64, 75, 86]]
    rollout = engine.generate(prompts, 4, RolloutConfig(num_generations=4, max_new_tokens=8), list(range(8)))
    completions = rollout.completions()
    groups = [Group(prompt, completions[4 * p : 4 * p + 4]) for p, prompt in enumerate(prompts)]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        mine = policy.score_without_gradient(groups)[0]
        with policy.adapter.at_start():  # type: ignore[union-attr]
            base = policy.score_without_gradient(groups)[0]
    assert (rollout.logprobs_T - mine).abs().mean() < (1e-5 if dtype is None else 0.05)
    assert (rollout.logprobs_T - base).abs().mean() > 0.1
    assert all(torch.equal(value, before[name]) for name, value in policy.model.state_dict().items())
    assert all(parameter.dtype == torch.float32 for parameter in policy.parameters())


@pytest.mark.parametrize(
    ("precision", "dtype", "adapter", "base"),
    [
        ("bf16-mixed", None, torch.float32, torch.float32),
        ("bf16-true", None, torch.bfloat16, torch.bfloat16),
        ("32-true", "bfloat16", torch.float32, torch.bfloat16),
    ],
)
def test_lower_precisions_train_what_they_sample(
    precision: str, dtype: Any, adapter: Any, base: Any, tmp_path: Path
) -> None:
    """A mismatch of sampler and trainer above the dtype's float error would end the run."""
    watch = Rows()
    trainer = fit(
        tmp_path,
        module(PolicyConfig("tiny", lora=LORA, dtype=dtype)),
        callbacks=[watch],
        max_steps=2,
        precision=precision,
    )
    policy = trainer.lightning_module.policy
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {adapter}
    assert {p.dtype for p in policy.parameters() if not p.requires_grad} == {base}
    assert watch.rows[0]["policy/kl"] == 0
    assert watch.rows[0]["policy/grad_norm"] > 0
    assert watch.rows[1]["policy/kl"] > 0


# Command line, and what becomes of a checkpoint
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run by the overlay, with a learning rate that moves the answers."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt, "target": "7"}) + "\n" for prompt in PROMPTS)
    )
    config = {
        "seed_everything": 3,
        "model": {
            "policy": {"model_name": "tiny"},
            "reward": [{"class_path": "stateset_lightning.rewards.RegexMatch", "init_args": {"pattern": "^[0-4]+$"}}],
            "rollout": {"num_generations": 8, "max_new_tokens": 4, "temperature": 2.0},
            "algorithm": {"class_path": "stateset_lightning.algorithm.GRPO"},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        },
        "data": {
            "train": "rows.jsonl",
            "validation": "rows.jsonl",
            "predict": "rows.jsonl",
            "batch_size": 4,
            "system_prompt": "Add.",
        },
        "trainer": {
            "max_steps": 2,
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
    overlay = Path(__file__).parents[1] / "configs" / "lora.yaml"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["pytest"])
        main(["fit", "--config", "config.yaml", "--config", str(overlay), "--model.policy.lora.rank=8"])
        main(["export", CHECKPOINT, "adapter"])
        main(["export", CHECKPOINT, "merged", "--merge"])
    return folder


def answers(run: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, *words: str) -> list[str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(prompt + "\n" for prompt in PROMPTS)))
    capsys.readouterr()
    main(["generate", "--device", "cpu", *words])
    lines: list[str] = capsys.readouterr().out.splitlines()
    return lines[-len(PROMPTS) :]


@pytest.mark.slow  # nine commands of the program
def test_greedy_completions_are_the_same_everywhere(run: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    ours = answers(run, capsys, monkeypatch, "--ckpt_path", str(run / CHECKPOINT))
    told = ["--system_prompt", "Add.", "--max_new_tokens", "4"]
    assert ours != answers(run, capsys, monkeypatch, "--ckpt_path", "tiny", *told)
    assert ours == answers(run, capsys, monkeypatch, "--ckpt_path", str(run / "merged"), *told)
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    with_adapter = PeftModel.from_pretrained(load_model(PolicyConfig("tiny")), str(run / "adapter"))
    with_adapter.generation_config = GenerationConfig.from_pretrained(run / "adapter")
    for model in (AutoModelForCausalLM.from_pretrained(run / "merged"), with_adapter):
        theirs = []
        for prompt in PROMPTS:
            messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": prompt}]
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            output = model.generate(**inputs, do_sample=False)
            theirs.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        assert theirs == ours
    monkeypatch.chdir(run)
    main(["predict", "--config", "config.yaml", "--ckpt_path", CHECKPOINT])  # which says nothing of an adapter
    (predictions,) = run.rglob("predictions.jsonl")
    assert [json.loads(line)["completion"] for line in predictions.read_text().splitlines()] == ours
    capsys.readouterr()
    main(["validate", "--config", "runs/task/version_0/config.yaml", "--ckpt_path", CHECKPOINT])
    right = sum(bool(re.fullmatch("[0-4]+", answer)) for answer in ours) / len(ours)
    assert re.search(rf"val/reward\W+{right}", capsys.readouterr().out)


def test_the_exported_adapter_is_small_and_its_card_runs(
    run: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {path.name for path in (run / "adapter").iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "README.md",
    } <= names
    assert not names & {"model.safetensors", "config.json"}
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["r"] == 8
    card = (run / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    monkeypatch.chdir(run / "adapter")
    capsys.readouterr()
    exec(code, {})
    said = capsys.readouterr().out
    main(["generate", "--device", "cpu", "--ckpt_path", str(run / CHECKPOINT), "--prompt", "What is 2 + 2?"])
    assert capsys.readouterr().out.endswith(said)
    assert "library_name: transformers" in (run / "merged" / "README.md").read_text()


def test_the_card_of_an_adapter_says_where_its_model_is_to_be_written(run: Path) -> None:
    trained = load_trained(str(run / CHECKPOINT))
    elsewhere = replace(trained, policy=replace(trained.policy, model_name="/home/me/base"))
    says = "The adapter belongs to `base`. Where that is a folder, write its path below."
    assert says in model_card(elsewhere, "out")
    assert "The adapter belongs to" not in model_card(trained, "out")  # the bundled one is found


@pytest.mark.parametrize(
    "adapted",
    [{"target_modules": ["q_proj", "lm_head"]}, {"peft_kwargs": {"modules_to_save": ["embed_tokens", "lm_head"]}}],
)
def test_an_adapter_on_tied_embeddings_is_exported(adapted: Any, tmp_path: Path, model_folder: Any) -> None:
    policy = PolicyConfig(str(model_folder("qwen2")), lora=LoRAConfig(rank=4, **adapted))
    trainer = fit(tmp_path, module(policy), callbacks=[every_step(tmp_path)], enable_checkpointing=True, max_steps=1)
    model = load_trained(str(tmp_path / "step=1.ckpt")).model
    trained = {n: p for n, p in trainer.lightning_module.policy.model.named_parameters() if p.requires_grad}
    exported = dict(model.named_parameters())
    assert all(torch.equal(exported[name], value) for name, value in trained.items())


def test_what_cannot_be_exported_or_loaded_is_said(run: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["export", "tiny", str(tmp_path / "out"), "--merge"])
    assert "--merge: tiny has no adapter" in capsys.readouterr().err
    content = torch.load(run / CHECKPOINT, weights_only=True)
    name = next(iter(content["state_dict"]))
    torch.save(
        {**content, "state_dict": {k: v for k, v in content["state_dict"].items() if k != name}},
        tmp_path / "short.ckpt",
    )
    with pytest.raises(CheckpointError, match=r"its weights do not fit .*lora_A"):
        load_trained(str(tmp_path / "short.ckpt"))
    content["stateset"]["adapter"]["base"]["digest"] = "0" * 16
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ConfigError, match="is not the model that the checkpoint's adapter was trained on"):
        load_trained(str(tmp_path / "other.ckpt"))


def test_rounding_a_merged_adapter_away_is_announced(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = torch.load(run / CHECKPOINT, weights_only=True)
    content["stateset"]["adapter"]["base"]["dtype"] = "bfloat16"
    for name, weight in content["state_dict"].items():
        weight.mul_(1e-3 if "lora_B" in name else 1)
    torch.save(content, tmp_path / "small.ckpt")
    with caplog.at_level(logging.WARNING, "stateset_lightning"):
        main(
            [
                "export",
                str(tmp_path / "small.ckpt"),
                str(tmp_path / "out"),
                "--merge",
                "--config",
                str(run / "runs/task/version_0/config.yaml"),
            ]
        )
    assert re.search(r"rounding to bfloat16 changes the update by \d+%, exact without --merge", caplog.text)


def test_the_adapter_and_its_own_config_on_the_command_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text((run / "rows.jsonl").read_text())
    words = [
        "fit",
        "--config",
        str(run / "config.yaml"),
        f"--model.policy.adapter={run / 'adapter'}",
        "--trainer.max_steps=1",
    ]
    cli = main(words)
    assert cli is not None
    assert cli.model.policy.model.peft_config["default"].r == 8
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--model.policy.lora.rank=0"])
    assert stopped.value.code == 2
    assert "rank" in (said := capsys.readouterr().err)
    assert "greater than or equal to 1" in said or "at least 1" in said


# Quantized weights
# ----------------------------------------------------------------------------------------------------------------------

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_on_4_bit_weights_is_trained_resumed_and_exported(tmp_path: Path, dtype: Any, capsys: Any) -> None:
    pytest.importorskip("bitsandbytes")
    quantized = {"quantization_config": {**NF4, "bnb_4bit_compute_dtype": dtype}}
    policy = PolicyConfig("tiny", dtype=dtype, lora=LORA, model_kwargs=quantized)

    def run(**options: Any) -> dict[str, torch.Tensor]:
        gradients = GradientRecorder()
        callbacks = [every_step(tmp_path), gradients]
        options = {"callbacks": callbacks, "enable_checkpointing": True, "max_steps": 3, **options}
        trainer = fit(tmp_path, module(policy), make_data(steps_per_episode=2), **options)
        adapter = trainer.lightning_module.policy.adapter
        assert {name.removeprefix("policy.model.") for name in gradients.steps[0]} == set(adapter.names)
        assert all(gradient.any() for name, gradient in gradients.steps[-1].items())
        return weights(trainer)

    expected = run()
    resumed = run(ckpt_path=tmp_path / "step=1.ckpt")
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())
    file, loading = tmp_path / "step=3.ckpt", ["--model_kwargs", json.dumps(quantized)]
    config = {"model": {"policy": {"model_name": "tiny"}}, "data": {}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    words = ["--config", str(tmp_path / "config.yaml"), *loading]
    main(["export", str(file), str(tmp_path / "adapter"), *words])
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    with pytest.raises(SystemExit):
        main(["export", str(file), str(tmp_path / "merged"), "--merge", *words])
    assert "sits on quantized weights: export it without --merge" in capsys.readouterr().err
    model = load_model(PolicyConfig("tiny", model_kwargs=quantized))
    model.save_pretrained(tmp_path / "stored")  # config.json says that it is quantized
    load_tokenizer(PolicyConfig("tiny")).save_pretrained(tmp_path / "stored")
    stored = load_model(PolicyConfig(str(tmp_path / "stored"), lora=LORA))
    assert base_digest(stored) == base_digest(load_model(replace(policy, dtype="float32")))
    with pytest.raises(ConfigError, match=r"its weights are quantized, .* train an adapter, model.policy.lora"):
        fit(tmp_path, module(PolicyConfig(str(tmp_path / "stored"))))


@pytest.mark.parametrize("library", ["torchao", "bitsandbytes"])
def test_weights_quantized_otherwise_are_refused(library: str) -> None:
    pytest.importorskip("bitsandbytes")
    torchao: Any = pytest.importorskip("torchao")
    settings: Any = {"load_in_8bit": True}
    if library == "torchao":
        method = torchao.quantization.Int8WeightOnlyConfig()
        settings = TorchAoConfig(method, modules_to_not_convert=["lm_head"])
    with pytest.raises(ConfigError, match=r"are quantized as .*: use load_in_4bit of bitsandbytes"):
        load_model(PolicyConfig("tiny", lora=LORA, model_kwargs={"quantization_config": settings}))
