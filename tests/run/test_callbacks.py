"""Episode hooks, a reference that moves, lines of progress, and the summary of a run."""

import asyncio
import contextlib
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from module_runs import fit, make_data, make_module, weights

from stateset_lightning import EpisodeCallback, GRPOLightningModule, RolloutConfig, ScenarioDataModule
from stateset_lightning.algorithm import GRPO
from stateset_lightning.callbacks import ConsoleProgress, ReferenceSync, RunSummary, SampleWriter
from stateset_lightning.errors import ConfigError
from stateset_lightning.policy import LoRAConfig, PolicyConfig
from stateset_lightning.run import callbacks
from stateset_lightning.threads import call_episode_hook

ROWS = [{"prompt": f"What is {i} + 1?", "target": str(i + 1)} for i in range(4)]


class TrainingCallback:  # the guide's, letter by letter
    def on_episode_start(self, episode):
        print(f"Starting episode {episode}")

    def on_episode_end(self, episode, metrics):
        print(f"Episode {episode} complete: {metrics}")


def trainer_with(*callbacks):
    return SimpleNamespace(callbacks=list(callbacks))


def fit_with(tmp_path, *callbacks, **data):
    module = GRPOLightningModule(
        "tiny", reward=lambda turns, context: len(turns[-1].content), rollout=RolloutConfig(2, 3), seed=1
    )
    trainer = Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
    )
    trainer.fit(module, datamodule=ScenarioDataModule(ROWS, batch_size=2, **data))


def test_the_guides_object_is_called_around_every_episode(tmp_path, capsys):
    fit_with(tmp_path, EpisodeCallback(TrainingCallback()), num_iterations=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if "pisode " in line]
    assert [line.split(":")[0] for line in lines] == [
        "Starting episode 0",
        "Episode 0 complete",
        "Starting episode 1",
        "Episode 1 complete",
    ]
    assert "'train/reward'" in lines[1]
    assert "'policy/loss'" in lines[1]  # with the metrics of its last optimizer step


def test_a_lightning_callback_with_the_hooks_is_called(tmp_path):
    class Recorder(Callback):
        def __init__(self):
            self.ended = []

        def on_episode_end(self, episode, metrics):
            self.ended.append((episode, metrics["train/reward"]))

    recorder = Recorder()
    fit_with(tmp_path, recorder)
    assert [episode for episode, _ in recorder.ended] == [0, 1, 2, 3]
    assert all(reward >= 0 for _, reward in recorder.ended)


def test_a_subclass_overrides_the_hooks():
    class Mine(EpisodeCallback):
        seen = None

        def on_episode_start(self, episode):
            self.seen = episode

    target = Async()
    for mine in (Mine(), Mine(target)):
        call_episode_hook(trainer_with(mine), "on_episode_start", 5)
        call_episode_hook(trainer_with(mine), "on_episode_end", 5, {})
        assert mine.seen == 5
    assert target.seen == [(5, {})]


class Async:
    def __init__(self):
        self.seen = []

    async def on_episode_end(self, episode, metrics):
        await asyncio.sleep(0)
        self.seen.append((episode, metrics))


def test_async_hooks_are_awaited_before_training_goes_on():
    target = Async()
    call_episode_hook(trainer_with(EpisodeCallback(target)), "on_episode_end", 2, {"a": 1.0})
    assert target.seen == [(2, {"a": 1.0})]


def test_async_hooks_are_awaited_inside_a_running_loop():
    target = Async()

    async def notebook():
        call_episode_hook(trainer_with(EpisodeCallback(target)), "on_episode_end", 3, {})

    asyncio.run(notebook())
    assert target.seen == [(3, {})]


def test_an_object_may_have_the_hook_of_turns_alone():
    class OfTurns:
        def on_turn_end(self, trainer, pl_module, turn, conversations):
            self.seen = pl_module, turn, conversations

    target = OfTurns()
    call_episode_hook(trainer_with(EpisodeCallback(target)), "on_turn_end", "trainer", "module", 2, [])
    assert target.seen == ("module", 2, [])


def test_what_a_hook_raises_stops_the_run():
    class Raising:
        async def on_episode_start(self, episode):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        call_episode_hook(trainer_with(EpisodeCallback(Raising())), "on_episode_start", 0)


def test_an_object_without_hooks_is_refused():
    with pytest.raises(TypeError, match="none of on_episode_start, on_episode_end, on_turn_end"):
        EpisodeCallback(object())


NAME = "policy.model.model.norm.weight"


class Watch(Callback):
    """A weight of the policy and of the reference, before training and after each optimizer step."""

    def __init__(self) -> None:
        self.policy: list[torch.Tensor] = []
        self.reference: list[torch.Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._look(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self._look(pl_module)

    def _look(self, module: Any) -> None:
        self.policy.append(module.state_dict()[NAME].clone())
        self.reference.append(module.reference.state_dict()[NAME.removeprefix("policy.")].clone())


def run(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    options = {"max_steps": 4, **options}
    return fit(folder, make_module(algorithm=GRPO(beta=0.1)), callbacks=list(callbacks), **options)


def test_every_second_step_by_hand(tmp_path: Path) -> None:
    watch = Watch()
    run(tmp_path, ReferenceSync(every_n_steps=2, mixup=0.25), watch)
    policy, reference = watch.policy, watch.reference
    assert torch.equal(reference[0], policy[0])
    assert torch.equal(reference[1], policy[0])
    torch.testing.assert_close(reference[2], 0.25 * policy[2] + 0.75 * policy[0])
    assert torch.equal(reference[3], reference[2])
    torch.testing.assert_close(reference[4], 0.25 * policy[4] + 0.75 * reference[2])
    assert not torch.equal(policy[2], policy[0])


def test_a_full_update_makes_the_reference_the_policy_and_micro_steps_do_not_count(tmp_path: Path) -> None:
    watch = Watch()
    fit(
        tmp_path,
        make_module(algorithm=GRPO(beta=0.1)),
        make_data(steps_per_episode=2),
        callbacks=[ReferenceSync(every_n_steps=1, mixup=1.0), watch],
        max_steps=2,
        accumulate_grad_batches=2,
    )
    assert torch.equal(watch.reference[1], watch.policy[0])
    assert torch.equal(watch.reference[2], watch.policy[2])
    assert torch.equal(watch.reference[4], watch.policy[4])


def test_a_moved_reference_is_in_the_checkpoint_and_goes_on_exactly(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "kept", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    straight = run(tmp_path, ReferenceSync(every_n_steps=2, mixup=0.5), keep, enable_checkpointing=True, max_steps=5)
    states = [
        torch.load(tmp_path / "kept" / f"step={step}.ckpt", weights_only=True)["callbacks"]["ReferenceSync"]
        for step in (1, 3)
    ]
    assert states[0]["reference"] is None  # it has not moved: nothing to keep
    assert set(states[1]["reference"]) == set(straight.lightning_module.reference.state_dict())
    for step in (1, 2, 3):
        resumed = run(
            tmp_path,
            ReferenceSync(every_n_steps=2, mixup=0.5),
            max_steps=5,
            ckpt_path=tmp_path / "kept" / f"step={step}.ckpt",
        )
        ours = straight.lightning_module.reference.state_dict()
        assert all(
            torch.equal(value, ours[name]) for name, value in resumed.lightning_module.reference.state_dict().items()
        )
        assert all(torch.equal(value, weights(straight)[name]) for name, value in weights(resumed).items())


def test_without_a_reference_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no reference policy to move; set model\.algorithm\.beta above 0"):
        fit(tmp_path, callbacks=[ReferenceSync()])


def test_a_reference_without_weights_of_its_own_is_refused(tmp_path: Path) -> None:
    module = make_module(PolicyConfig("tiny", lora=LoRAConfig(rank=2)), algorithm=GRPO(beta=0.1))
    with pytest.raises(ConfigError, match="with no weights of its own to move"):
        fit(tmp_path, module, callbacks=[ReferenceSync()])


@pytest.mark.parametrize(("options", "message"), [({"every_n_steps": 0}, "at least 1"), ({"mixup": 1.5}, "at most 1")])
def test_bounds(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReferenceSync(**options)


VALIDATING = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None, "max_steps": 4}


def test_the_summary_names_first_and_last_validation_and_places(tmp_path, capsys):
    checkpoints = ModelCheckpoint(save_last=True, every_n_train_steps=2)
    options = {"logger": CSVLogger(tmp_path, "run"), "enable_checkpointing": True, **VALIDATING}
    fit(tmp_path, callbacks=[RunSummary(), SampleWriter(1), checkpoints], **options)
    said = capsys.readouterr().out
    assert "trained for 4 optimizer steps" in said
    assert re.search(r"validation reward: \d\.\d{3} after step 2 -> \d\.\d{3} after step 4 \([+-]\d\.\d{3}\)", said)
    folder = tmp_path / "run" / "version_0"
    assert f"checkpoint: {checkpoints.best_model_path}" in said
    assert f"metrics: {folder / 'metrics.csv'}" in said
    assert f"samples: {folder / 'samples.jsonl'}" in said
    assert "config:" not in said  # the command line writes it
    assert Path(checkpoints.best_model_path).is_relative_to(folder)


def test_the_summary_finds_best_and_last_of_two_that_keep_one_each(tmp_path, capsys):
    best = ModelCheckpoint(tmp_path, monitor="val/reward", mode="max", filename="best")
    last = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=0, save_last=True)
    fit(tmp_path, callbacks=[RunSummary(), best, last], enable_checkpointing=True, **VALIDATING)
    said = capsys.readouterr().out
    assert f"\ncheckpoint: {tmp_path / 'best.ckpt'}\nlast checkpoint: {tmp_path / 'last.ckpt'}\n" in said


def test_the_summary_remembers_validations_across_a_resume(tmp_path, capsys):
    def callbacks():
        return [
            RunSummary(),
            ModelCheckpoint(dirpath=tmp_path, filename="x", every_n_train_steps=4, save_top_k=-1, save_last=True),
        ]

    options = {"enable_checkpointing": True, **VALIDATING}
    fit(tmp_path, callbacks=callbacks(), **options)
    capsys.readouterr()
    fit(tmp_path, callbacks=callbacks(), ckpt_path=tmp_path / "last.ckpt", **{**options, "max_steps": 6})
    assert re.search(r"validation reward: \S+ after step 2 -> \S+ after step 6", capsys.readouterr().out)


def test_a_single_validation_is_no_comparison():
    summary = RunSummary()
    summary.load_state_dict({"validations": [[7, {"reward": 0.5, "reward/right": 0.5, "solved": 0.25}]]})
    trainer = SimpleNamespace(global_step=7, loggers=[], default_root_dir="/nowhere", checkpoint_callbacks=[])
    assert summary.lines(trainer) == ["trained for 7 optimizer steps", "validation reward: 0.500 after step 7"]
    assert summary.state_dict() == {"validations": [[7, {"reward": 0.5, "reward/right": 0.5, "solved": 0.25}]]}


def test_a_held_out_reward_stands_beside_the_trained_one_at_the_end():
    summary = RunSummary()
    trained, held_out = "reward/contains", "reward/exact_match"
    summary.validations = [
        (0, {"reward": 0.2, trained: 0.2, held_out: 0.1}),
        (9, {"reward": 0.9, trained: 0.9, held_out: 0.0, "pass@4": 0.5}),
    ]
    trainer = SimpleNamespace(global_step=9, loggers=[], default_root_dir="/nowhere", checkpoint_callbacks=[])
    assert summary.lines(trainer)[1:] == [
        "validation reward: 0.200 after step 0 -> 0.900 after step 9 (+0.700)",
        "validation reward/contains: 0.200 after step 0 -> 0.900 after step 9 (+0.700)",
        "validation reward/exact_match: 0.100 after step 0 -> 0.000 after step 9 (-0.100)",
        "validation pass@4: 0.500 after step 9",
    ]


# Progress -------------------------------------------------------------------------------------------------------------


def test_console_lines_show_the_reward_and_the_time_left(tmp_path, capsys):
    fit(tmp_path, callbacks=[ConsoleProgress(every_n_steps=2)], **VALIDATING)
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    form = r"step \d/4  reward -?\d+\.\d{3}  mixed groups \d\.\d\d  tokens \d+\.\d  tokens/s \d+  \d+:\d\d left"
    assert [line[:8] for line in steps] == ["step 1/4", "step 2/4", "step 4/4"]
    assert all(re.fullmatch(form, line) for line in steps), steps
    assert steps[-1].endswith("0:00 left")
    validations = [line for line in lines if line.startswith("validation")]
    assert [line[:24] for line in validations] == ["validation after step 2:", "validation after step 4:"]
    assert all(re.fullmatch(r"validation after step \d: reward \d+\.\d{3}", line) for line in validations)


def test_a_step_of_several_micro_steps_has_one_line(tmp_path, capsys):
    data = make_data(steps_per_episode=2)
    fit(tmp_path, data=data, callbacks=[ConsoleProgress(1)], max_steps=2, accumulate_grad_batches=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:8] for line in lines if line.startswith("step ")] == ["step 1/2", "step 2/2"]


def test_a_number_of_steps_below_one_is_refused():
    with pytest.raises(ConfigError, match="every_n_steps=0 must be at least 1"):
        ConsoleProgress(every_n_steps=0)


@pytest.fixture
def clock(monkeypatch):
    """`clock.now` is the time, for the callback and for the heartbeat."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: clock.now)
    return clock


class Lasts(Callback):
    """Optimizer step k, from 1, takes `seconds(k)`."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def on_train_batch_start(self, trainer, *args):
        self.clock.now += self.seconds(trainer.global_step + 1)


def lines_of_steps(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]


def test_the_time_left_follows_from_recent_steps(tmp_path, capsys, clock):
    slow_start = Lasts(clock, lambda step: 1000 if step == 1 else 3 if step < 6 else 6)
    fit(tmp_path, callbacks=[slow_start, ConsoleProgress(1)], max_steps=14)
    left = [line.split()[-2] for line in lines_of_steps(capsys)]
    assert left[0] == "216:40"  # 13 steps of 1000 s
    assert left[4] == "0:27"  # 9 steps of 3 s, the median
    assert left[12] == "0:06"  # of the last ten steps, most took 6 s


@pytest.mark.parametrize(("seconds", "steps"), [(20, [1, 2, 3, 4, 5]), (6, [1, 3, 4]), (0.1, [1, 4])])
def test_slow_steps_have_a_line_each(tmp_path, capsys, clock, seconds, steps):
    fit(tmp_path, callbacks=[Lasts(clock, lambda step: seconds), ConsoleProgress(4)], max_steps=5)
    assert [int(line.split("/")[0].split()[1]) for line in lines_of_steps(capsys)] == steps


@pytest.mark.parametrize("fails", [False, True])
def test_no_line_comes_after_the_end(tmp_path, capsys, monkeypatch, fails):
    class Fail(Callback):
        def on_train_batch_end(self, *args):
            if fails:
                raise RuntimeError

    monkeypatch.setattr(callbacks.heartbeat, "seconds", 0.0)
    with contextlib.suppress(RuntimeError):
        fit(tmp_path, callbacks=[ConsoleProgress(), Fail()], max_steps=1)
    assert "training on episode 0, 0 s so far" in capsys.readouterr().out
    time.sleep(0.1)
    assert capsys.readouterr().out == ""
