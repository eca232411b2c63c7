"""Sampling ahead: the next episode's completions are sampled and scored while this episode is trained on.

They come from the policy as it was before this episode: one episode off-policy. The importance weights of the
algorithm's `mismatch` correct for that as for any other difference between sampler and trainer.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from lightning.pytorch import Trainer

from stateset_lightning.data.loader import EpisodeLoader
from stateset_lightning.errors import ConfigError, log
from stateset_lightning.rollout import RemoteEngine, RolloutConfig, RolloutEngine
from stateset_lightning.threads import DaemonThreads, interruptible, wait_for
from stateset_lightning.training.schedule import optimizer_steps_of_run
from stateset_lightning.types import PromptBatch

T = TypeVar("T")


class SamplingAhead(Generic[T]):
    """The sample of one episode at most, being drawn in a thread."""

    def __init__(self) -> None:
        self._episode = -1
        self._future: Future[tuple[T, float]] | None = None
        # a server that hangs must not hold up the end of the program
        self._threads = DaemonThreads(1, "sampling-ahead")

    def start(self, episode: int, draw: Callable[[], T]) -> None:
        """Begins to draw an episode's sample."""
        assert self._future is None, "the sample of one episode is taken before that of another is begun"

        def timed() -> tuple[T, float]:
            begin = time.perf_counter()
            return draw(), time.perf_counter() - begin

        self._episode, self._future = episode, self._threads.submit(timed)

    @interruptible()
    def take(self, episode: int) -> tuple[T, float] | None:
        """The sample of an episode and the seconds that it took; None if it was not begun. Raises what drawing it
        raised.
        """
        future, self._future = self._future, None
        return None if future is None or episode != self._episode else wait_for(future).result()

    @interruptible()
    def wait(self) -> None:
        """Until nothing is being drawn: the engine then may take other weights."""
        if self._future is not None:
            wait_for(self._future)

    def close(self) -> None:
        """Forgets what is being drawn; its thread ends with the requests that are under way. Another run may follow."""
        self._future = None
        self._threads.close(seconds=0)
        self._threads = DaemonThreads(1, "sampling-ahead")


def sampling_ahead(sampling: RolloutConfig, engine: RolloutEngine | None) -> SamplingAhead[Any] | None:
    """For a run that samples ahead; None for one that does not.

    Raises:
        ConfigError: If the engine samples from the very weights that are being trained.
    """
    if not sampling.sampling_ahead:
        return None
    if not isinstance(engine, RemoteEngine):
        cannot = "which the engine in this process cannot, whose weights are the policy's"
        raise ConfigError(f"model.rollout.sampling_ahead=1, {cannot}: set model.engine to a VLLMEngine, or this to 0")
    log.info("model.rollout.sampling_ahead=1: samples are an episode off-policy; a resumed run is not bit-identical")
    return SamplingAhead()


def next_batch(trainer: Trainer) -> PromptBatch | None:
    """The first batch of the episode behind the one that is being served; None where the run ends before it.

    Raises:
        ConfigError: If the loader is none of ours, which alone can be asked.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, EpisodeLoader):
        asks = f"asks the loader for the next prompts, which {type(loader).__name__} cannot say"
        raise ConfigError(f"model.rollout.sampling_ahead=1 {asks}: use a ScenarioDataModule, or set it to 0")
    steps = optimizer_steps_of_run(trainer)
    if steps is not None and trainer.global_step + loader.num_micro_steps // trainer.accumulate_grad_batches >= steps:
        return None
    return loader.next_episode()
