"""Episode hooks: of plain objects, sync and async, and of Lightning callbacks; also inside a running event loop."""

import asyncio
from types import SimpleNamespace

import pytest
from lightning.pytorch import Callback, Trainer

from stateset_lightning import EpisodeCallback, GRPOLightningModule, RolloutConfig, ScenarioDataModule
from stateset_lightning.callbacks.episodes import call_episode_hook

ROWS = [{"prompt": f"What is {i} + 1?", "target": str(i + 1)} for i in range(4)]


class TrainingCallback:  # the guide's, letter by letter
    def on_episode_start(self, episode):
        print(f"Starting episode {episode}")

    def on_episode_end(self, episode, metrics):
        print(f"Episode {episode} complete: {metrics}")


def trainer_with(*callbacks):
    return SimpleNamespace(callbacks=list(callbacks))


def fit(tmp_path, *callbacks, **data):
    module = GRPOLightningModule(
        "tiny", reward=lambda turns, context: len(turns[-1].content), rollout=RolloutConfig(2, 3), seed=1
    )
    trainer = Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, datamodule=ScenarioDataModule(ROWS, batch_size=2, **data))


def test_the_guides_object_is_called_around_every_episode(tmp_path, capsys):
    fit(tmp_path, EpisodeCallback(TrainingCallback()), num_iterations=2)
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
    fit(tmp_path, recorder)
    assert [episode for episode, _ in recorder.ended] == [0, 1, 2, 3]
    assert all(reward >= 0 for _, reward in recorder.ended)


def test_a_subclass_overrides_the_hooks():
    class Mine(EpisodeCallback):
        seen = None

        def on_episode_start(self, episode):
            self.seen = episode

    mine = Mine()
    call_episode_hook(trainer_with(mine), "on_episode_start", 5)
    call_episode_hook(trainer_with(mine), "on_episode_end", 5, {})
    assert mine.seen == 5


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


def test_what_a_hook_raises_stops_the_run():
    class Raising:
        async def on_episode_start(self, episode):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        call_episode_hook(trainer_with(EpisodeCallback(Raising())), "on_episode_start", 0)


def test_an_object_without_hooks_is_refused():
    with pytest.raises(TypeError, match="neither on_episode_start nor on_episode_end"):
        EpisodeCallback(object())
