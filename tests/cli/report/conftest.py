"""The folder of a small run."""

from pathlib import Path

import pytest
from report_runs import write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "task" / "version_0"
    write_run(folder)
    return folder
