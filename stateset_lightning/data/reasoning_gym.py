"""Procedural tasks of the `reasoning-gym` library -> raw rows (extra `gym`)."""

from collections.abc import Mapping
from typing import Any

from stateset_lightning.errors import ConfigError, imported, told_as

MAX_SIZE = 1_000_000
MAX_SEED = 2_000


def read_task(task: str, size: int, seed: int, options: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    """The first `size` instances of a task, the same for the same arguments (and version of the library).

    A row has the question as `prompt`, the answer as `target` (None where only the library can tell), the task as
    `topic`, and in `reasoning_gym` what `ReasoningGymReward` needs. The rows of two seeds have no instance in common:
    the library makes row i from `seed + i`, so that its seeds 1 and 2 share all rows but one; here the seeds are a
    million apart.

    Raises:
        ConfigError: If `reasoning-gym` is not installed, there is no such task, or it does not take these options.
    """
    reasoning_gym = imported("reasoning_gym", "gym", f"{place}: reasoning_gym={task}")
    known = reasoning_gym.factory.DATASETS
    if task not in known or task == "composite":
        has = ", ".join(sorted(known))
        raise ConfigError(f"{place}: reasoning_gym={task!r} is no task of the library; it has: {has}")
    refused = f"{place}: reasoning_gym={task} does not take options={dict(options)}: "
    with told_as(ConfigError, refused, AssertionError, TypeError, ValueError):
        entries = reasoning_gym.create_dataset(task, **{**options, "size": size, "seed": seed * MAX_SIZE})
    return [_row(task, options, entries[index]) for index in range(size)]


def _row(task: str, options: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    needed = {"task": task, "options": dict(options), "metadata": entry["metadata"]}
    return {"prompt": entry["question"], "target": entry["answer"], "topic": task, "reasoning_gym": needed}
