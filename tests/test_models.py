"""The short form of `benchmarks/check_models.py`: models of many kinds that are right; all: `make check-models`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "check_models.py"
MODELS = ("llama", "qwen2+window", "qwen3", "gemma2", "gemma3_text", "gpt_oss", "mistral", "phi3+longrope", "olmo3")
MODELS += ("cohere2", "lfm2", "qwen3_next", "mamba2", "deepseek_v3", "gpt2", "bloom")
CHECKS = ("build", "load", "scoring", "greedy", "train")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import check_models

    return check_models


@pytest.mark.slow  # trains a model
@pytest.mark.parametrize("model", MODELS)
def test_a_model_is_right(model: str, script: Any, tmp_path: Path) -> None:
    """In this process: the script's forks would wait for the threads that torch has here."""
    checked = script.Model(script.entries()[model], tmp_path)
    for check in CHECKS:
        getattr(checked, check)()  # raises `Wrong`


def test_what_is_not_right_is_found(script: Any, tmp_path: Path) -> None:
    """Log-probs that are a little off, in scoring and in sampling; and a check that hangs."""
    model = script.Model(script.entries()["llama"], tmp_path)
    model.build()
    model.load()
    model.scoring()
    correct = model.policy
    shifted = lambda groups: (correct.score_without_gradient(groups)[0] + 1e-4, None)  # noqa: E731
    model.policy = SimpleNamespace(score_without_gradient=shifted)
    with pytest.raises(script.Wrong, match=r"log-probs differ by up to 1.0e-04 nats from the model's own forward"):
        model.scoring()
    with torch.no_grad():
        correct.model.model.norm.weight.mul_(1.01)
    model.policy = correct
    with pytest.raises(script.Wrong, match="sampled log-probs differ by"):
        model.greedy()


def test_a_check_that_hangs_is_killed(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.Model, "build", lambda self: script.time.sleep(60))
    row = script.check_model("llama", script.entries()["llama"], script.CHECKS, limit=0.5)
    assert row["states"] == {"build": "killed: after 0.5 s"}
    assert not script.is_right(row)


def test_the_page_has_every_model_that_transformers_maps(script: Any) -> None:
    page = (ROOT / "docs" / "models.md").read_text()
    missing = [name for name in script.entries() if f"| {name} |" not in page and f"- {name}: " not in page]
    assert not missing, f"run make check-models: {missing}"
