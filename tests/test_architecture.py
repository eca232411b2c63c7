"""The house rules that a machine can check: rooms, one-way imports, bounds, no use of the global generator, no pickles.

Imports inside functions count; those for type checkers alone, and those of `__init__` files, do not. A name that is
imported from a room counts as from the file where the room has it.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "stateset_lightning"
FILES = sorted(PACKAGE.rglob("*.py"))

MAX_ENTRIES = 26  # 24, and two for conversations
MAX_CHAIN = 11
# The house's 11,000, and what follows it may add: 400 for what a run keeps, 400 for hostile input, 700 for models, 900
# for files and rewards, 900 for GPUs, 700 for learning, 1,000 for conversations: 16,000.
MAX_CODE_LINES = 16_000
MAX_FILE_LINES = 350

LAYERS = [
    {"types", "errors", "seeding", "ranks", "files", "redaction", "threads", "workers", "tiny", "moved"},
    {"algorithm"},
    {"data", "policy"},
    {"rollout"},
    {"environments", "rewards"},
    {"evaluation"},
    {"training"},
    {"run"},
    {"callbacks", "module", "datamodule"},
    {"cli"},
]
PURE = {
    "algorithm": {"lightning", "transformers"},
    "types": {"lightning", "transformers"},
    "rewards": {"lightning"},
}


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


def file_of(module: str) -> Path | None:
    """The file of a dotted name of the package; None if it is no module."""
    place = PACKAGE.parent.joinpath(*module.split("."))
    return next((p for p in (place.with_suffix(".py"), place / "__init__.py") if p.is_file()), None)


def statements(path: Path) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports of a file, also those inside functions, without those that only a type checker sees."""

    def walk(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield child
            elif not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
                yield from walk(child)

    return walk(ast.parse(path.read_text()))


@cache
def homes(init: Path) -> dict[str, Path]:
    """Where an `__init__` has its names from."""
    found: dict[str, Path] = {}
    for node in ast.walk(ast.parse(init.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and (home := file_of(node.module)):
            found.update(dict.fromkeys((alias.name for alias in node.names), home))
    return found


def imported(path: Path) -> set[Path]:
    """Files of the package that a file imports."""
    found: set[Path] = set()
    for node in statements(path):
        if isinstance(node, ast.Import):
            found.update(
                file for alias in node.names if (file := file_of(alias.name)) and alias.name != "stateset_lightning"
            )
        elif node.module and node.module.startswith("stateset_lightning"):
            home = file_of(node.module)
            for alias in node.names:
                named = file_of(f"{node.module}.{alias.name}") or (homes(home).get(alias.name, home) if home else None)
                if named is not None and named != PACKAGE / "__init__.py":
                    found.add(named)
    return found - {path}


IMPORTS = {path: imported(path) for path in FILES if path.name != "__init__.py"}


def foreign(path: Path) -> set[str]:
    """Top-level names of the libraries that a file imports."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", [p for p in IMPORTS if p.name != "__main__.py"], ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    mine = room(path)
    upward = {name_of(file) for file in IMPORTS[path] if room(file) != mine and layer(room(file)) > layer(mine)}
    assert not upward, f"{name_of(path)} imports {sorted(upward)}, which stand above {mine}"
    wrong = foreign(path) & PURE.get(mine, set())
    assert not wrong, f"{mine} is to know nothing of {sorted(wrong)}"


def test_every_room_has_a_layer() -> None:
    assert {room(path) for path in FILES} - {"__init__", "__main__"} == set.union(*LAYERS)


def test_few_entries_at_the_top_level() -> None:
    entries = {path.name for path in PACKAGE.iterdir()} - {"py.typed", "__pycache__"}
    assert len(entries) <= MAX_ENTRIES, sorted(entries)


def test_no_circle_among_files() -> None:
    left = {path: {file for file in files if file in IMPORTS} for path, files in IMPORTS.items()}
    while free := [path for path, files in left.items() if not files & left.keys()]:
        for path in free:
            del left[path]
    assert not left, f"in or above a circle: {sorted(map(name_of, left))}"


def test_chains_of_imports_are_short() -> None:
    arrows: dict[str, set[str]] = {}
    for path, files in IMPORTS.items():
        arrows.setdefault(room(path), set()).update(room(file) for file in files if room(file) != room(path))

    @cache
    def longest(entry: str) -> list[str]:
        return [entry, *max((longest(other) for other in arrows.get(entry, ())), key=len, default=[])]

    chain = max((longest(entry) for entry in arrows), key=len)
    assert len(chain) <= MAX_CHAIN, " < ".join(reversed(chain))


def code_lines(path: Path) -> int:
    """Lines that are neither blank nor comment nor docstring."""
    text, docstrings = path.read_text(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            first = node.body[0]
            docstrings.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in blank:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_files_and_package_stay_small() -> None:
    long = {name_of(path): n for path in FILES if (n := len(path.read_text().splitlines())) > MAX_FILE_LINES}
    assert long == {}
    by_room: dict[str, int] = {}
    for path in FILES:
        by_room[room(path)] = by_room.get(room(path), 0) + code_lines(path)
    total = sum(by_room.values())
    assert total <= MAX_CODE_LINES, f"{total} lines of code: {by_room}"


GLOBAL_RANDOMNESS = re.compile(
    r"torch\.(rand|randn|randint|randperm|multinomial|bernoulli)\(|np\.random\.(rand|seed|shuffle)|\brandom\.(random|shuffle|choice)\("
)


@pytest.mark.parametrize("path", [p for p in FILES if p.name != "train.py"], ids=name_of)
def test_nothing_draws_from_a_global_generator_or_unpickles(path: Path) -> None:
    text = path.read_text()
    assert not GLOBAL_RANDOMNESS.search(text)
    assert "weights_only=False" not in text
    # The description of a sharded checkpoint is read by a reader that knows a few classes of torch and refuses all
    # others. The worker pipe carries the user's own reward object to a child of the same program; no file is ever
    # unpickled.
    assert not re.search(r"(pickle|dill)\.(load|Unpickler)", text) or path.name in (
        "process.py",
        "pool.py",
        "checkpoint_io.py",
    )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_file_says_what_it_is_for(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
    assert docstring[0].isupper() or docstring[0] in "`'\"" or docstring.startswith(("stateset", "pass", "usage"))
