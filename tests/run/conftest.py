"""What several tests of this folder start from."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from run_of_cli import CONFIG


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with a config and rows."""
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"What is {i} + 1?", "target": str(i + 1)}) + "\n" for i in range(4))
    )
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path
