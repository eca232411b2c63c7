"""Cases of signals: SIGTERM, Ctrl-C and SIGHUP at seeded moments in every phase of every command, once or twice."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import kill_test
import rewards
import yaml
from cases import Place, Plan
from kill_test import Kill, replace, save_in_halves
from saves import PLACES, come_by

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PHASES = {  # how often a run of two steps comes by
    "parsing": 1,
    "building": 1,
    "loading": 1,
    "reading": 2,
    "sampling": 4,
    "scoring": 16,
    "micro-step": 2,
    "optimizer step": 2,
    "validation": 2,
    "end of validation": 1,
    "half a file": 3,
    "before the rename": 8,
    "after the rename": 8,
}


def at_a_place(moment: Kill) -> Callable[[], None]:
    """Has the process send itself a signal when it comes by."""

    def prepare() -> None:
        from stateset_lightning import ScenarioDataModule, files
        from stateset_lightning.cli.config import StatesetCLI
        from stateset_lightning.policy import loading
        from stateset_lightning.run import checkpoint_io

        places: tuple[tuple[Any, str, str], ...] = (
            (StatesetCLI, "parse_arguments", "parsing"),
            (StatesetCLI, "instantiate_classes", "building"),
            (loading, "load_model", "loading"),
            (ScenarioDataModule, "setup", "reading"),
        )
        come_by([*places, *PLACES])
        checkpoint_io.torch.save, files.os.replace = save_in_halves, replace  # type: ignore[assignment]
        kill_test._plan = moment

    return prepare


def after_seconds(seconds: float, sent: int, again: float | None) -> Callable[[], None]:
    """Has the process get a signal after a time, and perhaps another one."""

    def send() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), sent)
        if again is not None:
            time.sleep(again)
            os.kill(os.getpid(), sent)

    return lambda: threading.Thread(target=send, daemon=True).start()


def plan(place: Place) -> Plan:
    rng = place.rng
    sent = rng.choice(SIGNALS)
    name = signal.Signals(sent).name
    codes: tuple[int, ...] = (0, 128 + sent)
    fit = ["fit", "--config", "config.yaml", *place.flags()]
    resume = [*fit, "--ckpt_path", "last"]
    if rng.random() < 0.5:
        place.config()
        phase = rng.choice(sorted(PHASES))
        moment = Kill(phase, rng.randint(1, PHASES[phase]), 0, 0, sent)
        title = f"{name} in fit: {phase} {moment.count}"
        return Plan(fit, title, codes=codes, inside=at_a_place(moment), then=resume)
    command = rng.choice(("fit", "fit", "validate", "predict", "doctor", "generate", "export", "report", "resume"))
    seconds = rng.uniform(0, {"generate": 0.4, "export": 0.3, "report": 0.06, "doctor": 4.0}.get(command, 1.3))
    again = rng.choice((None, None, rng.uniform(0.01, 0.5)))
    place.resumable()
    words, outputs = {
        "resume": (resume, ("runs",)),
        "generate": (["generate", "--ckpt_path", "last", "--samples", "8", "--max_new_tokens", "60"], ("runs",)),
        "export": (["export", "last", "out"], ("runs", "out")),
        "report": (["report", "runs/r/version_0"], ("runs",)),
    }.get(command, ([command, *fit[1:]], ("runs",)))
    hangs = command in ("fit", "validate", "predict", "doctor") and rng.random() < 0.3
    if hangs:
        place.config({"model.reward": [rewards.reward(place, "never_ends", is_async=False, timeout=None, every=1)]})
        if rng.random() < 0.5:
            waits = rewards.reward(place, "waits_for_ever", is_async=True, timeout=None, every=1)
            config = yaml.safe_load((place.work / "config.yaml").read_text())
            config["model"]["reward"] = [waits]
            (place.work / "config.yaml").write_text(yaml.safe_dump(config))
        seconds = 2.5
    title = f"{name} after {seconds:.2f} s in {command}" + (", a reward hangs" if hangs else "")
    if again is not None:
        title += f", and again {again:.2f} s later"
    then = resume if command in ("fit", "resume") and again is None and not hangs else None
    codes = (*codes, 1) if command == "doctor" else codes
    in_fork = after_seconds(seconds, sent, again)
    made = Plan(words, title, codes=codes, outputs=outputs, sent=sent, seconds=seconds, then=then, stdin=b"Say 3\n" * 9)
    made.inside, made.patience = in_fork, 8.0
    return made
