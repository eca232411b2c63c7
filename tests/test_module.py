"""GRPOLightningModule in real Lightning runs: gradients, resume, failures, and everything a Trainer can be asked
for.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from module_runs import (
    SCENARIOS,
    DigitReward,
    GradientRecorder,
    fit,
    make_data,
    make_module,
    make_trainer,
    relative_difference,
    weights,
)

from stateset_lightning import RewardFunction, RolloutConfig
from stateset_lightning.algorithm import DAPO, GRPO, KL, Algorithm, DrGRPO
from stateset_lightning.callbacks import EpisodeCallback
from stateset_lightning.errors import ConfigError, NonFiniteError, RewardError
from stateset_lightning.policy import PolicyConfig
from stateset_lightning.run.fsdp_strategy import SUPPORTED_STRATEGIES
from stateset_lightning.training.checks import check_strategy
from stateset_lightning.training.schedule import Schedule


def first_gradient(
    folder: Path,
    algorithm: Algorithm,
    accumulate: int,
    precision: str = "32-true",
    rollout: RolloutConfig | None = None,
    **data: Any,
) -> dict[str, torch.Tensor]:
    recorder = GradientRecorder()
    module = make_module(algorithm=algorithm, **({} if rollout is None else {"rollout": rollout}))
    options = {"accumulate_grad_batches": accumulate, "callbacks": [recorder], "precision": precision}
    fit(folder, module, make_data(steps_per_episode=accumulate, **data), max_steps=1, **options)
    return recorder.steps[0]


@pytest.mark.parametrize(
    "algorithm", [GRPO(beta=0.04), DrGRPO(), DAPO()], ids=lambda algorithm: type(algorithm).__name__
)
def test_the_gradient_does_not_depend_on_the_split_into_micro_steps(tmp_path: Path, algorithm: Algorithm) -> None:
    whole = first_gradient(tmp_path, algorithm, accumulate=1)
    for accumulate in (2, 4):
        split = first_gradient(tmp_path, algorithm, accumulate=accumulate)
        assert relative_difference(split, whole) < 1e-6


def test_the_gradient_does_not_depend_on_a_split_inside_groups(tmp_path: Path) -> None:
    whole = first_gradient(tmp_path, DAPO(), accumulate=1, batch_size=1)
    split = first_gradient(tmp_path, DAPO(), accumulate=4, batch_size=1)  # one completion per micro-step
    assert relative_difference(split, whole) < 1e-6


def test_with_kept_masks_the_gradient_is_another_and_the_same_for_every_split(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_generations": 4, "max_new_tokens": 5, "top_p": 0.8, "temperature": 2.0}
    replayed, plain = RolloutConfig(**options, keep_sampling_mask=True), RolloutConfig(**options)
    algorithm = GRPO(beta=0.04, entropy_coefficient=0.01)
    whole = first_gradient(tmp_path, algorithm, 1, rollout=replayed, batch_size=2)
    assert relative_difference(first_gradient(tmp_path, algorithm, 1, rollout=plain, batch_size=2), whole) > 0.01
    split = first_gradient(tmp_path, algorithm, 4, rollout=replayed, batch_size=2)  # groups in halves
    assert relative_difference(split, whole) < 1e-6


DDP_SCRIPT = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from module_runs import GradientRecorder, fit, make_data, make_module, weights
from stateset_lightning.algorithm import DAPO
from stateset_lightning.training.schedule import Schedule

class Recorder(GradientRecorder):
    def on_train_end(self, trainer, pl_module):
        torch.save({{"gradients": self.steps, "weights": weights(trainer), "metrics": pl_module.metrics.last}},
                   Path({folder!r}) / f"world{{trainer.world_size}}-rank{{trainer.global_rank}}.pt")

devices = int(sys.argv[1])
module = make_module(algorithm=DAPO(), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
data = make_data(batch_size=8 // devices, steps_per_episode=2, num_iterations=2)
fit(Path({folder!r}), module, data,
    callbacks=[Recorder()], devices=devices, strategy="ddp" if devices > 1 else "auto", max_steps=3,
    gradient_clip_val=1.0)
"""


@pytest.mark.slow  # starts three processes that import torch and lightning
def test_two_ranks_have_the_samples_and_gradients_of_one(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(DDP_SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    for devices in (1, 2):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        run = subprocess.run(
            [sys.executable, script, str(devices)], capture_output=True, text=True, timeout=240, env=environment
        )
        assert run.returncode == 0, run.stderr[-3000:]
    one = torch.load(tmp_path / "world1-rank0.pt", weights_only=True)
    for rank in (0, 1):
        two = torch.load(tmp_path / f"world2-rank{rank}.pt", weights_only=True)
        assert sum(map(bool, one["gradients"])) >= 2
        for mine, other in zip(two["gradients"], one["gradients"], strict=True):
            assert relative_difference(mine, other) < 1e-6
        for name in (
            "train/reward",
            "completion/mean_tokens",
            "completion/max_tokens",
            "groups/mixed",
            "policy/entropy",
            "policy/ratio_mean",
        ):
            assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-5), name


def test_completions_without_an_advantage_are_skipped_without_changing_the_gradient(tmp_path: Path) -> None:
    class TrainsOnEverything(DAPO):
        trains_on_zero_advantage = True  # type: ignore[assignment]

    skipped = first_gradient(tmp_path, DAPO(), accumulate=1)
    everything = first_gradient(tmp_path, TrainsOnEverything(), accumulate=1)
    assert relative_difference(skipped, everything) < 1e-6


def test_the_ratio_is_one_at_the_first_of_several_steps(tmp_path: Path) -> None:
    trainer = fit(tmp_path, data=make_data(num_iterations=2), max_steps=1)
    assert trainer.lightning_module.metrics.last["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    trainer = fit(tmp_path, data=make_data(num_iterations=2), max_steps=2)
    assert abs(trainer.lightning_module.metrics.last["policy/ratio_mean"] - 1.0) > 1e-4


@pytest.mark.parametrize(("keep_sampling_mask", "place"), [(False, "loss"), (True, "loss"), (True, "reward")])
def test_log_probs_of_the_sampler_are_those_of_the_loss_and_of_the_reference(
    tmp_path: Path, keep_sampling_mask: bool, place: Any
) -> None:
    filters = {"temperature": 0.7, "top_p": 0.9, "keep_sampling_mask": keep_sampling_mask}
    module = make_module(
        rollout=RolloutConfig(num_generations=4, max_new_tokens=5, **filters),
        algorithm=GRPO(beta=0.04, kl=KL(estimator="k3", place=place)),
    )
    episode = fit(tmp_path, module, make_data(num_iterations=2), max_steps=1).lightning_module.episode
    tokens_T = episode.active_N.repeat_interleave(episode.lengths_N)
    assert tokens_T.any()
    for logprobs_T in (episode.old_logprobs_T, episode.ref_logprobs_T):
        assert (logprobs_T - episode.sampling_logprobs_T)[tokens_T].abs().max() < 1e-5
    assert (episode.sampling_mask is not None) == keep_sampling_mask
    assert abs(module.metrics.last["policy/ratio_mean"] - 1) < 1e-5
    assert module.metrics.last["policy/sampling_difference"] < 1e-5


class ConstantReward(RewardFunction):
    def compute_reward(self, turns: Any, context: Any = None) -> float:
        return 0.3


def test_an_episode_without_anything_to_train_leaves_the_weights_alone(tmp_path: Path) -> None:
    module = make_module(
        reward=ConstantReward(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
        lr_scheduler=Schedule(decay="linear"),
    )
    module.configure_model()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = fit(tmp_path, module, max_steps=2)
    assert trainer.global_step == 2
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 2
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
    assert module.metrics.last["policy/empty_steps"] == 1
    assert module.metrics.last["groups/all_right"] == 1


class FailsOnShortAnswers(DigitReward):
    def compute_reward(self, turns: Any, context: Any = None) -> float:
        if len(turns[-1].content) < 2:
            raise OSError("the grader is away")
        return super().compute_reward(turns, context)


def test_a_failed_reward_trains_nothing_and_is_counted(tmp_path: Path) -> None:
    module = make_module(reward=FailsOnShortAnswers(), max_reward_failures=1.0)
    fit(tmp_path, module, max_steps=1)
    episode = module.episode
    short_N = torch.tensor([len(record["completion"]) < 2 for record in module.last_records])
    assert short_N.any()
    assert (~short_N).any()
    assert episode.advantages_N[short_N].isnan().all()
    assert (episode.weights_N[short_N] == 0).all()
    assert not episode.active_N[short_N].any()
    assert module.metrics.last["reward_failures/fails_on_short_answers/OSError"] == short_N.sum()
    assert all(value.isfinite().all() for value in module.state_dict().values())


class AlwaysFails(RewardFunction):
    def compute_reward(self, turns: Any, context: Any = None) -> float:
        raise OSError("the grader is away")


def test_too_many_failures_stop_the_run_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="the grader is away"):
        fit(tmp_path, make_module(reward=AlwaysFails()))


class FailsOnTheLast(DigitReward):
    """Fails on one prompt alone, which comes in a batch of its own."""

    def compute_reward(self, turns: Any, context: Any = None) -> float:
        if context["prompt"] == SCENARIOS[4]["prompt"]:
            raise OSError("the grader is away")
        return super().compute_reward(turns, context)


def test_failures_of_a_validation_count_over_the_split_and_not_over_a_batch(tmp_path: Path) -> None:
    data = make_data(train=SCENARIOS[:4], validation=SCENARIOS[:5])
    trainer = fit(
        tmp_path, make_module(reward=FailsOnTheLast()), data, max_steps=1, limit_val_batches=1.0, val_check_interval=1
    )
    assert trainer.callback_metrics["val/reward_failures"] == pytest.approx(0.2)
    module = make_module(reward=FailsOnTheLast(), max_reward_failures=0.1)
    with pytest.raises(RewardError, match=r"completions have no score, more than max_reward_failures=0\.1"):
        fit(tmp_path, module, data, max_steps=1, limit_val_batches=1.0, val_check_interval=1)


class Order(EpisodeCallback):
    """What happens when."""

    def __init__(self) -> None:
        super().__init__()
        self.happened: list[str] = []

    def on_episode_end(self, episode: int, metrics: dict[str, Any]) -> None:
        self.happened.append(f"episode {episode} ends")

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.happened.append("checkpoints")


def test_an_episode_has_ended_when_its_last_step_is_saved(tmp_path: Path) -> None:
    order = Order()  # as the callbacks that save, it hears of a batch's end before the module does
    fit(tmp_path, data=make_data(num_iterations=2), max_steps=4, callbacks=[order])
    assert order.happened == [
        "checkpoints",
        "episode 0 ends",
        "checkpoints",
        "checkpoints",
        "episode 1 ends",
        "checkpoints",
    ]


def test_a_reference_is_kept_only_for_a_kl_term_and_starts_at_the_policy(tmp_path: Path) -> None:
    assert not fit(tmp_path, make_module(algorithm=GRPO(beta=0.0)), max_steps=1).lightning_module._reference
    first = fit(tmp_path, make_module(algorithm=GRPO(beta=0.1)), max_steps=1).lightning_module
    assert first.metrics.last["policy/kl"] == pytest.approx(0.0, abs=1e-9)
    assert not any("reference" in name for name in first.state_dict())
    later = fit(tmp_path, make_module(algorithm=GRPO(beta=0.1)), max_steps=3).lightning_module
    assert later.metrics.last["policy/kl"] > 1e-6


CUTS = (1, 2, 3, 5, 8, 9)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_run_resumed_from_any_optimizer_step_ends_bit_identical(tmp_path: Path, dropout: float) -> None:
    """Two prompts' episodes of 2 passes x 2 micro-steps: checkpoints fall inside and between episodes and epochs."""

    def run(name: str, ckpt_path: Path | None = None) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        keep_all = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        module = make_module(lr_scheduler=Schedule(decay="cosine", warmup_steps=2), algorithm=GRPO(beta=0.02))
        if dropout:
            module.policy_config = PolicyConfig("tiny", dropout=dropout)
        data = make_data(num_iterations=2, steps_per_episode=2)
        options = {"callbacks": [keep_all], "enable_checkpointing": True, "max_steps": 12, "gradient_clip_val": 1.0}
        trainer = fit(tmp_path, module, data, ckpt_path=ckpt_path, **options)
        metrics = trainer.lightning_module.metrics.last
        steady = {
            name: value
            for name, value in metrics.items()
            if not name.startswith(("time/", "memory/", "work/tokens_per_s"))
        }
        return weights(trainer), steady

    straight, straight_metrics = run("straight")
    for cut in CUTS:
        resumed, metrics = run(f"from-{cut}", tmp_path / "straight" / f"step={cut}.ckpt")
        assert all(torch.equal(resumed[name], value) for name, value in straight.items()), f"resumed from step {cut}"
        assert metrics == straight_metrics


def test_a_checkpoint_holds_no_pickled_objects(tmp_path: Path) -> None:
    trainer = fit(tmp_path, data=make_data(num_iterations=2), max_steps=1)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    state = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert state["stateset"]["episode"][0]["index"] == 0
    assert state["hyper_parameters"]["policy"]["model_name"] == "tiny"


def test_load_from_checkpoint_needs_only_the_reward(tmp_path: Path) -> None:
    trainer = fit(tmp_path, max_steps=1)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = type(trainer.lightning_module).load_from_checkpoint(tmp_path / "run.ckpt", reward=DigitReward())
    assert loaded.rollout.max_new_tokens == 5
    assert all(torch.equal(value, weights(trainer)[name]) for name, value in loaded.state_dict().items())


def test_validate_fit_fit_test_and_predict_in_one_process(tmp_path: Path) -> None:
    module, data = make_module(), make_data(test=SCENARIOS[:3], predict=SCENARIOS[:2])
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    before = trainer.validate(module, data, verbose=False)[0]["val/reward"]
    trainer.fit(module, data)
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(module, data)
    assert trainer.global_step == 4
    after = trainer.test(module, data, verbose=False)[0]
    assert 0 <= before <= 1
    assert after["test/num_completions"] == 3
    rows = [row for batch in trainer.predict(module, data) for row in batch]
    assert [row["id"] for row in rows] == ["predict:1", "predict:2"]
    assert rows[0].keys() >= {"prompt", "completion", "reward", "rewards", "finish_reason"}


def test_validation_inside_fit_changes_nothing(tmp_path: Path) -> None:
    without = weights(fit(tmp_path, max_steps=3))
    with_validation = weights(
        fit(tmp_path, max_steps=3, limit_val_batches=1.0, val_check_interval=1, check_val_every_n_epoch=None)
    )
    assert all(torch.equal(with_validation[name], value) for name, value in without.items())


def test_the_global_generator_is_neither_read_nor_moved(tmp_path: Path) -> None:
    torch.manual_seed(3)
    first = weights(fit(tmp_path, max_steps=2))
    module = make_module()
    trainer = make_trainer(tmp_path)
    torch.manual_seed(12345)
    before = torch.random.get_rng_state()
    trainer.fit(module, make_data())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(value, first[name]) for name, value in weights(trainer).items())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions_train_and_stay_finite(tmp_path: Path, precision: str) -> None:
    module = make_module()
    trainer = fit(tmp_path, module, precision=precision, max_steps=2)
    expected = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert {value.dtype for value in module.policy.parameters()} == {expected}
    assert all(value.isfinite().all() for value in weights(trainer).values())
    assert module.metrics.last["policy/grad_norm"] > 0


def test_gradient_checkpointing_gives_the_same_run(tmp_path: Path) -> None:
    plain = weights(fit(tmp_path, max_steps=2))
    module = make_module()
    module.policy_config = PolicyConfig("tiny", gradient_checkpointing=True)
    assert relative_difference(weights(fit(tmp_path, module, max_steps=2)), plain) < 1e-6


def test_it_runs_inside_a_running_event_loop(tmp_path: Path) -> None:
    class AsyncReward(RewardFunction):
        async def compute_reward(self, turns: Any, context: Any = None) -> float:
            await asyncio.sleep(0)
            return float(len(turns[-1].content))

    async def notebook_cell() -> int:
        return fit(tmp_path, make_module(reward=AsyncReward()), max_steps=1).global_step

    assert asyncio.run(notebook_cell()) == 1


def _train_loader(module: Any) -> Any:
    data = make_data(tokenizer=module.tokenizer)
    data.setup("fit")
    return data.train_dataloader()


class ExplodingAlgorithm(Algorithm):
    def per_token_loss(self, tokens: Any) -> Any:
        loss_T, metrics = super().per_token_loss(tokens)
        return loss_T * float("inf"), metrics


def test_a_gradient_that_is_not_finite_is_skipped_and_counted_and_stops_a_run_that_stays_so(tmp_path: Path) -> None:
    module = make_module(algorithm=ExplodingAlgorithm())
    module.configure_model()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fit(tmp_path, module, max_steps=2)
    assert module.metrics.last["policy/bad_steps"] == 1
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    with pytest.raises(NonFiniteError, match="was not finite in 11 optimizer steps in a row"):
        fit(tmp_path, make_module(algorithm=ExplodingAlgorithm()), max_steps=20)


def test_a_diverged_policy_says_so_when_it_is_sampled(tmp_path: Path) -> None:
    module = make_module()
    module.configure_model()
    with torch.no_grad():
        next(module.policy.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="logits are not finite"):
        fit(tmp_path, module)


def test_a_sharded_strategy_is_refused() -> None:
    expected = r"trainer\.strategy=ShardedStrategy is not supported: use auto, ddp for several devices, or fsdp2"
    with pytest.raises(ConfigError, match=expected):
        check_strategy(SimpleNamespace(strategy=type("ShardedStrategy", (), {})()), SUPPORTED_STRATEGIES)  # type: ignore[arg-type]


def test_metrics_of_an_episode_do_not_outlive_it(tmp_path: Path) -> None:
    class FailsOnce(DigitReward):
        calls = 0

        def compute_reward(self, turns: Any, context: Any = None) -> float:
            FailsOnce.calls += 1
            if FailsOnce.calls == 1:
                raise OSError("once")
            return super().compute_reward(turns, context)

    module = make_module(reward=FailsOnce())
    fit(tmp_path, module, max_steps=1)
    assert module.metrics.last["reward_failures/fails_once/OSError"] == 1
    fit(tmp_path, module, max_steps=1)
    assert not any(name.startswith("reward_failures") for name in module.metrics.last)


def test_accumulation_must_divide_the_steps_of_an_episode(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"accumulate_grad_batches=2 must divide data\.steps_per_episode=3.*to 4"):
        fit(tmp_path, data=make_data(steps_per_episode=3), accumulate_grad_batches=2)


def test_seeds_differ_in_their_samples(tmp_path: Path) -> None:
    texts = []
    for seed in (1, 2):
        module = make_module(seed=seed)
        fit(tmp_path, module, max_steps=1)
        texts.append([record["completion"] for record in module.last_records])
    assert texts[0] != texts[1]


def test_the_progress_bar_has_the_newest_numbers(tmp_path: Path) -> None:
    shown: list[dict[str, Any]] = []

    def note(trainer: Any, module: Any, *args: Any) -> None:
        shown.append({name: (value, module.metrics.last[name]) for name, value in trainer.progress_bar_metrics.items()})

    fit(tmp_path, max_steps=2, callbacks=[LambdaCallback(on_train_batch_end=note)])
    assert [set(each) for each in shown] == [{"train/reward", "completion/mean_tokens", "work/tokens_per_s"}] * 2
    assert all(value == last for each in shown for value, last in each.values())
