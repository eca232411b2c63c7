"""What a run ran on, as the command line writes it beside the config."""

import json
import platform
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
import yaml

from stateset_lightning.cli.main import main
from stateset_lightning.run.system import PACKAGES, environment


def test_it_names_versions_and_hardware_and_no_machine():
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cpu")), world_size=2, precision="bf16-mixed"
    )
    found = environment(trainer)
    assert (found["device"], found["devices"], found["precision"], found["strategy"]) == (
        "cpu",
        2,
        "bf16-mixed",
        "SimpleNamespace",
    )
    assert found["torch"] == version("torch")
    assert found["python"] == platform.python_version()
    assert (
        platform.node()
        not in json.dumps({name: value for name, value in found.items() if name not in PACKAGES.split()})
        or not platform.node()
    )


@pytest.mark.slow  # a run of the command line
def test_fit_writes_it_and_the_report_is_made_of_what_fit_wrote(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"What is {i} + 1?", "target": str(i + 1)} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {
            "policy": {"model_name": "tiny"},
            "reward": [{"class_path": "stateset_lightning.rewards.ExactMatch"}],
            "rollout": {"num_generations": 2, "max_new_tokens": 3},
        },
        "data": {"train": "rows.jsonl", "batch_size": 2},
        "trainer": {
            "max_steps": 2,
            "max_epochs": -1,
            "accelerator": "cpu",
            "enable_checkpointing": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": "runs", "name": "r"},
            },
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "config.yaml"])
    run = tmp_path / "runs" / "r" / "version_0"
    written = json.loads((run / "environment.json").read_text())
    assert written["stateset-lightning"] == version("stateset-lightning")
    capsys.readouterr()
    main(["report", str(run)])
    page = (run / "report.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["missing"] == []
    assert data["metrics"]["train/reward"][0] == [1, 2]
    assert [len(group["completions"]) for group in data["train"]] == [2, 2]  # of the first episode
    assert data["environment"] == written
    assert data["facts"] == {"model": "tiny", "algorithm": "GRPO", "reward": "ExactMatch", "data": "rows.jsonl"}
