"""One optimizer step of the demo is read in few files: counted over all threads of the process, callbacks included.

Counted are the files of the package that a step enters, and the pairs of a calling and a called file; calls that pass
through a library in between count as from the last file of ours.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from lightning.pytorch import Callback

import stateset_lightning
from stateset_lightning.cli import main

PACKAGE = str(Path(stateset_lightning.__file__).parent) + "/"
REPOSITORY = Path(__file__).parents[1]
MAX_FILES, MAX_PAIRS = 38, 110


class Tracer:
    """Notes which file calls which, while it is on; in every thread that is started while it is installed."""

    def __init__(self) -> None:
        self.on = False
        self.files: set[str] = set()
        self.pairs: set[tuple[str, str]] = set()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if not self.on or event != "call" or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        called = frame.f_code.co_filename.removeprefix(PACKAGE)
        if called == "data/loader.py":  # the step has ended: the next batch is asked for
            self.on = False
            return
        self.files.add(called)
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(PACKAGE):
            caller = caller.f_back
        if caller is not None and caller.f_code.co_filename != frame.f_code.co_filename:
            self.pairs.add((caller.f_code.co_filename.removeprefix(PACKAGE), called))

    @contextmanager
    def installed(self) -> Iterator[None]:
        before = sys.getprofile()
        threading.setprofile(self)
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(before)
            threading.setprofile(None)


TRACER = Tracer()


class TraceSecondEpisode(Callback):
    """The first one has work that only a run's start has."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        TRACER.on = batch.episode_index == 1

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        TRACER.on = False


@pytest.mark.slow
def test_a_step_of_the_demo_enters_few_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setitem(sys.modules, "test_step_size", sys.modules[__name__])
    TraceSecondEpisode.__module__ = "test_step_size"
    with TRACER.installed():
        main(
            [
                "fit",
                "--config=configs/single_turn.yaml",
                "--trainer.max_steps=3",
                "--baseline=false",
                "--trainer.limit_val_batches=0",
                "--trainer.callbacks+=test_step_size.TraceSecondEpisode",
                f"--trainer.logger.init_args.save_dir={tmp_path}",
            ]
        )
    listed = "\n".join(
        f"{file} -> {', '.join(sorted(called for caller, called in TRACER.pairs if caller == file))}"
        for file in sorted(TRACER.files | {caller for caller, _ in TRACER.pairs})
    )
    with capsys.disabled():
        print(f"\na step of the demo: {len(TRACER.files)} files, {len(TRACER.pairs)} pairs\n{listed}")
    assert "training/step.py" in TRACER.files
    assert "rewards/match.py" in TRACER.files  # other threads are seen, too
    assert len(TRACER.files) <= MAX_FILES
    assert len(TRACER.pairs) <= MAX_PAIRS
