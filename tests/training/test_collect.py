"""What happens once per episode: dynamic sampling, baselines, the KL as a score, adaptive coefficients, guards; in real
runs.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from module_runs import SCENARIOS, DigitReward, fit, make_data, make_module, make_trainer, weights
from test_module import ConstantReward
from training.test_episode import on_ranks

from stateset_lightning import RewardFunction, RolloutConfig
from stateset_lightning.algorithm import GRPO, KL, Clipped, ReMax
from stateset_lightning.data.order import Curriculum
from stateset_lightning.errors import ConfigError, RewardError, SamplingError
from stateset_lightning.policy import Group, Policy, PolicyConfig
from stateset_lightning.ranks import Ranks
from stateset_lightning.rewards import OverlongPenalty
from stateset_lightning.rollout import InProcessEngine, VLLMEngine
from stateset_lightning.training.collect import check_failures, ready_engine
from stateset_lightning.types import RewardFailure, Rollout, Scores

HALF_FLAT = [{**row, "topic": "flat" if i % 2 else "varied"} for i, row in enumerate(SCENARIOS * 4)]


class FlatByTopic(DigitReward):
    """One and the same reward for all answers to prompts of the topic `flat`."""

    def compute_reward(self, turns: Any, context: Any = None) -> float:
        return 0.5 if context["topic"] == "flat" else super().compute_reward(turns) + len(turns[-1].content) / 10


def rollout(**options: Any) -> RolloutConfig:
    """Warm enough for answers to differ: the bundled model is sure of most."""
    return RolloutConfig(**{"num_generations": 4, "max_new_tokens": 5, "temperature": 3.0, **options})


# Dynamic sampling
# -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"overfit_batches": 2}], ids=["", "overfit"])
def test_groups_that_teach_nothing_are_replaced_and_counted(tmp_path: Path, options: dict[str, Any]) -> None:
    data = make_data(train=HALF_FLAT, batch_size=8, validation=None)
    module = make_module(reward=FlatByTopic(), rollout=rollout(dynamic_sampling=6))
    fit(tmp_path, module, data, max_steps=1, **options)
    topics = [record["topic"] for record in module.last_records]
    metrics = module.metrics.last
    assert metrics["groups/resampled"] > 0.2
    assert metrics["work/extra_prompts"] >= 8 * metrics["groups/resampled"]
    assert topics.count("varied") > 24  # of 32; without, about 16
    plain = make_module(reward=FlatByTopic(), rollout=rollout())
    fit(tmp_path, plain, make_data(train=HALF_FLAT, batch_size=8, validation=None), max_steps=1, **options)
    kept = [record["id"] for record in plain.last_records if record["topic"] == "varied"]
    assert set(kept) & {record["id"] for record in module.last_records}  # the others stay where they are
    assert "groups/resampled" not in plain.metrics.last
    if options:
        served = {scenario.id for batch in data.train_dataloader() for scenario in batch.scenarios}
        assert len(served) == 16
        assert {record["id"] for record in module.last_records} <= served


def test_a_solved_task_goes_on_to_its_end(tmp_path: Path) -> None:
    module = make_module(reward=ConstantReward(), rollout=rollout(dynamic_sampling=2))
    module.configure_model()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = fit(tmp_path, module, max_steps=2)
    assert trainer.global_step == 2
    assert module.metrics.last["work/extra_prompts"] == 2 * 4
    assert module.metrics.last["groups/all_right"] == 1
    assert module.metrics.last["policy/empty_steps"] == 1
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_failures_of_replaced_groups_count(tmp_path: Path) -> None:
    class FailsOnFlat(FlatByTopic):
        def compute_reward(self, turns: Any, context: Any = None) -> float:
            if context["topic"] == "flat":
                raise OSError("away")
            return super().compute_reward(turns, context)

    def run(limit: float) -> Any:
        module = make_module(reward=FailsOnFlat(), rollout=rollout(dynamic_sampling=6), max_reward_failures=limit)
        fit(tmp_path, module, make_data(train=HALF_FLAT, batch_size=8, validation=None), max_steps=1)
        return module

    module = run(0.9)
    assert module.metrics.last["reward_failures/fails_on_flat/OSError"] > sum(
        record["reward"] is None for record in module.last_records
    )
    with pytest.raises(RewardError, match="away"):
        run(0.1)


def test_plain_loaders_have_nothing_to_replace_with(tmp_path: Path) -> None:
    module = make_module(rollout=rollout(dynamic_sampling=1))
    data = make_data(tokenizer=module.tokenizer)
    data.setup("fit")
    with pytest.raises(
        ConfigError, match=r"model\.rollout\.dynamic_sampling=1 .* use a ScenarioDataModule, or set it to 0"
    ):
        make_trainer(tmp_path).fit(module, train_dataloaders=data.train_dataloader())


# KL in the reward and adaptive coefficients
# -----------------------------------------------------------------------------------


def test_the_kl_is_taken_from_the_reward_and_not_shown_in_it(tmp_path: Path) -> None:
    module = make_module(algorithm=Clipped(beta=0.5, scale="none", kl=KL(estimator="k1", place="reward")), seed=3)
    trainer = fit(tmp_path, module, max_steps=3)
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    module.setup("fit")  # the end of the run closed the scorer
    module._step.start_episode(next(iter(data.train_dataloader())))
    sample, episode = module.state.collection.sample, module.episode
    completions = sample.rollout.completions()
    groups = [Group(prompt, completions[4 * p : 4 * p + 4]) for p, prompt in enumerate(sample.rollout.prompt_tokens)]
    assert module.policy is not None
    assert module.reference is not None
    difference_T = module.policy.score_without_gradient(groups)[0] - module.reference.score_without_gradient(groups)[0]
    kl_N = torch.stack([part.sum() for part in difference_T.split(sample.rollout.lengths_N.tolist())]).double()
    assert kl_N.abs().max() > 1e-3
    totals_PG = (sample.scores.totals_N - 0.5 * kl_N).reshape(-1, 4)
    expected_PG = totals_PG - totals_PG.mean(-1, keepdim=True)
    # the KL is rounded
    torch.testing.assert_close(episode.advantages_N.double(), expected_PG.flatten(), atol=1e-4, rtol=1e-4)
    metrics = module.metrics.last
    assert metrics["policy/kl_reward"] == pytest.approx(float(kl_N.mean()), abs=1e-4)
    assert metrics["train/reward"] == pytest.approx(float(sample.scores.totals_N.mean()))
    assert not any(name.startswith("reward/kl") for name in metrics)


def test_an_adaptive_coefficient_moves_after_steps_that_trained(tmp_path: Path) -> None:
    def run(**options: Any) -> Any:
        module = make_module(algorithm=Clipped(beta=0.5, kl=KL(target=100.0, horizon=10)), **options)
        fit(tmp_path, module, max_steps=2)
        return module

    module = run()
    # Far below the target, it falls by the most that a step may: 0.2 / horizon.
    assert module.algorithm.kl_coefficient == pytest.approx(0.5 * 0.98**2)
    assert module.metrics.last["policy/kl_coefficient"] == pytest.approx(0.5 * 0.98)  # what the last step was made with

    reward_only = Clipped(beta=0.5, kl=KL(estimator="k1", place="reward", target=0.1))
    idle = make_module(algorithm=reward_only, reward=ConstantReward())
    fit(tmp_path, idle, max_steps=1)
    # float noise is no difference, or constant groups would train on it
    assert idle.metrics.last["policy/kl_reward"] == 0
    assert idle.metrics.last["policy/empty_steps"] == 1
    assert reward_only.kl_coefficient == idle.algorithm.kl_coefficient == 0.5


def test_steps_without_training_are_not_reported(tmp_path: Path) -> None:
    class Counts(Clipped):
        calls = 0

        def adapt(self, metrics: Any) -> None:
            Counts.calls += 1
            assert "policy/ratio_mean" in metrics

    fit(tmp_path, make_module(algorithm=Counts(), reward=ConstantReward()), max_steps=2)
    assert Counts.calls == 0
    fit(tmp_path, make_module(algorithm=Counts()), max_steps=2)
    assert Counts.calls == 2


# ReMax
# ----------------------------------------------------------------------------------------------------------------------


class FailsOn(DigitReward):
    """Fails on one text, and counts letters otherwise."""

    text = "never"

    def compute_reward(self, turns: Any, context: Any = None) -> float:
        if turns[-1].content == self.text:
            raise OSError("away")
        return len(turns[-1].content) / 8 + super().compute_reward(turns)


def test_remax_compares_with_the_greedy_answer_and_its_failure_fails_the_group(tmp_path: Path) -> None:
    module = make_module(
        algorithm=ReMax(), reward=FailsOn(), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0)
    )
    data = make_data(train=SCENARIOS[:4], validation=None, shuffle=False)
    trainer = fit(tmp_path, module, data, max_steps=1)
    assert trainer.global_step == 1
    batch = next(iter(data.train_dataloader()))
    module.setup("fit")
    assert module.policy is not None
    baseline = module._sampler.sample(module.policy, batch, 1, greedy=True)
    greedy, scores = baseline.rollout, baseline.scores
    rewards_PG = torch.tensor([record["reward"] for record in module.last_records], dtype=torch.float64).reshape(4, 4)
    expected = (rewards_PG - scores.totals_N[:, None]).flatten()
    torch.testing.assert_close(module.episode.advantages_N.double(), expected, atol=1e-6, rtol=0)  # type: ignore[union-attr]
    assert module.metrics.last["train/baseline_reward"] == pytest.approx(float(scores.totals_N.mean()))

    reward = FailsOn()
    reward.text = greedy.texts[0]
    module = make_module(algorithm=ReMax(), reward=reward, max_reward_failures=0.9)
    fit(tmp_path, module, make_data(train=SCENARIOS[:4], validation=None, shuffle=False), max_steps=1)
    failed_PG = module.episode.advantages_N.isnan().reshape(4, 4)  # type: ignore[union-attr]
    same = [text == greedy.texts[0] for text in greedy.texts]
    assert failed_PG.all(-1).tolist() == same
    assert module.metrics.last["reward_failures/fails_on/OSError"] >= sum(same)


# Guards
# ----------------------------------------------------------------------------------------------------------------------


class Shifted(InProcessEngine):
    """An engine whose log-probs are a little off, as with a wrong mask."""

    def generate(self, *args: Any, **kwargs: Any) -> Rollout:
        result = super().generate(*args, **kwargs)
        return replace(result, logprobs_T=result.logprobs_T + 0.01)


def test_a_sampler_that_computes_another_policy_stops_the_run(tmp_path: Path) -> None:
    module = make_module()
    module.engine = Shifted(module.tokenizer)
    with pytest.raises(
        SamplingError, match=r"differ by 0\.01 nats per token, where float error \(torch.float32\) is below 0\.001"
    ):
        fit(tmp_path, module)
    module = make_module()
    module.engine = Shifted(module.tokenizer)
    module.policy_config = PolicyConfig("tiny", dropout=0.1)  # the trainer's policy is another then, on purpose
    assert fit(tmp_path, module).global_step == 2


@pytest.mark.parametrize("engine", [VLLMEngine(["http://127.0.0.1:9"]), object()], ids=["servers", "another"])
def test_masks_of_an_engine_that_returns_none_are_refused(tiny_tokenizer: Any, engine: Any) -> None:
    sampling = rollout(top_k=30, keep_sampling_mask=True)
    with pytest.raises(ConfigError, match=r"keep_sampling_mask=true: (VLLMEngine|object) returns none; leave it out"):
        ready_engine(engine, tiny_tokenizer, sampling, "32-true")


# All of it
# --------------------------------------------------------------------------------------------------------------------


def test_everything_together_resumes_bit_identical(tmp_path: Path) -> None:
    """Curriculum, dynamic sampling, sampling masks, selected tokens, adaptive KL, two passes of two optimizer steps;
    cut inside and between episodes.
    """

    def run(
        name: str, ckpt_path: Path | None = None
    ) -> tuple[dict[str, torch.Tensor], dict[str, float], dict[str, Any]]:
        keep_all = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        algorithm = Clipped(beta=0.05, kl=KL(target=0.01), top_entropy=0.4)
        filtered = rollout(dynamic_sampling=2, top_k=30, keep_sampling_mask=True)
        module = make_module(reward=FlatByTopic(), algorithm=algorithm, rollout=filtered)
        curriculum = Curriculum(solved_at=0.5, floor=0.05)
        data = make_data(train=HALF_FLAT, validation=None, num_iterations=2, steps_per_episode=2, curriculum=curriculum)
        options = {"callbacks": [keep_all], "enable_checkpointing": True, "max_steps": 10}
        trainer = fit(tmp_path, module, data, ckpt_path=ckpt_path, **options)
        metrics = module.metrics.last
        steady = {
            name: value
            for name, value in metrics.items()
            if not name.startswith(("time/", "memory/", "work/tokens_per_s"))
        }
        return weights(trainer), steady, data.state_dict()["solve_rates"]

    straight, straight_metrics, straight_rates = run("straight")
    assert straight_rates["rates"].isfinite().sum() > 6
    saved = torch.load(tmp_path / "straight" / "step=1.ckpt", weights_only=True)["stateset"]["episode"][0]
    assert (saved["sampling_mask"][1] == 30).all()
    for cut in (1, 4, 6):
        resumed, metrics, rates = run(f"from-{cut}", tmp_path / "straight" / f"step={cut}.ckpt")
        assert all(torch.equal(resumed[name], value) for name, value in straight.items()), f"resumed from step {cut}"
        assert metrics == straight_metrics
        assert torch.equal(rates["waiting"], straight_rates["waiting"])
        torch.testing.assert_close(rates["rates"], straight_rates["rates"], rtol=0, atol=0, equal_nan=True)


def test_a_curriculum_hears_of_every_group_and_draws_those_that_are_mixed(tmp_path: Path) -> None:
    class SolvedByTopic(RewardFunction):
        def compute_reward(self, turns: Any, context: Any = None) -> float:
            return 1.0 if context["topic"] == "flat" else float(sum(turns[-1].content.encode()) % 2)

    module = make_module(
        reward=SolvedByTopic(), rollout=rollout(), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0)
    )
    data = make_data(train=HALF_FLAT, validation=None, batch_size=8, curriculum=Curriculum(floor=0.02))
    fit(tmp_path, module, data, max_steps=12)
    rates = data.state_dict()["solve_rates"]["rates"]
    assert (rates[1::2][rates[1::2].isfinite()] == 1).all()
    topics = [record["topic"] for record in module.last_records]
    assert topics.count("varied") >= 24  # of 32


def test_masked_truncations_and_the_overlong_penalty_go_with_dynamic_sampling(tmp_path: Path) -> None:
    module = make_module(
        reward=[FlatByTopic(), OverlongPenalty(max_tokens=3, buffer=2)],
        rollout=rollout(max_new_tokens=3, dynamic_sampling=1),
        algorithm=Clipped(mask_truncated=True),
    )
    fit(tmp_path, module, make_data(train=HALF_FLAT, validation=None), max_steps=1)
    episode = module.episode
    assert episode is not None
    truncated_N = torch.tensor([record["finish_reason"] == "length" for record in module.last_records])
    assert truncated_N.any()
    assert (~truncated_N).any()
    assert not episode.active_N[truncated_N].any()
    assert (episode.weights_N[truncated_N] == 0).all()
    assert episode.active_N.any()
    for record in module.last_records:
        assert record["rewards"]["overlong_penalty"] == pytest.approx(min(0.0, 1 - record["num_tokens"]) / 2)
    assert math.isfinite(module.metrics.last["reward/overlong_penalty"])


def test_with_the_kl_in_the_reward_no_pass_is_made_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[Policy] = []
    score = Policy.score_without_gradient

    def counted(self: Policy, *arguments: Any) -> Any:
        passes.append(self)
        return score(self, *arguments)

    monkeypatch.setattr(Policy, "score_without_gradient", counted)
    module = make_module(algorithm=GRPO(beta=0.04, kl=KL(estimator="k1", place="reward")))
    fit(tmp_path, module, make_data(num_iterations=2), max_steps=2)
    assert passes == [module.policy, module.reference]  # the log-probs behind the KL are the old ones, too
    assert module.metrics.last["policy/ratio_mean"] != 1


def test_the_kl_in_the_reward_of_an_untrained_policy_is_zero_under_mixed_precision(tmp_path: Path) -> None:
    # The sampler computes in bfloat16; its log-probs would differ from the reference's, and constant groups would get
    # advantages.
    algorithm = GRPO(beta=0.1, kl=KL(estimator="k1", place="reward"))
    trainer = fit(
        tmp_path, make_module(algorithm=algorithm, reward=ConstantReward()), max_steps=1, precision="bf16-mixed"
    )
    module = trainer.lightning_module
    assert module.metrics.last["policy/kl_reward"] == 0
    assert all(record["advantage"] == 0 for record in module.last_records)


def test_failures_of_all_ranks_count_and_each_rank_tells_of_them() -> None:
    values = {0: [1.0, 1.0], 1: [math.nan, math.nan, math.nan]}
    failures = [RewardFailure(n, "right", kind, "no", "trace") for n, kind in enumerate(["KeyError", "OSError"] * 2)]

    def told(ranks: Ranks, most: float) -> str:
        totals_N, known = torch.tensor(values[ranks.rank]), failures[: 3 * ranks.rank]
        try:
            check_failures([Scores(("right",), totals_N[:, None], totals_N, failures=known)], most, ranks)
        except RewardError as error:
            return str(error)
        return ""

    assert on_ranks(2, partial(told, most=0.6)) == ["", ""]
    one, other = on_ranks(2, partial(told, most=0.5))
    assert one == other
    assert one.startswith(
        "3 of 5 completions have no score, more than max_reward_failures=0.5 allows (right/KeyError: 2, "
    )
    assert one.endswith("right/OSError: 1). The last failure, of reward 'right' on completion 2: KeyError: no\ntrace")
