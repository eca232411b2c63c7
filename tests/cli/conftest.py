import pytest
from cli_runs import CONFIG, start_in


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A good config in a working folder with its rows; returns its path."""
    start_in(tmp_path, monkeypatch, CONFIG, 8)
    return "config.yaml"
