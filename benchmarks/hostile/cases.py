"""What a hostile case is made of: a folder, a command line, what is planted in it, and what may come of it.

A case is its kind and a seed: all that is drawn for it comes from these two, so that it can be repeated alone.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from cli_runs import RUN_CONFIG

HERE = Path(__file__).parent
REWARDS = "hostile_rewards"
"""Module of the rewards, which is copied beside each config."""

CONFIG: dict[str, Any] = {
    "seed_everything": RUN_CONFIG["seed_everything"],
    "model": {
        **RUN_CONFIG["model"],
        "rollout": {"num_generations": 2, "max_new_tokens": 4},
        "max_reward_failures": 1.0,
    },
    "data": {"train": "rows.jsonl", "validation": "rows.jsonl", "predict": "rows.jsonl", "batch_size": 2},
    "samples": {"every_n_episodes": 1},
    "trainer": {**RUN_CONFIG["trainer"], "max_steps": 2},
}
ROWS = [{"prompt": f"What is {i} + 1?", "target": str(i + 1), "steps": [i, 1]} for i in range(4)]


@dataclass
class Plan:
    """What is started, and which ends are right.

    Attributes:
        words: Of the command line, `fit` and what follows.
        title: What is hostile about it.
        codes: Exit codes that are right.
        outputs: Files and folders, below the working folder, that may appear or change.
        inside: Called in the process of the command before it, where that is a fork: faults, signals at a place.
        serve: Called in a thread: answers the requests of this case. Its socket is `listening`.
        sent: A signal, after `seconds` of the command.
        patience: Seconds that the case may take beyond the usual: for its own time-outs.
        file_limit: Bytes that a file may have (RLIMIT_FSIZE).
        then: A further command that has to end with 0, after a signal.
    """

    words: list[str]
    title: str
    codes: tuple[int, ...] = (0, 2)
    outputs: tuple[str, ...] = ("runs",)
    inside: Callable[[], None] | None = None
    serve: Callable[[], None] | None = None
    listening: socket.socket | None = None
    sent: int | None = None
    seconds: float = 0.0
    patience: float = 0.0
    file_limit: int | None = None
    then: list[str] | None = None
    stdin: bytes = b""
    only_in_fork: bool = False
    """Whether it can be done in a fork alone."""

    def __post_init__(self) -> None:
        self.only_in_fork = self.only_in_fork or self.inside is not None


@dataclass
class Place:
    """The folder of a case: the working folder with its files, a home, a folder for temporary files, secrets."""

    root: Path
    world: Path
    rng: random.Random
    seed: int
    secrets: dict[str, str] = field(default_factory=dict)

    @classmethod
    def make(cls, root: Path, world: Path, rng: random.Random, seed: int = 0) -> Place:
        place = cls(root, world, rng, seed)
        for folder in (place.work, place.home, place.temporary, place.work / "runs"):
            folder.mkdir(parents=True)
        return place

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def temporary(self) -> Path:
        return self.root / "tmp"

    def secret(self, where: str) -> str:
        """A value that must not turn up anywhere; the same at each call."""
        return self.secrets.setdefault(where, f"Zq{self.rng.getrandbits(80):020x}")

    def environment(self) -> dict[str, str]:
        """Names of the environment, with secrets among them."""
        planted = ("HOSTILE_API_KEY", "JUDGE_API_KEY", "VLLM_API_KEY", "DB_PASSWORD", "SERVICE_DSN")
        folders = {"HOME": self.home, "HF_HOME": self.home / "hf", "TMPDIR": self.temporary}
        switches = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return {
            **switches,
            **{name: str(folder) for name, folder in folders.items()},
            **{name: self.secret(name) for name in planted},
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def flags(self) -> list[str]:
        """A secret on the command line."""
        return [f'--model.policy.model_kwargs={{"token": "{self.secret("flag")}"}}']

    def config(self, changes: dict[str, Any] | None = None, rows: Iterable[Any] = ROWS) -> dict[str, Any]:
        """Writes `config.yaml`, `rows.jsonl` and the module of rewards; keys of `changes` are dotted."""
        config = changed(CONFIG, changes or {})
        (self.work / "config.yaml").write_text(yaml.safe_dump(config))
        (self.work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        shutil.copy(HERE / f"{REWARDS}.py", self.work)
        return config

    def from_world(self, name: str, target: str) -> Path:
        """A copy of what an ordinary run made: `run` (of a whole model), `lora`, `model` (exported)."""
        shutil.copytree(self.world / name, self.work / target, symlinks=True)
        return self.work / target

    def resumable(self) -> None:
        """The working folder of an ordinary run of two steps that can go on."""
        self.config({"trainer.max_steps": 4})
        shutil.rmtree(self.work / "runs")
        self.from_world("run", "runs")


def changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with other values at dotted keys."""
    config = copy.deepcopy(config)
    for name, value in changes.items():
        *parents, last = name.split(".")
        inner = config
        for key in parents:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return config


def listening_socket() -> tuple[socket.socket, str]:
    """A socket that a fork inherits, and its address."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", 0))
    listening.listen(128)
    return listening, f"http://127.0.0.1:{listening.getsockname()[1]}"


# Values that few programs expect --------------------------------------------------------------------------------------

TEXTS = (
    "",
    " ",
    "\u2028\u2029\x85",
    "a\x00b",
    "\ufeff",
    "\x1b[2J\x1b]0;title\x07",
    "💥" * 50,
    "e\u0301" * 20,
    "\u202e\u200b",
    "<|end|>",
    "{{ 7 * 7 }}{% for i in range(9) %}",
    "</script><script>alert(1)</script>",
    "=HYPERLINK(1)",
    "%s%n{0.__class__}",
    "../../x",
    "NaN",
    "null",
    "1e999",
    "0." * 5_000,
    "x" * 200_000,
)
NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64 + 1, 10**400, 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"))


def hostile_value(rng: random.Random, depth: int = 3) -> Any:
    """Anything that JSON can write down (Python's reader takes NaN as well)."""
    kind = rng.randrange(8 if depth else 5)
    if kind == 0:
        return rng.choice(TEXTS)
    if kind == 1:
        return rng.choice(NUMBERS)
    if kind == 2:
        return rng.choice((None, True, False))
    if kind == 3:
        return rng.choice(("\ud800", "\udfffx", "a\ud83d"))
    if kind == 4:
        return "".join(chr(rng.randrange(1, 0x3000)) for _ in range(rng.randrange(20)))
    if kind == 5:
        return [hostile_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        return {str(hostile_value(rng, 0))[:50]: hostile_value(rng, depth - 1) for _ in range(rng.randrange(4))}
    value: Any = "x"
    for _ in range(rng.choice((5, 60, 400))):
        value = [value]
    return value


def leaves(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all that holds nothing else."""
    items = list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
    return [leaf for key, value in items for leaf in leaves(value, (*path, key))] if items else [path]


def put(node: Any, path: tuple[Any, ...], value: Any) -> None:
    """Sets what stands at a path."""
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A file that was cut off, or in which bytes have changed, were put in or taken out."""
    kind = rng.randrange(5)
    at = rng.randrange(len(data) + 1) if rng.random() < 0.5 else rng.randrange(min(len(data), 2_000) + 1)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + rng.randbytes(rng.choice((1, 8, 300))) + data[at:]
    if kind == 2:
        return data[:at] + data[at + rng.choice((1, 8, 300)) :]
    if kind == 3:
        return data + rng.choice((b"\0" * 100, b"\n{", data[-200:]))
    changed = bytearray(data)
    for _ in range(rng.choice((1, 5, 50))):
        if changed:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)
