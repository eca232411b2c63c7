"""Whole training steps of this checkout against another one of the same package: CPU seconds, in interleaved pairs.

    git worktree add /tmp/before COMMIT
    python benchmarks/compare_commits.py --other /tmp/before [--rows 1 5] [--pairs 8]

The work is that of `compare_trl.py`, whose table's rows are numbered from 1. Every measurement is a process of its own;
a pair is one of each checkout, in turns which goes first. A step's CPU seconds are those of all threads, median over
steps; the last line of a row has the median ratio over pairs, this checkout to the other.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from compare_trl import measure
from workload import CASES, save_workload

HERE = Path(__file__).resolve().parents[1]


def cpu_seconds(checkout: Path, folder: Path, index: int) -> float:
    """Of one step of the package in `checkout`."""
    result = measure("ours", sys.executable, folder, index, checkout)
    if not Path(result["package"]).is_relative_to(checkout):
        raise RuntimeError(f"{result['package']} was imported, not the package of {checkout}")
    return float(result["cpu_seconds"])


def compare(other: Path, index: int, pairs: int) -> None:
    """Prints each pair of one row, then the median ratio."""
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        save_workload(Path(name), CASES[index])
        for pair in range(pairs):
            order = (HERE, other) if pair % 2 else (other, HERE)
            seconds = {checkout: cpu_seconds(checkout, Path(name), index) for checkout in order}
            ratios.append(seconds[HERE] / seconds[other])
            print(f"row {index + 1}, pair {pair + 1}: {seconds[other]:.2f} s -> {seconds[HERE]:.2f} s", flush=True)
    print(
        f"row {index + 1}, {CASES[index].name}: {statistics.median(ratios):.3f} of the other's CPU seconds"
        f" ({min(ratios):.3f} to {max(ratios):.3f}, {pairs} pairs)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True, help="root of the other checkout")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, len(CASES)], choices=range(1, len(CASES) + 1))
    parser.add_argument("--pairs", type=int, default=8)
    options = parser.parse_args()
    # Threads that wait for one another would spin, and count as work whatever else the machine does.
    os.environ["OMP_WAIT_POLICY"] = "passive"
    for row in options.rows:
        compare(options.other.resolve(), row - 1, options.pairs)


if __name__ == "__main__":
    main()
