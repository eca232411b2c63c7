"""Parquet files and Hugging Face data sets -> raw rows, through the optional `datasets` library.

A hub id is `owner/name`, `owner/name:config` or `owner/name:config:split`. No code of a data set is ever run.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from stateset_lightning.data.reading import RawRow, check_file
from stateset_lightning.errors import DataError, require

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")
_HUB_SPLITS = {"train": "train", "validation": "validation", "test": "test", "predict": "test"}


def is_hub_id(text: str) -> bool:
    """Whether `text` looks like `owner/name`, with or without a configuration and a split behind colons."""
    return _HUB_ID.fullmatch(text) is not None


def read_hub(hub_id: str, split: str) -> list[RawRow]:
    """All rows of a data set on the hub; without a split in `hub_id`, of its split of this name (for predict: test).

    Raises:
        ConfigError: If `datasets` is not installed.
        DataError: If the data set, its configuration or its split cannot be loaded.
    """
    name, config, wanted = [*hub_id.split(":"), None, None][:3]
    what = f"'{hub_id}' is no file here"
    require("datasets", "hub", f"{what}, and a hub id")
    import datasets

    load = partial(datasets.load_dataset, name, config, split=wanted or _HUB_SPLITS[split])
    instead = "check the name, or write owner/name:config:split"
    return _rows(load, hub_id, f"{what} and cannot be loaded from the Hugging Face hub", instead)


def read_parquet(path: Path) -> list[RawRow]:
    """All rows of a Parquet file.

    Raises:
        ConfigError: If `datasets` is not installed.
        DataError: If it is no file, or not Parquet.
    """
    check_file(path)
    require("datasets", "hub", f"{path}: Parquet")
    import datasets

    load = partial(datasets.Dataset.from_parquet, str(path))
    return _rows(load, str(path), f"{path}: cannot be read as Parquet", "write the file again, or as .jsonl")


def _rows(load: Callable[[], Any], prefix: str, failed: str, instead: str) -> list[RawRow]:
    import datasets

    try:
        rows = load()
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:  # RuntimeError: a script
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{failed}: {reason}; {instead}") from error
    if len(rows) == 0:
        raise DataError(f"{prefix}: has no rows; give at least one scenario")
    return [RawRow(dict(columns), f"{prefix} item {number}", number) for number, columns in enumerate(rows, start=1)]
