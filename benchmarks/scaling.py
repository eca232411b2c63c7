"""What a step costs, and against what it cannot avoid: `python benchmarks/scaling.py [--rounds 3] [--profile |
--decoding | --products]`.

One number is varied at a time around 2 prompts x 8 completions, 256 tokens of prompt, 64 of completion, in the model of
`compare_trl.py`.

The floor is the multiply-adds that no implementation avoids, at the float32 matrix rate measured beside each line:
every prompt once and every completion once, 2 x parameters per token in sampling and 6 x in training.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import workload
from torch.profiler import ProfilerActivity, profile

from stateset_lightning.policy import Group, Policy, PolicyConfig
from stateset_lightning.rollout import InProcessEngine, RolloutConfig
from stateset_lightning.rollout.cpu_decoding import LlamaDecoder, prepacked_linears
from stateset_lightning.rollout.running_batch import batch_kinds


@dataclass(frozen=True)
class Shape:
    """One line of the table."""

    prompt: int = 256
    completion: int = 64
    group: int = 8
    prompts: int = 2
    vocabulary: int = workload.VOCABULARY

    @property
    def tokens(self) -> int:
        """Tokens that have to be forwarded once."""
        return self.prompts * (self.prompt + self.group * self.completion)


BASE = Shape()
SWEEPS = {
    "prompt length": [replace(BASE, prompt=p) for p in (32, 256, 1024)],
    "group size": [replace(BASE, group=g) for g in (4, 8, 16)],
    "completion length": [replace(BASE, completion=c) for c in (32, 64, 128)],
    "prompts": [replace(BASE, prompts=p) for p in (1, 2, 4)],
    "vocabulary": [replace(BASE, vocabulary=v) for v in (512, 8192, 65536)],
    "group size, prompt 16 x completion": [Shape(prompt=512, completion=32, group=g) for g in (8, 16)],
}


@dataclass(frozen=True)
class Times:
    """Seconds of one step, and multiply-adds per second x 2 of a large matrix product at the same time."""

    sample: float
    train: float
    rate: float

    @property
    def step(self) -> float:
        return self.sample + self.train


class Step:
    """Sample, score, forward, backward, AdamW; the parts of a training step that depend on the shape."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        model = workload.make_model(vocab_size=shape.vocabulary)
        model.generation_config.eos_token_id = shape.vocabulary  # unreachable: every completion is full
        self.parameters = model.num_parameters()
        self.policy = Policy(model, PolicyConfig("random"))
        self.policy.train()
        self.engine = InProcessEngine(workload.make_tokenizer(unreachable_eos=True))
        self.engine.sync(self.policy)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        self.prompts = [[2 + (7 * p + i) % 200 for i in range(shape.prompt)] for p in range(shape.prompts)]

    def run(self) -> Times:
        rate = matrix_rate()
        start = time.perf_counter()
        config = RolloutConfig(num_generations=self.shape.group, max_new_tokens=self.shape.completion)
        rollout = self.engine.generate(
            self.prompts, self.shape.group, config, range(self.shape.prompts * self.shape.group)
        )
        sampled = time.perf_counter()
        completions = rollout.completions()
        groups = [Group(p, completions[i * self.shape.group :][: self.shape.group]) for i, p in enumerate(self.prompts)]
        logprobs_T, _ = self.policy.score(groups)
        (logprobs_T * torch.linspace(-1, 1, len(logprobs_T))).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Times(sampled - start, time.perf_counter() - sampled, rate)

    def floor(self, rate: float) -> float:
        """Seconds of the multiply-adds that cannot be avoided."""
        return (2 + 6) * self.parameters * self.shape.tokens / rate


def matrix_rate(size: int = 1536) -> float:
    """Floating-point operations per second of a float32 matrix product, the best of a few."""
    a, b = torch.ones(size, size), torch.ones(size, size)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def product_times(rows: int) -> tuple[float, ...]:
    """Median seconds of a token's matrix products with all layers of the model: stock, weights laid out, and turned
    round, in turns.
    """
    layers = [m for m in workload.make_model().model.layers.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {size: torch.ones(rows, size) for size in {layer.in_features for layer in layers}}
    product = torch.ops.mkldnn._linear_pointwise
    with torch.inference_mode():
        weights = [layer.weight.detach() for layer in layers]
        laid_out = [torch.ops.mkldnn._reorder_linear_weight(weight, rows) for weight in weights]
        # As `LlamaDecoder` has them: inputs are columns, one behind the other.
        columns = {size: x.t().contiguous().t() for size, x in inputs.items()}
        ways: list[Callable[[], object]] = [
            lambda: [torch.nn.functional.linear(inputs[w.shape[1]], w) for w in weights],
            lambda: [
                product(inputs[w.shape[1]], order, None, "none", [], "")
                for w, order in zip(weights, laid_out, strict=True)
            ],
            lambda: [product(w, columns[w.shape[1]], None, "none", [], "") for w in weights],
        ]
        return in_turns(ways, 30)


def in_turns(ways: Sequence[Callable[[], object]], times: int) -> tuple[float, ...]:
    """Median seconds of each, so that a slow second of the machine meets all of them."""
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(times):
        for way, taken in zip(ways, seconds, strict=True):
            start = time.perf_counter()
            way()
            taken.append(time.perf_counter() - start)
    return tuple(map(statistics.median, seconds))


def compare_decoders(rows: int, prompt: int, tokens: int = 64) -> tuple[float, ...]:
    """Median seconds of a token by the model with prepacked linear layers and by `LlamaDecoder`, in turns."""
    model = Policy(workload.make_model(), PolicyConfig("random")).model.eval()
    with torch.inference_mode(), prepacked_linears(model, rows):
        batches = [batch_kinds(model, prompt)[0](model, tokens, by) for by in (None, LlamaDecoder(model))]
        for batch in batches:
            batch.admit(
                [[2 + (7 * p + i) % 200 for i in range(prompt)] for p in range(2)],
                [row * 2 // rows for row in range(rows)],
            )
        return in_turns([partial(batch.step, torch.full((rows,), 2)) for batch in batches], tokens)


def median(times: list[Times]) -> Times:
    return Times(
        *(statistics.median(column) for column in zip(*((t.sample, t.train, t.rate) for t in times), strict=True))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sweeps", nargs="*", choices=list(SWEEPS), default=list(SWEEPS))
    parser.add_argument(
        "--profile", action="store_true", help="where the time of the base shape goes, operation by operation"
    )
    parser.add_argument("--products", action="store_true", help="a token's matrix products in three ways")
    parser.add_argument(
        "--decoding", action="store_true", help="a token by the model and by the decoder of Llama-like models"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    if arguments.products:
        print("| rows | stock ms | laid out ms | turned round ms |\n|---|---|---|---|")
        for rows in (2, 4, 8, 16, 32, 64, 128):
            print(f"| {rows} | {' | '.join(f'{1e3 * seconds:.1f}' for seconds in product_times(rows))} |", flush=True)
        return
    if arguments.decoding:
        print("| rows | prompt | model ms | decoder ms | less |\n|---|---|---|---|---|")
        for rows, prompt in ((2, 32), (6, 32), (16, 32), (16, 256), (64, 32)):
            by_model, by_decoder = (
                statistics.median(times) * 1e3
                for times in zip(*(compare_decoders(rows, prompt) for _ in range(3)), strict=True)
            )
            print(f"| {rows} | {prompt} | {by_model:.1f} | {by_decoder:.1f} | {1 - by_decoder / by_model:.0%} |")
        return
    if arguments.profile:
        step = Step(BASE)
        step.run()
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            step.run()
        print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40))
        return
    for name in arguments.sweeps:
        print(
            f"\n{name}\n\n| prompt / completion | G | prompts | vocabulary | sample s | train s | step s | floor s |"
            " step / floor |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        steps = [Step(shape) for shape in SWEEPS[name]]
        for step in steps:
            step.run()
        # The shapes take turns, so that a slow minute of the machine meets all of them.
        rounds = [[step.run() for step in steps] for _ in range(arguments.rounds)]
        for step, times in zip(steps, zip(*rounds, strict=True), strict=True):
            t, s = median(list(times)), step.shape
            floor = step.floor(t.rate)
            print(f"| {s.prompt} / {s.completion} | {s.group} | {s.prompts} | {s.vocabulary} ", end="")
            print(f"| {t.sample:.2f} | {t.train:.2f} | {t.step:.2f} | {floor:.2f} | {t.step / floor:.2f} |", flush=True)


if __name__ == "__main__":
    main()
