"""Cases of hostile rewards: what they raise, return, touch, and do to their process or event loop."""

from __future__ import annotations

import runpy
from typing import Any

from cases import HERE, REWARDS, Place, Plan

BEHAVIOURS = runpy.run_path(str(HERE / f"{REWARDS}.py"), run_name="behaviours")
KINDS = ("RAISING", "RETURNING", "TOUCHING", "IN_WORKERS", "ASYNC")
HANGING = ("waits_for_ever", "spins", "swallows_cancellation")
"""They need a time-out."""


def reward(place: Place, does: str, *, is_async: bool, timeout: float | None, every: int) -> dict[str, Any]:
    """A hostile reward for a config, which holds secrets."""
    options = {
        "does": does,
        "every": every,
        "timeout": timeout,
        "api_key": place.secret("api_key"),
        "headers": {"X-Auth": place.secret("header")},
        "dsn": f"https://{place.secret('dsn')}@errors.example/1",
    }
    return {"class_path": f"{REWARDS}.Hostile{'Async' if is_async else ''}", "init_args": options}


def plan(place: Place) -> Plan:
    rng = place.rng
    kind = rng.choices(KINDS, weights=(6, 8, 2, 5, 4))[0]
    does = rng.choice(sorted(BEHAVIOURS[kind]))
    is_async = kind == "ASYNC" or (kind in ("RAISING", "RETURNING") and rng.random() < 0.3)
    timeout = rng.choice((None, None, 0.5))
    if kind == "IN_WORKERS" or does in HANGING:
        timeout = 0.5
    if does == "swallows_cancellation":
        is_async = True
    every = rng.choice((1, 2, 3))
    good = {"class_path": "stateset_lightning.rewards.ExactMatch"}
    hostile = reward(place, does, is_async=is_async, timeout=timeout, every=every)
    command = rng.choices(("fit", "validate", "predict"), weights=(8, 2, 1))[0]
    slow = kind == "IN_WORKERS" or does in HANGING  # each call takes its time-out and a worker's start
    place.config(
        {
            "trainer.max_steps": 1 if slow else 2,
            "trainer.limit_val_batches": 0 if slow and command == "fit" else None,
            "model.reward": [hostile] + [good] * rng.randrange(2),
            "model.max_reward_failures": rng.choice((0.3, 1.0)),
            "model.rollout.sampling_ahead": rng.choice((0, 0, 1)),
            "data.eval_batch_size": 4,
        }
    )
    # a worker's start, and each call in turn, in 2 steps and 2 validations
    patience = 0.0 if timeout is None else 25.0
    how = f"{'async ' * is_async}{does}, every {every}, time-out {timeout}"
    codes = (0, 2, 130) if does == "keyboard_interrupt" and timeout is None else (0, 2)  # it may be taken for Ctrl-C
    words = [command, "--config", "config.yaml", *place.flags()]
    return Plan(words, f"a reward in {command}: {how}", codes=codes, patience=patience)
