"""Modules of version 0.1 that stand in configs people have: an import of the old name works."""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Old name -> the module that it stands for.
STILL_WORKS = {
    "stateset_lightning.policy.schedule": "stateset_lightning.training.schedule",
    "stateset_lightning.sharding": "stateset_lightning.run.fsdp_strategy",
}


class OldNames(MetaPathFinder, Loader):
    """Comes after all other finders, so that it is asked for names alone that nobody else has."""

    def find_spec(self, fullname: str, *_: Any) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in STILL_WORKS else None

    def exec_module(self, module: ModuleType) -> None:
        """Puts the new module in the old one's place."""
        sys.modules[module.__name__] = import_module(STILL_WORKS[module.__name__])
