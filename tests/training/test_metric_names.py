"""The docstring of training/metrics.py and docs/metrics.md name every metric that runs log, and no other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger
from module_runs import DigitReward, fit, make_data, make_module

from stateset_lightning import RolloutConfig
from stateset_lightning.algorithm import GKD, KL, AdaptiveEntropy, Clipped, Mismatch, OnPolicyDistillation, ReMax
from stateset_lightning.cli.main import main
from stateset_lightning.environments import EnvironmentConfig, ScriptedUser
from stateset_lightning.evaluation import Evaluation, EvaluationConfig
from stateset_lightning.policy import PolicyConfig
from stateset_lightning.training.metrics import NAMES

ROOT = Path(__file__).parents[2]
ELSEWHERE = {"time/sync_s", "mismatch/after_sync", "work/server_restarts", "work/sampled_ahead"}
"""Names that need a server: tests/rollout/test_vllm.py and tests/training/test_sampling_ahead.py see them logged."""


class FailsAndCounts(DigitReward):
    """Fails on every answer with a digit 1, and counts."""

    def compute_reward(self, turns: Any, context: Any = None) -> float:
        if "1" in turns[-1].content:
            raise ValueError("no ones")
        return super().compute_reward(turns, context)

    def take_counts(self) -> dict[str, float]:
        return {"calls": 1.0}


ROLLOUT = {"num_generations": 4, "max_new_tokens": 5}
SETTINGS: dict[str, dict[str, Any]] = {
    "dynamic sampling": {"rollout": RolloutConfig(**ROLLOUT, dynamic_sampling=1)},
    "every term in the loss": {
        "algorithm": Clipped(
            beta=0.1,
            kl=KL(target=0.1),
            adaptive_entropy=AdaptiveEntropy(),
            off_policy_threshold=0.1,
            positive_coefficient=0.1,
            mismatch=Mismatch("icepop"),
        )
    },
    "KL in the reward": {"algorithm": Clipped(beta=0.1, kl=KL(estimator="k1", place="reward"))},
    "greedy baseline": {"algorithm": ReMax()},
    "a teacher's log-probs": {"algorithm": OnPolicyDistillation(), "teacher": "tiny"},
    "a teacher's distributions": {"algorithm": GKD(), "teacher": "tiny"},
    "bounded micro-steps": {"max_tokens_per_step": 20},
    "experts": {"policy": "mixtral"},
    "conversations": {"environment": EnvironmentConfig(ScriptedUser, options={"responses": ["Are you sure?"]})},
    "a reward that fails": {"reward": FailsAndCounts(), "max_reward_failures": 1.0},
}


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path]) -> dict[str, set[str]]:
    """Setting -> the names that a short run with it logs, validation included."""
    names = {}
    for setting, options in SETTINGS.items():
        folder = tmp_path_factory.mktemp("run")
        if "policy" in options:
            policy = PolicyConfig(str(model_folder(options["policy"])), router_aux_loss=0.1)
            options = {"policy": policy, "reward": lambda turns, context: float(sum(map(ord, turns[-1].content)) % 7)}
        validation = {"limit_val_batches": 1, "val_check_interval": 1} if "environment" in options else {}
        logger = CSVLogger(folder, "", version="")
        fit(folder, make_module(**options), make_data(), max_steps=1, logger=logger, **validation)
        names[setting] = columns(folder)
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        flags = ["--trainer.max_steps=2", "--data.batch_size=2", "--model.evaluation.samples=2"]
        save = f"--trainer.logger.init_args.save_dir={folder}"
        main(["fit", "--config=configs/single_turn.yaml", save, *flags])
    names["configs/single_turn.yaml"] = columns(folder)
    return names


def columns(folder: Path) -> set[str]:
    (table,) = folder.rglob("metrics.csv")
    return set(table.read_text().splitlines()[0].split(",")) - {"step", "epoch"}  # Lightning's own


def is_named(name: str, names: Iterator[str] | list[str]) -> bool:
    return any(re.fullmatch(re.sub(r"<\w+>", ".+", re.escape(each)), name) for each in names)


def test_every_metric_that_a_run_logs_is_explained(logged: dict[str, set[str]]) -> None:
    for setting, names in logged.items():
        assert not [name for name in sorted(names) if not is_named(name, NAMES)], setting


def test_every_name_is_logged_by_some_run(logged: dict[str, set[str]]) -> None:
    everything = set().union(*logged.values())
    assert {name for name in NAMES if not any(is_named(one, [name]) for one in everything)} == ELSEWHERE


def test_every_metric_of_an_evaluation_is_explained() -> None:
    names = Evaluation(["exact_match"], EvaluationConfig(samples=4)).logged_names()
    assert not [name for name in names if not is_named(f"val/{name}", NAMES)]


def test_the_page_explains_the_same_names() -> None:
    """`a/{b,c}` on the page is `a/b` and `a/c`."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    explained = set()
    for quoted in re.findall(r"`([^`\n]+)`", "".join(re.findall(r"^\| (.+?) \|", page, flags=re.MULTILINE))):
        before, inner, after = re.fullmatch(r"([^{]*)(?:\{(.*)\})?(.*)", quoted).groups()  # type: ignore[union-attr]
        explained |= {f"{before}{name}{after}" for name in (inner or "").split(",")}
    assert explained == set(NAMES)
