"""What several tests of this folder start from."""

import pytest
from cli_runs import RUN_CONFIG, start_in


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with a config and rows."""
    start_in(tmp_path, monkeypatch, RUN_CONFIG, 4)
    return tmp_path
