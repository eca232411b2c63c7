"""TRL's GRPOTrainer on the same card, model, prompts and reward as `speed.py --parts step`; skipped without TRL.

python peer_trl.py FOLDER [--continuous] [--checkpointing] [--cudnn]       FOLDER: of the model that speed.py wrote
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import workload
from harness import IS_GPU, check, exit_status, peak_gib, record, sync
from speed import COMPLETION, GROUP, PROMPT, STEP_PROMPTS


def whole_steps(options: argparse.Namespace, name: str, output: str) -> str:
    """Seconds of each optimizer step."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            sync()
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            sync()
            seconds.append(time.perf_counter() - self.start)

    prompts = workload.make_prompts(workload.Case(PROMPT, COMPLETION), STEP_PROMPTS * options.steps)
    trainer = GRPOTrainer(
        model=str(options.folder),
        processing_class=AutoTokenizer.from_pretrained(options.folder),
        reward_funcs=lambda completions, **columns: [workload.score(text) for text in completions],
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        callbacks=[Clock()],
        args=GRPOConfig(
            output_dir=output,
            max_steps=options.steps,
            per_device_train_batch_size=options.per_device,
            num_generations=GROUP,
            gradient_accumulation_steps=STEP_PROMPTS * GROUP // options.per_device,
            max_completion_length=COMPLETION,
            learning_rate=1e-6,
            beta=0.0,
            loss_type="grpo",
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            lr_scheduler_type="constant",
            gradient_checkpointing=options.checkpointing,
            model_init_kwargs={"dtype": "float32"},
            bf16=IS_GPU,
            use_cpu=not IS_GPU,
            save_strategy="no",
            report_to="none",
            logging_steps=1000,
            disable_tqdm=True,
            log_completions=False,
            use_transformers_continuous_batching=options.continuous,
        ),
    )
    trainer.train()
    record(step=name, seconds=seconds, peak=peak_gib())
    return f"steps of {', '.join(f'{s:.2f}' for s in seconds)} s, peak {peak_gib()} GiB"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--continuous", action="store_true", help="sample by transformers' continuous batching")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, which is TRL's default")
    parser.add_argument("--cudnn", action="store_true", help="leave PyTorch its cuDNN attention, which is its default")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--per-device", type=int, default=16 if IS_GPU else 8)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.backends.cuda.enable_cudnn_sdp(options.cudnn)
    switches = [word for word in ("continuous", "checkpointing", "cudnn") if getattr(options, word)]
    name = ", ".join(["TRL", *switches])
    if importlib.util.find_spec("trl") is None:
        print(f"SKIP  {name}: not installed", flush=True)
        return 0
    with tempfile.TemporaryDirectory() as output:
        check(name, partial(whole_steps, options, name, output), 30)
    return exit_status()


if __name__ == "__main__":
    raise SystemExit(main())
