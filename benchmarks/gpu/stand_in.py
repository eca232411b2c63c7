"""Runs on the stand-in of `pretend_cuda.py`: the metrics are the CPU's, no devices are mixed, the host rarely waits.

python stand_in.py          three runs of 3 steps, each beside the same on the CPU; about a minute, needs no GPU
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from harness import BARE_RUN, check, exit_status
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from pretend_cuda import CUDA, OnDevice, PretendCuda, is_there

from stateset_lightning import GRPOLightningModule, RolloutConfig, ScenarioDataModule
from stateset_lightning.algorithm import GRPO
from stateset_lightning.policy import LoRAConfig, Policy, PolicyConfig, load_model, load_tokenizer
from stateset_lightning.rewards import ExactMatch
from stateset_lightning.rollout import InProcessEngine, in_process
from stateset_lightning.rollout.engine import DecodingKind

NEW_TOKENS = 20
# Of one micro-step. None per token: the host looks every 16 which rows have finished, and takes what they have sampled.
SAMPLING_WAITS, OTHER_WAITS = 4 + 3 * 2, 20
UNLIKE = ("time/", "memory/", "work/tokens")  # metrics that depend on the machine


class StandIn(Accelerator):
    """What Lightning asks of an accelerator."""

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [CUDA]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "stand-in"


class OneDevice(SingleDeviceStrategy):
    """The model is made on the CPU: the stand-in cannot load weights."""

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        yield


class Waits(Callback):
    """Waits of each micro-step by place."""

    def __init__(self, gpu: PretendCuda) -> None:
        self.gpu = gpu
        self.steps: list[dict[str, int]] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.gpu.take()

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps.append(dict(self.gpu.take().waits))


def run(
    beta: float, lora: bool, decoding: DecodingKind, gpu: PretendCuda | None
) -> tuple[dict[str, float], list[dict[str, int]]]:
    """Metrics of the last step, and the waits of each micro-step; on the CPU where `gpu` is None."""
    seed_everything(1, verbose=False)
    rows: list[Any] = [
        {"prompt": f"What is {a} + {b}?", "target": str(a + b)} for a in range(15, 30) for b in range(26, 30)
    ]
    module = GRPOLightningModule(
        PolicyConfig("tiny", lora=LoRAConfig(rank=4) if lora else None),
        reward=ExactMatch(),
        rollout=RolloutConfig(num_generations=4, max_new_tokens=NEW_TOKENS, decoding=decoding),
        algorithm=GRPO(beta=beta),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, foreach=False),
    )
    data = ScenarioDataModule(train=rows, validation=rows[:4], batch_size=8, steps_per_episode=2, num_iterations=2)
    where: dict[str, Any] = {"accelerator": "cpu"}
    waits = None if gpu is None else Waits(gpu)
    if gpu is not None:
        where = {"accelerator": StandIn(), "strategy": OneDevice(device=CUDA)}
    trainer = Trainer(
        max_steps=3,
        devices=1,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        val_check_interval=4,
        callbacks=waits,
        **BARE_RUN,
        **where,
    )
    trainer.fit(module, datamodule=data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if not name.startswith(UNLIKE)}
    return metrics, [] if waits is None else waits.steps


@contextmanager
def modules_move(gpu: PretendCuda) -> Iterator[None]:
    """By `Module.to`, as the twins do that vouch for a way of sampling: the stock one sets a parameter's data."""
    to = torch.nn.Module.to

    def move(module: torch.nn.Module, *args: Any, **options: Any) -> torch.nn.Module:
        return gpu.move(module) if any(map(is_there, args)) else to(module, *args, **options)

    with patch.object(torch.nn.Module, "to", move):
        yield


def same_as_on_the_cpu(beta: float, lora: bool, decoding: DecodingKind) -> str:
    on_cpu, _ = run(beta, lora, "eager", None)
    make_policy = Policy.__init__

    def on_the_stand_in(policy: Policy, model: Any, *args: Any, **options: Any) -> None:
        make_policy(policy, gpu.move(model), *args, **options)

    with PretendCuda() as gpu, modules_move(gpu), patch.object(Policy, "__init__", on_the_stand_in):
        there, waits = run(beta, lora, decoding, gpu)
    assert there.keys() == on_cpu.keys()
    different = {
        name: (value, there[name])
        for name, value in on_cpu.items()
        if not torch.isclose(torch.tensor(there[name]), torch.tensor(value), rtol=1e-4, atol=1e-6, equal_nan=True)
    }
    assert not different, f"not as on the CPU: {different}"
    sampling, other = (
        max(
            sum(count for place, count in step.items() if place.startswith("rollout/") == is_sampling)
            for step in waits[1:]  # in the first one, probes vouch for the ways of sampling and scoring
        )
        for is_sampling in (True, False)
    )
    seen = f"{len(on_cpu)} metrics; waits of a micro-step: {sampling} in sampling, {other} elsewhere"
    assert 0 < sampling <= SAMPLING_WAITS, f"{seen}: {max(waits, key=len)}"
    assert 0 < other <= OTHER_WAITS, f"{seen}: {max(waits, key=len)}"
    return seen


def no_float64(make: Any) -> Any:
    def made(cls: Any, elem: torch.Tensor) -> OnDevice:
        assert elem.dtype != torch.float64, "a tensor in float64 on the device"
        return make(cls, elem)

    return made


def the_host_samples_where_there_is_no_float64() -> str:
    """As on Apple's GPUs: the same tokens, and nothing in float64 on the device."""
    sampling, rollouts = RolloutConfig(max_new_tokens=40, max_batch_rows=8, top_k=300, temperature=5.0), []
    for where in ("cpu", "stand-in"):
        model = load_model(PolicyConfig("tiny"))
        on_host = patch.object(in_process, "WITHOUT_FLOAT64", (CUDA.type,))
        with PretendCuda() as gpu, modules_move(gpu), on_host:
            engine = InProcessEngine(load_tokenizer(PolicyConfig("tiny")))
            engine.sync(Policy(model if where == "cpu" else gpu.move(model), PolicyConfig("tiny")))
            with patch.object(OnDevice, "__new__", no_float64(OnDevice.__new__)):
                rollouts.append(engine.generate([[20, 31, 42], [53, 64], [75]], 4, sampling, range(12)))
    assert rollouts[0].completions() == rollouts[1].completions()
    return f"the same {len(rollouts[0].logprobs_T)} tokens"


def mixing_is_noticed() -> str:
    with PretendCuda():
        there = torch.ones(2, device=CUDA)
        try:
            there + torch.ones(2)
        except RuntimeError as error:
            return str(error)
    raise AssertionError("a tensor of the host was added to one of the device")


def main() -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    check("stand-in for a GPU notices mixed devices", mixing_is_noticed)
    check("stand-in for Apple's GPUs, sampling", the_host_samples_where_there_is_no_float64)
    check("stand-in for a GPU, plain", partial(same_as_on_the_cpu, 0.0, False, "eager"))
    check("stand-in for a GPU, with a reference", partial(same_as_on_the_cpu, 0.04, False, "graph"))
    check("stand-in for a GPU, with an adapter", partial(same_as_on_the_cpu, 0.04, True, "graph"))
    return exit_status()


if __name__ == "__main__":
    raise SystemExit(main())
