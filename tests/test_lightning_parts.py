"""docs/lightning.md: each part of Lightning works with a run, or is refused at its start in one line."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks as lc
import pytest
import torch
from cli_runs import CONFIG, overlay
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.tuner import Tuner
from module_runs import SCENARIOS, DigitReward, fit, make_data, make_module, make_trainer, weights

from stateset_lightning import GRPOLightningModule, RolloutConfig
from stateset_lightning.callbacks import PredictionWriter, SampleWriter
from stateset_lightning.cli.main import main
from stateset_lightning.errors import ConfigError, UserError
from stateset_lightning.policy import LoRAConfig, PolicyConfig
from stateset_lightning.run import checkpoint_io
from stateset_lightning.training import step
from stateset_lightning.training.schedule import Schedule

DOCS = Path(__file__).parents[1] / "docs" / "lightning.md"
EPOCHS = {"max_steps": -1, "max_epochs": 3}  # two steps each

pytestmark = pytest.mark.filterwarnings("ignore")


def rows(verdict: str) -> list[str]:
    cells = [line.split(" | ") for line in DOCS.read_text().splitlines() if line.startswith("| ")]
    return [row[0].removeprefix("| ") for row in cells if row[1].strip() == verdict]


def optimizer(kind: Any, **options: Any) -> Any:
    return {"module": make_module(optimizer=lambda parameters: kind(parameters, **{"lr": 1e-3, **options}))}


def scheduler(kind: Any, **options: Any) -> Any:
    return {"module": make_module(lr_scheduler=lambda optimizer: kind(optimizer, **options))}


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# What works -----------------------------------------------------------------------------------------------------------


def runs(**options: Any) -> Callable[[Path], None]:
    """Trains as a run without the part does."""

    def run(folder: Path) -> None:
        made = {name: value() if callable(value) else value for name, value in options.items()}
        trainer = fit(folder, max_steps=2, **made)
        assert trainer.global_step == 2 or trainer.should_stop
        plain = fit(folder, max_steps=2)
        assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(trainer).items())

    return run


def observers(folder: Path) -> None:
    stops = lc.EarlyStopping("train/reward", mode="max")
    sizes = lc.ThroughputMonitor(batch_size_fn=len, window_size=2)
    callbacks = [stops, lc.Timer("00:01:00:00"), lc.LearningRateMonitor(), lc.DeviceStatsMonitor(cpu_stats=True), sizes]
    runs(callbacks=callbacks, logger=CSVLogger(folder), log_every_n_steps=1)(folder)


def averages(folder: Path) -> None:
    seen: list[torch.Tensor] = []

    def keep(trainer: Trainer, module: LightningModule, *_: Any) -> None:
        seen.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))

    for kind in (lc.WeightAveraging, lambda: lc.EMAWeightAveraging(decay=0.5)):
        seen.clear()
        trainer = fit(folder, callbacks=[kind(), lc.LambdaCallback(on_train_batch_end=keep)], max_steps=2)
        end = torch.cat([parameter.detach().flatten() for parameter in trainer.lightning_module.parameters()])
        assert not torch.equal(end, seen[-1])
    # In a config, where copying the module reaches the whole command line; a Timer's default is written as text.
    config = overlay("base.yaml", {**CONFIG, "data": {"train": SCENARIOS}})
    cli = main(["fit", "--config", config, "--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks+=Timer"])
    assert cli is not None
    assert cli.trainer.global_step == 2


def makes_its_optimizers(folder: Path) -> None:
    class Own(GRPOLightningModule):
        def configure_optimizers(self) -> Any:
            first, *others = self.parameters()
            groups = [{"params": [first], "lr": 1e-2}, {"params": others}]
            made = torch.optim.SGD(groups, lr=1e-3)
            return [made], [torch.optim.lr_scheduler.StepLR(made, 1)]

    keeps = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(folder, own_module(Own), callbacks=[keeps], enable_checkpointing=True, max_steps=2)
    resumed = fit(folder, own_module(Own), ckpt_path=folder / "step=1.ckpt", max_steps=2)
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(resumed).items())


def own_module(kind: Any) -> Any:
    return kind("tiny", reward=DigitReward(), rollout=RolloutConfig(num_generations=4, max_new_tokens=4))


def schedules_accumulation(folder: Path) -> None:
    """Also resumed from a checkpoint inside an epoch, at whose start Lightning would have asked the callback."""

    def run(*callbacks: Any, **options: Any) -> Trainer:
        module = make_module(lr_scheduler=Schedule("linear"))
        counts = lc.GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})
        data = make_data(steps_per_episode=4)
        return fit(folder, module, data, callbacks=[counts, *callbacks], **EPOCHS, **options)

    whole = run(ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1), enable_checkpointing=True)
    assert (whole.global_step, whole.optimizers[0].param_groups[0]["lr"]) == (8 + 4 + 2, 0)
    resumed = run(ckpt_path=folder / "step=9.ckpt")
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(resumed).items())


def saves_asynchronously(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    original = checkpoint_io.atomic_write
    monkeypatch.setattr(checkpoint_io, "atomic_write", lambda file: written.append(file.name) or original(file))
    keeps = ModelCheckpoint(folder, "{step}", every_n_train_steps=1)
    inner = AsyncCheckpointIO()
    fit(folder, callbacks=[keeps], enable_checkpointing=True, plugins=[AsyncCheckpointIO(inner)])
    inner.teardown()  # the outer one waits for its own thread alone
    assert written == ["step=1.ckpt", "step=2.ckpt"]


def reloads(folder: Path) -> None:
    plain, reloaded = fit(folder, **EPOCHS), fit(folder, **EPOCHS, reload_dataloaders_every_n_epochs=1)
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(reloaded).items())


def forks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # or Lightning gives a fork all cores, and other roundings
    plain = fit(folder)
    for strategy in ("ddp_fork", "ddp_notebook"):
        forked = fit(folder, strategy=strategy)
        assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(forked).items())
        assert forked.lightning_module.policy is not None


def rehearses(folder: Path) -> None:
    keeps = ModelCheckpoint(save_last=True, every_n_train_steps=1)
    for logger in (True, False):
        options = {"logger": logger, "enable_checkpointing": True, "limit_val_batches": 1}
        trainer = make_trainer(folder, fast_dev_run=True, callbacks=[keeps, SampleWriter(1)], **options)
        trainer.fit(make_module(), make_data())
        trainer = make_trainer(folder, fast_dev_run=True, callbacks=[PredictionWriter()], logger=logger)
        trainer.predict(make_module(), make_data(predict=SCENARIOS))
    assert files(folder) == []


def keeps_to_itself(folder: Path) -> None:
    keeps = ModelCheckpoint(every_n_train_steps=1, filename="a")
    fit(None, callbacks=[keeps, SampleWriter(1)], enable_checkpointing=True, max_steps=1)  # type: ignore[arg-type]
    own = "lightning_logs/without_logger"
    assert files(folder) == [f"{own}/.lock", f"{own}/checkpoints/a.ckpt", f"{own}/samples.jsonl"]
    fit(folder / "named", callbacks=[SampleWriter(1)], max_steps=1)
    assert "named/samples.jsonl" in files(folder)


def limits(folder: Path) -> None:
    for option in ({"limit_train_batches": 1}, {"overfit_batches": 1}):
        assert fit(folder, **EPOCHS, **option).global_step == 3


def debugs(folder: Path) -> None:
    runs(detect_anomaly=True, profiler="simple")(folder)
    trainer = Trainer(barebones=True, accelerator="cpu", max_steps=2, default_root_dir=folder)
    trainer.fit(make_module(), make_data())
    assert trainer.global_step == 2


def lowers_the_rate(folder: Path) -> None:
    options = {"mode": "max", "patience": 0, "threshold": 10.0}  # no value is that much better than the first
    for monitor, rate in (("train/reward", 1e-3 * 0.1**5), ("val/reward", 1e-3 * 0.1**2)):
        trainer = fit(folder, **scheduler(ReduceLROnPlateau, monitor=monitor, **options), **EPOCHS, limit_val_batches=1)
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate)


def trains_matrices(folder: Path) -> None:
    module = make_module(
        PolicyConfig("tiny", lora=LoRAConfig(rank=2)), optimizer=lambda parameters: torch.optim.Muon(parameters)
    )
    assert fit(folder, module, max_steps=1).global_step == 1


def switches_the_scheduler(folder: Path) -> None:
    base = overlay("base.yaml", {**CONFIG, "data": {"train": SCENARIOS}})
    ours = overlay("ours.yaml", {"model": {"lr_scheduler": {"decay": "linear"}}})
    theirs = overlay(
        "theirs.yaml",
        {"model": {"lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 2}}}},
    )
    cli = main(["fit", "--config", base, "--config", ours, "--config", theirs])
    assert cli is not None
    assert isinstance(cli.trainer.lr_scheduler_configs[0].scheduler, torch.optim.lr_scheduler.StepLR)


def takes_loaders(folder: Path) -> None:
    data, module, trainer = make_data(), make_module(), make_trainer(folder)
    data.tokenizer = module.tokenizer
    data.setup("fit")
    trainer.fit(module, data.train_dataloader(), data.val_dataloader())
    assert trainer.global_step == 2


def tells_its_version(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert re.fullmatch(r"stateset-lightning [\d.]+\n", capsys.readouterr().out)


WORKS: dict[str, Callable[..., None]] = {
    "`EarlyStopping`, `Timer`, `LearningRateMonitor`, `DeviceStatsMonitor`, `ThroughputMonitor`": observers,
    "`LambdaCallback`": runs(callbacks=lambda: [lc.LambdaCallback(on_train_batch_end=lambda *_: None)]),
    "`WeightAveraging`, `EMAWeightAveraging`": averages,
    "`TQDMProgressBar`, `RichProgressBar`": runs(callbacks=lambda: [lc.TQDMProgressBar()], enable_progress_bar=True),
    "`configure_optimizers` of a subclass": makes_its_optimizers,
    "`GradientAccumulationScheduler`": schedules_accumulation,
    "`AsyncCheckpointIO`": saves_asynchronously,
    "`reload_dataloaders_every_n_epochs`": reloads,
    "`ddp_fork`, `ddp_notebook`": forks,
    "`fast_dev_run`": rehearses,
    "`logger: false`": keeps_to_itself,
    "`overfit_batches`, `limit_train_batches`": limits,
    "`barebones`, `detect_anomaly`, `profiler`": debugs,
    "`ReduceLROnPlateau`": lowers_the_rate,
    "`Muon`": trains_matrices,
    "a scheduler class over a config with `Schedule`": switches_the_scheduler,
    "loaders given to `fit`": takes_loaders,
    "`--version`": tells_its_version,
}


@pytest.mark.parametrize("part", rows("works"))
def test_what_works(part: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["pytest"])
    works = WORKS[part]
    names = set(getattr(works, "__annotations__", {})) - {"folder", "return"}
    works(tmp_path, **{name: request.getfixturevalue(name) for name in names})


# What is refused ------------------------------------------------------------------------------------------------------


class Freezing(BaseFinetuning):
    def freeze_before_training(self, pl_module: LightningModule) -> None: ...

    def finetune_function(self, *args: Any) -> None: ...


class NeedsClosure(torch.optim.SGD):
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        return super().step(closure)


def watches(folder: Path) -> None:
    module = make_module()
    watcher = pytest.importorskip("wandb.integration.torch.wandb_torch").TorchHistory()
    watcher.add_log_gradients_hook(module)  # what the logger's watch() ends in
    fit(folder, module)


def compiles(folder: Path) -> None:
    make_trainer(folder).fit(torch.compile(make_module()), make_data())


def with_fabric(folder: Path) -> None:
    Fabric(accelerator="cpu", devices=1).setup(make_module())


def tunes(method: str) -> Callable[[Path], None]:
    return lambda folder: getattr(Tuner(make_trainer(folder)), method)(make_module(), datamodule=make_data())


def serves_dicts(folder: Path) -> None:
    make_trainer(folder).fit(make_module(), torch.utils.data.DataLoader([{"prompt": "a"}]))


def names_a_class(folder: Path) -> None:
    Path("rows.jsonl").write_text('{"prompt": "a", "target": "a"}\n')
    main(["fit", "--config", overlay("base.yaml", CONFIG), "--model", "my.Subclass"])


def options_of_torch(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.lr_scheduler: ValueError: Expected float between 0 and 1"):
        fit(folder, **scheduler(torch.optim.lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=9, pct_start=3.0))
    fit(folder, **optimizer(torch.optim.AdamW, lr=-1))


def plateaus(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"names no metric: use lightning.pytorch.cli.ReduceLROnPlateau"):
        fit(folder, **scheduler(torch.optim.lr_scheduler.ReduceLROnPlateau))
    fit(folder, **scheduler(ReduceLROnPlateau, monitor="train/reward"))


def with_callbacks(*callbacks: Any) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        for callback in callbacks[1:]:
            with pytest.raises(ConfigError):
                fit(folder, callbacks=[callback()], enable_checkpointing=True)
        fit(folder, callbacks=[callbacks[0]()], enable_checkpointing=True)

    return run


def each(*refused: Callable[[Path], None]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        for one in refused[:-1]:
            with pytest.raises(ConfigError):
                one(folder)
        refused[-1](folder)

    return run


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "`ddp_spawn`": (lambda folder: fit(folder, strategy="ddp_spawn"), "use ddp "),
    "`StochasticWeightAveraging`": (
        with_callbacks(lambda: lc.StochasticWeightAveraging(0.1)),
        "use WeightAveraging or EMAWeightAveraging",
    ),
    "`BatchSizeFinder`, `Tuner.scale_batch_size`": (
        each(with_callbacks(lc.BatchSizeFinder), tunes("scale_batch_size")),
        "set data.batch_size",
    ),
    "`LearningRateFinder`, `Tuner.lr_find`": (
        each(with_callbacks(lc.LearningRateFinder), tunes("lr_find")),
        "compare train/reward of short runs",
    ),
    "`BackboneFinetuning`, `BaseFinetuning`": (
        with_callbacks(lc.BackboneFinetuning, Freezing),
        r"use model\.policy\.lora, or freeze them",
    ),
    "`ModelPruning`": (with_callbacks(lambda: lc.ModelPruning("l1_unstructured", amount=0.5)), "prune the model first"),
    "`OnExceptionCheckpoint`, `save_on_exception`": (
        with_callbacks(lambda: lc.OnExceptionCheckpoint("."), lambda: ModelCheckpoint(save_on_exception=True)),
        "leave it out",
    ),
    "`GradientAccumulationScheduler` that does not divide": (
        lambda folder: fit(
            folder,
            data=make_data(steps_per_episode=4),
            callbacks=[lc.GradientAccumulationScheduler({1: 2, 2: 3})],
        ),
        r"GradientAccumulationScheduler: each of \[1, 2, 3\] must divide data.steps_per_episode=4.*to 6",
    ),
    "`WandbLogger.watch` before `fit`": (watches, "call it in a callback's on_fit_start"),
    "`torch.compile(module)`": (compiles, "give the module as it is"),
    "Fabric": (with_fabric, r"use Trainer\.fit\(\)"),
    "`LBFGS`, other optimizers that need a closure": (
        each(
            lambda folder: fit(folder, **optimizer(torch.optim.LBFGS)),
            lambda folder: fit(folder, **optimizer(NeedsClosure)),
        ),
        "NeedsClosure evaluates the loss several times a step.* use one that needs no closure",
    ),
    "`SparseAdam`": (lambda folder: fit(folder, **optimizer(torch.optim.SparseAdam)), "these are dense: use AdamW"),
    "several optimizers": (
        lambda folder: fit(folder, make_module(optimizer=lambda parameters: [torch.optim.SGD(parameters)] * 2)),
        "makes a list: a run has one torch optimizer, with parameter groups",
    ),
    "`AdamW` on float16 weights": (
        lambda folder: fit(folder, precision="16-true"),
        r"AdamW divides by its eps, which is 0 in float16.*trainer\.precision: 16-mixed",
    ),
    "options that torch refuses (`lr: -1`)": (options_of_torch, r"model\.optimizer: ValueError: Invalid learning rate"),
    "`OneCycleLR` shorter than the run": (
        lambda folder: fit(folder, **scheduler(torch.optim.lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=1)),
        r"total_steps=1 of OneCycleLR is less than the run's 2 optimizer steps: set it to 2",
    ),
    "`ReduceLROnPlateau` of torch, or with `mode: min` on a reward": (plateaus, "set its mode to max"),
    "loaders of dicts": (serves_dicts, r"batches of dict, and not PromptBatch.*ScenarioDataModule"),
    "`--model my.Subclass`": (names_a_class, "model and data take options, and no class: a subclass runs from Python"),
}


@pytest.mark.parametrize("part", rows("refused"))
def test_what_is_refused_before_anything_is_sampled(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sample(*args: Any) -> None:
        raise AssertionError("an episode was sampled")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["pytest"])
    monkeypatch.setattr(step.TrainingStep, "start_episode", sample)
    seed_everything(7, verbose=False)
    run, remedy = REFUSED[part]
    with pytest.raises((UserError, SystemExit)) as refused:
        run(tmp_path)
    told = capsys.readouterr().err if isinstance(refused.value, SystemExit) else str(refused.value)
    assert re.search(remedy, told)
    assert len(told.splitlines()) == 1


def test_the_table_and_the_tests_are_of_the_same_parts() -> None:
    assert rows("works") == list(WORKS)
    assert rows("refused") == list(REFUSED)
