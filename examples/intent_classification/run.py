"""Customer messages to intents: a supervised warm start, then GRPO where an answer is only known to be right or wrong.

    python examples/intent_classification/run.py --data banking77.csv --seeds 1 2 3

For each seed: a model from random weights is taught on few labelled messages (`warm_start.py`), GRPO goes on with the
others (`config.yaml`), and the control spends as many further steps on the labelled ones. Accuracy is that of greedy
answers to held-out messages. What is finished is not made again, so a command that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import statistics
from pathlib import Path
from typing import Any

import torch
from messages import Split, read_messages, split_messages, write_scenarios
from transformers import AutoModelForCausalLM, AutoTokenizer
from warm_start import make_model, make_tokenizer, teach

from stateset_lightning.cli.main import main as command_line
from stateset_lightning.files import atomic_folder, atomic_write

HERE = Path(__file__).parent


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="CSV file with the columns `text` and `category`")
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[1, 2, 3],
        help="of initial weights, order and sampling; the split is always the same",
    )
    add("--folder", type=Path, default=Path("runs/intent_classification"), help="where models, runs and results go")
    add("--labelled", type=float, default=0.15, help="share of the messages whose intents the warm start sees")
    add("--held_out", type=float, default=0.15, help="share of the messages that accuracy is measured on")
    add("--warm_steps", type=int, default=176, help="supervised steps of 64 messages")
    add("--steps", type=int, default=109, help="steps of GRPO, and of the control")
    return parser.parse_args(words)


def warm_start(folder: Path, split: Split, steps: int, seed: int) -> None:
    """Writes a model folder, whole or not at all."""
    torch.manual_seed(seed)
    # the tokenizer sees the text of all, the model that of the labelled ones
    messages = split.labelled + split.checkable
    tokenizer = make_tokenizer(messages, sorted({message.intent for message in messages}))
    model = make_model(tokenizer)
    print(
        f"seed {seed}: {model.num_parameters():,} parameters from random weights, {len(split.labelled)} labelled"
        " messages",
        flush=True,
    )
    teach(model, tokenizer, split.labelled, num_steps=steps, learning_rate=1e-3, seed=seed)
    save(model, tokenizer, folder)


def control(folder: Path, warm: Path, split: Split, steps: int, seed: int) -> None:
    """The warm start taught further on what is labelled, for as many steps as GRPO makes."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(warm), AutoTokenizer.from_pretrained(warm)
    teach(model, tokenizer, split.labelled, num_steps=steps, learning_rate=3e-4, seed=seed + 1)
    save(model, tokenizer, folder)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    with atomic_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)


def fit(folder: Path, warm: Path, data: Path, steps: int, seed: int) -> tuple[float, float]:
    """GRPO from the warm start, or from the last checkpoint of an earlier try. Returns the accuracy before and
    after.
    """
    flags = {
        "config": HERE / "config.yaml",
        "seed_everything": seed,
        "model.policy.model_name": warm,
        "data.train": data / "checkable.jsonl",
        "data.validation": data / "held_out.jsonl",
        "trainer.max_steps": steps,
        "trainer.val_check_interval": steps,
        "trainer.logger.init_args.save_dir": folder,
        "trainer.logger.init_args.name": "grpo",
        "ckpt_path": "last",
    }
    command_line(["fit", *(f"--{name}={value}" for name, value in flags.items())])
    # Of several, the newest: a try that was killed before its first checkpoint left one, too.
    table = max((folder / "grpo").glob("*/metrics.csv"), key=lambda file: file.stat().st_mtime_ns)
    with table.open(encoding="utf-8", newline="") as lines:
        accuracies = [float(row["val/solved"]) for row in csv.DictReader(lines) if row.get("val/solved")]
    return accuracies[0], accuracies[-1]


def evaluate(model: Path, data: Path) -> float:
    flags = {
        "config": HERE / "config.yaml",
        "model.policy.model_name": model,
        "data.validation": data / "held_out.jsonl",
        "trainer.logger": "false",
        "trainer.default_root_dir": model.parent,  # else the folder that the command is run in
        "samples.evaluation": "false",
    }
    cli = command_line(["validate", *(f"--{name}={value}" for name, value in flags.items())])
    assert cli is not None
    return float(cli.trainer.callback_metrics["val/solved"])


def run_seed(options: argparse.Namespace, split: Split, seed: int) -> dict[str, float]:
    """Accuracies of one seed. Each of its parts is kept, and not made again."""
    folder = options.folder / f"seed_{seed}"
    result_file = folder / "result.json"
    if result_file.exists():
        return json.loads(result_file.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    warm, further = folder / "warm_start", folder / "control"
    if not warm.exists():
        warm_start(warm, split, options.warm_steps, seed)
    before, after = fit(folder, warm, options.folder, options.steps, seed)
    if not further.exists():
        control(further, warm, split, options.steps, seed)
    result = {"warm_start": before, "grpo": after, "control": evaluate(further, options.folder)}
    with atomic_write(result_file) as file:
        file.write(json.dumps(result).encode())
    return result


def table(results: dict[int, dict[str, float]]) -> str:
    """A row per seed, then mean and standard deviation."""
    columns = ("warm_start", "grpo", "control")
    lines = ["| seed | warm start | after GRPO | gain | after as many supervised steps |", "|---|---|---|---|---|"]
    rows = [[result[column] for column in columns] for result in results.values()]
    for seed, (before, after, further) in zip(results, rows, strict=True):
        lines.append(f"| {seed} | {before:.3f} | {after:.3f} | {after - before:+.3f} | {further:.3f} |")
    if len(rows) > 1:
        values = [*zip(*rows, strict=True), [after - before for before, after, _ in rows]]
        (before, after, further, gain), spreads = (
            [f(each) for each in values] for f in (statistics.mean, statistics.stdev)
        )
        sd = [f"± {spread:.3f}" for spread in spreads]
        lines.append(
            f"| mean ± sd | {before:.3f} {sd[0]} | {after:.3f} {sd[1]} | {gain:+.3f} {sd[3]} | {further:.3f} {sd[2]} |"
        )
    return "\n".join(lines)


def main(words: list[str] | None = None) -> dict[int, dict[str, float]]:
    options = parse_arguments(words)
    split = split_messages(read_messages(options.data), labelled=options.labelled, held_out=options.held_out)
    options.folder.mkdir(parents=True, exist_ok=True)
    write_scenarios(split.checkable, options.folder / "checkable.jsonl")
    write_scenarios(split.held_out, options.folder / "held_out.jsonl")
    results = {seed: run_seed(options, split, seed) for seed in options.seeds}
    print(f"\nAccuracy on {len(split.held_out)} held-out messages, greedy\n\n{table(results)}\n")
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(f"CPU time of this command: {(used.ru_utime + used.ru_stime) / 60:.1f} minutes")
    return results


if __name__ == "__main__":
    main()
