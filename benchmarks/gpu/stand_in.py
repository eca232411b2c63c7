"""Runs on the stand-in of `pretend_cuda.py`: the metrics are the CPU's, no devices are mixed, the host rarely waits.

python stand_in.py          needs no GPU; a minute. tests/gpu/test_stand_in.py runs it and asks for each check.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from math import ceil
from random import Random
from typing import Any
from unittest.mock import patch

import torch
from harness import BARE_RUN, check, exit_status
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from plain_kernels import plain_kernels
from pretend_cuda import CUDA, PretendCuda, Report

from stateset_lightning import GRPOLightningModule, RolloutConfig, ScenarioDataModule, algorithm
from stateset_lightning.algorithm import GRPO, KL, TokenBatch
from stateset_lightning.evaluation import EvaluationConfig
from stateset_lightning.policy import Group, LoRAConfig, Policy, PolicyConfig, head, load_model, load_tokenizer
from stateset_lightning.rewards import ExactMatch
from stateset_lightning.rollout import InProcessEngine
from stateset_lightning.rollout.cuda_decoding import LOOK_EVERY
from stateset_lightning.rollout.engine import DecodingKind
from stateset_lightning.seeding import sample_seeds
from stateset_lightning.types import WITHOUT_FLOAT64

NEW_TOKENS = 20
TEMPERATURE = 3.0  # some completions are short, and some longer than from one look to the next
# Of an episode. None per token: the host looks every 16 which rows have finished, and takes what they have sampled.
SAMPLING_WAITS = 4 + 3 * 2
HOST_SAMPLING_WAITS = 4 + NEW_TOKENS  # where the host samples: it takes the logits of each token
OTHER_WAITS = 6  # of a micro-step: old log-probs, those of the reference and entropies come to the host, too
VALIDATION_WAITS = 4  # beside sampling, however many prompts and measures
STEP_WAITS = 6  # of an optimizer step of one micro-step; one more where its loss is scaled
# Uploads that wait: of a call that scores, and of all sampling of an episode.
SCORE_UPLOADS = 0
SAMPLING_UPLOADS = 23
# Launches with the kernels of a GPU, whatever the number of groups and rows.
SCORE_LAUNCHES, CHUNK_LAUNCHES = 740, 45  # of forward and backward, and of each further chunk of tokens in the head
TOKEN_LAUNCHES: dict[DecodingKind, int] = {"graph": 155, "eager": 160}
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
        self.launches: list[int] = []  # of each micro-step, without those of sampling
        self.validation, self.validation_launches = Report(), 0
        self._sampling = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the launches of sampling are told apart."""
        stock = InProcessEngine.generate

        def generate(*args: Any, **options: Any) -> Any:
            before = self.gpu.report.launches.total()
            made = stock(*args, **options)
            self._sampling += self.gpu.report.launches.total() - before
            return made

        with patch.object(InProcessEngine, "generate", generate):
            yield

    def _take(self) -> tuple[Report, int]:
        report, sampling = self.gpu.take(), self._sampling
        self._sampling = 0
        return report, report.launches.total() - sampling

    def on_train_batch_start(self, *args: Any) -> None:
        self._take()

    def on_train_batch_end(self, *args: Any) -> None:
        report, launches = self._take()
        self.steps.append(report)
        self.launches.append(launches)

    def on_validation_end(self, *args: Any) -> None:
        self.validation, self.validation_launches = self._take()


def digits(completion: str) -> float:
    """Share of a completion that is digits, which tells also long ones from each other."""
    return sum(map(str.isdigit, completion)) / max(1, len(completion))


@dataclass(frozen=True)
class Run:
    """A short run, of which every case varies one thing."""

    beta: float = 0.0
    lora: bool = False
    algorithm: Mapping[str, Any] = field(default_factory=dict, hash=False)
    precision: str = "32-true"
    fused: bool = False
    steps_per_episode: int = 2
    accumulate: int = 2
    num_iterations: int = 2
    samples: int = 0
    decoding: DecodingKind = "eager"
    has_float64: bool = True
    prompts: int = 8

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
            validation=rows[: self.prompts // 2],
            batch_size=self.prompts,
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
        with nullcontext() if reports is None else reports.watching():
            trainer.fit(module, datamodule=data)
        shown = trainer.callback_metrics.items()
        return {name: float(value) for name, value in shown if not name.startswith(UNLIKE)}, reports

    def _scaler(self, gpu: PretendCuda | None) -> Any:
        if self.precision != "16-mixed":
            return None
        return torch.amp.GradScaler(CUDA.type if gpu else "cpu", init_scale=2.0**10)


STEP = Run(precision="bf16-mixed", fused=True, steps_per_episode=1, accumulate=1)


def split(waits: Mapping[str, int]) -> tuple[int, int]:
    """Waits, or uploads, in sampling, and all others; probes belong to the start of a run."""
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


@cache
def fitted_with_kernels(case: Run) -> tuple[dict[str, float], Reports]:
    with PretendCuda() as gpu, plain_kernels():
        metrics, reports = case.fit(gpu)
    assert reports is not None
    return metrics, reports


def an_optimizer_step(case: Run, waits: int, launches: int, forward: int = 350) -> str:
    """Of one micro-step, with a fused optimizer and clipping: after the first one, whose episode has probes.

    The second one samples nothing; the third one does, and scores with the old weights, too.

    Args:
        waits: At most, beside those of sampling.
        launches: Of the second one, at most.
        forward: Launches of a scoring without gradients, and of a validation beside sampling, at most.
    """
    metrics, reports = fitted_with_kernels(case)
    _, again, step = reports.steps
    sampling, other = split(step.waits)
    in_sampling, uploads = split(step.blocking)
    calls = 3 if case.beta else 2  # that score: a reference, too
    seen = f"{other} waits beside {sampling} of sampling; {uploads} uploads that wait beside {in_sampling} of sampling"
    seen += f"; launches: {reports.launches[1]}, {reports.launches[2]} with old log-probs"
    seen += f", {reports.validation_launches} of a validation beside sampling"
    assert 0 < other <= waits, f"{seen}: {step.waits}"
    assert uploads <= calls * SCORE_UPLOADS, f"{seen}: {step.blocking}"
    assert split(again.blocking)[1] <= SCORE_UPLOADS, f"{seen}: {again.blocking}"
    assert in_sampling <= SAMPLING_UPLOADS, f"{seen}: {step.blocking}"
    assert reports.launches[1] <= launches, f"{seen}: {again.launches}"
    assert reports.launches[2] <= launches + (calls - 1) * forward, f"{seen}: {step.launches}"
    assert reports.validation_launches <= forward, f"{seen}: {reports.validation.launches}"
    assert 0 < metrics["policy/grad_norm"] < 100, f"the norm is that of scaled gradients: {metrics['policy/grad_norm']}"
    return seen


def launches_of_more_groups() -> str:
    """Of steps and of a validation: the same for twice as many prompts, whose completions are others, too."""
    (few, some), (many, more) = map(fitted_with_kernels, (STEP, replace(STEP, prompts=2 * STEP.prompts)))
    assert many["completion/mean_tokens"] != few["completion/mean_tokens"]
    for name in ("launches", "validation_launches"):
        assert getattr(some, name) == getattr(more, name), (name, getattr(some, name), getattr(more, name))
    return f"{some.launches} and {some.validation_launches} launches"


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


def launches_of_buckets() -> str:
    """Forward and backward of 4 and of 16 groups of one shape, which attention takes in buckets."""
    launches = []
    with PretendCuda() as gpu, CUDA:
        policy = Policy(load_model(PolicyConfig("tiny")), PolicyConfig("tiny"))
        assert not ANNOUNCED, ANNOUNCED
        for count in (4, 16):
            groups = [Group(list(range(3, 12)), [[5, 6, 7, 8]] * 4) for _ in range(count)]
            launches.append(scored(gpu, policy, groups).launches.total())
    seen = f"{launches[0]} launches for 4 groups, {launches[1]} for 16"
    assert launches[1] <= 1.2 * launches[0], seen
    return seen


def scored(gpu: PretendCuda, policy: Policy, groups: list[Group]) -> Report:
    """What a micro-step did that begins without gradients."""
    policy.zero_grad(set_to_none=True)
    gpu.take()
    policy.score(groups)[0].sum().backward()
    report = gpu.take()
    assert not report.waits, report.waits
    return report


def launches_of_score() -> str:
    """Forward and backward of 4, 16 and 64 groups of all lengths by the kernels, in bfloat16: launches and uploads.

    Their number depends on nothing but the chunks of the head.
    """
    random = Random(0)
    seen = []
    with PretendCuda() as gpu, plain_kernels((torch.bfloat16,)), patch.object(head, "GPU_CHUNK_TOKENS", 1024):
        with CUDA:
            policy = Policy(load_model(PolicyConfig("tiny"), torch.bfloat16), PolicyConfig("tiny"))
        assert policy.uses_packed_scoring
        assert not ANNOUNCED, ANNOUNCED
        for count in (4, 16, 64):
            lengths = [(random.randint(4, 40), [random.randint(1, 30) for _ in range(4)]) for _ in range(count)]
            groups = [Group([3] * prompt, [[5] * length for length in own]) for prompt, own in lengths]
            report = scored(gpu, policy, groups)
            chunks = ceil(sum(group.num_completion_tokens for group in groups) / 1024)
            blocking = report.blocking
            seen.append((count, chunks, report.launches.total(), blocking.total()))
            assert blocking.total() <= SCORE_UPLOADS, blocking
    told = "; ".join(f"{n} groups, {k} chunks: {i} launches, {j} uploads that wait" for n, k, i, j in seen)
    (_, _, first, _), (_, two, second, _), (_, most, last, _) = seen
    assert (two, most) == (2, 4), told
    assert first <= SCORE_LAUNCHES, told
    assert second - first <= CHUNK_LAUNCHES, told
    assert last - first == 3 * (second - first), told
    return told


def launches_of_a_token() -> str:
    """Of 4 and of 16 rows of which none ends, between one look of the host and the next; nothing waits but the look."""
    seen = []
    with PretendCuda() as gpu, plain_kernels():
        with CUDA:
            policy = Policy(load_model(PolicyConfig("tiny")), PolicyConfig("tiny"))
        engine = InProcessEngine(load_tokenizer(PolicyConfig("tiny")))
        engine.sync(policy)
        engine.ends = frozenset([10**6])

        def costs(decoding: DecodingKind, prompts: int, tokens: int) -> Report:
            config = RolloutConfig(max_new_tokens=tokens, decoding=decoding)
            gpu.take()
            rollout = engine.generate([[3, 4]] * prompts, 4, config, sample_seeds(1, "train", 0, range(prompts), 4))
            assert (rollout.lengths_N == tokens).all()
            return gpu.take()

        for decoding, most in TOKEN_LAUNCHES.items():
            costs(decoding, 1, 1)  # probes
            for prompts in (1, 4):
                few, many = (costs(decoding, prompts, looks * LOOK_EVERY) for looks in (1, 2))
                launches = (many.launches.total() - few.launches.total()) / LOOK_EVERY
                seen.append(f"{launches:.1f} launches for {4 * prompts} rows, {decoding}")
                assert many.waits.total() - few.waits.total() <= 1, many.waits
                assert launches <= most, f"{seen[-1]}: {many.launches - few.launches}"
    assert not ANNOUNCED, ANNOUNCED
    return "; ".join(seen)


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
        assert not quiet.blocking
        there.copy_(torch.ones(3), non_blocking=True)
        assert not gpu.take().blocking
        uploads: list[Callable[[], Any]] = [
            lambda: torch.ones(3).to(CUDA),
            lambda: there.copy_(torch.ones(3)),
            lambda: there[torch.tensor([0, 2])],
            lambda: torch.tensor([1, 2], device=CUDA),
        ]
        for upload in uploads:
            upload()
            assert gpu.take().blocking.total() == 1
        there.double()
        assert gpu.take().float64.total() == 1
    return f"{len(waits)} ways to wait, and {len(uploads)} uploads that do"


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
    "launches of score in buckets": launches_of_buckets,
    "launches and uploads of score": launches_of_score,
    "launches of a token": launches_of_a_token,
    "a step in bf16-mixed": partial(an_optimizer_step, STEP, STEP_WAITS, 1230),
    "a step in 16-mixed": partial(an_optimizer_step, replace(STEP, precision="16-mixed"), STEP_WAITS + 1, 1250),
    "a step with a reference": partial(an_optimizer_step, replace(STEP, beta=0.04), STEP_WAITS, 1250),
    "a step with an adapter": partial(an_optimizer_step, replace(STEP, lora=True), STEP_WAITS, 1580, 560),
    "launches of a step with more groups": launches_of_more_groups,
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
