"""What can be told before Lightning, torch and transformers are imported, which takes seconds: YAML, words, rows.

All of it is checked again by whoever uses it; what needs an option's type is left to them.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

from stateset_lightning.cli.overlays import REMOVED, as_list, loaded, merged_words
from stateset_lightning.data.shapes import RowOptions
from stateset_lightning.data.sources import read_split
from stateset_lightning.errors import ConfigError

# Which data each command reads.
SPLITS = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("predict",)}

FIRST = 1_000  # rows of each file that are looked at

Merged = tuple[dict[str, Any], list[str]]


def checked_words(command: str, words: Sequence[str]) -> Merged:
    """What the words of a command say, as `merged_words` has it.

    Raises:
        ConfigError: If a config cannot be read, or a word belongs to no option.
        DataError: If a file of the data cannot be read, or one of its first rows cannot be used.
    """
    merged, rest = merged_words(words)
    # What follows a flag is its own: a class whose options are shown, as in `--model.optimizer.help AdamW`.
    if extra := [word for before, word in pairwise(["", *rest]) if "-" not in (before[:1], word[:1])]:
        raise ConfigError(f"{extra[0]} belongs to no option; give a config as --config FILE, data as --data.train FILE")
    data = merged.get("data")
    if isinstance(data, dict) and not any(re.search("^-h|help|print_config", word) for word in rest):
        _check_rows(command, data)
    return merged, rest


def _check_rows(command: str, data: dict[str, Any]) -> None:
    held_out = command == "validate" and data.get("validation_fraction") not in (None, REMOVED, 0, "0")
    given = {key: loaded(value) for key, value in data.items() if value is not REMOVED}
    for split in ("train",) if held_out else SPLITS[command]:
        spec: Any = given.get(split)
        if spec != "null" and as_list(spec) and all(isinstance(item, str | dict) for item in as_list(spec)):
            with suppress(ConfigError):  # of options, whose types are not known here
                read_split(spec, split, RowOptions().of(given), FIRST)
