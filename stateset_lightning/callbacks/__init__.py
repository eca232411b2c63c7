"""Lightning callbacks of this package, by the names that configs use."""

from typing import Any

# `X as X`: this is exported, to type checkers as well (PEP 484).
from stateset_lightning.run.callbacks import EpisodeCallback as EpisodeCallback
from stateset_lightning.run.callbacks import ReferenceSync as ReferenceSync
from stateset_lightning.run.callbacks import RunSummary as RunSummary
from stateset_lightning.run.progress import ConsoleProgress as ConsoleProgress
from stateset_lightning.run.samples import PredictionWriter as PredictionWriter
from stateset_lightning.run.samples import SampleWriter as SampleWriter


def __getattr__(name: str) -> Any:
    if name == "LiveView":
        from stateset_lightning.moved import GONE

        # Not an AttributeError: Python hides that of a `from ... import` behind a message of its own.
        raise ImportError(f"{__name__}.LiveView is gone: {GONE['callbacks.live_view']}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
