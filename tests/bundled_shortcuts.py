"""What tests need not do again for the bundled model: its chat template needs no fork, its probes one verdict.

A fork of a process with torch in it takes some 50 ms of processor time, and the probes of a policy and its engine 150;
a run forks five times. The tests of the rooms that this is about (`FOR_REAL`) go the real way, and so does whatever
starts a process of its own.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import PreTrainedModel

from stateset_lightning.policy import probes
from stateset_lightning.tiny import TINY_FOLDER
from stateset_lightning.workers import limits

ROOT = Path(__file__).parents[1]
FOR_REAL = ("tests/policy/", "tests/rollout/", "tests/workers/", "tests/data/", "tests/test_security.py")

exact_on, limited = probes.exact_on, limits.limited
exact: set[Any] = set()
"""The models, by all that makes their outputs, and the ways of computing that have been compared."""


@contextmanager
def bundled_shortcuts() -> Iterator[None]:
    """Inside, forks and probes are made once."""
    with (
        patch("stateset_lightning.policy.probes.exact_on", exact_once),
        patch("stateset_lightning.rollout.probe.exact_on", exact_once),
        patch("stateset_lightning.workers.limits.limited", limited_unless_bundled),
        patch("stateset_lightning.data.prompts.limited", limited_unless_bundled),
    ):
        yield


def exact_once(model: PreTrainedModel, path: str, difference: Callable[[PreTrainedModel], float]) -> str | None:
    """`exact_on`, whose verdict on the bundled model holds for the same weights."""
    is_plain = all(type(p) is nn.Parameter and "lora" not in name for name, p in model.named_parameters())
    if is_for_real() or not is_plain or model.name_or_path != str(TINY_FOLDER):
        return exact_on(model, path, difference)
    attention = model.config.get_text_config()._attn_implementation
    key = type(model), model.config.to_json_string(), path, attention, model.training, model.device, digest(model)
    if key in exact:
        return None
    reason = exact_on(model, path, difference)
    if reason is None:
        exact.add(key)
    return reason


def limited_unless_bundled(items: Iterator[Any], what: str) -> Iterator[Any]:
    """`limited`, which runs the bundled template without limits."""
    return limited(items, what) if is_for_real() or repr(str(TINY_FOLDER)) not in what else items


def is_for_real() -> bool:
    """Whether the test that runs is one of those rooms."""
    return os.environ.get("PYTEST_CURRENT_TEST", "").startswith(FOR_REAL)


def digest(model: PreTrainedModel) -> int:
    """Of all weights."""
    value = 0
    for name, p in model.named_parameters():
        copied = p.detach().cpu().clone().reshape(-1)  # the storage of what numpy has seen cannot be resized any more
        value = zlib.crc32(copied.view(torch.uint8).numpy(), zlib.crc32(name.encode(), value))
    return value
