"""Whether a long run keeps its memory: resident size at the end against that after five minutes, on the bundled task.

python benchmarks/flat_memory.py                       one hour or 2,000 episodes, whichever is shorter
python benchmarks/flat_memory.py --minutes 1 --baseline-minutes 0.2
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from stateset_lightning.cli.main import main as program

ROOT = Path(__file__).parents[1]
LIMIT = 1.05


def resident_mb() -> float:
    """Resident size of this process now, MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


class Watch(Callback):
    """Samples the resident size after every episode, and ends the run when its time is over.

    Args:
        minutes: After which the run ends.
    """

    samples: list[tuple[float, float]] = []
    """Minutes since the start, MB; of the one run that a process makes."""

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self.started = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        minutes = (time.monotonic() - self.started) / 60
        Watch.samples.append((minutes, resident_mb()))
        trainer.should_stop = trainer.should_stop or minutes >= self.minutes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--baseline-minutes", type=float, default=5)
    parser.add_argument("--episodes", type=int, default=2000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program(
            [
                "fit",
                f"--config={ROOT / 'configs' / 'single_turn.yaml'}",
                f"--trainer.max_steps={args.episodes}",
                "--baseline=false",
                f"--data.train={ROOT / 'examples' / 'arithmetic' / 'train.jsonl'}",
                f"--data.validation={ROOT / 'examples' / 'arithmetic' / 'validation.jsonl'}",
                f"--trainer.logger.init_args.save_dir={folder}",
                "--trainer.callbacks+=Watch",
                f"--trainer.callbacks.minutes={args.minutes}",
            ]
        )
    baseline = next((mb for minutes, mb in Watch.samples if minutes >= args.baseline_minutes), None)
    if baseline is None:
        print(f"the run ended before {args.baseline_minutes} minutes: raise --episodes, or lower --baseline-minutes")
        return 1
    minutes, last = Watch.samples[-1]
    print(f"{len(Watch.samples)} episodes in {minutes:.1f} minutes")
    print(
        f"resident: {baseline:.0f} MB after {args.baseline_minutes} minutes, {last:.0f} MB at the end:"
        f" {last / baseline - 1:+.1%}"
    )
    return 0 if last <= LIMIT * baseline else 1


if __name__ == "__main__":
    sys.exit(main())
