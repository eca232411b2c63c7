"""A resumed run is the run that was not interrupted; which options may differ; exit codes of the program."""

import logging
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from cli_runs import logged
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from module_runs import SCENARIOS, fit, make_data, make_module, make_trainer, weights

from stateset_lightning.cli.main import main
from stateset_lightning.errors import ConfigError, DiskError
from stateset_lightning.rollout import RolloutConfig
from stateset_lightning.run.checkpoint import check_resumable
from stateset_lightning.training.schedule import Schedule


def test_last_goes_on_in_the_folder_of_the_run_without_lost_or_double_rows(folder, capsys):
    main(["fit", "--config", "config.yaml", "--trainer.max_steps=5", "--trainer.logger.init_args.name=straight"])
    main(["fit", "--config", "config.yaml"])
    capsys.readouterr()
    main(["fit", "--config", "config.yaml", "--trainer.max_steps=5", "--ckpt_path=last"])
    said = capsys.readouterr().out
    assert "trainer.max_steps=5, and 3 in the checkpoint: the new value is used" in said
    assert [path.name for path in (folder / "runs" / "r").iterdir()] == ["version_0"]
    assert logged(folder / "runs" / "r" / "version_0") == logged(folder / "runs" / "straight" / "version_0")
    mine, other = ((folder / "runs" / name / "version_0" / "samples.jsonl").read_text() for name in ("r", "straight"))
    assert mine == other


def test_a_learning_rate_on_the_command_line_wins_and_the_log_says_so(folder, capsys):
    main(["fit", "--config", "config.yaml"])
    capsys.readouterr()
    cli = main(
        [
            "fit",
            "--config",
            "config.yaml",
            "--trainer.max_steps=4",
            "--ckpt_path=last",
            "--model.optimizer.init_args.lr=0.5",
        ]
    )
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.5
    assert "model.optimizer lr=0.5, and 0.001 in the checkpoint: the new value is used" in capsys.readouterr().out
    rates = [float(row["lr"]) for row in logged(folder / "runs" / "r" / "version_0") if row["lr"]]
    assert rates == [0.001, 0.001, 0.001, 0.5]


def test_weights_that_are_evaluated_say_their_own_step(tmp_path):
    """The loaded checkpoint's, until they are trained."""
    options = {"callbacks": [ModelCheckpoint(tmp_path, save_last=True)], "enable_checkpointing": True}
    fit(tmp_path, max_steps=3, **options)
    module, data = make_module(), make_data(test=SCENARIOS[:2])
    trainer = make_trainer(tmp_path, limit_val_batches=1, logger=CSVLogger(tmp_path, "run"))
    paths = (None, tmp_path / "last.ckpt")
    steps = [trainer.validate(module, data, verbose=False, ckpt_path=path)[0]["step"] for path in paths]
    steps += [trainer.test(module, data, verbose=False)[0]["step"]]  # nothing is loaded: it has the same weights
    trainer.fit(module, data)
    steps += [trainer.test(module, data, verbose=False)[0]["step"], module.weights_step]
    assert steps == [0, 3, 3, 2, 2]


def run_program(*args):
    command = [
        sys.executable,
        "-m",
        "stateset_lightning",
        "fit",
        "--config",
        "config.yaml",
        "--trainer.max_steps=100000",
        *args,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.mark.slow  # starts a process that imports torch and lightning, twice
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_the_program_with_a_checkpoint_and_their_exit_code(folder, sent, code):
    program = run_program()
    while not (line := program.stdout.readline()).startswith("step 1/"):
        assert program.poll() is None, line
    time.sleep(0.3)
    program.send_signal(sent)
    said = program.communicate(timeout=60)[0]
    assert program.returncode == code, said
    assert "resume with --ckpt_path" in said
    state = torch.load(folder / "runs" / "r" / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
    assert f"after optimizer step {state['global_step']};" in said
    assert [int(row["step"]) for row in logged(folder / "runs" / "r" / "version_0") if row["lr"]][-1] == state[
        "global_step"
    ]


def test_a_full_disk_stops_a_run_and_the_last_good_checkpoint_resumes(tmp_path, monkeypatch):
    from test_files import full_disk

    class Fills(ModelCheckpoint):
        def _save_checkpoint(self, trainer, filepath):
            with full_disk(10**9 if trainer.global_step < 3 else 100_000):
                super()._save_checkpoint(trainer, filepath)

    options = {"enable_checkpointing": True, "max_steps": 4}
    with pytest.raises(DiskError, match="cannot be written"):
        fit(tmp_path, callbacks=[Fills(tmp_path / "c", every_n_train_steps=1, filename="{step}")], **options)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step=2.ckpt"]
    resumed = fit(tmp_path, ckpt_path=tmp_path / "c" / "step=2.ckpt", max_steps=4)
    straight = fit(tmp_path, max_steps=4)
    assert all(torch.equal(value, weights(straight)[name]) for name, value in weights(resumed).items())


def test_changed_options_of_rollout_and_schedule_are_announced(tmp_path, caplog):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1)
    fit(tmp_path, callbacks=[keep], enable_checkpointing=True, max_steps=1)
    module = make_module(rollout=RolloutConfig(num_generations=4, max_new_tokens=5, temperature=0.5), lr_scheduler=None)
    with caplog.at_level(logging.INFO, "stateset_lightning"):
        fit(tmp_path, module, ckpt_path=tmp_path / "step=1.ckpt", max_steps=2)
    said = [record.getMessage() for record in caplog.records]
    assert "model.rollout.temperature=0.5, and 1.0 in the checkpoint: the new value is used" in said
    assert not any("model.algorithm" in line or "lr=" in line for line in said)


def test_another_number_of_ranks_is_refused(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1)
    fit(tmp_path, callbacks=[keep], enable_checkpointing=True, max_steps=1)
    state = torch.load(tmp_path / "step=1.ckpt", weights_only=True)
    state["ScenarioDataModule"]["train"]["world_size"] = 2  # at an episode's end, where no episode of the ranks is left
    torch.save(state, tmp_path / "two.ckpt")
    with pytest.raises(ConfigError, match=r"number of processes .* is 1, but 2 in the checkpoint"):
        fit(tmp_path, make_module(), make_data(), ckpt_path=tmp_path / "two.ckpt", max_steps=2)


def test_a_schedule_survives_the_resume(tmp_path):
    def run(**options):
        return (
            fit(tmp_path, make_module(lr_scheduler=Schedule(decay="linear")), max_steps=4, **options)
            .optimizers[0]
            .param_groups[0]["lr"]
        )

    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    straight = run(callbacks=[keep], enable_checkpointing=True)
    assert run(ckpt_path=tmp_path / "step=2.ckpt") == straight


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"seed": 2}, "seed_everything=2 differs from the checkpoint's 1"),
        ({"accumulate": 1}, "accumulate_grad_batches=1 differs"),
        ({"world": 2}, "an episode of 1 ranks and cannot be resumed by 2"),
    ],
)
def test_a_run_that_cannot_go_on_exactly_is_refused(now, message):
    state = {"seed": 1, "episode": [{}], "accumulate": 2}
    with pytest.raises(ConfigError, match=message):
        check_resumable(state, **{"seed": 1, "accumulate": 2, "world": 1, **now})
