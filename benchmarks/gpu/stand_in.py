"""Runs on the stand-in of `pretend_cuda.py`: the metrics are the CPU's, no devices are mixed, the host rarely waits.

python stand_in.py          needs no GPU; a minute. tests/gpu/test_stand_in.py runs it and asks for each check.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from harness import BARE_RUN, check, exit_status
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from pretend_cuda import CUDA, PretendCuda, Report

from stateset_lightning import GRPOLightningModule, RolloutConfig, ScenarioDataModule, algorithm
from stateset_lightning.algorithm import GRPO, KL, TokenBatch
from stateset_lightning.evaluation import EvaluationConfig
from stateset_lightning.policy import Group, LoRAConfig, Policy, PolicyConfig, load_model
from stateset_lightning.rewards import ExactMatch
from stateset_lightning.rollout.engine import DecodingKind
from stateset_lightning.types import WITHOUT_FLOAT64

NEW_TOKENS = 20
TEMPERATURE = 3.0  # some completions are short, and some longer than from one look to the next
# Of an episode. None per token: the host looks every 16 which rows have finished, and takes what they have sampled.
SAMPLING_WAITS = 4 + 3 * 2
HOST_SAMPLING_WAITS = 4 + NEW_TOKENS  # where the host samples: it takes the logits of each token
OTHER_WAITS = 6  # of a micro-step: old log-probs, those of the reference and entropies come to the host, too
VALIDATION_WAITS = 4  # beside sampling, however many prompts and measures
STEP_WAITS = 6  # of an optimizer step of one micro-step; one more where its loss is scaled
STEP_LAUNCHES = 1500  # of the same without sampling; 150 of them are norms, a tensor at a time here alone
ANNOUNCED: list[str] = []  # slower paths that were taken, with the reasons
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


class Reports(Callback):
    """What each micro-step did on the device, and what the validation did."""

    def __init__(self, gpu: PretendCuda) -> None:
        self.gpu = gpu
        self.steps: list[Report] = []
        self.validation = Report()

    def on_train_batch_start(self, *args: Any) -> None:
        self.gpu.take()

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps.append(self.gpu.take())

    def on_validation_end(self, *args: Any) -> None:
        self.validation = self.gpu.take()


def digits(completion: str) -> float:
    """Share of a completion that is digits, which tells also long ones from each other."""
    return sum(map(str.isdigit, completion)) / max(1, len(completion))


@dataclass(frozen=True)
class Run:
    """A short run, of which every case varies one thing."""

    beta: float = 0.0
    lora: bool = False
    algorithm: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "32-true"
    fused: bool = False
    steps_per_episode: int = 2
    accumulate: int = 2
    num_iterations: int = 2
    samples: int = 0
    decoding: DecodingKind = "eager"
    has_float64: bool = True

    def fit(self, gpu: PretendCuda | None) -> tuple[dict[str, float], Reports | None]:
        """Metrics of the last step, and what was done on the device; on the CPU where `gpu` is None."""
        seed_everything(1, verbose=False)
        rows: list[Any] = [
            {"prompt": f"What is {a} + {b}?", "target": str(a + b)} for a in range(15, 30) for b in range(26, 30)
        ]
        decoding: DecodingKind = "eager" if gpu is None else self.decoding
        module = GRPOLightningModule(
            PolicyConfig("tiny", lora=LoRAConfig(rank=4) if self.lora else None),
            reward=[ExactMatch(), digits],
            rollout=RolloutConfig(
                num_generations=4, max_new_tokens=NEW_TOKENS, temperature=TEMPERATURE, decoding=decoding
            ),
            algorithm=GRPO(beta=self.beta, **self.algorithm),
            evaluation=EvaluationConfig(samples=self.samples),
            optimizer=lambda parameters: torch.optim.AdamW(
                parameters, lr=1e-4, fused=self.fused, foreach=None if self.fused else False
            ),
        )
        data = ScenarioDataModule(
            train=rows,
            validation=rows[:4],
            batch_size=8,
            steps_per_episode=self.steps_per_episode,
            num_iterations=self.num_iterations,
        )
        where: dict[str, Any] = {"accelerator": "cpu"}
        reports = None if gpu is None else Reports(gpu)
        if gpu is not None:
            where = {"accelerator": StandIn(), "strategy": SingleDeviceStrategy(device=CUDA)}
        if self.precision != "32-true":
            where["plugins"] = MixedPrecision(self.precision, CUDA.type if gpu else "cpu", self._scaler(gpu))
        trainer = Trainer(
            max_steps=3,
            devices=1,
            accumulate_grad_batches=self.accumulate,
            gradient_clip_val=1.0,
            val_check_interval=self.steps_per_episode * self.num_iterations,
            callbacks=reports,
            **BARE_RUN,
            **where,
        )
        trainer.fit(module, datamodule=data)
        shown = trainer.callback_metrics.items()
        return {name: float(value) for name, value in shown if not name.startswith(UNLIKE)}, reports

    def _scaler(self, gpu: PretendCuda | None) -> Any:
        if self.precision != "16-mixed":
            return None
        return torch.amp.GradScaler(CUDA.type if gpu else "cpu", init_scale=2.0**10)


def split(waits: Mapping[str, int]) -> tuple[int, int]:
    """Waits in sampling, and all others; probes belong to the start of a run."""
    sampling = sum(count for place, count in waits.items() if place.startswith("rollout/"))
    probes = sum(count for place, count in waits.items() if place.startswith("policy/probes"))
    return sampling, sum(waits.values()) - sampling - probes


@contextmanager
def no_float64() -> Iterator[None]:
    """The device is as Apple's."""
    WITHOUT_FLOAT64.add(CUDA.type)
    try:
        yield
    finally:
        WITHOUT_FLOAT64.remove(CUDA.type)


def same_as_on_the_cpu(case: Run) -> str:
    on_cpu, _ = case.fit(None)
    with PretendCuda() as gpu, nullcontext() if case.has_float64 else no_float64():
        there, reports = case.fit(gpu)
    assert there.keys() == on_cpu.keys()
    assert not ANNOUNCED, ANNOUNCED
    different = {
        name: (value, there[name])
        for name, value in on_cpu.items()
        if not torch.isclose(torch.tensor(there[name]), torch.tensor(value), rtol=1e-4, atol=1e-6, equal_nan=True)
    }
    assert not different, f"not as on the CPU: {different}"
    assert reports is not None
    steps = reports.steps[1:]  # in the first one, probes vouch for the ways of sampling and scoring
    sampling, other = (max(counts) for counts in zip(*(split(step.waits) for step in steps), strict=True))
    seen = f"{len(on_cpu)} metrics; waits of a micro-step: {sampling} in sampling, {other} elsewhere"
    most = SAMPLING_WAITS if case.has_float64 else HOST_SAMPLING_WAITS
    assert 0 < sampling <= most, f"{seen}: {max(steps, key=lambda step: split(step.waits)[0]).waits}"
    assert 0 < other <= OTHER_WAITS, f"{seen}: {max(steps, key=lambda step: split(step.waits)[1]).waits}"
    answering, measuring = split(reports.validation.waits)
    seen += f"; of a validation: {answering} in sampling, {measuring} elsewhere"
    assert measuring <= VALIDATION_WAITS, f"{seen}: {reports.validation.waits}"
    places = {place for step in [*steps, reports.validation] for place in step.float64}
    allowed = ("rollout/", "evaluation/") if case.has_float64 else ()
    assert not [place for place in places if not place.startswith(allowed)], f"float64 on the device: {places}"
    return seen


def waits_of_an_optimizer_step(precision: str, most: int) -> str:
    """Of one micro-step, with a fused optimizer and clipping: after the first one, whose episode has probes.

    The second one samples nothing, the third one does.
    """
    with PretendCuda() as gpu:
        case = Run(precision=precision, fused=True, steps_per_episode=1, accumulate=1)
        metrics, reports = case.fit(gpu)
    assert reports is not None
    _, again, step = reports.steps
    sampling, other = split(step.waits)
    blocking = [place for place in step.uploads if place.startswith(("training/", "module")) and "and wait" in place]
    seen = f"{other} waits beside {sampling} of sampling; {step.uploads.total()} uploads"
    seen += f"; without sampling {again.launches.total()} launches"
    assert again.launches.total() <= STEP_LAUNCHES, f"{seen}: {again.launches}"
    assert 0 < other <= most, f"{seen}: {step.waits}"
    assert not blocking, f"uploads that wait: {blocking}"
    assert 0 < metrics["policy/grad_norm"] < 100, f"the norm is that of scaled gradients: {metrics['policy/grad_norm']}"
    return seen


def losses_wait_for_nothing() -> str:
    """Every preset's loss and its gradient, with all that a token batch may have."""
    lengths = torch.tensor([3, 1, 4, 2])
    generator = torch.Generator().manual_seed(0)
    names = [name for name in algorithm.__all__ if isinstance(getattr(algorithm, name), type)]
    presets = [kind for kind in map(partial(getattr, algorithm), names) if issubclass(kind, algorithm.Algorithm)]
    with PretendCuda() as gpu:

        def on_device(values: torch.Tensor) -> Any:
            return values.to(CUDA)

        for kind in presets:
            preset = kind()
            preset.setup(8, samples_elsewhere=False)
            logprobs, *others = (on_device(-torch.rand(10, generator=generator)) for _ in range(5))
            logprobs.requires_grad_()
            advantages = on_device(torch.tensor([1.0, -1.0, 0.5, -0.5]))
            selected = on_device(torch.ones(10, dtype=torch.bool))
            old, reference, sampling, entropies = others
            own = {"select_T": selected, "teacher_logprobs_T": reference, "divergences_T": logprobs.square()}
            tokens = TokenBatch(logprobs, old, advantages, on_device(lengths), reference, sampling, entropies, **own)
            gpu.take()
            loss_T, _ = preset.per_token_loss(tokens)
            loss_T.sum().backward()
            report = gpu.take()
            assert not report.waits, f"{kind.__name__}: {report.waits}"
            assert not report.float64, f"{kind.__name__}: {report.float64}"
    return f"{len(presets)} presets"


def launches_of_score() -> str:
    """Forward and backward of 4 and of 16 groups of one shape, which attention takes in buckets."""
    launches = []
    with PretendCuda() as gpu, CUDA:
        policy = Policy(load_model(PolicyConfig("tiny")), PolicyConfig("tiny"))
        assert not ANNOUNCED, ANNOUNCED
        for count in (4, 16):
            groups = [Group(list(range(3, 12)), [[5, 6, 7, 8]] * 4) for _ in range(count)]
            gpu.take()
            policy.score(groups)[0].sum().backward()
            report = gpu.take()
            launches.append(report.launches.total())
            assert not report.waits, report.waits
    seen = f"{launches[0]} launches for 4 groups, {launches[1]} for 16"
    assert launches[1] <= 1.2 * launches[0], seen
    return seen


def mixing_is_noticed() -> str:
    with PretendCuda():
        there = torch.ones(2, device=CUDA)
        try:
            there + torch.ones(2)
        except RuntimeError as error:
            return str(error)
    raise AssertionError("a tensor of the host was added to one of the device")


def costs_are_counted() -> str:
    """One of each kind, which the other checks rely on."""
    with PretendCuda() as gpu:
        there = torch.ones(3, device=CUDA)
        gpu.take()
        waits: list[Callable[[], Any]] = [
            lambda: there[0].item(),
            lambda: float(there.sum()),
            lambda: there.tolist(),
            lambda: there.cpu(),
            lambda: there.nonzero(),
            lambda: there[there > 0],
            lambda: there.repeat_interleave(there.long()),
            lambda: bool((there > 0).all()),
        ]
        for wait in waits:
            wait()
            assert gpu.take().waits.total() == 1
        there.repeat_interleave(there.long(), output_size=3)
        torch.ones(3).to(CUDA, non_blocking=True)
        quiet = gpu.take()
        assert (quiet.waits.total(), quiet.uploads.total()) == (0, 1)
        assert not [place for place in quiet.uploads if "and wait" in place]
        torch.ones(3).to(CUDA)
        assert [place for place in gpu.take().uploads if "and wait" in place]
        there.double()
        assert gpu.take().float64.total() == 1
    return f"{len(waits)} ways to wait"


def starts_without_accelerate() -> str:
    """In the device's context, as Lightning asks for a model."""
    with (
        PretendCuda(),
        CUDA,
        patch("transformers.integrations.accelerate.is_accelerate_available", lambda: False),
    ):
        model = load_model(PolicyConfig("tiny", lora=LoRAConfig(rank=4)))
    assert {p.device for p in model.parameters()} == {CUDA}
    return f"{model.num_parameters():,} parameters"


CHECKS: dict[str, Callable[[], str]] = {
    "mixed devices are noticed": mixing_is_noticed,
    "costs are counted": costs_are_counted,
    "a model is loaded without accelerate": starts_without_accelerate,
    "losses wait for nothing": losses_wait_for_nothing,
    "launches of score": launches_of_score,
    "waits of a step in bf16-mixed": partial(waits_of_an_optimizer_step, "bf16-mixed", STEP_WAITS),
    "waits of a step in 16-mixed": partial(waits_of_an_optimizer_step, "16-mixed", STEP_WAITS + 1),
    "as on the CPU, a reference, steps as for a graph": partial(same_as_on_the_cpu, Run(beta=0.04, decoding="graph")),
    "as on the CPU, KL in the reward, selected tokens, samples in validation": partial(
        same_as_on_the_cpu, Run(beta=0.04, algorithm={"kl": KL("k1", place="reward"), "top_entropy": 0.5}, samples=2)
    ),
    "as on the CPU, an adapter, steps as for a graph": partial(
        same_as_on_the_cpu, Run(beta=0.04, lora=True, decoding="graph")
    ),
    "as on the CPU, a device without float64": partial(same_as_on_the_cpu, Run(samples=2, has_float64=False)),
}


def main() -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    announced = logging.Handler()
    announced.emit = lambda record: ANNOUNCED.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("stateset_lightning").addHandler(announced)
    for name, function in CHECKS.items():
        check(f"stand-in for a GPU: {name}", function)
    return exit_status()


if __name__ == "__main__":
    raise SystemExit(main())
