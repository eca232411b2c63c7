"""The kill test: a run killed by SIGKILL at seeded random moments, and resumed each time, ends as if it had never been
killed.

    python benchmarks/kill_test.py --kills 50                  one process, float32 (`make kill-test` runs all three)
    python benchmarks/kill_test.py --kills 20 --precision bf16-mixed
    python benchmarks/kill_test.py --kills 20 --ranks 2        two processes with gloo; one is killed, the other a
    moment later
    python benchmarks/kill_test.py --kills 20 --everything     LoRA, dynamic sampling and saves by time, too
    python benchmarks/kill_test.py --kills 40 --conversations  an environment answers; kills fall into it, too
    python benchmarks/kill_test.py --kills 20 --reference      configs/single_turn.yaml, by the command line

The run has all that could be lost: two passes over an episode in four micro-steps, two of them to an optimizer step, a
KL term with an adaptive coefficient, dropout, a learning-rate schedule, a curriculum, validations inside optimizer
steps, checkpoints at every step. Compared bit by bit: weights, optimizer, schedule, loader, curriculum, adaptive
coefficients, every logged metric but time and memory, and every sample. Everything is imported once, and each attempt
is a fork: a start costs a fraction of a second.
"""

from __future__ import annotations

import argparse
import csv
import faulthandler
import io
import itertools
import logging
import os
import random
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork has no use for a pool of threads
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, model_checkpoint
from lightning.pytorch.loggers import CSVLogger

from stateset_lightning import GRPOLightningModule, RewardFunction, RolloutConfig, ScenarioDataModule, files
from stateset_lightning.algorithm import GRPO, KL
from stateset_lightning.callbacks import SampleWriter
from stateset_lightning.cli.config import StatesetCLI
from stateset_lightning.cli.overlays import merged_words
from stateset_lightning.data.order import Curriculum
from stateset_lightning.environments import EnvironmentConfig
from stateset_lightning.policy import LoRAConfig, PolicyConfig, load_model
from stateset_lightning.rewards.scorer import ScoringSession
from stateset_lightning.run import checkpoint_io
from stateset_lightning.run.checkpoint_io import read_checkpoint
from stateset_lightning.run.find_checkpoint import continue_run
from stateset_lightning.run.fsdp_strategy import FSDP2Strategy
from stateset_lightning.training.schedule import Schedule

PLACES = (
    "sampling",
    "scoring",
    "micro-step",
    "optimizer step",
    "validation",
    "half a file",
    "before the rename",
    "after the rename",
    "any time",
)
PLACES_IN_CONVERSATIONS = ("a later turn", "an environment")
SCENARIOS = [{"prompt": f"What is {a} + {b}?", "target": str(a + b)} for a in range(2, 8) for b in (4, 9)]
UNSTEADY = ("time/", "memory/", "work/tokens_per_s")


@dataclass(frozen=True)
class Settings:
    """What is run."""

    steps: int
    precision: str = "32-true"
    ranks: int = 1
    strategy: str = "ddp"  # of several ranks
    dropout: float = 0.1
    file_per_rank: bool = False  # sharded checkpoints, with fsdp2
    max_reward_failures: float = 0.5
    lora: bool = False
    dynamic_sampling: int = 0
    seconds_between_saves: float | None = None  # None: a save at each step
    conversations: bool = False

    @property
    def policy(self) -> PolicyConfig:
        lora = LoRAConfig(rank=4, dropout=self.dropout) if self.lora else None
        return PolicyConfig("tiny", dropout=self.dropout, lora=lora)


@dataclass(frozen=True)
class Kill:
    """Where an attempt ends: the `count`-th time that a rank comes by a place, or `seconds` after training started."""

    place: str
    count: int
    seconds: float
    rank: int
    sent: int = signal.SIGKILL


class EvenDigits(RewardFunction):
    """Varied, so that groups are mixed and gradients are not zero."""

    def compute_reward(self, turns: Any, context: Any = None) -> float:
        pass_by("scoring")
        said = "".join(turn.content for turn in turns if turn.role == "assistant")
        digits = [int(character) for character in said if character.isdigit()]
        return sum(digit % 2 == 0 for digit in digits) / max(len(digits), 1)


class AsksAgain:
    """A user who asks again as often as the answer's length says, from no time to twice: groups are uneven."""

    def reset(self, scenario: Any, seed: int) -> None:
        pass_by("an environment")
        self.times = seed % 2

    def step(self, text: str) -> tuple[str, float, bool]:
        pass_by("an environment")
        self.times += 1
        return "What is 58 + 67?", 0.0, (len(text) + self.times) % 3 == 0


class Passes(Callback):
    """Comes by the places that are hooks."""

    def __init__(self, started: int | None) -> None:
        self.started = started

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module._sampled_policy.model.register_forward_pre_hook(
            lambda *args: None if torch.is_grad_enabled() else pass_by("sampling")
        )
        engine = pl_module.engine
        generate = engine.generate

        def passing(prompts: Any, num_generations: int, *args: Any, **options: Any) -> Any:
            if num_generations == 1 and not options.get("greedy"):  # the first turn samples whole groups
                pass_by("a later turn")
            return generate(prompts, num_generations, *args, **options)

        engine.generate = passing

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # not before `on_train_start` of all callbacks, `StepEnd` among them, which listens to signals
        if self.started is not None:
            os.write(self.started, b"!")
            self.started = None
        pass_by("micro-step")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        pass_by("optimizer step")

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        pass_by("validation")


_plan: Kill | None = None
_passed = itertools.count(1)  # whose numbers are given out once each, also to environments, on threads of their own


def pass_by(place: str) -> None:
    """Dies here if the plan says so."""
    if _plan is not None and _plan.place == place and next(_passed) == _plan.count:
        os.kill(os.getpid(), _plan.sent)


def save_in_halves(content: Any, stream: Any, **options: Any) -> None:
    """`torch.save`, with a place between the halves of the file."""
    # torch's own use of it, for what it sends between ranks; Lightning's, beside shards
    if options or isinstance(stream, Path):
        _save(content, stream, **options)
        return
    buffer = io.BytesIO()
    _save(content, buffer)
    middle = buffer.tell() // 2
    stream.write(buffer.getvalue()[:middle])
    stream.flush()
    pass_by("half a file")
    stream.write(buffer.getvalue()[middle:])


def replace(source: Any, target: Any) -> None:
    """`os.replace`, with a place on each side of it."""
    pass_by("before the rename")
    _replace(source, target)
    pass_by("after the rename")


_save, _replace = torch.save, os.replace


def train(folder: Path, settings: Settings, started: int | None = None, callbacks: Sequence[Callback] = ()) -> None:
    """The run, from its newest checkpoint if there is one."""
    seed_everything(7, verbose=False)
    module = GRPOLightningModule(
        settings.policy,
        reward=EvenDigits(),
        rollout=RolloutConfig(num_generations=4, max_new_tokens=5, dynamic_sampling=settings.dynamic_sampling),
        algorithm=GRPO(beta=0.05, kl=KL(target=0.02)),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-4, weight_decay=0.01),
        lr_scheduler=Schedule(decay="cosine", warmup_steps=5),
        max_reward_failures=settings.max_reward_failures,
        environment=EnvironmentConfig(AsksAgain, max_turns=3, max_tokens=64) if settings.conversations else None,
    )
    data = ScenarioDataModule(
        SCENARIOS,
        SCENARIOS[:5],
        batch_size=4 // settings.ranks,
        eval_batch_size=2,
        num_iterations=2,
        steps_per_episode=4,
        curriculum=Curriculum(),
    )
    trainer = Trainer(
        max_steps=settings.steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=settings.ranks,
        precision=settings.precision,
        strategy=strategy(settings),
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        # odd: every other validation falls inside an optimizer step
        val_check_interval=11,
        check_val_every_n_epoch=None,
        logger=CSVLogger(folder, "run", flush_logs_every_n_steps=3),
        callbacks=[
            Passes(started),
            SampleWriter(1),
            *callbacks,
            ModelCheckpoint(save_last=True, filename="{step}", **saves(settings)),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, datamodule=data, ckpt_path=continue_run(trainer, "last"))


def train_reference(folder: Path, settings: Settings, started: int | None = None) -> None:
    """`stateset-lightning fit` of the reference config."""

    def prepare(trainer: Trainer) -> None:
        trainer.callbacks.insert(0, Passes(started))  # type: ignore[attr-defined]
        submit = ScoringSession.submit

        def passing(*args: Any, **kwargs: Any) -> None:
            pass_by("scoring")
            submit(*args, **kwargs)

        ScoringSession.submit = passing  # type: ignore[method-assign]

    fit_reference(folder, settings.steps, prepare)


def fit_reference(folder: Path, steps: int, prepare: Callable[[Trainer], None]) -> Trainer:
    """Runs configs/single_turn.yaml as it is, but smaller. Two readings of the clock are half of its five minutes.

    Args:
        folder: For the run's files.
        steps: Optimizer steps.
        prepare: Called with the Trainer before it starts.
    """
    readings = itertools.count(step=80)
    model_checkpoint.time = SimpleNamespace(monotonic=lambda: next(readings))  # type: ignore[attr-defined]
    fit = StatesetCLI.before_fit

    def before_fit(cli: StatesetCLI) -> None:
        prepare(cli.trainer)
        fit(cli)

    StatesetCLI.before_fit = before_fit  # type: ignore[method-assign]
    place = [f"--trainer.logger.init_args.save_dir={folder}", "--trainer.logger.init_args.name=run"]
    size = ["--data.batch_size=8", "--data.eval_batch_size=32", "--trainer.limit_val_batches=2"]
    length = [f"--trainer.max_steps={steps}", "--trainer.val_check_interval=4", "--ckpt_path=last"]
    words = ["fit", "--config=configs/single_turn.yaml", *place, *size, *length]
    return StatesetCLI(words, merged_words(words[1:])).trainer


def saves(settings: Settings) -> dict[str, Any]:
    """When ModelCheckpoint saves."""
    if settings.seconds_between_saves is None:
        return {"every_n_train_steps": 1}
    return {"train_time_interval": timedelta(seconds=settings.seconds_between_saves)}


def strategy(settings: Settings) -> Any:
    """For the Trainer."""
    if settings.ranks == 1:
        return "auto"
    return FSDP2Strategy(settings.file_per_rank) if settings.strategy == "fsdp2" else settings.strategy


def fork(
    folder: Path,
    settings: Settings,
    plan: Kill | None,
    rank: int,
    port: int,
    started: int | None,
    run: Callable[..., None] = train,
) -> int:
    """Starts one rank of an attempt; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    global _plan
    _plan = plan if plan is not None and plan.rank == rank else None
    status = 1
    try:
        if settings.ranks > 1:
            ids = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": settings.ranks,
                "LOCAL_WORLD_SIZE": settings.ranks,
                "GROUP_RANK": 0,
            }
            os.environ.update({name: str(value) for name, value in ids.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="kill-test")
        log = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.enable()  # a signal that ends it, SIGSEGV say, leaves every thread's stack in the output
        checkpoint_io.torch.save, files.os.replace = save_in_halves, replace
        run(folder, settings, started)
        status = 0
    except SystemExit as ended:  # how a signal ends a run
        status = int(ended.code or 0)
    except BaseException:
        logging.exception("the attempt failed")
    finally:
        os._exit(status)


def attempt(folder: Path, settings: Settings, plan: Kill | None, run: Callable[..., None] = train) -> bool:
    """Runs until the end or the kill; returns whether the end was reached.

    Raises:
        RuntimeError: If the run ended in any other way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    reader, writer = os.pipe()
    pids = [fork(folder, settings, plan, rank, port, writer, run) for rank in range(settings.ranks)]
    os.close(writer)
    if plan is not None and plan.place == "any time" and os.read(reader, 1):
        time.sleep(plan.seconds)
        os.kill(pids[plan.rank], signal.SIGKILL)
    _, status = os.waitpid(pids[plan.rank if plan else 0], 0)
    killed = os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    for rank, pid in enumerate(pids):
        if rank != (plan.rank if plan else 0):
            if killed:
                time.sleep(0.05)  # long enough to write something wrong
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    os.close(reader)
    if not killed and status:
        raise RuntimeError(
            f"an attempt failed; see {folder / 'output.txt'}:\n{(folder / 'output.txt').read_text()[-3000:]}"
        )
    return not killed


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


REACHES = {"sampling": 15, "scoring": 24, "micro-step": 7, "optimizer step": 3, "validation": 3}
REACHES |= {"a later turn": 3, "an environment": 60}


def draw(rng: random.Random, ranks: int, places: Sequence[str] = PLACES) -> Kill:
    """A moment within the next few optimizer steps."""
    place = rng.choice(places)
    reach = REACHES.get(place, 6)
    on_disk = place in ("half a file", "before the rename", "after the rename")  # the first rank alone writes
    return Kill(place, rng.randint(1, reach), rng.uniform(0, 0.7), 0 if on_disk else rng.randrange(ranks))


def end_state(folder: Path, checkpoint_file: Path | None = None) -> dict[str, Any]:
    """All that has to be equal at the end."""
    # A run that is killed before its first save starts anew, in the next version.
    run = max((folder / "run").iterdir(), key=lambda version: int(version.name.rpartition("_")[2]))
    checkpoint = read_checkpoint(checkpoint_file or run / "checkpoints" / "last.ckpt")
    names = ("state_dict", "optimizer_states", "optimizer_0", "lr_schedulers", "ScenarioDataModule", "global_step")
    state = {name: checkpoint[name] for name in names if name in checkpoint}
    stateset = {name: value for name, value in checkpoint["stateset"].items() if name not in ("run_folder", "saved_at")}
    stateset["made_of"] = {
        name: value for name, value in stateset["made_of"].items() if not name.startswith("trainer.callbacks.")
    }
    stateset["metrics"] = {part: steady(values) for part, values in stateset["metrics"].items()}
    with (run / "metrics.csv").open() as file:
        rows = [steady(row) for row in csv.DictReader(file)]
    loader = checkpoint["loops"]["fit_loop"].get("combined_loader")
    return {
        **state,
        "stateset": stateset,
        "loader": loader,
        "metrics.csv": rows,
        "samples.jsonl": (run / "samples.jsonl").read_text(),
    }


def steady(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith(UNSTEADY)}


def differences(mine: Any, other: Any, place: str = "") -> list[str]:
    """Where two nested states are not bit-identical."""
    if isinstance(mine, torch.Tensor) and isinstance(other, torch.Tensor):
        same = (mine.dtype, mine.shape) == (other.dtype, other.shape) and torch.equal(
            *(_bytes(tensor) for tensor in (mine, other))
        )
        return [] if same else [place]
    if isinstance(mine, dict) and isinstance(other, dict):
        missing = [f"{place}/{name}" for name in mine.keys() ^ other.keys()]
        return missing + [
            d for name in mine.keys() & other.keys() for d in differences(mine[name], other[name], f"{place}/{name}")
        ]
    if isinstance(mine, list | tuple) and isinstance(other, list | tuple) and len(mine) == len(other):
        return [d for i, (a, b) in enumerate(zip(mine, other, strict=True)) for d in differences(a, b, f"{place}/{i}")]
    return [] if repr(mine) == repr(other) else [place]  # NaN is equal to itself here


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--strategy", choices=["ddp", "fsdp2"], default="ddp")
    parser.add_argument("--file-per-rank", action="store_true", help="fsdp2: sharded checkpoints")
    parser.add_argument("--lora", action="store_true", help="train an adapter")
    parser.add_argument("--everything", action="store_true", help="an adapter, dynamic sampling and saves by time")
    parser.add_argument("--conversations", action="store_true", help="an environment answers")
    parser.add_argument("--reference", action="store_true", help="configs/single_turn.yaml, by the command line")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="an empty folder to keep the files of both runs in")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    settings = Settings(
        3 * args.kills + 4,
        args.precision,
        args.ranks,
        args.strategy,
        file_per_rank=args.file_per_rank,
        lora=args.lora or args.everything,
        dynamic_sampling=2 if args.everything else 0,
        seconds_between_saves=0.1 if args.everything else None,
        conversations=args.conversations,
    )
    drawn = PLACES + PLACES_IN_CONVERSATIONS * 2 if args.conversations else PLACES
    run = train_reference if args.reference else train
    load_model(settings.policy)  # imports the model's code before the first fork
    rng, places, start = random.Random(args.seed), Counter[str](), time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        straight, killed = folder / "straight", folder / "killed"
        attempt(straight, settings, None, run)
        one_run = time.perf_counter() - start
        while places.total() < args.kills:
            plan = draw(rng, args.ranks, drawn)
            if attempt(killed, settings, plan, run):
                print(f"the run ended after {places.total()} kills: raise the number of steps")
                return 1
            places[plan.place] += 1
        attempt(killed, settings, None, run)
        different = differences(end_state(killed), end_state(straight))
    print(
        f"{args.precision}, {args.ranks} rank(s), {settings.steps} optimizer steps ({one_run:.0f} s), "
        f"{places.total()} kills: " + ", ".join(f"{count} {place}" for place, count in sorted(places.items()))
    )
    print(
        f"{time.perf_counter() - start:.0f} s in all; "
        + (f"DIFFERENT in {different[:8]}" if different else "the end states are bit-identical")
    )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
