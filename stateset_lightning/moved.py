"""Modules of version 0.1 that stand in configs people have: an import of the old name works, or says why not."""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = "stateset_lightning."

# Old name -> the module that it stands for.
STILL_WORKS = {"policy.schedule": "training.schedule", "sharding": "run.fsdp_strategy"}

# Old name -> what to use instead.
GONE = {
    "callbacks.live_view": "Lightning's progress bars show a run live, `stateset-lightning report` shows it as a page",
    "rewards.retry": "retry inside the reward, with the library tenacity, say; a ModelJudge retries by itself",
}


class _OldNames(MetaPathFinder, Loader):
    """Comes after all other finders, so that it is asked for names alone that nobody else has."""

    def find_spec(self, fullname: str, *_: Any) -> ModuleSpec | None:
        name = fullname.removeprefix(PACKAGE) if fullname.startswith(PACKAGE) else ""
        if name in GONE:
            raise ModuleNotFoundError(f"{fullname} is gone: {GONE[name]}", name=fullname)
        return ModuleSpec(fullname, self) if name in STILL_WORKS else None

    def exec_module(self, module: ModuleType) -> None:
        """Puts the new module in the old one's place."""
        sys.modules[module.__name__] = import_module(PACKAGE + STILL_WORKS[module.__name__.removeprefix(PACKAGE)])


def install() -> None:
    """Makes the old names known to `import`, once."""
    if not any(isinstance(finder, _OldNames) for finder in sys.meta_path):
        sys.meta_path.append(_OldNames())
