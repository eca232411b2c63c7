"""What each algorithm learns on the bundled task: validation accuracy before, in and after training, over seeds, TRL's
GRPOTrainer beside them.

    python benchmarks/compare_algorithms.py [--names GRPO DAPO ...] [--seeds 1 2 3] [--steps 200] [--jobs 1]
    [--trl-python PATH]

Every run is `configs/single_turn.yaml` with another algorithm, each as published (its own defaults), in a process of
its own. Results are appended to a JSON-lines file; runs that stand there are not made again, so the command goes on
where it was stopped. `GRPO beta 0` and `TRL GRPO beta 0` have the same hyperparameters, and the answers of both are
judged by our `validate`. TRL needs `pip install trl==1.16.0` in the environment of `--trl-python`; without that option
it is left out.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[1]
CONFIG = REPOSITORY / "configs" / "single_turn.yaml"
BETA_0, TRL = "GRPO beta 0", "TRL GRPO beta 0"
PARTS = 4  # of a run, each of which ends with a validation


def preset_names() -> list[str]:
    from stateset_lightning import algorithm

    bases = (algorithm.Algorithm, algorithm.Clipped)
    return [
        name
        for name, kind in vars(algorithm).items()
        if isinstance(kind, type) and issubclass(kind, algorithm.Algorithm) and kind not in bases
    ]


def write_config(folder: Path, name: str, seed: int, steps: int) -> Path:
    """The reference configuration with another algorithm: replaced whole, since an overlay would keep options of the
    old one.
    """
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["seed_everything"] = seed
    algorithm: dict[str, Any] = {"class_path": f"stateset_lightning.algorithm.{name}"}
    if name in (BETA_0, TRL):
        algorithm = {"class_path": "stateset_lightning.algorithm.GRPO", "init_args": {"beta": 0.0}}
    config["model"]["algorithm"] = algorithm
    config["trainer"].update(max_steps=steps, val_check_interval=steps // PARTS)
    config["trainer"].update(callbacks=[], enable_checkpointing=False)
    config["trainer"].update(enable_progress_bar=False, enable_model_summary=False)
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(folder)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


def command(config: Path, subcommand: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", "stateset_lightning", subcommand, "--config", str(config), *flags]


def call(arguments: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(arguments, capture_output=True, text=True, cwd=REPOSITORY, env=environment)
    if run.returncode:
        raise RuntimeError(f"{' '.join(arguments)}\n{run.stdout[-1000:]}\n{run.stderr[-3000:]}")


def logged(folder: Path, metric: str) -> list[float]:
    """All values of a metric in the metrics files below a folder, in order."""
    values = []
    for file in sorted(folder.rglob("metrics.csv"), key=lambda file: file.stat().st_mtime_ns):
        with file.open(encoding="utf-8", newline="") as lines:
            values += [float(row[metric]) for row in csv.DictReader(lines) if row.get(metric)]
    return values


def run_ours(name: str, seed: int, steps: int, folder: Path) -> None:
    call(command(write_config(folder, name, seed, steps), "fit"))


def run_trl(seed: int, steps: int, folder: Path, python: str) -> None:
    """TRL trains and saves model folders; the validations are ours."""
    config = write_config(folder, TRL, seed, steps)
    call([python, __file__, "--train-with-trl", str(folder), "--seeds", str(seed), "--steps", str(steps)])
    call(command(config, "validate"))
    for step in range(steps // PARTS, steps + 1, steps // PARTS):
        call(command(config, "validate", "--model.policy.model_name", str(folder / f"checkpoint-{step}")))


def train_with_trl(folder: Path, seed: int, steps: int) -> None:
    """The reference configuration, in TRL's words."""
    sys.path.insert(0, str(REPOSITORY))  # for the reward and the bundled model; nothing of it needs installing
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer
    from workload import TRL_SETTINGS

    from stateset_lightning.rewards.match import ExactMatch
    from stateset_lightning.types import Turn

    torch.set_num_threads(1)
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    rollout, data = config["model"]["rollout"], config["data"]
    model = REPOSITORY / "stateset_lightning" / "tiny" / "model"
    rows = [json.loads(line) for line in (REPOSITORY / data["train"]).read_text(encoding="utf-8").splitlines()]
    exact = ExactMatch()

    def reward(completions: list[Any], target: list[str], **columns: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        return [
            exact.compute_reward([Turn("assistant", text)], {"target": t}).score
            for text, t in zip(texts, target, strict=True)
        ]

    trainer = GRPOTrainer(
        model=str(model),
        processing_class=AutoTokenizer.from_pretrained(model),
        reward_funcs=reward,
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": row["prompt"]}], "target": row["target"]} for row in rows]
        ),
        args=GRPOConfig(
            output_dir=str(folder),
            seed=seed,
            max_steps=steps,
            per_device_train_batch_size=data["batch_size"] * rollout["num_generations"],
            num_generations=rollout["num_generations"],
            max_completion_length=rollout["max_new_tokens"],
            temperature=rollout["temperature"],
            top_k=0,
            learning_rate=config["model"]["optimizer"]["init_args"]["lr"],
            weight_decay=0.0,
            lr_scheduler_type="cosine",
            warmup_steps=config["model"]["lr_scheduler"]["warmup_steps"],
            max_grad_norm=config["trainer"]["gradient_clip_val"],
            epsilon=0.2,
            logging_steps=1000,
            **{**TRL_SETTINGS, "save_strategy": "steps", "save_steps": steps // PARTS},
        ),
    )
    trainer.train()


def measure(name: str, seed: int, steps: int, trl_python: str | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if name == TRL:
            assert trl_python is not None
            run_trl(seed, steps, folder, trl_python)
        else:
            run_ours(name, seed, steps, folder)
        accuracies = logged(folder, "val/reward")
    assert len(accuracies) == PARTS + 1, f"a validation before and {PARTS} in training, found {accuracies}"
    return {"name": name, "seed": seed, "steps": steps, "accuracies": accuracies}


def read_results(file: Path, steps: int) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    return [row for row in rows if row["steps"] == steps and "accuracies" in row]


def print_table(results: list[dict[str, Any]], names: list[str]) -> None:
    """Means over seeds before, in and after training, and the last one's standard deviation; the best first."""
    groups = {name: [row["accuracies"] for row in results if row["name"] == name] for name in names}
    means = {
        name: [statistics.mean(column) for column in zip(*rows, strict=True)] for name, rows in groups.items() if rows
    }
    columns = [f"{100 * part // PARTS}% of the steps" for part in range(PARTS + 1)]
    print(f"| algorithm | seeds | {' | '.join(columns)} | spread |\n|{'---|' * (PARTS + 4)}")
    for name, mean in sorted(means.items(), key=lambda item: -item[1][-1]):
        last = [row[-1] for row in groups[name]]
        spread = f"{statistics.stdev(last):.3f}" if len(last) > 1 else "-"
        print(f"| {name} | {len(last)} | {' | '.join(f'{value:.3f}' for value in mean)} | {spread} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="*", help="presets by class name; all by default")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "runs" / "compare_algorithms.jsonl")
    parser.add_argument("--trl-python", help="the interpreter of an environment that has TRL")
    parser.add_argument("--train-with-trl", type=Path, metavar="FOLDER", help="make one run of TRL, in this process")
    options = parser.parse_args()
    if options.steps % PARTS:
        parser.error(f"--steps {options.steps} must be a multiple of {PARTS}")
    if options.train_with_trl:
        train_with_trl(options.train_with_trl, options.seeds[0], options.steps)
        return
    names = options.names or [*preset_names(), BETA_0, *([TRL] if options.trl_python else [])]
    done = {(row["name"], row["seed"]) for row in read_results(options.results, options.steps)}
    pending = [(name, seed) for seed in options.seeds for name in names if (name, seed) not in done]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool, options.results.open("a", encoding="utf-8") as file:
        runs = {
            pool.submit(measure, name, seed, options.steps, options.trl_python): (name, seed) for name, seed in pending
        }
        for run in as_completed(runs):
            if error := run.exception():
                print(f"{runs[run]} failed: {error}", file=sys.stderr, flush=True)
                continue
            # a whole line, at once: a killed command loses the runs in progress alone
            file.write(json.dumps(run.result()) + "\n")
            file.flush()
            print(json.dumps(run.result()), file=sys.stderr, flush=True)
    print_table(read_results(options.results, options.steps), names)


if __name__ == "__main__":
    main()
