"""One row per completion, for files and tables: what was asked, what was answered, what the rewards said."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stateset_lightning.types import PromptBatch, Rollout, Scores


@dataclass(frozen=True)
class CompletionRecord:
    """`rewards` and `reward` are None where a reward failed, does not apply, or its total cannot be formed."""

    id: str
    topic: str | None
    prompt: str
    completion: str
    reward: float | None
    rewards: dict[str, float | None]
    finish_reason: str
    num_tokens: int
    advantage: float | None = None
    breakdown: dict[str, Any] | None = None
    errors: list[str] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None or key == "reward"}


def make_records(batch: PromptBatch, rollout: Rollout, scores: Scores, advantages: Sequence[float] | None = None) -> list[CompletionRecord]:
    """Records of all completions, in order."""
    errors: dict[int, list[str]] = {}
    for failure in scores.failures:
        errors.setdefault(failure.completion, []).append(f"{failure.reward}: {failure.error}: {failure.message}")
    records = []
    for n, text in enumerate(rollout.texts):
        scenario = batch.scenarios[n // rollout.num_generations]
        records.append(
            CompletionRecord(
                id=scenario.id,
                topic=scenario.topic,
                prompt=scenario.turns()[-1].content,
                completion=text,
                reward=_finite(scores.totals_N[n].item()),
                rewards={name: _finite(value) for name, value in zip(scores.names, scores.values_NF[n].tolist(), strict=True)},
                finish_reason=str(rollout.finish_reasons[n]),
                num_tokens=int(rollout.lengths_N[n]),
                advantage=None if advantages is None else _finite(advantages[n]),
                breakdown=_plain(scores.breakdowns[n]) if n < len(scores.breakdowns) else None,
                errors=errors.get(n),
            )
        )
    return records


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(breakdown: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Parts of the scores as JSON holds them; what JSON has no form for is shown as text."""
    parts = {name: {key: _json(value) for key, value in inner.items()} for name, inner in breakdown.items() if inner}
    return parts or None


def _json(value: Any) -> Any:
    if isinstance(value, float):
        return _finite(value)
    return value if isinstance(value, str | int | bool | None) else str(value)
