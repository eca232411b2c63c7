"""An adapter against full fine-tuning: time per optimizer step, peak memory, size of a checkpoint.

    python benchmarks/lora.py [--rounds 1] [--rank 16]

Qwen2 of 31.7M parameters, 2 prompts x 8 completions of 256 / 64 tokens, float32, AdamW. Each measurement is a process of its own (peak
memory is the process's); the sides alternate; the table shows medians over steps and rounds. `not merged` samples with the adapter beside
its matrices instead of added into copies of them. A reference is that of `beta: 0.04`.
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
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from workload import NUM_GENERATIONS, NUM_PROMPTS, Case, make_prompts, save_workload, score

SIDES = ["full", "full, with a reference", "LoRA", "LoRA, with a reference", "LoRA, not merged"]
CASE = Case(256, 64)
WARMUP_STEPS, STEPS = 1, 3
THREADS = 2
COLUMNS = {
    "step": "step s",
    "sample": "sample s",
    "train": "train s",
    "peak": "peak MB",
    "weights": "trained weights",
    "ckpt": "checkpoint MB",
}


def work(side: str, folder: Path, rank: int) -> None:
    """One measurement; prints its result as the last line."""
    import torch
    from lightning.pytorch import Callback, Trainer, seed_everything

    from stateset_lightning import GRPOLightningModule, RolloutConfig, ScenarioDataModule
    from stateset_lightning.algorithm import GRPO
    from stateset_lightning.policy import LoRAConfig, PolicyConfig
    from stateset_lightning.rollout import in_process

    class Clock(Callback):
        def __init__(self) -> None:
            self.rows: list[dict[str, float]] = []

        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            self.rows.append(dict(module.metrics.last))

    torch.set_num_threads(THREADS)
    seed_everything(0, verbose=False)
    if "not merged" in side:
        in_process.merged_adapter = lambda model: nullcontext()  # type: ignore[attr-defined]
    lora = LoRAConfig(rank=rank, alpha=2 * rank) if side.startswith("LoRA") else None
    module = GRPOLightningModule(
        PolicyConfig(str(folder), lora=lora),
        reward=lambda turns, context: score(turns[-1].content),
        rollout=RolloutConfig(num_generations=NUM_GENERATIONS, max_new_tokens=CASE.completion_tokens),
        algorithm=GRPO(beta=0.04 if "reference" in side else 0.0),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, fused=True),
    )
    clock, steps = Clock(), WARMUP_STEPS + STEPS
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_steps=steps, accelerator="cpu", gradient_clip_val=1.0, use_distributed_sampler=False, callbacks=[clock], **quiet)
    rows = [{"prompt": prompt} for prompt in make_prompts(CASE, NUM_PROMPTS * steps)]
    trainer.fit(module, datamodule=ScenarioDataModule(train=rows, batch_size=NUM_PROMPTS, use_chat_template=False))
    result: dict[str, float] = {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    for key, name in {"step": "time/step_s", "sample": "time/sample_s", "train": "time/train_s"}.items():
        result[key] = statistics.median(row[name] for row in clock.rows[WARMUP_STEPS:])
    trainer.save_checkpoint(folder / "end.ckpt")
    result["ckpt"] = (folder / "end.ckpt").stat().st_size / 2**20
    result["weights"] = sum(p.numel() for p in module.parameters() if p.requires_grad)
    print(json.dumps(result))


def measure(side: str, folder: Path, rank: int) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--rank", str(rank)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise RuntimeError(f"{side} failed:\n{run.stderr[-3000:]}")
    result: dict[str, float] = json.loads(run.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--side", choices=SIDES, help="measure one side, in this process")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.side:
        work(options.side, options.folder, options.rank)
        return
    with tempfile.TemporaryDirectory() as name:
        save_workload(Path(name), CASE)
        rounds = [{side: measure(side, Path(name), options.rank) for side in SIDES} for _ in range(options.rounds)]
    print(f"| rank {options.rank} | {' | '.join(COLUMNS.values())} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for side in SIDES:
        values = {key: statistics.median(results[side][key] for results in rounds) for key in COLUMNS}
        seconds = " | ".join(f"{values[key]:.2f}" for key in ("step", "sample", "train"))
        print(f"| {side} | {seconds} | {values['peak']:.0f} | {values['weights']:,.0f} | {values['ckpt']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
