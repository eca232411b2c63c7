"""Old names of modules that configs hold: they work."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest

import stateset_lightning.moved as moved


@pytest.fixture(autouse=True)
def only_this_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the finder of an editable installation, which may know another tree that still has the old names."""
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", "")])


@pytest.mark.parametrize("old", moved.STILL_WORKS)
def test_a_name_that_configs_hold_is_the_new_module(old: str) -> None:
    new = import_module(moved.STILL_WORKS[old])
    assert import_module(old) is new
    assert new.__name__ == moved.STILL_WORKS[old]


def test_a_name_that_never_was_is_pythons_own_error() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'stateset_lightning\.nothing'"):
        import_module("stateset_lightning.nothing")
