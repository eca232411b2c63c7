"""Lightning callbacks of this package, by the names that configs use."""

from typing import Any

from stateset_lightning.run.callbacks import ConsoleProgress, EpisodeCallback, ReferenceSync, RunSummary
from stateset_lightning.run.samples import PredictionWriter, SampleWriter

__all__ = ["ConsoleProgress", "EpisodeCallback", "PredictionWriter", "ReferenceSync", "RunSummary", "SampleWriter"]


def __getattr__(name: str) -> Any:
    if name == "LiveView":
        from stateset_lightning.moved import GONE

        # Not an AttributeError: Python hides that of a `from ... import` behind a message of its own.
        raise ImportError(f"{__name__}.LiveView is gone: {GONE['callbacks.live_view']}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
