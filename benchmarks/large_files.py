"""Start-up time and memory of scenario files with very many rows.

Writes JSONL and CSV files of short arithmetic questions to a temporary folder, and reads each in a process of its own:
up to the prompts' tokens (`setup`), and then up to the first batch. `python benchmarks/large_files.py [ROWS]`; a
million rows by default.
"""

from __future__ import annotations

import csv
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROWS = 1_000_000


def rows(count: int) -> Iterator[dict[str, str]]:
    for i in range(count):
        a, b = i % 1000, i // 1000
        yield {"prompt": f"What is {a} + {b}?", "target": str(a + b), "topic": "sum"}


def write(path: Path, count: int) -> None:
    with path.open("w", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows(count))
        else:
            table = csv.DictWriter(file, ["prompt", "target", "topic"])
            table.writeheader()
            table.writerows(rows(count))


def measure(path: str) -> None:
    """Print seconds to tokens, seconds to the first batch, and MB before and at the peak."""
    from stateset_lightning import ScenarioDataModule
    from stateset_lightning.policy import PolicyConfig, load_tokenizer

    tokenizer = load_tokenizer(PolicyConfig("tiny"))
    before = _peak_mb()
    begin = time.perf_counter()
    data = ScenarioDataModule(path, batch_size=32, tokenizer=tokenizer, seed=1)
    data.setup("fit")
    ready = time.perf_counter()
    next(iter(data.train_dataloader()))
    end = time.perf_counter()
    print(json.dumps([ready - begin, end - begin, before, _peak_mb()]))


def _peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def main(count: int) -> None:
    print("| file | rows | file MB | s to tokens | s to first batch | peak MB | of it libraries |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("rows.jsonl", "rows.csv"):
            path = Path(folder) / name
            write(path, count)
            done = subprocess.run(
                [sys.executable, __file__, "--measure", str(path)], check=True, capture_output=True, text=True
            )
            to_tokens, to_batch, before, peak = json.loads(done.stdout.splitlines()[-1])
            size = path.stat().st_size / 2**20
            print(
                f"| {name} | {count:,} | {size:.0f} | {to_tokens:.1f} | {to_batch:.1f} | {peak:.0f} | {before:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2])
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else ROWS)
