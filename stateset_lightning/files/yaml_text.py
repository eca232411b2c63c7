"""YAML that ends: no more values, and no deeper, than a file of ours can have."""

import math
import re
from pathlib import Path
from typing import Any

import yaml

from stateset_lightning.errors import UserError
from stateset_lightning.redaction import MAX_DEPTH, MAX_VALUES

# Of an integer: Python itself makes no text of one with more than 4,300.
MAX_DIGITS = 4_000

# What is no text in YAML 1.2 either. 1.1, which PyYAML reads, also makes a boolean of `no`, 90 of `1:30`, 83 of `0123`,
# infinity of `.inf` and a date of `2024-01-02`.
_NO_TEXT = re.compile(r"[-+]?((0|[1-9]\d*)(\.\d*)?|\.\d+)(e[-+]?\d+)?|true|false", re.IGNORECASE)


def load_yaml(text: str, file: str | Path, loader: Any, most: int | None, refusal: type[UserError], rows: str) -> Any:
    """What a YAML text holds, if it is no more than it seems: aliases of aliases make billions of values.

    Args:
        text: The content of the file.
        file: What the user calls it, for the error.
        loader: `yaml.SafeLoader`, or one derived from it.
        most: Values that there may be, counting those of an alias each time; None if nobody writes them out.
        rows: A pattern of the keys, each after a dot, below which rows of data stand: there a word without quotes is
            text unless it is none in YAML 1.2 either.
        refusal: What is raised if the text is malformed, holds too much, or a key twice; it names the line.
    """
    try:
        _check_depth(text, loader)
        reader = loader(text)
        root = reader.get_single_node()
        _check_nodes(root, most, rows)
        return None if root is None else reader.construct_document(root)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-40
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place, reason = f":{mark.line + 1}" if mark else "", problem or str(error).splitlines()[0]
        if isinstance(error, _Refused):
            raise refusal(f"{file}{place}: {problem}") from error
        raise refusal(f"{file}{place}: malformed YAML: {reason}; check indentation, brackets and quotes") from error


class _Refused(yaml.MarkedYAMLError):
    """What YAML allows, and no file of ours needs."""

    def __init__(self, problem: str, place: Any) -> None:
        super().__init__(problem=problem, problem_mark=place.start_mark)


def _too_large(place: Any, most: int = MAX_VALUES) -> _Refused:
    return _Refused(f"more than {most:,} values, or nested more than {MAX_DEPTH} deep (look for aliases, *name)", place)


def _check_depth(text: str, loader: Any) -> None:
    """By events, one at a time: to read nodes, PyYAML 6.0.3 calls itself, and 30,000 brackets end the process."""
    depth = 0
    for event in yaml.parse(text, loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _too_large(event)


def _check_nodes(root: yaml.Node | None, most: int | None, rows: str) -> None:
    nodes, seen, known = [(root, 0, "")] if root else [], 0, set()
    while nodes:
        node, depth, place = nodes.pop()
        if most is None and node in known:
            continue
        known.add(node)
        seen += 1
        if depth > MAX_DEPTH or seen > (most or math.inf):
            raise _too_large(node, most or MAX_VALUES)
        if isinstance(node, yaml.ScalarNode):
            if node.tag == "tag:yaml.org,2002:int" and len(node.value) > MAX_DIGITS:
                raise _Refused(f"an integer of {len(node.value):,} characters; put it in quotes", node)
            is_guess = not node.style and node.tag.endswith((":bool", ":int", ":float", ":timestamp"))
            if is_guess and re.match(rows, place) and not _NO_TEXT.fullmatch(node.value):
                node.tag = "tag:yaml.org,2002:str"
        elif isinstance(node, yaml.SequenceNode):
            nodes += [(item, depth + 1, place) for item in node.value]
        else:
            lines: dict[str, int] = {}
            for key, value in node.value:
                inside = place
                if isinstance(key, yaml.ScalarNode):
                    if key.value in lines:
                        earlier = lines[key.value]
                        raise _Refused(f"the key {key.value} stands in line {earlier} already; merge the two", key)
                    lines[key.value] = key.start_mark.line + 1
                    inside = f"{place}.{key.value}" if depth < 2 else place
                nodes += [(item, depth + 1, inside) for item in (key, value)]
