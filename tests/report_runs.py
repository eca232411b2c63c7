"""A small run's folder, shared by the tests of its report: files as a run leaves them, with a completion that attacks
the page.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ATTACK = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> <!-- {{STYLE}} &lt;"
)


def completion(text: str, reward: float | None, step: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "split": "train",
        "step": step,
        "episode": step - 1,
        "id": "a",
        "topic": "sums",
        "prompt": "What is 1 + 1?",
        "target": "2",
        "completion": text,
        "reward": reward,
        "rewards": {"right": reward},
        "finish_reason": "stop",
        "num_tokens": 2,
        "advantage": 0.5,
        "tokens": [text, "<|end|>"],
        "logprobs": [-0.5, -1.0],
        "logprobs_after": [-0.25, -1.5],
        **more,
    }


def evaluated(step: int, reward: float, name: str = "v1") -> dict[str, Any]:
    row = completion("three", reward, step, split="validation", id=name, prompt=f"question {name}")
    return {
        key: value
        for key, value in row.items()
        if key not in ("episode", "advantage", "tokens", "logprobs", "logprobs_after")
    }


def write_samples(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_run(folder: Path) -> None:
    folder.mkdir(parents=True)
    names = [
        "step",
        "train/reward",
        "groups/all_right",
        "groups/mixed",
        "groups/all_wrong",
        "val/reward",
        "val/reward_ci95",
        "val/num_completions",
    ]
    lines = ["0,,,,,0.25,0.1,2", *(f"{k},{k / 10},0.{k},0.5,0.{5 - k},,," for k in range(1, 6)), "5,,,,,0.75,0.2,2"]
    (folder / "metrics.csv").write_text("\n".join([",".join(names), *lines]) + "\n")
    rows = [
        evaluated(0, 0.0),
        evaluated(0, 1.0, "v2"),
        *(completion("2", 1.0) for _ in range(3)),
        completion(ATTACK, None, errors=["right: KeyError: <b>"]),
    ]
    rows += [
        completion(text, reward, 5, breakdown={"right": {"<i>": 1.0}}) for text, reward in (("2", 1.0), ("one", 0.0))
    ]
    write_samples(folder, [*rows, evaluated(5, 1.0), evaluated(5, 1.0, "v2")])
    (folder / "config.yaml").write_text(
        "model:\n  policy: {model_name: tiny}\n  algorithm: {class_path: a.GRPO}\n  reward:\n  - class_path: a.Right\n#"
        " </pre><b>\n"
    )
    (folder / "environment.json").write_text(json.dumps({"python": "3.12.1", "device": "<b>cpu</b>"}))
