"""Markdown tables of a results.jsonl, for benchmarks/RESULTS.md.

    python table.py RESULTS [--baseline OLDER]

OLDER is a results.jsonl, too: each measurement that both have gets a line with the ratio of the two.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# Of an H100, 0.5B parameters, 64 x 8, against TRL on the same card: shape of the step, and how often ours fits in.
WANTED_SPEED = {"64x8:512/512": 2, "64x8:2048/512": 4}
OURS = "ours"


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def name_of(row: Row) -> str | None:
    """What was measured; None of a row that is no measurement."""
    if "step" in row:
        return f"step {row['shape']}, {row['step']}"
    if "train" in row:
        return f"micro-step {row['shape']}, {row['train']}"
    if "sample" in row:
        return f"decoding, {row['rows']} rows x {row['tokens']} tokens, {row['sample']}"
    kinds = {"head": "", "optimizer": "", "ceiling": "ceiling: "}
    return next((prefix + row[kind] for kind, prefix in kinds.items() if kind in row), None)


def measured(rows: Sequence[Row]) -> dict[str, Row]:
    """By name; of what was measured several times, such as the steps of a run, the last one."""
    return {name: row for row in rows if (name := name_of(row)) is not None}


def table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> Iterator[str]:
    if not lines:
        return
    for line in (head, ["---"] * len(head), *lines):
        yield f"| {' | '.join(map(shown, line))} |"
    yield ""


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def ratio(a: Any, b: Any) -> float | None:
    return a / b if a and b else None


def header(rows: Sequence[Row]) -> str:
    """Date, card and versions."""
    found = next((row for row in rows if "machine" in row), None)
    if found is None:
        return "of an unknown machine"
    versions = ", ".join(f"{name} {value}" for name, value in found["versions"].items() if value != "none")
    return f"{found['date']}, {found['machine']}; {versions}"


def whole_steps(found: dict[str, Row]) -> Iterator[str]:
    steps = [row for row in found.values() if "step" in row]
    lines = []
    for row in steps:
        peer = fastest_peer(steps, row["shape"]) if row["step"].startswith(OURS) else None
        faster, smaller = (
            (None, None)
            if peer is None
            else (
                ratio(peer["seconds"], row["seconds"]),
                ratio(row["peak"], peer["peak"]),
            )
        )
        by = row["step"] if row["index"] else f"{row['step']} (its first step)"
        lines.append([row["shape"], by, row["seconds"], row.get("sampling"), row["peak"], faster, smaller])
    yield from table(
        ("step of", "by", "seconds", "of them sampling", "peak GiB", "TRL's time / ours", "our memory / TRL's"), lines
    )


def fastest_peer(steps: Sequence[Row], shape: str) -> Row | None:
    """Of those that came further than their first step, in which memory and kernels are prepared."""
    peers = [row for row in steps if row["shape"] == shape and row["index"] and not row["step"].startswith(OURS)]
    return min(peers, key=lambda row: row["seconds"], default=None)


def parts(found: dict[str, Row]) -> Iterator[str]:
    lines = []
    for name, row in found.items():
        if "step" not in row:
            seconds = row.get("seconds")
            lines.append(
                [
                    name,
                    seconds and 1e3 * seconds / row.get("steps", 1),
                    row.get("tflops"),
                    row.get("gigabytes_per_s"),
                    row.get("peak"),
                ]
            )
    yield from table(("measured", "ms", "TFLOP/s", "GB/s", "peak GiB"), lines)


def wanted(found: dict[str, Row]) -> Iterator[str]:
    """The lines of what was wanted of an H100, as far as they were measured."""
    steps = [row for row in found.values() if "step" in row]
    lines: list[tuple[str, Any, Any]] = []
    for shape, times in WANTED_SPEED.items():
        ours, peer = found.get(f"step {shape}, {OURS}"), fastest_peer(steps, shape)
        if ours and peer:
            lines.append((f"TRL's time / ours, {shape}", times, ratio(peer["seconds"], ours["seconds"])))
            lines.append((f"our memory / TRL's, {shape}", 0.5, ratio(ours["peak"], peer["peak"])))
    ceilings = {row["ceiling"]: row for row in found.values() if "ceiling" in row}
    for name, row in found.items():
        if "train" in row and row["train"].endswith("as it is") and "bf16 products" in ceilings:
            share = ratio(row.get("tflops"), ceilings["bf16 products"]["tflops"])
            lines.append((f"share of the bfloat16 peak, {name}", 0.4, share))
        if row.get("sample") == "engine graph" and "copy" in ceilings:
            share = ratio(row.get("gigabytes_per_s"), ceilings["copy"]["gigabytes_per_s"])
            lines.append((f"share of the memory's speed, {name}", 0.6, share))
    yield from table(("against what was wanted of an H100", "wanted", "measured"), lines)


def compared(found: dict[str, Row], older: Sequence[Row]) -> Iterator[str]:
    """Times, and rates where there is no time, of both."""
    before = measured(older)
    lines = []
    for name, row in found.items():
        for unit in ("seconds", "tflops", "gigabytes_per_s"):
            old, new = before.get(name, {}).get(unit), row.get(unit)
            if old and new:
                lines.append((f"{name}, {unit.replace('_', ' ')}", old, new, new / old))
                break
    yield f"Before: {header(older)}. {len(lines)} of {len(found)} measurements are in both."
    yield ""
    yield from table(("measured", "before", "now", "now / before"), lines)


def checks(rows: Sequence[Row]) -> Iterator[str]:
    states: dict[str, list[str]] = {}
    for row in rows:
        if "check" in row:
            states.setdefault(row["state"], []).append(row["check"])
    yield f"Checks passed: {len(states.get('ok', []))}."
    for state, told in (("FAIL", "Failed"), ("ERROR", "Broken"), ("SKIP", "Not run for lack of time")):
        if state in states:
            yield f"{told}: {'; '.join(states[state])}."
    yield from dict.fromkeys(f"{row['note']}." for row in rows if "note" in row)


def page(rows: Sequence[Row], older: Sequence[Row] | None) -> str:
    found = measured(rows)
    lines = [f"{header(rows)}.", "", *whole_steps(found), *wanted(found), *parts(found)]
    if older is not None:
        lines += compared(found, older)
    return "\n".join([*lines, *checks(rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--baseline", type=Path)
    options = parser.parse_args()
    print(page(read(options.results), None if options.baseline is None else read(options.baseline)))


if __name__ == "__main__":
    main()
