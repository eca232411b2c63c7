"""Time and memory from files with very many rows to the first training step, and of the steps behind it.

Makes its files in a temporary folder: short arithmetic questions (`--rows`, a million) as CSV, JSONL and Parquet, and
JSONL of rows of a thousand characters (`--gigabytes`, 5; 0 leaves it out). Each is trained on by the bundled model in a
process of its own. Seconds are counted from the process's start, memory without what is mapped from files is looked at
every 20 ms (Linux).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

STEPS = 5
PADDING = "Take your time, and say how you found it. " * 25


def rows(count: int) -> Iterator[dict[str, str]]:
    for i in range(count):
        a, b = i % 1000, i // 1000
        yield {"prompt": f"Add the two numbers {a} and {b} and give their sum.", "target": str(a + b), "topic": "sum"}


def write_short(path: Path, count: int) -> None:
    import csv

    import pyarrow
    from pyarrow import parquet

    if path.suffix == ".parquet":
        columns = list(rows(count))
        parquet.write_table(pyarrow.Table.from_pylist(columns), path)
        return
    with path.open("w", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows(count))
        else:
            table = csv.DictWriter(file, ["prompt", "target", "topic"])
            table.writeheader()
            table.writerows(rows(count))


def write_long(path: Path, size: float) -> int:
    """Rows of a thousand characters, as many as fill the size in bytes; returns how many."""
    count = int(size / 1120)
    with path.open("w") as file:
        file.writelines(json.dumps({**row, "notes": PADDING}) + "\n" for row in rows(count))
    return count


def anonymous_mb() -> float:
    """Memory of this process that no file stands behind."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 2**10


def measure(path: str, begin: float) -> None:
    """Trains; prints seconds to the first step and of one behind it, and MB at the peak: all, and anonymous."""
    from lightning.pytorch import Callback, Trainer

    from stateset_lightning import GRPOLightningModule, RolloutConfig, ScenarioDataModule
    from stateset_lightning.rewards import ExactMatch

    ends: list[float] = []
    peak, done = [0.0], threading.Event()

    class Times(Callback):
        def on_train_batch_end(self, *args: object) -> None:
            ends.append(time.time())

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous_mb())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_steps=STEPS,
            max_epochs=-1,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            default_root_dir=folder,
            callbacks=[Times()],
        )
        module = GRPOLightningModule(
            "tiny", reward=ExactMatch(), rollout=RolloutConfig(num_generations=4, max_new_tokens=8)
        )
        trainer.fit(module, datamodule=ScenarioDataModule(path, batch_size=8, max_prompt_tokens=512))
    done.set()
    watcher.join()
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps([ends[0] - begin, (ends[-1] - ends[0]) / (STEPS - 1), whole, peak[0]]))


def show(path: Path, count: int) -> None:
    words = [sys.executable, __file__, "--measure", str(path), str(time.time())]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    first, step, whole, anonymous = json.loads(done.stdout.splitlines()[-1])
    size = path.stat().st_size / 2**20
    print(
        f"| {path.name} | {count:,} | {size:,.0f} | {first:.1f} | {step:.2f} | {whole:,.0f} | {anonymous:,.0f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="short rows")
    parser.add_argument("--gigabytes", type=float, default=5.0, help="of long rows; 0: none")
    options = parser.parse_args()
    print("| file | rows | MB | s to the first step | s of a later step | peak MB | of it anonymous |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("rows.csv", "rows.jsonl", "rows.parquet"):
            write_short(Path(folder) / name, options.rows)
            show(Path(folder) / name, options.rows)
            (Path(folder) / name).unlink()
        if options.gigabytes:
            path = Path(folder) / "long.jsonl"
            show(path, write_long(path, options.gigabytes * 2**30))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], float(sys.argv[3]))
    else:
        main()
