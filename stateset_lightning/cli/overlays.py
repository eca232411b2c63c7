"""Configs and flags -> one mapping of what the user wrote; no defaults, no types.

A later one wins over an earlier one, and a flag over each file:
  mappings        are merged, key by key
  null            over a key of a mapping that is open (`data.fields`) removes it; over an option it is a value
  lists           are replaced whole; `callbacks+:` adds to what is there
  another class   starts from its own defaults; only an optimizer keeps the `lr` that was given
  a flag          is an overlay with one key; below a list (--model.reward.weight) it means the last item
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import yaml
from jsonargparse import set_dumper
from jsonargparse._loaders_dumpers import get_yaml_default_loader  # numbers as flags have them: 1e-4

from stateset_lightning.errors import ConfigError
from stateset_lightning.files import keep_inputs
from stateset_lightning.redaction import remember

REMOVED = object()  # stands where a null was written over a key; what it means depends on the key's type

_SPECIFICATION = {"class_path", "init_args", "dict_kwargs"}
_MAX_VALUES, _MAX_DEPTH = 100_000, 100
_TOO_LARGE = "more than 100,000 values, or nested more than 100 deep; a config is neither (look for aliases, *name)"


class _Dumper(yaml.SafeDumper):
    """Writes text that jsonargparse would read as a number, 1e3, in quotes; PyYAML itself takes that for text."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*[eE][-+]?\d+$"), [*"-+0123456789"])


def dump_yaml(content: Any) -> str:
    """A config as YAML that is read as it was."""
    return str(yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


set_dumper("yaml", dump_yaml)


def merged_words(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What the words of a command say.

    Returns:
        The mapping that all configs and flags make, and the words that are neither, such as --print_config.

    Raises:
        ConfigError: If a config file cannot be read.
    """
    files, flags, rest, left = list[Any](), list[Any](), list[str](), list(words)
    while left:
        word = left.pop(0)
        flag, given, value = word.partition("=")
        is_option = flag == "-c" or (flag.startswith("--") and not flag.endswith(("help", "print_config")))
        if not is_option or not (given or (left and not left[0].startswith("--"))):
            rest.append(word)
            continue
        value = value if given else left.pop(0)
        if flag in ("-c", "--config"):
            text = value if value.lstrip().startswith("{") or "\n" in value else None
            keep_inputs(value if text is None else None)
            files.append(read_yaml(value, f"--config {value}", "keys such as model:, data: and trainer:", text))
        else:
            flags.append(functools.reduce(lambda inner, key: {key: inner}, flag[2:].split(".")[::-1], cast(Any, value)))
    return functools.reduce(merge, [*files, *flags], {}), rest


def read_yaml(file: str | Path, name: str, keys: str, text: str | None = None) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Args:
        file: Its path.
        name: What the user calls it, for the error.
        keys: What it must hold, for the error.
        text: What stands in it, if there is no such file.

    Raises:
        ConfigError: If it cannot be read, holds something else, or a key twice.
    """
    loader = get_yaml_default_loader()
    try:
        text = Path(file).read_text(encoding="utf-8") if text is None else text
        _check_nodes(yaml.compose(text, loader), file)
        content = yaml.load(text, loader)
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror}); paths are relative to {Path.cwd()}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not valid UTF-8; save the file as UTF-8") from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place, reason = f":{mark.line + 1}" if mark else "", problem or str(error).splitlines()[0]
        raise ConfigError(f"{file}{place}: malformed YAML: {reason}; check indentation, brackets and quotes") from error
    except RecursionError as error:
        raise ConfigError(f"{file}: {_TOO_LARGE}") from error
    if not isinstance(content, dict):
        found = "empty" if content is None else f"not a mapping of keys but {content!r:.60}"
        raise ConfigError(f"{name}: the file is {found}; it must hold {keys}")
    remember(content)
    return content


def _check_nodes(root: yaml.Node | None, file: str | Path) -> None:
    """No key twice, and no more values than a config can have: aliases of aliases make billions."""
    nodes, seen = [(root, 0)], 0
    while nodes:
        node, depth = nodes.pop()
        seen += 1
        if depth > _MAX_DEPTH or seen > _MAX_VALUES:
            raise ConfigError(f"{file}: {_TOO_LARGE}")
        items = node.value if isinstance(node, yaml.CollectionNode) else []
        nodes += [(item[1] if isinstance(item, tuple) else item, depth + 1) for item in items]
        lines: dict[str, int] = {}
        for key, _ in items if isinstance(node, yaml.MappingNode) else []:
            line = key.start_mark.line + 1
            if (written := f"the key {key.value}") in lines:
                raise ConfigError(f"{file}:{line}: {written} stands in line {lines[written]} already; merge the two")
            lines[written] = line


def merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the changes of `overlay`; see the top of this file. Neither is changed."""
    merged = dict(base)
    for key, value in overlay.items():
        name = str(key).removesuffix("+")
        if name != str(key):
            merged[name] = [*as_list(merged.get(name)), *as_list(value)]
        elif value is None and key in base and key not in _SPECIFICATION:
            merged[key] = REMOVED
        else:
            merged[key] = _merge_values(str(key), base.get(key), value)
    return merged


def _merge_values(key: str, old: Any, new: Any) -> Any:
    if isinstance(old, dict):
        new = loaded(new)
        if is_class(new) and ("class_path" in old or key == "optimizer"):
            new = {"class_path": new}
    if not isinstance(new, dict):
        return new
    if "class_path" in new and not _is_same_class(old, new["class_path"]):
        given = old.get("init_args", old) if isinstance(old, dict) else {}
        kept = {"lr": given["lr"]} if key == "optimizer" and "lr" in given else {}
        return {**new, "init_args": merge(kept, new.get("init_args") or {})} if kept else new
    old = loaded(old)
    if isinstance(old, list) and old:
        return [*old[:-1], _merge_values(key, old[-1], new)]
    if is_class(old):
        old = {"class_path": old}
    elif isinstance(old, str) and key == "policy":
        old = {"model_name": old}
    if not isinstance(old, dict):
        return new
    if "class_path" in old:  # options of the class, as a flag gives them
        options = {name: value for name, value in new.items() if name not in _SPECIFICATION}
        new = {name: value for name, value in new.items() if name in _SPECIFICATION}
        if options:
            new["init_args"] = {**options, **(new.get("init_args") or {})}
    return merge(old, new)


def _is_same_class(old: Any, path: str) -> bool:
    """Whether both name one class; the one may be given without its module."""
    known = str(old.get("class_path") if isinstance(old, dict) else old)
    return known == path or path.endswith(f".{known}") or known.endswith(f".{path}")


def is_class(value: Any) -> bool:
    """Whether a text names a class, as AdamW or torch.optim.AdamW; not so tiny, rows.jsonl, False."""
    name = str(value).rpartition(".")[2]
    return (
        isinstance(value, str) and name.isidentifier() and name[0].isupper() and isinstance(yaml.safe_load(name), str)
    )


def loaded(value: Any) -> Any:
    """A flag's mapping or list; any other text, and what is no text, stays as it is."""
    with suppress(yaml.YAMLError):
        if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
            return yaml.load(value, get_yaml_default_loader())
    return value


def as_list(value: Any) -> list[Any]:
    """The items of a list, or the one value that stands for a list of it."""
    value = loaded(value)
    return value if isinstance(value, list) else [] if value in (None, REMOVED) else [value]
