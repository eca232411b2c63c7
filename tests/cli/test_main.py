"""The command line in process: parsing, overlays, saved configs, resuming, and the traps of LightningCLI that it
avoids.
"""

import contextlib
import dataclasses
import importlib
import inspect
import io
import json
import pkgutil
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, get_args, get_origin

import lightning.pytorch  # noqa: F401 (here, so that its log handlers do not hold the stream of the first test)
import pytest
import torch
import yaml

import stateset_lightning
from stateset_lightning.cli.main import main
from stateset_lightning.cli.messages import shorten, without_traceback

CONFIG = {
    "seed_everything": 3,
    "model": {
        "policy": {"model_name": "tiny"},
        "reward": [{"class_path": "stateset_lightning.rewards.ExactMatch"}],
        "rollout": {"num_generations": 2, "max_new_tokens": 3},
        "algorithm": {"class_path": "stateset_lightning.algorithm.DrGRPO"},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}},
    },
    "data": {"train": "rows.jsonl", "batch_size": 2},
    "trainer": {
        "max_steps": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "default_root_dir": "out",
    },
}
CSV_LOGGER = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs", "name": "cli"}}


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A good config in an empty working folder; returns its path."""
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"What is {i} + 1?", "target": str(i + 1)}) + "\n" for i in range(8))
    )
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
    return "config.yaml"


def overlay(name, content):
    Path(name).write_text(yaml.safe_dump(content))
    return name


def printed_config(*args):
    """What --print_config prints, parsed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stopped:
        main([*args, "--print_config"])
    assert stopped.value.code == 0
    return yaml.safe_load(out.getvalue())


def test_fit_returns_what_ran(config):
    before = Path(config).read_text()
    cli = main(["fit", "--config", config])
    assert cli.trainer.global_step == 2
    assert cli.model.rollout.num_generations == 2
    assert Path(config).read_text() == before  # without a logger, runs leave their files beside the user's
    assert Path("out/resolved_config.yaml").exists()


def test_a_printed_config_runs_whatever_was_left_to_its_default(config):
    least = {key: CONFIG["model"][key] for key in ("policy", "reward", "rollout")}
    resolved = printed_config("fit", "--config", overlay("least.yaml", {**CONFIG, "model": least}))
    assert resolved["model"]["algorithm"]["init_args"]["beta"] == 0.04
    cli = main(["fit", "--config", overlay("resolved.yaml", resolved)])
    assert type(cli.model.algorithm).__name__ == "GRPO"
    assert cli.trainer.global_step == 2


def test_both_programs_are_the_same(config):
    for program in (
        [sys.executable, "-m", "stateset_lightning"],
        [str(Path(sys.executable).parent / "stateset-lightning")],
    ):
        done = subprocess.run([*program, "--help"], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("usage: stateset-lightning {fit,validate,test,predict} --config FILE")
    failed = subprocess.run([*program, "fit", "--config", "none.yaml"], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith("stateset-lightning: error: --config none.yaml")


@pytest.mark.slow
def test_the_console_script_ends_with_code_0_and_without_noise(config):
    program = str(Path(sys.executable).parent / "stateset-lightning")
    done = subprocess.run([program, "fit", "--config", config], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "policy: tiny, 1,034,368 parameters, float32, packed scoring" in done.stdout
    for noise in (
        "GPU available",
        "TPU available",
        "litlogger",
        "object at",
        "LightningCLI's args",
        "Params",
        "num_workers",
    ):
        assert noise not in done.stdout + done.stderr


def modules_after(code):
    """Top-level modules that a fresh interpreter has imported when it has run the code."""
    code += "\nimport sys; print('\\n' + ' '.join({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("command", ["", "generate", "export", "report", "convert", "doctor", "completion"])
def test_help_of_the_program_and_its_own_subcommands_imports_nothing_heavy(command):
    args = [command, "--help"] if command else ["--help"]
    run = f"try: main({args})\nexcept SystemExit as end: assert end.code == 0"
    code = f"from stateset_lightning.cli.main import main\n{run}"
    assert not {"torch", "lightning", "transformers", "numpy", "pandas", "datasets", "wandb"} & modules_after(code)


@pytest.mark.slow  # a fresh interpreter imports torch and Lightning
def test_the_command_line_imports_no_library_that_only_some_runs_need():
    some = {
        "wandb",
        "datasets",
        "peft",
        "math_verify",
        "reasoning_gym",
        "openai",
        "tensorboard",
        "vllm",
        "trl",
        "jsonschema",
        "pyarrow",
    }
    assert not some & modules_after("import stateset_lightning.cli.config")


@pytest.mark.slow  # a fresh interpreter builds the parser of `fit`
def test_fit_starts_without_looking_for_garbage_among_what_it_imports(config):
    code = (
        "import gc, sys; from stateset_lightning.cli.main import main\n"
        "sys.argv[1:] = ['fit', '--config', 'config.yaml', '--print_config']\n"
        "try: main()\nexcept SystemExit: print(gc.get_freeze_count(), gc.isenabled())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    frozen, enabled = done.stdout.splitlines()[-1].split()
    assert int(frozen) > 100_000
    assert enabled == "True"


def test_help_is_quick():
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "stateset_lightning", "--help"], capture_output=True, check=True)
    assert time.perf_counter() - start < 20  # 0.3 s on a quiet machine; an import of torch alone takes longer than 2


def test_help_shows_the_docs_of_attributes(config, capsys):  # trap P6
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for text in (
        "Tokens per completion at most",
        "Prompts per episode and device",
        "Share of an episode's completions whose reward may fail",
    ):
        assert text in said


def test_a_printed_config_is_a_config(config):
    printed = printed_config("fit", "--config", config)
    assert printed["model"]["rollout"]["num_generations"] == 2
    assert printed["model"]["reward"][0]["init_args"]["ignore_case"] is False
    again = printed_config("fit", "--config", overlay("printed.yaml", printed))
    assert again == printed


def test_overlays_merge_and_flags_win(config):
    first = overlay("a.yaml", {"model": {"rollout": {"temperature": 0.5, "top_k": 7}}})
    second = overlay("b.yaml", {"model": {"rollout": {"top_k": 9}}, "data": {"batch_size": 4}})
    printed = printed_config("fit", "--config", config, "--config", first, "--config", second, "--data.batch_size", "6")
    assert printed["model"]["rollout"]["temperature"] == 0.5
    assert printed["model"]["rollout"]["top_k"] == 9
    assert printed["model"]["rollout"]["num_generations"] == 2
    assert printed["data"]["batch_size"] == 6


@pytest.mark.parametrize("name", ["GSPO", "RLOO", "SAPO"])
def test_an_algorithm_chosen_over_a_config_has_its_own_defaults(config, name):
    from stateset_lightning import algorithm as algorithms

    path = f"stateset_lightning.algorithm.{name}"
    later = overlay("later.yaml", {"model": {"algorithm": {"class_path": path, "init_args": {"beta": 0.3}}}})
    own = vars(getattr(algorithms, name)())
    for flags in (
        ["--model.algorithm", path, "--model.algorithm.beta", "0.3"],
        ["--model.algorithm", name],
        ["--config", later],
    ):
        given = {"beta": 0.3 if "0.3" in flags or "--config" in flags else 0.0}
        printed = printed_config("fit", "--config", config, *flags)["model"]["algorithm"]
        expected = {key: dataclasses.asdict(own[key]) if key == "kl" else own[key] for key in printed["init_args"]}
        assert printed == {"class_path": path, "init_args": expected | given}


def test_a_scenario_file_is_not_taken_for_a_config(config):
    Path("rows.json").write_text(json.dumps([{"prompt": "What is 1?", "target": "1"}] * 2))
    assert main(["fit", "--config", config, "--data.train", "rows.json"]).datamodule.num_scenarios == {"train": 2}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.rollout.num_generations", "0", "greater than or equal to 2"),
        ("model.rollout.max_new_tokens", "0", "greater than or equal to 1"),
        ("model.rollout.temperature", "-1", "greater than 0"),
        ("model.rollout.top_k", "0", "greater than or equal to 1"),
        ("model.rollout.top_p", "2", "less than or equal to 1"),
        ("model.rollout.min_p", "0", "greater than 0"),
        ("model.rollout.max_batch_rows", "0", "greater than or equal to 1"),
        ("model.reward_timeout", "0", "greater than 0"),
        ("model.reward_concurrency", "0", "greater than or equal to 1"),
        ("model.max_reward_failures", "1.5", "less than or equal to 1"),
        ("model.evaluation.samples", "-1", "greater than or equal to 0"),
        ("model.evaluation.temperature", "0", "greater than 0"),
        ("model.evaluation.top_p", "1.5", "less than or equal to 1"),
        ("model.max_tokens_per_step", "0", "greater than or equal to 1"),
        ("model.max_bad_steps", "-1", "greater than or equal to 0"),
        ("model.rollout.dynamic_sampling", "-1", "greater than or equal to 0"),
        ("model.rollout.sampling_ahead", "2", "less than or equal to 1"),
        ("model.policy.dropout", "1", "less than 1"),
        ("model.policy.head_chunk_tokens", "0", "greater than 0"),
        ("model.policy.lora.rank", "0", "greater than or equal to 1"),
        ("model.policy.lora.alpha", "0", "greater than or equal to 1"),
        ("model.policy.lora.dropout", "1", "less than 1"),
        ("model.algorithm.epsilon_low", "1", "less than 1"),
        ("model.algorithm.epsilon_high", "0", "greater than 0"),
        ("model.algorithm.beta", "-0.1", "greater than or equal to 0"),
        ("model.algorithm.constant_length", "0", "greater than or equal to 1"),
        ("model.lr_scheduler.warmup_steps", "-1", "greater than or equal to 0"),
        ("model.lr_scheduler.final_factor", "2", "less than or equal to 1"),
        ("model.lr_scheduler.total_steps", "0", "greater than or equal to 1"),
        ("data.batch_size", "0", "greater than or equal to 1"),
        ("data.eval_batch_size", "0", "greater than or equal to 1"),
        ("data.num_iterations", "0", "greater than or equal to 1"),
        ("data.steps_per_episode", "0", "greater than or equal to 1"),
        ("data.max_prompt_tokens", "0", "greater than or equal to 1"),
        ("data.validation_fraction", "1", "less than 1"),
        ("samples.every_n_episodes", "0", "greater than or equal to 1"),
        ("samples.num_prompts", "0", "greater than or equal to 1"),
        ("samples.max_tokens", "-1", "greater than or equal to 0"),
        ("samples.max_megabytes", "0", "greater than or equal to 1"),
    ],
)
def test_bounds_are_enforced(config, capsys, key, value, said):
    extra = []
    if key.startswith("model.lr_scheduler"):
        extra = [
            "--config",
            overlay(
                "s.yaml", {"model": {"lr_scheduler": {"class_path": "stateset_lightning.training.schedule.Schedule"}}}
            ),
        ]
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", config, *extra, f"--{key}", value])
    assert stopped.value.code == 2
    assert f"{key}={value}: must be" in (message := capsys.readouterr().err)
    assert said in message


def test_no_bounded_signature_is_read_from_a_string():
    """Under `from __future__ import annotations` jsonargparse 4.53 drops the bounds without a word."""
    bounded = 0
    for found in pkgutil.walk_packages(stateset_lightning.__path__, "stateset_lightning."):
        if found.name.endswith("__main__"):
            continue
        module = importlib.import_module(found.name)
        source = inspect.getsource(module)
        if found.name == "stateset_lightning.errors":  # talks of bounds, has none
            continue
        uses_bounds = re.search(r"Annotated\[[^\]]*\b(Ge|Gt|Le|Lt)\(", source)
        bounded += bool(uses_bounds)
        assert not (uses_bounds and re.search(r"^from __future__ import annotations$", source, re.MULTILINE)), (
            found.name
        )
    assert bounded >= 8


def test_every_bounded_key_stands_in_the_table_above():
    """A new bounded option of module, data or rollout needs a row: the parser must know its bound."""
    from stateset_lightning.datamodule import ScenarioDataModule
    from stateset_lightning.evaluation import EvaluationConfig
    from stateset_lightning.module import GRPOLightningModule
    from stateset_lightning.rollout import RolloutConfig

    table = {row[0] for row in test_bounds_are_enforced.pytestmark[0].args[1]}

    def is_bounded(hint):
        return get_origin(hint) is Annotated or any(get_origin(part) is Annotated for part in get_args(hint))

    for prefix, cls in (("data", ScenarioDataModule), ("model", GRPOLightningModule)):
        for name, parameter in inspect.signature(cls).parameters.items():
            assert not is_bounded(parameter.annotation) or f"{prefix}.{name}" in table
    for key, cls in (("rollout", RolloutConfig), ("evaluation", EvaluationConfig)):
        for field in dataclasses.fields(cls):
            assert not is_bounded(field.type) or f"model.{key}.{field.name}" in table


def with_checkpoints(tmp_name="ck.yaml", **model):
    checkpoints = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"save_last": True, "every_n_train_steps": 1},
    }
    trainer = {"logger": CSV_LOGGER, "enable_checkpointing": True, "callbacks": [checkpoints]}
    return overlay(tmp_name, {"trainer": trainer, "model": model})


LAST = "runs/cli/version_0/checkpoints/last.ckpt"


@pytest.mark.parametrize("schedule", [None, "constant", "cosine"])
def test_a_learning_rate_given_on_resume_wins_over_the_checkpoint(config, schedule):  # trap P1
    model = (
        {
            "lr_scheduler": {
                "class_path": "stateset_lightning.training.schedule.Schedule",
                "init_args": {"decay": schedule},
            }
        }
        if schedule
        else {}
    )
    extra = ["--config", with_checkpoints(**model)]
    main(["fit", "--config", config, *extra])
    flags = ["--ckpt_path", LAST, "--trainer.max_steps", "4", "--model.optimizer.init_args.lr", "3e-6"]
    cli = main(["fit", "--config", config, *extra, *flags, "--model.optimizer.init_args.weight_decay", "0.25"])
    group = cli.trainer.optimizers[0].param_groups[0]
    assert group["weight_decay"] == 0.25
    rates = [float(row["lr"]) for row in csv_rows("runs/cli/version_0/metrics.csv") if row.get("lr")]
    assert len(rates) == 4  # the run goes on in its file
    rates = rates[2:]
    if schedule == "cosine":
        assert rates == pytest.approx([3e-6 * 0.5, 3e-6 * 0.5 * (1 - 0.5**0.5)])  # steps 2 and 3 of 4
        assert group["initial_lr"] == 3e-6
    else:
        assert rates == [3e-6, 3e-6]
    assert (
        yaml.safe_load(Path("runs/cli/version_0/config.yaml").read_text())["model"]["optimizer"]["init_args"]["lr"]
        == 3e-6
    )


def test_a_resume_without_a_new_rate_keeps_the_schedule(config):
    model = {"lr_scheduler": {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.5}}}
    extra = ["--config", with_checkpoints(**model)]
    main(["fit", "--config", config, *extra])
    cli = main(["fit", "--config", config, *extra, "--ckpt_path", LAST, "--trainer.max_steps", "3"])
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4 * 0.5**3)


def csv_rows(path):
    import csv

    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_optimizer_is_built_after_the_weights(config):  # trap P2
    cli = main(["fit", "--config", config, "--trainer.max_steps", "1"])
    trained = sum(p.numel() for group in cli.trainer.optimizers[0].param_groups for p in group["params"])
    assert trained == sum(p.numel() for p in cli.model.policy.parameters()) > 1_000_000
    with pytest.raises(SystemExit):
        main(["fit", "--config", config, "--optimizer", "SGD"])  # LightningCLI's own key does not exist


def test_two_offline_wandb_runs_keep_their_own_configs(config, monkeypatch):  # trap P3
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = {
        "class_path": "lightning.pytorch.loggers.WandbLogger",
        "init_args": {"project": "p", "save_dir": "w", "offline": True},
    }
    extra = ["--config", overlay("w.yaml", {"trainer": {"logger": logger, "enable_checkpointing": True}})]
    folders = []
    for lr in ("1e-5", "1e-6"):
        cli = main(
            ["fit", "--config", config, *extra, "--trainer.max_steps", "1", "--model.optimizer.init_args.lr", lr]
        )
        folder = Path("w/p") / cli.trainer.logger.version
        saved = yaml.safe_load((folder / "config.yaml").read_text())
        assert saved["model"]["optimizer"]["init_args"]["lr"] == float(lr)
        assert (folder / "samples.jsonl").exists()
        assert list((folder / "checkpoints").glob("*.ckpt"))
        folders.append(folder)
        wandb.finish()
    assert folders[0] != folders[1]


def test_fast_dev_run_leaves_no_files(config):  # trap P5: it switches loggers, checkpoints and the saved config off
    cli = main(["fit", "--config", config, "--config", with_checkpoints(), "--trainer.fast_dev_run", "true"])
    assert cli.trainer.global_step == 1
    assert not Path("runs").exists()


def test_a_baseline_is_validated_before_training(config, capsys):
    main(
        [
            "fit",
            "--config",
            config,
            "--data.validation",
            "rows.jsonl",
            "--baseline",
            "true",
            "--trainer.val_check_interval",
            "1",
        ]
    )
    said = capsys.readouterr().out
    assert re.search(r"validation reward: [\d.]+ after step 0 -> [\d.]+ after step 2", said)


def test_predict_writes_one_line_per_scenario(config):
    main(["predict", "--config", config, "--data.predict", "rows.jsonl", "--predictions.path", "answers.jsonl"])
    rows = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"rows:{i}" for i in range(1, 9)]
    assert rows[0]["prompt"] == "What is 0 + 1?"
    for row in rows:
        assert set(row) >= {"id", "prompt", "completion", "reward", "rewards", "finish_reason", "num_tokens"}
        assert row["finish_reason"] in ("stop", "length")
        assert set(row["rewards"]) == {"exact_match"}


@pytest.mark.parametrize("command", ["validate", "test"])
def test_validate_and_test_report_the_reward(config, command, capsys):
    split = "validation" if command == "validate" else "test"
    cli = main([command, "--config", config, f"--data.{split}", "rows.jsonl"])
    stage = "val" if command == "validate" else "test"
    assert 0 <= float(cli.trainer.callback_metrics[f"{stage}/reward"]) <= 1
    assert f"{stage}/reward" in capsys.readouterr().out


def test_a_checkpoint_is_evaluated(config):
    main(["fit", "--config", config, "--config", with_checkpoints(), "--model.optimizer.init_args.lr", "0.01"])
    cli = main(["validate", "--config", config, "--data.validation", "rows.jsonl", "--ckpt_path", LAST])
    saved = torch.load(LAST, weights_only=True)["state_dict"]
    name, weight = next(iter(cli.model.state_dict().items()))
    assert torch.equal(weight, saved[name])


def test_unknown_wording_is_cut_not_lost():
    assert shorten("first\n\n second\nthird\nfourth\nfifth") == "first\n  second\n  third\n  fourth"
    assert len(shorten("x" * 1000)) == 300


def test_a_traceback_is_cut_to_the_users_last_place():
    package = Path(stateset_lightning.__file__).parent
    trace = f'File "/a/mine.py", line 3, in score\n  1 / 0\nFile "{package}/rewards/text.py", line 9, in target_of\n'
    said = without_traceback("It failed.\nTraceback (most recent call last):\n" + trace)
    assert said == "It failed.\n  raised at /a/mine.py:3, in score"
    assert without_traceback("no trace") == "no trace"
