"""Several processes: the quick form of `benchmarks/ranks.py`, and runs that Lightning's launcher and torchrun start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stateset_lightning.cli.main import main
from stateset_lightning.run.checkpoint_io import read_checkpoint

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def ranks(*options: str, timeout: int) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / "ranks.py"), *options]
    run = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    return run.stdout


@pytest.mark.slow  # a dozen short runs of two ranks
@pytest.mark.parametrize("part", ["equal", "failures", pytest.param("kills", marks=pytest.mark.long)])
def test_two_ranks_are_one_process_and_a_lost_one_ends_the_run(part: str) -> None:
    assert ranks("--quick", "--only", part, timeout=600).endswith("passed\n")


@pytest.mark.long  # minutes: 1, 2 and 4 ranks, and every place to be killed at
def test_up_to_four_ranks_are_one_process() -> None:
    assert ranks(timeout=3600).endswith("passed\n")


def fit(folder: Path, *options: str, strategy: str = "ddp") -> list[str]:
    settings = {
        "config": "configs/single_turn.yaml",
        "baseline": "false",
        "trainer.devices": "2",
        "trainer.strategy": strategy,
        "trainer.max_steps": "3",
        "trainer.limit_val_batches": "0",
        "trainer.logger.init_args.save_dir": str(folder),
        "data.batch_size": "2",
        "model.rollout.num_generations": "2",
    }
    return ["-m", "stateset_lightning", "fit", *(f"--{name}={value}" for name, value in settings.items()), *options]


@pytest.mark.slow  # two processes that import torch and lightning, under a third
def test_torchrun_starts_a_sharded_run_whose_checkpoint_is_exported(tmp_path: Path) -> None:
    callbacks = [
        "--trainer.callbacks=lightning.pytorch.callbacks.ModelCheckpoint",
        "--trainer.callbacks.save_last=true",
    ]
    strategy = [
        "--trainer.strategy=stateset_lightning.run.fsdp_strategy.FSDP2Strategy",
        "--trainer.strategy.save_distributed_checkpoint=true",
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *fit(tmp_path, *strategy, *callbacks),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, env=ENVIRONMENT, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-3000:]
    folder = tmp_path / "single_turn" / "version_0"
    assert len((folder / "metrics.csv").read_text().splitlines()) == 4
    checkpoint = folder / "checkpoints" / "last.ckpt"
    assert sorted(path.name for path in checkpoint.glob("*.distcp")) == ["__0_0.distcp", "__1_0.distcp"]
    main(["export", str(checkpoint), str(tmp_path / "exported")])
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").state_dict()
    saved = read_checkpoint(checkpoint)["state_dict"]
    assert all(exported[name.removeprefix("policy.model.")].equal(value) for name, value in saved.items())


@pytest.mark.slow  # two processes that import torch and lightning
def test_a_killed_first_rank_ends_the_one_that_it_has_launched(tmp_path: Path) -> None:
    """The launched rank has no parent any more: it must not live on."""
    command = [sys.executable, *fit(tmp_path, "--trainer.max_steps=100000")]
    with (tmp_path / "output.txt").open("w") as output:
        first = subprocess.Popen(
            command, stdout=output, stderr=output, env=ENVIRONMENT, cwd=ROOT, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 300
            while not list(tmp_path.rglob("metrics.csv")) and time.monotonic() < deadline:
                time.sleep(0.2)
            first.kill()
            first.wait()
            deadline = time.monotonic() + 60
            while members(first.pid) and time.monotonic() < deadline:
                time.sleep(0.2)
            assert not members(first.pid)
        finally:
            if members(first.pid):
                os.killpg(first.pid, signal.SIGKILL)
    assert "another rank has ended" in (tmp_path / "output.txt").read_text()


def members(group: int) -> bool:
    """Whether a process group has any process left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
