"""Lightning callbacks of this package, by the names that configs use."""

from stateset_lightning.run.callbacks import ConsoleProgress, EpisodeCallback, ReferenceSync, RunSummary
from stateset_lightning.run.samples import PredictionWriter, SampleWriter

__all__ = ["ConsoleProgress", "EpisodeCallback", "PredictionWriter", "ReferenceSync", "RunSummary", "SampleWriter"]
