"""The house rules that a machine can check: one-way imports, file sizes, no use of the global generator, nothing pickled."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "stateset_lightning"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = [
    {"errors", "extras", "redaction", "bounds", "files", "seeding", "types", "ranks", "daemon_threads", "tiny"},
    {"algorithm"},
    {"data", "policy"},
    {"rollout", "text_model"},
    {"rewards"},
    {"evaluation"},
    {
        "metrics",
        "micro_steps",
        "episode",
        "records",
        "dynamic_sampling",
        "sampling_ahead",
        "fixed_logprobs",
        "collection",
        "loss",
        "run_checks",
        "checkpoint_io",
        "sharding",
        "environment",
    },
    {"callbacks"},
    {"bad_steps"},
    {"resume", "resumable"},
    {"module", "datamodule"},
    {"cli_messages", "lightning_cli", "convert", "trained", "generate", "export", "report", "estimate", "doctor", "completion"},
    {"cli"},
]
PURE = {"algorithm": {"lightning", "transformers"}, "types": {"lightning", "transformers"}, "rewards": {"lightning", "transformers"}}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


def imported_modules(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return names + [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]


def ids(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", [p for p in FILES if p.parent != PACKAGE or p.stem not in ("__init__", "__main__")], ids=ids)
def test_imports_point_one_way(path: Path) -> None:
    mine = room(path)
    rooms = {name.split(".")[1] for name in imported_modules(path) if name.startswith("stateset_lightning.")}
    upward = {other for other in rooms if other != mine and layer(other) > layer(mine)}
    assert not upward, f"{ids(path)} imports from {sorted(upward)}, which stand above {mine}"
    foreign = {name.split(".")[0] for name in imported_modules(path)} & PURE.get(mine, set())
    assert not foreign, f"{mine} is to know nothing of {sorted(foreign)}"


def test_every_room_has_a_layer() -> None:
    assert {room(path) for path in FILES} - {"__init__", "__main__"} == set.union(*LAYERS)


def test_files_and_package_stay_small() -> None:
    lines = {ids(path): len(path.read_text().splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count > 350} == {}
    assert sum(lines.values()) < 17_500


GLOBAL_RANDOMNESS = re.compile(
    r"torch\.(rand|randn|randint|randperm|multinomial|bernoulli)\(|np\.random\.(rand|seed|shuffle)|\brandom\.(random|shuffle|choice)\("
)


@pytest.mark.parametrize("path", [p for p in FILES if p.name != "train.py"], ids=ids)
def test_nothing_draws_from_a_global_generator_or_unpickles(path: Path) -> None:
    text = path.read_text()
    assert not GLOBAL_RANDOMNESS.search(text)
    assert "weights_only=False" not in text
    # The description of a sharded checkpoint is read by a reader that knows a few classes of torch and refuses all others.
    # The worker pipe carries the user's own reward object to a child of the same program; no file is ever unpickled.
    assert not re.search(r"(pickle|dill)\.(load|Unpickler)", text) or path.name in ("worker.py", "worker_pool.py", "checkpoint_io.py")


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_every_file_says_what_it_is_for(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
    assert docstring[0].isupper() or docstring[0] in "`'\"" or docstring.startswith(("stateset", "pass"))
