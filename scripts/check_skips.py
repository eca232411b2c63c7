"""Compares the tests that a run skipped with the list of those that may be: `check_skips.py REPORT LIST`.

REPORT is what `pytest --junitxml=REPORT` wrote, LIST is tests/skips.txt: a line for each test, `condition | test |
why`. Exits with 1 where a test was skipped that is not listed for this machine, or a listed one was not skipped.
"""

from __future__ import annotations

import os
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def conditions_here() -> dict[str, bool]:
    """Which conditions of the list hold on this machine."""
    import torch

    return {
        "no_gpu": not torch.cuda.is_available(),
        "is_root": os.geteuid() == 0,
        "no_4_bit": not all(map(find_spec, ("bitsandbytes", "torchao"))),
        "no_shared": not (ROOT.parent / "shared").exists(),
    }


def skipped_tests(report: Path) -> dict[str, str]:
    """Test -> reason; all parameters of a test are one."""
    skipped = {}
    for case in ElementTree.parse(report).iter("testcase"):
        mark = case.find("skipped")
        if mark is not None and mark.get("type") != "pytest.xfail":
            # A module that is skipped as a whole has no class name; its name is the module's.
            module, name = case.get("classname", ""), case.get("name", "")
            file = f"{(module or name).replace('.', '/')}.py"
            skipped[f"{file}::{name.split('[')[0]}" if module else file] = mark.text or ""
    return skipped


def listed_tests(text: str, conditions: Mapping[str, bool]) -> set[str]:
    """The tests of the list whose condition holds.

    Raises:
        ValueError: If a line does not have three parts, or an unknown condition.
    """
    tests = set()
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        parts = [part.strip() for part in line.split("|")]
        if len(parts) != 3 or not all(parts) or parts[0] not in conditions:
            known = ", ".join(conditions)
            raise ValueError(f"{line!r} is not `condition | test | why` with a condition out of {known}")
        if conditions[parts[0]]:
            tests.add(parts[1])
    return tests


def differences(skipped: Mapping[str, str], listed: set[str]) -> list[str]:
    """A line for each test that was skipped or listed, but not both."""
    unlisted = [f"{test} was skipped and is not listed for this machine: {why}" for test, why in skipped.items()]
    return [line for test, line in zip(skipped, unlisted, strict=True) if test not in listed] + [
        f"{test} is listed as skipped on this machine and was not" for test in sorted(listed - skipped.keys())
    ]


def main(report: str, skips: str) -> int:
    listed = listed_tests(Path(skips).read_text(encoding="utf-8"), conditions_here())
    lines = differences(skipped_tests(Path(report)), listed)
    print("\n".join(lines) if lines else f"skipped tests are those of {skips}: {len(listed)}")
    return int(bool(lines))


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
