"""Whole training steps against TRL's GRPOTrainer: time per step and peak memory of the process.

    python benchmarks/compare_trl.py [--rounds 3] [--trl-python PATH] [--model gemma3]

Each measurement is a process of its own (peak memory is the process's), both sides alternate, and the table shows
medians. TRL runs in its fastest honest setting here: all 16 completions in one generation and one backward pass, no
reference model, no gradient checkpointing, float32, fused AdamW, no logging of completions. It needs `pip install
trl==1.16.0` in the environment of `--trl-python` (default: this one).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from workload import CASES, NUM_GENERATIONS, NUM_PROMPTS, TRL_SETTINGS, Case, make_prompts, save_workload, score

WARMUP_STEPS, STEPS = 1, 4
THREADS = 2
LEARNING_RATE = 1e-6


class StepTimes:
    """Wall and CPU seconds of each optimizer step; CPU seconds are those of all threads of the process."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float]] = []

    def start(self) -> None:
        self.begun = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self.rows.append((time.perf_counter() - self.begun[0], time.process_time() - self.begun[1]))


def trl_clock(times: StepTimes) -> Any:
    """A callback that takes the times of a TRL trainer's steps; its `rows` are what was logged with rewards."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.rows: list[dict[str, float]] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            times.start()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.stop()

        def on_log(self, *args: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
            if "reward" in (logs or {}):
                self.rows.append(dict(logs or {}))

    return Clock()


def run_ours(folder: Path, case: Case) -> StepTimes:
    """Times of each optimizer step, sampling included."""
    import torch
    from lightning.pytorch import Callback, Trainer, seed_everything

    from stateset_lightning import GRPOLightningModule, RolloutConfig, ScenarioDataModule
    from stateset_lightning.algorithm import GRPO

    times = StepTimes()

    class Clock(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            times.start()

        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            times.stop()
            if os.environ.get("PHASES"):
                print(
                    {name: round(value, 3) for name, value in module.metrics.last.items() if name.startswith("time/")}
                )

    seed_everything(0, verbose=False)
    rows = [{"prompt": prompt} for prompt in make_prompts(case, NUM_PROMPTS * (WARMUP_STEPS + STEPS))]
    module = GRPOLightningModule(
        str(folder),
        reward=lambda turns, context: score(turns[-1].content),
        rollout=RolloutConfig(num_generations=NUM_GENERATIONS, max_new_tokens=case.completion_tokens),
        algorithm=GRPO(beta=0.0),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True),
    )
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(
        max_steps=WARMUP_STEPS + STEPS,
        accelerator="cpu",
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        callbacks=[Clock()],
        **quiet,
    )
    trainer.fit(module, datamodule=ScenarioDataModule(train=rows, batch_size=NUM_PROMPTS, use_chat_template=False))
    return times


def run_trl(folder: Path, case: Case) -> StepTimes:
    """The same for TRL: from the start of one step to its end, generation included."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    times = StepTimes()
    trainer = GRPOTrainer(
        model=str(folder),
        processing_class=AutoTokenizer.from_pretrained(folder),
        reward_funcs=lambda completions, **columns: [score(text) for text in completions],
        train_dataset=Dataset.from_list(
            [{"prompt": prompt} for prompt in make_prompts(case, NUM_PROMPTS * (WARMUP_STEPS + STEPS))]
        ),
        callbacks=[trl_clock(times)],
        args=GRPOConfig(
            output_dir=str(folder / "trl"),
            max_steps=WARMUP_STEPS + STEPS,
            per_device_train_batch_size=NUM_PROMPTS * NUM_GENERATIONS,
            num_generations=NUM_GENERATIONS,
            max_completion_length=case.completion_tokens,
            learning_rate=LEARNING_RATE,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            lr_scheduler_type="constant",
            logging_steps=1000,
            log_completions=False,
            **TRL_SETTINGS,
        ),
    )
    trainer.train()
    return times


def work(side: str, folder: Path, case: Case) -> None:
    """One measurement; prints its result as the last line."""
    import torch

    torch.set_num_threads(THREADS)
    times = (run_ours if side == "ours" else run_trl)(folder, case)
    seconds, cpu_seconds = map(statistics.median, zip(*times.rows[WARMUP_STEPS:], strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    package = sys.modules["stateset_lightning"].__file__ if side == "ours" else None
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": peak, "package": package}))


def measure(side: str, python: str, folder: Path, index: int, checkout: Path | None = None) -> dict[str, Any]:
    """One measurement in a process of its own, with the package of `checkout` or the installed one."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(THREADS),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PL_GLOBAL_SEED": "0",
    }
    if checkout is not None:
        environment["PYTHONPATH"] = str(checkout)
    command = [python, __file__, "--side", side, "--folder", str(folder), "--case", str(index)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise RuntimeError(f"{side} failed:\n{run.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trl-python", default=sys.executable)
    parser.add_argument("--model", choices=["qwen2", "gemma3"], default="qwen2", help="gemma3 has sliding windows")
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)))
    parser.add_argument("--side", choices=["ours", "trl"], help="measure one side of one case, in this process")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--case", type=int)
    options = parser.parse_args()
    if options.side:
        work(options.side, options.folder, CASES[options.case])
        return
    print(
        "| prompt / completion | TRL s | ours s | step time | TRL CPU s | ours CPU s | CPU time | TRL MB | ours MB"
        " | peak memory |\n|---|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    for index in options.cases:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_workload(folder, CASES[index], options.model)
            results: dict[str, list[dict[str, Any]]] = {"trl": [], "ours": []}
            for _ in range(options.rounds):
                results["trl"].append(measure("trl", options.trl_python, folder, index))
                results["ours"].append(measure("ours", sys.executable, folder, index))
        cells = [CASES[index].name]
        for key, digits in (("seconds", 2), ("cpu_seconds", 2), ("peak_mb", 0)):
            trl, ours = (statistics.median(r[key] for r in results[side]) for side in ("trl", "ours"))
            cells += [f"{trl:.{digits}f}", f"{ours:.{digits}f}", f"{trl / ours:.2f}x"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
