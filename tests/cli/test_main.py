"""The command line as a program: its commands, its help, and what they import."""

import json
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch  # noqa: F401 (here, so that its log handlers do not hold the stream of the first test)
import pytest
import torch
from cli_runs import LAST, with_checkpoints

from stateset_lightning.cli.main import main


def test_fit_returns_what_ran(config):
    before = Path(config).read_text()
    cli = main(["fit", "--config", config])
    assert cli.trainer.global_step == 2
    assert cli.model.rollout.num_generations == 2
    assert Path(config).read_text() == before  # without a logger, runs leave their files beside the user's
    assert Path("out/resolved_config.yaml").exists()


def test_both_programs_are_the_same(config):
    for program in (
        [sys.executable, "-m", "stateset_lightning"],
        [str(Path(sys.executable).parent / "stateset-lightning")],
    ):
        done = subprocess.run([*program, "--help"], capture_output=True, text=True, check=True)
        assert "usage: stateset-lightning {fit,validate,test,predict} --config FILE" in done.stdout
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


@pytest.mark.parametrize("command", ["", "generate", "export", "report", "convert", "doctor"])
def test_help_of_the_program_and_its_own_subcommands_imports_nothing_heavy(command):
    args = [command, "--help"] if command else ["--help"]
    code = f"from stateset_lightning.cli.main import main\ntry: main({args})\n"
    code += "except SystemExit as end: assert end.code == 0"
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
