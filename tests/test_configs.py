"""Every configuration under configs/ parses, prints itself as a valid config, and trains."""

import contextlib
import io
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch  # noqa: F401 (here, so that its log handlers do not hold the stream of the first test)
import pytest
import torch
import yaml
from guide_yaml import GUIDE

from stateset_lightning.cli.main import main
from stateset_lightning.data.hub import is_hub_id

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs"
OVERLAYS = {"bf16.yaml", "ddp.yaml", "fsdp2.yaml", "wandb.yaml"}
MODEL_OVERLAYS = {"gpu.yaml", "lora.yaml", "multi_turn.yaml", "vllm.yaml"}
CLASSES = {"adamw8bit.yaml", "distillation.yaml"}  # put another class in a base's place
BASES = sorted(path.name for path in FOLDER.glob("*.yaml") if path.name not in OVERLAYS | MODEL_OVERLAYS | CLASSES)


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    """Paths in the configs are relative to the project's folder."""
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.chdir(ROOT)


def printed_config(*names):
    out = io.StringIO()
    configs = [part for name in names for part in ("--config", str(name))]
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stopped:
        main(["fit", *configs, "--print_config"])
    assert stopped.value.code == 0
    return yaml.safe_load(out.getvalue())


def stand_in(data, folder):
    """The training data of a config; in place of one of the hub, a file with the columns that the config names."""
    if Path(data["train"]).exists():
        return data["train"]
    assert is_hub_id(data["train"])
    file = folder / "of_the_hub.jsonl"
    rows = [{column: f"{ours} {i} #### {i}" for ours, column in data["fields"].items()} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize("name", BASES)
def test_a_base_config_prints_itself(name, tmp_path):
    printed = printed_config(FOLDER / name)
    assert printed["model"]["policy"]["model_name"] == "tiny"  # every config runs offline as it stands
    (tmp_path / "printed.yaml").write_text(yaml.safe_dump(printed))
    assert printed_config(tmp_path / "printed.yaml") == printed


@pytest.mark.parametrize("name", sorted(OVERLAYS))
def test_an_overlay_changes_only_what_it_says(name):
    base, changed = (
        printed_config(FOLDER / "single_turn.yaml"),
        printed_config(FOLDER / "single_turn.yaml", FOLDER / name),
    )
    overlay = yaml.safe_load((FOLDER / name).read_text())
    assert list(overlay) == ["trainer"]
    for key in {*base["trainer"], *changed["trainer"]} - set(overlay["trainer"]):
        assert changed["trainer"][key] == base["trainer"][key]
    assert {**changed, "trainer": None} == {**base, "trainer": None}
    for key, value in overlay["trainer"].items():
        given = changed["trainer"][key]
        assert given == value if not isinstance(value, dict) else given["class_path"] == value["class_path"]


@pytest.fixture
def torchao(monkeypatch):
    """In place of the library: an AdamW by the name and with the options of its 8-bit one."""

    class AdamW8bit(torch.optim.AdamW):
        def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                     weight_decay: float = 1e-2, amsgrad: bool = False, *, block_size: int = 256,
                     bf16_stochastic_round: bool = False) -> None:  # fmt: skip
            super().__init__(params, lr, betas, eps, weight_decay, amsgrad)

    AdamW8bit.__module__ = "torchao.optim"
    module = ModuleType("torchao.optim")
    module.AdamW8bit = AdamW8bit
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.optim", module)


@pytest.mark.parametrize("name", sorted(MODEL_OVERLAYS))
def test_an_overlay_of_several_parts_changes_only_what_it_says(name):
    base, changed = (
        printed_config(FOLDER / "single_turn.yaml"),
        printed_config(FOLDER / "single_turn.yaml", FOLDER / name),
    )

    def check(given, before, now):
        for key in {*(before or {}), *now}:
            if isinstance(given.get(key), dict):
                check(given[key], (before or {}).get(key), now[key])
            elif key in given:
                assert now[key] == given[key]
            elif before is not None:
                assert now[key] == before[key]

    overlay = yaml.safe_load((FOLDER / name).read_text())
    assert {*overlay} <= {"model", "data", "trainer"}
    check(overlay, base, changed)


def test_without_torchao_the_overlay_says_what_is_missing(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *(f"--config={FOLDER / name}" for name in ("single_turn.yaml", "adamw8bit.yaml"))])
    assert stopped.value.code == 2
    assert re.search(r"model\.optimizer.*torchao", capsys.readouterr().err)


@pytest.mark.parametrize("name", BASES)
def test_every_key_of_a_config_is_one(name):
    """None of ours is swallowed by a catch-all: it comes back with its value."""

    def check(given, resolved, path):
        for key, value in given.items():
            assert key in resolved, f"{path}{key}"
            if isinstance(value, dict) and isinstance(resolved[key], dict):
                check(value, resolved[key], f"{path}{key}.")
            elif not isinstance(value, list):
                assert resolved[key] == value, f"{path}{key}"

    check(yaml.safe_load((FOLDER / name).read_text()), printed_config(FOLDER / name), "")


def test_every_key_of_the_reference_config_is_explained():
    structural = ("class_path:", "init_args:", "auto_insert_metric_name:", "mode:", "name: single_turn")
    for line in (FOLDER / "single_turn.yaml").read_text().splitlines():
        key = line.split("#")[0].strip().removeprefix("- ")
        if key and not key.endswith(":") and not key.startswith(structural):
            assert "#" in line, line


EXAMPLES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "examples").rglob("config.yaml"))


@pytest.mark.parametrize("name", [*(f"configs/{name}" for name in BASES), *EXAMPLES, "convert"])
def test_a_config_keeps_a_last_checkpoint_of_the_last_five_minutes(name, tmp_path):
    """Also before its first validation, and where validation is rare: it monitors nothing."""
    file = ROOT / name
    if name == "convert":
        (tmp_path / "guide.yaml").write_text(GUIDE)
        file = tmp_path / "ours.yaml"
        main(["convert", str(tmp_path / "guide.yaml"), "-o", str(file)])
    keeps = [callback["init_args"] for callback in printed_config(file)["trainer"]["callbacks"]]
    last = [options for options in keeps if options.get("save_last")]
    assert [(options["train_time_interval"], options["monitor"]) for options in last] == [("0:05:00", None)]


@pytest.mark.parametrize("name", BASES)
def test_a_config_trains(name, tmp_path):
    checkpoints = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"every_n_train_steps": 2, "save_last": True},
    }
    small = {
        "baseline": False,
        "data": {
            "batch_size": 2,
            "train": stand_in(yaml.safe_load((FOLDER / name).read_text())["data"], tmp_path),
        },
        "model": {"rollout": {"num_generations": 2, "max_new_tokens": 4}},
        "trainer": {
            "max_steps": 2,
            "accelerator": "cpu",
            "limit_val_batches": 0,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(tmp_path), "name": "run"},
            },
            "callbacks": [checkpoints],
        },
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    cli = main(["fit", "--config", str(FOLDER / name), "--config", str(tmp_path / "small.yaml")])
    run = tmp_path / "run" / "version_0"
    assert cli.trainer.global_step == 2
    assert (run / "checkpoints" / "last.ckpt").exists()
    assert (run / "config.yaml").exists()
    assert "train/reward" in (run / "metrics.csv").read_text().splitlines()[0]
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4  # two groups of two, of the first episode
    assert not cli.datamodule.dropped["train"]  # no row is lost


@pytest.fixture
def one_step(tmp_path):
    """An overlay for one small step that leaves no files."""
    small = {
        "baseline": False,
        "data": {"batch_size": 2},
        "model": {"rollout": {"num_generations": 2, "max_new_tokens": 4}},
        "trainer": {
            "max_steps": 1,
            "accelerator": "cpu",
            "limit_val_batches": 0,
            "logger": False,
            "callbacks": None,
            "default_root_dir": str(tmp_path),
        },
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    return tmp_path / "small.yaml"


def test_the_overlay_of_distillation_trains_on_a_teacher_that_is_the_policy(one_step):
    files = [FOLDER / "single_turn.yaml", FOLDER / "distillation.yaml", one_step]
    cli = main(["fit", *(f"--config={file}" for file in files)])
    assert cli.trainer.global_step == 1
    assert abs(cli.model.metrics.last["policy/divergence"]) < 1e-6


def test_the_overlays_of_a_gpu_train_together(one_step, torchao):
    files = [FOLDER / "single_turn.yaml", FOLDER / "gpu.yaml", FOLDER / "adamw8bit.yaml", one_step]
    try:
        cli = main(["fit", *(f"--config={file}" for file in files)])
    finally:
        torch.set_float32_matmul_precision("highest")
    options = cli.trainer.optimizers[0].param_groups[0]
    assert (options["initial_lr"], options["weight_decay"]) == (1e-4, 0.0)
    assert cli.trainer.global_step == 1
    assert cli.datamodule.steps_per_episode == cli.trainer.accumulate_grad_batches == 1
