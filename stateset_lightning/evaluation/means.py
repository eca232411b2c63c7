"""Means over the prompts of a split, with intervals, and by topic: exact over batches and ranks.

Letters: P prompts, M measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from stateset_lightning.evaluation.estimators import half_width, wilson_interval

TOPIC_BYTES = 64
WITHOUT_FLOAT64 = ("mps",)  # Apple's GPUs: such sums stay on the host, as there is one process


class PromptMeans(Metric):
    """Means of some measures over all prompts, of those where the measure is finite.

    `compute` gives each measure by name (none that is finite nowhere) over all ranks, and also:

    - `<name>_ci95`, half of its 95% interval by the normal approximation, for those in `intervals`;
    - `<name>_low` and `<name>_high`, Wilson's 95% interval, for those in `shares`, which are 0 or 1;
    - `topic/<topic>/<name>` for those in either;
    - `num_completions`, the number of prompts, of which each has one.

    Prompts are taken as independent of each other.

    Args:
        names: The M measures.
        intervals: Those with a normal interval.
        shares: Those with Wilson's.

    Example:
        >>> metric = PromptMeans(["right"], shares=["right"])
        >>> metric.update(torch.tensor([[1.0], [0.0], [1.0]]), ["sums", "sums", None])
        >>> {name: round(value, 3) for name, value in metric.compute().items() if name.endswith("right")}
        {'right': 0.667, 'topic/sums/right': 0.5}
    """

    full_state_update = False
    values_PM: list[Tensor]
    topics_PB: list[Tensor]  # as bytes: ranks see different topics, and torchmetrics gathers only tensors

    def __init__(
        self, names: Sequence[str], *, intervals: Sequence[str] = (), shares: Sequence[str] = (), **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.names, self.intervals, self.shares = names, intervals, shares
        self.add_state("values_PM", [], dist_reduce_fx="cat")
        self.add_state("topics_PB", [], dist_reduce_fx="cat")

    def logged_names(self) -> list[str]:
        """Names of all that `compute` may give; `<topic>` stands for any."""
        names = [*self.names, *(f"{name}_ci95" for name in self.intervals)]
        names += [f"{name}_{end}" for name in self.shares for end in ("low", "high")]
        return names + [f"topic/<topic>/{name}" for name in (*self.intervals, *self.shares)] + ["num_completions"]

    def update(self, values_PM: Tensor, topics: Sequence[str | None]) -> None:
        """Adds prompts: the measures of each, and its topic."""
        device = "cpu" if self.device.type in WITHOUT_FLOAT64 else self.device
        self.values_PM.append(values_PM.double().to(device))
        encoded = torch.tensor([list(_encode(topic)) for topic in topics], dtype=torch.uint8, device=self.device)
        self.topics_PB.append(encoded.reshape(-1, TOPIC_BYTES))

    def compute(self) -> dict[str, float]:
        if not len(self.values_PM):
            return {"num_completions": 0.0}
        values_PM = dim_zero_cat(self.values_PM).cpu()
        topics = [bytes(row).rstrip(b"\0").decode() for row in dim_zero_cat(self.topics_PB).tolist()]
        result = {"num_completions": float(len(values_PM))}
        for name, values_P in zip(self.names, values_PM.T, strict=True):
            if not (known := _finite(values_P)):
                continue
            result[name] = sum(known) / len(known)
            if name in self.intervals and len(known) > 1:
                result[f"{name}_ci95"] = half_width(known)
            if name in self.shares:
                result[f"{name}_low"], result[f"{name}_high"] = wilson_interval(result[name], len(known))
        for topic in sorted(set(topics) - {""}):
            rows_PM = values_PM[torch.tensor([other == topic for other in topics])]
            for name in (*self.intervals, *self.shares):
                if known := _finite(rows_PM[:, self.names.index(name)]):
                    result[f"topic/{topic}/{name}"] = sum(known) / len(known)
        return result


def _finite(values: Tensor) -> list[float]:
    return values[values.isfinite()].tolist()


def _encode(topic: str | None) -> bytes:
    """A topic as `TOPIC_BYTES` bytes; of a longer one the beginning, and a digest that tells it from others."""
    text = (topic or "").encode()
    if len(text) > TOPIC_BYTES:
        digest = blake2b(text, digest_size=4).hexdigest()
        text = f"{text[: TOPIC_BYTES - 9].decode(errors='ignore')}-{digest}".encode()
    return text.ljust(TOPIC_BYTES, b"\0")
