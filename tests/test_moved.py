"""Old names of modules that configs hold: they work, or say what replaces them."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec

import pytest

import stateset_lightning.moved as moved


@pytest.fixture(autouse=True)
def only_this_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the finder of an editable installation, which may know another tree that still has the old names."""
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", "")])


@pytest.mark.parametrize("old", moved.STILL_WORKS)
def test_a_name_that_configs_hold_is_the_new_module(old: str) -> None:
    new = import_module(f"stateset_lightning.{moved.STILL_WORKS[old]}")
    assert import_module(f"stateset_lightning.{old}") is new
    assert new.__name__ == f"stateset_lightning.{moved.STILL_WORKS[old]}"


@pytest.mark.parametrize("old", moved.GONE)
def test_a_name_that_is_gone_says_what_replaces_it(old: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="stateset_lightning") as caught:
        import_module(f"stateset_lightning.{old}")
    assert moved.GONE[old] in str(caught.value)


@pytest.mark.parametrize("new", sorted(moved.STILL_WORKS.values()))
def test_what_replaces_a_name_is_there(new: str) -> None:
    assert find_spec(f"stateset_lightning.{new}") is not None


def test_a_name_that_never_was_is_pythons_own_error() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'stateset_lightning\.nothing'"):
        import_module("stateset_lightning.nothing")
