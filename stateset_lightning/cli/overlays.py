"""Configs and flags -> one mapping of what the user wrote; no defaults, no types.

A later one wins over an earlier one, and a flag over each file:
  mappings        are merged, key by key
  null            over a key of a mapping that is open (`data.fields`) removes it; over an option it is a value
  lists           are replaced whole; `callbacks+:` adds to what is there
  another class   starts from its own defaults; only an optimizer keeps the `lr` that was given
  a flag          is an overlay with one key; below a list (--model.reward.weight) it means the last item
"""

import errno
import functools
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import set_dumper
from jsonargparse._loaders_dumpers import get_yaml_default_loader  # numbers as flags have them: 1e-4

from stateset_lightning.errors import ConfigError
from stateset_lightning.files import keep_inputs
from stateset_lightning.files.yaml_text import load_yaml
from stateset_lightning.redaction import remember
from stateset_lightning.threads import DaemonThreads

REMOVED = object()  # stands where a null was written over a key; what it means depends on the key's type

SPECIFICATION = {"class_path", "init_args", "dict_kwargs"}
_ROWS = r"\.data\.(train|validation|test|predict)|\.environment\.scenarios"  # the second: of the guide
_SECTIONS = "model", "data", "trainer"
_MAX_VALUES, _MAX_BYTES, _MAX_SECONDS = 100_000, 5_000_000, 5


class _Dumper(yaml.SafeDumper):
    """Writes text that jsonargparse would read as a number, 1e3, in quotes; PyYAML itself takes that for text."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*[eE][-+]?\d+$"), [*"-+0123456789"])
# Enums that are text, as of `Timer.interval`.
_Dumper.add_multi_representer(str, lambda dumper, text: dumper.represent_str(str(getattr(text, "value", text))))


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
            content = read_yaml(value, f"--config {value}", "keys such as model:, data: and trainer:", text)
            # Of a section that holds comments alone, nothing is said.
            files.append({key: given for key, given in content.items() if given is not None or key not in _SECTIONS})
        else:
            flags.append(nested(flag[2:], value))
    merged = functools.reduce(merge, [*files, *flags], dict[str, Any]())
    _check_ends(merged)
    return merged, rest


def nested(key: str, value: Any) -> dict[str, Any]:
    """The mapping of mappings that a key with dots stands in."""
    return functools.reduce(lambda inner, name: {name: inner}, reversed(key.split(".")), value)


def _check_ends(value: Any, key: str = "") -> None:
    """No value names a pipe, which jsonargparse, or whoever reads it later, would wait for."""
    for name, item in value.items() if isinstance(value, dict) else ():
        _check_ends(item, f"{key}.{name}")
    with suppress(OSError):  # no path at all
        if isinstance(value, str) and Path(value).is_fifo():
            raise ConfigError(f"{key[1:]}={value} is a pipe, which may never end; give a file")


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
    keep_inputs(file if text is None else None)
    try:
        text = _read_text(Path(file)) if text is None else text
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror}); paths are relative to {Path.cwd()}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not valid UTF-8; save the file as UTF-8") from error
    content = load_yaml(text, file, get_yaml_default_loader(), _MAX_VALUES, ConfigError, _ROWS)
    if not isinstance(content, dict):
        found = "empty" if content is None else f"not a mapping of keys but {content!r:.60}"
        raise ConfigError(f"{name}: the file is {found}; it must hold {keys}")
    remember(content)
    return content


def _read_text(path: Path) -> str:
    """The text of a file that is no longer than a config; also of a pipe, if it comes within seconds.

    Raises:
        OSError: If it cannot be read, or does not end: a device, a pipe that nobody writes to.
    """

    def read() -> bytes:
        with path.open("rb") as file:
            return file.read(_MAX_BYTES + 1)

    try:
        content: bytes = DaemonThreads(1, "config").submit(read).result(_MAX_SECONDS)
    except TimeoutError:
        raise OSError(errno.ETIMEDOUT, f"it does not end within {_MAX_SECONDS} s") from None
    if len(content) > _MAX_BYTES:
        raise OSError(errno.EFBIG, f"more than {_MAX_BYTES:,} bytes")
    return content.decode()


def merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the changes of `overlay`; see the top of this file. Neither is changed."""
    merged = dict(base)
    for key, value in overlay.items():
        if str(key).endswith("+"):
            name = str(key)[:-1]
            merged[name] = [*as_list(merged.get(name)), *as_list(value)]
        elif value is None and key in base and key not in SPECIFICATION:
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
        options = {name: value for name, value in new.items() if name not in SPECIFICATION}
        new = {name: value for name, value in new.items() if name in SPECIFICATION}
        if options:
            new["init_args"] = {**options, **(new.get("init_args") or {})}
    return merge(old, new)


def _is_same_class(old: Any, path: str) -> bool:
    """Whether both name one class; the one may be given without its module."""
    known = str(old.get("class_path") if isinstance(old, dict) else old)
    return known == path or path.endswith(f".{known}") or known.endswith(f".{path}")


def is_class(value: Any) -> bool:
    """Whether a text names a class, as AdamW or torch.optim.AdamW; not so tiny, rows.jsonl, False."""
    name = value.rpartition(".")[2] if isinstance(value, str) else ""
    return name.isidentifier() and name[0].isupper() and isinstance(yaml.safe_load(name), str)


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
