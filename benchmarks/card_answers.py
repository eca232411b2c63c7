"""Whether an exported folder answers as training's last evaluation did: the code of its card, on twenty prompts.

    python benchmarks/card_answers.py RUN EXPORTED

RUN is a folder of a run (`version_N`) with plain prompts, EXPORTED what `stateset-lightning export` made of it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

PROMPTS = 20


def main() -> None:
    run, exported = map(Path, sys.argv[1:])
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluated = [sample for sample in samples if sample["split"] == "validation"]
    assert evaluated, f"{run} has no samples of a validation"
    evaluated = [sample for sample in evaluated if sample["step"] == evaluated[-1]["step"]]
    evaluated = evaluated[:: max(1, len(evaluated) // PROMPTS)][:PROMPTS]
    os.chdir(exported)
    (code,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(encoding="utf-8"), re.DOTALL)
    card: dict[str, Any] = {}
    exec(code, card)
    equal = sum(card["answer"](sample["prompt"]) == sample["completion"] for sample in evaluated)
    answers = {sample["completion"] for sample in evaluated}
    print(
        f"{equal} of {len(evaluated)} answers are those of step {evaluated[-1]['step']}, {len(answers)} different ones"
    )


if __name__ == "__main__":
    main()
