import json
import sys
from pathlib import Path

import pytest
import yaml
from cli_runs import CONFIG


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
