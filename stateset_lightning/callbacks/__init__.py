"""Lightning callbacks: episode hooks, samples and predictions as files, progress in the console, a summary at the
end.
"""

from stateset_lightning.callbacks.console import ConsoleProgress
from stateset_lightning.callbacks.episodes import EpisodeCallback
from stateset_lightning.callbacks.live_view import LiveView
from stateset_lightning.callbacks.reference_sync import ReferenceSync
from stateset_lightning.callbacks.samples import PredictionWriter, SampleWriter
from stateset_lightning.callbacks.summary import RunSummary

__all__ = [
    "ConsoleProgress",
    "EpisodeCallback",
    "LiveView",
    "PredictionWriter",
    "ReferenceSync",
    "RunSummary",
    "SampleWriter",
]
