"""Every way to save, stopped at every moment: no optimizer step is lost, and the end is that of a run left alone.

    python benchmarks/saves.py [--cases 40] [--config-cases 4] [--seed 1]

A case is a set of options of ModelCheckpoint and of validation, and a moment: SIGKILL, SIGTERM or Ctrl-C in sampling,
scoring, update, save, validation or the last step, or the normal end of a shorter run. The run is stopped there, every
other one again while it resumes, and then resumed by `--ckpt_path last` to its end. Checked are

- what it resumes from: the step at which a signal or the normal end came; after SIGKILL no older step than the newest
  at which the options allow a save;
- its end, bit by bit: weights, optimizer, loader, every logged metric but time and memory, every sample.

Each set of options meets one moment; all of them take three quarters of an hour, and `--cases` draws some. The same
moments, and the baseline, stop `configs/single_turn.yaml` on the command line as it is, but for its length and sizes,
by a clock that runs fast. Attempts are forks, as in kill_test.py.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import kill_test
import torch
from kill_test import SCENARIOS, EvenDigits, Kill, Settings, differences, end_state, fit_reference, pass_by
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from stateset_lightning import GRPOLightningModule, RolloutConfig, ScenarioDataModule
from stateset_lightning.algorithm import Clipped
from stateset_lightning.callbacks import SampleWriter
from stateset_lightning.policy import PolicyConfig, load_model
from stateset_lightning.rewards.scorer import ScoringSession
from stateset_lightning.run.find_checkpoint import continue_run
from stateset_lightning.training.collect import Sampler

STEPS = 9
"""Optimizer steps; four are an epoch, two an episode, and each has two micro-steps."""

MONITORS = (None, "val/reward", "val/num_completions")
"""The last one never gets better: a plateau."""

TRIGGERS: tuple[dict[str, Any], ...] = (
    {},
    {"every_n_epochs": 2},
    {"every_n_train_steps": 1},
    {"every_n_train_steps": 4},
    {"train_time_interval": timedelta(0)},
)

VALIDATIONS: dict[str, dict[str, Any]] = {
    "each epoch": {},
    "every other epoch": {"check_val_every_n_epoch": 2},
    "in epochs": {"val_check_interval": 0.5},
    "by steps": {"val_check_interval": 4, "check_val_every_n_epoch": None},
    "inside steps": {"val_check_interval": 3, "check_val_every_n_epoch": None},
    "at the end": {"val_check_interval": 2 * STEPS, "check_val_every_n_epoch": None},
    "never": {"limit_val_batches": 0},
}

PLACES = (
    (Sampler, "sample", "sampling"),
    (ScoringSession, "submit", "scoring"),
    (GRPOLightningModule, "training_step", "micro-step"),
    (GRPOLightningModule, "on_before_optimizer_step", "optimizer step"),
    (GRPOLightningModule, "validation_step", "validation"),
    (GRPOLightningModule, "on_validation_epoch_end", "end of validation"),
)
"""Methods of a run, and what the place is called that each comes by."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)

MOMENTS: tuple[Kill | None, ...] = (
    None,
    *(
        Kill(place, count, 0, 0, sent)
        for place, counts in {
            "sampling": (2, 4),
            "scoring": (20, 55),
            "micro-step": (4, 9, 17),  # in an epoch, at the start of its second, in the last step
            "optimizer step": (4, 5, 9),  # at the end of an epoch, after it, the last
            "validation": (1, 2, 4),
            "end of validation": (1, 2),
            "half a file": (1, 3),
            "before the rename": (2,),
            "after the rename": (1, 4),
        }.items()
        for count in counts
        for sent in SIGNALS
    ),
)
"""None: the run is a shorter one, and ends by itself."""


@dataclass(frozen=True)
class Case:
    """Options and a moment."""

    saves: dict[str, Any]
    validation: str
    moment: Kill | None
    again: bool = False
    """Whether the first resume is stopped as well, in its first validation."""

    def __str__(self) -> str:
        at = "the end of a shorter run"
        if self.moment is not None:
            at = f"{signal.Signals(self.moment.sent).name} at {self.moment.place} {self.moment.count}"
        return f"{self.saves}, validation {self.validation}, {at}" + (", twice" if self.again else "")


@dataclass
class Story:
    """What the attempts of a case wrote down: (what, step) each."""

    file: Path
    seen: list[tuple[str, int]] = field(default_factory=list)

    def read(self) -> list[tuple[str, int]]:
        """What the newest attempt wrote."""
        lines = [line.split("\t") for line in self.file.read_text().splitlines()] if self.file.exists() else []
        everything = [(what, int(step)) for what, step in lines]
        new, self.seen = everything[len(self.seen) :], everything
        return new


def all_cases() -> Iterator[Case]:
    """Every set of options that Lightning takes and that can save, each with one of the moments."""
    tops = {None: (0, 1, -1)}
    numbers = itertools.count()
    for monitor, last, trigger, validation, at_epoch_end in itertools.product(
        MONITORS, (True, "link"), TRIGGERS, VALIDATIONS, (None, True, False)
    ):
        for top in tops.get(monitor, (0, 1, 2, -1)):
            if monitor is not None and validation in ("never", "at the end") and trigger.get("every_n_epochs", 1) > 1:
                continue
            if monitor is not None and (validation == "never" or (at_epoch_end and validation == "at the end")):
                continue  # refused, or a metric that comes after its only use
            saves = {"save_last": last, "save_top_k": top, "save_on_train_epoch_end": at_epoch_end, **trigger}
            if monitor is not None:
                saves |= {"monitor": monitor, "mode": "max"}
            number = next(numbers)
            yield Case(saves, validation, MOMENTS[number % len(MOMENTS)], again=number % 2 == 0)


def case_of_config(moment: Kill | None, again: bool) -> Case:
    """Of the reference config, which has its own options."""
    return Case({"config": "single_turn.yaml"}, "by steps", moment, again)


# A run ----------------------------------------------------------------------------------------------------------------


def run_case(folder: Path, settings: Settings, started: int | None, *, case: Case) -> None:
    """From its newest checkpoint, if there is one."""
    seed_everything(7, verbose=False)
    module = GRPOLightningModule(
        PolicyConfig("tiny", dropout=0.1),
        reward=EvenDigits(),
        rollout=RolloutConfig(num_generations=4, max_new_tokens=4),
        algorithm=Clipped(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    )
    data = ScenarioDataModule(
        SCENARIOS[:8], SCENARIOS[:4], batch_size=4, eval_batch_size=2, num_iterations=2, steps_per_episode=2
    )
    trainer = Trainer(
        max_steps=settings.steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        accumulate_grad_batches=2,
        logger=CSVLogger(folder, "run"),
        callbacks=[SampleWriter(1), ModelCheckpoint(filename="{step}", **case.saves)],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        **VALIDATIONS[case.validation],
    )
    observe(trainer, folder)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=continue_run(trainer, "last"))
    finally:
        note(folder, "stopped", trainer.global_step)
    save_end(trainer, folder)


def run_config(folder: Path, settings: Settings, started: int | None) -> None:
    """The reference config."""
    save_end(fit_reference(folder, settings.steps, partial(observe, folder=folder)), folder)


def observe(trainer: Trainer, folder: Path) -> None:
    """Comes by the places, and notes what would be an opportunity to save."""
    come_by(PLACES)
    owed: list[str] = []

    def seen(what: str, *ignored: Any) -> None:
        if trainer.state.fn != "fit":
            return
        owed.append(what)
        if not trainer.lightning_module.inside_optimizer_step:
            for each in owed:
                note(folder, each, trainer.global_step)
            owed.clear()

    # The module's hooks come after those of callbacks; an epoch's saves are over when the next one starts.
    GRPOLightningModule.on_train_start = after(  # type: ignore[method-assign]
        GRPOLightningModule.on_train_start, lambda: note(folder, "started", trainer.global_step)
    )
    GRPOLightningModule.on_train_batch_end = lambda *hook: seen("step")  # type: ignore[method-assign, misc, assignment]
    GRPOLightningModule.on_validation_end = lambda *hook: seen(f"validated {trainer.current_epoch + 1}")  # type: ignore[method-assign, misc, assignment]
    GRPOLightningModule.on_train_epoch_start = lambda *hook: seen(f"epoch {trainer.current_epoch}")  # type: ignore[method-assign, misc, assignment]


def come_by(places: Sequence[tuple[Any, str, str]]) -> None:
    """From now on each of these methods comes by its place."""
    for owner, method, place in places:
        setattr(owner, method, passing(getattr(owner, method), place))


def passing(method: Callable[..., Any], place: str) -> Callable[..., Any]:
    def passes(*args: Any, **kwargs: Any) -> Any:
        pass_by(place)
        return method(*args, **kwargs)

    return passes


def after(method: Callable[..., Any], then: Callable[[], None]) -> Callable[..., Any]:
    def both(*args: Any, **kwargs: Any) -> Any:
        method(*args, **kwargs)
        then()

    return both


def note(folder: Path, what: str, step: int) -> None:
    with (folder / "story.tsv").open("a") as file:
        file.write(f"{what}\t{step}\n")


def save_end(trainer: Trainer, folder: Path) -> None:
    """What `end_state` compares, whatever the options keep."""
    kill_test._plan = None
    trainer.save_checkpoint(folder / "end.ckpt")


# Cases ----------------------------------------------------------------------------------------------------------------


def check(case: Case, folder: Path, run: Callable[..., None], expected: dict[str, Any], steps: int) -> list[str]:
    """What is wrong with a case; nothing if it holds."""
    folder.mkdir(parents=True)
    story = Story(folder / "story.tsv")
    strikes = [case.moment, Kill("validation", 1, 0, 0, signal.SIGTERM)][: 2 if case.again else 1]
    stopped = []  # (signal, step at which the run ended, newest opportunity)
    for strike in strikes:
        code = attempt(folder, run, steps if strike is not None else steps - 3, strike)
        wrote = story.read()
        # Outside training Python's own handlers act, where no others are.
        outside = {-strike.sent, 1} if strike is not None and not any(what == "step" for what, _ in wrote) else set()
        wanted = {0} if strike is None else {0, -9 if strike.sent == signal.SIGKILL else 128 + strike.sent}
        if code not in wanted | outside:
            return [f"exit code {code}: {(folder / 'output.txt').read_text()[-1500:]}"]
        stopped.append((None if code == 0 else code, wrote))
        if wrong := check_start(wrote, stopped[:-1], case):
            return wrong
        if code == 0:
            break
    if code := attempt(folder, run, steps, None):
        return [f"the resume ended with {code}: {(folder / 'output.txt').read_text()[-1500:]}"]
    wrong = check_start(story.read(), stopped, case)
    return wrong + differences(end_state(folder, folder / "end.ckpt"), expected)[:5]


def check_start(wrote: list[tuple[str, int]], stopped: list[Any], case: Case) -> list[str]:
    """That an attempt started where the ones before it had come to."""
    if not stopped or not wrote:  # a signal ended it outside training, before it had come to anything
        return []
    started = next((step for what, step in wrote if what == "started"), None)
    code, before = stopped[-1]
    if started is None:  # there was nothing left to train
        started = max((step for what, step in wrote if what == "stopped"), default=0)
    least = newest_opportunity([entry for _, entries in stopped for entry in entries], case)
    if code != -9:
        least = max((step for what, step in before if what == "stopped"), default=0)
    return [f"resumed from step {started}, and not {least} or later"] if started < least else []


def newest_opportunity(story: Sequence[tuple[str, int]], case: Case) -> int:
    """The newest step at which the options allow a save."""
    saves = case.saves
    if case == case_of_config(case.moment, case.again):
        return max((step for what, step in story if what == "step"), default=0) - 1  # a save every other step
    steps = [step for what, step in story if what == "step"]
    if "train_time_interval" in saves:
        return max(steps, default=0)
    if n := saves.get("every_n_train_steps"):
        return max((step for step in steps if step % n == 0), default=0)
    options = VALIDATIONS[case.validation]
    at_epoch_end = saves["save_on_train_epoch_end"]
    if at_epoch_end is None:  # as Lightning decides
        at_epoch_end = options.get("check_val_every_n_epoch", 1) == 1 and "val_check_interval" not in options
    kind, n = "epoch" if at_epoch_end else "validated", saves.get("every_n_epochs", 1)
    entries = [(what.split()[1], step) for what, step in story if what.startswith(kind)]
    return max((step for epoch, step in entries if int(epoch) and int(epoch) % n == 0), default=0)


def attempt(folder: Path, run: Callable[..., None], steps: int, strike: Kill | None) -> int:
    """One fork; its exit code, or minus the signal that killed it."""
    pid = kill_test.fork(folder, Settings(steps), strike, 0, 0, None, run)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_cases(cases: Sequence[Case], root: Path) -> int:
    """How many fail."""
    failed, straight = 0, dict[str, Any]()
    for number, case in enumerate(cases):
        of_config = "config" in case.saves
        run = run_config if of_config else partial(run_case, case=case)
        kind = "of the config" if of_config else case.validation
        if kind not in straight:
            folder = root / f"straight {kind}"
            folder.mkdir(parents=True)
            if attempt(folder, run, STEPS, None):
                raise RuntimeError((folder / "output.txt").read_text()[-3000:])
            straight[kind] = end_state(folder, folder / "end.ckpt")
        if wrong := check(case, root / f"case {number}", run, straight[kind], STEPS):
            failed += 1
            print(f"case {number}: {case}: {'; '.join(wrong)}", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--cases", type=int, help="how many to draw; all by default")
    parser.add_argument("--config-cases", type=int, help="the same, of the reference config")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="an empty folder to keep the files in")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    load_model(PolicyConfig("tiny"))  # imports the model's code before the first fork
    begin, draw = time.perf_counter(), random.Random(args.seed)
    cases, of_config = list(all_cases()), [case_of_config(moment, again=False) for moment in MOMENTS]
    if args.cases is not None:
        cases = draw.sample(cases, min(args.cases, len(cases)))
    if args.config_cases is not None:
        of_config = draw.sample(of_config, min(args.config_cases, len(of_config)))
    cases += of_config
    with tempfile.TemporaryDirectory() as temporary:
        failed = run_cases(cases, args.folder or Path(temporary))
    places = Counter("normal end" if case.moment is None else case.moment.place for case in cases)
    print(f"{len(cases)} cases: " + ", ".join(f"{count} {place}" for place, count in sorted(places.items())))
    print(f"{time.perf_counter() - begin:.0f} s in all; " + (f"{failed} FAILED" if failed else "all of them hold"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
